"""The whole deduplication in order: SRC → OUT. Reads top to bottom; every step is a function of its own file.

OUT is described in docs/architecture.md. The same command on a finished or interrupted OUT fingerprints only
shards that are new or have changed, and decides again, by other policies if they are given; an OUT that was made with
other options is refused.
"""

import fcntl
import functools
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import (
    clustering,
    copies,
    engine,
    fingerprint,
    images,
    judge,
    manifest,
    policy,
    search,
    sources,
    verify,
)
from dedup.reader import Reader

POLICIES = ("flips", "rotations")  # Options that another run on OUT may choose anew: nothing is hashed again
LIBRARIES = ("unmemorize", "pillow", "imagehash", "numpy", "polars", "opencv-python-headless", "simplejpeg")


class OutputError(OSError):
    """OUT cannot be used now: another run is in it."""


class OptionsError(ValueError):
    """OUT must not be used: it lies inside SRC, or holds a run with other options."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the result; recorded in run.json. Two runs with equal options on one source give equal bytes."""

    level: str = "hash"  # "exact": equal bytes only; "hash": PDQ candidates, verified; "copy": edited copies too
    encoder: str = "local"  # of level "copy": "local", "external" or a name in `embedding.ENCODERS`
    weights: str | None = None  # a file, a folder or a hub id; of "external": the folder that holds the vectors
    weights_sha256: str | None = None
    max_false_pairs: float | None = None  # unrelated pairs that may be compared; None: three a picture
    hash_decode: str = "fast"
    max_pixels: int = images.MAX_PIXELS
    max_frames: int = images.MAX_FRAMES
    flips: str = "keep"
    rotations: str = "keep"
    layout: sources.Layout = field(default_factory=sources.Layout)  # how SRC is read


def deduplicate(src: Path, out: Path, options: Options, *, jobs: int = 0) -> dict:
    """Deduplicate SRC into OUT and return the content of `run.json`.

    jobs: worker processes, 0 = one per processor. Raises SourceError, OutputError, OptionsError or OSError.
    """
    out = out.resolve()
    src, layout = sources.fetch(src, options.layout)
    if out == src or src in out.parents:
        raise OptionsError(f"{out} lies inside the source {src}: choose another folder with -o")
    if options.level == "copy":
        copies.check_encoder(options.encoder, options.weights, options.weights_sha256)
    shards = sources.list_shards(src, layout)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out), engine.Workers(jobs) as workers:
        seconds: dict[str, float] = {}
        decode = fingerprint.DecodeOptions(options.max_pixels, options.max_frames, options.hash_decode)
        with engine.timed(seconds, "fingerprint"):
            work = _prepare(out, src, shards, options)
            rows, sizes = _fingerprint(shards, work / "signatures", decode, workers)
        if rows.is_empty():
            raise sources.SourceError(f"{src}: its shards hold no samples")
        rows = rows.with_columns(rank=policy.keeper_rank(rows))
        with engine.timed(seconds, "search"):
            candidates = find_candidates(rows, options, workers.jobs)
        reader = Reader(src, work, decode, workers)
        with engine.timed(seconds, "verify"):
            rows, pairs = judge.accept_pairs(rows, candidates, reader, flat=options.level != "exact")
        weights = options.weights, options.weights_sha256
        search_copies = copies.CopySearch(rows, reader, out, options.encoder, weights, options.max_false_pairs)
        copy_search = search_copies if options.level == "copy" else None
        with engine.timed(seconds, "decide"):
            keep = {"flips": options.flips, "rotations": options.rotations}
            pairs, decisions, held = judge.settle(rows, pairs, reader, search=copy_search, **keep)
            table = decide(rows.with_columns(effective_pixels=held), pairs, decisions)
            # a look-alike of the hash level may be a copy to the copy level, turned or cropped: that one counts
            pairs = pairs.sort("a", "b", pl.col("class") != "copy", maintain_order=True).unique(
                ["a", "b"], keep="first", maintain_order=True
            )
        with engine.timed(seconds, "write"):
            counts = count(table, pairs) | {"rows_at_limit": count_at_limit(candidates)}
            if copy_search is not None:
                counts["copy_search"] = copy_search.describe(pairs)
            run = write_outputs(out, src, shards, sizes, table, pairs, options, counts)
        seconds |= search_copies.seconds  # parts of "decide"
        manifest.write_json(out / "timings.json", {k: round(v, 3) for k, v in seconds.items()})
    return run


