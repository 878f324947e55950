"""Rows with their hashes → pairs that are worth a look: equal bytes, and hashes within the radius of `search`.

Rows with many partners have the first ones in keeper order only; in another order, or by scope, crowds are searched
again. Knows nothing of what a pair turns out to be.
"""

from dataclasses import dataclass

import polars as pl

from dedup import clustering, engine, search, verify
from dedup.signatures import Signatures


@dataclass(frozen=True, slots=True)
class Near:
    """Who looks for near codes, and in how many bytes of memory."""

    signatures: Signatures
    workers: engine.Workers
    memory: int

    def find(self, ids: pl.Series) -> pl.DataFrame:
        """Pairs of these rows, which come in keeper order, by their hash."""
        if len(ids) <= search.IN_MEMORY:
            found = search.join_hamming(self.signatures.read_codes(ids), jobs=self.workers.jobs)
        else:
            folder = self.signatures.folder.parent / "codes"
            self.signatures.write_codes(ids, folder / "codes.npy")
            found = search.join_stored(folder, self.workers, self.memory)
        return found.with_columns(
            ids.gather(found["i"]).alias("i"), ids.gather(found["j"]).alias("j"), signal=pl.lit("pdq")
        )


def find_candidates(rows: pl.DataFrame, level: str, near: Near) -> pl.DataFrame:
    """Pairs of ids i, j (i before j in keeper order): signal "bytes" or "pdq", orientation number (j → i), hamming.

    Only the first of the rows with equal bytes is searched for; the others pair with it and share its fate.
    """
    ordered = (
        rows.select("id", "picture", "status", "pdq_quality", "rank").filter(pl.col("status") == "ok").sort("rank")
    )
    is_first = ordered["picture"].is_first_distinct()
    first, others = ordered.filter(is_first), ordered.filter(~is_first)
    equal = others.join(first.select("picture", i="id"), on="picture").select("i", j="id")
    upright = {"orientation": pl.lit(0, pl.Int32), "hamming": pl.lit(None, pl.Int32)}
    equal_bytes = equal.with_columns(**upright, signal=pl.lit("bytes"))
    if level == "exact":
        return equal_bytes
    textured = first.filter(pl.col("pdq_quality") >= verify.MIN_QUALITY)["id"]
    return pl.concat([equal_bytes, near.find(textured)])


def find_in_crowds(rows: pl.DataFrame, candidates: pl.DataFrame, search_near: Near) -> pl.DataFrame:
    """More candidates, if `rows` come in another order, or by scope, than when these were found.

    A row that has as many partners as the search keeps has the first ones in keeper order. So crowds are searched
    again: in the order of now, as a whole and in each scope.
    """
    near = candidates.filter(pl.col("signal") == "pdq")
    joined = pl.Series(clustering.components(near.select(a="i", b="j"), len(rows)))
    crowds = joined.gather(_list_at_limit(candidates)).unique()
    ids = pl.concat([near["i"], near["j"]]).unique().sort()
    crowd = rows.select("id", "picture")[ids.filter(joined.gather(ids).is_in(crowds.implode()))]
    stands = rows.filter(pl.col("status") == "ok").group_by("picture", "scope").agg(pl.col("rank").min())
    stands = crowd.join(stands, on="picture").sort("rank")
    whole = stands.unique("id", keep="first", maintain_order=True)
    groups = [whole, *(part for _, part in stands.group_by("scope", maintain_order=True))] if len(crowd) else []
    found = pl.concat([near.clear(), *(search_near.find(part["id"]) for part in groups)])
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
