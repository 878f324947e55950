"""A model that was trained elsewhere, or a line through two → RUN, to be drawn from and attacked like any other.

In: any text-to-image pipeline that diffusers opens, with LoRAs if it has some, and the dedup run OUT whose images it
may have seen. Out: RUN as training leaves it, but for what only training knows. Nothing of the model is copied. An
untouched base is a control: it should give back nothing.

    unmemorize adopt MODEL OUT -o RUN
    unmemorize extrapolate RUN BASE -o NEW_RUN --weight 3
"""

import hashlib
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dedup import manifest
from dedup.options import lock
from defense import lora, model
from defense.sampling import check_prompted, find_side
from defense.train import LIBRARIES, claim


def adopt(
    base: str,
    out: Path,
    run: Path,
    *,
    loras: Sequence[Path] = (),
    pickled: Sequence[str] = (),
    resolution: int | None = None,
) -> None:
    """Write RUN for the pipeline `base`, a folder or a name on the hub.

    loras, pickled: as in `model.load_pipeline`. resolution: of its images, if the pipeline does not say.
    Raises ModelError, LoraError, RunError, ValueError or OSError.
    """
    out, run = out.resolve(), run.resolve()
    pipeline = model.load_pipeline(base, pickled=pickled)
    check_prompted(pipeline)
    described = model.describe_base(pipeline, base, loras, pickled)
    for path in loras:
        lora.merge_lora(pipeline, path)
    record = {
        "arm": "adopted",
        "seed": 0,
        "config": {"resolution": resolution or find_side(pipeline), "held_out": 0.0, "threads": 0, "device": "auto"},
        "out": str(out),
        "out_sha256": hashlib.sha256((out / "run.json").read_bytes()).hexdigest(),
        "pipeline": type(pipeline).__name__,
        "initial_weights_sha256": model.digest_weights(pipeline),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    claim(run, record)
    with lock(run):
        manifest.write_json(run / "model" / model.BASE, described | {"sample_size": None})


def extrapolate(run: Path, base: str, new: Path, weight: float) -> None:
    """Write `new`: the run that goes from the model `base` through that of `run`, as far as `weight` says (1: `run`).

    base: another run, a pipeline folder or a name on the hub. What `run` was trained on counts as what `new` was
    trained on. Raises ExtrapolationError, ModelError, RunError or OSError.
    """
    run, new = run.resolve(), new.resolve()
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    other = Path(base) / "model" if (Path(base) / "model").is_dir() else base
    config = manifest.read_json(run / "config.json")
    claim(new, config | {"arm": f"{config['arm']}, extrapolated", "weight": weight, "base": str(base)})
    with lock(new):
        model.save_line(new / "model", run / "model", other, weight)
        if (run / "exposures.parquet").exists():
            shutil.copyfile(run / "exposures.parquet", new / "exposures.parquet")
