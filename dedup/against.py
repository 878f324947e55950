"""Pictures that must not be in the dataset, a test set or an opt-out list → which rows are copies of them.

In: OTHER, a source of any format or a finished run, which is only read; the finished table of SRC. Out: table MATCHES
and counts; and the table without the stars that hold a copy. Pictures of OTHER are looked up among the rows as
`unmemorize match` looks pictures up: by bytes, pixels and hash at every level that has them, at level copy by local
features too. Every orientation counts: a mirrored test picture is that picture.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import engine, fingerprint, hamming, hashing, index, look, manifest, match, queries, search, sources, verify
from dedup.fingerprint import DecodeOptions
from dedup.manifest import ORIENTATIONS, Schema
from dedup.reader import ROWS, Reader

PART = 512  # pictures of OTHER that are looked up together
MORE = 4  # times as many rows are compared with a picture when half of those that were are copies of it
SIGNALS = ("bytes", "pixels", "pdq", "copy")  # the first of those that agree is named
MATCHES: Schema = {
    "id": pl.Int64,  # row of SRC: the manifest's
    "source": pl.String,
    "shard": pl.String,
    "key": pl.String,
    "against": pl.String,  # OTHER
    "other": pl.String,  # its picture: path relative to OTHER, or `shard:key`; the first of equal files
    "class": pl.String,
    "signal": pl.String,
    "score": pl.Float64,  # higher = more alike, 0 … 1
    "hamming": pl.Int32,
    "cosine": pl.Float64,
    "inliers": pl.Int32,
    "overlap": pl.Float64,
    "orientation": pl.String,  # what turns the picture of OTHER into the row
    "transform": pl.List(pl.Float64),  # as in `match.FOUND`: positions of OTHER's picture → of the row
    "other_source": pl.String,
    "other_shard": pl.String,
    "other_offset": pl.Int64,
    "other_size": pl.Int64,
    "other_key": pl.String,
    "other_sha256": pl.String,
    "other_width": pl.Int32,
    "other_height": pl.Int32,
}


class AgainstError(ValueError):
    """An OTHER that cannot be compared with: what, and how to mend it, in one line."""


@dataclass(frozen=True, slots=True)
class Other:
    """A source whose pictures must not be in SRC."""

    name: str  # as it was given
    src: Path
    shards: list[sources.Shard]

    def describe(self) -> dict[str, Any]:
        """For run.json."""
        return {"against": self.name, "src": str(self.src), "source": [shard.fingerprint for shard in self.shards]}


def open_other(name: str, src: Path, out: Path) -> Other:
    """OTHER, of a finished run all that it saw. Raises AgainstError, SourceError or ManifestError."""
    path = Path(name)
    run = manifest.read_run(path) if (path / "run.json").is_file() else {}
    found, layout = (Path(run["src"]), sources.Layout()) if run else sources.fetch(path, sources.Layout())
    if found == src:
        raise AgainstError(f"--against {name} is SRC itself, every row of which would go: give another set of pictures")
    if found == out or found in out.parents:
        raise AgainstError(
            f"{out} lies inside {found}, which --against leaves untouched: choose another folder with -o"
        )
    return Other(name, found, sources.list_again(path, run) if run else queries.list_shards(found, layout))


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """What pictures of OTHER are looked up in: a run that is decided and not yet written."""

    rows: pl.DataFrame  # the manifest
    reader: Reader
    out: Path
    options: dict[str, Any]  # as run.json has them
    searched: dict[str, Any]  # counts["copy_search"] of run.json; empty at other levels, and of a single picture
    stamps: list[str]  # of the shards


def find(others: list[Other], dataset: Dataset) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """MATCHES of all of them, and of each what was found, in numbers."""
    folder = dataset.reader.work / "against"
    works = [folder / hashing.digest(repr(_stamp(other, dataset)).encode())[:20] for other in others]
    for stale in set(folder.glob("*")) - set(works):
        shutil.rmtree(stale)
    tables, counts = [pl.DataFrame(schema=MATCHES)], []
    for other, work in zip(others, works, strict=True):
        pictures = _fingerprint(other, work, dataset)
        pictures, found = _find(other, pictures, work, dataset)
        tables.append(found)
        counts.append(count(other, pictures, found))
    return pl.concat(tables).sort("id", maintain_order=True), counts


def _stamp(other: Other, dataset: Dataset) -> list[Any]:
    """What decides the signatures of OTHER."""
    decode = dataset.reader.decode
    stamps = [shard.fingerprint for shard in other.shards]
    return [str(other.src), stamps, decode.max_pixels, decode.max_frames, decode.hash_decode]


def _fingerprint(other: Other, work: Path, dataset: Dataset) -> pl.DataFrame:
    """Signatures of OTHER in its order, and `number`, `other`, `prompt`."""
    tasks = [(shard, n, work / "signatures", dataset.reader.decode) for n, shard in enumerate(other.shards)]
    list(dataset.reader.workers.run(fingerprint.fingerprint_shard, tasks))
    frames = [pl.read_parquet(work / "signatures" / f"{n:05d}.parquet") for n in range(len(tasks))]
    if not any(map(len, frames)):
        raise AgainstError(f"--against {other.name} holds no pictures: give a set that does, or leave it out")
    return pl.concat(frames).select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("number"),
        pl.all(),
        other=manifest.PLACE,
        prompt=pl.lit(None, pl.String),
    )


def _find(other: Other, pictures: pl.DataFrame, work: Path, dataset: Dataset) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signatures → the same, with what turned out to be unreadable; MATCHES of each distinct picture."""
    rows = dataset.rows.filter(pl.col("status") == "ok")
    found = []
    if dataset.searched:
        pictures, edited = _look_up(other, pictures, work, dataset)
        found.append(edited)
    distinct = pictures.filter(pl.col("status") == "ok").unique("sha256", keep="first", maintain_order=True)
    once = rows.unique("sha256", keep="first", maintain_order=True)
    equal = once.join(distinct.select("sha256", "number"), on="sha256").select("number", "id")
    certain = {"class": pl.lit("copy"), "score": pl.lit(1.0), "orientation": pl.lit("r0")}
    found.append(equal.with_columns(**certain, signal=pl.lit("bytes")))
    if dataset.options["level"] != "exact":
        ours = index.Dataset(dataset.reader.src, dataset.reader.decode)
        same = queries.find_pixels(once, ours, other.src, distinct, dataset.reader.workers)
        found.append(same.rename({"query": "number"}).with_columns(**certain))
        found.append(_join_hashes(other, distinct, once, work, dataset))
    table = pl.concat(found, how="diagonal_relaxed")
    of_equal_bytes = rows.select("sha256", all="id")
    table = (
        table.join(dataset.rows.select("id", "sha256"), on="id")
        .join(of_equal_bytes, on="sha256")
        .drop("id")
        .rename({"all": "id"})
    )
    order = [pl.col("class").replace_strict(match.STRENGTH), pl.col("signal").cast(pl.Enum(SIGNALS)), -pl.col("score")]
    table = table.sort("id", "number", *order).unique(["id", "number"], keep="first", maintain_order=True)
    table = table.sort("id", *order, "number")
    of_row = dataset.rows.select("id", "source", "shard", "key")
    columns = ["source", "shard", "offset", "size", "key", "sha256", "width", "height"]
    of_other = pictures.select("number", "other", *(pl.col(name).alias(f"other_{name}") for name in columns))
    table = table.select("id", "number", *(set(table.columns) & set(MATCHES) - {"id", "source", "shard", "key"}))
    table = table.join(of_row, on="id", maintain_order="left").join(of_other, on="number", maintain_order="left")
    return pictures, manifest.conform(table.with_columns(against=pl.lit(other.name)), MATCHES)


