"""Images for the empty caption, compared with every target: which training images come back unasked?

The empty caption is one prompt whatever the target, so one set of images does for all of them, with the same seeds in
every model. In: RUN/model. Out: RUN/unprompted.parquet and its images; after the attack RUN/scores-null.parquet, a row
a target, and their counts in RUN/attack-clique.json. Knows nothing of other runs.

    unmemorize generate RUN --null 256
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import manifest
from defense.distances import l2, scale
from eval.extraction import read_generations, read_images
from eval.generate import (
    BATCH,
    GENERATIONS,
    decide,
    digest_model,
    draw,
    name_prompt,
    open_model,
    open_sampler,
    read_config,
)
from eval.reference import load_pixels
from eval.summary import count_by_caption, rate_captions

TARGET = "null"  # what stands in the seeds of these images in place of a target
DRAWN = "unprompted.parquet"
SCORES = "scores-null.parquet"

NULL: dict[str, pl.DataType | type[pl.DataType]] = {
    "target_id": pl.String,
    "digest": pl.String,  # of the images
    "n_generations": pl.Int64,  # the same ones for every target
    "delta": pl.Float64,
    "matches": pl.Int64,  # of them within delta of the target
    "best_distance": pl.Float64,  # null without images
    "best_file": pl.String,
    "extracted": pl.Boolean,  # matches > 0
}


def draw_unprompted(
    run: Path, n: int, *, guidance_scale: float = 1.0, steps: int = 15, guards: Sequence[str] = ()
) -> pl.DataFrame:
    """n images for the empty caption; returns unprompted.parquet, columns `generate.GENERATIONS`.

    The same command after a kill draws only what is missing. Raises what `generate.generate` raises.
    """
    from dedup.options import lock

    run = run.resolve()
    settings: dict[str, Any] = {"n": n, "guidance_scale": float(guidance_scale), "steps": steps}
    digest = digest_model(run / "model", decide(run, settings, guards) | {"batch": BATCH, "prompt": TARGET})
    folder = run / "generations" / digest
    row: dict[str, Any] = {"target_id": TARGET, "prompt": "", "prompt_kind": TARGET, "caption_kind": TARGET}
    row |= {"cluster_id": None, "controls": None}
    parts = [list(range(start, min(n, start + BATCH))) for start in range(0, n, BATCH)]
    named = {name_prompt(TARGET, "", numbers): numbers for numbers in parts}
    todo = {name: numbers for name, numbers in named.items() if not (folder / f"{name}.parquet").exists()}
    with lock(run):
        if todo:
            sampler = open_sampler(run, open_model(run), settings, guards)
            for name, numbers in tqdm(todo.items(), f"unprompted {run.name}", file=sys.stderr, disable=None):
                draw(sampler, run, folder, name, row, numbers, settings, guards)
        table = pl.concat(pl.read_parquet(folder / f"{name}.parquet") for name in named)
        manifest.write_parquet(run / DRAWN, table)
    return table


def read_unprompted(run: Path) -> pl.DataFrame | None:
    """RUN/unprompted.parquet, if there is one."""
    path = run / DRAWN
    return manifest.conform(pl.read_parquet(path), GENERATIONS) if path.exists() else None


def score_unprompted(run: Path) -> pl.DataFrame | None:
    """Compare the images with every target of the clique attack, by its δ; returns scores-null.parquet, columns NULL.

    Adds them to `by_caption_kind` of attack-clique.json. None where nothing was drawn. Raises AttackError, TargetError
    or OSError.
    """
    drawn = read_unprompted(run)
    if drawn is None:
        return None
    config = read_config(run)
    targets = pl.read_parquet(run / "scores-clique.parquet")
    resolution = config["config"]["resolution"]
    pixels = scale(load_pixels(Path(config["out"]), targets, resolution))
    files = drawn.filter(status="ok")["file"]
    batches = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    found = [l2(read_images(run, batch, resolution), pixels) for batch in batches]
    distances = np.concatenate(found) if found else np.empty((0, len(targets)), np.float32)  # (images, targets)
    matches = (distances <= targets["delta"].to_numpy()).sum(axis=0)
    nothing = [None] * len(targets)
    table = targets.select("target_id", "delta").with_columns(
        digest=pl.lit(drawn["digest"][0]),
        n_generations=len(drawn),
        matches=pl.Series(matches),
        best_distance=pl.Series(distances.min(axis=0) if len(files) else nothing, dtype=pl.Float64),
        best_file=files.gather(distances.argmin(axis=0)) if len(files) else pl.Series(nothing, dtype=pl.String),
        extracted=pl.Series(matches > 0),
    )
    table = table.select(pl.col(name).cast(kind) for name, kind in NULL.items())
    unasked = table.with_columns(caption_kind=pl.lit(TARGET), n_nan=pl.lit(len(drawn) - len(files)))
    told = [count_by_caption(read_generations(run), targets), unasked]
    summary = manifest.read_json(run / "attack-clique.json")
    manifest.write_json(run / "attack-clique.json", summary | {"by_caption_kind": rate_captions(targets, told)})
    manifest.write_parquet(run / SCORES, table)
    return table
