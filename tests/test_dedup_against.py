"""Pictures that must not be in the dataset: what is a copy of them goes, with its whole star, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image, ImageOps
from test_dedup_base import count_calls, encode, write, write_tar
from test_dedup_copies import WEB
from test_dedup_features import photograph
from test_dedup_pipeline import by_key
from typer.testing import CliRunner

from dedup import against, copies, manifest, neighbours, queries, sources
from dedup.cli import app
from dedup.export import Options as ExportOptions
from dedup.export import export
from dedup.options import Options, OptionsError
from dedup.pipeline import deduplicate

RESULTS = [
    "manifest/00000.parquet",
    "pairs.parquet",
    "against.parquet",
    "against.csv",
    "kept.txt",
    "dropped.csv",
    "run.json",
]


def photo(number: int) -> Image.Image:
    return Image.fromarray(photograph(number))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return encode(image, "JPEG", quality=quality)


def flat(kind: str) -> bytes:
    return encode(Image.new("RGB", (90, 60), (200, 30, 40)), kind, **({"compress_level": 1} if kind == "PNG" else {}))


DATASET = {f"web/{n:02d}.jpg": jpeg(photo(n)) for n in range(10)} | {
    "web/00-small.jpg": jpeg(photo(0).resize((150, 112)), 80),  # goes with 00.jpg
    "shop/00.jpg": jpeg(photo(0)),  # equal bytes
    "shop/03.jpg": jpeg(photo(3), 85),
    "shop/flat.png": flat("PNG"),
    "shop/bad.jpg": b"<html>404</html>",
}
TEST_SET = {
    "test/exact.jpg": DATASET["web/00.jpg"],
    "test/again.jpg": DATASET["web/00.jpg"],
    "test/encoded.webp": encode(photo(1), "WEBP", quality=80),
    "test/mirrored.jpg": jpeg(ImageOps.mirror(photo(2)), 85),
    "val/cropped.jpg": jpeg(WEB["crop"](photo(3)), 85),
    "val/flat.bmp": flat("BMP"),
    "val/other.jpg": jpeg(photo(50)),
    "val/bad.jpg": b"nothing",
}
EXACT = {"web/00.jpg", "web/00-small.jpg", "shop/00.jpg"}
HASHED = EXACT | {"web/01.jpg", "web/02.jpg", "shop/flat.png"}
EDITED = HASHED | {"web/03.jpg", "shop/03.jpg"}


def digests(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("against") / "src", DATASET)


@pytest.fixture(scope="module")
def other(src: Path) -> Path:
    return write(src.parent / "other", TEST_SET)


@pytest.fixture(scope="module")
def out(src: Path, other: Path) -> Path:
    before = digests(other)
    deduplicate(src, src.parent / "out", Options("copy", against=(str(other),)), jobs=1)
    assert digests(other) == before
    return src.parent / "out"


def external(out: Path) -> set[str]:
    return {key for key, row in by_key(out).items() if row["reason"] == "external"}


def test_exact_encoded_mirrored_and_cropped_copies_go_with_their_star(out: Path) -> None:
    assert external(out) == EDITED
    rows = by_key(out)
    for key in EDITED:
        row = rows[key]
        assert (row["status"], row["keep"], row["kept_id"], row["represents"]) == ("ok", False, None, 0)
        assert row["class"] == "copy"
        assert row["signal"] in against.SIGNALS
        assert row["score"] > 0.5
    assert [rows[key]["signal"] for key in ("web/00.jpg", "web/01.jpg", "shop/flat.png")] == ["bytes", "pdq", "pixels"]
    assert rows["web/02.jpg"]["orientation"] == "m0"
    assert rows["web/00-small.jpg"]["cluster_id"] == rows["web/00.jpg"]["cluster_id"]
    assert {key for key, row in rows.items() if row["keep"]} == {f"web/{n:02d}.jpg" for n in range(4, 10)}


def test_every_match_is_listed_with_its_evidence(out: Path, other: Path) -> None:
    table = pl.read_parquet(out / "against.parquet")
    assert dict(table.schema) == against.MATCHES
    assert set(table["against"]) == {str(other)}
    copies = table.filter(pl.col("class") == "copy")
    found = {(row["key"], row["other"]): row for row in copies.iter_rows(named=True)}
    with_their_star = EDITED - {key for key, _ in found}
    assert with_their_star <= {"web/00-small.jpg", "shop/03.jpg"}
    assert found["shop/00.jpg", "test/again.jpg"]["score"] == 1.0
    crop = found["web/03.jpg", "val/cropped.jpg"]
    assert (crop["signal"], crop["other_source"], crop["source"]) == ("copy", "val", "web")
    x, y, _ = pl.Series(crop["transform"]).to_numpy().reshape(3, 3) @ [0, 0, 1]
    assert (x, y) == pytest.approx((60 / 320, 45 / 320), abs=0.01)  # where the crop was cut out of the row
    for row in copies.iter_rows(named=True):
        data = sources.read_image(other, *(row[f"other_{name}"] for name in ("shard", "offset", "size", "key")))
        assert data == TEST_SET[row["other_key"]]
    assert pl.read_csv(out / "against.csv").height == len(table)


def test_counts_by_split_and_source(out: Path, other: Path) -> None:
    run = manifest.read_run(out)
    counts = run["counts"]
    assert counts["external"] == {
        "rows": 8,
        "matched": len(set(pl.read_parquet(out / "against.parquet").filter(pl.col("class") == "copy")["id"])),
        "sources": {"shop": 3, "web": 5},
        "published": 0,
    }
    [told] = counts["against"]
    assert (told["pictures"], told["unreadable"], told["copies"]) == (8, 1, 6)
    assert told["splits"]["test"]["copies"] == 4
    assert told["splits"]["val"] | {"same_scene": 0, "look_alike": 0} == {
        "pictures": 4,
        "unreadable": 1,
        "copies": 2,
        "same_scene": 0,
        "look_alike": 0,
    }
    assert counts["reasons"] == {"external": 8}
    assert counts["rows"] == counts["kept"] + counts["dropped"] + counts["unreadable"]
    assert run["against"][0]["src"] == str(other)
    listed = pl.read_csv(out / "dropped.csv")
    assert set(listed.filter(pl.col("reason") == "external")["dropped"]) == EDITED
    assert listed["kept"].null_count() == 8


@pytest.mark.parametrize(("level", "expected"), [("exact", EXACT - {"web/00-small.jpg"}), ("hash", HASHED)])
def test_other_levels_find_what_they_can_see(
    src: Path, other: Path, tmp_path: Path, level: str, expected: set[str]
) -> None:
    deduplicate(src, tmp_path / "out", Options(level, against=(str(other),)), jobs=1)
    assert external(tmp_path / "out") == expected


def test_a_finished_run_stands_for_all_that_it_saw(src: Path, other: Path, tmp_path: Path) -> None:
    """Also for what it dropped; and one picture file is a set of its own."""
    write_tar(tmp_path / "tars" / "0.tar", {k.replace("/", "-"): v for k, v in TEST_SET.items()})
    deduplicate(tmp_path / "tars", tmp_path / "done", Options("exact"), jobs=1)
    before = digests(tmp_path / "done") | digests(tmp_path / "tars")
    one = other / "val" / "cropped.jpg"
    names = (str(tmp_path / "done"), str(one))
    run = deduplicate(src, tmp_path / "out", Options("copy", against=names), jobs=1)
    assert external(tmp_path / "out") == EDITED
    assert [told["pictures"] for told in run["counts"]["against"]] == [8, 1]
    assert [told["copies"] for told in run["counts"]["against"]] == [6, 1]
    assert digests(tmp_path / "done") | digests(tmp_path / "tars") == before


def test_it_is_decided_anew_without_hashing_and_taken_back(src: Path, other: Path, tmp_path: Path) -> None:
    deduplicate(src, tmp_path / "plain", Options(), jobs=1)
    deduplicate(src, tmp_path / "out", Options(), jobs=1)
    signatures = sorted((tmp_path / "out" / ".work" / "signatures").iterdir())
    before = [path.stat().st_mtime_ns for path in signatures]
    deduplicate(src, tmp_path / "out", Options(against=(str(other),)), jobs=1)
    assert external(tmp_path / "out") == HASHED
    assert before == [path.stat().st_mtime_ns for path in signatures]
    deduplicate(src, tmp_path / "out", Options(), jobs=1)
    for name in ("manifest/00000.parquet", "pairs.parquet", "run.json", "dropped.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not (tmp_path / "out" / "against.parquet").exists()


def test_the_same_bytes_whatever_the_workers_and_after_a_kill(
    src: Path, other: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options("copy", against=(str(other),))
    first = {name: (out / name).read_bytes() for name in RESULTS}
    deduplicate(src, tmp_path / "out", options, jobs=2)
    assert first == {name: (tmp_path / "out" / name).read_bytes() for name in RESULTS}
    for name in ("run.json", "against.parquet"):
        (tmp_path / "out" / name).unlink()
    asked = count_calls(monkeypatch, queries, "match_part")
    deduplicate(src, tmp_path / "out", options, jobs=1)
    assert first == {name: (tmp_path / "out" / name).read_bytes() for name in RESULTS}
    assert asked == []
    write(tmp_path / "more", TEST_SET | {"val/04.jpg": DATASET["web/04.jpg"]})
    deduplicate(src, tmp_path / "out", Options("copy", against=(str(tmp_path / "more"),)), jobs=1)
    assert external(tmp_path / "out") == EDITED | {"web/04.jpg"}
    assert asked


def test_an_opt_out_wins_over_what_was_published(src: Path, other: Path, tmp_path: Path) -> None:
    deduplicate(src, tmp_path / "old", Options(), jobs=1)
    run = deduplicate(src, tmp_path / "new", Options(base=str(tmp_path / "old"), against=(str(other),)), jobs=1)
    assert external(tmp_path / "new") == HASHED
    assert run["counts"]["external"]["published"] == 4  # 00, 01, 02, flat


def test_a_picture_that_stands_often_is_looked_up_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More edited copies than are compared at first."""
    monkeypatch.setattr(copies, "ALL_PAIRS", 4)
    monkeypatch.setattr(neighbours, "K", 3)
    crops = {f"{n}.jpg": jpeg(photo(0).crop((22 * n, 14 * n, 22 * n + 200, 14 * n + 165))) for n in range(5)}
    src = write(tmp_path / "src", crops | {f"x{n}.jpg": jpeg(photo(100 + n)) for n in range(3)})
    other = write(tmp_path / "other", {"0.jpg": jpeg(photo(0), 95)})
    asked = count_calls(monkeypatch, queries, "match_part")
    deduplicate(src, tmp_path / "out", Options("copy", against=(str(other),)), jobs=1)
    found = pl.read_parquet(tmp_path / "out" / "against.parquet").filter(pl.col("class") == "copy")
    assert len(asked) == 2
    assert set(found["key"]) == set(crops)


