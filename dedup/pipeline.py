"""The whole deduplication in order: SRC → OUT. Reads top to bottom; every step is a function of its own file.

OUT is described in docs/architecture.md. The same command on a finished or interrupted OUT fingerprints only
shards that are new or have changed, and decides again, by other policies if they are given; an OUT that was made with
other options is refused. With a base, a finished run over older rows, only what that run has not seen is fingerprinted.
What matches pictures from elsewhere that must not be in it (`against`) goes last, when all else is decided.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from dedup import (
    against,
    cluster,
    clustering,
    copies,
    engine,
    fingerprint,
    judge,
    manifest,
    marks,
    memory,
    outputs,
    pairing,
    policy,
    scopes,
    sources,
    subjects,
    twins,
)
from dedup import base as bases
from dedup.options import Options, OptionsError, check, list_versions, lock, prepare, record_options, stamp
from dedup.reader import Reader
from dedup.signatures import Signatures
from dedup.verdicts import Verdicts


def deduplicate(
    src: Path,
    out: Path,
    options: Options,
    *,
    jobs: int = 0,
    address: str | None = None,
    subject_key: Path | None = None,
    understood: bool = False,
    transfer: sources.Transfer | None = None,
    decisions: Path | None = None,
    memory_budget: int | None = None,
) -> dict:
    """Deduplicate SRC into OUT and return the content of `run.json`.

    jobs: worker processes, 0 = one per processor. address: of a Ray cluster that does the work (`cluster.start`).
    subject_key: a file; None = OUT has one of its own. understood: medical pictures may be read. transfer: how SRC
    comes here; a list of addresses by default into OUT/download. decisions: a file of marks (`marks.read_marks`), which
    OUT remembers with earlier ones. memory_budget: bytes that searches may take beside the tables; None = a share of
    the machine's.
    Raises SourceError, OutputError, OptionsError, SubjectError, MarksError, ClusterError or OSError.
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
    inputs = _list_inputs(shards, base, others, subject_key)
    copied = [Path(options.weights)] if options.weights and Path(options.weights).exists() else []
    with lock(out), cluster.start(jobs, address, out, inputs, copied) as workers:
        seconds: dict[str, float] = {}
        with engine.timed(seconds, "fingerprint"):
            check(out, src, options)
            key = subjects.choose_key(out / ".work", subject_key, None if base is None else base.out / ".work")
            decode = fingerprint.DecodeOptions(options.max_pixels, options.max_frames, options.hash_decode, key)
            work = prepare(out, src, shards, options, key)
            known = None if base is None else bases.take_over(base, shards, stamp(shards, key), work / "signatures")
            signatures = _fingerprint(src, shards, work / "signatures", decode, known, workers, understood)
            rows = signatures.read()
        if rows.is_empty():
            raise sources.SourceError(f"{src}: its shards hold no samples")
        about: dict[str, Any] = {}
        rows = rows.with_columns(published=pl.lit(False))
        if base is not None:
            named = rows.hstack(signatures.take(rows["id"], ("key", "sha256")))
            rows = rows.with_columns(bases.find_published(base, named))
            about["base"] = bases.describe(base, named.with_columns(rows["published"]))
            del named
        # what is searched does not depend on policies, so that others cost little
        alone = {"scope": pl.lit("", pl.Categorical), "guarded": pl.lit(False)}
        rows = rows.with_columns(rank=policy.keeper_rank(rows), **alone)
        chosen = apply_policies(rows, prefer, options)
        is_usual = not prefer and chosen.equals(rows)
        remembered = marks.remember(out, given, None if base is None else base.out)
        named = rows.hstack(signatures.take(rows["id"], ("key", "sha256"))) if remembered else rows
        said, of_marks = marks.resolve(remembered, named)
        del named
        with engine.timed(seconds, "search"):
            search = pairing.Near(signatures, workers, memory_budget or memory.default_budget())
            candidates = pairing.find_candidates(rows, options.level, search)
            more = [] if is_usual else [pairing.find_in_crowds(chosen, candidates, search)]
        reader = Reader(src, work, decode, workers, Verdicts(work / "verdicts", bases.list_verdicts(base)), signatures)
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
            reader.verdicts.forget()  # nothing more is asked
            decided = clustering.keep_more(decided, rank, options.max_copies, chosen["guarded"])
            table = outputs.decide(chosen.with_columns(effective_pixels=held), pairs, decided, signatures)
            # a look-alike of the hash level may be a copy to the copy level, turned or cropped: that one counts
            pairs = pairs.sort("a", "b", pl.col("class") != "copy", maintain_order=True).unique(
                ["a", "b"], keep="first", maintain_order=True
            )
        if others:
            with engine.timed(seconds, "against"):
                searched = {} if copy_search is None or copy_search.near is None else copy_search.describe(pairs)
                # all that one looks up in is in memory
                hashed = manifest.conform(table.hstack(signatures.take(table["id"])))
                rows_in = against.Dataset(hashed, reader, out, record_options(options), searched, stamp(shards, key))
                found, told = against.find(others, rows_in)
                table = against.drop(table, found, search_copies.stars)
        with engine.timed(seconds, "write"):
            counts = outputs.count(table, pairs, signatures) | {"rows_at_limit": pairing.count_at_limit(candidates)}
            parts = chosen["scope"] if options.per != "none" else table["source"]
            leaks = scopes.list_leaks(table, chosen["scope"])
            counts["losses"] = scopes.list_losses(table, parts, options.max_loss)
            counts["leakage"] = scopes.count_leaks(leaks)
            if remembered:
                counts["decisions"] = of_marks
            if copy_search is not None:
                counts["copy_search"] = copy_search.describe(pairs)
            if others:
                about["against"] = [other.describe() for other in others]
                counts |= {"against": told, "external": against.count_dropped(table, found, rows["published"])}
            against.write(out, found if others else None)
            if table["person"].count():
                counts["subjects"] = subjects.count(table, pairs)
            run = outputs.write(out, src, origin, shards, signatures, table, pairs, leaks, options, counts, about)
        manifest.sweep(out / ".work")
        search_copies.forget()
        seconds |= search_copies.seconds  # parts of "decide"
        manifest.write_json(out / "timings.json", {k: round(v, 3) for k, v in seconds.items()})
    return run


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


