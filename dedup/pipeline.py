"""The whole deduplication in order: SRC → OUT. Reads top to bottom; every step is a function of its own file.

OUT is described in docs/architecture.md. The same command on a finished or interrupted OUT fingerprints only
shards that are new or have changed, and decides again, by other policies if they are given; an OUT that was made with
other options is refused. With a base, a finished run over older rows, only what that run has not seen is fingerprinted.
What matches pictures from elsewhere that must not be in it (`against`) goes last, when all else is decided.
"""

import fcntl
import functools
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import (
    against,
    clustering,
    copies,
    engine,
    fingerprint,
    images,
    judge,
    manifest,
    marks,
    policy,
    scopes,
    search,
    sources,
    subjects,
    twins,
    verify,
)
from dedup import base as bases
from dedup.reader import Reader
from dedup.verdicts import Verdicts

# Options that another run on OUT may choose anew: nothing is hashed again.
POLICIES = ("flips", "rotations", "prefer", "per", "against_split", "max_copies", "max_loss", "base", "against")
LIBRARIES = ("unmemorize", "pillow", "imagehash", "numpy", "polars", "opencv-python-headless", "simplejpeg")
DECODERS = ("pydicom", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "python-gdcm")


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
    prefer: str = ""  # criteria of `policy.parse_preferences` that come before the usual keeper order
    per: str = "auto"  # one of `scopes.PER`: rows of different ones do not delete each other
    against_split: str | None = None  # rows of other splits that match it are dropped, and none of its own
    max_copies: int = 1  # rows of a star that are kept
    max_loss: float = 0.5  # share of its rows that a scope may lose before it is said
    layout: sources.Layout = field(default_factory=sources.Layout)  # how SRC is read
    base: str | None = None  # absolute: a finished run over older rows; what it kept stays kept
    against: tuple[str, ...] = ()  # sources or finished runs; what is a copy of a picture there goes, with its star


