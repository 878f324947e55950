"""The training arms: which rows a model is trained on. One function an arm, one signature, and a dict.

In: what there is to train on. Out: one row per training example with `COLUMNS`, in an order that depends on nothing
but the manifest. Knows nothing of pixels.

An example has no caption of its own but `captions`, from which training draws one each time. Where a row stands only
for itself that is its caption; a row that stands for others draws from the distinct captions of all of them, because a
caption must not leave with its image. Rows without a caption are trained with the empty caption: an empty list.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from dedup import clustering
from dedup.policy import has_caption

# Where the bytes lie, and whose they are. A spare image is no manifest row: its id and cluster_id are null. Rows are
# drawn in proportion to `weight`.
COLUMNS = ("id", "cluster_id", "shard", "offset", "size", "key", "sha256", "captions", "weight")


@dataclass(frozen=True, slots=True)
class Material:
    """What the arms choose from."""

    rows: pl.DataFrame  # of the manifest, unreadable ones included, without those that no arm trains on
    spare: pl.DataFrame | None = None  # images that stand nowhere else, to take the place of others
    truth: pl.DataFrame | None = None  # key and canary of the planted copies
    pairs: pl.LazyFrame | None = None  # of the dedup run
    flips: str = "keep"  # what that run did with mirrored and with turned copies
    rotations: str = "keep"


Arm = Callable[[Material, int], pl.DataFrame]  # (material, seed) → examples


class ArmError(ValueError):
    """An arm that does not exist, or cannot be made from this dataset."""


def raw(material: Material, seed: int) -> pl.DataFrame:
    """Every readable row, copies and all: what training on the dataset as it is would see."""
    return _finish(_readable(material).with_columns(captions=_own_caption()))


def dedup(material: Material, seed: int) -> pl.DataFrame:
    """The kept rows only. They are fewer: at equal steps each singleton is seen more often than in `raw`."""
    return _finish(_kept(material))


def refill(material: Material, seed: int) -> pl.DataFrame:
    """The kept rows, and a fresh image in the place of every dropped one: as many rows and steps as in `raw`.

    A kept row stands at the same position as in `raw`, so both arms see it at the same steps with the same
    noise; the k-th dropped row gives way to the k-th spare image. Raises ArmError without enough spare
    images.
    """
    return _refill(material, _kept(material), "refill")


def random_drop(material: Material, seed: int) -> pl.DataFrame:
    """As many rows as `dedup` has, drawn at random from those of `raw`: a smaller dataset, full of copies."""
    rows = _readable(material)
    drawn = np.random.default_rng([seed, 2]).choice(len(rows), int(rows["keep"].sum()), replace=False)
    return _finish(rows[np.sort(drawn).tolist()].with_columns(captions=_own_caption()))


def reweighted(material: Material, seed: int) -> pl.DataFrame:
    """Every readable row with weight 1/m, m the size of its cluster: each cluster is seen as often as a single image.

    Copies stand side by side, so that a pass over the data takes exactly one of them.
    """
    rows = _readable(material).with_columns(captions=_own_caption()).sort("cluster_id", "id")
    return _finish(rows, weight=1 / pl.len().over("cluster_id"))


def oracle(material: Material, seed: int) -> pl.DataFrame:
    """As `refill`, by somebody who knows the truth: copies of a planted image go but for the first, nothing else."""
    if material.truth is None:
        raise ArmError("oracle needs the truth: a dataset made by `unmemorize plant` comes with it")
    canary = material.truth.drop_nulls("key").select("key", "canary")
    rows = _readable(material).join(canary, on="key", how="left", maintain_order="left")
    first = pl.col("id").min().over("canary")
    rows = rows.with_columns(stands_for=pl.when(pl.col("canary").is_null()).then("id").otherwise(first))
    return _refill(material, _gather(rows), "oracle")


def hash_level(material: Material, seed: int) -> pl.DataFrame:
    """As `refill`, by somebody who compares hashes alone: what only the copy level finds stays."""
    rows = _readable(material)
    if material.pairs is None:
        raise ArmError("hash needs pairs.parquet of the dedup run")
    pairs = material.pairs.filter(pl.col("signal") != "copy").collect()  # of rows that stay or go together
    order = rows.sort(~pl.col("keep"), "id")["id"].to_numpy()  # who is kept anyway comes first
    rank = np.full(1 + max(order.max(initial=-1), pairs.select(pl.max("b")).item() or 0), len(order))
    rank[order] = np.arange(len(order))
    decided = clustering.decide(pairs, pl.Series(rank), flips=material.flips, rotations=material.rotations)
    stands_for = decided["kept_id"].gather(rows["id"]).fill_null(rows["id"])
    return _refill(material, _gather(rows.with_columns(stands_for=stands_for)), "hash")


def _readable(material: Material) -> pl.DataFrame:
    return material.rows.filter(pl.col("status") == "ok")


def _kept(material: Material) -> pl.DataFrame:
    captions = pl.when(pl.col("captions").list.len() > 0).then("captions").otherwise(_own_caption())
    return material.rows.filter("keep").with_columns(captions=captions)


def _gather(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows that stand for themselves, each with the distinct captions of all that it stands for."""
    own = rows.with_columns(captions=_own_caption())
    distinct = pl.col("captions").list.explode(empty_as_null=False, keep_nulls=False).unique(maintain_order=True)
    all_of_them = own.group_by("stands_for").agg(distinct)
    standing = own.filter(pl.col("id") == pl.col("stands_for")).drop("captions")
    return standing.join(all_of_them, on="stands_for", how="left", maintain_order="left")


