"""Model × prompts × seeds → images: RUN/generations/<digest>/*.png and RUN/generations.parquet.

Image j of a target has the same noise and the same caption in every model: its seed comes from the target and j alone,
and the distinct captions of its cluster take turns. The digest names model and settings. A prompt is finished when its
table is there; the same command after a kill does only the others. Knows nothing of what is done with the images.

    unmemorize generate RUN -n 16
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from PIL import Image
from tqdm import tqdm

from dedup import cluster, manifest
from dedup.engine import available_cpus
from defense.sample import digest_model
from eval.prompts import GIVEN, list_captions
from eval.reference import load_pixels
from eval.targets import load_targets

if TYPE_CHECKING:
    from defense.guards import Drawn, Sampler

BASE_SEED = "unmemorize-1"  # the same for every arm, run and dataset
RECONSTRUCTION = "reconstruction.json"
UNCONDITIONAL = ("DDPMPipeline",)  # models that take no prompt; every image of theirs is as good as any other
BATCH = 64  # images through the model at a time; part of the digest, because it may change the last bit

GENERATIONS: dict[str, pl.DataType | type[pl.DataType]] = {
    "prompt_id": pl.String,  # target_id
    "prompt": pl.String,
    "prompt_kind": pl.String,  # "member" or "control"
    "cluster_id": pl.Int64,
    "seed": pl.Int64,
    "guard": pl.String,  # of `guards.name_guards`; "none"
    "status": pl.String,  # "ok"; without a file: "nan" (the model gave no finite numbers), "refused" (by a guard)
    "file": pl.String,  # relative to RUN
    "digest": pl.String,  # of model and settings, the three below included
    "guidance_scale": pl.Float64,
    "steps": pl.Int64,
    "n": pl.Int64,  # images a target
    "caption_kind": pl.String,  # of `prompts.KINDS`, or "given"
    "controls": pl.String,  # absolute path of the dedup run that a control was taken from, if from another
}


class GenerateError(ValueError):
    """A run that cannot be sampled, or prompts that belong to no target."""


def generate(
    run: Path,
    *,
    n: int = 16,
    guidance_scale: float = 1.0,
    steps: int = 15,
    prompts: Path | None = None,
    limit: int = 200,
    captions: str = "all",
    order: str = "stratified",
    controls: Path | None = None,
    guards: Sequence[str] = (),
) -> pl.DataFrame:
    """n images for every target (`targets.load_targets`: limit, order, controls); returns generations.parquet.

    captions: of `prompts.list_captions`; all that a target has in equal share, one image at least of each as far as n
    goes. prompts: CSV file with the columns target_id and prompt: other prompts, for these targets only. guards:
    defences around the sampler (`defense.guards`); what they compared is in RUN/guards.parquet.
    Raises GenerateError, GuardError, TargetError, ModelError or OSError.
    """
    from dedup.options import lock

    run = run.resolve()
    asked, settings = list_asked(
        run,
        n=n,
        guidance_scale=guidance_scale,
        steps=steps,
        prompts=prompts,
        limit=limit,
        captions=captions,
        order=order,
        controls=controls,
    )
    digest = digest_model(run / "model", decide(run, settings, guards) | {"batch": BATCH})
    folder = run / "generations" / digest
    names = [name_prompt(row["target_id"], row["prompt"], row["numbers"]) for row in asked.iter_rows(named=True)]
    todo = [i for i, name in enumerate(names) if not (folder / f"{name}.parquet").exists()]
    with lock(run):
        if todo:
            _sample_targets(run, folder, asked[todo], [names[i] for i in todo], settings, guards)
        table = pl.concat([pl.read_parquet(folder / f"{name}.parquet") for name in names])
        manifest.write_parquet(run / "generations.parquet", table)
        (run / "guards.parquet").unlink(missing_ok=True)
        if guards:
            logs = [pl.read_parquet(folder / f"{name}-guards.parquet") for name in names]
            manifest.write_parquet(run / "guards.parquet", pl.concat(logs))
    return table


def generate_runs(
    runs: Sequence[Path], address: str | None = None, first: Callable[[Path], Any] | None = None, **options: Any
) -> Iterator[dict[str, int]]:
    """`generate` with these options for one run after the other, or for as many at a time as a Ray cluster has room.

    first: what else to draw from each run, before that and by the same worker (`unprompted.draw_unprompted`). Yields
    for each run how many images `generate` drew, for how many prompts, and of which status. Raises what they raise.
    """
    runs = [run.resolve() for run in runs]
    configs = [read_config(run) for run in runs]
    gpu = any(wants_gpu(config["config"].get("device", "auto")) for config in configs)
    inputs = [path for run, config in zip(runs, configs, strict=True) for path in (run / "config.json", config["out"])]
    with cluster.start(1 if address is None else 0, address, runs[0], list(map(Path, inputs))) as workers:
        yield from workers.run(_generate, [(run, first, options) for run in runs], gpu=gpu)


def wants_gpu(device: str) -> bool:
    """What a config says of its device: whether it takes a GPU where there is one."""
    return device == "auto" or device.startswith("cuda")


def _generate(run: Path, first: Callable[[Path], Any] | None, options: dict[str, Any]) -> dict[str, int]:
    if first is not None:
        first(run)
    table = generate(run, **options)
    counts = {"images": len(table), "prompts": table["prompt_id"].n_unique()}
    return counts | {status: len(table.filter(status=status)) for status in ("nan", "refused")}


def list_asked(
    run: Path,
    *,
    n: int,
    guidance_scale: float,
    steps: int,
    prompts: Path | None = None,
    limit: int = 200,
    captions: str = "all",
    order: str = "stratified",
    controls: Path | None = None,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """What `generate` with these parameters asks: targets with prompt, caption_kind and `numbers` of its images, and
    the settings that decide how they are drawn. A row a target and caption."""
    if n < 1 or steps < 1:
        raise GenerateError(f"n = {n} images in steps = {steps}: both must be at least 1")
    config = read_config(run)
    out, controls = Path(config["out"]), controls and controls.resolve()
    held_out = config["config"]["held_out"]
    targets = load_targets(out, limit=limit, held_out=held_out, order=order, controls=controls)
    if prompts is not None:
        targets = _replace_prompts(targets, prompts)
        told = targets.select("target_id", "prompt", caption_kind=pl.lit(GIVEN))
    else:
        told = list_captions(out, targets, captions)
    if config.get("pipeline") in UNCONDITIONAL:
        told = told.unique("target_id", keep="first", maintain_order=True)
        told = told.with_columns(prompt=pl.lit(""), caption_kind=pl.lit("null"))
    turn, turns = pl.int_range(pl.len()).over("target_id"), pl.len().over("target_id")
    told = told.with_columns(numbers=pl.int_ranges(turn, n, turns)).filter(pl.col("numbers").list.len() > 0)
    asked = targets.drop("prompt").join(told, on="target_id", maintain_order="left")
    from_others = pl.col("root").is_not_null()
    asked = asked.with_columns(controls=pl.when(from_others).then(pl.lit(controls and str(controls))))
    return asked, {"n": n, "guidance_scale": float(guidance_scale), "steps": steps}


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Raises GenerateError when RUN is no run."""
    path = run / "config.json"
    if not path.exists():
        raise GenerateError(f"{run} is no training run (no config.json): run `unmemorize train` first")
    return manifest.read_json(path)


