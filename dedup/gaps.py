"""Decisions → pairs of kept rows that may be copies of each other, though nobody has looked at them.

In: pairs, and what was decided by them. Out: candidates. Looks at no picture.
"""

import polars as pl

from dedup import clustering
from dedup.manifest import ORIENTATIONS


def bridges(
    pairs: pl.DataFrame, decisions: pl.DataFrame, rank: pl.Series, scope: pl.Series | None = None
) -> pl.DataFrame:
    """Candidates (a, b; cosine and mirrored null): kept rows that may be upright copies, though nobody has looked.

    A kept row that matches a dropped one may match what that was dropped to. Kept rows that are turned against the
    keeper of their star in the same way may be upright to each other: each is paired with the first of them in its
    scope.
    """
    scope = pl.repeat("", len(decisions), eager=True) if scope is None else scope
    equal = pairs.filter((pl.col("signal") == "bytes") & (scope.gather(pairs["a"]) == scope.gather(pairs["b"])))
    a_first = rank.gather(equal["a"]) < rank.gather(equal["b"])
    follows = pl.select(pl.when(a_first).then(equal["b"]).otherwise(equal["a"])).to_series()  # see judge.share_fate
    copies = pairs.with_row_index("pair").filter(pl.col("class") == "copy")
    ends = pl.concat([copies.select(row="a", other="b"), copies.select(row="b", other="a")])
    kept_id, keep = decisions["kept_id"], decisions["keep"]
    found = ends.with_columns(other=kept_id.gather(ends["other"]), keep=keep.gather(ends["row"]))
    found = found.filter(pl.col("keep") & pl.col("other").is_not_null()).select("row", "other")
    inverse = {name: clustering.inverse_orientation(name) for name in ORIENTATIONS}
    turned = decisions.with_row_index("row").filter(pl.col("keep") & pl.col("pair").is_not_null())
    turned = turned.select(pl.col("row").cast(pl.Int64), "cluster_id", pl.col("pair").cast(copies["pair"].dtype))
    turned = turned.join(copies.select("pair", "a", "orientation"), on="pair").with_columns(
        turn=pl.when(pl.col("row") == pl.col("a"))
        .then("orientation")
        .otherwise(pl.col("orientation").replace(inverse)),
        rank=rank.gather(turned["row"]),
        scope=scope.gather(turned["row"]),
    )
    first = turned.select("row", other=pl.col("row").sort_by("rank").first().over("cluster_id", "turn", "scope"))
    near = pl.concat([found, first]).filter(
        (pl.col("row") != pl.col("other")) & ~pl.col("row").is_in(follows.implode())
    )
    both = near.select(a=pl.min_horizontal("row", "other"), b=pl.max_horizontal("row", "other")).unique().sort("a", "b")
    return both.with_columns(cosine=pl.lit(None, pl.Float64), mirrored=pl.lit(None, pl.Boolean))
