"""Audits with models of several sizes → does more room a picture mean more memorised ones? DIR/capacity.json, report.

Every size is an audit of its own in DIR/width-<W>, on the same planted images with the same seeds. Reported: the slope
of the share given back over the doublings of parameters a training row, by seed, with Student's t over the seeds.

    unmemorize audit SRC -o DIR --config configs/capacity.toml
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import manifest
from eval.audit import audit
from eval.capacity_report import write_capacity_report
from eval.contrasts import LEVEL, report
from eval.recipe import Recipe
from eval.stats import Effect, t_interval
from eval.story import count

WEIGHTS = Path("model") / "unet" / "diffusion_pytorch_model.safetensors"


def measure_capacity(src: Path, directory: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """One audit for each of `recipe.widths`; returns capacity.json. options: of `audit`. Raises what it raises."""
    rows, failed = [], []
    for width in recipe.widths:
        folder = directory / f"width-{width}"
        verdict = audit(src, folder, fit_width(recipe, width), **options)
        failed += [one | {"width": width} for one in verdict["failed"]]
        table = pl.read_parquet(folder / "audit" / "comparison.parquet").filter(arm="raw")
        rows += [describe_run(part, width, recipe.at_least) for part in table.partition_by("seed")]
    found: dict[str, Any] = {"schema_version": 1, "at_least": recipe.at_least, "planted": recipe.planted}
    found |= {"runs": rows, "slope": fit_slope(rows), "failed": failed}
    manifest.write_json(directory / "capacity.json", found)
    write_capacity_report(directory)
    return found


def fit_width(recipe: Recipe, width: int) -> Recipe:
    """The same audit with a model whose first level has `width` channels, and the others in proportion."""
    channels = tuple(c * width // recipe.train.channels[0] for c in recipe.train.channels)
    return replace(recipe, widths=(), train=replace(recipe.train, channels=channels))


def describe_run(table: pl.DataFrame, width: int, at_least: int) -> dict[str, Any]:
    """One run, from its rows of comparison.parquet: size, parameters a training row, share given back."""
    first = table.row(0, named=True)
    parameters = count_parameters(Path(first["run"]) / WEIGHTS)
    return {
        "width": width,
        "seed": first["seed"],
        "parameters": parameters,
        "rows": first["training_rows"],
        "parameters_per_row": parameters / first["training_rows"],
        **count(table.filter(pl.col("multiplicity") >= at_least)),
    }


def count_parameters(path: Path) -> int:
    """Of a safetensors file; only its header is read."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def fit_slope(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share given back per doubling of parameters a row: least squares for each seed, then t(S - 1) over the seeds.

    A slope varies no less between seeds than the rounding of its shares to 1 / n makes it.
    """
    slopes, steps = [], []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        x = np.log2([row["parameters_per_row"] for row in mine])
        if len(set(x)) > 1:
            slopes.append(float(np.polyfit(x, [row["share"] for row in mine], 1)[0]))
            steps.append(1 / min(row["n"] for row in mine) / float(np.linalg.norm(x - x.mean())))
    if len(slopes) > 1:
        found = t_interval(slopes, LEVEL, resolution=max(steps))
    else:
        found = Effect(slopes[0] if slopes else math.nan, -math.inf, math.inf, LEVEL, len(slopes), math.nan, "one seed")
    known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in report(found).items()}
    bounds = [bound if math.isfinite(bound) else None for bound in (found.low, found.high)]
    return known | {"interval": bounds, "per_seed": slopes, "unit": "share given back per doubling of parameters a row"}


def describe(found: dict[str, Any]) -> str:
    """The table and the slope in words."""
    lines = [
        f"width {row['width']:4d}  seed {row['seed']}  {row['parameters'] / 1e6:6.2f} M parameters  "
        f"{row['parameters_per_row']:9,.0f} a row  {row['hits']} of {row['n']} given back"
        for row in found["runs"]
    ]
    slope = found["slope"]
    low, high = slope["interval"]
    interval = "no interval from one seed" if low is None else f"95 % interval {100 * low:+.1f} … {100 * high:+.1f}"
    estimate = "not known" if slope["estimate"] is None else f"{100 * slope['estimate']:+.1f} points"
    return "\n".join([*lines, f"for every doubling of parameters a row: {estimate} ({interval})"])