def resolve_auto(level: str, encoder: str, out: Path) -> tuple[str, str]:
    """What `auto` means: level and encoder of the run that OUT holds, else the best there is.

    The encoder `local` finds more than SSCD's student and needs no weights (docs/benchmarks.md).
    """
    recorded = out / ".work" / "options.json"
    before = manifest.read_json(recorded)["options"] if recorded.exists() else {}
    return (
        before.get("level", "copy") if level == "auto" else level,
        before.get("encoder", Options().encoder) if encoder == "auto" else encoder,
    )


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """One run per OUT. The lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{out} is in use by another run: wait for it or choose another -o") from error
        yield


def _prepare(out: Path, src: Path, shards: list[sources.Shard], options: Options) -> Path:
    """The work folder, with signatures of shards that have changed since the last run removed."""
    path = out / ".work" / "options.json"
    chosen = record_options(options)
    recorded = {"src": str(src), "options": chosen, "versions": _versions()}
    if path.exists():
        before = manifest.read_json(path)
        before["options"] = record_options(Options()) | before["options"]  # an older run knew fewer
        changed = [k for k in chosen if before["options"][k] != chosen[k]]
        differing = [k for k in changed if k not in POLICIES]
        if before["src"] != str(src):
            raise OptionsError(f"{out} holds a run over {before['src']}: choose another -o or delete it")
        if differing:
            what = ", ".join(f"{k} was {before['options'][k]!r}" for k in differing)
            raise OptionsError(f"{out} was made with other options ({what}): choose another -o or delete it")
        if changed:
            (out / "run.json").unlink(missing_ok=True)  # it is of other policies until it is decided anew
        if before["versions"] != recorded["versions"]:
            for folder in ("thumbnails", "features-*", "embeddings-*"):
                for stale in (out / ".work").glob(folder):
                    shutil.rmtree(stale)
    work = out / ".work"
    manifest.write_json(path, recorded)
    stamps_path = out / ".work" / "shards.json"
    before_stamps = manifest.read_json(stamps_path) if stamps_path.exists() else []
    stamps = [f"{shard.fingerprint} {recorded['versions']}" for shard in shards]  # other libraries hash otherwise
    for index, stamp in enumerate(stamps):
        if index >= len(before_stamps) or before_stamps[index] != stamp:
            (work / "signatures" / f"{index:05d}.parquet").unlink(missing_ok=True)
    if stamps != before_stamps:
        (out / "run.json").unlink(missing_ok=True)  # what stands there is of another source now
    manifest.write_json(stamps_path, stamps)
    return work


def record_options(options: Options) -> dict[str, Any]:
    """As run.json and the command line have them: those of the layout beside the others."""
    chosen = asdict(options)
    return chosen | chosen.pop("layout")


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _fingerprint(
    shards: list[sources.Shard], work: Path, decode: fingerprint.DecodeOptions, workers: engine.Workers
) -> tuple[pl.DataFrame, list[int]]:
    """Signatures of all shards, rows in input order with their ids; how many rows each shard has."""
    tasks = [(shard, index, work, decode) for index, shard in enumerate(shards)]
    with tqdm(desc="fingerprint", unit=" images", file=sys.stderr, disable=None) as bar:
        for rows, unreadable in workers.run(fingerprint.fingerprint_shard, tasks):
            bar.update(rows)
            if unreadable:
                bar.set_postfix_str(f"{unreadable} unreadable in the last shard")
    frames = [pl.read_parquet(work / f"{index:05d}.parquet") for index in range(len(shards))]
    table = pl.concat(frames).with_row_index("id").with_columns(pl.col("id").cast(pl.Int64))
    return table, [len(frame) for frame in frames]


def find_candidates(rows: pl.DataFrame, options: Options, jobs: int) -> pl.DataFrame:
    """Pairs of ids i, j (i before j in keeper order): signal "bytes" or "pdq", orientation number (j → i), hamming.

    Only the first of the rows with equal bytes is searched for; the others pair with it and share its fate.
    """
    ordered = rows.filter(pl.col("status") == "ok").sort("rank")
    first = ordered.group_by("sha256", maintain_order=True).agg(i=pl.col("id").first())
    equal = ordered.join(first, on="sha256").filter(pl.col("id") != pl.col("i")).select("i", j="id")
    upright = {"orientation": pl.lit(0, pl.Int32), "hamming": pl.lit(None, pl.Int32)}
    equal_bytes = equal.with_columns(**upright, signal=pl.lit("bytes"))
    if options.level == "exact":
        return equal_bytes
    distinct = ordered.join(first, left_on="id", right_on="i", how="semi", maintain_order="left")
    textured = distinct.filter(pl.col("pdq_quality") >= verify.MIN_QUALITY)
    codes = np.frombuffer(b"".join(textured["pdq_d4"]), np.uint8).reshape(-1, 8, 32)
    found = search.join_hamming(codes, jobs=jobs)
    ids = textured["id"]
    near = found.with_columns(
        ids.gather(found["i"]).alias("i"), ids.gather(found["j"]).alias("j"), signal=pl.lit("pdq")
    )
    return pl.concat([equal_bytes, near])


def decide(rows: pl.DataFrame, pairs: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """Rows, pairs and decisions → the finished manifest."""
    evidence = _evidence(pairs, decisions)
    table = pl.concat([rows, decisions, evidence], how="horizontal").with_columns(
        keep=pl.col("keep") & (pl.col("status") == "ok"),
        component_id=pl.Series(clustering.components(pairs, len(rows))),
        cluster_size=pl.len().over("cluster_id"),
        reason=pl.when(pl.col("kept_id").is_not_null()).then(pl.col("signal").replace("pdq", "hash")),
    )
    stands = table.group_by("kept_id").agg(dropped=pl.len()).drop_nulls("kept_id")
    table = table.join(stands, left_on="id", right_on="kept_id", how="left", maintain_order="left").with_columns(
        represents=pl.when("keep").then(1 + pl.col("dropped").fill_null(0)).otherwise(0),
        weight=pl.col("keep").cast(pl.Float64),
    )
    return manifest.conform(table.with_columns(captions=policy.merge_captions(table)))


def _evidence(pairs: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """class, signal, score, orientation of the deciding pair of each row, else of its strongest one."""
    columns = ["class", "signal", "score", "orientation"]
    numbered = pairs.with_row_index("pair").with_columns(pl.col("pair").cast(pl.Int64))
    ends = pl.concat([numbered.rename({end: "id"}).select("id", "pair", *columns) for end in ("a", "b")])
    strongest = ends.sort(pl.col("class") != "copy", -pl.col("score"), "pair").unique(
        "id", keep="first", maintain_order=True
    )
    ids = decisions.select(id=pl.int_range(pl.len(), dtype=pl.Int64), pair=pl.col("pair").cast(pl.Int64))
    best = ids.join(strongest.select("id", best="pair"), on="id", how="left", maintain_order="left")
    chosen = best.select("id", pair=pl.coalesce("pair", "best"))
    return chosen.join(numbered.select("pair", *columns), on="pair", how="left", maintain_order="left").select(columns)


def write_outputs(
    out: Path,
    src: Path,
    shards: list[sources.Shard],
    sizes: list[int],
    table: pl.DataFrame,
    pairs: pl.DataFrame,
    options: Options,
    counts: dict[str, Any],
) -> dict:
    """Every file of the contract but the report; `run.json` last, because its existence means finished."""
    manifest.write(out, table)
    manifest.write_parquet(out / "pairs.parquet", pairs)
    kept = table.filter("keep")
    ready = kept.select("id", "source", "shard", "offset", "size", "key", "caption", "captions", "represents", "weight")
    manifest.write_parquet(out / "deduplicated.parquet", ready)
    manifest.write_atomic(out / "deduplicated.jsonl", ready.write_ndjson)
    place = pl.when(pl.col("shard").is_null()).then("key").otherwise(pl.concat_str("shard", pl.lit(":"), "key"))
    manifest.write_text(out / "kept.txt", "".join(f"{line}\n" for line in kept.select(place).to_series()))
    names = table.select(id="id", kept=place)
    dropped = table.filter(pl.col("kept_id").is_not_null()).join(
        names, left_on="kept_id", right_on="id", maintain_order="left"
    )
    listing = dropped.select(place.alias("dropped"), "kept", "reason", "signal", "score", "orientation")
    manifest.write_atomic(out / "dropped.csv", listing.write_csv)
    if (src / "plant.parquet").exists():
        shutil.copyfile(src / "plant.parquet", out / "plant.parquet")
    run: dict[str, Any] = {"src": str(src), "options": record_options(options), "versions": _versions()}
    layouts = [asdict(layout) for layout in dict.fromkeys(shard.layout for shard in shards)]
    run |= {"layouts": layouts, "source": [shard.fingerprint for shard in shards], "shard_rows": sizes}
    run |= {"counts": counts}
    manifest.write_json(out / "run.json", run)
    return run


def count(table: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, Any]:
    """What happened to the rows, in numbers."""
    dropped = table.filter(pl.col("kept_id").is_not_null())
    unreadable = table.filter(pl.col("status") != "ok")
    return {
        "rows": len(table),
        "kept": int(table["keep"].sum()),
        "dropped": len(dropped),
        "unreadable": len(unreadable),
        "status": dict(sorted(table["status"].value_counts().iter_rows())),
        "reasons": dict(sorted(dropped["reason"].value_counts().iter_rows())),
        "pairs": dict(sorted(pairs["class"].value_counts().iter_rows())),
        "bytes": int(table["size"].sum()),
        "bytes_dropped": int(dropped["size"].sum()),
        "without_caption": int(table.filter(~policy.has_caption())["id"].len()),
        "captions": policy.count_captions(table),
    }


def count_at_limit(candidates: pl.DataFrame) -> int:
    """Rows that had as many partners as the search keeps, and may have had more."""
    partners = candidates.filter(pl.col("signal") == "pdq").group_by("j").len()["len"]
    return int((partners >= search.LIMIT).sum())
