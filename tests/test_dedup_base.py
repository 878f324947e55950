"""A grown dataset: what an earlier run published stays, only new pictures are hashed, the rest is as from scratch."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dedup_features import photograph
from test_dedup_pipeline import by_key, encode, picture
from typer.testing import CliRunner

from dedup import base, clustering, features, fingerprint, images, manifest, sources
from dedup.cli import app
from dedup.options import Options, OptionsError, resolve_auto
from dedup.pipeline import deduplicate

RESULTS = ["manifest/00000.parquet", "pairs.parquet", "deduplicated.parquet", "kept.txt", "dropped.csv"]
MIRROR = Image.Transpose.FLIP_LEFT_RIGHT


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read_results(out: Path) -> dict[str, Any]:
    run = manifest.read_run(out)
    about, chosen = run.pop("base", None), run["options"].pop("base")
    return {name: (out / name).read_bytes() for name in RESULTS} | {"run": run, "base": about, "chosen": chosen}


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """The first argument of every call of a function, which does what it did."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(module, name)

    def record(first: Any, *more: Any, **named: Any) -> Any:
        calls.append(first)
        return original(first, *more, **named)

    monkeypatch.setattr(module, name, record)
    return calls


SMALL = encode(picture(1, 100), "JPEG", quality=80)
LARGE = encode(picture(1), "PNG")
OLD = {
    "a.jpg": SMALL,
    "again.jpg": SMALL,  # equal bytes
    "b.png": encode(picture(2), "PNG"),
    "b.webp": encode(picture(2, 120), "WEBP", quality=90),
    "c.png": encode(picture(3), "PNG"),
    "bad.jpg": b"<html>404</html>",
}
LOSING = {  # nothing that beats a published row
    "00.webp": encode(picture(3, 100), "WEBP", quality=80),
    "new.png": encode(picture(4), "PNG"),
    "new.jpg": encode(picture(4), "JPEG", quality=80),
    "turned.jpg": encode(picture(2, 120).transpose(MIRROR), "JPEG", quality=90),
    "z.jpg": SMALL,
    "zbad.jpg": b"nothing",
}
WINNING = LOSING | {"0.png": LARGE, "c2.png": encode(picture(3).resize((320, 320)), "PNG")}


def test_published_rows_stay_whatever_comes(tmp_path: Path) -> None:
    src = write(tmp_path / "src", OLD)
    deduplicate(src, tmp_path / "old", Options())
    write(src, WINNING)
    run = deduplicate(src, tmp_path / "grown", Options(base=str(tmp_path / "old")), jobs=1)
    before, now = by_key(tmp_path / "old"), by_key(tmp_path / "grown")
    kept = {key for key, row in before.items() if row["keep"]}
    assert kept == {"a.jpg", "b.png", "c.png"}
    assert {key for key, row in now.items() if row["keep"]} == kept | {"new.png", "turned.jpg"}
    assert now["0.png"]["kept_id"] == now["again.jpg"]["kept_id"] == now["z.jpg"]["kept_id"] == now["a.jpg"]["id"]
    assert now["a.jpg"]["represents"] == 4
    scratch = deduplicate(src, tmp_path / "scratch", Options())
    assert by_key(tmp_path / "scratch")["0.png"]["keep"]
    assert "base" not in scratch
    digest = fingerprint.hashing.digest((tmp_path / "old" / "run.json").read_bytes())
    assert run["base"] == {
        "out": str(tmp_path / "old"),
        "run_sha256": digest,
        "rows": 6,
        "known": 7,
        "hashed_again": False,
        "published": 3,
        "gone": 0,
        "kept_gone": 0,
    }


def test_two_published_rows_both_stay(tmp_path: Path) -> None:
    """As they may when another threshold, or another bridge between them, makes them copies now."""
    src = write(tmp_path / "src", {"a.jpg": SMALL, "b.jpg": encode(picture(1, 90), "JPEG", quality=80)})
    deduplicate(src, tmp_path / "old", Options("exact"))
    recorded = manifest.read_json(tmp_path / "old" / "run.json")
    recorded["options"]["level"] = "hash"
    manifest.write_json(tmp_path / "old" / "run.json", recorded)
    deduplicate(src, tmp_path / "grown", Options(base=str(tmp_path / "old")), jobs=1)
    rows = by_key(tmp_path / "grown")
    assert all(row["keep"] and row["represents"] == 1 for row in rows.values())
    assert rows["a.jpg"]["cluster_id"] == rows["b.jpg"]["cluster_id"]