# Equal and nearly equal pictures: by hash


def _join_hashes(
    other: Other, pictures: pl.DataFrame, rows: pl.DataFrame, work: Path, dataset: Dataset
) -> pl.DataFrame:
    """number, id and evidence of pairs whose hashes are near; all that pass the first look are looked at closely."""
    textured = pl.col("pdq_quality") >= verify.MIN_QUALITY
    pictures, rows = pictures.filter(textured), rows.filter(textured)
    codes = np.frombuffer(b"".join([*pictures["pdq_d4"], *rows["pdq_d4"]]), np.uint8).reshape(-1, 8, 32)
    near = search.join_hamming(codes, jobs=dataset.reader.workers.jobs)  # pictures of OTHER are the first partners
    n = len(pictures)
    near = near.filter((pl.col("i") < n) & (pl.col("j") >= n)).with_columns(pl.col("j") - n)
    thumbnails = []
    for end, table, src in (("i", pictures, other.src), ("j", rows, dataset.reader.src)):
        wanted = near[end].unique().sort()
        reader = replace(dataset.reader, src=src, work=work)
        shown = table[wanted.to_list()]
        paths = reader.write_parts(f"thumbnails-{end}", shown, look.make_thumbnails)
        thumbnails.append(look.Thumbnails(np.arange(len(shown)), paths, ROWS)[np.arange(len(shown))])
        near = near.with_columns(wanted.search_sorted(near[end]).cast(pl.Int64).alias(f"{end}_shown"))
    shown_of_other = len(thumbnails[0])
    pairs = near.select("orientation", "hamming", i="i_shown", j=pl.col("j_shown") + shown_of_other)
    judged = verify.verify_pairs(pairs, np.concatenate(thumbnails)).drop("i", "j")
    judged = judged.hstack(near.select("i", "j"))
    location = [table.select(look.LOCATION).rows() for table in (pictures, rows)]
    claimed = judged.with_row_index("pair").filter(pl.col("class") == "copy")
    items = [
        (location[0][i], location[1][j], turn) for i, j, turn in claimed.select("i", "j", "orientation").iter_rows()
    ]
    holds = queries.run_in_parts(
        dataset.reader.workers, confirm, dataset.reader.src, items, dataset.reader.decode, other.src
    )
    refuted = claimed.filter(~pl.Series(holds, dtype=pl.Boolean))["pair"]
    wrong = pl.int_range(pl.len()).is_in(refuted.implode())
    names = pl.Series(ORIENTATIONS)
    return judged.select(
        pl.when(wrong).then(pl.lit("look-alike")).otherwise("class").alias("class"),
        "score",
        "hamming",
        number=pictures["number"].gather(judged["i"]),
        id=rows["id"].gather(judged["j"]),
        signal=pl.lit("pdq"),
        orientation=names.gather(pl.Series(hamming.INVERSE).gather(judged["orientation"])),
    )


