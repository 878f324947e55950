"""Marks of a person: what a file may say, how marks add up, and what they change in a run."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dedup_pipeline import picture

from dedup import manifest, marks
from dedup.options import Options
from dedup.pipeline import deduplicate

FILES = ("manifest/00000.parquet", "pairs.parquet", "run.json", "dropped.csv", "deduplicated.jsonl", "decisions.json")


def name(row: dict[str, Any]) -> dict[str, Any]:
    return {column: row[column] for column in ("sha256", "shard", "key")}


def mark(a: dict[str, Any], b: dict[str, Any], verdict: str, **more: str) -> marks.Mark:
    return {"a": name(a), "b": name(b), "verdict": verdict, **more}


def save(path: Path, *decisions: marks.Mark, **more: object) -> Path:
    path.write_text(json.dumps({"version": 1, "digest": "0" * 64, "decisions": decisions} | more))
    return path


def by_key(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in manifest.read(out).iter_rows(named=True)}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture in four files, two of them of equal bytes; three others, one of them smaller."""
    folder = tmp_path_factory.mktemp("src")
    for key in ("a.png", "b.png"):
        picture(1).save(folder / key)
    picture(1).save(folder / "c.jpg", quality=85)
    picture(1, 120).save(folder / "d.png")
    for number in (2, 3):
        picture(number).save(folder / f"other{number}.png")
    picture(4, 100).save(folder / "other4.png")
    return folder


