"""Lists of addresses: downloaded by the real img2dataset from a server of this machine, every row a row."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from test_dedup_download import Site, picture, serve

from dedup import manifest, sources
from dedup.export import Options as ExportOptions
from dedup.export import export
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, Transfer, urls


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with serve() as address:
        yield address


# name or address, what the manifest says of it, and a part of the reason
ROWS = [
    ("0", "ok", None),
    ("late", "ok", None),
    ("never", "missing", "timed out"),
    ("broken", "unreadable", "not an image"),
    ("gone", "missing", "HTTP Error 404"),
    ("moved", "ok", None),
    ("huge", "ok", None),
    ("1", "ok", None),
    ("0", "ok", None),
    ("loop", "missing", "infinite loop"),
    ("ü 漢.png", "ok", None),
    ("file:///etc/passwd", "missing", "unknown url type: file"),
    ("ftp://127.0.0.1/x.png", "missing", "unknown url type: ftp"),
    (None, "missing", "unknown url type"),
    ("file", "missing", "not allowed"),
    ("short", "missing", "IncompleteRead"),
    ("noai", "missing", "X-Robots-Tag"),
    ("empty", "unreadable", "zero bytes"),
    ("http://127.0.0.1:1/", "missing", "refused"),
]
CAPTIONS = [None if number == 7 else f"größe 漢 {number}" for number in range(len(ROWS))]


@pytest.fixture(scope="module")
def listed(site: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As LAION writes them, with a column that is called like one of img2dataset's."""
    path = tmp_path_factory.mktemp("list") / "shop.parquet"
    addresses = [name if name is None or "://" in name else f"{site}/{name}" for name, _, _ in ROWS]
    more = {"similarity": [n / 4 for n in range(len(ROWS))], "width": list(range(len(ROWS)))}
    pl.DataFrame({"URL": addresses, "TEXT": CAPTIONS, **more}).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def done(listed: Path) -> tuple[Path, dict]:
    """OUT and run.json of the one download that all tests share: in two shards, of four rows and threads."""
    out = listed.parent / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr(urls, "ROWS_PER_SHARD", 10)
    picture(7, 1200)
    transfer = Transfer(timeout=8, retries=0, threads=4, private=True)
    run = deduplicate(listed, out, Options(level="exact"), jobs=1, transfer=transfer)
    patch.undo()
    return out, run


@pytest.mark.slow
def test_every_row_is_a_row(done: tuple[Path, dict]) -> None:
    """Within a shard those that arrived in the order of the list, then those that did not, with the reason."""
    out, run = done
    rows = manifest.read(out)
    expected = [
        number
        for shard in (range(10), range(10, len(ROWS)))
        for missing in (False, True)
        for number in shard
        if (ROWS[number][1] == "missing") == missing
    ]
    assert rows["key"].to_list() == [f"{number:06d}" for number in expected]
    for row, number in zip(rows.iter_rows(named=True), expected, strict=True):
        _, status, reason = ROWS[number]
        assert (row["caption"], row["status"]) == (CAPTIONS[number], status), row
        assert (reason or "") in (row["error"] or ""), row
        assert "\n" not in (row["error"] or "")
    assert run["src"] == str(out / "download")
    assert run["origin"] == str(out.parent / "shop.parquet")
    assert run["counts"]["dropped"] == 3  # the address that stands twice, the one that leads to another, the two of 3


@pytest.mark.slow
def test_bytes_are_those_of_the_server(done: tuple[Path, dict]) -> None:
    out, run = done
    ok = manifest.read(out).filter(status="ok")
    where = ok.select("shard", "offset", "size", "key").rows()
    found = {key: sources.read_image(Path(run["src"]), *place, key) for *place, key in where}
    seeds = {0: picture(0), 1: picture(3), 5: picture(1), 6: picture(7, 1200), 7: picture(1), 8: picture(0)}
    assert found == {f"{number:06d}": data for number, data in seeds.items()} | {"000010": picture(3)}
    told = pl.read_parquet(out / "download" / "00000.parquet")
    assert told["similarity"].to_list() == [n / 4 for n in range(10)]
    assert told["listed_width"].to_list() == list(range(10))