def test_refusals_in_a_line(src: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"img_emb/img_emb_0.npy": b""})
    done = tmp_path / "done"
    deduplicate(src, done, Options("exact"), jobs=1)
    for options, error, says in (
        (Options(against=(str(src),)), against.AgainstError, "is SRC itself"),
        (Options(against=(str(done),)), against.AgainstError, "is SRC itself"),
        (Options(against=(str(tmp_path),)), against.AgainstError, "lies inside"),
        (Options(against=(str(tmp_path / "gone"),)), sources.SourceError, "no such"),
        (Options(against=(str(tmp_path / "empty"),)), sources.SourceError, "no images found"),
        (Options("copy", "external", str(tmp_path), against=(str(other),)), OptionsError, "--encoder instead"),
    ):
        with pytest.raises(error, match=says) as caught:
            deduplicate(src, tmp_path / "out", options, jobs=1)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_external_rows_are_no_duplicates_to_those_who_read_them(out: Path, tmp_path: Path) -> None:
    """Not exported with a weight, in no group of the report."""
    export(out, tmp_path / "weighted", ExportOptions("index", rows="weighted"), jobs=1)
    kept = (tmp_path / "weighted" / "keys.txt").read_text().split()
    assert not set(kept) & EDITED
    assert len(kept) == 6


