"""The whole deduplication in order: SRC → OUT. Reads top to bottom; every step is a function of its own file.

OUT is described in docs/architecture.md. The same command on a finished or interrupted OUT fingerprints only
shards that are new or have changed, and decides again; an OUT that was made with other options is refused.
"""

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import clustering, engine, fingerprint, hamming, hashing, images, manifest, policy, search, sources, verify
from dedup.manifest import ORIENTATIONS

LIBRARIES = ("unmemorize", "pillow", "imagehash", "numpy", "polars", "opencv-python-headless")


class OutputError(OSError):
    """OUT cannot be used now: another run is in it."""


class OptionsError(ValueError):
    """OUT must not be used: it lies inside SRC, or holds a run with other options."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the result; recorded in run.json. Two runs with equal options on one source give equal bytes."""

    level: str = "hash"  # "exact": equal bytes only; "hash": PDQ candidates, verified
    hash_decode: str = "fast"
    max_pixels: int = images.MAX_PIXELS
    max_frames: int = images.MAX_FRAMES
    flips: str = "keep"
    rotations: str = "keep"


def deduplicate(src: Path, out: Path, options: Options, *, jobs: int = 0) -> dict:
    """Deduplicate SRC into OUT and return the content of `run.json`.

    jobs: worker processes, 0 = one per processor. Raises SourceError, OutputError, OptionsError or OSError.
    """
    src, out = src.resolve(), out.resolve()
    if out == src or src in out.parents:
        raise OptionsError(f"{out} lies inside the source {src}: choose another folder with -o")
    shards = sources.list_shards(src)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        seconds: dict[str, float] = {}
        with _timed(seconds, "fingerprint"):
            work = _prepare(out, src, shards, options)
            rows = _fingerprint(shards, work, options, jobs or engine.available_cpus())
        rows = rows.with_columns(rank=policy.keeper_rank(rows))
        with _timed(seconds, "search"):
            candidates = find_candidates(rows, options, jobs or engine.available_cpus())
        with _timed(seconds, "verify"):
            rows, pairs = accept_pairs(rows, candidates, Thumbnails(work, len(shards)), src, options)
        with _timed(seconds, "decide"):
            table = decide(rows, pairs, options)
        with _timed(seconds, "write"):
            run = write_outputs(out, src, shards, table, pairs, options)
        manifest.write_json(out / "timings.json", {k: round(v, 3) for k, v in seconds.items()})
    return run


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """One run per OUT. The lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{out} is in use by another run: wait for it or choose another -o") from error
        yield


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _prepare(out: Path, src: Path, shards: list[sources.Shard], options: Options) -> Path:
    """The work folder, with signatures of shards that have changed since the last run removed."""
    path = out / ".work" / "options.json"
    chosen = asdict(options)
    recorded = {"src": str(src), "options": chosen, "versions": _versions()}
    if path.exists():
        before = manifest.read_json(path)
        differing = [k for k in chosen if before["options"].get(k) != chosen[k]]
        if before["src"] != str(src):
            raise OptionsError(f"{out} holds a run over {before['src']}: choose another -o or delete it")
        if differing:
            what = ", ".join(f"{k} was {before['options'].get(k)!r}" for k in differing)
            raise OptionsError(f"{out} was made with other options ({what}): choose another -o or delete it")
    work = out / ".work" / "signatures"
    manifest.write_json(path, recorded)
    stamps_path = out / ".work" / "shards.json"
    before_stamps = manifest.read_json(stamps_path) if stamps_path.exists() else []
    stamps = [f"{shard.fingerprint} {recorded['versions']}" for shard in shards]  # other libraries hash otherwise
    for index, stamp in enumerate(stamps):
        if index >= len(before_stamps) or before_stamps[index] != stamp:
            (work / f"{index:05d}.parquet").unlink(missing_ok=True)
    if stamps != before_stamps:
        (out / "run.json").unlink(missing_ok=True)  # what stands there is of another source now
    manifest.write_json(stamps_path, stamps)
    return work


def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _fingerprint(shards: list[sources.Shard], work: Path, options: Options, jobs: int) -> pl.DataFrame:
    """Signatures of all shards, rows in input order with their ids."""
    decode = fingerprint.DecodeOptions(options.max_pixels, options.max_frames, options.hash_decode)
    tasks = [(shard, index, work, decode) for index, shard in enumerate(shards)]
    jobs = min(jobs, len(shards))  # a small source is not worth the start of a process
    with tqdm(desc="fingerprint", unit=" images", file=sys.stderr, disable=None) as bar:
        for rows, unreadable in engine.run(fingerprint.fingerprint_shard, tasks, jobs=jobs):
            bar.update(rows)
            if unreadable:
                bar.set_postfix_str(f"{unreadable} unreadable in the last shard")
    frame = pl.concat([pl.read_parquet(work / f"{index:05d}.parquet") for index in range(len(shards))])
    return frame.with_row_index("id").with_columns(pl.col("id").cast(pl.Int64))


class Thumbnails:
    """uint8 (rows, 32, 32, 3) over all shards, read from disk where they are indexed."""

    def __init__(self, work: Path, shards: int) -> None:
        self.parts = [np.load(work / f"{index:05d}.npy", mmap_mode="r") for index in range(shards)]
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        side = fingerprint.THUMBNAIL
        taken = np.empty((len(rows), side, side, 3), np.uint8)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for index in np.unique(shard):
            chosen = shard == index
            taken[chosen] = self.parts[index][rows[chosen] - self.starts[index]]
        return taken


def find_candidates(rows: pl.DataFrame, options: Options, jobs: int) -> pl.DataFrame:
    """Pairs of ids i, j (i before j in keeper order): signal "bytes" or "pdq", orientation number (j → i), hamming.

    Only the first of the rows with equal bytes is searched for; the others pair with it and inherit its earlier
    partners, so that each of them can still be dropped to whatever survives.
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
    inherited = near.join(equal.rename({"i": "j", "j": "other"}), on="j").drop("j").rename({"other": "j"})
    return pl.concat([equal_bytes, near, inherited.select(near.columns)])


