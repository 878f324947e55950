"""Model × prompts × seeds → images: RUN/generations/<digest>/*.png and RUN/generations.parquet.

Image j of a target has the same noise in every model: its seed comes from the target and j alone. The digest names
model and settings. A prompt is finished when its table is there; the same command after a kill does only
the others. Knows nothing of what is done with the images.

    unmemorize generate RUN -n 16
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from PIL import Image
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from eval.targets import load_targets

if TYPE_CHECKING:
    from defense.guards import Drawn, Sampler

BASE_SEED = "unmemorize-1"  # the same for every arm, run and dataset
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
    "n": pl.Int64,  # images a prompt
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
    guards: Sequence[str] = (),
) -> pl.DataFrame:
    """n images for the prompt of every target (`targets.load_targets`); returns generations.parquet.

    prompts: CSV file with the columns target_id and prompt: other prompts, for these targets only. guards: defences
    around the sampler (`defense.guards`); what they compared is in RUN/guards.parquet.
    Raises GenerateError, GuardError, TargetError, ModelError or OSError.
    """
    from dedup.options import lock
    from defense.guards import name_guards

    if n < 1 or steps < 1:
        raise GenerateError(f"n = {n} images in steps = {steps}: both must be at least 1")
    run = run.resolve()
    config = read_config(run)
    targets = load_targets(Path(config["out"]), limit=limit, held_out=config["config"]["held_out"])
    if prompts is not None:
        targets = _replace_prompts(targets, prompts)
    if config.get("pipeline") in UNCONDITIONAL:
        targets = targets.with_columns(prompt=pl.lit(""))
    settings = {"n": n, "guidance_scale": float(guidance_scale), "steps": steps}
    decisive = settings | {"base_seed": BASE_SEED, "batch": BATCH}
    if guards:  # some of them look into OUT
        decisive |= {"guard": name_guards(guards), "out": config["out_sha256"]}
    digest = digest_model(run / "model", decisive)
    folder = run / "generations" / digest
    names = [_name(row["target_id"], row["prompt"]) for row in targets.iter_rows(named=True)]
    todo = [i for i, name in enumerate(names) if not (folder / f"{name}.parquet").exists()]
    with lock(run):
        if todo:
            _sample_targets(run, folder, targets[todo], [names[i] for i in todo], settings, config, guards)
        table = pl.concat([pl.read_parquet(folder / f"{name}.parquet") for name in names])
        manifest.write_parquet(run / "generations.parquet", table)
        (run / "guards.parquet").unlink(missing_ok=True)
        if guards:
            logs = [pl.read_parquet(folder / f"{name}-guards.parquet") for name in names]
            manifest.write_parquet(run / "guards.parquet", pl.concat(logs))
    return table


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


def digest_model(model: Path, settings: dict[str, Any]) -> str:
    """16 hex digits over every file of the model folder and the settings."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        state.update(f"\n{path.relative_to(model).as_posix()} {content}".encode())
    return state.hexdigest()[:16]


def _name(target_id: str, prompt: str) -> str:
    """File name of a prompt: both strings are untrusted, so neither appears in it."""
    return hashlib.sha256(json.dumps([target_id, prompt]).encode()).hexdigest()[:16]


def _sample_targets(
    run: Path,
    folder: Path,
    targets: pl.DataFrame,
    names: list[str],
    settings: dict[str, Any],
    config: dict[str, Any],
    guards: Sequence[str],
) -> None:
    import torch

    from defense.guards import Setting, build_sampler, name_guards
    from defense.model import load_pipeline

    torch.set_num_threads(config["config"]["threads"] or available_cpus())
    pipeline = load_pipeline(run / "model", device=config["config"].get("device", "auto"))
    n, side, out = settings["n"], config["config"]["resolution"], Path(config["out"])
    setting = Setting(pipeline, settings["steps"], settings["guidance_scale"], BATCH, side, out)
    sampler, guard = build_sampler(guards, setting), name_guards(guards)
    rows = list(zip(names, targets.iter_rows(named=True), strict=True))
    with tqdm(desc=f"generate {run.name}", unit=" images", total=len(rows) * n, file=sys.stderr, disable=None) as bar:
        for name, target in rows:
            seeds = [derive_seed(target["target_id"], j) for j in range(n)]
            drawn = _sample(sampler, target["prompt"], seeds)
            files = [folder / f"{name}-{j:03d}.png" if drawn.status[j] == "ok" else None for j in range(n)]
            for path, image in zip(files, drawn.pixels, strict=True):
                if path is not None:
                    manifest.write_atomic(path, partial(Image.fromarray(image).save, format="PNG"))
            table = pl.DataFrame({"seed": seeds}).with_columns(
                **{option: pl.lit(value) for option, value in settings.items()},
                prompt_id=pl.lit(target["target_id"]),
                prompt=pl.lit(target["prompt"]),
                prompt_kind=pl.lit(target["prompt_kind"]),
                cluster_id=pl.lit(target["cluster_id"]),
                guard=pl.lit(guard),
                status=pl.Series(drawn.status),
                file=pl.Series([path and path.relative_to(run).as_posix() for path in files], dtype=pl.String),
                digest=pl.lit(folder.name),
            )
            table = table.select(pl.col(column).cast(kind) for column, kind in GENERATIONS.items())
            if guards:
                log = drawn.log.select(pl.lit(target["target_id"]).alias("prompt_id"), pl.all())
                manifest.write_parquet(folder / f"{name}-guards.parquet", log)
            manifest.write_parquet(folder / f"{name}.parquet", table)
            bar.update(n)


def _sample(sampler: "Sampler", prompt: str, seeds: list[int]) -> "Drawn":
    return sampler([prompt] * len(seeds), seeds)