@pytest.mark.parametrize("level", ["exact", "hash", "copy"])
def test_what_no_survivor_loses_by_is_as_from_scratch(tmp_path: Path, level: str) -> None:
    options = Options(level)
    src = write(tmp_path / "src", OLD)
    deduplicate(src, tmp_path / "old", options, jobs=1)
    write(src, LOSING)
    deduplicate(src, tmp_path / "scratch", options, jobs=1)
    deduplicate(src, tmp_path / "grown", Options(level, base=str(tmp_path / "old")), jobs=1)
    scratch, grown = (read_results(tmp_path / name) for name in ("scratch", "grown"))
    assert (scratch.pop("base"), scratch.pop("chosen")) == (None, None)
    assert grown.pop("base")["published"] == {"exact": 4, "hash": 3, "copy": 3}[level]
    assert grown.pop("chosen") == str(tmp_path / "old")
    assert grown == scratch


def test_old_shards_are_not_read_and_known_bytes_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "src"
    write_tar(src / "0.tar", OLD)
    write_tar(src / "1.tar", {"d.png": encode(picture(5), "PNG")})
    deduplicate(src, tmp_path / "old", Options(), jobs=1)
    write_tar(src / "2.tar", WINNING | {"known.png": OLD["b.png"]})
    read = count_calls(monkeypatch, sources, "read_shard")
    decoded = count_calls(monkeypatch, images, "decode_luma")
    run = deduplicate(src, tmp_path / "grown", Options(base=str(tmp_path / "old")), jobs=1)
    assert [shard.name for shard in read] == ["2.tar"]
    assert not {SMALL, OLD["b.png"]} & set(decoded)
    assert len(decoded) == len(WINNING) - 1
    assert run["base"]["known"] == len(OLD) + 1 + 2
    old, grown = manifest.read(tmp_path / "old"), manifest.read(tmp_path / "grown")
    same = ["id", "shard", "key", "keep", *fingerprint.OF_BYTES]
    assert grown.head(len(old)).select(same).equals(old.select(same))  # ids too, because old shards come first


def test_a_new_folder_may_hold_the_old_files_elsewhere(tmp_path: Path) -> None:
    old = write(tmp_path / "first", OLD | {"also.jpg": SMALL})
    deduplicate(old, tmp_path / "old", Options(), jobs=1)
    kept = (tmp_path / "old" / "kept.txt").read_text().split()
    grown = write(tmp_path / "second", WINNING)
    shutil.copytree(old, grown / "batch-1")
    (grown / "batch-1" / "b.png").rename(grown / "renamed.png")
    (grown / "batch-1" / "c.png").unlink()
    (grown / "batch-1" / "also.jpg").unlink()
    run = deduplicate(grown, tmp_path / "grown", Options(base=str(tmp_path / "old")), jobs=1)
    rows = by_key(tmp_path / "grown")
    assert sorted(kept) == ["a.jpg", "b.png", "c.png"]
    assert rows["batch-1/a.jpg"]["keep"]
    assert rows["renamed.png"]["keep"]
    assert not rows["batch-1/again.jpg"]["keep"]
    assert rows["batch-1/a.jpg"]["source"] == "batch-1"
    assert run["base"] | {"run_sha256": ""} == {
        "out": str(tmp_path / "old"),
        "run_sha256": "",
        "rows": 7,
        "known": 6,  # z.jpg too
        "hashed_again": False,
        "published": 2,
        "gone": 1,  # z.jpg stands for also.jpg
        "kept_gone": 1,
    }