def confirm(src: Path, pairs: list[tuple], options: DecodeOptions, of_other: Path) -> list[bool]:
    """(location of a picture of OTHER, of a row, number of what turns the row into it) → whether they hold up close."""
    return [
        verify.is_same_picture(
            look.read_again(of_other, picture, options, min_side=look.CLOSE_SIDE),
            look.read_again(src, row, options, min_side=look.CLOSE_SIDE),
            orientation,
        )
        for picture, row, orientation in pairs
    ]


# Edited pictures: as `unmemorize match` finds them


def _look_up(other: Other, pictures: pl.DataFrame, work: Path, dataset: Dataset) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Signatures → the same, with what turned out to be unreadable; and matches of level copy: number, id, evidence."""
    distinct = pictures.filter(pl.col("status") == "ok").unique("sha256", keep="first", maintain_order=True)
    of_run = index.build(dataset.out, dataset.reader.src, dataset.options, dataset.searched, dataset.rows)
    chosen = {name: value for name, value in dataset.options.items() if name != "against"}
    decisive = repr([chosen, dataset.stamps, of_run.parts, of_run.encoder])
    folder = work / f"matches-{hashing.digest(decisive.encode())[:20]}"
    for stale in set(work.glob("matches-*")) - {folder}:
        shutil.rmtree(stale)
    found, told = [], []
    for number, part in enumerate(distinct.iter_slices(PART)):
        paths = [folder / f"{name}-{number:05d}.parquet" for name in ("matches", "status")]
        if not all(path.exists() for path in paths):
            status, matches = _look_up_part(other, part, of_run, dataset.reader.workers)
            manifest.write_parquet(paths[0], matches)
            manifest.write_parquet(paths[1], status)
        found.append(pl.read_parquet(paths[0]))
        told.append(pl.read_parquet(paths[1]))
    if not found:
        return pictures, pl.DataFrame(schema={"number": pl.Int64, "id": pl.Int64})
    status = pl.concat(told)
    return pictures.update(status, on="sha256", include_nulls=False), pl.concat(found)


def _look_up_part(
    other: Other, part: pl.DataFrame, of_run: index.Index, workers: engine.Workers
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """sha256, status, error of each picture, and matches of all; one that stands often is looked up further."""
    from dedup.neighbours import K

    asked, status, found, most = part, None, [], K
    while status is None or len(asked):
        told, matches = queries.match_part(of_run, other.src, asked, match.MAX_FALSE, workers, most)
        status = told if status is None else status
        matches = matches.filter(pl.col("class").is_not_null())
        matches = matches.with_columns(number=asked["number"].gather(matches["query"]))
        found.append(matches)
        copies = matches.filter((pl.col("class") == "copy") & (pl.col("signal") == "copy")).group_by("number").len()
        full = copies.filter((pl.col("len") >= most / 2) & (most < len(of_run.ids)))["number"]
        asked, most = asked.filter(pl.col("number").is_in(full.implode())), min(most * MORE, len(of_run.ids))
    evidence = ["class", "signal", "score", "cosine", "inliers", "overlap", "orientation", "transform"]
    table = (
        pl.concat(found).select("number", "id", *evidence).unique(["number", "id"], keep="last", maintain_order=True)
    )
    return status.select("sha256", "status", "error"), table


def count(other: Other, pictures: pl.DataFrame, found: pl.DataFrame) -> dict[str, Any]:
    """Pictures of OTHER by their best match, in all and by source (the split); rows that are copies, by source."""
    best = found.select("class", sha256="other_sha256").sort(pl.col("class").replace_strict(match.STRENGTH))
    best = best.unique("sha256", keep="first", maintain_order=True)
    named = pictures.join(best, on="sha256", how="left", maintain_order="left")
    by_source = named.group_by("source", maintain_order=True).agg(
        pictures=pl.len().cast(pl.Int64),
        unreadable=(pl.col("status") != "ok").sum().cast(pl.Int64),
        copies=(pl.col("class") == "copy").sum().cast(pl.Int64),
        same_scene=(pl.col("class") == "same-scene").sum().cast(pl.Int64),
        look_alike=(pl.col("class") == "look-alike").sum().cast(pl.Int64),
    )
    names = ["pictures", "unreadable", "copies", "same_scene", "look_alike"]
    rows = found.filter(pl.col("class") == "copy").unique("id").group_by("source").len().sort("source")
    return {
        "against": other.name,
        **{name: int(by_source[name].sum()) for name in names},
        "splits": {source: dict(zip(names, numbers, strict=True)) for source, *numbers in by_source.iter_rows()},
        "rows": dict(rows.iter_rows()),
    }


# What becomes of the rows


def drop(table: pl.DataFrame, found: pl.DataFrame, searched: pl.Series | None = None) -> pl.DataFrame:
    """The manifest without the stars that hold a copy: all their rows are dropped, `external`, and stand for nothing.

    A row that matches itself carries that evidence, the others what ties them to their star. searched: the star of each
    row when pictures were searched, if policies have made others since: of those stars one row was looked up for all.
    """
    best = found.filter(pl.col("class") == "copy").unique("id", keep="first", maintain_order=True)
    ids = best["id"]
    if searched is not None:
        ids = pl.concat([ids, searched.is_in(searched.gather(ids).implode()).arg_true().cast(pl.Int64)])
    stars = table["cluster_id"].gather(ids).unique()
    gone = pl.col("cluster_id").is_in(stars.implode()) & (pl.col("status") == "ok")
    evidence = ["class", "signal", "score", "orientation"]
    table = table.update(best.select("id", *evidence), on="id")
    return table.with_columns(
        keep=pl.col("keep") & ~gone,
        kept_id=pl.when(~gone).then("kept_id"),
        reason=pl.when(gone).then(pl.lit("external")).otherwise("reason"),
        captions=pl.when(~gone).then("captions"),
        represents=pl.when(gone).then(0).otherwise("represents").cast(pl.Int64),
        weight=pl.when(gone).then(0.0).otherwise("weight"),
    )


def write(out: Path, found: pl.DataFrame | None) -> None:
    """`against.parquet` and `.csv`; None: neither, because nothing was compared."""
    if found is None:
        for name in ("against.parquet", "against.csv"):
            (out / name).unlink(missing_ok=True)
        return
    manifest.write_parquet(out / "against.parquet", found)
    transform = pl.col("transform").list.eval(pl.element().cast(pl.String)).list.join(" ")
    manifest.write_atomic(out / "against.csv", found.with_columns(transform).write_csv)


def count_dropped(table: pl.DataFrame, found: pl.DataFrame, published: pl.Series) -> dict[str, Any]:
    """Rows that went, in all and by source; of them those that match a picture themselves, or were published before."""
    gone = table.with_columns(published=published).filter(pl.col("reason") == "external")
    matched = found.filter(pl.col("class") == "copy")["id"].n_unique()
    by_source = dict(gone.group_by("source").len().sort("source").iter_rows())
    return {"rows": len(gone), "matched": matched, "sources": by_source, "published": int(gone["published"].sum())}
