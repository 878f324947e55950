"""Datasets of six rows in every format, and readers of what becomes of them: shared by the tests of exports."""

import csv
import gzip
import io
import json
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
import pytest
import webdataset as wds
from PIL import Image

from dedup import policy, sources
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate
from dedup.sources import Layout, Transfer


def with_numbers(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with text → with the numbers that stand for it in memory (`Signatures.read`)."""
    pictures, names = pl.col("sha256").rank("dense"), pl.col("key").rank("dense")
    return rows.with_columns(policy.hash_caption(), picture=pictures, name=names)


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


def read_json_members(dest: Path) -> Iterator[dict[str, Any]]:
    paths = sorted(map(str, dest.glob("*.tar*")))
    return (json.loads(sample["json"]) for sample in wds.WebDataset(paths, shardshuffle=False))


def read_columns(saved: datasets.Dataset | datasets.DatasetDict) -> Iterator[dict[str, Any]]:
    for part in saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]:
        yield from part.remove_columns("image")


# All fields of each row but the image.
MORE: dict[str, Callable[[Path], Any]] = {
    "webdataset": read_json_members,
    "parquet": lambda dest: pl.read_parquet(dest / "*.parquet").drop("image").iter_rows(named=True),
    "huggingface": lambda dest: read_columns(datasets.load_from_disk(dest)),
    "imagefolder": lambda dest: pl.read_ndjson(dest / "metadata.jsonl").iter_rows(named=True),
}


def check(found: list[dict[str, Any]], numbers: list[int], captions: dict[int, str | None] | list[str | None]) -> None:
    assert [DATA.index(one["data"]) for one in found] == [SEEDS.index(SEEDS[n]) for n in numbers]
    assert [one["data"] for one in found] == [DATA[n] for n in numbers]
    assert [one["caption"] or None for one in found] == [captions[n] for n in numbers]


def dedup(folder: Path, make: str) -> tuple[Path, Path]:
    """SRC and OUT."""
    src, layout = SOURCES[make](folder)
    deduplicate(src, folder / "out", DedupOptions(per="none", layout=layout), jobs=1)
    return src, folder / "out"


def read_tar(path: Path) -> list[tuple[str, bytes, float]]:
    with tarfile.open(path) as archive:
        return [(info.name, archive.extractfile(info).read(), info.mtime) for info in archive]  # type: ignore[union-attr]


def write_tars(folder: Path, shards: dict[str, dict[str, bytes]]) -> Path:
    (folder / "src").mkdir()
    for name, members in shards.items():
        with tarfile.open(folder / "src" / name, "w") as archive:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder / "src"
