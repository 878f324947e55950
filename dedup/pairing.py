"""Rows with their hashes → pairs that are worth a look: equal bytes, and hashes within the radius of `search`.

Rows with many partners have the first ones in keeper order only; in another order, or by scope, crowds are searched
again. Knows nothing of what a pair turns out to be.
"""

import numpy as np
import polars as pl

from dedup import clustering, search, verify


def find_candidates(rows: pl.DataFrame, level: str, jobs: int) -> pl.DataFrame:
    """Pairs of ids i, j (i before j in keeper order): signal "bytes" or "pdq", orientation number (j → i), hamming.

    Only the first of the rows with equal bytes is searched for; the others pair with it and share its fate.
    """
    ordered = rows.filter(pl.col("status") == "ok").sort("rank")
    first = ordered.group_by("sha256", maintain_order=True).agg(i=pl.col("id").first())
    equal = ordered.join(first, on="sha256").filter(pl.col("id") != pl.col("i")).select("i", j="id")
    upright = {"orientation": pl.lit(0, pl.Int32), "hamming": pl.lit(None, pl.Int32)}
    equal_bytes = equal.with_columns(**upright, signal=pl.lit("bytes"))
    if level == "exact":
        return equal_bytes
    distinct = ordered.join(first, left_on="id", right_on="i", how="semi", maintain_order="left")
    return pl.concat([equal_bytes, _find_near(distinct.filter(pl.col("pdq_quality") >= verify.MIN_QUALITY), jobs)])


def _find_near(ordered: pl.DataFrame, jobs: int) -> pl.DataFrame:
    """Pairs of rows (id, pdq_d4) in keeper order, by their hash."""
    codes = np.frombuffer(b"".join(ordered["pdq_d4"]), np.uint8).reshape(-1, 8, 32)
    found, ids = search.join_hamming(codes, jobs=jobs), ordered["id"]
    return found.with_columns(
        ids.gather(found["i"]).alias("i"), ids.gather(found["j"]).alias("j"), signal=pl.lit("pdq")
    )


def find_in_crowds(rows: pl.DataFrame, candidates: pl.DataFrame, jobs: int) -> pl.DataFrame:
    """More candidates, if `rows` come in another order, or by scope, than when these were found.

    A row that has as many partners as the search keeps has the first ones in keeper order. So crowds are searched
    again: in the order of now, as a whole and in each scope.
    """
    near = candidates.filter(pl.col("signal") == "pdq")
    joined = pl.Series(clustering.components(near.select(a="i", b="j"), len(rows)))
    crowds = joined.gather(_list_at_limit(candidates)).unique()
    ids = pl.concat([near["i"], near["j"]]).unique().sort()
    crowd = rows[ids.filter(joined.gather(ids).is_in(crowds.implode())).to_list()]
    stands = rows.filter(pl.col("status") == "ok").group_by("sha256", "scope").agg(pl.col("rank").min())
    stands = crowd.select("id", "sha256", "pdq_d4").join(stands, on="sha256").sort("rank")
    whole = stands.unique("id", keep="first", maintain_order=True)
    groups = [whole, *(part for _, part in stands.group_by("scope", maintain_order=True))] if len(crowd) else []
    found = pl.concat([near.clear(), *(_find_near(part, jobs) for part in groups)])
    low, high = pl.min_horizontal("i", "j"), pl.max_horizontal("i", "j")
    known = near.select(low=low, high=high)
    more = found.with_columns(low=low, high=high).unique(["low", "high"], keep="first", maintain_order=True)
    return more.join(known, on=["low", "high"], how="anti", maintain_order="left").drop("low", "high")


def count_at_limit(candidates: pl.DataFrame) -> int:
    """Rows that had as many partners as the search keeps, and may have had more."""
    return len(_list_at_limit(candidates))


def _list_at_limit(candidates: pl.DataFrame) -> pl.Series:
    partners = candidates.filter(pl.col("signal") == "pdq").group_by("j").len()
    return partners.filter(pl.col("len") >= search.LIMIT)["j"]
