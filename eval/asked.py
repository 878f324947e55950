"""By which captions an image came back: those that stayed, those that left with removed rows, none, or a search.

Secondary to the contrasts, which ask with all captions at once. In: a run's scores, or the comparison table. Out:
counts for verdict.json, and their words for the page. "probe" is no caption: that search was given the picture.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from eval import metrics
from eval.contrasts import report_rate
from eval.summary import count_by_caption

BY_CAPTION = pl.List(pl.Struct({"caption_kind": pl.String, "generations": pl.Int64, "matches": pl.Int64}))
PROBE, ANY = "probe", "any"
LABELS = {
    "survivor": "the caption that stays",
    "dropped": "captions that leave with removed rows",
    "null": "the empty caption",
    "given": "captions of a file",
    ANY: "any of these",
    PROBE: "hidden or gone? (search)",
}


def count_matches(
    generations: pl.DataFrame, scores: pl.DataFrame, others: dict[str, pl.DataFrame | None]
) -> pl.DataFrame:
    """target_id, by_caption (BY_CAPTION) of one run: generations and matches for captions of each kind.

    others: kind → scores of what was drawn apart, with target_id, n_generations and matches; None where it was not.
    """
    told = [count_by_caption(generations, scores)]
    told += [table.with_columns(caption_kind=pl.lit(kind)) for kind, table in others.items() if table is not None]
    counts = (pl.col("n_generations").cast(pl.Int64).alias("generations"), pl.col("matches").cast(pl.Int64))
    each = pl.concat(part.select("target_id", "caption_kind", *counts) for part in told)
    each = each.filter(pl.col("target_id").is_in(scores["target_id"].to_list()))
    order = pl.col("caption_kind").replace_strict({kind: n for n, kind in enumerate(LABELS)}, default=None)
    each = each.group_by("target_id", "caption_kind").agg(pl.col("generations", "matches").sum())
    each = each.sort("target_id", order, "caption_kind")
    told_apart = pl.struct("caption_kind", "generations", "matches").cast(BY_CAPTION.inner).alias("by_caption")
    return each.group_by("target_id", maintain_order=True).agg(told_apart)


def count_captions(rows: pl.DataFrame, arms: Sequence[str], at_least: int) -> Iterator[dict[str, Any]]:
    """Targets given back by captions of each kind, and by the best of them, by arm: controls, fewer copies, repeated.

    Targets of all seeds count alike: read as description. A target counts where it was asked so at all.
    """
    columns = ["arm", "target_id", "seed", "multiplicity"]
    told = rows.select(*columns, "by_caption").explode("by_caption").drop_nulls("by_caption").unnest("by_caption")
    prompted = told.filter(pl.col("caption_kind") != PROBE)
    best = prompted.group_by(columns).agg(pl.col("generations", "matches").sum(), caption_kind=pl.lit(ANY))
    told = pl.concat([told, best.select(told.columns)])
    for arm in arms:
        for kind in LABELS:
            for low, high in ((0, 0), (1, at_least - 1), (at_least, None)):
                within = pl.col("multiplicity") >= low if high is None else pl.col("multiplicity").is_between(low, high)
                cell = told.filter(within, arm=arm, caption_kind=kind)
                if len(cell):
                    rate = metrics.rate(int((cell["matches"] > 0).sum()), len(cell))
                    yield {
                        "arm": arm,
                        "caption_kind": kind,
                        "multiplicity": low,
                        "to": high,
                        **report_rate(rate),
                        "generations": cell["generations"].sum(),
                    }


def list_captions(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table: an arm and a kind of captions, with a cell for repeated images, fewer copies and controls.

    Every arm has a line for the probe: what was not measured is said.
    """
    lines = []
    cells = verdict.get("captions", [])  # a verdict of an earlier version has none
    for arm in verdict["arms"] if cells else []:
        for kind, label in LABELS.items():
            mine = {cell["multiplicity"]: cell for cell in cells if (cell["arm"], cell["caption_kind"]) == (arm, kind)}
            if not mine and kind != PROBE:
                continue
            n, made = (sum(cell[name] for cell in mine.values()) for name in ("n", "generations"))
            places = [mine.get(low) for low in (verdict["at_least"], 1, 0)]
            lines.append({"arm": arm, "kind": kind, "label": label, "cells": places, "each": made / n if n else None})
    return lines


def say_captions(lines: Sequence[dict[str, Any]], arm: str, name: str, what: str) -> str:
    """One sentence on repeated images of one arm. name: of the model; what: of the images."""
    found = {line["kind"]: line["cells"][0] for line in lines if line["arm"] == arm and line["cells"][0]}
    parts = [
        f"{found[kind]['k']:,} of {found[kind]['n']:,} by {LABELS[kind]}"
        for kind in ("survivor", "dropped", "given", "null")
        if kind in found
    ]
    if not parts:
        return ""
    shared = "dropped" not in found and "survivor" in found
    more = " No caption leaves with a removed row: the copies of each image share theirs." if shared else ""
    return f"Of the {what}, the {name} gave back {', '.join(parts)}.{more}"
