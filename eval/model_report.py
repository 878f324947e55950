"""DIR of `audit-model` → a page that says what the model gives back: DIR/report/index.html, opened from disk.

In: DIR/summary.json, the scores and generations of its runs, the training images through the source of the dedup run.
Knows nothing of models or attacks. Captions are untrusted: the template escapes them.
"""

from pathlib import Path
from typing import Any

import polars as pl

from dedup import manifest, sources
from dedup.report import environment, read_credit
from eval.report import TEMPLATES, collect_cases, read_originals, source_of, write_page

CASES, OTHERS = 300, 60  # images given back, and others, that are shown
NAMES = {"model": "the model", "base": "its base"}


def write_model_report(directory: Path) -> Path:
    """Write DIR/report and return the path of its index.html. Raises OSError when a file is missing."""
    summary = manifest.read_json(directory / "summary.json")
    runs = {path: manifest.read_json(Path(path) / "config.json") for path in summary["runs"].values()}
    tables = [
        pl.read_parquet(Path(path) / "scores-clique.parquet").with_columns(
            arm=pl.lit(name), seed=pl.lit(0), run=pl.lit(path)
        )
        for name, path in summary["runs"].items()
    ]
    rows = pl.concat(tables)
    rows = rows.with_columns(key=pl.when(pl.col("root").is_null()).then("key").otherwise("target_id"), place="key")
    given = rows.filter("extracted")["target_id"].unique().to_list()
    near = rows.filter(arm="model").select("target_id", near=pl.col("best_distance") / pl.col("delta"))
    rows = rows.join(near, on="target_id", how="left", maintain_order="left")
    members, controls = (rows.filter(prompt_kind=kind) for kind in ("member", "control"))
    back = members.filter(pl.col("target_id").is_in(given)).sort(-pl.col("multiplicity"), "target_id")
    others = members.filter(~pl.col("target_id").is_in(given)).sort("near", "target_id", nulls_last=True)
    mistaken = controls.filter(pl.col("target_id").is_in(given)).sort("target_id")
    out = Path(summary["out"])
    originals = {str(out): read_originals(out, rows["key"].unique().to_list())}
    pictures: dict[str, bytes] = {}
    options: dict[str, Any] = {
        "arms": list(summary["runs"]),
        "runs": runs,
        "originals": originals,
        "pictures": pictures,
    }
    text = (
        environment(TEMPLATES)
        .get_template("model.html")
        .render(
            directory=directory.resolve().name,
            summary=summary,
            names=NAMES,
            headline=tell(summary),
            cases=collect_cases(back, limit=CASES, **options),
            others=collect_cases(others, limit=OTHERS, **options),
            mistaken=collect_cases(mistaken, limit=OTHERS, **options),
            doses=count_doses(members, list(summary["runs"])),
            delta=[rows["delta"].min(), rows["delta"].median(), rows["delta"].max()],
            credit=read_credit(source_of(out)),
        )
    )
    return write_page(directory / "report", text, pictures)


def read_elsewhere(rows: pl.DataFrame) -> dict[str, bytes]:
    """target_id → bytes of the controls that come from another source; what is gone is shown as missing."""
    found = {}
    foreign = rows.filter(pl.col("root").is_not_null()).unique("target_id")
    for row in foreign.iter_rows(named=True):
        try:
            found[row["target_id"]] = sources.read_image(
                Path(row["root"]), row["shard"], row["offset"], row["size"], row["place"]
            )
        except OSError:
            continue
    return found


def tell(summary: dict[str, Any]) -> str:
    """The outcome in one sentence, whichever it is."""
    found, gap = summary["models"]["model"]["members"], summary["over_base"]
    count = f"{found['extracted']:,}" if found["extracted"] else "none"
    sentence = f"The model gave back {count} of {found['prompts']:,} training images"
    if gap is None:
        return f"{sentence}."
    return f"{sentence}; its base {summary['models']['base']['members']['extracted']:,}."


def count_doses(members: pl.DataFrame, arms: list[str]) -> list[dict[str, Any]]:
    """How often images stood → how many of them came back from each model."""
    rows = []
    for (times,), group in members.sort("multiplicity").group_by("multiplicity", maintain_order=True):
        cells = [group.filter(arm=arm)["extracted"] for arm in arms]
        rows.append({"times": times, "cells": [(int(cell.sum()), len(cell)) for cell in cells]})
    return rows
