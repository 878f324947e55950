"""`unmemorize export OUT DEST`: what the manifest keeps, as a dataset; and filters for those who copy nothing.

    kept = dedup.export.keep("photos-dedup")          # OUT, or the DEST of an export as index
    webdataset.WebDataset(shards).select(kept)        # by the sample's key and shard
    dataset.select(kept.indices("train"))             # datasets: rows by number, of one source or of all
    torch.utils.data.Subset(dataset, kept.indices())  # anything whose rows are in the manifest's order

In: OUT and the SRC it was made of, unchanged. Out: DEST, with `.export.json` to say what it is: written before all
other files, and completed when they are. The same command goes on after an interruption. `exports` knows the formats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import polars as pl

from dedup import cluster, engine, manifest, sources
from dedup.exports import ExportError, convert, folders, more, parquets, saved, tables, tars, urls
from dedup.hashing import digest
from dedup.nodes import ClusterError
from dedup.sources import Shard

MARK = ".export.json"
SAME = {
    "folder": folders.same,
    "webdataset": tars.same,
    "table": tables.same,
    "parquet": parquets.same,
    "huggingface": saved.same,
}
COLUMNS = ["id", "source", "shard", "offset", "size", "key", "caption", "captions", "width", "height", "format"]
COLUMNS += ["status", "error", "sha256", "keep", "kept_id", "reason", "represents"]
INDEX = ["id", "source", "shard", "offset", "key", "keep", "kept_id", "represents"]


@dataclass(frozen=True, slots=True)
class Options:
    """What decides an export; recorded in DEST. Equal options on equal runs give equal bytes."""

    format: str = "same"  # or "webdataset", "parquet", "huggingface", "imagefolder", "urls", "index"
    rows: str = "kept"  # "weighted": all readable rows, each with its weight; "all": those, without
    alpha: float = 1.0  # weight = 1 / represents^alpha
    captions: str = "survivor"  # "longest", "list": of all rows that a kept row stands for


def export(
    out: Path, dest: Path, options: Options = Options(), *, jobs: int = 0, address: str | None = None
) -> dict[str, Any]:
    """Write DEST and return its counts. Raises ExportError, SourceError, ManifestError, ClusterError or OSError.

    jobs: worker processes, 0 = one per processor. address: of a Ray cluster, see `cluster.start`.
    """
    dest = dest.resolve()
    if not (math.isfinite(options.alpha) and options.alpha >= 0):
        raise ExportError(f"--alpha {options.alpha}: must be 0 or more")
    run = manifest.read_run(out)
    src = Path(run["src"])
    _check_place(out.resolve(), src, dest)
    if "shard_rows" not in run:
        raise ExportError(
            f"{out} was made by an older version: run `unmemorize dedup` again, which hashes nothing anew"
        )
    shards = sources.list_again(out, run)
    rows = choose_rows(manifest.read(out, COLUMNS), options)
    identity = {"run_sha256": digest((out / "run.json").read_bytes()), "options": asdict(options)}
    counts: dict[str, Any] = {"rows": len(rows), "exported": int(rows["take"].sum())}
    if not counts["exported"]:
        raise ExportError(f"{out} keeps no row: nothing can be exported")
    if dest.exists() and not dest.is_dir():
        raise ExportError(f"{dest} is no folder: choose another one")
    dest.mkdir(parents=True, exist_ok=True)
    with sources.hold(dest, str(dest)):
        if (done := _claim(dest, identity)) is not None:
            return done
        manifest.write_json(dest / MARK, identity)
        try:
            with cluster.start(jobs, address, dest, [sources.name_file(shards[0])]) as workers:
                return _write(src, shards, rows, run["shard_rows"], dest, identity, counts, workers)
        except (ExportError, ClusterError):
            if [path.name for path in dest.iterdir()] == [MARK]:  # nothing is in the way of another --format
                (dest / MARK).unlink()
            raise


def _write(
    src: Path,
    shards: list[Shard],
    rows: pl.DataFrame,
    sizes: list[int],
    dest: Path,
    identity: dict[str, Any],
    counts: dict[str, Any],
    workers: engine.Workers,
) -> dict[str, Any]:
    options = Options(**identity["options"])
    parts = [rows.slice(a, b) for a, b in zip(_starts(sizes), sizes, strict=False)]
    kinds = {shard.kind for shard in shards}
    if options.format == "index":
        _write_index(dest, rows, options)
    elif options.format == "urls":
        counts |= urls.write_urls(src, shards, parts, dest)
    elif options.format == "same" or (kinds == {options.format} and options.format != "folder"):
        counts["exported_beside"] = _count_beside(rows, shards, parts)
        for kind, tasks in _group(src, shards, parts, dest).items():
            list(workers.run(SAME[kind], tasks))
    else:
        counts |= _convert(src, shards, parts, dest, options.format, workers)
    manifest.write_json(dest / MARK, identity | {"counts": counts})
    return counts


def _check_place(out: Path, src: Path, dest: Path) -> None:
    root = sources.find_root(src)
    if dest == src or (not src.is_file() and (dest == root or root in dest.parents)):
        raise ExportError(f"{dest} lies inside the source {root}: choose another folder")
    if dest == out or out in dest.parents:
        raise ExportError(f"{dest} lies inside the results of the run: choose another folder")


def _claim(dest: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The counts of an export that is complete already. Raises ExportError for whatever else DEST holds."""
    if (dest / MARK).is_file():
        mark = manifest.read_json(dest / MARK)
        if {name: mark.get(name) for name in identity} != identity:
            raise ExportError(f"{dest} holds an export of another run or with other options: choose another folder")
        return mark.get("counts")
    if any(dest.iterdir()):
        raise ExportError(f"{dest} is not empty: choose another folder")
    return None