def test_shards_in_another_folder_are_taken_over_with_their_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "first" / "0.tar", OLD)
    deduplicate(tmp_path / "first", tmp_path / "old", Options(), jobs=1)
    shutil.copytree(tmp_path / "first", tmp_path / "second")  # times too
    write_tar(tmp_path / "second" / "1.tar", LOSING)
    deduplicate(tmp_path / "second", tmp_path / "scratch", Options(), jobs=1)
    read = count_calls(monkeypatch, sources, "read_shard")
    deduplicate(tmp_path / "second", tmp_path / "grown", Options(base=str(tmp_path / "old")), jobs=1)
    assert [shard.name for shard in read] == ["1.tar"]
    assert set(manifest.read(tmp_path / "grown")["source"]) == {"second"}
    results = [(tmp_path / name / "manifest/00000.parquet").read_bytes() for name in ("scratch", "grown")]
    assert results[0] == results[1]


def test_features_of_known_pictures_are_not_extracted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tmp_path / "src"
    photographs = {f"{n}.jpg": encode(Image.fromarray(photograph(n)), "JPEG", quality=90) for n in range(6)}
    write(src, photographs)
    deduplicate(src, tmp_path / "old", Options("copy"), jobs=1)
    extracted = count_calls(monkeypatch, features, "extract")
    for name in ("0-crop", "7"):
        image = Image.fromarray(photograph(int(name[0])))
        image = image.crop((20, 10, 280, 220)) if "crop" in name else image
        (src / f"{name}.jpg").write_bytes(encode(image, "JPEG", quality=95))
    deduplicate(src, tmp_path / "grown", Options("copy", base=str(tmp_path / "old")), jobs=1)
    assert len(extracted) == 2
    deduplicate(src, tmp_path / "scratch", Options("copy"), jobs=1)
    assert len(extracted) == 2 + 8
    grown, scratch = (read_results(tmp_path / name) for name in ("grown", "scratch"))
    assert grown["pairs.parquet"] == scratch["pairs.parquet"]
    assert by_key(tmp_path / "grown")["0.jpg"]["keep"]


def test_the_same_bytes_whatever_the_workers_and_after_a_kill(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_tar(src / "0.tar", OLD)
    deduplicate(src, tmp_path / "old", Options(), jobs=1)
    digests = {path: path.read_bytes() for path in sorted((tmp_path / "old").rglob("*")) if path.is_file()}
    write_tar(src / "1.tar", WINNING)
    write_tar(src / "2.tar", LOSING)
    options = Options(base=str(tmp_path / "old"))
    for jobs in (1, 2):
        deduplicate(src, tmp_path / f"{jobs}", options, jobs=jobs)
    first = read_results(tmp_path / "1")
    assert first == read_results(tmp_path / "2")
    (tmp_path / "1" / "run.json").unlink()
    shutil.rmtree(tmp_path / "1" / "manifest")
    for path in (tmp_path / "1" / ".work").glob("signatures/*[01].parquet"):
        path.unlink()
    deduplicate(src, tmp_path / "1", options, jobs=1)
    assert first == read_results(tmp_path / "1")
    assert digests == {path: path.read_bytes() for path in sorted((tmp_path / "old").rglob("*")) if path.is_file()}


def test_bases_that_do_not_fit_are_refused_in_a_line(tmp_path: Path) -> None:
    src = write(tmp_path / "src", OLD)
    old = tmp_path / "old"
    deduplicate(src, old, Options(), jobs=1)
    for options, says in (
        (Options("copy", base=str(old)), "level was 'hash', not 'copy'"),
        (Options(hash_decode="exact", base=str(old)), "hash_decode was 'fast', not 'exact'"),
        (Options(max_pixels=9, max_frames=3, base=str(old)), "max_pixels was .*, max_frames was 1000, not 3"),
        (Options(encoder="sscd", base=str(old)), "encoder was 'local', not 'sscd'"),
    ):
        with pytest.raises(base.BaseError, match=says) as caught:
            deduplicate(src, tmp_path / "new", options)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionsError, match="cannot be its own base"):
        deduplicate(src, old, Options(base=str(old)))
    with pytest.raises(manifest.ManifestError, match="no finished dedup run"):
        deduplicate(src, tmp_path / "new", Options(base=str(src)))
    assert not (tmp_path / "new").exists()


