"""Shards elsewhere: a web server of this machine, with and without ranges, which breaks off; memory; files."""

import io
import os
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from dedup import manifest, sources
from dedup.export import export
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, Transfer, remote
from eval.cli import app


def picture(seed: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def pack(*seeds: int) -> bytes:
    """A shard with a picture for each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, seed in enumerate(seeds):
            for name, data in ((f"k{number}.png", picture(seed)), (f"k{number}.txt", b"of %d" % seed)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


SHARDS = {"00000.tar": pack(0, 1), "00001.tar": pack(0, 2), "00002.tar": pack(1, 3, 4)}


class Web(SimpleHTTPRequestHandler):
    """What it does is said by the server's attributes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()
            return
        data, start = path.read_bytes(), 0
        asked = self.headers.get("Range")
        server.asked.append((path.name, asked))
        if asked and server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for place in range(0, len(data), 1_000):
            if server.dies and server.dies[0] <= start + place:
                server.dies.pop(0)
                self.close_connection = True
                self.wfile.flush()
                time.sleep(0.5)  # what was sent has arrived by then
                return
            self.wfile.write(data[place : place + 1_000])


class Server(ThreadingHTTPServer):
    ranges = True
    folder = Path()

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), lambda *args: Web(*args, directory=str(folder)))  # type: ignore[arg-type]
        self.dies: list[int] = []  # at which byte the next answers break off
        self.asked: list[tuple[str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.folder = folder


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "web"
    (folder / "data").mkdir(parents=True)
    for name, data in SHARDS.items():
        (folder / "data" / name).write_bytes(data)
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetch(address: str, tmp_path: Path, **options: int) -> Path:
    return sources.fetch(Path(address), Layout(), Transfer(cache=tmp_path / "cache", timeout=5, **options))[0]  # type: ignore[arg-type]


def check(src: Path, *names: str) -> None:
    """SRC holds these shards, byte for byte, in this order."""
    shards = sources.list_shards(src)
    assert [shard.name for shard in shards] == list(names)
    assert [(Path(shard.root) / str(shard.name)).read_bytes() for shard in shards] == [SHARDS[n] for n in names]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_run_over_shards_elsewhere(web: Server, tmp_path: Path, ranges: bool) -> None:
    """As over the same shards here; the second time nothing is fetched, and export needs no server."""
    web.ranges = ranges
    src = Path(f"{web.address}/data/{{00000..00002}}.tar?key=secret")
    transfer = Transfer(cache=tmp_path / "cache", timeout=5)
    run = deduplicate(src, tmp_path / "out", Options(level="exact"), jobs=1, transfer=transfer)
    deduplicate(web.folder / "data" / "{00000..00002}.tar", tmp_path / "here", Options(level="exact"), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows.equals(manifest.read(tmp_path / "here"))
    assert rows["shard"].unique(maintain_order=True).to_list() == list(SHARDS)
    assert run["origin"] == f"{web.address}/data/{{00000..00002}}.tar"
    assert "secret" not in (tmp_path / "out" / "run.json").read_text()
    for row in rows.iter_rows(named=True):
        data = sources.read_image(Path(run["src"]), row["shard"], row["offset"], row["size"], row["key"])
        assert data == picture(int((row["caption"] or "").removeprefix("of ")))
    web.asked.clear()
    again = deduplicate(src, tmp_path / "out", Options(level="exact"), jobs=1, transfer=transfer)
    assert again == run
    assert web.asked == []
    web.shutdown()
    counts = export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert counts["exported"] == run["counts"]["kept"] == 5
    assert [path.name for path in sorted((tmp_path / "dest").glob("*.tar"))] == list(SHARDS)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_breaks_off(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool) -> None:
    """One retry goes on where the first try stopped, if the server can; without it, the next run does."""
    monkeypatch.setattr(remote, "BLOCK", 4_000)
    web.ranges, web.dies = ranges, [20_000]
    check(fetch(f"{web.address}/data/00000.tar", tmp_path), "00000.tar")
    asked = [part for name, part in web.asked if name == "00000.tar"]
    assert asked[0] is None
    assert int((asked[1] or "").removeprefix("bytes=").partition("-")[0]) > 0
    assert (asked[-1] is None) != ranges
    web.dies = [20_000]
    with pytest.raises(SourceError, match=r"data/00001\.tar: cannot be fetched \(.*ContentLengthError") as told:
        fetch(f"{web.address}/data/00001.tar", tmp_path, retries=0)
    assert "\n" not in str(told.value)
    (part,) = (tmp_path / "cache").rglob(".00001.tar.part")
    assert 0 < part.stat().st_size < len(SHARDS["00001.tar"])
    check(fetch(f"{web.address}/data/00001.tar", tmp_path, retries=0), "00001.tar")
    assert not part.exists()


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/0.tar"
        with pytest.raises(SourceError, match=r"cannot be fetched \(SocketTimeoutError") as caught:
            sources.fetch(Path(address), Layout(), Transfer(cache=tmp_path / "cache", timeout=0.5, retries=0))
    assert "\n" not in str(caught.value)


def test_what_changed_is_fetched_again(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when half of what it was is there already."""
    monkeypatch.setattr(remote, "BLOCK", 4_000)
    web.dies = [20_000]
    with pytest.raises(SourceError):
        fetch(f"{web.address}/data/00000.tar", tmp_path, retries=0)
    path = web.folder / "data" / "00000.tar"
    path.write_bytes(SHARDS["00002.tar"])
    os.utime(path, (1, 1))
    (shard,) = sources.list_shards(fetch(f"{web.address}/data/00000.tar", tmp_path))
    assert (Path(shard.root) / "00000.tar").read_bytes() == SHARDS["00002.tar"]
    path.write_bytes(SHARDS["00000.tar"])
    os.utime(path, (2, 2))
    check(fetch(f"{web.address}/data/00000.tar", tmp_path), "00000.tar")


def test_what_is_not_there(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for name, message in (
        ("data/{00002..00003}.tar?key=secret", r"data/00003\.tar: cannot be fetched \(ClientResponseError: 404"),
        ("data/*.zip", r"nothing there that ends in \.tar, \.tar\.gz"),
        ("nowhere", r"cannot be fetched|nothing there"),
    ):
        with pytest.raises(SourceError, match=message) as told:
            fetch(f"{web.address}/{name}", tmp_path)
        assert "\n" not in str(told.value)
        assert "secret" not in str(told.value)
    with pytest.raises(SourceError, match=r"cannot be fetched \(ClientConnectorError"):
        fetch("http://127.0.0.1:1/a.tar", tmp_path)
    for address, message in (
        ("s3://bucket/{0..1}.tar", r"^s3://bucket/{0\.\.1}\.tar: s3:// needs a package .*: pip install s3fs$"),
        ("nonsense://a/b.tar", "Protocol not known"),
    ):
        with pytest.raises(SourceError, match=message):
            fetch(address, tmp_path)


def test_the_list_beside_a_shard_comes_along(web: Server, tmp_path: Path) -> None:
    """As img2dataset leaves it: what failed to download stands only there."""
    rows = {"key": ["k0", "k9"], "status": ["success", "failed_to_download"], "error_message": [None, "404"]}
    pl.DataFrame(rows).write_parquet(web.folder / "data" / "00000.parquet")
    for pattern in ("{00000..00001}.tar", "*.tar", "*", ""):
        src = fetch(f"{web.address}/data/{pattern}", tmp_path)
        records = [record for shard in sources.list_shards(src) for record in sources.read_shard(shard)]
        assert [r.key for r in records][:3] == ["k0", "k1", "k9"], pattern


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_other_filesystems(tmp_path: Path, kind: str) -> None:
    """Braces in the order written, globs in sorted order, and only what the last listing named."""
    base = f"memory://{tmp_path.name}" if kind == "memory" else f"file://{tmp_path}/there"
    system, root = fsspec.core.url_to_fs(base)
    for folder in ("a", "b"):
        system.makedirs(f"{root}/{folder}")
        for name in ("00000.tar", "00001.tar"):
            system.pipe(f"{root}/{folder}/{name}", SHARDS[name])
    check(fetch(f"{base}/a/{{00001,00000}}.tar", tmp_path), "00001.tar", "00000.tar")
    check(fetch(f"{base}/a/*.tar", tmp_path), "00000.tar", "00001.tar")
    check(fetch(f"{base}/a", tmp_path), "00000.tar", "00001.tar")
    shards = sources.list_shards(fetch(f"{base}/{{b,a}}/0000*.tar", tmp_path))
    assert [shard.name for shard in shards] == ["b/00000.tar", "b/00001.tar", "a/00000.tar", "a/00001.tar"]
    system.rm(f"{root}/a/00000.tar")
    check(fetch(f"{base}/a/*.tar", tmp_path), "00001.tar")
    check(fetch(f"{base}/a", tmp_path), "00001.tar")
    with pytest.raises(SourceError, match="FileNotFoundError"):
        fetch(f"{base}/a/00000.tar", tmp_path)


def test_parquet_and_tables_elsewhere(tmp_path: Path) -> None:
    """Files with images, and a list of paths, whose files would have to be here: each row says so."""
    base = f"memory://{tmp_path.name}"
    system, root = fsspec.core.url_to_fs(base)
    for number in range(2):
        frame = pl.DataFrame({"image": [picture(number)], "text": [f"of {number}"]})
        with system.open(f"{root}/p/{number}.parquet", "wb") as handle:
            frame.write_parquet(handle)
    for pattern in ("p", "p/*.parquet", "p/{0..1}.parquet"):
        src = fetch(f"{base}/{pattern}", tmp_path)
        records = [record for shard in sources.list_shards(src) for record in sources.read_shard(shard)]
        assert [(r.caption, r.data) for r in records] == [(f"of {n}", picture(n)) for n in range(2)]
    assert len(sources.list_shards(fetch(f"{base}/p/1.parquet", tmp_path))) == 1


def test_a_glob_cannot_lead_out_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"names a file '\.\./x\.tar', which would lie outside"):
        fetch("memory://a/{b,..}/x.tar", tmp_path)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://me:word@host:8/a/{0..1}.tar?sig=1", "https://host:8/a/{0..1}.tar"),
        ("s3://bucket/a?.tar", "s3://bucket/a?.tar"),
        ("file:///a/b.tar", "file:///a/b.tar"),
        ("hf://org/name", "hf://org/name"),
    ],
)
def test_how_an_address_is_told(address: str, expected: str) -> None:
    assert sources.tell_origin(Path(address)) == expected


def test_a_folder_that_is_called_like_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:/x").mkdir(parents=True)
    Path("s3:/x/a.png").write_bytes(picture(0))
    assert sources.fetch(Path("s3:/x"), Layout())[0] == tmp_path / "s3:" / "x"


def test_the_command(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "dedup",
        f"{web.address}/data/*.tar",
        "--level",
        "exact",
        "--cache",
        "kept",
        "--jobs",
        "1",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "7 images: 5 kept, 2 duplicates dropped" in done.output
    assert manifest.read_run(tmp_path / "data-dedup")["src"].startswith(str(tmp_path / "kept"))
    page = (tmp_path / "data-dedup" / "report" / "index.html").read_text()
    assert f"{web.address}/data/*.tar (read at {tmp_path}/kept" in page