def choose_rows(rows: pl.DataFrame, options: Options) -> pl.DataFrame:
    """Manifest → what `exports` takes: `take`, `text`, and the changes that the options ask for."""
    outside = pl.col("reason").eq_missing("policy")  # gone for a split that is not its own, captions and all
    rows = rows.with_columns(owner_id=pl.when(~outside).then(pl.coalesce("kept_id", "id")), outside=outside)
    group = rows.select(owner_id="id", group_captions="captions")
    rows = rows.join(group, on="owner_id", how="left", maintain_order="left")
    said = pl.col("group_captions").fill_null(pl.lit([], pl.List(pl.String)))
    length = pl.element().str.len_chars()
    longest = said.list.eval(pl.element().sort_by(length, descending=True, maintain_order=True)).list.first()
    text = longest.fill_null(pl.col("caption")) if options.captions == "longest" else pl.col("caption")
    stands = pl.col("keep") | pl.col("kept_id").is_not_null() & ~pl.col("outside")  # nor do external rows, of no group
    take = {"kept": pl.col("keep"), "weighted": stands, "all": pl.col("status") == "ok"}[options.rows]
    chosen = rows.with_columns(take=take, text=text)
    changed: dict[str, pl.Expr] = {}
    if options.captions == "longest":
        changed["caption"] = pl.when(pl.col("text").ne_missing(pl.col("caption"))).then("text")
    if options.captions == "list":
        changed["captions"] = said
    if options.rows == "weighted":
        changed["weight"] = pl.len().over("owner_id").cast(pl.Float64) ** -options.alpha
    plain = chosen.drop("caption", "captions", "owner_id", "group_captions", "outside")
    return plain.hstack(chosen.select(**changed).get_columns()) if changed else plain


