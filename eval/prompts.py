"""Captions to ask a model with: all that a target has, and those of all distinct pictures of OUT.

The latter are more than the targets of an attack, because nothing has to be drawn for them. Knows nothing of models.
"""

from pathlib import Path

import polars as pl

from dedup import manifest
from dedup.policy import has_caption
from eval.reference import TargetError, load_reference, read_plant

KINDS = ("survivor", "dropped", "null")  # of captions: the keeper's own, those of the rows it stands for, none
GIVEN = "given"  # by a file of prompts

PROMPTS: dict[str, pl.DataType | type[pl.DataType]] = {
    "prompt_id": pl.String,  # target_id of `targets`, or "spare-" and the key
    "prompt": pl.String,
    "kind": pl.String,  # "canary", "dataset", "spare"
    "multiplicity": pl.Int64,  # how often the image stands in the original data
    "exposures": pl.Int64,  # times that training saw the image or a copy; null without RUN/exposures.parquet
}


def list_captions(out: Path, targets: pl.DataFrame, kind: str = "all") -> pl.DataFrame:
    """(target_id, prompt, caption_kind): every distinct caption of each target, its own ("survivor") first.

    "dropped" are the captions of the rows that it stands for, in input order; canaries have one for all copies. kind:
    "all" of these two, or one of KINDS; "null" asks every target with the empty caption. A target without a caption
    of that kind has no row. Raises TargetError.
    """
    if kind not in ("all", *KINDS):
        raise TargetError(f"unknown kind of captions {kind!r}: choose of all, {', '.join(KINDS)}")
    own = targets.select("target_id", "prompt", caption_kind=pl.lit("survivor"))
    if kind == "null":
        return own.with_columns(prompt=pl.lit(""), caption_kind=pl.lit("null"))
    stars = targets.filter(pl.col("mode").is_null(), pl.col("root").is_null()).select("target_id", "cluster_id")
    rows = manifest.read(out, ["id", "status", "caption", "cluster_id"]).filter(pl.col("status") == "ok", has_caption())
    others = stars.join(rows, on="cluster_id").sort("id").select("target_id", prompt="caption")
    others = others.join(own, on=["target_id", "prompt"], how="anti", maintain_order="left")
    others = others.unique(maintain_order=True).with_columns(caption_kind=pl.lit("dropped"))
    place = targets.select("target_id").with_row_index("place")
    every = pl.concat([own, others]).join(place, on="target_id", maintain_order="left")
    every = every.sort("place", maintain_order=True).drop("place")
    chosen = every if kind == "all" else every.filter(caption_kind=kind)
    if chosen.is_empty():
        raise TargetError(f"{out}: no target has a caption of the kind {kind!r}")
    return chosen


def list_prompts(out: Path, exposures: Path, at_least: int, limit: int) -> pl.DataFrame:
    """Captions of distinct pictures of OUT with columns PROMPTS, most duplicated first.

    A caption of several pictures counts for the one that stands most often. Spare images of a planted dataset are
    further prompts that training has not seen, unless it refilled with them. exposures: RUN/exposures.parquet, if there
    is one: what training never saw, such as held-out rows, then counts as standing nowhere. At most `limit` of images
    that stand `at_least` times, and as many others in random order. Raises TargetError.
    """
    plant = read_plant(out)
    rows = manifest.read(out, ["shard", "offset", "key", "represents", "cluster_id"])
    pictures = load_reference(out).join(
        rows, on=["shard", "offset", "key"], how="left", nulls_equal=True, maintain_order="left"
    )
    group: pl.Expr = pl.format("cluster {}", "cluster_id")
    times: pl.Expr = pl.col("represents")
    if plant is not None:
        planted = plant.group_by("canary").agg(pl.col("multiplicity").first())
        pictures = pictures.join(planted, left_on="key", right_on="canary", how="left", maintain_order="left")
        group = pl.when(kind="dataset").then(group).otherwise(pl.format("{} {}", "kind", "key"))
        times = pl.when(kind="dataset").then(times).when(kind="canary").then("multiplicity").otherwise(0)
    row, spare = "row-" + pl.col("sha256").str.slice(0, 16), "spare-" + pl.col("key")
    name = pl.when(kind="dataset").then(row).when(kind="spare").then(spare).otherwise("key")
    pictures = pictures.with_columns(prompt="caption", multiplicity=times, group=group, prompt_id=name)
    pictures = _add_exposures(pictures, exposures, plant)
    named = pictures.filter(pl.col("prompt").fill_null("").str.strip_chars() != "")
    if named.is_empty():
        raise TargetError(f"{out}: no image with a caption, so there is no prompt to ask about")
    # equals in the random order of their digests
    ordered = named.sort(-pl.col("multiplicity"), "sha256", "prompt_id")
    distinct = ordered.unique("prompt", keep="first", maintain_order=True)
    repeated = distinct.filter(pl.col("multiplicity") >= at_least)
    others = distinct.filter(pl.col("multiplicity") < at_least).sort("sha256", "prompt_id")
    table = pl.concat([repeated.head(limit), others.head(limit)])
    return table.select(pl.col(name).cast(kind) for name, kind in PROMPTS.items())


def _add_exposures(pictures: pl.DataFrame, path: Path, plant: pl.DataFrame | None) -> pl.DataFrame:
    """How often training saw any copy of each picture: rows of a cluster, planted copies of a canary, a spare image."""
    if not path.exists():
        return pictures.with_columns(exposures=pl.lit(None))
    seen = pl.read_parquet(path)
    planted = pl.DataFrame(schema={"key": pl.String, "canary": pl.String}) if plant is None else plant
    seen = seen.join(planted.select("key", "canary").drop_nulls(), on="key", how="left")
    group = (
        pl.when(pl.col("id").is_null())
        .then(pl.format("spare {}", "key"))
        .when(pl.col("canary").is_not_null())
        .then(pl.format("canary {}", "canary"))
        .otherwise(pl.format("cluster {}", "cluster_id"))
    )
    total = seen.group_by(group=group).agg(pl.col("exposures").sum())
    joined = pictures.join(total, on="group", how="left", maintain_order="left")
    joined = joined.with_columns(pl.col("exposures").fill_null(0))
    never = pl.col("exposures") == 0
    return joined.with_columns(multiplicity=pl.when(never).then(0).otherwise("multiplicity"))