def deduplicate(
    src: Path,
    out: Path,
    options: Options,
    *,
    jobs: int = 0,
    subject_key: Path | None = None,
    understood: bool = False,
    transfer: sources.Transfer | None = None,
    decisions: Path | None = None,
) -> dict:
    """Deduplicate SRC into OUT and return the content of `run.json`.

    jobs: worker processes, 0 = one per processor. subject_key: a file; None = OUT has one of its own. understood:
    medical pictures may be read. transfer: how SRC comes here; a list of addresses by default into OUT/download.
    decisions: a file of marks (`marks.read_marks`), which OUT remembers with earlier ones.
    Raises SourceError, OutputError, OptionsError, SubjectError, MarksError or OSError.
    """
    given = marks.read_marks(decisions)["decisions"] if decisions else []
    out = out.resolve()
    origin = sources.tell_origin(src)
    transfer = transfer or sources.Transfer()
    src, layout = sources.fetch(src, options.layout, replace(transfer, download=transfer.download or out / "download"))
    if out == src or src in out.parents:
        raise OptionsError(f"{out} lies inside the source {src}: choose another folder with -o")
    prefer = policy.parse_preferences(options.prefer)
    if options.level == "copy":
        copies.check_encoder(options.encoder, options.weights, options.weights_sha256)
    shards = sources.list_shards(src, layout)
    if layout.subject_column and not understood:
        raise subjects.refuse(src, "pictures of persons (--subject-column)")
    options = replace(options, per=scopes.resolve_per(options.per, shards))
    base = _open_base(out, options)
    others = _open_others(src, out, options)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out), engine.Workers(jobs) as workers:
        seconds: dict[str, float] = {}
        with engine.timed(seconds, "fingerprint"):
            key = subjects.choose_key(out / ".work", subject_key, None if base is None else base.out / ".work")
            decode = fingerprint.DecodeOptions(options.max_pixels, options.max_frames, options.hash_decode, key)
            work = _prepare(out, src, shards, options, key)
            known = None if base is None else bases.take_over(base, shards, _stamp(shards, key), work / "signatures")
            rows, sizes = _fingerprint(src, shards, work / "signatures", decode, known, workers, understood)
        if rows.is_empty():
            raise sources.SourceError(f"{src}: its shards hold no samples")
        rows = rows.with_columns(published=pl.lit(False) if base is None else bases.find_published(base, rows))
        # what is searched does not depend on policies, so that others cost little
        rows = rows.with_columns(rank=policy.keeper_rank(rows), scope=pl.lit(""), guarded=pl.lit(False))
        chosen = apply_policies(rows, prefer, options)
        is_usual = not prefer and chosen.equals(rows)
        remembered = marks.remember(out, given, None if base is None else base.out)
        said, of_marks = marks.resolve(remembered, rows)
        with engine.timed(seconds, "search"):
            candidates = find_candidates(rows, options, workers.jobs)
            more = [] if is_usual else [find_in_crowds(chosen, candidates, workers.jobs)]
        reader = Reader(src, work, decode, workers, Verdicts(work / "verdicts", bases.list_verdicts(base)))
        with engine.timed(seconds, "verify"):
            near = pl.concat([candidates, *more])
            rows, pairs = judge.accept_pairs(rows, near, reader, flat=options.level != "exact")
        chosen = rows.with_columns(chosen.select("rank", "scope", "guarded"))
        weights = options.weights, options.weights_sha256
        search_copies = copies.CopySearch(chosen, reader, out, options.encoder, weights, options.max_false_pairs)
        search_copies.known = {} if base is None else bases.find_features(base)
        copy_search = search_copies if options.level == "copy" else None
        with engine.timed(seconds, "decide"):
            keep = {"flips": options.flips, "rotations": options.rotations}
            if copy_search is not None and not (is_usual and set(keep.values()) == {"keep"}):
                marked = marks.overrule(pairs, said, rows)
                usual = judge.settle(rows, marked, reader, told=said.clear(), flips="keep", rotations="keep")
                copy_search.stars = usual[1]["cluster_id"]
            if not is_usual:
                equal, unequal = twins.pair_equal(chosen, chosen["rank"]), pairs.filter(pl.col("signal") != "bytes")
                pairs = pl.concat([equal, twins.stand_in(unequal, chosen, chosen["rank"])]).sort("a", "b")
            pairs, decided, held, rank = judge.settle(
                chosen, pairs, reader, told=said, prefer=prefer, search=copy_search, **keep
            )
            pairs, decided = judge.share_fate(chosen, pairs, decided, rank)
            decided = clustering.keep_more(decided, rank, options.max_copies, chosen["guarded"])
            table = decide(chosen.with_columns(effective_pixels=held), pairs, decided)
            # a look-alike of the hash level may be a copy to the copy level, turned or cropped: that one counts
            pairs = pairs.sort("a", "b", pl.col("class") != "copy", maintain_order=True).unique(
                ["a", "b"], keep="first", maintain_order=True
            )
        if others:
            with engine.timed(seconds, "against"):
                searched = {} if copy_search is None or copy_search.near is None else copy_search.describe(pairs)
                rows_in = against.Dataset(table, reader, out, record_options(options), searched, _stamp(shards, key))
                found, told = against.find(others, rows_in)
                table = against.drop(table, found, search_copies.stars)
        with engine.timed(seconds, "write"):
            counts = count(table, pairs) | {"rows_at_limit": count_at_limit(candidates)}
            parts = chosen["scope"] if options.per != "none" else table["source"]
            leaks = scopes.list_leaks(table, chosen["scope"])
            counts["losses"] = scopes.list_losses(table, parts, options.max_loss)
            counts["leakage"] = scopes.count_leaks(leaks)
            if remembered:
                counts["decisions"] = of_marks
            if copy_search is not None:
                counts["copy_search"] = copy_search.describe(pairs)
            about: dict[str, Any] = {} if base is None else {"base": bases.describe(base, rows)}
            if others:
                about["against"] = [other.describe() for other in others]
                counts |= {"against": told, "external": against.count_dropped(table, found, rows["published"])}
            against.write(out, found if others else None)
            if table["subject"].count():
                counts["subjects"] = subjects.count(table, pairs)
            run = write_outputs(out, src, origin, shards, sizes, table, pairs, leaks, options, counts, about)
        reader.verdicts.forget()
        search_copies.forget()
        seconds |= search_copies.seconds  # parts of "decide"
        manifest.write_json(out / "timings.json", {k: round(v, 3) for k, v in seconds.items()})
    return run