@pytest.fixture(scope="module")
def plain(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without marks."""
    out = tmp_path_factory.mktemp("plain")
    deduplicate(src, out, Options(level="hash"), jobs=1)
    return out


def decide(src: Path, out: Path, *decisions: marks.Mark, level: str = "hash") -> dict[str, dict[str, Any]]:
    path = save(out.with_suffix(".json"), *decisions)
    deduplicate(src, out, Options(level=level), jobs=1, decisions=path)
    return by_key(out)


def test_what_a_person_denies_is_kept(src: Path, plain: Path, tmp_path: Path) -> None:
    before = by_key(plain)
    assert [key for key, row in before.items() if not row["keep"]] == ["b.png", "c.jpg", "d.png"]
    after = decide(src, tmp_path / "out", mark(before["a.png"], before["c.jpg"], "not-a-copy", note="a watermark"))
    assert after["c.jpg"]["reason"] is None
    ids = sorted(after[key]["id"] for key in ("a.png", "c.jpg"))
    pair = pl.read_parquet(tmp_path / "out" / "pairs.parquet").filter(pl.concat_list("a", "b") == ids)
    assert pair.select("class", "signal").row(0) == ("look-alike", "decision")
    assert pair["hamming"].item() is not None
    assert [key for key, row in after.items() if not row["keep"]] == ["b.png", "d.png"]
    assert after["d.png"] | {"cluster_size": 4} == before["d.png"]
    counts = manifest.read_run(tmp_path / "out")["counts"]["decisions"]
    assert {name: n for name, n in counts.items() if name != "digest"} == {"copy": 0, "not_a_copy": 1, "absent": 0}


def test_what_a_person_calls_a_copy_goes_though_no_search_found_it(src: Path, plain: Path, tmp_path: Path) -> None:
    before = by_key(plain)
    after = decide(src, tmp_path / "out", mark(before["other4.png"], before["other3.png"], "copy"))
    row = after["other4.png"]  # the smaller one
    assert (row["kept_id"], row["reason"], row["signal"]) == (after["other3.png"]["id"], "decision", "decision")
    assert (row["score"], row["orientation"]) == (None, "r0")
    assert after["other3.png"]["represents"] == 2
    pair = pl.read_parquet(tmp_path / "out" / "pairs.parquet").filter(signal="decision")
    assert pair.select("class", "hamming", "score").row(0) == ("copy", None, None)
    assert "other4.png,other3.png,decision,decision,,r0" in (tmp_path / "out" / "dropped.csv").read_text()


@pytest.mark.parametrize("level", ["hash", "copy"])
def test_confirming_changes_the_signal_only(src: Path, tmp_path: Path, level: str) -> None:
    deduplicate(src, tmp_path / "out", Options(level=level), jobs=1)
    before = by_key(tmp_path / "out")
    said = [mark(before["a.png"], before[key], "copy") for key in ("b.png", "c.jpg", "d.png")]
    after = decide(src, tmp_path / "out", *said, level=level)
    assert [after[key]["signal"] for key in ("b.png", "c.jpg", "d.png")] == ["bytes", "decision", "decision"]
    decided = {"signal", "reason"}
    for key, row in after.items():
        assert {k: v for k, v in row.items() if k not in decided} == {
            k: v for k, v in before[key].items() if k not in decided
        }


def test_an_enlarged_copy_does_not_win_by_being_confirmed(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    picture(1).save(src / "original.png")
    picture(1).resize((400, 400), Image.Resampling.BICUBIC).save(src / "enlarged.png")
    deduplicate(src, tmp_path / "out", Options(level="hash"), jobs=1)
    before = by_key(tmp_path / "out")
    assert before["original.png"]["keep"]
    after = decide(src, tmp_path / "out", mark(before["original.png"], before["enlarged.png"], "copy"))
    assert after["enlarged.png"]["reason"] == "decision"
    assert after["enlarged.png"]["kept_id"] == after["original.png"]["id"]


def test_equal_bytes_can_be_told_apart_by_place(src: Path, plain: Path, tmp_path: Path) -> None:
    before = by_key(plain)
    for level in ("exact", "hash", "copy"):
        after = decide(src, tmp_path / level, mark(before["b.png"], before["a.png"], "not-a-copy"), level=level)
        assert after["a.png"]["keep"]
        assert after["b.png"]["keep"]
        assert after["b.png"]["signal"] == "decision"


def test_a_mark_holds_for_all_rows_with_these_bytes(src: Path, plain: Path, tmp_path: Path) -> None:
    """Here it names the row that pairs do not speak of, and an old place."""
    before = by_key(plain)
    moved = before["b.png"] | {"key": "where it was.png", "shard": "00000.tar"}
    after = decide(src, tmp_path / "out", mark(moved, before["c.jpg"], "not-a-copy"))
    assert [key for key, row in after.items() if not row["keep"]] == ["b.png", "d.png"]
    copied = decide(src, tmp_path / "two", mark(moved, before["other3.png"], "copy"))
    gone = copied["other3.png"]["kept_id"] is not None
    assert gone != (copied["a.png"]["kept_id"] is not None)
    if not gone:
        assert copied["b.png"]["kept_id"] == copied["other3.png"]["id"]


def test_marks_are_remembered_and_equal_a_run_that_had_them_all(src: Path, plain: Path, tmp_path: Path) -> None:
    rows = by_key(plain)
    first = mark(rows["a.png"], rows["c.jpg"], "not-a-copy")
    second = mark(rows["other3.png"], rows["other4.png"], "copy", note="same print")
    elsewhere = mark(rows["a.png"] | {"sha256": "f" * 64}, rows["c.jpg"], "copy")
    decide(src, tmp_path / "grown", first)
    decide(src, tmp_path / "grown", second, elsewhere)
    decide(src, tmp_path / "once", elsewhere, second, first)
    files = [[(tmp_path / out / file).read_bytes() for file in FILES] for out in ("grown", "once")]
    assert files[0] == files[1]
    run = deduplicate(src, tmp_path / "grown", Options(level="hash"), jobs=1)
    assert [(tmp_path / "grown" / file).read_bytes() for file in FILES] == files[0]
    assert run["counts"]["decisions"]["absent"] == 1
    decide(src, tmp_path / "grown", mark(rows["c.jpg"], rows["a.png"], "copy"), second | {"verdict": "undecided"})
    after = by_key(tmp_path / "grown")
    assert not after["c.jpg"]["keep"]
    assert after["other4.png"]["keep"]
    decide(src, tmp_path / "grown", *(m | {"verdict": "undecided"} for m in (first, elsewhere)))
    same = [(tmp_path / "grown" / file).read_bytes() == (plain / file).read_bytes() for file in FILES[:-1]]
    assert all(same)


def test_marks_hold_under_other_policies(tmp_path: Path) -> None:
    """In each scope that holds both pictures, whichever row stands for them; whatever order of runs led there."""
    src = tmp_path / "src"
    for scope in ("one", "two"):
        (src / scope).mkdir(parents=True)
        picture(1).save(src / scope / "a.png")
        picture(1).save(src / scope / "c.jpg", quality=85)
        for number in (3, 4):
            picture(number).save(src / scope / f"other{number}.png")
    plain = {row["key"]: row for row in _rows(src, tmp_path / "plain").iter_rows(named=True)}
    said = [
        mark(plain["one/a.png"], plain["two/c.jpg"], "not-a-copy"),
        mark(plain["two/other3.png"], plain["one/other4.png"], "copy"),
    ]
    path = save(tmp_path / "said.json", *said)
    per = Options(level="copy", per="source", prefer="bytes")
    for name, first in (("anew", Options(level="copy")), ("at once", per)):
        for options in dict.fromkeys((first, per)):
            deduplicate(src, tmp_path / name, options, jobs=1, decisions=path)
    for file in FILES:
        assert (tmp_path / "anew" / file).read_bytes() == (tmp_path / "at once" / file).read_bytes(), file
    rows = manifest.read(tmp_path / "at once")
    for scope in ("one", "two"):
        mine = rows.filter(source=scope)
        assert mine.filter(pl.col("key").str.contains("a.png|c.jpg"))["keep"].all()
        other = mine.filter(pl.col("key").str.contains("other"))
        assert other["keep"].sum() == 1
        assert other.filter(~pl.col("keep"))["reason"].to_list() == ["decision"]
    whole = _rows(src, tmp_path / "whole", decisions=path).filter("keep")["key"].str.slice(4).sort().to_list()
    assert whole[:2] == ["a.png", "c.jpg"]
    assert len(whole) == 3


def _rows(src: Path, out: Path, **more: Any) -> pl.DataFrame:
    deduplicate(src, out, Options(level="hash"), jobs=1, **more)
    return manifest.read(out)


def test_a_grown_dataset_inherits_the_marks_of_its_base(src: Path, plain: Path, tmp_path: Path) -> None:
    """But what the base has published stays, whatever is said of it."""
    rows = by_key(plain)
    decide(src, tmp_path / "base", mark(rows["a.png"], rows["c.jpg"], "not-a-copy"))
    grown = Options(level="hash", base=str(tmp_path / "base"))
    said = save(tmp_path / "more.json", mark(rows["other3.png"], rows["other4.png"], "copy"))
    run = deduplicate(src, tmp_path / "out", grown, jobs=1, decisions=said)
    assert run["counts"]["decisions"] | {"digest": 0} == {"copy": 1, "not_a_copy": 1, "absent": 0, "digest": 0}
    after = by_key(tmp_path / "out")
    assert after["c.jpg"]["keep"]
    assert after["other4.png"]["keep"]
    pair = pl.read_parquet(tmp_path / "out" / "pairs.parquet").filter(pl.col("hamming").is_null(), signal="decision")
    assert pair["class"].to_list() == ["copy"]
    back = save(tmp_path / "back.json", mark(rows["a.png"], rows["c.jpg"], "undecided"))
    for decisions in (back, None):  # taken back, the base does not bring it again
        deduplicate(src, tmp_path / "out", grown, jobs=1, decisions=decisions)
        assert [m["verdict"] for m in marks.read_marks(tmp_path / "out" / "decisions.json")["decisions"]] == ["copy"]


def test_what_the_copy_search_finds_anew_stays_denied(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    whole = picture(1, 320)
    whole.save(src / "whole.png")
    whole.crop((30, 30, 290, 260)).save(src / "crop.png")
    picture(5).save(src / "other.png")
    deduplicate(src, tmp_path / "out", Options(level="copy"), jobs=1)
    rows = by_key(tmp_path / "out")
    assert not rows["crop.png"]["keep"]
    after = decide(src, tmp_path / "out", mark(rows["whole.png"], rows["crop.png"], "not-a-copy"), level="copy")
    assert after["crop.png"]["keep"]
    pair = pl.read_parquet(tmp_path / "out" / "pairs.parquet").row(0, named=True)
    assert (pair["class"], pair["signal"]) == ("look-alike", "decision")
    assert pair["inliers"] >= 12
    assert pair["transform"] is not None


GOOD = {"sha256": "0" * 64, "shard": None, "key": "a.png"}
OTHER = GOOD | {"sha256": "1" * 64}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"version": NaN, "decisions": []}', "NaN is no number"),
        ("[]", "holds no `decisions`"),
        ('{"version": 1}', "holds no `decisions`"),
        ('{"version": 2, "decisions": []}', "has version 2, and this program reads 1"),
        ('{"version": true, "decisions": []}', "has version True"),
        ('{"version": 1, "digest": 3, "decisions": []}', "its digest is no text"),
        ('{"version": 1, "decisions": [7]}', "decision 1 is no object"),
        (mark(GOOD, OTHER, "maybe"), "the verdict 'maybe' is none of copy, not-a-copy, undecided"),
        (mark(GOOD, OTHER, ["copy"]), "the verdict"),  # type: ignore[arg-type]
        (mark(GOOD, OTHER, "x" * 10_000 + "\n"), "the verdict 'xxx"),
        (mark(GOOD, GOOD, "copy"), "a and b are the same row"),
        (mark(GOOD, OTHER | {"sha256": "1" * 63}, "copy"), "decision 1, b: sha256 is not 64 digits"),
        (mark(GOOD, OTHER | {"sha256": 1}, "copy"), "sha256 is not"),
        (mark(GOOD | {"key": None}, OTHER, "copy"), "decision 1, a: key is no text"),
        (mark(GOOD | {"key": "\ud800"}, OTHER, "copy"), "key is no text"),
        (mark(GOOD | {"shard": 1}, OTHER, "copy"), "shard neither text nor null"),
        (mark(GOOD, OTHER, "copy", note=[]), "the note is no text"),  # type: ignore[arg-type]
        ({"a": GOOD, "verdict": "copy"}, "decision 1, b is no object"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str | dict[str, Any], says: str) -> None:
    path = tmp_path / "decisions.json"
    path.write_text(text if isinstance(text, str) else json.dumps({"version": 1, "decisions": [text]}))
    with pytest.raises(marks.MarksError) as error:
        marks.read_marks(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_contradictions_and_bytes_that_are_no_text_are_said(tmp_path: Path) -> None:
    path = save(tmp_path / "d.json", mark(GOOD, OTHER, "copy"), mark(OTHER | {"key": "z"}, GOOD, "not-a-copy"))
    with pytest.raises(marks.MarksError, match="decisions 1 and 2 contradict each other"):
        marks.read_marks(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(marks.MarksError, match="is not JSON"):
        marks.read_marks(path)


def test_a_bad_file_stops_before_anything_is_written(src: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("nonsense")
    with pytest.raises(marks.MarksError):
        deduplicate(src, tmp_path / "out", Options(), decisions=tmp_path / "bad.json")
    assert not (tmp_path / "out").exists()


ENDS = st.builds(
    lambda digit, shard, key: {"sha256": digit * 64, "shard": shard, "key": key},
    st.sampled_from("01"),
    st.sampled_from([None, "0.tar"]),
    st.sampled_from("xy"),
)
MARKS = st.lists(
    st.tuples(ENDS, ENDS, st.sampled_from(marks.VERDICTS))
    .filter(lambda said: said[0] != said[1])
    .map(lambda said: {"a": said[0], "b": said[1], "verdict": said[2]})
)


@settings(deadline=None)
@given(MARKS, st.integers(0, 9))
def test_merging_in_parts_is_merging_at_once(said: list[marks.Mark], cut: int) -> None:
    """With `undecided` kept apart: it takes back what came before, in whichever part."""
    whole = marks.merge(said)
    assert marks.merge([*marks.merge(said[:cut]), *said[cut:]]) == whole
    last = {frozenset((m["a"]["sha256"], m["b"]["sha256"])): m["verdict"] for m in said}
    different = {pair: verdict for pair, verdict in last.items() if len(pair) == 2 and verdict != "undecided"}
    found = {frozenset((m["a"]["sha256"], m["b"]["sha256"])): m["verdict"] for m in whole}
    assert {pair: verdict for pair, verdict in found.items() if len(pair) == 2} == different


def test_pictures_of_the_fixture_are_what_it_says(src: Path) -> None:
    assert (src / "a.png").read_bytes() == (src / "b.png").read_bytes()
    assert Image.open(src / "d.png").size == (120, 120)