@pytest.mark.slow
def test_exports_of_what_was_downloaded(done: tuple[Path, dict], tmp_path: Path, site: str) -> None:
    out, _ = done
    counts = export(out, tmp_path / "urls", ExportOptions("urls"))
    kept = pl.read_parquet(tmp_path / "urls" / "urls.parquet")
    assert counts["without_url"] == 0
    assert kept["url"].to_list() == [f"{site}/{name}" for name in ("0", "late", "moved", "huge")]
    export(out, tmp_path / "same")
    records = [r for shard in sources.list_shards(tmp_path / "same") for r in sources.read_shard(shard)]
    assert [r.key for r in records] == ["000000", "000001", "000005", "000006"]


@pytest.mark.slow
def test_what_is_there_is_not_asked_for_again(done: tuple[Path, dict], listed: Path) -> None:
    """Nothing of a download that is complete; of another the shards that are missing. Equal answers, equal bytes."""
    out, run = done
    before = read_shards(out / "download")
    asked = len(Site.asked)
    again = Transfer(out / "download", timeout=8, retries=0, threads=4, private=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls, "ROWS_PER_SHARD", 10)
        assert deduplicate(listed, out, Options(level="exact"), jobs=1, transfer=again) == run
        assert len(Site.asked) == asked
        (out / "download" / "00001_stats.json").unlink()
        (out / "download" / "00001.tar").write_bytes(b"half")
        sources.fetch(listed, Layout(), again)
    assert {*Site.asked[asked:]} == {"%C3%BC%20%E6%BC%A2.png", "file", "short", "noai", "empty"}
    assert read_shards(out / "download") == before


def read_shards(folder: Path) -> dict[str, bytes]:
    """Without the statistics, which hold times."""
    return {path.name: path.read_bytes() for path in folder.glob("0*") if path.suffix != ".json"}