def resolve_auto(level: str, encoder: str, out: Path, base: Path | None = None) -> tuple[str, str]:
    """What `auto` means: level and encoder of the run that OUT holds, or else the base, else the best there is.

    The encoder `local` finds more than SSCD's student and needs no weights (docs/benchmarks.md).
    """
    recorded = [out / ".work" / "options.json", *([base / "run.json"] if base else [])]
    before: dict[str, Any] = next((manifest.read_json(path)["options"] for path in recorded if path.exists()), {})
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


def _prepare(out: Path, src: Path, shards: list[sources.Shard], options: Options, key: Path) -> Path:
    """The work folder, with signatures of shards that have changed since the last run removed."""
    path = out / ".work" / "options.json"
    chosen = record_options(options)
    recorded = {"src": str(src), "options": chosen, "versions": list_versions()}
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
        if changed or options.base or options.against:
            (out / "run.json").unlink(missing_ok=True)  # it is of other policies until it is decided anew
        if before["versions"] != recorded["versions"]:
            for folder in ("thumbnails", "features-*", "embeddings-*", "verdicts"):
                for stale in (out / ".work").glob(folder):
                    shutil.rmtree(stale)
    work = out / ".work"
    manifest.write_json(path, recorded)
    stamps_path = out / ".work" / "shards.json"
    before_stamps = manifest.read_json(stamps_path) if stamps_path.exists() else []
    stamps = _stamp(shards, key)
    for index, stamp in enumerate(stamps):
        if index >= len(before_stamps) or before_stamps[index] != stamp:
            (work / "signatures" / f"{index:05d}.parquet").unlink(missing_ok=True)
    if stamps != before_stamps:
        (out / "run.json").unlink(missing_ok=True)  # what stands there is of another source now
    manifest.write_json(stamps_path, stamps)
    return work


def _stamp(shards: list[sources.Shard], key: Path) -> list[str]:
    """What the signatures of each shard depend on, but for the options: other libraries and keys hash otherwise."""
    return [f"{shard.fingerprint} {list_versions()} {subjects.check_key(key)}" for shard in shards]


def _open_base(out: Path, options: Options) -> bases.Base | None:
    if options.base is None:
        return None
    if Path(options.base) == out:
        raise OptionsError(f"{out} cannot be its own base: choose another -o")
    return bases.load(Path(options.base), record_options(options), record_options(Options()), list_versions())


def _open_others(src: Path, out: Path, options: Options) -> list[against.Other]:
    if options.against and options.level == "copy" and options.encoder == "external":
        raise OptionsError(
            "--against cannot be used with --embeddings, because other pictures have none: give an --encoder instead"
        )
    return [against.open_other(name, src, out) for name in dict.fromkeys(options.against)]


def record_options(options: Options) -> dict[str, Any]:
    """As run.json and the command line have them: those of the layout beside the others."""
    chosen = asdict(options) | {"against": list(options.against)}
    return chosen | chosen.pop("layout")


