"""Pictures that were fingerprinted → the rows of a run that they are copies of, by as many processes as there are.

In: signatures of pictures that stand in another source, and an `Index` of the run. Out: `match.FOUND`, and what turned
out to be unreadable when it was read again. Knows nothing of prompts but the column that `match` asks for.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import copies, engine, features, images, look, manifest, match, sources
from dedup.fingerprint import DecodeOptions
from dedup.index import Dataset, Encoder, Index
from dedup.reader import ITEMS

OF_PIXELS = 16  # rows with a query's size and hashes whose pixels are compared, at most
HASHES = ["width", "height", "phash", "dhash", "pdq"]  # equal pixels that were read in one way agree in these


def list_shards(pictures: Path, layout: sources.Layout) -> list[sources.Shard]:
    """Of all that `sources.list_shards` takes, or of one picture file."""
    if not pictures.is_file() or pictures.suffix.lower() not in images.SUFFIXES:
        return sources.list_shards(pictures, layout)
    name = manifest.encode_name(os.fsencode(pictures.name))
    stamp = sources.digest_stamps([name, sources.stamp_file(pictures)])
    return [sources.Shard("folder", str(pictures.parent), None, (name,), (None,), stamp)]


def match_part(
    index: Index,
    src: Path,
    part: pl.DataFrame,
    max_false_pairs: float,
    workers: engine.Workers,
    most: int | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signatures of some queries → the same, with what the second reading found unreadable, and `match.FOUND`.

    most: representatives that each is compared with, None = as `match.find_near` has it.
    """
    decode = index.dataset.decode
    part = part.with_columns(number=pl.int_range(pl.len()))
    readable = part.filter(pl.col("status") == "ok")
    location = part.select(look.LOCATION).rows()
    described = run_in_parts(workers, describe, src, readable.select(look.LOCATION).rows(), decode, index.encoder)
    status = readable.select("number").hstack(
        pl.DataFrame([each[:2] for each in described], schema={"status": pl.String, "error": pl.String}, orient="row")
    )
    part = part.update(status, on="number", include_nulls=False)
    known = {
        n: (record, vector)
        for n, (_, _, record, vector) in zip(readable["number"], described, strict=True)
        if record is not None
    }
    vectors = [vector for _, vector in known.values()]
    near = match.find_near(index, np.array(list(known), np.int64), vectors, max_false_pairs, workers.jobs, most)
    asked = part.filter(pl.col("number").is_in(list(known)) & pl.col("prompt").is_not_null())
    near = match.add_captions(near, match.find_captions(index, asked.select(query="number", prompt="prompt")))
    items = [(location[n], known[n][0], candidates) for n, candidates in match.list_candidates(index, near)]
    compared = run_in_parts(workers, compare, src, items, decode, index.dataset)
    evidence = [each for of_query in compared for each in of_query]
    equal = find_equal(index, src, part.filter(pl.col("status") == "ok"), workers)
    return part, match.rank(index, len(part), near, evidence, equal)


def run_in_parts(workers: engine.Workers, function: Any, src: Path, items: list, *more: object) -> list:
    """`function(src, part, *more)` over parts of the items; the results of all."""
    parts = [items[start : start + ITEMS] for start in range(0, len(items), ITEMS)]
    return [result for part in workers.run(function, [(src, part, *more) for part in parts]) for result in part]


def describe(src: Path, rows: list[tuple], options: DecodeOptions, encoder: Encoder) -> list[tuple]:
    """Locations of queries → (status, error, RECORD, vectors); the last two null for what is small or unreadable.

    A picture whose luma could be hashed may still be damaged.
    """
    results: list[tuple] = []
    limits = {"max_pixels": options.max_pixels, "max_frames": options.max_frames}
    for row in rows:
        data = look.read_bytes(src, row)
        try:
            pixels = images.decode(data, min_side=look.CLOSE_SIDE, montage=True, **limits).pixels
        except images.ImageError as error:
            results.append((error.status, str(error), None, None))
            continue
        if min(pixels.shape[:2]) < copies.MIN_SIDE:
            results.append(("ok", None, None, None))
            continue
        found = features.extract(pixels)
        results.append(("ok", None, features.pack(found), encoder.encode(pixels, found)))
    return results


def compare(src: Path, queries: list[tuple], options: DecodeOptions, dataset: Dataset) -> list[list[tuple]]:
    """(location, RECORD, candidates) → evidence of each candidate (`match.compare`)."""
    results = []
    for row, record, candidates in queries:

        def load(side: int, row: tuple = row) -> images.Decoded:
            return match.as_lossy(look.read_again(src, row, options, min_side=side))

        results.append(match.compare(features.unpack(record), load, candidates, dataset))
    return results


def find_equal(index: Index, src: Path, readable: pl.DataFrame, workers: engine.Workers) -> pl.DataFrame:
    """query, id, signal: the row with the bytes of a query, a kept one if there is any; else those with its pixels."""
    there = index.rows.filter((pl.col("status") == "ok") & pl.col("sha256").is_in(readable["sha256"].implode()))
    there = there.sort(~pl.col("keep"), "id").unique("sha256", keep="first", maintain_order=True)
    of_bytes = readable.join(there.select("sha256", "id"), on="sha256", maintain_order="left")
    others = readable.join(there, on="sha256", how="anti", maintain_order="left")
    of_pixels = find_pixels(index.rows.filter("keep"), index.dataset, src, others, workers)
    return pl.concat([of_bytes.select(query="number", id="id", signal=pl.lit("bytes")), of_pixels])


def find_pixels(
    rows: pl.DataFrame, dataset: Dataset, src: Path, asked: pl.DataFrame, workers: engine.Workers
) -> pl.DataFrame:
    """query, id, signal: those of the rows that have the pixels of a query. Both tables with their signatures."""
    there = rows.filter(pl.col("pdq").is_in(asked["pdq"].drop_nulls().implode()))
    alike = asked.select("number", *HASHES).join(there.select("id", *HASHES), on=HASHES)
    alike = alike.sort("number", "id").group_by("number", maintain_order=True).head(OF_PIXELS).select("number", "id")
    ours = asked.filter(pl.col("number").is_in(alike["number"].implode()))
    theirs = there.filter(pl.col("id").is_in(alike["id"].implode()))
    for name, where, table in (("ours", src, ours), ("theirs", dataset.src, theirs)):
        places = table.select(look.LOCATION).rows()
        digests = run_in_parts(workers, look.digest_pixels, where, places, dataset.decode)
        key = "number" if name == "ours" else "id"
        digest = table.select(key, **{name: pl.Series(digests, dtype=pl.String)})
        alike = alike.join(digest, on=key, maintain_order="left")
    same = alike.filter(pl.col("ours") == pl.col("theirs"))
    return same.select(query="number", id="id", signal=pl.lit("pixels"))