def _refill(material: Material, kept: pl.DataFrame, arm: str) -> pl.DataFrame:
    """`kept` at the places where `raw` has them, spare images at the others. Raises ArmError."""
    if material.spare is None:
        raise ArmError(f"{arm} needs spare images: a dataset made by `unmemorize plant` has a folder of them")
    places = _readable(material).select("id").with_row_index("position")
    dropped = places.join(kept, on="id", how="anti", maintain_order="left")["position"]
    if len(material.spare) < len(dropped):
        has = len(material.spare)
        raise ArmError(f"{arm} needs {len(dropped)} spare images, the dataset has {has}: plant more")
    placed = kept.join(places, on="id", how="left", maintain_order="left")
    fresh = material.spare.head(len(dropped)).with_columns(captions=_own_caption(), position=dropped)
    return _finish(pl.concat([placed, fresh], how="diagonal").sort("position"))


def _finish(examples: pl.DataFrame, weight: pl.Expr | None = None) -> pl.DataFrame:
    even = pl.lit(1.0) if weight is None else weight
    return examples.with_columns(weight=even).select(COLUMNS)


def _own_caption() -> pl.Expr:
    nothing = pl.lit([], dtype=pl.List(pl.String))
    return pl.when(has_caption()).then(pl.concat_list("caption")).otherwise(nothing)


ARMS: dict[str, Arm] = {
    "raw": raw,
    "refill": refill,
    "dedup": dedup,
    "dedup-exposure": dedup,  # with fewer steps
    "random-drop": random_drop,
    "reweighted": reweighted,
    "oracle": oracle,
    "hash": hash_level,
}


def select_rows(arm: str, material: Material, seed: int) -> pl.DataFrame:
    """The training rows of the arm of that name. Raises ArmError."""
    if arm not in ARMS:
        raise ArmError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    examples = ARMS[arm](material, seed)
    if examples.is_empty():
        raise ArmError(f"arm {arm!r} is empty: the manifest has no readable row for it")
    return examples


def tell_one_caption(examples: pl.DataFrame) -> pl.DataFrame:
    """Examples of which all of a cluster have one and the same caption, the first that there is."""
    first = (
        examples.filter(pl.col("captions").list.len() > 0)
        .sort("id", maintain_order=True)
        .group_by("cluster_id", maintain_order=True)
        .agg(one=pl.col("captions").first().list.head(1))
    )
    told = examples.join(first, on="cluster_id", how="left", maintain_order="left")
    return told.with_columns(captions=pl.coalesce("one", pl.col("captions").list.head(1))).select(COLUMNS)


def count_steps(arm: str, material: Material, steps: int) -> int:
    """Steps that the arm trains for, when `raw` trains for `steps`.

    All arms train equally long, but `dedup-exposure` stops when a single image was seen as often as in `raw`.
    """
    if arm != "dedup-exposure":
        return steps
    rows = _readable(material)
    return max(1, round(steps * int(rows["keep"].sum()) / len(rows)))