def damage(table: pl.DataFrame, **values: Any) -> pl.DataFrame:
    """The first external row, changed."""
    row = table.filter(pl.col("reason") == "external")["id"][0]
    changes = [pl.when(pl.col("id") == row).then(pl.lit(v)).otherwise(pl.col(k)).alias(k) for k, v in values.items()]
    return table.with_columns(changes).select(pl.col(c).cast(t) for c, t in manifest.SCHEMA.items())


def test_the_manifest_says_what_external_means(out: Path) -> None:
    table = manifest.read(out)
    manifest.validate(table)
    kept = int(table.filter("keep")["id"][0])
    for values in ({"keep": True}, {"kept_id": kept}, {"represents": 1}):
        with pytest.raises(manifest.ManifestError, match="outside of the dataset"):
            manifest.validate(damage(table, **values))
    with pytest.raises(manifest.ManifestError, match="names no kept row"):
        manifest.validate(damage(table, reason="hash"))


def test_the_command_says_what_went(src: Path, other: Path, tmp_path: Path) -> None:
    words = ["dedup", src, "-o", tmp_path / "out", "--level", "hash", "--against", other, "--no-report", "--max-bad", 1]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "6 images were dropped for pictures outside, 6 as copies of them, 0 with their group." in done.output
    assert f"  {other}: 5 of 8 pictures stand in SRC (test 4 of 4, val 1 of 4); " in done.output
    shutil.rmtree(tmp_path / "out")
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--json"]])
    assert json.loads(done.output)["external"]["rows"] == 6