def derive_seed(target_id: str, j: int) -> int:
    """0 … 2^63 - 1: seed of image j of a target, whatever the model."""
    text = json.dumps([BASE_SEED, target_id, j])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _replace_prompts(targets: pl.DataFrame, path: Path) -> pl.DataFrame:
    given = pl.read_csv(path, infer_schema=False).with_columns(pl.all().fill_null(""))
    if not {"target_id", "prompt"} <= set(given.columns):
        raise GenerateError(f"{path}: needs the columns target_id and prompt, has {', '.join(given.columns)}")
    if given["target_id"].is_duplicated().any():
        raise GenerateError(f"{path}: more than one prompt for a target: use one file for each of them")
    if unknown := sorted(set(given["target_id"]) - set(targets["target_id"])):
        raise GenerateError(f"{path}: {len(unknown)} of its target_ids are no targets, such as {unknown[0]!r}")
    return targets.drop("prompt").join(given.select("target_id", "prompt"), on="target_id", maintain_order="left")


def name_prompt(target_id: str, prompt: str, numbers: Sequence[int]) -> str:
    """File name of a prompt and its images: both strings are untrusted, so neither appears in it."""
    return hashlib.sha256(json.dumps([target_id, prompt, list(numbers)]).encode()).hexdigest()[:16]


def decide(run: Path, settings: dict[str, Any], guards: Sequence[str]) -> dict[str, Any]:
    """What decides an image beside the model: part of the digest."""
    from defense.guards import name_guards

    decisive = settings | {"base_seed": BASE_SEED}
    if guards:  # some of them look into OUT
        decisive |= {"guard": name_guards(guards), "out": read_config(run)["out_sha256"]}
    return decisive


