"""The whole deduplication on generated folders and shards: what is dropped, what is kept, what is said of bad input."""

import io
import tarfile
from pathlib import Path

import imagehash
import numpy as np
import polars as pl
import pytest
from PIL import Image

from dedup import manifest, sources
from dedup.options import Options, OptionsError, resolve_auto
from dedup.pipeline import deduplicate


def picture(seed: int, size: int = 160) -> Image.Image:
    """Noise at several scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((160, 160, 3))
    for cells in (3, 6, 12, 24, 48, 160):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((160, 160), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
    image = Image.fromarray((total * (255 / total.max())).astype(np.uint8))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def files() -> dict[str, bytes]:
    red = Image.new("RGB", (160, 160), "white")
    red.paste((220, 30, 30), (40, 30, 120, 130))
    blue = Image.new("RGB", (160, 160), "white")
    blue.paste((30, 30, 220), (40, 30, 120, 130))
    return {
        "a.png": encode(picture(1), "PNG"),
        "b.png": encode(picture(1), "PNG"),  # equal bytes
        "c.jpg": encode(picture(1), "JPEG", quality=80),
        "d.webp": encode(picture(1, 120), "WEBP", quality=90),
        "e.png": encode(picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
        "f.png": encode(picture(2), "PNG"),
        "red.png": encode(red, "PNG"),
        "blue.png": encode(blue, "PNG"),
        "bad.jpg": b"<html>404</html>",
        "cut.jpg": encode(picture(3), "JPEG")[:900],
        "empty.png": b"",
    }


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    src = tmp_path / "src"
    src.mkdir()
    for name, data in files.items():
        (src / name).write_bytes(data)
    (src / "c.txt").write_text("a caption")
    return src


def by_key(out: Path) -> dict[str, dict]:
    return {row["key"]: row for row in manifest.read(out).iter_rows(named=True)}


def test_copies_go_and_others_stay(folder: Path, tmp_path: Path) -> None:
    run = deduplicate(folder, tmp_path / "out", Options())
    rows = by_key(tmp_path / "out")
    kept = {key for key, row in rows.items() if row["keep"]}
    assert len(kept & {"a.png", "b.png", "c.jpg", "d.webp"}) == 1
    assert {"e.png", "f.png", "red.png", "blue.png"} <= kept
    assert rows["e.png"]["orientation"] == "m0"  # a mirrored copy names its orientation and stays
    keeper = rows[min(kept & {"a.png", "b.png"})]
    assert keeper["represents"] == 4
    assert keeper["captions"] == ["a caption"]
    assert {key for key, row in rows.items() if row["status"] != "ok"} == {"bad.jpg", "cut.jpg", "empty.png"}
    assert run["counts"]["dropped"] == 3


def test_flips_can_be_dropped(folder: Path, tmp_path: Path) -> None:
    deduplicate(folder, tmp_path / "out", Options(flips="drop"))
    assert by_key(tmp_path / "out")["e.png"]["kept_id"] is not None


def test_deciding_anew_hashes_nothing_and_equals_a_new_run(folder: Path, tmp_path: Path) -> None:
    for name in ("out", "new"):
        deduplicate(folder, tmp_path / name, Options(flips="drop" if name == "new" else "keep"))
    signatures = sorted((tmp_path / "out" / ".work" / "signatures").iterdir())
    before = [path.stat().st_mtime_ns for path in signatures]
    deduplicate(folder, tmp_path / "out", Options(flips="drop"))
    assert before == [path.stat().st_mtime_ns for path in signatures]
    for name in ("manifest/00000.parquet", "pairs.parquet", "run.json", "dropped.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_the_same_bytes_whatever_the_workers_and_on_resume(folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    deduplicate(folder, outs[0], Options(), jobs=1)
    deduplicate(folder, outs[1], Options(), jobs=2)
    names = ["manifest/00000.parquet", "pairs.parquet", "kept.txt", "dropped.csv", "deduplicated.jsonl", "run.json"]
    first = [(outs[0] / name).read_bytes() for name in names]
    assert first == [(outs[1] / name).read_bytes() for name in names]
    deduplicate(folder, outs[0], Options(), jobs=1)
    assert first == [(outs[0] / name).read_bytes() for name in names]


def test_shards_are_read_in_place(tmp_path: Path, files: dict[str, bytes]) -> None:
    src = tmp_path / "shards"
    src.mkdir()
    with tarfile.open(src / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {"../x/evil.png": files["a.png"], "y.png": files["b.png"], "y.txt": b"why"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    run = deduplicate(src, tmp_path / "out", Options())
    table = manifest.read(tmp_path / "out")
    assert run["counts"]["dropped"] == 1
    for row in table.iter_rows(named=True):
        assert sources.read_image(src, row["shard"], row["offset"], row["size"], row["key"]) == files["a.png"]
    assert table.filter(pl.col("key") == "y")["caption"].item() == "why"
    assert not (tmp_path / "x").exists()


def test_a_truncated_shard_keeps_what_came_before(tmp_path: Path, files: dict[str, bytes]) -> None:
    src = tmp_path / "shards"
    src.mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("a.png", "f.png"):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
    end = 512 + -(-len(files["a.png"]) // 512) * 512 + 512 + 100  # header, data, header, a piece of the data
    (src / "00000.tar").write_bytes(buffer.getvalue()[:end])
    deduplicate(src, tmp_path / "out", Options())
    assert [row["status"] for row in by_key(tmp_path / "out").values()] == ["ok", "missing"]


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="inside the source"):
        deduplicate(folder, folder / "out", Options())
    deduplicate(folder, tmp_path / "out", Options())
    with pytest.raises(OptionsError, match="max_pixels was 100000000"):
        deduplicate(folder, tmp_path / "out", Options(max_pixels=1))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(sources.SourceError, match="no images"):
        deduplicate(tmp_path / "nothing", tmp_path / "other", Options())


def test_names_survive_whatever_their_bytes() -> None:
    for name in (b"plain.png", b"50%25.png", b"a%41.png", b"\xff\xfe.png", b"new\nline.png", "größe.png".encode()):
        assert manifest.decode_name(manifest.encode_name(name)) == name


def test_auto_goes_on_with_the_level_of_the_run(folder: Path, tmp_path: Path) -> None:
    assert resolve_auto("auto", "auto", tmp_path / "out") == ("copy", "local")
    assert resolve_auto("hash", "auto", tmp_path / "out") == ("hash", "local")
    deduplicate(folder, tmp_path / "out", Options("exact"))
    assert resolve_auto("auto", "auto", tmp_path / "out") == ("exact", "local")
    deduplicate(folder, tmp_path / "other", Options("copy", "local"))
    assert resolve_auto("auto", "auto", tmp_path / "other") == ("copy", "local")


def test_exact_hashing_is_imagehash_itself(folder: Path, tmp_path: Path) -> None:
    deduplicate(folder, tmp_path / "out", Options(hash_decode="exact"))
    for key, row in by_key(tmp_path / "out").items():
        if row["status"] == "ok":
            assert row["phash"] == str(imagehash.phash(Image.open(folder / key)))
            assert row["dhash"] == str(imagehash.dhash(Image.open(folder / key)))


def test_an_enlarged_copy_does_not_win(tmp_path: Path) -> None:
    """Nor do its byte-equal copies: they go where the first of them went."""
    src = tmp_path / "src"
    src.mkdir()
    original = picture(7)
    large = encode(original.resize((320, 320), Image.Resampling.BICUBIC), "PNG")
    for name, data in {"a.png": large, "b.png": large, "c.png": encode(original, "PNG")}.items():
        (src / name).write_bytes(data)
    deduplicate(src, tmp_path / "out", Options())
    rows = by_key(tmp_path / "out")
    assert [key for key, row in rows.items() if row["keep"]] == ["c.png"]
    assert {rows[key]["kept_id"] for key in ("a.png", "b.png")} == {rows["c.png"]["id"]}
    assert rows["a.png"]["effective_pixels"] == 160 * 160
    assert {row["cluster_id"] for row in rows.values()} == {rows["c.png"]["id"]}
    dropped = pl.read_csv(tmp_path / "out" / "dropped.csv")
    assert dropped["signal"].to_list() == ["pdq", "pdq"]
    assert (src / "c.png").name in (tmp_path / "out" / "kept.txt").read_text()


def test_a_small_difference_is_seen_up_close(tmp_path: Path) -> None:
    """Thumbnails agree, the pictures do not: both stay, and a third one that equals neither is compared with both."""
    src = tmp_path / "src"
    src.mkdir()
    plain = Image.new("RGB", (256, 256), "white")
    plain.paste(picture(5).convert("L").convert("RGB").resize((200, 120)), (28, 20))
    for number, place in enumerate([(60, 200), (120, 200), (180, 200)]):
        image = plain.copy()
        image.paste((30, 30, 30), (*place, place[0] + 4, place[1] + 4))
        image.save(src / f"{number}.png")
        image.save(src / f"{number}.webp", quality=95)
    deduplicate(src, tmp_path / "out", Options())
    rows = by_key(tmp_path / "out")
    assert {key for key, row in rows.items() if row["keep"]} == {"0.png", "1.png", "2.png"}
    for number in range(3):
        assert rows[f"{number}.webp"]["kept_id"] == rows[f"{number}.png"]["id"]
    pairs = pl.read_parquet(tmp_path / "out" / "pairs.parquet")
    names = {row["id"]: key for key, row in rows.items()}
    classes = {(names[a], names[b]): kind for a, b, kind in pairs.select("a", "b", "class").iter_rows()}
    assert classes["0.png", "1.png"] == classes["1.png", "2.png"] == "look-alike"
    assert pairs.filter(a=rows["0.png"]["id"], b=rows["1.png"]["id"])["worst_tile"].item() < 0.06  # alike at a glance


def test_a_crowd_is_said(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in range(70):
        image = picture(6)
        image.putpixel((0, 0), (number, 0, 0))
        image.save(src / f"{number:02d}.png")
    run = deduplicate(src, tmp_path / "out", Options())
    assert run["counts"]["rows_at_limit"] == 6  # those with 64 before them or more
    assert run["counts"]["kept"] == 70 - run["counts"]["dropped"]