def _starts(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def _group(src: Path, shards: list[Shard], parts: list[pl.DataFrame], dest: Path) -> dict[str, list[tuple]]:
    """Arguments for each file of the source, by kind: all shards of it, and their rows."""
    tasks: dict[str, list[tuple]] = {}
    for (kind, _), group in groupby(zip(shards, parts, strict=True), lambda pair: _unit(pair[0])):
        some, frames = zip(*group, strict=True)
        tasks.setdefault(kind, []).append((src, list(some), pl.concat(frames), dest))
    return tasks


def _unit(shard: Shard) -> tuple[str, str | None]:
    """What is written as one: a tar or parquet file, or all there is of another kind."""
    return shard.kind, shard.name if shard.kind in ("webdataset", "parquet") else None


def _count_beside(rows: pl.DataFrame, shards: Sequence[Shard], parts: Sequence[pl.DataFrame]) -> int:
    """Images that go along because another image of their sample is kept."""
    tars_ = [part for shard, part in zip(shards, parts, strict=True) if shard.kind == "webdataset"]
    if not tars_:
        return 0
    samples = pl.concat(tars_).with_columns(sample=pl.struct("shard", "key").rle_id())
    beside = ~pl.col("take") & (pl.col("status") == "ok") & pl.col("take").any().over("sample")
    return int(samples.select(beside.sum()).item())


def _convert(
    src: Path, shards: list[Shard], parts: list[pl.DataFrame], dest: Path, name: str, workers: engine.Workers
) -> dict[str, Any]:
    """Returns the columns of the source that this format cannot hold, and members of samples that none holds."""
    named = convert.name_samples(pl.concat(parts))
    frames = [named.slice(a, len(part)) for a, part in zip(_starts(list(map(len, parts))), parts, strict=False)]
    full = [(shard, frame) for shard, frame in zip(shards, frames, strict=True) if frame["take"].any()]
    columns, left = more.find(src, [shard for shard, _ in full], plain=name in ("webdataset", "imagefolder"))
    tasks = [(src, shard, frame, dest, columns, number, len(full)) for number, (shard, frame) in enumerate(full)]
    list(workers.run(convert.WRITE[name], tasks))
    if name in convert.FINISH:
        convert.FINISH[name](src, named, dest, columns, len(full))
    members = convert.list_members_left(shard for shard, _ in full)
    return ({"columns_left": left} if left else {}) | ({"members_left": members} if members else {})


def _write_index(dest: Path, rows: pl.DataFrame, options: Options) -> None:
    asked = [name for name in ("captions", "weight") if name in rows.columns]
    index = rows.with_columns(keep="take").select(*INDEX, *asked, caption="text")
    keys = index.filter("keep").select(manifest.PLACE).to_series()
    manifest.write_text(dest / "keys.txt", "".join(f"{key}\n" for key in keys))
    manifest.write_parquet(dest / "index.parquet", index)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a run keeps, as filters for loaders of the source itself."""

    rows: pl.DataFrame  # INDEX, all rows in input order
    samples: frozenset[tuple[str, str]]  # name of the shard, key
    names: frozenset[str]  # of all shards: of the file, or the path where files in two folders have one name

    def __call__(self, sample: Mapping[str, Any]) -> bool:
        """Of a webdataset sample: by `__key__`, and by the shard in `__url__`. Raises ExportError for another shard."""
        url = str(sample["__url__"])
        name = url.rpartition("/")[2]
        if name not in self.names:
            name = next((name for name in self.names if url.endswith(f"/{name}")), "")
        if not name:
            raise ExportError(f"{url}: is none of the shards of this run")
        return (name, manifest.encode_name(str(sample["__key__"]).encode("utf-8", "surrogateescape"))) in self.samples

    def indices(self, source: str | None = None) -> list[int]:
        """Numbers of the kept rows, among those of one source (a split), or among all."""
        rows = self.rows if source is None else self.rows.filter(source=source)
        if rows.is_empty():
            raise ExportError(f"no source {source!r}; there are {', '.join(sorted(self.rows['source'].unique()))}")
        return rows["keep"].arg_true().to_list()

    def keys(self) -> frozenset[str]:
        """Keys of the kept rows: paths of a folder or table, ids of rows."""
        return frozenset(self.rows.filter("keep")["key"])


def keep(out: Path | str) -> Kept:
    """Filters for OUT, or for what `export --format index` wrote. Raises ManifestError."""
    index = Path(out) / "index.parquet"
    rows = pl.read_parquet(index) if index.is_file() else manifest.read(Path(out), INDEX)
    base = pl.col("shard").str.split("/").list.last()
    shards = rows.drop_nulls("shard")
    unique = shards.select(pl.col("shard").n_unique() == base.n_unique()).item()
    named = shards.with_columns(shard=base) if unique else shards
    samples = named.filter("keep").select("shard", "key").iter_rows()
    return Kept(rows, frozenset(samples), frozenset(named["shard"]))
