"""Every source × every export, read by the libraries that people read them with: bytes, keys, captions, order."""

import csv
import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from PIL import Image
from typer.testing import CliRunner

from dedup import exports, manifest, sources
from dedup.export import MARK, Options, export, keep
from dedup.exports import ExportError
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, Transfer
from eval.cli import app


def picture(seed: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


# Two equal pictures, a third of them with the longest caption; a broken one; one without a caption.
SEEDS = [0, 1, 0, None, 2, 0]
CAPTIONS = ["a cat, ö", "a dog", "a", "broken", None, 'a cat, "sleeping"\non a mat']
DATA = [b"no image" if seed is None else picture(seed) for seed in SEEDS]
URLS = [f"http://example.org/{number}.png" for number in range(6)]
KEPT = [0, 1, 4]
READABLE = [0, 1, 2, 4, 5]
LONGEST = {0: CAPTIONS[5], 1: "a dog", 4: None}
LISTS = {0: [CAPTIONS[0], CAPTIONS[2], CAPTIONS[5]], 1: ["a dog"], 4: []}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


# --- sources -------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> tuple[Path, Layout]:
    """X.txt and X.json beside X.png."""
    for number, (data, caption) in enumerate(zip(DATA, CAPTIONS, strict=True)):
        path = folder / "src" / "sub" / f"p{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".json").write_text(json.dumps({"url": URLS[number], "stars": number}))
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    (folder / "src" / "LICENSE.txt").write_text("of all")
    return folder / "src", Layout()


def make_imagefolder(folder: Path) -> tuple[Path, Layout]:
    """metadata.csv, as `datasets` has it."""
    (folder / "src").mkdir()
    for number, data in enumerate(DATA):
        (folder / "src" / f"p{number}.png").write_bytes(data)
    with (folder / "src" / "metadata.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file_name", "text", "stars"])
        writer.writerows([f"p{n}.png", caption or "", n] for n, caption in enumerate(CAPTIONS))
    return folder / "src", Layout()


