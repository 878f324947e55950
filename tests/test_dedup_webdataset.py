"""Tar shards: the reader agrees with `tarfile`, says where an archive is damaged, and finds shards by pattern."""

import gzip
import io
import os
import random
import subprocess
import sys
import tarfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dedup import manifest, sources
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources import SourceError, webdataset
from dedup.sources.demo import write_shard
from dedup.sources.img2dataset import read_failed

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
HOLLOW = (*LINKS, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)


def picture(seed: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def pack(members: Mapping[str, bytes], *, kind: int = tarfile.PAX_FORMAT, mtime: float = 1.5) -> bytes:
    """A tar archive. With its defaults as webdataset writes it: a fraction of a second needs a PAX header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_all(src: Path) -> list[sources.Record]:
    return [record for shard in sources.list_shards(src) for record in sources.read_shard(shard)]


# --- the reader and tarfile ----------------------------------------------------------------------------------------

parts = st.one_of(
    st.sampled_from([b"..", b"a.jpg", b"\xff\xfe", "größe".encode(), b"new\nline", b"x" * 90, b"%41", b" "]),
    st.binary(min_size=1, max_size=60).map(lambda b: b.replace(b"\0", b"_").replace(b"/", b"_")),
    st.text("abcä漢", min_size=1, max_size=80).map(str.encode),
)
names = st.builds(
    lambda absolute, some: b"/" * absolute + b"/".join(some), st.booleans(), st.lists(parts, min_size=1, max_size=6)
)
member = st.tuples(names, st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, *HOLLOW]), st.binary(max_size=1_100))
archives = st.tuples(
    st.sampled_from(FORMATS), st.lists(member, min_size=1, max_size=6), st.sampled_from([0, 7.25]), st.booleans()
)


def build(drawn: tuple[int, list[tuple[bytes, bytes, bytes]], float, bool]) -> bytes:
    """The archive that tarfile writes. Names that do not fit USTAR are left out."""
    kind, members, mtime, with_global = drawn
    buffer = io.BytesIO()
    shared = {"comment": "of all"} if with_global else None
    with tarfile.open(fileobj=buffer, mode="w", format=kind, pax_headers=shared) as archive:
        for name, type_, data in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.type, info.mtime = type_, mtime  # type: ignore[assignment]
            if type_ in LINKS:
                info.linkname = "target/" * 30 if kind != tarfile.USTAR_FORMAT else "target"
            elif type_ == tarfile.REGTYPE:
                info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:
                continue
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(archives, st.booleans())
def test_the_reader_equals_tarfile(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[int, list, float, bool], compressed: bool
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    path = folder / ("x.tar.gz" if compressed else "x.tar")
    path.write_bytes(gzip.compress(build(drawn), 1) if compressed else build(drawn))
    expected, links = [], 0
    with tarfile.open(path, "r:*") as archive:
        for info in archive:
            links += info.issym() or info.islnk()
            if info.isreg():
                data = archive.extractfile(info).read()  # type: ignore[union-attr]
                expected.append((info.name.encode("utf-8", "surrogateescape"), info.offset_data, info.size, data))
    found = list(webdataset.read_members(path))
    assert [tuple(m)[:4] for m in found if m.problem is None] == expected
    assert sum(m.problem is not None for m in found) == links
    for _, offset, size, data in reversed(expected):  # backwards: in a compressed file that starts anew
        assert sources.read_image(folder, path.name, offset, size, "") == data


@settings(max_examples=150, deadline=None)
@given(archives, st.data(), st.booleans())
def test_a_cut_archive_gives_what_is_whole_and_says_that_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[int, list, float, bool],
    data: st.DataObject,
    compressed: bool,
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    whole = build(drawn)
    path.write_bytes(whole)
    members = list(webdataset.read_members(path))
    assume(members)
    last = members[-1].offset + members[-1].size
    cut = data.draw(st.integers(0, last - 1))
    path.write_bytes(gzip.compress(whole, 1)[:-9] if compressed else whole[:cut])  # 8 bytes: checksum and length
    found, said = [], False
    try:
        for one in webdataset.read_members(path):
            found.append(one)
    except SourceError:
        said = True
    if compressed:
        assert found == members
        assert said
        return
    complete = [m for m in members if m.offset + m.size <= cut]
    assert found[: len(complete)] == complete
    in_padding = any(0 <= cut - (m.offset + m.size) < 512 for m in members)
    assert said or cut % 512 == 0 or in_padding or any("ends inside" in (m.problem or "") for m in found)


@settings(max_examples=200, deadline=None)
@given(archives, st.data())
def test_no_bytes_make_the_reader_crash(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[int, list, float, bool], data: st.DataObject
) -> None:
    damaged = bytearray(build(drawn))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(4_000, len(damaged) - 1)))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # with the checksum put right, so that what lies behind it is reached
        damaged[148:156] = b"%06o\0 " % (sum(damaged[:148]) + sum(damaged[156:512]) + 256)
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(damaged)
    with suppress(SourceError):
        records = list(sources.read_shard(webdataset.list_shards(path.parent, [path])[0]))
        assert all(record.data is not None or record.error for record in records)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_header_is_said_and_nothing_before_it_is_lost(tmp_path: Path, kind: int, compressed: bool) -> None:
    """`tarfile` ends there without a word."""
    archive = bytearray(pack({"a.png": picture(1), "a.txt": b"a", "b.png": picture(2)}, kind=kind, mtime=1))
    archive[archive.rindex(b"b.png")] ^= 1
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(archive) if compressed else archive)  # the name says nothing: the content does
    run = deduplicate(path, tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows["status"].to_list() == ["ok", "unreadable"]
    assert rows["caption"][0] == "a"
    assert "bad header at byte" in rows["error"][1]
    assert run["counts"]["unreadable"] == 1


def test_a_wrong_checksum_of_gzip_and_a_second_archive_are_said(tmp_path: Path) -> None:
    plain = pack({"a.png": picture(1)})
    wrong = bytearray(gzip.compress(plain))
    wrong[-8] ^= 1
    for name, data, expected in (("x.tar.gz", bytes(wrong), "CRC"), ("x.tar", plain + plain, "joined")):
        (tmp_path / name).write_bytes(data)
        found = webdataset.read_members(tmp_path / name)
        assert next(found).data == picture(1)
        with pytest.raises(SourceError, match=expected):
            next(found)


def test_a_cut_caption_is_no_caption(tmp_path: Path) -> None:
    archive = pack({"a.png": picture(1), "a.txt": b"a long caption"})
    (tmp_path / "x.tar").write_bytes(archive[: archive.index(b"a long caption") + 6])
    deduplicate(tmp_path, tmp_path.parent / "out-cut", Options(), jobs=1)
    rows = manifest.read(tmp_path.parent / "out-cut")
    assert rows.select("status", "caption").rows() == [("ok", None), ("missing", None)]
    assert rows["error"][1] == ".txt: shard ends inside this member (6 of 14 bytes)"


def test_hidden_members_are_no_samples_and_links_are_rows(tmp_path: Path) -> None:
    buffer = io.BytesIO(
        pack({"._a.jpg": b"AppleDouble", "x/.b.jpg": b"", "a.jpg": picture(1), "a.seg.png": picture(2)})
    )
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("README"))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    found = [(record.key, record.error) for record in read_all(tmp_path)]
    assert found[:2] == [("a", None), ("a", None)]
    assert found[2:] == [("c", "a link, which holds no bytes of its own"), ("README", "sample without an image")]


# --- which shards SRC names ----------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """data/{one,two}/0000{0,1,2}.tar with one picture each."""
    for number in range(6):
        path = tmp_path / "data" / ("one", "two")[number // 3] / f"{number % 3:05d}.tar"
        write_shard(path, [(f"k{number}", {"png": picture(number), "txt": b"text"})])
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("one/00000.tar", ["00000.tar"]),
        ("one/*.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("one", ["00000.tar", "00001.tar", "00002.tar"]),
        (".", ["one/00000.tar", "one/00001.tar", "one/00002.tar", "two/00000.tar", "two/00001.tar", "two/00002.tar"]),
        ("*/00001.tar", ["one/00001.tar", "two/00001.tar"]),
        ("**/00002.tar", ["one/00002.tar", "two/00002.tar"]),
        ("two/{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{two,one}/{00001..00000}.tar", ["two/00001.tar", "two/00000.tar", "one/00001.tar", "one/00000.tar"]),
        ("{one/*,two/00000}.tar", ["one/00000.tar", "one/00001.tar", "one/00002.tar", "two/00000.tar"]),
        ("one/{00000,00000}.tar", ["00000.tar"]),
    ],
)
def test_patterns_name_shards_that_are_found_again(
    shards: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    monkeypatch.chdir(shards)
    out = shards.parent / "out"
    run = deduplicate(Path(pattern), out, Options(), jobs=1)
    monkeypatch.chdir("/")  # run.json alone tells where the bytes are
    rows = manifest.read(out)
    assert rows["shard"].to_list() == expected
    for row in rows.iter_rows(named=True):
        data = sources.read_image(Path(run["src"]), row["shard"], row["offset"], row["size"], row["key"])
        assert data == picture(int(row["key"][1:]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "one/{00001..00399}.tar",
            r"one/00003.tar: no such folder or tar shard \(397 of the 399 that {00001..00399}.tar names are missing\)$",
        ),
        ("one/x*.tar", r"one/x\*.tar: no such folder or tar shard$"),
        ("gone", "gone: no such folder or tar shard$"),
        ("one/{00000..00001.tar", "braces differ in number"),
        ("one/list.txt", r"list.txt: SRC is a folder, a table, or shards that end in .tar, .tar.gz, .tgz$"),
        ("{" + ",".join(f"one/{n:05d}" for n in range(99)) + "}.tar", r"one/00003.tar: no such .*96 of the 99"),
    ],
)
def test_what_names_no_shards_is_one_clear_line(shards: Path, pattern: str, message: str) -> None:
    (shards / "one" / "list.txt").write_text("no shard")
    with pytest.raises(SourceError, match=message) as caught:
        deduplicate(shards / pattern, shards.parent / "out", Options(), jobs=1)
    assert "\n" not in str(caught.value)
    assert not (shards.parent / "out").exists()


def test_wildcards_in_the_name_of_what_exists_are_letters(shards: Path) -> None:
    strange = shards.parent / "set[1]{a,b}"
    shards.rename(strange)
    assert [shard.name for shard in sources.list_shards(strange / "one")] == ["00000.tar", "00001.tar", "00002.tar"]
    (shard,) = sources.list_shards(strange / "two" / "00001.tar")
    assert sources.read_image(strange / "two" / "00001.tar", shard.name, 512, len(picture(4)), "k4") == picture(4)


def test_a_folder_is_its_images_and_its_shards(shards: Path) -> None:
    for name in ("loose.png", "deep/down/loose.png", ".hidden/x.png", ".x.png"):
        path = shards / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(9))
    below = [record.key for record in read_all(shards)]
    assert below == ["deep/down/loose.png", "loose.png", "k0", "k1", "k2", "k3", "k4", "k5"]
    write_shard(shards / "top.tar", [("top", {"png": picture(7)})])  # as a planted dataset keeps others below
    assert [record.key for record in read_all(shards)] == ["deep/down/loose.png", "loose.png", "top"]


def test_results_of_an_earlier_run_are_no_source(shards: Path) -> None:
    out = shards / "one" / "out"
    deduplicate(shards / "one" / "00000.tar", out, Options(), jobs=1)
    (out / "report" / "thumbs").mkdir(parents=True)
    (out / "report" / "thumbs" / "0.jpg").write_bytes(picture(0))
    assert [record.key for record in read_all(shards / "one")] == ["k0", "k1", "k2"]


# --- img2dataset -----------------------------------------------------------------------------------------------------

IMG2DATASET = {
    "caption": pl.String,
    "url": pl.String,
    "key": pl.String,
    "status": pl.String,
    "error_message": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "original_width": pl.Int32,
    "original_height": pl.Int32,
    "exif": pl.String,
    "sha256": pl.String,
}


def write_list(path: Path, rows: list[tuple[str, str, str | None, str | None]]) -> None:
    """The parquet file beside a shard: key, status, error, caption."""
    given = [dict(zip(("key", "status", "error_message", "caption"), row, strict=True)) for row in rows]
    pl.DataFrame([dict.fromkeys(IMG2DATASET) | row for row in given], schema=IMG2DATASET).write_parquet(path)


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """As img2dataset 1.47 leaves it with `--output_format webdataset`: members in the order of arrival."""
    src = tmp_path / "laion"
    src.mkdir()
    members = {}
    for key, caption in (("000000002", "two"), ("000000000", "zero")):
        record = f'{{"caption": "{caption}", "key": "{key}", "status": "success"}}'
        members |= {f"{key}.jpg": picture(int(key)), f"{key}.json": record.encode(), f"{key}.txt": caption.encode()}
    (src / "00000.tar").write_bytes(pack(members))
    (src / "00000_stats.json").write_text('{"count": 4, "successes": 2}')
    write_list(
        src / "00000.parquet",
        [
            ("000000000", "success", None, "zero"),
            ("000000001", "failed_to_download", "HTTP Error 404: Not Found", "<b>one</b>"),
            ("000000002", "success", None, "two"),
            ("000000003", "failed_to_resize", "Image decoding error", None),
        ],
    )
    return src


def test_failed_downloads_are_rows(downloaded: Path, tmp_path: Path) -> None:
    deduplicate(downloaded, tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out").select("key", "shard", "caption", "status", "error").rows()
    assert rows == [
        ("000000002", "00000.tar", "two", "ok", None),
        ("000000000", "00000.tar", "zero", "ok", None),
        ("000000001", "00000.tar", "<b>one</b>", "missing", "failed_to_download: HTTP Error 404: Not Found"),
        ("000000003", "00000.tar", None, "missing", "failed_to_resize: Image decoding error"),
    ]


def test_failed_downloads_are_told_though_the_shard_is_damaged(downloaded: Path) -> None:
    path = downloaded / "00000.tar"
    path.write_bytes(path.read_bytes()[:1_300])  # into the second header
    records = sources.read_shard(sources.list_shards(downloaded)[0])
    assert [next(records).key, next(records).key] == ["000000001", "000000003"]
    with pytest.raises(SourceError, match="bad header at byte 1,024: the archive ends inside it"):
        next(records)


def test_foreign_and_broken_lists(downloaded: Path) -> None:
    path = downloaded / "00000.parquet"
    pl.DataFrame({"anything": [1]}).write_parquet(path)
    assert len(read_all(downloaded)) == 2
    path.unlink()
    assert len(read_all(downloaded)) == 2
    path.write_bytes(b"PAR1 and no more")
    *_, last = read_all(downloaded)
    assert last.key == "00000.parquet"
    assert "cannot be read" in (last.error or "")
    pl.DataFrame({"key": [1, None], "status": [None, "success"]}).write_parquet(path)  # neither text nor complete
    *_, last = read_all(downloaded)
    assert (last.key, last.error) == ("1", "None: None")


def test_no_damaged_list_ends_the_process(tmp_path: Path) -> None:
    """Among these 700 is one that polars, which wrote it, does not survive when it reads it."""
    path, rng = tmp_path / "00000.parquet", random.Random(1)
    write_list(path, [(f"{n:09d}", "failed_to_download", "why", "caption") for n in range(50)])
    whole = path.read_bytes()
    for _ in range(700):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place, value = rng.randrange(len(whole)), rng.randrange(256)
            damaged[place] = value
        path.write_bytes(damaged)
        assert all(record.error for record in read_failed(path))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_list_makes_the_reader_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("list")
    path = folder / "00000.parquet"
    write_list(path, [(f"{n:09d}", "failed_to_download", "why", "caption") for n in range(50)])
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 10))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    (folder / "00000.tar").write_bytes(pack({"a.png": b"x"}))
    assert read_all(folder)[0].key == "a"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_what_img2dataset_writes_is_read(tmp_path: Path, layout: str) -> None:
    """The real program, against a server of this process with two pictures, one page and one that is missing."""
    pytest.importorskip("img2dataset", reason="the extra `urls` is not installed")
    site = tmp_path / "site"
    site.mkdir()
    for number in range(2):
        (site / f"{number}.png").write_bytes(picture(number))
    (site / "page.png").write_text("<html></html>")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        urls = tmp_path / "urls.csv"
        listed = "".join(f"{address}/{name}.png,the {name} one\n" for name in ("0", "1", "page", "gone"))
        urls.write_text("url,caption\n" + listed)
        arguments = {
            **{"url_list": urls, "input_format": "csv", "url_col": "url", "caption_col": "caption"},
            **{"output_folder": tmp_path / "data", "output_format": layout, "enable_wandb": False},
            **{"processes_count": 1, "thread_count": 2, "image_size": 96, "resize_mode": "no"},
        }
        command = [sys.executable, "-c", "from img2dataset.main import main; main()"]
        options = [f"--{name}={value}" for name, value in arguments.items()]
        environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        subprocess.run([*command, *options], check=True, timeout=300, env=environment, capture_output=True)
        server.shutdown()
    records = read_all(tmp_path / "data")
    good = {record.caption: record.data for record in records if record.data is not None}
    bad = {record.caption: record.error for record in records if record.data is None}
    assert good.keys() == {"the 0 one", "the 1 one"}
    assert (bad["the gone one"] or "").startswith("failed_to_download: HTTP Error 404")
    assert (bad["the page one"] or "").startswith("failed_to_resize")
    assert len(records) == 4
