"""The job behind `unmemorize match`: IMAGES × OUT → a table of matches, part by part.

In: whatever `sources.list_shards` takes, or one picture file; a finished OUT; prompts. Out: in a folder DIR

* `matches.parquet`, `matches.csv`: SCHEMA, in the order of the queries, of each the best match first;
* `queries.parquet`: one row a query, nothing dropped: where it lies and what it is;
* `match.json`: options, versions, counts; written last.

What is done stays in DIR/.match, named by all that decides it, so that the same command goes on after a kill. Pictures
are read in parts, and never all at once.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from dedup import cluster, engine, fingerprint, hashing, look, manifest, match, queries, sources
from dedup.index import Index
from dedup.manifest import Schema
from dedup.options import OptionsError, list_versions, lock

PART = 512  # queries that are described, searched for and compared together
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
    address: str | None = None,
) -> dict[str, Any]:
    """Match the pictures against OUT into `folder`, and return the content of `match.json`.

    prompts: CSV with the columns file (or key) and prompt. jobs: worker processes, 0 = one per processor.
    address: of a Ray cluster, see `cluster.start`. Raises OSError or ValueError.
    """
    out, folder = out.resolve(), folder.resolve()
    pictures, layout = sources.fetch(pictures, sources.Layout(), sources.Transfer(folder / "download"))
    if pictures == folder or pictures in folder.parents:
        raise OptionsError(f"{folder} lies inside {pictures}: choose another folder with -o")
    told = pl.DataFrame(schema={"name": pl.String, "prompt": pl.String}) if prompts is None else read_prompts(prompts)
    shards = queries.list_shards(pictures, layout)
    index = match.load(out)
    options = {"images": str(pictures), "against": str(out), "max_false_pairs": max_false_pairs}
    versions = list_versions()
    decisive = [options, versions, [shard.fingerprint for shard in shards], told.rows(), (out / "run.json").read_text()]
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [sources.name_file(shards[0]), out / "run.json", index.dataset.src]
    with lock(folder), cluster.start(jobs, address, folder, inputs) as workers:
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
        asked, matches = (
            pl.concat([pl.read_parquet(work / f"{name}-{number:05d}.parquet") for number in range(len(shards))])
            for name in ("queries", "matches")
        )
        counts = count(asked, matches) | count_prompts(asked, told)
        manifest.write_parquet(folder / "queries.parquet", asked)
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
    rows = rows.with_columns(query=manifest.PLACE)
    prompt = told.rename({"prompt": "by_name"})
    rows = rows.join(prompt, left_on="query", right_on="name", how="left", maintain_order="left")
    rows = rows.join(told, left_on="key", right_on="name", how="left", maintain_order="left")
    rows = rows.with_columns(prompt=pl.coalesce("by_name", "prompt"))
    parts: list[pl.DataFrame] = []
    matches: list[pl.DataFrame] = []
    for part in rows.iter_slices(PART):
        part, found = queries.match_part(index, src, part, max_false_pairs, workers)
        parts.append(part.select(QUERIES))
        matches.append(
            pl.concat(
                [part[found["query"].to_list()].select("query", "status", "error", "prompt"), found.drop("query")],
                how="horizontal",
            )
        )
    empty = rows.clear().select(QUERIES), pl.DataFrame(schema=SCHEMA)
    for name, some, none in zip(("queries", "matches"), (parts, matches), empty, strict=True):
        manifest.write_parquet(work / f"{name}-{number:05d}.parquet", pl.concat([none, *some]))


def count(asked: pl.DataFrame, matches: pl.DataFrame) -> dict[str, int]:
    """Queries by their best match; `matched`: training pictures that copies are copies of."""
    best = matches.filter(pl.col("rank") == 1)
    classes = dict(best["class"].value_counts().iter_rows())
    readable = asked.filter(pl.col("status") == "ok").height
    found = {"copies": classes.get("copy", 0), "same_scene": classes.get("same-scene", 0)}
    found |= {"look_alike": classes.get("look-alike", 0)}
    matched = best.filter(pl.col("class") == "copy")["kept_id"].n_unique()
    counts = {"pictures": len(asked), **found, "none": readable - sum(found.values())}
    return counts | {"unreadable": len(asked) - readable, "matched": matched}


def count_prompts(asked: pl.DataFrame, told: pl.DataFrame) -> dict[str, int]:
    """Prompts, and those of them for pictures that are not there."""
    names = pl.concat([asked["query"], asked["key"]]).unique()
    return {"prompts": len(told), "unknown_prompts": told.filter(~pl.col("name").is_in(names.implode())).height}