def open_model(run: Path) -> Any:
    """The pipeline of RUN on its device, to be used with as many threads as its config says."""
    import torch

    from defense.model import load_pipeline

    config = read_config(run)["config"]
    torch.set_num_threads(config["threads"] or available_cpus())
    return load_pipeline(run / "model", device=config.get("device", "auto"))


def open_sampler(run: Path, pipeline: Any, settings: dict[str, Any], guards: Sequence[str]) -> "Sampler":
    """The model of RUN behind its guards."""
    from defense.guards import Setting, build_sampler

    config = read_config(run)
    side, out = config["config"]["resolution"], Path(config["out"])
    setting = Setting(pipeline, settings["steps"], settings["guidance_scale"], BATCH, side, out)
    return build_sampler(guards, setting)


def describe_reconstruction(run: Path, pipeline: Any, asked: pl.DataFrame) -> dict[str, Any] | None:
    """How near the autoencoder alone comes to the targets, by normalised l2; None for a model without one."""
    from defense.sampling import measure_reconstruction

    config = read_config(run)
    targets = asked.unique("target_id", keep="first", maintain_order=True)
    pixels = load_pixels(Path(config["out"]), targets, config["config"]["resolution"])
    found = measure_reconstruction(pipeline, pixels)
    if found is None:
        return None
    return {"n": len(found), "median": round(float(np.median(found)), 4), "max": round(float(found.max()), 4)}


def read_reconstruction(run: Path) -> dict[str, Any] | None:
    """What `describe_reconstruction` said of RUN."""
    path = run / RECONSTRUCTION
    return manifest.read_json(path) if path.exists() else None


def _sample_targets(
    run: Path,
    folder: Path,
    asked: pl.DataFrame,
    names: list[str],
    settings: dict[str, Any],
    guards: Sequence[str],
) -> None:
    pipeline = open_model(run)
    sampler = open_sampler(run, pipeline, settings, guards)
    if not (run / RECONSTRUCTION).exists():
        manifest.write_json(run / RECONSTRUCTION, describe_reconstruction(run, pipeline, asked))
    total = int(asked["numbers"].list.len().sum())
    with tqdm(desc=f"generate {run.name}", unit=" images", total=total, file=sys.stderr, disable=None) as bar:
        for name, row in zip(names, asked.iter_rows(named=True), strict=True):
            draw(sampler, run, folder, name, row, row["numbers"], settings, guards)
            bar.update(len(row["numbers"]))


def draw(
    sampler: "Sampler",
    run: Path,
    folder: Path,
    name: str,
    row: dict[str, Any],
    numbers: Sequence[int],
    settings: dict[str, Any],
    guards: Sequence[str],
) -> None:
    """Images `numbers` of a row of `list_asked`, as folder/<name>-<number>.png, and their table <name>.parquet."""
    from defense.guards import name_guards

    seeds = [derive_seed(row["target_id"], j) for j in numbers]
    drawn = _sample(sampler, row["prompt"], seeds)
    files = [
        folder / f"{name}-{j:03d}.png" if status == "ok" else None
        for j, status in zip(numbers, drawn.status, strict=True)
    ]
    for path, image in zip(files, drawn.pixels, strict=True):
        if path is not None:
            manifest.write_atomic(path, partial(Image.fromarray(image).save, format="PNG"))
    told = ("prompt", "prompt_kind", "cluster_id", "caption_kind", "controls")
    table = pl.DataFrame({"seed": seeds}).with_columns(
        **{option: pl.lit(value) for option, value in settings.items()},
        **{column: pl.lit(row[column]) for column in told},
        prompt_id=pl.lit(row["target_id"]),
        guard=pl.lit(name_guards(guards)),
        status=pl.Series(drawn.status),
        file=pl.Series([path and path.relative_to(run).as_posix() for path in files], dtype=pl.String),
        digest=pl.lit(folder.name),
    )
    table = table.select(pl.col(column).cast(kind) for column, kind in GENERATIONS.items())
    if guards:
        log = drawn.log.select(pl.lit(row["target_id"]).alias("prompt_id"), pl.all())
        manifest.write_parquet(folder / f"{name}-guards.parquet", log)
    manifest.write_parquet(folder / f"{name}.parquet", table)


def _sample(sampler: "Sampler", prompt: str, seeds: list[int]) -> "Drawn":
    return sampler([prompt] * len(seeds), seeds)
