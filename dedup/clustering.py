"""Accepted pairs → decisions. Delete only against a survivor.

Rows are visited in keeper order; a row is dropped to the first kept row that it matches directly, upright, as a copy.
Mirrored and turned copies belong to the cluster and stay unless asked otherwise; so does what an earlier run has
published, whatever it matches. Components over all pairs serve
reports and splits; they never decide a deletion, so a chain a–b–c cannot delete c for a.
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
) -> pl.DataFrame:
    """Pairs (a, b, class, signal, score, orientation by name) → one row per row: keep, kept_id, cluster_id, pair.

    rank: keeper order of all rows. `kept_id`, and `pair` (row number of the deciding pair), are null on rows without
    one. flips, rotations: "keep" or "drop" mirrored and turned copies. published: bool of all rows, those that stay
    whatever they match; they should rank first.
    """
    order = rank.to_numpy()
    stays = np.zeros(len(order), bool) if published is None else published.to_numpy()
    droppable = {"r0"} | ({"m0", "m180"} if flips == "drop" else set())
    if rotations == "drop":
        droppable |= {"r90", "r180", "r270"} | ({"m90", "m270"} if flips == "drop" else set())
    copies = pairs.with_row_index("pair").filter(pl.col("class") == "copy")
    a, b = copies["a"].to_numpy(), copies["b"].to_numpy()
    better = np.where(order[a] < order[b], a, b)
    worse = np.where(order[a] < order[b], b, a)
    drops = copies["orientation"].is_in(droppable).to_numpy()
    visit = np.lexsort((order[better], order[worse]))
    keep = np.ones(len(order), bool)
    kept_id = np.full(len(order), -1)
    deciding = np.full(len(order), -1)
    cluster = np.arange(len(order))
    for row, other, drop, pair in zip(
        worse[visit].tolist(),
        better[visit].tolist(),
        drops[visit].tolist(),
        copies["pair"].to_numpy()[visit].tolist(),
        strict=True,
    ):
        if not (keep[row] and keep[other]):
            continue  # already dropped, or the partner itself did not survive
        if drop and not stays[row]:
            keep[row], kept_id[row], deciding[row] = False, other, pair
            cluster[row] = cluster[other]
        elif deciding[row] < 0:  # a mirrored, turned or published copy joins the star but stays
            deciding[row], cluster[row] = pair, cluster[other]
    return pl.DataFrame({"keep": keep, "kept_id": kept_id, "cluster_id": cluster, "pair": deciding}).with_columns(
        pl.when(pl.col(c) >= 0).then(pl.col(c)).alias(c) for c in ("kept_id", "pair")
    )


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