def test_other_versions_are_hashed_again_and_survivors_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write(tmp_path / "src", OLD)
    deduplicate(src, tmp_path / "old", Options(), jobs=1)
    recorded = manifest.read_json(tmp_path / "old" / "run.json")
    recorded["versions"]["pillow"] = "1.0"
    manifest.write_json(tmp_path / "old" / "run.json", recorded)
    write(src, WINNING)
    decoded = count_calls(monkeypatch, images, "decode_luma")
    run = deduplicate(src, tmp_path / "grown", Options(base=str(tmp_path / "old")), jobs=1)
    assert len(decoded) == len(OLD) + len(WINNING)
    assert run["base"]["hashed_again"]
    assert by_key(tmp_path / "grown")["a.jpg"]["keep"]


def test_the_command_goes_on_with_the_level_of_the_base_and_says_what_is_gone(tmp_path: Path) -> None:
    src = write(tmp_path / "src", OLD)
    deduplicate(src, tmp_path / "old", Options("exact"), jobs=1)
    (src / "c.png").unlink()
    assert resolve_auto("auto", "auto", tmp_path / "new", tmp_path / "old") == ("exact", "local")
    words = ["dedup", src, "-o", tmp_path / "new", "--base", tmp_path / "old", "--no-report", "--max-bad", 1]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "Base: 5 images were known, 3 of them published: those stay." in done.output
    assert "1 images of the base are gone from SRC, 1 of them kept ones." in done.output
    assert json.loads((tmp_path / "new" / "run.json").read_text())["options"]["base"] == str(tmp_path / "old")


def test_as_many_equal_files_are_published_as_were_kept() -> None:
    columns = ["id", "shard", "key", "keep", "sha256"]
    before = pl.DataFrame(
        [(0, "0.tar", "x", True, "s"), (1, "0.tar", "x", True, "s"), (2, "0.tar", "y", True, "t")],
        schema=columns,
        orient="row",
    )
    now = pl.DataFrame(
        [
            (0, "9.tar", "q", "s"),
            (1, "9.tar", "x", "s"),
            (2, "0.tar", "x", "s"),
            (3, "1.tar", "z", "t"),
            (4, None, "w", None),
        ],
        schema=["id", "shard", "key", "sha256"],
        orient="row",
    )
    old = base.Base(Path("old"), Path("src"), "", before, True)
    assert base.find_published(old, now).to_list() == [False, True, True, True, False]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_published_survivors_never_flip(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 12))
    numbers = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] < pair[1])
    ends = data.draw(st.lists(numbers, unique=True, max_size=30))
    turn = st.lists(st.sampled_from(["r0", "r0", "m0", "r90"]), min_size=len(ends), max_size=len(ends))
    kind = st.lists(st.sampled_from(["copy", "copy", "look-alike"]), min_size=len(ends), max_size=len(ends))
    pairs = pl.DataFrame(
        {
            "a": [a for a, _ in ends],
            "b": [b for _, b in ends],
            "class": data.draw(kind),
            "orientation": data.draw(turn),
        },
        schema={"a": pl.Int64, "b": pl.Int64, "class": pl.String, "orientation": pl.String},
    ).with_columns(signal=pl.lit("pdq"))
    published = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    natural = np.array(data.draw(st.permutations(range(n))))
    rank = np.empty(n, np.int64)
    rank[np.lexsort((natural, ~published))] = np.arange(n)
    flips = data.draw(st.sampled_from(["keep", "drop"]))
    order = pl.Series(rank)
    decided = clustering.decide(pairs, order, flips=flips, published=pl.Series(published))
    keep = decided["keep"].to_numpy()
    assert keep[published].all()
    direct = {frozenset(pair[:2]) for pair in pairs.filter(pl.col("class") == "copy").rows()}
    for row, (kept, kept_id, cluster) in enumerate(decided.select("keep", "kept_id", "cluster_id").iter_rows()):
        assert kept == (kept_id is None)
        if not kept:
            assert keep[kept_id]
            assert {row, kept_id} in direct
            assert decided["cluster_id"][kept_id] == cluster
    plain = clustering.decide(pairs, order, flips=flips)
    if plain["keep"].to_numpy()[published].all():
        assert plain.equals(decided)