def accept_pairs(
    rows: pl.DataFrame, candidates: pl.DataFrame, thumbnails: "Thumbnails", src: Path, options: Options
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Verify the candidates. Returns the rows with `pixel_digest` filled where it was needed, and the pairs table."""
    hashed = verify.verify_pairs(candidates.filter(pl.col("signal") != "bytes"), thumbnails)
    certain = {
        "class": pl.lit("copy"),
        "score": pl.lit(1.0),
        "residual": pl.lit(0.0),
        "worst_tile": pl.lit(0.0),
    }
    equal_bytes = candidates.filter(pl.col("signal") == "bytes").with_columns(**certain)
    identical = hashed.filter((pl.col("hamming") == 0) & (pl.col("residual") == 0) & (pl.col("orientation") == 0))
    wanted = pl.concat([identical["i"], identical["j"], _flat_rows(rows)]).unique().sort()
    digests = _pixel_digests(rows[wanted.to_list()], src, options)
    rows = rows.join(digests, on="id", how="left", maintain_order="left")
    of_pixels = rows["pixel_digest"]
    hashed = hashed.with_columns(
        signal=pl.when(of_pixels.gather(hashed["i"]) == of_pixels.gather(hashed["j"]))
        .then(pl.lit("pixels"))
        .otherwise("signal")
    )
    flat = _flat_pairs(rows).with_columns(**certain)
    pairs = pl.concat([equal_bytes, hashed, flat], how="diagonal_relaxed").unique(
        ["i", "j"], keep="first", maintain_order=True
    )
    return rows, _by_id(pairs)


def _flat_rows(rows: pl.DataFrame) -> pl.Series:
    """Pictures without texture have no perceptual hash worth the name. Those of equal size and hash may be equal."""
    flat = rows.filter((pl.col("status") == "ok") & (pl.col("pdq_quality") < verify.MIN_QUALITY))
    alike = ["width", "height", "phash", "dhash", "pdq"]
    return flat.filter(pl.len().over(alike) > 1)["id"]


def _flat_pairs(rows: pl.DataFrame) -> pl.DataFrame:
    """Flat pictures with equal pixels: each pairs with the first of them in keeper order."""
    flat = rows.filter((pl.col("pdq_quality") < verify.MIN_QUALITY) & pl.col("pixel_digest").is_not_null()).sort("rank")
    first = flat.group_by("pixel_digest", maintain_order=True).agg(i=pl.col("id").first())
    pairs = flat.join(first, on="pixel_digest").filter(pl.col("id") != pl.col("i")).select("i", j="id")
    return pairs.with_columns(orientation=pl.lit(0, pl.Int32), hamming=pl.lit(0, pl.Int32), signal=pl.lit("pixels"))


def _pixel_digests(rows: pl.DataFrame, src: Path, options: Options) -> pl.DataFrame:
    """id, pixel_digest of the given rows: this needs every pixel, so it is done for candidates only."""
    digests = []
    for row in rows.iter_rows(named=True):
        data = sources.read_image(src, row["shard"], row["offset"], row["size"], row["key"])
        if hashing.digest(data) != row["sha256"]:
            raise sources.SourceError(f"{src}: {row['key']} has changed while it was read; run again")
        decoded = images.decode(data, montage=True, max_pixels=options.max_pixels, max_frames=options.max_frames)
        digests.append(hashing.pixel_digest(decoded.pixels))
    return pl.DataFrame({"id": rows["id"], "pixel_digest": pl.Series(digests, dtype=pl.String)})


def _by_id(pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs in keeper order (i, j; orientation turns j into i) → PAIRS_SCHEMA: a < b, orientation turns a into b."""
    names = pl.Series(ORIENTATIONS)
    forward = names.gather(pl.Series(hamming.INVERSE).gather(pairs["orientation"]))
    backward = names.gather(pairs["orientation"])
    table = pairs.with_columns(
        a=pl.min_horizontal("i", "j"),
        b=pl.max_horizontal("i", "j"),
        orientation=pl.when(pl.col("i") < pl.col("j")).then(forward).otherwise(backward),
    )
    return table.select(pl.col(c).cast(t) for c, t in manifest.PAIRS_SCHEMA.items()).sort("a", "b")


def decide(rows: pl.DataFrame, pairs: pl.DataFrame, options: Options) -> pl.DataFrame:
    """Rows and pairs → the finished manifest."""
    decisions = clustering.decide(pairs, rows["rank"], flips=options.flips, rotations=options.rotations)
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
    table: pl.DataFrame,
    pairs: pl.DataFrame,
    options: Options,
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
    run = {"src": str(src), "options": asdict(options), "versions": _versions()}
    run |= {"source": [shard.fingerprint for shard in shards], "counts": count(table, pairs)}
    manifest.write_json(out / "run.json", run)
    return run


def count(table: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, int | dict[str, int]]:
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
    }
