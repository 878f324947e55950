"""Accepted pairs → decisions. Delete only against a survivor.

Rows are visited in keeper order; a row is dropped to the first kept row that it matches directly, upright, as a copy.
Mirrored and turned copies belong to the cluster and stay unless asked otherwise, as do copies in another scope; so does
what an earlier run has published, whatever it matches. Components over all pairs serve reports and splits; they never
decide a deletion, so a chain a–b–c cannot delete c for a.
"""

import numpy as np
import polars as pl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def decide(
    pairs: pl.DataFrame,
    rank: pl.Series,
    *,
    flips: str = "keep",
    rotations: str = "keep",
    published: pl.Series | None = None,
    scope: pl.Series | None = None,
    guarded: pl.Series | None = None,
) -> pl.DataFrame:
    """Pairs (a, b, class, signal, score, orientation by name) → one row per row: keep, kept_id, cluster_id, pair.

    rank: keeper order of all rows. `kept_id`, and `pair` (row number of the deciding pair), are null on rows without
    one. flips, rotations: "keep" or "drop" mirrored and turned copies. published: bool of all rows, those that stay
    whatever they match; they should rank first. scope, guarded: of `scopes.name_scopes`, None = one for all, and
    nobody; guarded rows must rank before those: they stay, and published ones go for them.
    """
    order = rank.to_numpy()
    droppable = {"r0"} | ({"m0", "m180"} if flips == "drop" else set())
    if rotations == "drop":
        droppable |= {"r90", "r180", "r270"} | ({"m90", "m270"} if flips == "drop" else set())
    copies = pairs.with_row_index("pair").filter(pl.col("class") == "copy")
    a, b = copies["a"].to_numpy(), copies["b"].to_numpy()
    better = np.where(order[a] < order[b], a, b)
    worse = np.where(order[a] < order[b], b, a)
    codes = np.zeros(len(order), int) if scope is None else scope.cast(pl.Categorical).to_physical().to_numpy()
    guards, stays = (np.zeros(len(order), bool) if rows is None else rows.to_numpy() for rows in (guarded, published))
    together = codes[better] == codes[worse]
    may = guards[better] | (together & ~stays[worse])
    drops = copies["orientation"].is_in(droppable).to_numpy() & may & ~guards[worse]
    equal = (copies["signal"] == "bytes").to_numpy()
    twins = equal & ~together  # one picture, whatever became of the other row
    followers = equal & drops  # of their scope: where the other row went they go too, and nothing is dropped to them
    visit = np.lexsort((order[better], order[worse]))
    keep = np.ones(len(order), bool)
    kept_id = np.full(len(order), -1)
    deciding = np.full(len(order), -1)
    cluster = np.arange(len(order))
    for row, other, drop, twin, follows, pair in zip(
        worse[visit].tolist(),
        better[visit].tolist(),
        drops[visit].tolist(),
        twins[visit].tolist(),
        followers[visit].tolist(),
        copies["pair"].to_numpy()[visit].tolist(),
        strict=True,
    ):
        if keep[row] and follows and kept_id[other] >= 0:
            keep[row], kept_id[row], deciding[row] = False, kept_id[other], deciding[other]
            cluster[row] = cluster[other]
        if not (keep[row] and (keep[other] or twin)):
            continue  # already dropped, or the partner itself did not survive
        if drop:
            keep[row], kept_id[row], deciding[row] = False, other, pair
            cluster[row] = cluster[other]
        elif deciding[row] < 0:  # mirrored, turned, published or of another scope: it joins the star but stays
            deciding[row], cluster[row] = pair, cluster[other]
    return pl.DataFrame({"keep": keep, "kept_id": kept_id, "cluster_id": cluster, "pair": deciding}).with_columns(
        pl.when(pl.col(c) >= 0).then(pl.col(c)).alias(c) for c in ("kept_id", "pair")
    )


def keep_more(decisions: pl.DataFrame, rank: pl.Series, most: int, guarded: pl.Series) -> pl.DataFrame:
    """Decisions, such that up to `most` rows of each star are kept: its keeper and the next of those dropped to it.

    What is dropped to a guarded row stays dropped. Mirrored and turned copies that stay anyway are not counted.
    """
    dropped = decisions.select("kept_id", row=pl.int_range(pl.len()), rank=rank).drop_nulls("kept_id").sort("rank")
    dropped = dropped.filter(~guarded.gather(dropped["kept_id"]))
    more = dropped.filter(pl.int_range(pl.len()).over("kept_id") < most - 1)["row"]
    kept = pl.int_range(pl.len()).is_in(more.implode())
    return decisions.with_columns(keep=pl.col("keep") | kept, kept_id=pl.when(~kept).then("kept_id"))


def components(pairs: pl.DataFrame, n: int) -> np.ndarray:
    """int64 (n,): smallest id of the connected component of each row, over pairs of every class."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs["a"].to_numpy(), pairs["b"].to_numpy())), shape=(n, n))
    count, label = connected_components(graph, directed=False)
    smallest = np.full(count, n)
    np.minimum.at(smallest, label, np.arange(n))
    return smallest[label]


def inverse_orientation(orientation: str) -> str:
    """What undoes an orientation. Reflections undo themselves."""
    return {"r90": "r270", "r270": "r90"}.get(orientation, orientation)