def pack(numbers: list[int], *, json_too: bool = True) -> bytes:
    """A shard by webdataset's own writer."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, mtime=1_700_000_000.5) as writer:
        for number in numbers:
            sample: dict[str, Any] = {"__key__": f"k/{number:04d}", "png": DATA[number], "seg.npy": bytes(7)}
            sample |= {"txt": CAPTIONS[number]} if CAPTIONS[number] is not None else {}
            sample |= {"json": {"url": URLS[number], "key": f"{number:04d}"}} if json_too else {}
            writer.write(sample)
    return buffer.getvalue()


def make_tars(folder: Path) -> tuple[Path, Layout]:
    (folder / "src").mkdir()
    (folder / "src" / "00000.tar").write_bytes(pack([0, 1, 2]))
    (folder / "src" / "00001.tar").write_bytes(pack([3, 4, 5]))
    return folder / "src", Layout()


def make_gzipped(folder: Path) -> tuple[Path, Layout]:
    (folder / "src").mkdir()
    (folder / "src" / "00000.tar.gz").write_bytes(gzip.compress(pack([0, 1, 2, 3, 4, 5])))
    return folder / "src" / "00000.tar.gz", Layout()


def make_downloaded(folder: Path) -> tuple[Path, Layout]:
    """A shard of img2dataset with its list, in which one download has failed."""
    (folder / "src").mkdir()
    (folder / "src" / "00000.tar").write_bytes(pack([0, 1, 2, 3, 4, 5]))
    keys = [f"k/{number:04d}" for number in range(6)]
    rows = {"url": [*URLS, "http://example.org/gone"], "key": [*keys, "k/0006"], "caption": [*CAPTIONS, "gone"]}
    rows |= {"status": ["success"] * 6 + ["failed_to_download"], "error_message": [None] * 6 + ["404"]}
    pl.DataFrame(rows).write_parquet(folder / "src" / "00000.parquet")
    return folder / "src", Layout()


def write_images(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    names = [f"p{number}.png" for number in range(6)]
    for name, data in zip(names, DATA, strict=True):
        (folder / "images" / name).write_bytes(data)
    return names


def make_table(folder: Path, suffix: str) -> tuple[Path, Layout]:
    names = write_images(folder)
    frame = {"sku": [f"s{n}" for n in range(6)], "path": names, "title": CAPTIONS, "stars": list(range(6))}
    table = pl.DataFrame(frame | {"url": URLS})
    path = folder / f"shop.{suffix}"
    writers: dict[str, Callable[[], object]] = {
        "csv": lambda: table.write_csv(path, line_terminator="\r\n"),
        "tsv": lambda: table.write_csv(path, separator="\t"),
        "jsonl": lambda: table.write_ndjson(path),
        "parquet": lambda: table.write_parquet(path),
    }
    writers[suffix]()
    return path, Layout(root=str(folder / "images"), id_column="sku")


def make_parquet(folder: Path) -> tuple[Path, Layout]:
    """Two files of `datasets`, in row groups of two."""
    (folder / "src").mkdir()
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "stars": datasets.Value("int8")}
    features = datasets.Features(kinds | {"url": datasets.Value("string")})
    for name, numbers in (("train-00000", [0, 1, 2]), ("train-00001", [3, 4, 5])):
        cells = [{"bytes": DATA[n], "path": f"{n}.png"} for n in numbers]
        rows = {"image": cells, "text": [CAPTIONS[n] for n in numbers], "stars": numbers}
        whole = datasets.Dataset.from_dict(rows | {"url": [URLS[n] for n in numbers]}, features=features)
        whole.to_parquet(folder / "src" / f"{name}.parquet", batch_size=2)
    return folder / "src", Layout()


def make_dataset(numbers: list[int]) -> datasets.Dataset:
    cells = [{"bytes": DATA[n], "path": None} for n in numbers]
    rows = {"image": cells, "text": [CAPTIONS[n] for n in numbers], "stars": numbers, "url": [URLS[n] for n in numbers]}
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "stars": datasets.Value("int8")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds | {"url": datasets.Value("string")}))


def make_saved(folder: Path) -> tuple[Path, Layout]:
    make_dataset([0, 1, 2, 3, 4, 5]).save_to_disk(folder / "src", num_shards=2)
    return folder / "src", Layout()


def make_splits(folder: Path) -> tuple[Path, Layout]:
    splits = {"train": make_dataset([0, 1, 2, 3]), "test": make_dataset([4, 5])}
    datasets.DatasetDict(splits).save_to_disk(folder / "src")
    return folder / "src", Layout()


def make_remote(folder: Path) -> tuple[Path, Layout]:
    system = fsspec.filesystem("memory")
    for name, numbers in (("00000", [0, 1, 2]), ("00001", [3, 4, 5])):
        system.pipe(f"/{folder.name}/{name}.tar", pack(numbers))
    return Path(f"memory://{folder.name}/{{00000..00001}}.tar"), Layout()


class Proxy(BaseHTTPRequestHandler):
    """Answers for whatever server is meant."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        data = DATA[URLS.index(self.path)]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def make_addresses(folder: Path) -> tuple[Path, Layout]:
    """Downloaded already: all that follows needs no server."""
    pl.DataFrame({"url": URLS, "caption": CAPTIONS}).write_parquet(folder / "shop.parquet")
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        patch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        sources.fetch(folder / "shop.parquet", Layout(), elsewhere(folder))
        server.shutdown()
    return folder / "shop.parquet", Layout()


def elsewhere(folder: Path) -> Transfer:
    return Transfer(folder / "download", folder / "cache")


SOURCES: dict[str, Callable[[Path], tuple[Path, Layout]]] = {
    "folder": make_folder,
    "imagefolder": make_imagefolder,
    "tars": make_tars,
    "gzipped tar": make_gzipped,
    "img2dataset": make_downloaded,
    "tars elsewhere": make_remote,
    "addresses": make_addresses,
    "csv": lambda folder: make_table(folder, "csv"),
    "tsv": lambda folder: make_table(folder, "tsv"),
    "jsonl": lambda folder: make_table(folder, "jsonl"),
    "table in parquet": lambda folder: make_table(folder, "parquet"),
    "parquet": make_parquet,
    "datasets": make_saved,
    "datasets, splits": make_splits,
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "addresses")) for name in SOURCES]
)
def run_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    src, layout = SOURCES[request.param](folder)
    options = DedupOptions(per="none", layout=layout)
    deduplicate(src, folder / "out", options, jobs=1, transfer=elsewhere(folder))
    assert manifest.read(folder / "out").filter("keep")["id"].to_list() == KEPT
    return request.param, src, folder / "out"


