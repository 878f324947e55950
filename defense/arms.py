"""The training arms: which rows a model is trained on. One function an arm, one signature, and a dict.

In: manifest rows (unreadable ones included) and, for a planted dataset, the spare images beside it. Out: one
row per training example with `COLUMNS`, in an order that depends on nothing but the manifest. Knows nothing
of pixels.

An example has no caption of its own but `captions`, from which training draws one each time. In `raw` that is
the row's caption; a kept row of the other arms draws from the distinct captions of everything it stands for,
because a caption must not leave with its image. Rows without a caption are trained with the empty caption: an
empty list.
"""

from collections.abc import Callable

import polars as pl

from dedup.policy import has_caption

# Where the bytes lie, and whose they are. A spare image is no manifest row: its id and cluster_id are null.
COLUMNS = ("id", "cluster_id", "shard", "offset", "size", "key", "sha256", "captions")

Arm = Callable[[pl.DataFrame, pl.DataFrame | None, int], pl.DataFrame]


class ArmError(ValueError):
    """An arm that does not exist, or cannot be made from this dataset."""


def raw(rows: pl.DataFrame, spare: pl.DataFrame | None, seed: int) -> pl.DataFrame:
    """Every readable row, copies and all: what training on the dataset as it is would see."""
    return rows.filter(pl.col("status") == "ok").with_columns(captions=_own_caption()).select(COLUMNS)


def dedup(rows: pl.DataFrame, spare: pl.DataFrame | None, seed: int) -> pl.DataFrame:
    """The kept rows only. They are fewer: at equal steps each singleton is seen more often than in `raw`."""
    captions = pl.when(pl.col("captions").list.len() > 0).then("captions").otherwise(_own_caption())
    return rows.filter("keep").with_columns(captions=captions).select(COLUMNS)


def refill(rows: pl.DataFrame, spare: pl.DataFrame | None, seed: int) -> pl.DataFrame:
    """The kept rows, and a fresh image in the place of every dropped one: as many rows and steps as in `raw`.

    A kept row stands at the same position as in `raw`, so both arms see it at the same steps with the same
    noise; the k-th dropped row gives way to the k-th spare image. Raises ArmError without enough spare
    images.
    """
    if spare is None:
        raise ArmError("refill needs spare images: a dataset made by `unmemorize plant` has a folder of them")
    readable = rows.filter(pl.col("status") == "ok").select("id", "keep").with_row_index("position")
    dropped = readable.filter(~pl.col("keep"))["position"]
    if len(spare) < len(dropped):
        raise ArmError(f"refill needs {len(dropped)} spare images, the dataset has {len(spare)}: plant more")
    kept = dedup(rows, spare, seed).with_columns(position=readable.filter("keep")["position"])
    fresh = spare.head(len(dropped)).with_columns(captions=_own_caption(), position=dropped)
    return pl.concat([kept, fresh], how="diagonal").sort("position").select(COLUMNS)


def _own_caption() -> pl.Expr:
    nothing = pl.lit([], dtype=pl.List(pl.String))
    return pl.when(has_caption()).then(pl.concat_list("caption")).otherwise(nothing)


ARMS: dict[str, Arm] = {"raw": raw, "refill": refill, "dedup": dedup}


def select_rows(arm: str, rows: pl.DataFrame, spare: pl.DataFrame | None, seed: int) -> pl.DataFrame:
    """The training rows of the arm of that name. Raises ArmError."""
    if arm not in ARMS:
        raise ArmError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    examples = ARMS[arm](rows, spare, seed)
    if examples.is_empty():
        raise ArmError(f"arm {arm!r} is empty: the manifest has no readable row for it")
    return examples
