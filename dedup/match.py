"""Pictures that somebody else made, a model's output or an upload, against a finished run: which of its rows are they?

In: pictures, and an OUT of `--level copy`. Out: one row a match with its evidence, and one for a picture without any.
Equal bytes and pixels are looked up; then the nearest representatives are matched by local features and laid over, as
`copies` does among the rows. Whoever asks often calls `load` once and then `find`: a guard while a model draws,
decontamination of a test set. Knows nothing of prompts but that a caption may equal one.

A row stands at `src` as the run saw it: SRC must be where it was. Pictures of OUT that are smaller than
`copies.MIN_SIDE` have no vector and are found by their bytes or pixels alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import polars as pl

from dedup import copies, engine, evidence, features, geometry, hashing, images, look, manifest, overlay, vectors
from dedup.index import Dataset, Index, fold
from dedup.index import load as load
from dedup.manifest import ORIENTATIONS, Schema

MAX_FALSE = 3.0  # unrelated pictures of OUT that are compared with one query, on average
OF_CAPTION = 16  # rows with the query's prompt as their caption that are compared at most
REMEMBERED = 4_096  # pictures of OUT whose features a process keeps: 140 MB

EVIDENCE: Schema = {
    "class": pl.String,
    "score": pl.Float64,
    "inliers": pl.Int32,
    "overlap": pl.Float64,
    "orientation": pl.String,
    "transform": pl.List(pl.Float64),
}
# Of a match. `id` … `represents` are those of OUT's row; represents: rows that its kept row (kept_id) stands for.
FOUND: Schema = {
    "query": pl.Int64,  # number of the picture
    "rank": pl.Int32,  # 1 = best
    "class": pl.String,  # null: no match
    "signal": pl.String,  # bytes, pixels, copy
    "score": pl.Float64,  # higher = more alike, 0 … 1
    "cosine": pl.Float64,  # of the embeddings; null unless they found the row
    "expected_false": pl.Float64,  # unrelated rows expected to be as near to one query, or nearer; null: unknown
    "inliers": pl.Int32,
    "overlap": pl.Float64,
    "orientation": pl.String,  # what turns the query into the row
    "transform": pl.List(pl.Float64),  # positions of the query (mirrored if `m…`) → of the row, in their longer sides
    "id": pl.Int64,
    "source": pl.String,
    "shard": pl.String,
    "key": pl.String,
    "caption": pl.String,
    "represents": pl.Int64,
    "kept_id": pl.Int64,
}
NEAR: Schema = {"query": pl.Int64, "id": pl.Int64, "cosine": pl.Float64, "chance": pl.Float64, "mirrored": pl.Boolean}
STRENGTH = {"copy": 0, "same-scene": 1, "look-alike": 2}  # the order of matches; then by signal, then by score
SIGNALS = {"bytes": 0, "pixels": 1, "copy": 2}


# One picture, in whatever process


@lru_cache(REMEMBERED)
def _features_of(row: tuple, place: tuple[Path, int] | None, dataset: Dataset) -> features.Features:
    """Of a row of OUT: where the run has left them, else taken again."""
    if place is not None and place[0].exists():
        return features.unpack(evidence.open_features(place[0])[place[1]])
    picture = look.read_again(dataset.src, row, dataset.decode, min_side=features.SIDE)
    return features.extract(picture.pixels)


def forget() -> None:
    """Drop the features that this process remembers."""
    _features_of.cache_clear()
    evidence.open_features.cache_clear()


def compare(
    query: features.Features, load_query: evidence.Load, candidates: list[tuple], dataset: Dataset
) -> list[tuple]:
    """(location of a row, place of its features, is the query mirrored, is the row in a series) → EVIDENCE or nulls."""
    results: list[tuple] = []
    for row, place, mirrored, strict in candidates:
        least = overlay.COPY_EVIDENCE if strict else geometry.MIN_EVIDENCE
        found = geometry.match(query, _features_of(row, place, dataset), mirrored)
        if found is None or found.inliers < least:
            results.append((None,) * len(EVIDENCE))
            continue
        load_row = partial(_read_row, row, dataset)
        kind, score, overlap = evidence.judge(load_query, load_row, found, strict=strict)
        name = ORIENTATIONS[geometry.orientation(found)]
        results.append((kind, score, found.inliers, overlap, name, found.transform.ravel().tolist()))
    return results


def _read_row(row: tuple, dataset: Dataset, side: int) -> images.Decoded:
    return look.read_again(dataset.src, row, dataset.decode, min_side=side)


def as_lossy(decoded: images.Decoded) -> images.Decoded:
    """Nobody knows what a query went through before it was saved, so more than rounding may lie between copies."""
    return replace(decoded, format="JPEG")


# All pictures


def find(
    index: Index,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str | None] | None = None,
    *,
    max_false_pairs: float = MAX_FALSE,
    jobs: int = 0,
) -> pl.DataFrame:
    """Matches of decoded pictures, uint8 (H, W, 3) upright RGB: table FOUND, best first; one row of nulls for none.

    prompts: what each was drawn for, see `find_captions`. jobs: threads of the search, 0 = one per processor.
    Equal pixels are recognised as such where the run had to tell pictures apart by them; elsewhere they are copies like
    others. Raises SourceError.
    """
    jobs = jobs or engine.available_cpus()
    large = [n for n, pixels in enumerate(pictures) if min(pixels.shape[:2]) >= copies.MIN_SIDE]
    described = {n: features.extract(pictures[n]) for n in large}
    encoded = [index.encoder.encode(pictures[n], described[n]) for n in large]
    near = find_near(index, np.array(large, np.int64), encoded, max_false_pairs, jobs)
    if prompts is not None:
        asked = pl.DataFrame({"query": range(len(prompts)), "prompt": prompts}, schema_overrides={"prompt": pl.String})
        near = add_captions(near, find_captions(index, asked).filter(pl.col("query").is_in(large)))
    judged: list[tuple] = []
    for query, candidates in list_candidates(index, near):
        pixels = pictures[query]
        height, width = pixels.shape[:2]
        picture = as_lossy(images.Decoded(pixels, width, height, ""))
        judged += compare(described[query], partial(evidence.give, picture), candidates, index.dataset)
    same = [(n, index.by_pixels.get(hashing.pixel_digest(pixels))) for n, pixels in enumerate(pictures)]
    equal = pl.DataFrame(same, schema={"query": pl.Int64, "id": pl.Int64}, orient="row").drop_nulls()
    return rank(index, len(pictures), near, judged, equal.with_columns(signal=pl.lit("pixels")))


def find_near(
    index: Index,
    queries: np.ndarray,
    encoded: list[np.ndarray],
    max_false_pairs: float,
    jobs: int,
    most: int | None = None,
) -> pl.DataFrame:
    """The nearest representatives of each query: table NEAR. queries: their numbers; encoded: (2, d) each.

    most: so many of each query, None = `neighbours.K`.

    Of few pictures (`copies.ALL_PAIRS`) all are near: they are too few to learn a vocabulary from.
    """
    if not len(queries) or not len(index.ids):
        return pl.DataFrame(schema=NEAR)
    from dedup import candidates, neighbours, products

    views = products.quantise(vectors.normalise(np.concatenate(encoded)))  # (2 n, d): upright, mirrored in turn
    crowd = neighbours.measure_background(views, index.vectors, jobs=jobs)
    few = len(index.ids) <= copies.ALL_PAIRS
    k, floor = (len(index.ids), -2.0) if few else (most or neighbours.K, index.chance.threshold(max_false_pairs))
    backgrounds = crowd, index.background
    found, _ = neighbours.nearest(views, index.vectors, k, threshold=floor, backgrounds=backgrounds, jobs=jobs)
    view, place = np.nonzero(found >= 0)
    pairs = np.unique(np.stack([view // 2, found[view, place]], axis=1), axis=0)
    i, j = pairs.T
    upright, turned = (
        neighbours.score_pairs(views, 2 * i + mirrored, index.vectors, j, backgrounds) for mirrored in (0, 1)
    )
    better = 2 * i + (turned > upright)
    surely = np.abs(turned - upright) > candidates.SURE_TURN
    table = pl.DataFrame(
        {
            "query": queries[i],
            "id": index.ids[j],
            "cosine": neighbours.cosines(views, better, index.vectors, j),
            "chance": np.maximum(upright, turned),
            "mirrored": pl.select(pl.when(pl.Series(surely)).then(pl.Series(turned > upright))).to_series(),
        }
    )
    best = table.sort("query", -pl.col("chance"), "id").group_by("query", maintain_order=True).head(k)
    return manifest.conform(best, NEAR)


def find_captions(index: Index, asked: pl.DataFrame) -> pl.DataFrame:
    """(query, prompt) → query, id of readable rows whose caption equals the prompt, one of each star, at most 16.

    A model that has learned a picture by heart gives it back for the picture's own caption, perhaps so damaged that its
    vector is no longer near. Space around the text and case do not count.
    """
    asked = asked.with_columns(prompt=fold(asked["prompt"])).filter(pl.col("prompt") != "")
    if asked.is_empty():
        return pl.DataFrame(schema={"query": pl.Int64, "id": pl.Int64})
    said = (pl.col("status") == "ok") & pl.col("said").is_in(asked["prompt"].unique().implode())
    first = index.rows.filter(said).select("id", "cluster_id", "keep", prompt="said")
    first = first.sort(~pl.col("keep"), "id").unique(["prompt", "cluster_id"], keep="first", maintain_order=True)
    first = first.sort("prompt", "id").group_by("prompt", maintain_order=True).head(OF_CAPTION)
    return asked.join(first, on="prompt", maintain_order="left_right").select("query", "id")


def add_captions(near: pl.DataFrame, told: pl.DataFrame) -> pl.DataFrame:
    """NEAR with the rows of `find_captions` that are not in it."""
    more = manifest.conform(told.join(near, on=["query", "id"], how="anti"), NEAR)
    return pl.concat([near, more]).sort("query", maintain_order=True)


def list_candidates(index: Index, near: pl.DataFrame) -> list[tuple[int, list[tuple]]]:
    """Queries in order, each with what `compare` needs of its candidates."""
    locations = index.rows.select(look.LOCATION)[near["id"]].rows()
    places = index.places(near["id"].to_numpy())
    listed: dict[int, list[tuple]] = {}
    strict = index.rows["strict"].gather(near["id"])
    for query, *candidate in zip(near["query"], locations, places, near["mirrored"], strict, strict=True):
        listed.setdefault(query, []).append(tuple(candidate))
    return list(listed.items())


def rank(index: Index, queries: int, near: pl.DataFrame, evidence: list[tuple], equal: pl.DataFrame) -> pl.DataFrame:
    """Candidates with their EVIDENCE, and rows known to be equal (query, id, signal) → table FOUND of all queries."""
    judged = near.hstack(pl.DataFrame(evidence, schema=EVIDENCE, orient="row")).filter(pl.col("class").is_not_null())
    expected = index.chance.count(judged["chance"].fill_null(-np.inf).to_numpy())
    judged = judged.with_columns(signal=pl.lit("copy"), expected_false=pl.Series(expected).fill_nan(None))
    equal = equal.with_columns(**{"class": pl.lit("copy")}, score=pl.lit(1.0), orientation=pl.lit("r0"))
    found = pl.concat([equal, judged], how="diagonal_relaxed")
    order = pl.col("class").replace_strict(STRENGTH), pl.col("signal").replace_strict(SIGNALS), -pl.col("score")
    found = found.sort("query", *order, "id").unique(["query", "id"], keep="first", maintain_order=True)
    found = found.with_columns(rank=pl.int_range(1, pl.len() + 1).over("query"))
    row = index.rows.select("source", "shard", "key", "caption", kept_id=pl.coalesce("kept_id", "id"))[found["id"]]
    row = row.with_columns(represents=index.rows["represents"].gather(row["kept_id"]))
    found = found.hstack(row)
    everyone = pl.DataFrame({"query": np.arange(queries)})
    return manifest.conform(everyone.join(found, on="query", how="left", maintain_order="left_right"), FOUND)
