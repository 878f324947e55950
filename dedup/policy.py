"""Which of two copies is kept, and what becomes of the captions.

Keeper order is a total order of the rows, independent of the order of arrival. What stands in a split that others must
not match, then what an earlier run has published (`base.py`) comes before all else. At copy level the picture that most
others share parts with comes first (in powers of two): a row is only dropped to one that it matches itself, and what
lies in the middle leaves fewest behind. Then the picture that holds more pixels; of those that hold the same, the one
that was not enlarged; then more bytes, then one that has a caption, then by content hash, then a file before a link to
it, then by key. Criteria that somebody prefers (`parse_preferences`) come before the usual ones.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

import numpy as np
import polars as pl

from dedup import scopes, verify

CRITERIA = ("resolution", "quality", "bytes", "caption", "medoid", "first")
SHOWN = 10  # names that an error lists
NAMED = ("source", "split")  # criteria that take a name: source:laion
DEFAULT = ("medoid", "resolution", "bytes", "caption")  # what follows the preferred ones


class PolicyError(ValueError):
    """A policy that cannot be followed: which, and what there is instead."""


def parse_preferences(text: str) -> tuple[str, ...]:
    """`quality,source:laion` → its criteria. Raises PolicyError."""
    if not text:
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        kind, colon, value = name.partition(":")
        if kind in NAMED and value:
            continue
        if kind in NAMED:
            raise PolicyError(f"--prefer {name}: a {kind} needs its name, as in {kind}:laion")
        if name not in CRITERIA:
            near = get_close_matches(kind, NAMED if colon else (*CRITERIA, *NAMED), 1)
            meant = f"did you mean {near[0]}? " if near else ""
            known = ", ".join((*CRITERIA, *(f"{kind}:NAME" for kind in NAMED)))
            raise PolicyError(f"--prefer {name}: no such criterion; {meant}There are {known}")
    return names


def check_names(rows: pl.DataFrame, prefer: Sequence[str], against_split: str | None) -> None:
    """Raise PolicyError for the name of a source or split that no row has."""
    asked = [(f"--prefer {name}", *name.partition(":")[::2]) for name in prefer]
    if against_split is not None:
        asked.append((f"--against-split {against_split}", "split", against_split))
    columns = {"source": pl.col("source"), "split": scopes.SPLIT}
    for said, kind, value in asked:
        known = sorted(rows.select(columns[kind]).to_series().unique()) if kind in NAMED else [value]
        if value not in known:
            near = get_close_matches(value, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            shown = ", ".join(known[:SHOWN]) + (" …" if len(known) > SHOWN else "")
            raise PolicyError(f"{said}: there is no such {kind}; {meant}There are {shown}")


def keeper_rank(
    rows: pl.DataFrame,
    effective_pixels: pl.Series | None = None,
    partners: pl.Series | None = None,
    prefer: Sequence[str] = (),
) -> pl.Series:
    """Rank of every row in keeper order: 0 = kept before all others. Rows that are not `ok` come last.

    rows: of `Signatures.read`. `guarded` and `published` are heeded, in this order; `rank`, if there is one, is an
    earlier rank of the same rows by some of the same criteria, and settles ties. effective_pixels: of
    `detail.effective_pixels`; None = width × height. partners: of `count_partners`; None = none. prefer: of
    `parse_preferences`: these criteria first, then those of DEFAULT that are not among them.

    quality: what compression takes away: formats without loss before lossy ones (`verify.LOSSY`; WebP counts as
    lossy), then more bytes a pixel. What was lossy once and saved in a better format since is not seen.
    """
    if partners is not None:  # equal files stay together
        most = rows.select("picture", most=partners).filter(pl.col("most") > 0).group_by("picture").max()
        found = rows.select("picture").join(most, on="picture", how="left", maintain_order="left")
        partners = found["most"].fill_null(0).alias("partners")
    area = (pl.col("width").cast(pl.Int64) * pl.col("height").cast(pl.Int64)).fill_null(0)
    size = pl.col("size").fill_null(0)
    counted = [] if partners is None else [-partners if "medoid" in prefer else -(partners + 1).log(2).floor()]
    keys: dict[str, list[pl.Expr | pl.Series]] = {
        "medoid": [*counted],
        "resolution": [-(area if effective_pixels is None else pl.lit(effective_pixels)), area],
        "quality": [pl.col("format").is_in(sorted(verify.LOSSY)), -(size / pl.max_horizontal(area, 1))],
        "bytes": [-size],
        "caption": [pl.col("caption_hash").is_null()],
        "first": [pl.col("row")],
    }
    for name in prefer:
        kind, _, value = name.partition(":")
        if kind in NAMED:
            keys[name] = [(scopes.SPLIT if kind == "split" else pl.col("source")).ne_missing(value)]
    ties = ["rank"] if "rank" in rows.columns else ["picture", "link", "name", "row"]  # nulls come first
    order = (
        rows.with_row_index("row")
        .select(
            pl.arg_sort_by(
                pl.col("status") != "ok",
                *(~pl.col(name) for name in ("guarded", "published") if name in rows.columns),
                *(key for name in dict.fromkeys((*prefer, *DEFAULT)) for key in keys[name]),
                *ties,
            )
        )
        .to_series()
        .to_numpy()
    )
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return pl.Series("rank", rank)


def count_partners(pairs: pl.DataFrame, n: int, prefer: Sequence[str] = ()) -> pl.Series:
    """How many pairs of the copy search each of n rows has: they hold parts of it, or it is a part of them.

    Who prefers the medoid means all copies.
    """
    copies = pairs.filter(pl.col("class") == "copy")
    counted = copies if "medoid" in prefer else copies.filter(pl.col("inliers").is_not_null())
    ends = np.concatenate([counted["a"].to_numpy(), counted["b"].to_numpy()])
    return pl.Series("partners", np.bincount(ends, minlength=n))


def has_caption() -> pl.Expr:
    return pl.col("caption").fill_null("").str.strip_chars() != ""


def hash_caption() -> pl.Expr:
    """UInt64 of `caption`, null where there is none: as good as the text to tell which may be equal."""
    return pl.when(has_caption()).then(pl.col("caption").str.strip_chars().hash()).alias("caption_hash")


def merge_captions(rows: pl.DataFrame, read: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Distinct captions of all rows that a kept row stands for, its own first, then in input order.

    rows: id, keep, kept_id, in input order; read: ids → captions. Null on a row that stands for no other: see
    `tell_captions`.
    """
    owner = pl.when("keep").then("id").otherwise("kept_id")
    told = rows.select("id", "keep", owner=owner)
    several = told.drop_nulls("owner").filter(scopes.stands_again("owner"))
    lists = (
        several.with_columns(caption=read(several["id"]))
        .with_columns(pl.when(has_caption()).then("caption"))
        .sort("owner", ~pl.col("keep"), "id")
        .group_by("owner", maintain_order=True)
        .agg(captions=pl.col("caption").drop_nulls().unique(maintain_order=True))
    )
    return told.select("id").join(lists, left_on="id", right_on="owner", how="left", maintain_order="left")["captions"]


