"""Vectors of pictures, and of their mirror images → which pairs are worth a look, and how many of them chance brings.

A pair's score is the better cosine of the upright and the mirrored view, less how alike unrelated pictures are to each
of the two (`neighbours.measure_background`). Random pairs of the same pictures tell how many unrelated ones reach a
score, and that chooses the least score of a candidate.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from dedup import clustering, neighbours, threshold

MIN_SCORE = 0.0  # no nearer than unrelated pictures come
MAX_FALSE = 3  # unrelated pairs a picture that may be compared
FEW = 5_000  # pictures up to which the number of partners is limit enough
SAMPLED = 100_000_000  # numbers in the vectors of the random pairs
SURE_TURN = 0.05  # by which the mirrored view must be more alike than the upright one, or less
EXAMPLES = 6  # pairs on each side of the floor


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Of n pictures: float16 (n, d) upright and mirrored, None if not known; and both backgrounds, float32 (n,)."""

    upright: np.ndarray
    mirrored: np.ndarray | None
    background: np.ndarray
    mirrored_background: np.ndarray | None

    def score(self, i: np.ndarray, j: np.ndarray) -> pl.DataFrame:
        """Pairs of rows → cosine, score, and what mirroring gains (0 if unknown)."""
        cosine = neighbours.cosines(self.upright, i, self.upright, j)
        score = neighbours.take_off(cosine, self.background, i, self.background, j)
        if self.mirrored is None:
            return pl.DataFrame({"cosine": cosine, "score": score, "gain": np.zeros(len(i))})
        mirrored = neighbours.cosines(self.mirrored, i, self.upright, j)
        turned = neighbours.take_off(mirrored, self.mirrored_background, i, self.background, j)
        cosine = np.where(turned > score, mirrored, cosine)
        return pl.DataFrame({"cosine": cosine, "score": np.maximum(score, turned), "gain": turned - score})


def see(upright: np.ndarray, mirrored: np.ndarray | None, jobs: int) -> Views:
    """Measure the backgrounds."""
    background = neighbours.measure_background(upright, jobs=jobs)
    turned = None if mirrored is None else neighbours.measure_background(mirrored, upright, jobs=jobs)
    return Views(upright, mirrored, background, turned)


def score_random(views: Views) -> pl.DataFrame:
    """i < j, score of random pairs of the pictures."""
    i, j = threshold.sample_pairs(len(views.upright), SAMPLED // views.upright.shape[1])
    return pl.DataFrame({"i": i, "j": j, "score": views.score(i, j)["score"]})


def choose_floor(scores: np.ndarray, n: int, max_false_pairs: float | None) -> threshold.Threshold | None:
    """The least score of a candidate among n pictures: few unrelated ones, by the random scores, reach it.

    None when there are too few pictures to tell, or so few that all their nearest may be compared.
    """
    if max_false_pairs is None and n <= FEW:
        return None
    related = round(len(scores) * 2 * neighbours.K / n)  # a picture has no more than so many partners
    try:
        tail = threshold.fit_tail(scores, n * (n - 1) // 2, related=related)
    except threshold.ThresholdError:
        return None
    return tail.threshold_for(MAX_FALSE * n if max_false_pairs is None else max_false_pairs)


def find_near(views: Views, floor: float, jobs: int) -> tuple[pl.DataFrame, float]:
    """Rows i < j, cosine, score, mirrored (null where both ways are worth a try); and the recall of the search."""
    joined = neighbours.join_cosine(views.upright, background=views.background, threshold=floor, jobs=jobs)
    near, recall = joined.pairs.select("i", "j"), joined.recall
    if views.mirrored is not None:
        turned = neighbours.join_cosine(
            views.upright,
            turned=views.mirrored,
            background=views.background,
            turned_background=views.mirrored_background,
            threshold=floor,
            jobs=jobs,
        )
        near = pl.concat([near, turned.pairs.select("i", "j")]).unique().sort("i", "j")
        recall = min(recall, turned.recall)
    near = near.hstack(views.score(near["i"].to_numpy(), near["j"].to_numpy()))
    surely = pl.when(pl.col("gain").abs() > SURE_TURN).then(pl.col("gain") > 0)
    return near.select("i", "j", "cosine", "score", mirrored=surely), recall


def describe_null(random: pl.DataFrame, pairs: pl.DataFrame, n: int, rows: int, floor: float) -> dict[str, Any]:
    """What `threshold.describe` says of the random pairs (a, b, score) of n pictures, but for the related ones.

    pairs: of the finished run, of ids below `rows`; what they connect, however loosely, is related.
    """
    component = pl.Series(clustering.components(pairs, rows))
    unrelated = random.filter(component.gather(random["a"]) != component.gather(random["b"]))
    try:
        tail = threshold.fit_tail(unrelated["score"].to_numpy(), n * (n - 1) // 2)
    except threshold.ThresholdError as error:
        return {"error": str(error)}
    return threshold.describe(tail) | {"expected_at_floor": tail.expected(floor)}


def choose_examples(near: pl.DataFrame, random: pl.DataFrame, pairs: pl.DataFrame, floor: float) -> list[dict]:
    """Pairs a, b by the floor: the lowest candidates that are copies now and that are not, and random pairs below."""
    copies = pairs.filter(pl.col("class") == "copy").select("a", "b", accepted=True)
    known = near.drop_nulls("score").join(copies, on=["a", "b"], how="left", maintain_order="left")
    known = known.with_columns(pl.col("accepted").fill_null(False), side=pl.lit("above")).sort("score", "a", "b")
    below = random.filter(pl.col("score") < floor).sort(-pl.col("score"), "a", "b")
    lists = (
        *(known.filter(pl.col("accepted") == accepted).head(EXAMPLES // 2) for accepted in (True, False)),
        below.head(EXAMPLES).with_columns(side=pl.lit("below"), accepted=False),
    )
    columns = ["a", "b", "score", "side", "accepted"]
    return pl.concat([some.select(columns) for some in lists]).sort(-pl.col("score"), "a", "b").to_dicts()
