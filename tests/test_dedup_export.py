"""Every source × every export, read by the libraries that people read them with: bytes, keys, captions, order."""

import csv
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
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
from dedup.pipeline import Options as DedupOptions
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, webdataset
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


SOURCES: dict[str, Callable[[Path], tuple[Path, Layout]]] = {
    "folder": make_folder,
    "imagefolder": make_imagefolder,
    "tars": make_tars,
    "gzipped tar": make_gzipped,
    "img2dataset": make_downloaded,
    "csv": lambda folder: make_table(folder, "csv"),
    "tsv": lambda folder: make_table(folder, "tsv"),
    "jsonl": lambda folder: make_table(folder, "jsonl"),
    "table in parquet": lambda folder: make_table(folder, "parquet"),
    "parquet": make_parquet,
    "datasets": make_saved,
    "datasets, splits": make_splits,
}


@pytest.fixture(params=SOURCES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """Name of the source, SRC, OUT."""
    src, layout = SOURCES[request.param](tmp_path)
    run = deduplicate(src, tmp_path / "out", DedupOptions(layout=layout), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows.filter("keep")["id"].to_list() == KEPT
    assert run["shard_rows"][-1] > 0
    return request.param, src, tmp_path / "out"


# --- readers of exports --------------------------------------------------------------------------------------------


def read_webdataset(dest: Path) -> Iterator[dict[str, Any]]:
    paths = sorted(str(path) for path in dest.rglob("*.tar*") if path.suffix != ".parquet")
    for sample in wds.WebDataset(paths, shardshuffle=False):
        caption = sample["txt"].decode() if "txt" in sample else None
        record = json.loads(sample["json"])
        listed = json.loads(sample.get("captions.json", b"null")) or record.get("captions", [])
        weight = json.loads(sample.get("weight.json", b"null")) or record.get("weight")
        yield {"data": sample["png"], "caption": caption, "captions": listed, "weight": weight}


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
    for dest, jobs in (("one", 1), ("two", 2)):
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
        run = deduplicate(again, tmp_path / "again", DedupOptions(layout=layout), jobs=1)
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