def _list_inputs(
    shards: list[sources.Shard], base: bases.Base | None, others: list[against.Other], subject_key: Path | None
) -> list[Path]:
    """Files that tasks read, by which other machines can see that they have the same."""
    paths = [sources.name_file(some[0]) for some in (shards, *(other.shards for other in others))]
    paths += [base.out / "run.json"] if base else []
    return paths + ([subject_key] if subject_key else [])


def _fingerprint(
    src: Path,
    shards: list[sources.Shard],
    work: Path,
    decode: fingerprint.DecodeOptions,
    known: Path | None,
    workers: engine.Workers,
    understood: bool,
) -> Signatures:
    """Of all shards. Raises SubjectError after the first one with medical pictures, unless that is understood."""
    sizes = []
    tasks = [(shard, index, work, decode, known) for index, shard in enumerate(shards)]
    with tqdm(desc="fingerprint", unit=" images", file=sys.stderr, disable=None) as bar:
        for index, (rows, unreadable) in enumerate(workers.run(fingerprint.fingerprint_shard, tasks)):
            formats = pl.read_parquet(work / f"{index:05d}.parquet", columns=["format"])
            if not understood and outputs.is_medical(formats):
                raise subjects.refuse(src, "medical pictures (DICOM)")
            sizes.append(rows)
            bar.update(rows)
            if unreadable:
                bar.set_postfix_str(f"{unreadable} unreadable in the last shard")
    return Signatures(work, sizes)


def apply_policies(rows: pl.DataFrame, prefer: Sequence[str], options: Options) -> pl.DataFrame:
    """Rows with their usual rank → `rank`, `scope` and `guarded` as the options have them. Raises PolicyError."""
    policy.check_names(rows, prefer, options.against_split)
    rows = rows.with_columns(scopes.name_scopes(rows, options.per, options.against_split).get_columns())
    if not prefer and not rows["guarded"].any():
        return rows  # their rank is the usual one
    return rows.with_columns(rank=policy.keeper_rank(rows, prefer=prefer))
