"""The job behind `unmemorize match`: IMAGES × OUT → a table of matches, part by part.

In: whatever `sources.list_shards` takes, or one picture file; a finished OUT; prompts. Out: in a folder DIR

* `matches.parquet`, `matches.csv`: SCHEMA, in the order of the queries, of each the best match first;
* `queries.parquet`: one row a query, nothing dropped: where it lies and what it is;
* `match.json`: options, versions, counts; written last.

What is done stays in DIR/.match, named by all that decides it, so that the same command goes on after a kill. Pictures
are read in parts, and never all at once.
"""

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import copies, engine, features, fingerprint, hashing, images, look, manifest, match, pipeline, sources
from dedup.fingerprint import DecodeOptions
from dedup.index import Dataset, Encoder, Index
from dedup.manifest import Schema
from dedup.reader import ITEMS

PART = 512  # queries that are described, searched for and compared together
OF_PIXELS = 16  # kept rows with a query's size and hashes whose pixels are compared, at most
HASHES = ["width", "height", "phash", "dhash", "pdq"]  # equal pixels that were read in one way agree in these
NAMES = ("file", "key")  # columns that may say which query a prompt belongs to
QUERIES = ["query", "source", *look.LOCATION, "width", "height", "format", "status", "error", "prompt"]
SCHEMA: Schema = {
    "query": pl.String,  # path relative to IMAGES, or `shard:key`
    "status": pl.String,
    "error": pl.String,
    "prompt": pl.String,
    **{column: dtype for column, dtype in match.FOUND.items() if column != "query"},
}


class PromptsError(ValueError):
    """A table of prompts that cannot be used."""


def match_files(
    pictures: Path,
    out: Path,
    folder: Path,
    *,
    prompts: Path | None = None,
    max_false_pairs: float = match.MAX_FALSE,
    jobs: int = 0,
) -> dict[str, Any]:
    """Match the pictures against OUT into `folder`, and return the content of `match.json`.

    prompts: CSV with the columns file (or key) and prompt. jobs: worker processes, 0 = one per processor. Raises
    OSError or ValueError.
    """
    out, folder = out.resolve(), folder.resolve()
    pictures, layout = sources.fetch(pictures, sources.Layout())
    if pictures == folder or pictures in folder.parents:
        raise pipeline.OptionsError(f"{folder} lies inside {pictures}: choose another folder with -o")
    told = pl.DataFrame(schema={"name": pl.String, "prompt": pl.String}) if prompts is None else read_prompts(prompts)
    shards = list_shards(pictures, layout)
    index = match.load(out)
    options = {"images": str(pictures), "against": str(out), "max_false_pairs": max_false_pairs}
    versions = {name: version(name) for name in pipeline.LIBRARIES}
    decisive = [options, versions, [shard.fingerprint for shard in shards], told.rows(), (out / "run.json").read_text()]
    folder.mkdir(parents=True, exist_ok=True)
    with pipeline.lock(folder), engine.Workers(jobs) as workers:
        work = folder / ".match" / hashing.digest(repr(decisive).encode())[:20]
        for stale in set((folder / ".match").glob("*")) - {work}:
            shutil.rmtree(stale)
        (folder / "match.json").unlink(missing_ok=True)
        tasks = [(shard, number, work / "signatures", index.dataset.decode) for number, shard in enumerate(shards)]
        counted = [rows for rows, _ in workers.run(fingerprint.fingerprint_shard, tasks)]
        with tqdm(desc="match", unit=" images", total=sum(counted), file=sys.stderr, disable=None) as bar:
            for number, rows in enumerate(counted):
                if not (work / f"matches-{number:05d}.parquet").exists():
                    match_shard(index, pictures, work, number, told, max_false_pairs, workers)
                bar.update(rows)
        queries, matches = (
            pl.concat([pl.read_parquet(work / f"{name}-{number:05d}.parquet") for number in range(len(shards))])
            for name in ("queries", "matches")
        )
        counts = count(queries, matches) | count_prompts(queries, told)
        manifest.write_parquet(folder / "queries.parquet", queries)
        manifest.write_parquet(folder / "matches.parquet", matches)
        transform = pl.col("transform").list.eval(pl.element().cast(pl.String)).list.join(" ")
        manifest.write_atomic(folder / "matches.csv", matches.with_columns(transform).write_csv)
        threshold = index.chance.threshold(max_false_pairs)
        searched = {"encoder": index.encoder.name, "rows": len(index.rows), "representatives": len(index.ids)}
        searched |= {"null": bool(len(index.chance.scores)), "floor": None if threshold <= -1 else threshold}
        searched["series"] = int(index.rows["strict"].sum())
        searched["supported"] = index.chance.supports(max_false_pairs)
        finished = {"options": options, "versions": versions, "search": searched, "counts": counts}
        manifest.write_json(folder / "match.json", finished)
    return finished


def list_shards(pictures: Path, layout: sources.Layout) -> list[sources.Shard]:
    """Of all that `sources.list_shards` takes, or of one picture file."""
    if not pictures.is_file() or pictures.suffix.lower() not in images.SUFFIXES:
        return sources.list_shards(pictures, layout)
    name = manifest.encode_name(os.fsencode(pictures.name))
    stamp = sources.digest_stamps([name, sources.stamp_file(pictures)])
    return [sources.Shard("folder", str(pictures.parent), None, (name,), (None,), stamp)]


