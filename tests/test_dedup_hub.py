"""hf://org/name against a hub on this machine: HF_ENDPOINT, real requests, the program itself."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import datasets
import numpy as np
import pytest
from PIL import Image

from dedup import manifest, sources
from dedup.sources import Layout, SourceError, Transfer

ROOT = Path(__file__).parent.parent
# Files of eight rows, so that a small dataset has several.
CODE = "from dedup.sources import hub; hub.ROWS_PER_FILE = hub.ROWS_HELD = 8; from eval.cli import main; main()"


def picture(seed: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


class Hub(ThreadingHTTPServer):
    """One dataset, org/name: what the real one answers to the questions of `datasets`, as far as these go."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {}
        self.revision = "a" * 40
        self.gone: set[str] = set()  # listed, but not to be had
        self.asked: list[str] = []  # files of which bytes were asked for

    def list(self, under: str, *, deep: bool) -> list[dict[str, Any]]:
        prefix = f"{under}/" if under else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, data in self.files.items():
            first, slash, _ = name.removeprefix(prefix).partition("/")
            if not name.startswith(prefix):
                continue
            if slash and not deep:
                entries[first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
            else:
                oid = hashlib.sha1(data).hexdigest()
                entries[name] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        return list(entries.values())


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def say(self, code: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self) -> None:
        hub = self.server
        path, _, query = unquote(self.path).partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, api, _, *rest = path.split("/")
        if path.startswith("/api/datasets/org/name"):
            what, under = (rest[2:3] or [""])[0], "/".join(rest[4:])
            if what == "tree":
                found = hub.list(under, deep="recursive=true" in query.lower())
                if found:
                    self.say(200, json.dumps(found).encode())
                else:
                    self.say(404, b"{}", X_Error_Code="EntryNotFound")
            elif what == "paths-info":
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                found = [entry for entry in hub.list("", deep=True) if entry["path"] in wanted]
                self.say(200, json.dumps(found).encode())
            else:
                told = {"id": "org/name", "sha": hub.revision, "private": False, "gated": False, "disabled": False}
                more = {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
                files = {"siblings": [{"rfilename": name} for name in hub.files]}
                self.say(200, json.dumps(told | more | files).encode())
            return
        name = "/".join(rest[3:])
        if api != "datasets" or name not in hub.files or name in hub.gone:
            self.say(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=hub.revision)
            return
        data = hub.files[name]
        tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": hub.revision, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            self.say(200, Content_Length=str(len(data)), X_Linked_Size=str(len(data)), **tag)
            return
        hub.asked.append(name)
        start, stop = 0, len(data)
        if wanted_range := self.headers.get("Range"):
            first, last = wanted_range.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
            tag["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.say(206 if wanted_range else 200, data[start:stop], **tag)

    do_GET = do_HEAD = do_POST = answer


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.files["README.md"] = b"---\nlicense: mit\n---\n"
        yield server
        server.shutdown()


def run(hub: Hub, folder: Path, *options: str, code: int = 0) -> str:
    """What the program says of `dedup hf://org/name`, OUT being folder/out."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", CODE, "dedup", "hf://org/name", "-o", str(folder / "out"), "--level", "exact"]
    command += ["--jobs", "1", "--no-report", "--cache", str(folder / "cache"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def make_split(numbers: range, folder: Path) -> bytes:
    cells = [{"bytes": b"no image" if n == 3 else picture(n), "path": f"{n}.png"} for n in numbers]
    rows = {"image": cells, "text": [f"text {n}" for n in numbers], "stars": list(numbers)}
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "stars": datasets.Value("int8")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(folder / "x.parquet", batch_size=5)
    return (folder / "x.parquet").read_bytes()


def check_bytes(out: Path, expected: dict[int, bytes]) -> None:
    """Rows of the manifest, read again where they lie."""
    src = Path(manifest.read_run(out)["src"])
    rows = manifest.read(out)
    found = {
        number: sources.read_image(src, *rows.select("shard", "offset", "size", "key").row(number))
        for number in range(len(rows))
    }
    assert found == expected


@pytest.mark.slow
def test_streaming_brings_one_split_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    """A broken image is a row; a file that is not to be had is one line, and what came before it is not asked again."""
    first, second = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
    hub.files[first] = make_split(range(16), tmp_path)
    hub.files[second] = make_split(range(14, 24), tmp_path)  # two of them stand in the first file too
    hub.files["data/test-00000-of-00001.parquet"] = make_split(range(2), tmp_path)
    options = ("--streaming", "--split", "train", "--max-bad", "1")
    hub.gone = {second}
    said = run(hub, tmp_path, *options, code=3)
    assert said.count("\n") == 1
    assert said.startswith("unmemorize: hf://org/name: `datasets` cannot load it (")
    written = sorted((tmp_path / "cache").rglob("*.arrow"))
    stamps = [path.stat().st_mtime_ns for path in written]
    assert len(stamps) == 2
    hub.gone, hub.asked = set(), []
    said = run(hub, tmp_path, *options)
    assert "26 images: 23 kept, 2 duplicates dropped" in said
    assert stamps == [path.stat().st_mtime_ns for path in written]
    assert set(hub.asked) == {first, second}  # of the first only what its columns are
    numbers = [*range(16), *range(14, 24)]
    check_bytes(tmp_path / "out", dict(enumerate(b"no image" if n == 3 else picture(n) for n in numbers)))
    rows = manifest.read(tmp_path / "out")
    assert rows["caption"].to_list() == [f"text {n}" for n in numbers]
    assert set(rows["source"]) == {"train"}
    src = Path(manifest.read_run(tmp_path / "out")["src"])
    assert src.is_relative_to(tmp_path / "cache")
    saved = datasets.load_from_disk(src)
    assert saved["train"]["stars"][:] == numbers
    assert saved["train"].features["stars"] == datasets.Value("int8")
    hub.asked = []
    run(hub, tmp_path, *options, "--prefer", "first")
    assert second not in hub.asked
    hub.revision, hub.files[second] = "b" * 40, make_split(range(16, 26), tmp_path)
    assert "26 images: 25 kept" in run(hub, tmp_path, *options)


@pytest.mark.slow
def test_without_streaming_all_splits_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.files["data/train-00000-of-00001.parquet"] = make_split(range(3), tmp_path)
    hub.files["data/test-00000-of-00001.parquet"] = make_split(range(2, 3), tmp_path)
    said = run(hub, tmp_path)
    assert "Leakage: 1 picture is kept in test and in train" in said
    assert {"data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"} <= set(hub.asked)
    said = run(hub, tmp_path, "--split", "validation", "-o", str(tmp_path / "other"), code=3)
    assert (
        "has no --split validation; it has train, test" in said
        or "has no --split validation; it has test, train" in said
    )


@pytest.mark.slow
def test_streaming_fetches_images_that_are_files(hub: Hub, tmp_path: Path) -> None:
    """An imagefolder. One image is listed and not to be had: a row."""
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"text {n}"}) + "\n" for n in range(3)]
    hub.files |= {f"data/train/{n}.png": picture(n) for n in range(3)} | {
        "data/train/metadata.jsonl": "".join(lines).encode()
    }
    hub.gone = {"data/train/1.png"}
    run(hub, tmp_path, "--streaming", "--max-bad", "1")
    rows = manifest.read(tmp_path / "out")
    assert rows["caption"].to_list() == ["text 0", "text 1", "text 2"]
    assert [status == "ok" for status in rows["status"]] == [True, False, True]
    assert rows["sha256"].drop_nulls().to_list() == [hashlib.sha256(picture(n)).hexdigest() for n in (0, 2)]


@pytest.mark.slow
def test_streaming_of_shards(hub: Hub, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(6):
            for suffix, data in (("png", picture(number % 5)), ("txt", f"text {number}".encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    hub.files["data/train-0.tar"] = buffer.getvalue()
    assert "6 images: 5 kept, 1 duplicate dropped" in run(hub, tmp_path, "--streaming", "--caption-column", "txt")
    check_bytes(tmp_path / "out", {n: picture(n % 5) for n in range(6)})


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--streaming is of hf://org/name"):
        sources.fetch(tmp_path, Layout(), Transfer(streaming=True))