@pytest.fixture
def made(run_once: tuple[str, Path, Path], tmp_path: Path) -> tuple[str, Path, Path]:
    """Name of the source, SRC, OUT: for tests that change neither. The images of a table are at hand."""
    _, src, _ = run_once
    (tmp_path / "images").symlink_to(src.parent / "images")
    return run_once


# --- readers of exports --------------------------------------------------------------------------------------------


def read_webdataset(dest: Path) -> Iterator[dict[str, Any]]:
    paths = sorted(str(path) for path in dest.rglob("*.tar*") if path.suffix != ".parquet")
    for sample in wds.WebDataset(paths, shardshuffle=False):
        caption = sample["txt"].decode() if "txt" in sample else None
        record = json.loads(sample["json"])
        listed = json.loads(sample.get("captions.json", b"null")) or record.get("captions", [])
        weight = json.loads(sample.get("weight.json", b"null")) or record.get("weight")
        yield {"data": sample.get("png") or sample["jpg"], "caption": caption, "captions": listed, "weight": weight}


def read_rows(whole: datasets.Dataset) -> Iterator[dict[str, Any]]:
    column = "text" if "text" in whole.column_names else "caption"
    assert isinstance(whole.features["image"], datasets.Image)
    for row in whole.cast_column("image", datasets.Image(decode=False)):
        yield {"data": row["image"]["bytes"], "caption": row[column], **{k: row.get(k) for k in ("captions", "weight")}}


def read_parquet(dest: Path) -> Iterator[dict[str, Any]]:
    paths = sorted(map(str, dest.glob("*.parquet")))
    yield from read_rows(datasets.load_dataset("parquet", data_files=paths, split="train"))


def read_saved(dest: Path) -> Iterator[dict[str, Any]]:
    whole = datasets.load_from_disk(dest)
    for part in whole.values() if isinstance(whole, datasets.DatasetDict) else [whole]:
        yield from read_rows(part)


def read_imagefolder(dest: Path) -> Iterator[dict[str, Any]]:
    """In the order of the metadata; `datasets` takes the order of the names."""
    whole = datasets.load_dataset("imagefolder", data_dir=str(dest), split="train")
    found = {}
    for row in whole.cast_column("image", datasets.Image(decode=False)):
        path = Path(row["image"]["path"])
        told = {name: row.get(name) for name in ("captions", "weight")}
        told["captions"] = json.loads(told["captions"]) if isinstance(told["captions"], str) else told["captions"]
        found[path] = {"data": path.read_bytes(), "caption": row["text"], **told}
    yield from (found[path] for path in sorted(found))


def read_folder(dest: Path) -> Iterator[dict[str, Any]]:
    """By the sources' own reader, and what lies beside."""
    for shard in sources.list_shards(dest):
        for record in sources.read_shard(shard):
            path = dest / record.key
            more = {}
            for name in ("captions", "weight"):
                beside = path.with_suffix(f".{name}.json")
                more[name] = json.loads(beside.read_text()) if beside.exists() else None
            yield {"data": record.data, "caption": record.caption, **more}


def read_table(dest: Path) -> Iterator[dict[str, Any]]:
    (path,) = dest.glob("shop.*")
    readers: dict[str, Callable[..., pl.DataFrame]] = {
        ".csv": pl.read_csv,
        ".tsv": lambda path: pl.read_csv(path, separator="\t"),
        ".jsonl": pl.read_ndjson,
        ".parquet": pl.read_parquet,
    }
    for row in readers[path.suffix](path).iter_rows(named=True):
        listed = row.get("captions")
        listed = json.loads(listed) if isinstance(listed, str) else listed
        data = (dest.parent / "images" / row["path"]).read_bytes()
        yield {"data": data, "caption": row["title"], "captions": listed, "weight": row.get("weight")}
        assert row["stars"] == int(row["sku"][1:])


READ_SAME = {
    "folder": read_folder,
    "imagefolder": read_imagefolder,
    "tars": read_webdataset,
    "gzipped tar": read_webdataset,
    "img2dataset": read_webdataset,
    "tars elsewhere": read_webdataset,
    "addresses": read_webdataset,
    "csv": read_table,
    "tsv": read_table,
    "jsonl": read_table,
    "table in parquet": read_table,
    "parquet": read_parquet,
    "datasets": read_saved,
    "datasets, splits": read_saved,
}
READ = {
    "webdataset": read_webdataset,
    "parquet": read_parquet,
    "huggingface": read_saved,
    "imagefolder": read_imagefolder,
}