@functools.cache
def list_versions() -> dict[str, str]:
    """Of all that decides about pixels, as far as it is installed."""
    found = {name: version(name) for name in LIBRARIES}
    for name in DECODERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _fingerprint(
    src: Path,
    shards: list[sources.Shard],
    work: Path,
    decode: fingerprint.DecodeOptions,
    known: Path | None,
    workers: engine.Workers,
    understood: bool,
) -> tuple[pl.DataFrame, list[int]]:
    """Signatures of all shards, rows in input order with their ids; how many rows each shard has.

    Raises SubjectError after the first shard with medical pictures, unless that is understood.
    """
    tasks = [(shard, index, work, decode, known) for index, shard in enumerate(shards)]
    with tqdm(desc="fingerprint", unit=" images", file=sys.stderr, disable=None) as bar:
        for index, (rows, unreadable) in enumerate(workers.run(fingerprint.fingerprint_shard, tasks)):
            if not understood and is_medical(pl.read_parquet(work / f"{index:05d}.parquet", columns=["format"])):
                raise subjects.refuse(src, "medical pictures (DICOM)")
            bar.update(rows)
            if unreadable:
                bar.set_postfix_str(f"{unreadable} unreadable in the last shard")
    frames = [pl.read_parquet(work / f"{index:05d}.parquet") for index in range(len(shards))]
    table = pl.concat(frames, how="diagonal").with_row_index("id").with_columns(pl.col("id").cast(pl.Int64))
    return table, [len(frame) for frame in frames]


def is_medical(rows: pl.DataFrame) -> bool:
    return bool((rows["format"] == images.DICOM).any())


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
    return pl.concat([equal_bytes, _find_near(distinct.filter(pl.col("pdq_quality") >= verify.MIN_QUALITY), jobs)])


def _find_near(ordered: pl.DataFrame, jobs: int) -> pl.DataFrame:
    """Pairs of rows (id, pdq_d4) in keeper order, by their hash."""
    codes = np.frombuffer(b"".join(ordered["pdq_d4"]), np.uint8).reshape(-1, 8, 32)
    found, ids = search.join_hamming(codes, jobs=jobs), ordered["id"]
    return found.with_columns(
        ids.gather(found["i"]).alias("i"), ids.gather(found["j"]).alias("j"), signal=pl.lit("pdq")
    )


def find_in_crowds(rows: pl.DataFrame, candidates: pl.DataFrame, jobs: int) -> pl.DataFrame:
    """More candidates, if `rows` come in another order, or by scope, than when these were found.

    A row that has as many partners as the search keeps has the first ones in keeper order. So crowds are searched
    again: in the order of now, as a whole and in each scope.
    """
    near = candidates.filter(pl.col("signal") == "pdq")
    joined = pl.Series(clustering.components(near.select(a="i", b="j"), len(rows)))
    crowds = joined.gather(_list_at_limit(candidates)).unique()
    ids = pl.concat([near["i"], near["j"]]).unique().sort()
    crowd = rows[ids.filter(joined.gather(ids).is_in(crowds.implode())).to_list()]
    stands = rows.filter(pl.col("status") == "ok").group_by("sha256", "scope").agg(pl.col("rank").min())
    stands = crowd.select("id", "sha256", "pdq_d4").join(stands, on="sha256").sort("rank")
    whole = stands.unique("id", keep="first", maintain_order=True)
    groups = [whole, *(part for _, part in stands.group_by("scope", maintain_order=True))] if len(crowd) else []
    found = pl.concat([near.clear(), *(_find_near(part, jobs) for part in groups)])
    low, high = pl.min_horizontal("i", "j"), pl.max_horizontal("i", "j")
    known = near.select(low=low, high=high)
    more = found.with_columns(low=low, high=high).unique(["low", "high"], keep="first", maintain_order=True)
    return more.join(known, on=["low", "high"], how="anti", maintain_order="left").drop("low", "high")


def apply_policies(rows: pl.DataFrame, prefer: Sequence[str], options: Options) -> pl.DataFrame:
    """Rows with `rank`, `scope` and `guarded` as the options have them. Raises PolicyError for unknown names."""
    policy.check_names(rows, prefer, options.against_split)
    rows = rows.with_columns(scopes.name_scopes(rows, options.per, options.against_split).get_columns())
    return rows.with_columns(rank=policy.keeper_rank(rows, prefer=prefer))


