"""Policies in whole runs: scopes, splits, preferences, caps, and deciding again what was decided before."""

import json
from pathlib import Path

import datasets
import polars as pl
import pytest
from playwright.sync_api import Page, expect
from test_dedup_pipeline import encode, picture
from typer.testing import CliRunner

from dedup import manifest, search
from dedup.export import Options as ExportOptions
from dedup.export import export
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.policy import PolicyError
from dedup.report import write_report
from eval.cli import app

RESULTS = ["manifest/00000.parquet", "pairs.parquet", "kept.txt", "dropped.csv", "deduplicated.jsonl", "run.json"]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources that share pictures: equal files, other formats, other sizes, a mirrored one."""
    src = tmp_path_factory.mktemp("web") / "src"
    files = {}
    for n in range(3):
        files[f"laion/{n}.jpg"] = encode(picture(n), "JPEG", quality=85)
        files[f"cc/{n}.png"] = encode(picture(n), "PNG")
        files[f"cc/{n}-again.png"] = files[f"cc/{n}.png"]
        files[f"laion/{n}-small.webp"] = encode(picture(n, 120), "WEBP", quality=90)
    files["laion/0-equal.png"] = files["cc/0.png"]
    files["cc/7.png"] = encode(picture(7), "PNG")
    files["laion/8.png"] = encode(picture(8), "PNG")
    files["laion/8-again.jpg"] = encode(picture(8), "JPEG", quality=70)
    for name, data in files.items():
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_bytes(data)
    return src


def run(src: Path, out: Path, **options: object) -> tuple[dict[str, dict], dict]:
    """Rows by key, counts."""
    counts = deduplicate(src, out, Options(**options), jobs=1)["counts"]  # type: ignore[arg-type]
    return {row["key"]: row for row in manifest.read(out).iter_rows(named=True)}, counts


def kept(rows: dict[str, dict]) -> set[str]:
    return {key for key, row in rows.items() if row["keep"]}


def test_what_is_preferred_is_kept(web: Path, tmp_path: Path) -> None:
    usual, _ = run(web, tmp_path / "out")
    assert {key.partition("/")[0] for key in kept(usual) - {"laion/8.png"}} == {"cc"}
    rows, _ = run(web, tmp_path / "out", prefer="source:laion,resolution")
    assert kept(rows) == {"laion/0-equal.png", "laion/1.jpg", "laion/2.jpg", "laion/8.png", "cc/7.png"}
    assert len(kept(rows)) == len(kept(usual))
    rows, _ = run(web, tmp_path / "out", prefer="quality")
    assert all(key.endswith(".png") for key in kept(rows))
    rows, _ = run(web, tmp_path / "out", prefer="first")
    assert "cc/0-again.png" in kept(rows)
    with pytest.raises(PolicyError, match=r"there is no such source; did you mean laion\?"):
        run(web, tmp_path / "out", prefer="source:lion")


def test_each_source_is_as_if_it_were_alone(web: Path, tmp_path: Path) -> None:
    rows, counts = run(web, tmp_path / "out", per="source")
    for source in ("cc", "laion"):
        alone, _ = run(web / source, tmp_path / source)
        assert {f"{source}/{key}" for key in kept(alone)} == {key for key in kept(rows) if key.startswith(source)}
    for row in rows.values():
        if row["kept_id"] is not None:
            assert list(rows.values())[row["kept_id"]]["source"] == row["source"]
    assert counts["leakage"] == [{"scopes": ["cc", "laion"], "pictures": 3, "rows": [3, 3]}]
    listed = pl.read_csv(tmp_path / "out" / "leakage.csv")
    assert sorted(listed["row"]) == sorted(kept(rows) - {"cc/7.png", "laion/8.png"})
    assert counts["losses"] == [{"scope": "laion", "rows": 9, "kept": 4}]
    run(web, tmp_path / "out", per="none")
    assert not (tmp_path / "out" / "leakage.csv").exists()


def test_several_copies_may_stay(web: Path, tmp_path: Path) -> None:
    one, _ = run(web, tmp_path / "out")
    files = [(tmp_path / "out" / name).read_bytes() for name in RESULTS]
    run(web, tmp_path / "out", max_copies=1)
    assert [(tmp_path / "out" / name).read_bytes() for name in RESULTS] == files
    two, _ = run(web, tmp_path / "out", max_copies=2)
    all_, counts = run(web, tmp_path / "out", max_copies=99)
    assert kept(one) < kept(two) < kept(all_) == set(all_)
    assert counts["dropped"] == 0
    stars = {row["cluster_id"] for row in one.values()}
    for star in stars:
        mine = [row for row in two.values() if row["cluster_id"] == star]
        assert sum(row["keep"] for row in mine) == min(2, len(mine))
        assert sum(row["represents"] for row in mine) == len(mine)


def test_crowds_are_searched_in_each_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More copies than a row keeps partners, and those of the other source come last in the usual order."""
    monkeypatch.setattr(search, "LIMIT", 4)
    monkeypatch.setattr(search.join_hamming, "__kwdefaults__", {"radius": 35, "limit": 4, "jobs": 1})
    for source, kind in (("a", "PNG"), ("b", "WEBP")):
        (tmp_path / "src" / source).mkdir(parents=True)
        for n in range(7):
            image = picture(6)
            image.putpixel((0, 0), (n, 0, 0))
            image.save(tmp_path / "src" / source / f"{n}.{kind.lower()}", kind)
    rows, _ = run(tmp_path / "src", tmp_path / "out", per="source")
    assert len(kept(rows)) == 2
    rows, _ = run(tmp_path / "src", tmp_path / "out", per="none", prefer="source:b")
    assert len(kept(rows)) == 1
    assert next(iter(kept(rows))).startswith("b")