def check(found: list[dict[str, Any]], numbers: list[int], captions: dict[int, str | None] | list[str | None]) -> None:
    assert [DATA.index(one["data"]) for one in found] == [SEEDS.index(SEEDS[n]) for n in numbers]
    assert [one["data"] for one in found] == [DATA[n] for n in numbers]
    assert [one["caption"] or None for one in found] == [captions[n] for n in numbers]


# --- the table of source × export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["same", *READ])
def test_bytes_captions_and_order(made: tuple[str, Path, Path], tmp_path: Path, format_: str) -> None:
    name, _, out = made
    counts = export(out, tmp_path / "dest", Options(format_), jobs=1)
    read = READ_SAME[name] if format_ == "same" else READ[format_]
    assert counts["exported"] == 3
    check(list(read(tmp_path / "dest")), KEPT, CAPTIONS)


@pytest.mark.parametrize("format_", ["same", *READ])
def test_policies(made: tuple[str, Path, Path], tmp_path: Path, format_: str) -> None:
    """All readable rows, each with its weight; the longest caption of each group; the list of all of them."""
    name, _, out = made
    read = READ_SAME[name] if format_ == "same" else READ[format_]
    export(out, tmp_path / "longest", Options(format_, "weighted", 0.5, "longest"), jobs=1)
    found = list(read(tmp_path / "longest"))
    group = {0: 0, 1: 1, 2: 0, 4: 4, 5: 0}
    check(found, READABLE, {number: LONGEST[group[number]] for number in READABLE})
    assert [one["weight"] for one in found] == pytest.approx([3**-0.5, 1, 3**-0.5, 1, 3**-0.5])
    export(out, tmp_path / "list", Options(format_, captions="list"), jobs=1)
    found = list(read(tmp_path / "list"))
    check(found, KEPT, CAPTIONS)
    assert [one["captions"] for one in found] == [LISTS[number] for number in KEPT]


@pytest.mark.parametrize("format_", ["same", *READ, "index"])
def test_equal_exports_have_equal_bytes_and_read_as_sources(
    made: tuple[str, Path, Path], tmp_path: Path, format_: str
) -> None:
    """Whatever the number of workers; `unmemorize dedup` finds nothing more to drop in what comes out."""
    name, _, out = made
    for dest, jobs in (("one", 1), ("two", 2 if name in ("tars", "parquet") and format_ == "same" else 1)):
        export(out, tmp_path / dest, Options(format_, captions="list"), jobs=jobs)
    files = {
        path.relative_to(tmp_path / "one"): path.read_bytes()
        for path in (tmp_path / "one").rglob("*")
        if path.is_file()
    }
    assert len(files) > 1
    assert files == {
        path.relative_to(tmp_path / "two"): path.read_bytes()
        for path in (tmp_path / "two").rglob("*")
        if path.is_file()
    }
    if format_ != "index":
        again = next((tmp_path / "one").glob("shop.*"), tmp_path / "one")
        layout = Layout(root=str(tmp_path / "images"), id_column="sku") if again != tmp_path / "one" else Layout()
        run = deduplicate(again, tmp_path / "again", DedupOptions(per="none", layout=layout), jobs=1)
        assert (run["counts"]["rows"], run["counts"]["dropped"]) == (3, 0)
        if format_ == "same":
            before = manifest.read(out).filter("keep")
            rows = manifest.read(tmp_path / "again")
            assert rows["sha256"].to_list() == before["sha256"].to_list()
            if name not in ("parquet", "datasets", "datasets, splits"):  # whose keys are numbers of rows
                assert rows["key"].to_list() == before["key"].to_list()


