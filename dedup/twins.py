"""Rows with equal bytes are one picture: what is known of one of them is known of all.

The search looks at one row of each picture. In: its pairs, and rows with the scope they belong to and their rank.
Out: the same pairs, of the rows that stand for these pictures now: the first in keeper order, in each scope and of all.
"""

import polars as pl

from dedup import clustering, geometry, manifest
from dedup.manifest import ORIENTATIONS

CERTAIN = {"class": "copy", "signal": "bytes", "score": 1.0, "residual": 0.0, "worst_tile": 0.0, "orientation": "r0"}


def stand_in(pairs: pl.DataFrame, rows: pl.DataFrame, rank: pl.Series) -> pl.DataFrame:
    """Pairs of rows that differ in bytes → those of the rows that stand for them.

    Of two pictures are paired: the first rows of all, and the first ones in each scope that holds both. A guarded row
    is paired with the first one in every scope.
    """
    twins = list_twins(pairs, rows, rank)
    return turn_pairs(pairs[twins["pair"].to_list()], rows, twins["x"], twins["y"])


def list_twins(pairs: pl.DataFrame, rows: pl.DataFrame, rank: pl.Series) -> pl.DataFrame:
    """Number of each pair, and the rows x, y that stand for its a and b."""
    first, in_scope = _find_first(rows, rank)
    a, b = (rows["picture"].gather(pairs[end]) for end in "ab")
    asked = pairs.select(pl.int_range(pl.len()).alias("pair"), picture_a=a, picture_b=b).filter(a != b)
    whole, by = asked, {}
    for end, row in (("a", "x"), ("b", "y")):
        names = {"picture": f"picture_{end}", "first": row, "guarded": f"guarded_{row}"}
        whole = whole.join(first.rename(names), on=f"picture_{end}")
        by[row] = in_scope.rename(names, strict=False)
    together = asked.join(by["x"], on="picture_a").join(by["y"], on=["picture_b", "scope"])
    guards_x = whole.filter("guarded_x").drop("y").join(by["y"], on="picture_b")
    guards_y = whole.filter("guarded_y").drop("x").join(by["x"], on="picture_a")
    found = pl.concat([part.select("pair", "x", "y") for part in (whole, together, guards_x, guards_y)])
    return found.unique().sort("pair", "x", "y")


def _find_first(rows: pl.DataFrame, rank: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The first row of each picture (picture, first, guarded), and the first in each scope (picture, scope, first)."""
    ordered = rows.select("id", "picture", "scope", "guarded", "status", rank=rank).filter(pl.col("status") == "ok")
    ordered = ordered.sort("rank")
    of_all = {"first": pl.col("id").first(), "guarded": pl.col("guarded").first()}
    first = ordered.group_by("picture", maintain_order=True).agg(**of_all)
    in_scope = ordered.group_by("picture", "scope", maintain_order=True).agg(first=pl.col("id").first())
    return first, in_scope


def pair_equal(rows: pl.DataFrame, rank: pl.Series) -> pl.DataFrame:
    """Pairs of equal bytes: every row with the first one of its scope, and those with the first of all."""
    first, in_scope = _find_first(rows, rank)
    stands = in_scope.join(first.select("picture", whole="first"), on="picture")
    each = rows.filter(pl.col("status") == "ok").select("id", "picture", "scope").join(stands, on=["picture", "scope"])
    other = pl.when(pl.col("id") == pl.col("first")).then("whole").otherwise("first")
    pairs = each.select("id", other=other).filter(pl.col("id") != pl.col("other"))
    ends = pairs.select(a=pl.min_horizontal("id", "other"), b=pl.max_horizontal("id", "other"))
    certain = [pl.lit(value).alias(name) for name, value in CERTAIN.items()]
    return manifest.conform(ends.with_columns(certain), manifest.PAIRS_SCHEMA)


def name_first(pairs: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Pairs with the first row in input order of each picture for a and b, a < b, each pair once."""
    first = rows.select(pl.col("id").min().over("picture")).to_series()
    a, b = first.gather(pairs["a"]), first.gather(pairs["b"])
    low, high = (pl.select(pick(a, b)).to_series() for pick in (pl.min_horizontal, pl.max_horizontal))
    ends = pairs.with_columns(a=low, b=high)
    return ends.unique(["a", "b"], keep="first", maintain_order=True)


def turn_pairs(pairs: pl.DataFrame, rows: pl.DataFrame, x: pl.Series, y: pl.Series) -> pl.DataFrame:
    """Pairs with x for a and y for b, whose bytes are equal to theirs; turned round where x comes after y."""
    inverse = {name: clustering.inverse_orientation(name) for name in ORIENTATIONS}
    width = rows["width"] / rows.select(pl.max_horizontal("width", "height")).to_series()
    columns = pairs.select("transform", "orientation", width.gather(pairs["a"]), width.gather(pairs["b"]).alias("b"))
    backwards = [None if t is None else geometry.invert(t, o, w_a, w_b) for t, o, w_a, w_b in columns.iter_rows()]
    return pairs.with_columns(
        pl.when(x < y).then("orientation").otherwise(pl.col("orientation").replace(inverse)).alias("orientation"),
        a=pl.select(pl.min_horizontal(x, y)).to_series(),
        b=pl.select(pl.max_horizontal(x, y)).to_series(),
        transform=pl.when(x < y).then("transform").otherwise(pl.Series(backwards, dtype=pl.List(pl.Float64))),
    )
