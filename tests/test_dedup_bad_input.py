"""What is broken, hostile or moving becomes a row with a reason or one clear line: nothing lost, no crash, no hang."""

import errno
import gzip
import io
import os
import signal
import stat
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from dedup import manifest, options, pairing, sources
from dedup.options import Options, OptionsError, OutputError
from dedup.pipeline import deduplicate
from dedup.sources import SourceError, folder, webdataset

NOBODY = 65_534


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """No test of this file may hang."""

    def stop(*_: object) -> None:
        pytest.fail("hangs", pytrace=False)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def picture(seed: int, kind: str = "PNG", **options: object) -> bytes:
    """Coarse noise, 96 × 96."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of one bit a pixel, its compressed rows given."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def fill(src: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = src / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return src


def run(src: Path, out: Path) -> dict[str, dict]:
    """Rows by key after a run in this process; the bytes of each readable row are found again."""
    recorded = deduplicate(src, out, Options(), jobs=1)
    rows = list(manifest.read(out).iter_rows(named=True))
    for row in rows:
        if row["sha256"] is not None:
            data = sources.read_image(Path(recorded["src"]), row["shard"], row["offset"], row["size"], row["key"])
            assert len(data) == row["size"]
        assert (row["error"] is None) == (row["status"] == "ok")
    assert recorded["counts"]["rows"] == len(rows)
    return {row["key"]: row for row in rows}


# --- files that are no pictures ------------------------------------------------------------------------------------


def test_every_file_is_a_row_with_its_reason(tmp_path: Path) -> None:
    flat = zlib.compress(bytes(25_000 // 8 + 1) * 24_000, 1)
    jpeg = picture(3, "JPEG", quality=90)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x09\xff\xff\xff\xff\0\x06\0\0" * 3
    expected = {
        "good.png": (picture(0), "ok"),
        "really.a.png.jpg": (picture(1), "ok"),
        "one_pixel.png": (png(1, 1, zlib.compress(b"\0\x80")), "ok"),
        "broken_exif.jpg": (picture(2, "JPEG", exif=exif), "ok"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "unreadable"),
        "truncated.png": (picture(4)[:-300], "unreadable"),
        "zero_bytes.png": (b"", "unreadable"),
        "page.jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", "unreadable"),
        "bomb_by_its_header.png": (png(25_000, 24_000, b""), "too-large"),
        "bomb_that_is_true.png": (png(25_000, 24_000, flat), "too-large"),
        "no_size.png": (png(0, 0, b""), "unreadable"),
    }
    rows = run(fill(tmp_path / "src", {name: data for name, (data, _) in expected.items()}), tmp_path / "out")
    assert {key: row["status"] for key, row in rows.items()} == {key: status for key, (_, status) in expected.items()}
    assert rows["really.a.png.jpg"]["format"] == "PNG"
    assert "pixels" in rows["bomb_that_is_true.png"]["error"]
    assert "<!DOCT" in rows["page.jpg"]["error"]
    assert all(row["keep"] == (row["status"] == "ok") for row in rows.values())


def test_what_is_no_file_is_a_row_and_cannot_block(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", {"good.png": picture(0), "folder.jpg/inside.png": picture(1)})
    os.mkfifo(src / "pipe.jpg")
    os.mkfifo(src / "good.txt")
    os.mkfifo(src / "pipe.tar")
    os.mkfifo(src / "00000.parquet")
    (src / "00000").mkdir()
    (src / "loop.png").symlink_to("loop.png")
    (src / "dangling.png").symlink_to("nowhere.png")
    (src / "device.png").symlink_to("/dev/zero")
    (src / "folder.jpg" / "up").symlink_to(src)
    rows = run(src, tmp_path / "out")
    errors = {key: row["error"] for key, row in rows.items()}
    assert errors.pop("pipe.tar").endswith(
        f"pipe.tar: cannot be read to its end ([Errno 22] not a regular file: '{src}/pipe.tar')"
    )
    assert errors == {
        "good.png": None,
        "folder.jpg/inside.png": None,
        "pipe.jpg": "not a regular file",
        "device.png": "not a regular file",
        "dangling.png": os.strerror(errno.ENOENT),
        "loop.png": os.strerror(errno.ELOOP),
    }


def test_a_pipe_as_metadata_is_one_clear_line(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", {"good.png": picture(0)})
    os.mkfifo(src / "metadata.csv")
    with pytest.raises(SourceError, match=r"metadata\.csv: cannot be read .*not a regular file"):
        deduplicate(src, tmp_path / "out", Options(), jobs=1)


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder and the rights of somebody who is not root: permissions hold for the rest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        if os.geteuid() != 0:
            yield Path(name)
            return
        os.chown(name, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


def test_without_permission(tmp_path: Path) -> None:
    with ordinary_user() as place:
        src = fill(place / "src", {"good.png": picture(0), "secret.png": picture(1), "room/x.png": picture(2)})
        fill(src, {"good.txt": b"unreadable"})
        for name in ("secret.png", "good.txt"):
            (src / name).chmod(0)
        rows = run(src, place / "out")
        assert rows["secret.png"]["error"] == os.strerror(errno.EACCES)
        assert rows["good.png"]["caption"] is None
        (src / "room").chmod(0)
        try:
            with pytest.raises(SourceError, match=r"room': cannot be listed \(Permission denied\): make it readable"):
                deduplicate(src, place / "other", Options(), jobs=1)
            assert not (place / "other").exists()
        finally:
            (src / "room").chmod(stat.S_IRWXU)


# --- captions and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "data", "caption"),
    [
        ("txt", b"caf\xe9 \xff", "caf\ufffd \ufffd"),
        ("txt", b"null\0byte", "null\0byte"),
        ("txt", b"  \n", ""),
        ("txt", "\u202egpj\u202c\x1b[31m".encode(), "\u202egpj\u202c\x1b[31m"),
        ("json", b'{"caption": "lone \\ud800 surrogate"}', "lone ? surrogate"),
        ("json", b'{"caption": "null\\u0000byte"}', "null\0byte"),
        ("json", b'{"caption": 5}', None),
        ("json", b"[" * 200_000, None),
        ("json", b'{"caption": "\xff"}', None),
        ("json", b"", None),
    ],
)
def test_captions_of_any_bytes_reach_every_output(
    tmp_path: Path, suffix: str, data: bytes, caption: str | None
) -> None:
    fill(tmp_path / "folder", {"a.png": picture(0), f"a.{suffix}": data})
    fill(tmp_path / "shards", {"x.tar": pack({"a.png": picture(0), f"a.{suffix}": data})})
    for src in (tmp_path / "folder", tmp_path / "shards"):
        out = tmp_path / f"out-{src.name}"
        (row,) = run(src, out).values()
        assert (row["status"], row["caption"]) == ("ok", caption)
        assert pl.read_parquet(out / "deduplicated.parquet")["caption"].item() == caption
        assert pl.read_ndjson(out / "deduplicated.jsonl")["caption"].item() == caption


NAMES = [
    b"\xff\xfe.png",
    b"new\nline.png",
    b"tab\t,\"comma'.png",
    b"50%25.png",
    b"%41.png",
    b"-o.png",
    b"a\x7f\x01.png",
]


def test_names_of_any_bytes(tmp_path: Path) -> None:
    src = tmp_path / "folder"
    src.mkdir()
    for number, name in enumerate(NAMES):
        (src / os.fsdecode(name)).write_bytes(picture(number // 2))  # so that some are dropped
    rows = run(src, tmp_path / "out")
    assert sorted(manifest.decode_name(key) for key in rows) == sorted(NAMES)
    kept = (tmp_path / "out" / "kept.txt").read_text().splitlines()
    assert sorted(kept) == sorted(key for key, row in rows.items() if row["keep"])
    dropped = pl.read_csv(tmp_path / "out" / "dropped.csv")
    assert sorted(dropped["dropped"]) == sorted(key for key, row in rows.items() if not row["keep"])
    shards = fill(tmp_path / "shards", {"x.tar": pack({os.fsdecode(n): picture(k) for k, n in enumerate(NAMES)})})
    keys = [webdataset.split_key(name)[0] for name in NAMES]
    assert [manifest.decode_name(key) for key in run(shards, tmp_path / "out-shards")] == keys


# --- hostile and damaged archives ------------------------------------------------------------------------------------


def pack(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_hostile_archive_is_only_read(tmp_path: Path) -> None:
    """Names that lead outside are labels; links are rows without bytes; equal keys are rows of their own."""
    buffer = io.BytesIO(pack({"../../up.png": picture(0), f"{tmp_path}/absolute.png": picture(1), "x.png": picture(2)}))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        for name, kind, target in (("s.png", tarfile.SYMTYPE, "../secret.png"), ("h.png", tarfile.LNKTYPE, "x.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for kind in (tarfile.FIFOTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("special.png")
            info.type = kind
            archive.addfile(info)
        for seed in (3, 4):
            info = tarfile.TarInfo("x.png")
            info.size = len(picture(seed))
            archive.addfile(info, io.BytesIO(picture(seed)))
    fill(tmp_path, {"secret.png": picture(9), "src/x.tar": buffer.getvalue()})
    run(tmp_path / "src", tmp_path / "out")
    rows = manifest.read(tmp_path / "out")
    link = "a link, which holds no bytes of its own"
    assert rows.select("key", "error").rows() == [
        ("../../up", None),
        (f"{tmp_path}/absolute", None),
        ("x", None),
        ("s", link),
        ("h", link),
        ("x", None),
        ("x", None),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "secret.png", "src"]
    assert rows["keep"].sum() == 5


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_archive(tmp_path: Path, compressed: bool) -> None:
    """Cut anywhere: what was whole before is kept, and a row says that there was more."""
    whole = pack({f"{n}.png": picture(n) for n in range(3)})
    last = whole.rindex(b"\x89PNG")
    for cut in (last + 700, last - 300, 100):
        data = whole[:cut]
        name = "x.tar.gz" if compressed else "x.tar"
        src = fill(tmp_path / f"src-{cut}", {name: gzip.compress(data)[:-12] if compressed else data})
        rows = list(run(src, tmp_path / f"out-{cut}").values())
        whole_ones = 2 if cut > 1_000 else 0
        assert [row["status"] for row in rows[:whole_ones]] == ["ok"] * whole_ones
        assert {row["status"] for row in rows[whole_ones:]} in ({"missing"}, {"unreadable"}, {"missing", "unreadable"})
        assert "inside" in rows[-1]["error"] or "ended before" in rows[-1]["error"]


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x1f\x8b\x08garbage", b"PK\x03\x04" + bytes(600)])
def test_what_is_no_archive_is_a_row(tmp_path: Path, data: bytes) -> None:
    src = fill(
        tmp_path / "src", {"0.tar": pack({"a.png": picture(0)}), "1.tar": data, "2.tar": pack({"b.png": picture(1)})}
    )
    rows = run(src, tmp_path / "out")
    assert {key: row["status"] for key, row in rows.items()} == {"a": "ok", "1.tar": "unreadable", "b": "ok"}
    assert "\n" not in rows["1.tar"]["error"]


# --- a source that changes -------------------------------------------------------------------------------------------


def touch(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


def replace_by_equal_size(src: Path) -> None:
    other = picture(7)
    target = src / "b.png"
    size = max(len(other), target.stat().st_size)
    touch(target, other + bytes(size - len(other)))
    assert len(target.read_bytes()) == size


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda src: touch(src / "aa.png", picture(8)),
    "removed": lambda src: (src / "b.png").unlink(),
    "replaced": replace_by_equal_size,
    "made a copy of another": lambda src: touch(src / "c.png", picture(1)),
    "another caption": lambda src: touch(src / "a.txt", b"new"),
    "no caption": lambda src: (src / "a.txt").unlink(),
    "a caption in JSON": lambda src: touch(src / "b.json", b'{"caption": "new"}'),
    "other metadata": lambda src: touch(src / "metadata.csv", b"file_name,text\nc.png,new\n"),
    "broken": lambda src: touch(src / "c.png", b"<html>"),
    "shard replaced": lambda src: touch(src / "x.tar", pack({"t": b"", "t.png": picture(1)})),
    "shard added": lambda src: touch(src / "a.tar", pack({"u.png": picture(2)})),
    "download failed": lambda src: pl.DataFrame({"key": ["1"], "status": ["failed"]}).write_parquet(src / "x.parquet"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_equals_a_fresh_one(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FILES_PER_SHARD", 2)
    files = {"a.png": picture(0), "a.txt": b"old", "b.png": picture(1) + bytes(2_000), "c.png": picture(2)}
    files |= {"d.png": picture(0, compress_level=1), "metadata.csv": b"file_name,text\nc.png,old\n"}
    src = fill(tmp_path / "src", files | {"x.tar": pack({"t.png": picture(3)})})
    outs = [tmp_path / "resumed", tmp_path / "fresh"]
    deduplicate(src, outs[0], Options(), jobs=1)
    before = (outs[0] / "manifest" / "00000.parquet").read_bytes()
    CHANGES[change](src)
    for out in outs:
        deduplicate(src, out, Options(), jobs=1)
    for name in (
        "manifest/00000.parquet",
        "pairs.parquet",
        "run.json",
        "kept.txt",
        "dropped.csv",
        "deduplicated.jsonl",
    ):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
    assert (outs[0] / "manifest" / "00000.parquet").read_bytes() != before


def test_files_that_vanish_or_change_while_the_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing and reading. The next run sees what really stands there."""
    src = fill(tmp_path / "src", {"a.png": picture(0), "b.png": picture(1), "c.png": picture(2), "x.tar": b""})
    touch(src / "x.tar", pack({"t.png": picture(3)}))
    list_shards = sources.list_shards

    def list_and_change(path: Path, layout: sources.Layout) -> list[sources.Shard]:
        shards = list_shards(path, layout)
        (src / "a.png").unlink()
        (src / "x.tar").unlink()
        touch(src / "b.png", picture(5))
        return shards

    with monkeypatch.context() as patch:
        patch.setattr(sources, "list_shards", list_and_change)
        deduplicate(src, tmp_path / "out", Options(), jobs=1)
    rows = {row["key"]: row for row in manifest.read(tmp_path / "out").iter_rows(named=True)}
    assert rows["a.png"]["error"] == os.strerror(errno.ENOENT)
    assert rows["x.tar"]["status"] == "unreadable"
    assert {"b.png", "c.png"} == {key for key, row in rows.items() if row["status"] == "ok"}
    deduplicate(src, tmp_path / "out", Options(), jobs=1)
    deduplicate(src, tmp_path / "fresh", Options(), jobs=1)
    manifests = [(tmp_path / out / "manifest" / "00000.parquet").read_bytes() for out in ("out", "fresh")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("change", ["gone", "cut", "other bytes"])
def test_a_file_that_changes_before_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, shard: bool
) -> None:
    """Copies in other formats: their pixels are read a second time to compare them."""
    files = {"a.png": picture(0), "b.png": picture(0, compress_level=1)}
    src = fill(tmp_path / "src", {"x.tar": pack(files)} if shard else files)
    target = src / ("x.tar" if shard else "b.png")
    changes: dict[str, Callable[[], object]] = {
        "gone": target.unlink,
        "cut": lambda: os.truncate(target, 700),
        "other bytes": lambda: target.write_bytes(bytes(target.stat().st_size)),
    }
    find = pairing.find_candidates

    def change_and_find(*arguments: object) -> pl.DataFrame:
        changes[change]()
        return find(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pairing, "find_candidates", change_and_find)
    with pytest.raises(SourceError, match=r"has the source changed|has changed while it was read") as caught:
        deduplicate(src, tmp_path / "out", Options(), jobs=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_shard_that_shrinks_under_its_reader_kills_nobody(tmp_path: Path) -> None:
    path = fill(tmp_path, {"x.tar": pack({f"{n}.png": picture(n) + bytes(2 << 20) for n in range(3)})}) / "x.tar"
    records = sources.read_shard(sources.list_shards(path)[0])
    assert next(records).data is not None
    os.truncate(path, 0)
    rest = []
    with suppress(SourceError):
        rest += records
    assert all(record.data is not None or "ends inside" in (record.error or "") for record in rest)


# --- where results go, and what SRC is -------------------------------------------------------------------------------


def test_out_inside_src_by_whatever_way(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", {"a.png": picture(0)})
    (tmp_path / "link").symlink_to(src)
    for out in (src, src / "out", tmp_path / "link" / "deep" / "out", src / "x" / ".." / "y"):
        with pytest.raises(OptionsError, match="lies inside the source"):
            deduplicate(src, out, Options(), jobs=1)
    assert [path.name for path in src.iterdir()] == ["a.png"]


def test_two_runs_into_one_out(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", {"a.png": picture(0)})
    out = tmp_path / "out"
    out.mkdir()
    with options.lock(out), pytest.raises(OutputError, match="is in use by another run") as caught:
        deduplicate(src, out, Options(), jobs=1)
    assert "\n" not in str(caught.value)
    deduplicate(src, out, Options(), jobs=1)


def test_what_is_no_source(tmp_path: Path) -> None:
    fill(tmp_path, {"empty/readme.md": b"text", "photo.jpg": picture(0, "JPEG"), "shards.tar.zst": b""})
    os.mkfifo(tmp_path / "pipe")
    expected = {
        "empty": "no images found (looked for images, tar shards and parquet files)",
        "nowhere": "no such folder or tar shard",
        "photo.jpg/inside": "no such folder or tar shard",
        "photo.jpg": "SRC is a folder, a table, or shards that end in .tar, .tar.gz, .tgz",
        "shards.tar.zst": "SRC is a folder, a table, or shards that end in .tar, .tar.gz, .tgz",
        "pipe": "SRC is a folder, a table, or shards that end in .tar, .tar.gz, .tgz",
    }
    for name, message in expected.items():
        with pytest.raises(SourceError) as caught:
            deduplicate(tmp_path / name, tmp_path / "out", Options(), jobs=1)
        assert str(caught.value) == f"{tmp_path / name}: {message}"
    assert not (tmp_path / "out").exists()


def test_shards_without_samples_say_so(tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match="hold no samples"):
        run(fill(tmp_path / "src", {"x.tar": pack({})}), tmp_path / "out")


def test_what_a_killed_writer_left(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", {"a.png": picture(0)})
    out = tmp_path / "out"
    left = out / ".work" / "signatures" / f".00000.parquet.k1ll3d{manifest.UNFINISHED}"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"PAR1")
    deduplicate(src, out, Options(), jobs=1)
    assert not left.exists()