def test_addresses(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    """img2dataset's input; an `imagefolder` that names none is told so."""
    name, _, out = made
    if name == "imagefolder":
        with pytest.raises(ExportError, match="no row has an address"):
            export(out, tmp_path / "dest", Options("urls"))
        return
    counts = export(out, tmp_path / "dest", Options("urls"), jobs=1)
    assert counts["without_url"] == 0
    table = pq.read_table(tmp_path / "dest" / "urls.parquet")
    assert table.column("url").to_pylist() == [URLS[number] for number in KEPT]
    assert table.column("caption").to_pylist() == [CAPTIONS[number] for number in KEPT]


# --- the same format -----------------------------------------------------------------------------------------------


def dedup(folder: Path, make: str) -> tuple[Path, Path]:
    """SRC and OUT."""
    src, layout = SOURCES[make](folder)
    deduplicate(src, folder / "out", DedupOptions(per="none", layout=layout), jobs=1)
    return src, folder / "out"


def read_tar(path: Path) -> list[tuple[str, bytes, float]]:
    with tarfile.open(path) as archive:
        return [(info.name, archive.extractfile(info).read(), info.mtime) for info in archive]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_of_which_all_is_kept_is_the_same_file(tmp_path: Path, kind: int) -> None:
    """Long names, folders, global headers and all."""
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "x.tar"
    with tarfile.open(path, "w", format=kind, pax_headers={"comment": "of all"}) as archive:
        folder = tarfile.TarInfo("d" * 90)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, seed in enumerate([0, 1, 2]):
            for suffix, data in (("png", picture(seed)), ("txt", b"c"), ("cls", b"7")):
                info = tarfile.TarInfo(f"{'d' * 90}/{'k' * 60}{number}.{suffix}")
                info.size, info.mtime, info.uname = len(data), 1_600_000_000, "me"
                archive.addfile(info, io.BytesIO(data))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert (tmp_path / "dest" / "x.tar").read_bytes() == path.read_bytes()


def test_members_of_kept_samples_are_copied_as_they_are(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "tars")
    export(out, tmp_path / "dest", jobs=1)
    for name, gone in (("00000.tar", {"k/0002"}), ("00001.tar", {"k/0003", "k/0005"})):
        expected = [member for member in read_tar(src / name) if member[0].partition(".")[0] not in gone]
        assert read_tar(tmp_path / "dest" / name) == expected
        assert len(expected) in (8, 3)


def test_a_gzipped_shard_stays_one(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "gzipped tar")
    export(out, tmp_path / "dest", jobs=1)
    data = (tmp_path / "dest" / "00000.tar.gz").read_bytes()
    assert data[:2] == b"\x1f\x8b"
    assert data[4:8] == bytes(4)  # no time


def test_the_list_of_img2dataset_goes_along(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "img2dataset")
    export(out, tmp_path / "dest", jobs=1)
    before = pl.read_parquet(src / "00000.parquet")
    assert pl.read_parquet(tmp_path / "dest" / "00000.parquet").equals(before[KEPT])


def test_a_sample_with_several_images_stays_whole_while_one_is_kept(tmp_path: Path) -> None:
    """And says how many go along; hidden members belong to no sample."""
    members = {"._a.png": b"of macOS", "a.png": picture(0), "a.mask.png": picture(9), "b.png": picture(1)}
    members |= {"b.mask.png": picture(9), "c.png": picture(1), "c.mask.png": picture(9)}
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "x.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    counts = export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert [name for name, *_ in read_tar(tmp_path / "dest" / "x.tar")] == list(members)[:5]
    assert (counts["exported"], counts["exported_beside"]) == (3, 1)


def test_a_cut_shard_gives_what_the_manifest_knows(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    whole = pack([0, 1, 4])
    (tmp_path / "src" / "x.tar").write_bytes(whole[: whole.rindex(picture(2)) + 100])
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    for format_ in ("same", "parquet"):
        export(tmp_path / "out", tmp_path / format_, Options(format_), jobs=1)
    assert {name.partition(".")[0] for name, *_ in read_tar(tmp_path / "same" / "x.tar")} == {"k/0000", "k/0001"}
    check(list(read_parquet(tmp_path / "parquet")), [0, 1], CAPTIONS)


def test_files_are_linked_and_what_lies_beside_them_too(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "folder")
    export(out, tmp_path / "dest", jobs=1)
    names = sorted(path.relative_to(tmp_path / "dest").as_posix() for path in (tmp_path / "dest").rglob("*.*"))
    assert names == [
        MARK,
        *(f"sub/p{n}.{s}" for n in (0, 1) for s in ("json", "png", "txt")),
        "sub/p4.json",
        "sub/p4.png",
    ]
    assert all((tmp_path / "dest" / name).samefile(src / name) for name in names[1:])


def test_files_are_copied_where_links_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = dedup(tmp_path, "folder")

    def refuse(_: object, target: Path) -> None:
        assert target.parent.is_dir()
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    export(out, tmp_path / "dest", jobs=1)
    assert not (tmp_path / "dest/sub/p0.png").samefile(src / "sub/p0.png")
    check(list(read_folder(tmp_path / "dest")), KEPT, CAPTIONS)


@pytest.mark.parametrize(("make", "name"), [("csv", "shop.csv"), ("tsv", "shop.tsv"), ("jsonl", "shop.jsonl")])
def test_rows_of_a_table_keep_their_text(tmp_path: Path, make: str, name: str) -> None:
    """Each row of what is kept stands in the source letter for letter."""
    src, out = dedup(tmp_path, make)
    export(out, tmp_path / "dest", jobs=1)
    whole, found = src.read_bytes(), (tmp_path / "dest" / name).read_bytes()
    rows = [f"s{number}".encode() for number in KEPT]
    assert [row in found for row in rows] == [True] * 3
    assert len(found.splitlines()) == 3 + (make != "jsonl")
    assert all(line in whole.splitlines() for line in found.splitlines())
    assert (b"\r\n" in found) == (make == "csv")


def test_parquet_keeps_types_groups_and_compression(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "x.parquet"
    table = pa.table(
        {
            "image": [picture(n % 4) for n in range(6)],
            "text": pa.array(["a"] * 6).dictionary_encode(),
            "box": [[n, n + 1] for n in range(6)],
            "when": pa.array(range(6), pa.timestamp("us", "UTC")),
        }
    ).replace_schema_metadata({"made": "here"})
    pq.write_table(table, path, row_group_size=3, compression={"image": "NONE", "text": "ZSTD", "when": "GZIP"})
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    export(tmp_path / "out", tmp_path / "dest", jobs=1)
    found = pq.ParquetFile(tmp_path / "dest" / "x.parquet")
    assert found.read().equals(pq.read_table(path)[:4], check_metadata=True)
    assert [found.metadata.row_group(n).num_rows for n in range(2)] == [3, 1]
    codecs = [found.metadata.row_group(0).column(n).compression for n in (0, 1, 3)]
    assert codecs == ["UNCOMPRESSED", "ZSTD", "GZIP"]


def test_a_damaged_parquet_file_is_refused_and_converted(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "x.parquet"
    table = pa.table({"image": [picture(n) for n in (0, 1, 3, 2)], "text": ["a cat, ö", "a dog", "x", None]})
    pq.write_table(table, path, row_group_size=2, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    with pytest.raises(SourceError, match="is damaged, so it cannot be copied: export to another format"):
        export(tmp_path / "out", tmp_path / "dest", jobs=1)
    export(tmp_path / "out", tmp_path / "tars", Options("webdataset"), jobs=1)
    check(list(read_webdataset(tmp_path / "tars")), [0, 1], CAPTIONS)


def test_images_and_a_shard_of_one_name(tmp_path: Path) -> None:
    """A folder of both: each is exported in its way, and the shard does not count as lying beside the image."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.png").write_bytes(picture(7))
    (tmp_path / "src" / "x.tar").write_bytes(pack([0, 1, 2]))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert (tmp_path / "dest" / "x.png").samefile(tmp_path / "src" / "x.png")
    assert {name.partition(".")[0] for name, *_ in read_tar(tmp_path / "dest" / "x.tar")} == {"k/0000", "k/0001"}


def test_a_dataset_that_was_loaded_is_given_back_with_its_images(tmp_path: Path) -> None:
    """What `datasets` makes of a folder: the cache holds paths only, the export the images themselves."""
    src, _ = make_imagefolder(tmp_path)
    (src / "p3.png").unlink()
    text = (src / "metadata.csv").read_text()
    (src / "metadata.csv").write_text("".join(row for row in text.splitlines(keepends=True) if "p3.png" not in row))
    deduplicate(src, tmp_path / "out", DedupOptions(layout=Layout("huggingface")), jobs=1)
    counts = export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert counts["exported"] == 3
    check(list(read_saved(tmp_path / "dest")), KEPT, CAPTIONS)


# --- conversions ---------------------------------------------------------------------------------------------------


def write_tars(folder: Path, shards: dict[str, dict[str, bytes]]) -> Path:
    (folder / "src").mkdir()
    for name, members in shards.items():
        with tarfile.open(folder / "src" / name, "w") as archive:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder / "src"


@pytest.mark.parametrize(
    "keys", [("a", "a"), ("a", "A"), ("../../x", "b"), ("/tmp/x", "b"), ("a", "a/b"), ("a" * 250, "b"), ("a//b", "c")]
)
def test_keys_that_are_no_names_become_numbers(tmp_path: Path, keys: tuple[str, str]) -> None:
    """Equal keys in two shards, and names that would leave DEST."""
    shards = {f"{n}.tar": {f"{key}.png": picture(n)} for n, key in enumerate(keys)}
    deduplicate(write_tars(tmp_path, shards), tmp_path / "out", DedupOptions(), jobs=1)
    before = {path for path in tmp_path.rglob("*") if "dest" not in path.parts}
    export(tmp_path / "out", tmp_path / "dest", Options("imagefolder"), jobs=1)
    rows = pl.read_ndjson(tmp_path / "dest" / "metadata.jsonl")
    assert rows["file_name"].to_list() == ["000000000.png", "000000001.png"]
    assert rows["key"].to_list() == list(keys)
    assert {path for path in tmp_path.rglob("*") if path.name != "dest" and "dest" not in path.parts} == before
    assert sorted(p.name for p in (tmp_path / "dest").iterdir()) == [MARK, *rows["file_name"], "metadata.jsonl"]


def test_a_folder_becomes_a_webdataset_whose_keys_are_its_paths(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "folder")
    export(out, tmp_path / "dest", Options("webdataset"), jobs=1)
    samples = list(wds.WebDataset(str(tmp_path / "dest" / "00000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"sub/p{number}" for number in KEPT]
    assert samples[0]["json"]["key"] == "sub/p0.png"
    assert samples[0]["json"]["caption"] == samples[0]["txt"] == CAPTIONS[0]
    loaded = datasets.load_dataset("webdataset", data_files=str(tmp_path / "dest" / "*.tar"), split="train")
    assert loaded.column_names[:3] == ["png", "txt", "json"]
    assert len(loaded) == 3


# --- refusals and interruptions ------------------------------------------------------------------------------------


def test_where_an_export_may_not_be_written(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "folder")
    for dest, why in ((src / "new", "lies inside the source"), (src, "inside the source"), (out / "x", "results of")):
        with pytest.raises(ExportError, match=why):
            export(out, dest)
        assert not (dest / MARK).exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ExportError, match="is not empty"):
        export(out, tmp_path / "full")
    with pytest.raises(ExportError, match="alpha"):
        export(out, tmp_path / "dest", Options(alpha=float("nan")))
    with pytest.raises(manifest.ManifestError, match="holds no finished dedup run"):
        export(tmp_path / "nothing", tmp_path / "dest")


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "tars")
    (src / "00002.tar").write_bytes(pack([1]))
    with pytest.raises(SourceError, match="has changed since"):
        export(out, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


# Compressed bytes do not lie as they are; images of a table are copied by conversions only.
@pytest.mark.parametrize("format_", ["same", *READ])
@pytest.mark.parametrize("make", ["folder", "imagefolder", "tars", "csv", "parquet", "datasets"])
def test_other_bytes_under_the_same_stamp_are_seen(tmp_path: Path, make: str, format_: str) -> None:
    """Size and time are as they were: only the digest tells. What is complete in DEST is right."""
    src, out = dedup(tmp_path, make)
    if (make, format_) == ("csv", "same"):
        return
    folder = tmp_path / "images" if (tmp_path / "images").exists() else src
    for path in (path for path in folder.rglob("*") if path.is_file()):
        data, stat = path.read_bytes(), path.stat()
        if (at := data.find(picture(1))) >= 0:
            path.write_bytes(data[: at + 60] + bytes([data[at + 60] ^ 1]) + data[at + 61 :])
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceError, match="holds other bytes than when") as caught:
        export(out, tmp_path / "dest", Options(format_), jobs=1)
    assert "\n" not in str(caught.value)
    assert "disk" not in str(caught.value)


@pytest.mark.parametrize("format_", ["same", *READ])
def test_the_same_command_goes_on_where_it_was_stopped(
    made: tuple[str, Path, Path], tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends in the bytes of an export that nobody stopped; other options are refused."""
    _, _, out = made
    export(out, tmp_path / "whole", Options(format_), jobs=1)
    check_bytes = exports.check_bytes
    seen = 0

    def stop(*arguments: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt
        check_bytes(*arguments)

    for module in (exports, exports.tars, exports.folders, exports.parquets, exports.saved):
        monkeypatch.setattr(module, "check_bytes", stop)
    try:
        export(out, tmp_path / "dest", Options(format_), jobs=1)
    except KeyboardInterrupt:
        with pytest.raises(ExportError, match="with other options"):
            export(out, tmp_path / "dest", Options(format_, "all"), jobs=1)
    counts = export(out, tmp_path / "dest", Options(format_), jobs=1)
    files = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    found = {path.relative_to(tmp_path / "dest"): path for path in (tmp_path / "dest").rglob("*") if path.is_file()}
    assert found.keys() == files.keys()
    assert all(found[name].read_bytes() == files[name].read_bytes() for name in files)
    seen = -1_000
    assert export(out, tmp_path / "dest", Options(format_), jobs=1) == counts  # done already
    assert seen == -1_000


# --- filters at load time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True])
def test_filters_for_loaders(tmp_path: Path, copied: bool) -> None:
    """Of OUT itself, or of an index that was exported: webdataset `.select`, `datasets`, torch."""
    src, out = dedup(tmp_path, "tars")
    if copied:
        export(out, tmp_path / "index", Options("index"), jobs=1)
        out = tmp_path / "index"
        assert (out / "keys.txt").read_text() == "00000.tar:k/0000\n00000.tar:k/0001\n00001.tar:k/0004\n"
        assert pl.read_parquet(out / "index.parquet")["keep"].to_list() == [n in KEPT for n in range(6)]
    kept = keep(out)
    shards = sorted(str(path) for path in src.glob("*.tar"))
    found = wds.WebDataset(shards, shardshuffle=False).select(kept)
    assert [sample["png"] for sample in found] == [DATA[number] for number in KEPT]
    assert list(torch.utils.data.Subset(DATA, kept.indices())) == [DATA[number] for number in KEPT]
    assert kept.keys() == {"k/0000", "k/0001", "k/0004"}


def test_equal_keys_in_two_shards_are_told_apart(tmp_path: Path) -> None:
    shards = {"a.tar": {"k.png": picture(0)}, "b.tar": {"k.png": picture(0), "l.png": picture(1)}}
    src = write_tars(tmp_path, shards)
    deduplicate(src, tmp_path / "out", DedupOptions(), jobs=1)
    samples = wds.WebDataset(sorted(map(str, src.glob("*.tar"))), shardshuffle=False).select(keep(tmp_path / "out"))
    assert [(Path(one["__url__"]).name, one["__key__"]) for one in samples] == [("a.tar", "k"), ("b.tar", "l")]


def test_equal_names_of_shards_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    """And a shard that the run has not seen is no reason to drop all that is in it."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / "src" / name).mkdir(parents=True)
        with tarfile.open(tmp_path / "src" / name / "0.tar", "w") as archive:
            info = tarfile.TarInfo("k.png")
            info.size = len(picture(seed))
            archive.addfile(info, io.BytesIO(picture(seed)))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    kept = keep(tmp_path / "out")
    samples = wds.WebDataset(sorted(map(str, (tmp_path / "src").rglob("*.tar"))), shardshuffle=False).select(kept)
    assert [Path(one["__url__"]).parent.name for one in samples] == ["a", "c"]
    with pytest.raises(ExportError, match="none of the shards of this run"):
        kept({"__url__": "elsewhere/1.tar", "__key__": "k"})


def test_numbers_of_rows_for_datasets(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "datasets, splits")
    kept = keep(out)
    for split, numbers in (("train", [0, 1]), ("test", [4])):
        part = datasets.load_from_disk(src)[split].select(kept.indices(split))
        check(list(read_rows(part)), numbers, CAPTIONS)
    chosen = set(kept.indices("train"))
    undecoded = datasets.load_from_disk(src)["train"].cast_column(
        "image", datasets.Image(decode=False)
    )  # one is broken
    filtered = undecoded.filter(lambda _, n: n in chosen, with_indices=True)
    check(list(read_rows(filtered.cast_column("image", datasets.Image()))), [0, 1], CAPTIONS)
    with pytest.raises(ExportError, match="there are test, train"):
        kept.indices("validation")


def test_the_verb(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "tars")
    done = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "dest"), "--jobs", "1"])
    assert done.output == f"3 of 6 rows exported: {tmp_path / 'dest'}.\n"
    words = ["export", str(out), str(tmp_path / "all"), "--rows", "weighted", "--alpha", "0", "--jobs", "1", "--json"]
    assert json.loads(CliRunner().invoke(app, words).output) == {"rows": 6, "exported": 5, "exported_beside": 0}
    assert {sample["weight"] for sample in read_webdataset(tmp_path / "all")} == {1.0}