def read_prompts(path: Path) -> pl.DataFrame:
    """CSV → name, prompt, both without gaps. Raises PromptsError."""
    try:
        table = pl.read_csv(path, infer_schema=False, encoding="utf8-lossy")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PromptsError(f"{path}: the prompts cannot be read ({str(error).partition('\n')[0]})") from error
    names = [name for name in NAMES if name in table.columns]
    if not names or "prompt" not in table.columns:
        raise PromptsError(f"{path} needs the columns file (or key) and prompt; it has {', '.join(table.columns)}")
    told = table.select(name=names[0], prompt="prompt").drop_nulls()
    told = told.with_columns(
        name=pl.Series([manifest.encode_name(name.encode()) for name in told["name"]], dtype=pl.String)
    )
    if told["name"].is_duplicated().any():
        raise PromptsError(
            f"{path} has two prompts for {told.filter(told['name'].is_duplicated())['name'][0]}: keep one"
        )
    return told


def match_shard(
    index: Index,
    src: Path,
    work: Path,
    number: int,
    told: pl.DataFrame,
    max_false_pairs: float,
    workers: engine.Workers,
) -> None:
    """Write the queries and the matches of one shard, from its signatures."""
    rows = pl.read_parquet(work / "signatures" / f"{number:05d}.parquet")
    shard_and_key = pl.concat_str("shard", pl.lit(":"), "key")
    rows = rows.with_columns(query=pl.when(pl.col("shard").is_null()).then("key").otherwise(shard_and_key))
    prompt = told.rename({"prompt": "by_name"})
    rows = rows.join(prompt, left_on="query", right_on="name", how="left", maintain_order="left")
    rows = rows.join(told, left_on="key", right_on="name", how="left", maintain_order="left")
    rows = rows.with_columns(prompt=pl.coalesce("by_name", "prompt"))
    queries, matches = [], []
    for part in rows.iter_slices(PART):
        part, found = match_part(index, src, part, max_false_pairs, workers)
        queries.append(part.select(QUERIES))
        matches.append(
            pl.concat(
                [part[found["query"].to_list()].select("query", "status", "error", "prompt"), found.drop("query")],
                how="horizontal",
            )
        )
    empty = rows.clear().select(QUERIES), pl.DataFrame(schema=SCHEMA)
    for name, parts, none in zip(("queries", "matches"), (queries, matches), empty, strict=True):
        manifest.write_parquet(work / f"{name}-{number:05d}.parquet", pl.concat([none, *parts]))


def match_part(
    index: Index, src: Path, part: pl.DataFrame, max_false_pairs: float, workers: engine.Workers
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signatures of some queries → the same, with what the second reading found unreadable, and `match.FOUND`."""
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
    near = match.find_near(index, np.array(list(known), np.int64), vectors, max_false_pairs, workers.jobs)
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
    kept = index.rows.filter(pl.col("keep") & pl.col("pdq").is_in(others["pdq"].drop_nulls().implode()))
    alike = others.select("number", *HASHES).join(kept.select("id", *HASHES), on=HASHES)
    alike = alike.sort("number", "id").group_by("number", maintain_order=True).head(OF_PIXELS).select("number", "id")
    of_pixels = alike
    if len(alike):
        asked = others.filter(pl.col("number").is_in(alike["number"].implode()))
        shown = index.rows[alike["id"].unique().sort().to_list()]
        decode = index.dataset.decode
        digest, digests = (
            run_in_parts(workers, look.digest_pixels, where, rows.select(look.LOCATION).rows(), decode)
            for where, rows in ((src, asked), (index.dataset.src, shown))
        )
        ours = asked.select("number", digest=pl.Series(digest, dtype=pl.String))
        theirs = shown.select("id", digest=pl.Series(digests, dtype=pl.String))
        of_pixels = alike.join(ours, on="number").join(theirs, on=["id", "digest"])
    found = {"bytes": of_bytes, "pixels": of_pixels}
    return pl.concat([t.select(query="number", id="id", signal=pl.lit(name)) for name, t in found.items()])


def count(queries: pl.DataFrame, matches: pl.DataFrame) -> dict[str, int]:
    """Queries by their best match; `matched`: training pictures that copies are copies of."""
    best = matches.filter(pl.col("rank") == 1)
    classes = dict(best["class"].value_counts().iter_rows())
    readable = queries.filter(pl.col("status") == "ok").height
    found = {"copies": classes.get("copy", 0), "same_scene": classes.get("same-scene", 0)}
    found |= {"look_alike": classes.get("look-alike", 0)}
    matched = best.filter(pl.col("class") == "copy")["kept_id"].n_unique()
    counts = {"pictures": len(queries), **found, "none": readable - sum(found.values())}
    return counts | {"unreadable": len(queries) - readable, "matched": matched}


def count_prompts(queries: pl.DataFrame, told: pl.DataFrame) -> dict[str, int]:
    """Prompts, and those of them for pictures that are not there."""
    names = pl.concat([queries["query"], queries["key"]]).unique()
    return {"prompts": len(told), "unknown_prompts": told.filter(~pl.col("name").is_in(names.implode())).height}