def decide(rows: pl.DataFrame, pairs: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """Rows, pairs and decisions → the finished manifest."""
    evidence = _evidence(pairs, decisions)
    joined = pl.concat([pairs.select("a", "b"), subjects.link_rows(rows["subject"])])
    outside = rows["guarded"].gather(decisions["kept_id"]).fill_null(False)  # dropped for a split that is not theirs
    table = pl.concat([rows, decisions, evidence], how="horizontal").with_columns(
        keep=pl.col("keep") & (pl.col("status") == "ok"),
        component_id=pl.Series(clustering.components(joined, len(rows))),
        cluster_size=pl.len().over("cluster_id"),
        reason=pl.when(outside)
        .then(pl.lit("policy"))
        .when(pl.col("kept_id").is_not_null())
        .then(pl.col("signal").replace("pdq", "hash")),
    )
    stands = table.group_by("kept_id").agg(dropped=pl.len()).drop_nulls("kept_id")
    table = table.join(stands, left_on="id", right_on="kept_id", how="left", maintain_order="left").with_columns(
        represents=pl.when("keep").then(1 + pl.col("dropped").fill_null(0)).otherwise(0),
        weight=pl.col("keep").cast(pl.Float64),
    )
    own = table.with_columns(kept_id=pl.when(~outside).then("kept_id"))
    return manifest.conform(table.with_columns(captions=policy.merge_captions(own)))


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
    origin: str,
    shards: list[sources.Shard],
    sizes: list[int],
    table: pl.DataFrame,
    pairs: pl.DataFrame,
    leaks: pl.DataFrame,
    options: Options,
    counts: dict[str, Any],
    about: dict[str, Any],
) -> dict:
    """Every file of the contract but the report; `run.json` last, because its existence means finished.

    about: what else `run.json` tells.
    """
    manifest.write(out, table)
    manifest.write_parquet(out / "pairs.parquet", pairs)
    kept = table.filter("keep")
    ready = kept.select("id", "source", "shard", "offset", "size", "key", "caption", "captions", "represents", "weight")
    manifest.write_parquet(out / "deduplicated.parquet", ready)
    manifest.write_atomic(out / "deduplicated.jsonl", ready.write_ndjson)
    place = pl.when(pl.col("shard").is_null()).then("key").otherwise(pl.concat_str("shard", pl.lit(":"), "key"))
    evidence = table.select("id", "signal", "score", "orientation", row=place)
    leaking = leaks.rename({"cluster_id": "picture"}).join(evidence, on="id", maintain_order="left").drop("id")
    if leaking.is_empty():
        (out / "leakage.csv").unlink(missing_ok=True)
    else:
        manifest.write_atomic(out / "leakage.csv", leaking.write_csv)
    manifest.write_text(out / "kept.txt", "".join(f"{line}\n" for line in kept.select(place).to_series()))
    names = table.select(id="id", kept=place)
    gone = table.filter((pl.col("status") == "ok") & ~pl.col("keep"))
    dropped = gone.join(names, left_on="kept_id", right_on="id", how="left", maintain_order="left")
    listing = dropped.select(place.alias("dropped"), "kept", "reason", "signal", "score", "orientation")
    manifest.write_atomic(out / "dropped.csv", listing.write_csv)
    if (src / "plant.parquet").exists():
        shutil.copyfile(src / "plant.parquet", out / "plant.parquet")
    run: dict[str, Any] = {"src": str(src), "origin": origin}
    run |= {"options": record_options(options), "versions": list_versions()}
    layouts = [asdict(layout) for layout in dict.fromkeys(shard.layout for shard in shards)]
    run |= {"layouts": layouts, "source": [shard.fingerprint for shard in shards], "shard_rows": sizes}
    medical = options.layout.subject_column is not None or is_medical(table)
    run |= about | {"medical": medical, "counts": counts}
    manifest.write_json(out / "run.json", run)
    return run


def count(table: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, Any]:
    """What happened to the rows, in numbers."""
    dropped = table.filter((pl.col("status") == "ok") & ~pl.col("keep"))
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
    return len(_list_at_limit(candidates))


def _list_at_limit(candidates: pl.DataFrame) -> pl.Series:
    partners = candidates.filter(pl.col("signal") == "pdq").group_by("j").len()
    return partners.filter(pl.col("len") >= search.LIMIT)["j"]
