"""Folders of images: captions from metadata, text and JSON; what img2dataset leaves in files; limits."""

import io
import json
import os
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from dedup import manifest, sources
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources import SourceError, folder


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(src: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = src / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return src


def captions(src: Path) -> dict[str, str | None]:
    return {r.key: r.caption for shard in sources.list_shards(src) for r in sources.read_shard(shard)}


def test_captions_stand_beside_the_image(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{name}.png": picture() for name in ("both", "text", "json", "other", "none")}
    files |= {"both.txt": "from text\n", "both.json": '{"caption": "from json"}', "text.txt": "\ufeffwith a mark"}
    files |= {"json.json": '{"caption": " only json "}', "other.json": '["no", "caption"]'}
    assert captions(fill(tmp_path, files)) == {
        "both.png": "from text",
        "text.png": "with a mark",
        "json.png": "only json",
        "other.png": None,
        "none.png": None,
    }


CSV = "file_name,text\na.png,007\nsub/b.png,words\n./c.png,\n"
METADATA: list[tuple[str, bytes | str]] = [
    ("metadata.csv", CSV),
    (
        "metadata.jsonl",
        "".join(f'{{"file_name": "{n}", "text": "{t}"}}\n' for n, t in (("a.png", "007"), ("sub/b.png", "words"))),
    ),
]


@pytest.mark.parametrize(("name", "content"), METADATA)
def test_metadata_wins_over_what_stands_beside(tmp_path: Path, name: str, content: str) -> None:
    files: dict[str, bytes | str] = {name: content, "a.png": picture(), "a.txt": "beside", "sub/b.png": picture()}
    files |= {"c.png": picture(), "c.txt": "beside c"}
    assert captions(fill(tmp_path, files)) == {"a.png": "007", "c.png": "beside c", "sub/b.png": "words"}


def test_parquet_metadata_and_the_nearest_one(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": picture(), "sub/b.png": picture(), "sub/c.png": picture()})
    pl.DataFrame({"file_name": ["a.png", "sub/b.png", "sub/c.png"], "caption": ["a", "far b", "far c"]}).write_parquet(
        tmp_path / "metadata.parquet"
    )
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "near b", "more": [1]}\n')
    assert captions(tmp_path) == {"a.png": "a", "sub/b.png": "near b", "sub/c.png": "far c"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "name,text\na.png,x\n", "needs the columns file_name and text or caption; it has name, text"),
        ("metadata.csv", 'file_name,text\n"a.png,x\nb.png,y,z\n', "cannot be read"),
        ("metadata.csv", "", "cannot be read"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\nno json\n', "cannot be read"),
        ("metadata.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_metadata_that_cannot_be_read_is_an_error_before_anything_starts(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    src = fill(tmp_path / "src", {"a.png": picture(), "sub/b.png": picture(), f"sub/{name}": content})
    with pytest.raises(SourceError, match=message) as caught:
        deduplicate(src, tmp_path / "out", Options(), jobs=1)
    assert str(caught.value).startswith(f"{src}/sub/{name}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_metadata_is_read_once_whatever_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FILES_PER_SHARD", 2)
    fill(tmp_path, {f"{n}.png": picture() for n in range(5)})
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n}.png,text {n}\n" for n in range(5)))
    shards = sources.list_shards(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    assert [len(shard.members) for shard in shards] == [2, 2, 1]
    read = [(r.key, r.caption) for shard in shards for r in sources.read_shard(shard)]
    assert read == [(f"{n}.png", f"text {n}") for n in range(5)]


def test_order_is_that_of_the_bytes_of_the_path(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a-.png", "a.png", "A.png", "ä.png", os.fsdecode(b"\xe4.png"), "\U0001f600.png"]
    fill(tmp_path, {name: picture() for name in names})
    found = [os.fsencode(name) for name in sources.list_files(tmp_path)]
    assert found == sorted(os.fsencode(name) for name in names)
    assert [manifest.decode_name(key) for key in captions(tmp_path)] == found


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """As img2dataset 1.47 leaves it with `--output_format files`; nothing of the second shard arrived."""
    src = tmp_path / "laion"
    for key in ("000000000", "000000002"):
        sample = {"caption": f"c{key[-1]}", "url": f"https://example.org/{key}", "key": key, "status": "success"}
        fill(src / "00000", {f"{key}.jpg": picture(int(key)), f"{key}.txt": f"c{key[-1]}"})
        fill(src / "00000", {f"{key}.json": json.dumps(sample)})
    (src / "00001").mkdir()
    for shard, keys in (("00000", range(3)), ("00001", range(10_000, 10_002))):
        failed = [key % 2 == 1 or shard == "00001" for key in keys]
        pl.DataFrame(
            {
                "caption": [f"c{key}" for key in keys],
                "key": [f"{key:09d}" for key in keys],
                "status": ["failed_to_download" if f else "success" for f in failed],
                "error_message": ["<urlopen error timed out>" if f else None for f in failed],
                "width": pl.Series([None if f else 8 for f in failed], dtype=pl.Int32),
            }
        ).write_parquet(src / f"{shard}.parquet")
        fill(src, {f"{shard}_stats.json": '{"count": 3}'})
    return src


def test_failed_downloads_are_rows(downloaded: Path, tmp_path: Path) -> None:
    deduplicate(downloaded, tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out").select("key", "source", "shard", "caption", "status", "error").rows()
    error = "failed_to_download: <urlopen error timed out>"
    assert rows == [
        ("00000/000000001", "00000", None, "c1", "missing", error),
        ("00000/000000000.jpg", "00000", None, "c0", "ok", None),
        ("00000/000000002.jpg", "00000", None, "c2", "ok", None),
        ("00001/000010000", "00001", None, "c10000", "missing", error),
        ("00001/000010001", "00001", None, "c10001", "missing", error),
    ]


def test_other_parquet_files_are_not_looked_at(downloaded: Path) -> None:
    (downloaded / "foreign.parquet").write_bytes(b"no folder of this name")
    (downloaded / "known").mkdir()
    pl.DataFrame({"a": [1]}).write_parquet(downloaded / "known.parquet")
    assert len(captions(downloaded)) == 5


def test_a_file_larger_than_any_image_is_a_row_and_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": picture(), "b.jpg": b"", "a.txt": b""})
    for name in ("b.jpg", "a.txt"):
        os.truncate(tmp_path / name, sources.MAX_BYTES + 1)  # a hole: no bytes on the disk
    first, second = sources.read_shard(sources.list_shards(tmp_path)[0])
    assert (first.key, first.caption) == ("a.png", None)
    assert (second.key, second.data) == ("b.jpg", None)
    assert "more than 2,147,483,648 bytes" in (second.error or "")