# Splits


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train 0 … 5, test 6 … 9: train holds 1 twice and two pictures of test; test holds 5 twice."""
    folder = tmp_path_factory.mktemp("splits")
    png = [encode(picture(n), "PNG") for n in range(6)]
    jpeg = [encode(picture(n), "JPEG", quality=85) for n in range(6)]
    rows = {"train": [png[0], png[1], jpeg[1], png[2], jpeg[3], png[4]], "test": [png[3], png[2], png[5], jpeg[5]]}
    made = {}
    for split, images in rows.items():
        cells = [{"bytes": data, "path": None} for data in images]
        table = datasets.Dataset.from_dict({"image": cells, "text": [f"{split} {n}" for n in range(len(cells))]})
        made[split] = table.cast_column("image", datasets.Image(decode=False)).cast_column("image", datasets.Image())
    datasets.disable_progress_bars()
    datasets.DatasetDict(made).save_to_disk(folder / "saved")
    return folder / "saved"


def decide_splits(src: Path, out: Path, **options: object) -> tuple[list[int | None], dict]:
    counts = deduplicate(src, out, Options(**options), jobs=1)["counts"]  # type: ignore[arg-type]
    return manifest.read(out)["kept_id"].to_list(), counts


def test_splits_do_not_delete_each_other(splits: Path, tmp_path: Path) -> None:
    kept_id, counts = decide_splits(splits, tmp_path / "out")
    assert kept_id == [None, None, 1, None, None, None, None, None, None, 8]
    assert counts["leakage"] == [{"scopes": ["test", "train"], "pictures": 2, "rows": [2, 2]}]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["per"] == "split"
    listed = pl.read_csv(tmp_path / "out" / "leakage.csv")
    assert listed.select("picture", "scope", "row").rows() == [
        (6, "train", "train/data-00000-of-00001.arrow:4"),
        (6, "test", "test/data-00000-of-00001.arrow:0"),
        (7, "train", "train/data-00000-of-00001.arrow:3"),
        (7, "test", "test/data-00000-of-00001.arrow:1"),
    ]
    whole, _ = decide_splits(splits, tmp_path / "out", per="none")
    assert whole == [None, None, 1, 7, 6, None, None, None, None, 8]


def test_a_guarded_split_is_not_touched(splits: Path, tmp_path: Path) -> None:
    for per in ("auto", "none"):
        kept_id, counts = decide_splits(splits, tmp_path / "out", against_split="test", per=per, max_copies=2)
        assert kept_id == [None, None, None, 7, 6, None, None, None, None, None]
        kept_id, counts = decide_splits(splits, tmp_path / "out", against_split="test", per=per)
        assert kept_id == [None, None, 1, 7, 6, None, None, None, None, None]
        assert counts["reasons"] == {"hash": 1, "policy": 2}
        assert counts["leakage"] == []
        rows = manifest.read(tmp_path / "out")
        assert rows["captions"].to_list()[6:] == [["test 0"], ["test 1"], ["test 2"], ["test 3"]]
    with pytest.raises(PolicyError, match=r"^--against-split tests: there is no such split; did you mean test\? There"):
        decide_splits(splits, tmp_path / "out", against_split="tests")


def test_the_summary_says_what_is_left_in_two_splits(splits: Path, web: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(
        app, ["dedup", str(splits), "-o", str(tmp_path / "out"), "--level", "hash", "--jobs", "1"]
    )
    assert shown.exit_code == 0, shown.output
    assert "Leakage: 2 pictures are kept in test and in train (2 of test, 2 of train). Listed in" in shown.output
    words = [
        "dedup",
        str(web),
        "-o",
        str(tmp_path / "web"),
        "--level",
        "hash",
        "--per",
        "source",
        "--no-report",
        "--jobs",
        "1",
    ]
    shown = CliRunner().invoke(app, [*words, "--max-loss", "0.4"])
    assert "Alarm: laion (56%), cc (43%) lost more than 40% (--max-loss)." in shown.output


def test_exports_follow_the_policies(web: Path, splits: Path, tmp_path: Path) -> None:
    """A group weighs as one picture, each row that is kept beside it as one more, contamination nothing."""
    rows, _ = run(web, tmp_path / "out", max_copies=2)
    export(tmp_path / "out", tmp_path / "index", ExportOptions("index", "weighted"))
    index = pl.read_parquet(tmp_path / "index" / "index.parquet")
    assert index["weight"].sum() == pytest.approx(len(kept(rows)))
    by_row = {True: index.filter(pl.col("represents") == 1), False: index.filter(pl.col("represents") > 1)}
    assert by_row[True]["weight"].to_list() == [1.0] * len(by_row[True])
    assert by_row[False]["weight"].to_list() == (1 / by_row[False]["represents"]).to_list()
    decide_splits(splits, tmp_path / "guarded", against_split="test")
    export(tmp_path / "guarded", tmp_path / "weights", ExportOptions("index", "weighted", captions="longest"))
    index = pl.read_parquet(tmp_path / "weights" / "index.parquet")
    assert index.filter("keep")["id"].to_list() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert index.filter("keep")["weight"].to_list() == [1, 0.5, 0.5, 1, 1, 1, 1, 1]
    assert index["caption"].to_list()[6:] == [f"test {n}" for n in range(4)]
    assert index["caption"].to_list()[3:5] == ["train 3", "train 4"]
    export(tmp_path / "guarded", tmp_path / "saved", ExportOptions(captions="list"))
    written = datasets.load_from_disk(str(tmp_path / "saved"))
    assert {split: written[split]["text"][:] for split in written} == {
        "train": ["train 0", "train 1", "train 5"],
        "test": ["test 0", "test 1", "test 2", "test 3"],
    }
    assert written["test"]["captions"][:2] == [["test 0"], ["test 1"]]


def test_the_report_shows_what_policies_leave(splits: Path, tmp_path: Path, page: Page) -> None:
    deduplicate(splits, tmp_path / "out", Options(max_loss=0.1), jobs=1)
    page.goto(write_report(tmp_path / "out", jobs=1).as_uri())
    banners = page.locator(".banner")
    expect(banners).to_have_text(
        [
            "▲ test (25.0\u00a0%), train (16.7\u00a0%): more than 10.0\u00a0% of the images are lost.",
            "▲ 2 pictures are kept in test (2 images) and in train (2). Look at them among the groups; "
            "leakage.csv lists them.",
        ]
    )
    page.get_by_text("Copies kept by policy").click()
    expect(page.locator("#status")).to_contain_text("2 groups")
    expect(page.locator(".tag.also-kept")).to_have_text(["copy · kept"] * 2)