def tell_captions() -> pl.Expr:
    """`captions` of rows with those of `merge_captions`: those, or its own on a kept row that stands for itself."""
    own = pl.concat_list(pl.when(has_caption()).then("caption")).list.drop_nulls()
    return pl.coalesce("captions", pl.when("keep").then(own)).alias("captions")


def repeated_captions(rows: pl.DataFrame, read: Callable[[pl.Series], pl.Series]) -> dict[str, pl.DataFrame]:
    """How pictures and captions repeat: tables with `caption` and `count` ≥ 2, one row a case, most frequent first.

    rows: id, cluster_id, status, caption_hash; read: ids → captions. A picture is a group of copies; a missing caption
    repeats nothing.
    """
    said = rows.select("id", "cluster_id", "status", "caption_hash").filter(pl.col("status") == "ok")
    said = said.drop_nulls("caption_hash")
    # what stands once in either column repeats nothing
    said = said.filter(scopes.stands_again("cluster_id") | scopes.stands_again("caption_hash"))
    said = said.select("cluster_id", caption=read(said["id"]).str.strip_chars())
    count = pl.len().cast(pl.Int64).alias("count")
    both = said.group_by("cluster_id", "caption").agg(count)
    usual = pl.col("caption").sort_by(-pl.col("count"), "caption").first()
    tables = {
        "same_image_same_caption": both,  # count: rows
        "same_image_other_captions": both.group_by("cluster_id").agg(usual, count),  # count: captions
        "same_caption_other_images": both.group_by("caption").agg(count),  # count: pictures
    }
    return {
        name: table.filter(pl.col("count") > 1).sort(-pl.col("count"), "caption").select("count", "caption")
        for name, table in tables.items()
    }


def count_captions(rows: pl.DataFrame, read: Callable[[pl.Series], pl.Series]) -> dict[str, dict[str, int]]:
    """`repeated_captions` in numbers: cases, and the sum of their counts."""
    tables = repeated_captions(rows, read)
    return {name: {"cases": len(table), "total": int(table["count"].sum())} for name, table in tables.items()}