@pytest.mark.slow
def test_a_killed_run_leaves_nobody_at_work(site: str, tmp_path: Path) -> None:
    (tmp_path / "urls.csv").write_text(f"url\n{site}/never\n")
    options = ["-o", tmp_path / "out", "--timeout", "300", "--private", "allow"]
    command = [sys.executable, "-c", "from eval.cli import main; main()", "dedup", tmp_path / "urls.csv", *options]
    asked = len(Site.asked)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(Site.asked) == asked and time.time() < deadline:
        time.sleep(0.1)
    assert Site.asked[asked:] == ["never"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while (left := find_processes(str(tmp_path))) and time.time() < deadline:
        time.sleep(0.1)
    assert left == []


def find_processes(word: str) -> list[str]:
    """Command lines that hold the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return [line for line in found if word in line]


# --- without img2dataset ---------------------------------------------------------------------------------------------


def shuffle(archive: Path) -> None:
    """Samples in the order of another arrival, at another time."""
    with tarfile.open(archive) as plain:
        members = [(info, plain.extractfile(info).read()) for info in plain]  # type: ignore[union-attr]
    with tarfile.open(archive, "w") as mixed:
        for info, data in sorted(members, key=lambda pair: pair[0].name.partition(".")[0], reverse=True):
            info.mtime = time.time()
            mixed.addfile(info, io.BytesIO(data))


def test_the_order_of_arrival_is_forgotten(tmp_path: Path) -> None:
    """Rows that img2dataset has lost come back, and an empty caption stays none."""
    (tmp_path / urls.WORK).mkdir()
    listed = pl.DataFrame({"url": ["a", "b", "c", "d"], "caption": ["A", None, "C", "D"]})
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for key, data in (("00000000", b"0"), ("00000001", b"1")):
            for suffix in ("jpg", "json", "txt"):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = 1
                archive.addfile(info, io.BytesIO(data))
    arrived = {"url": ["c", "a", "b"], "caption": ["C", "A", None], "key": ["00000002", "00000000", "00000001"]}
    arrived |= {"status": ["failed_to_download", "success", "success"], "error_message": ["two\nlines", None, None]}
    pl.DataFrame(arrived).write_parquet(tmp_path / "00000.parquet")
    urls.settle(tmp_path, 0, listed)
    first = (tmp_path / "00000.tar").read_bytes()
    shuffle(tmp_path / "00000.tar")
    (tmp_path / urls.WORK / "00000.settled").unlink()
    urls.settle(tmp_path, 0, listed)
    assert (tmp_path / "00000.tar").read_bytes() == first
    with tarfile.open(tmp_path / "00000.tar") as archive:
        expected = ["00000000.jpg", "00000000.json", "00000000.txt", "00000001.jpg", "00000001.json"]
        assert archive.getnames() == expected
    told = pl.read_parquet(tmp_path / "00000.parquet").select("key", "caption", "error_message").rows()
    assert told == [
        ("00000000", "A", None),
        ("00000001", None, None),
        ("00000002", "C", "two lines"),
        ("00000003", "D", urls.LOST),
    ]


def test_columns_of_a_list(tmp_path: Path) -> None:
    """Numbers stay numbers, what JSON cannot say becomes text, and names of img2dataset's are put aside."""
    rows = [
        {"link": " http://a/1 ", "Title": "ä", "n": 1, "mixed": 1, "tags": ["x"], "status": "new", "big": 2**70},
        {"link": None, "Title": ["", "b"], "n": None, "mixed": "\ud800", "tags": None, "status": None, "big": 1},
    ]
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert urls.is_list(tmp_path / "shop.jsonl", Layout())
    assert urls.read_list(tmp_path / "shop.jsonl", Layout()).to_dict(as_series=False) == {
        "url": ["http://a/1", ""],
        "caption": ["ä", "b"],
        "n": [1, None],
        "mixed": ["1", "?"],
        "tags": ['["x"]', None],
        "listed_status": ["new", None],
        "big": [str(2**70), "1"],
    }


@pytest.mark.parametrize(
    ("header", "layout", "expected"),
    [
        ("url,text", Layout(), True),
        ("URL,TEXT", Layout(), True),
        ("image_url", Layout(), True),
        ("image,url", Layout(), False),  # paths, and where they came from
        ("image,url", Layout(url_column="url"), True),
        ("image,url", Layout(format="urls"), True),
        ("image", Layout(url_column="image"), True),
        ("text,url", Layout(image_column="text"), False),
        ("text,url", Layout(format="table"), False),
        ("text", Layout(), False),
    ],
)
def test_what_is_a_list(tmp_path: Path, header: str, layout: Layout, expected: bool) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n")
    assert urls.is_list(tmp_path / "a.csv", layout) == expected


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        (
            "text\na\n",
            Layout(format="urls"),
            "no column of addresses: name it by --url-column; it has the columns text$",
        ),
        ("url\nx\n", Layout(url_column="adress"), "the --url-column 'adress' is not there; it has the columns url$"),
        ("url,id\nx,1\n", Layout(id_column="id"), r"--id-column is not of a list of addresses"),
        ("url\n", Layout(), "no addresses: it has no rows$"),
        ("url,text\nx,y,z\n", Layout(), "line 2: 3 fields, but 2 columns"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: str, layout: Layout, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        sources.fetch(tmp_path / "a.csv", layout, Transfer(tmp_path / "download"))
    with pytest.raises(SourceError, match=r"a list of addresses is one file that ends in \.csv"):
        sources.fetch(tmp_path, Layout(url_column="url"))


def test_a_folder_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("url\nftp://a\n")
    (tmp_path / "b.csv").write_text("url\nftp://b\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(SourceError, match=r"full holds something else than a download: choose another --download$"):
        sources.fetch(tmp_path / "a.csv", Layout(), Transfer(tmp_path / "full"))
    monkeypatch.setattr(urls, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as missing:
        sources.fetch(tmp_path / "a.csv", Layout(), Transfer(tmp_path / "download"))
    assert missing.value.name == "img2dataset"
    with pytest.raises(SourceError, match=r"holds the download of another list than .*b\.csv: choose another"):
        sources.fetch(tmp_path / "b.csv", Layout(), Transfer(tmp_path / "download"))
    with pytest.raises(SourceError, match="`unmemorize dedup` downloads them"):
        sources.fetch(tmp_path / "a.csv", Layout())


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "raise SystemExit('no room left')",
            r"img2dataset ended with code 1 \(no room left\): see .*log\.txt; the same",
        ),
        ("print('Retried')", r"left 1 of 1 shards undone \(Retried\)"),
        ("import time; time.sleep(60)", r"has done nothing for 1 s"),
    ],
)
def test_a_download_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text("url\nftp://a\n")
    (tmp_path / "failing").write_text(f"#!{sys.executable}\n{program}\n")
    (tmp_path / "failing").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "failing"))
    monkeypatch.setattr(urls, "STARTING", 1.0)
    with pytest.raises(SourceError, match=message) as told:
        sources.fetch(tmp_path / "a.csv", Layout(), Transfer(tmp_path / "download", timeout=0.001))
    assert "\n" not in str(told.value)
