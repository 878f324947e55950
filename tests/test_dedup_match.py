"""Pictures from elsewhere against a finished run: which of its rows they are, and which are none of them."""

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageFilter, ImageOps
from playwright.sync_api import Page
from test_dedup_copies import WEB, draw_face, frame
from test_dedup_features import photograph
from test_dedup_geometry import EDITS
from typer.testing import CliRunner

from dedup import features, index, manifest, match, match_files, match_report, sources, threshold, vectors
from dedup import queries as queries_module
from dedup.cli import TooManyBad, app
from dedup.options import Options
from dedup.pipeline import deduplicate

type Picture = Image.Image

COPIES: dict[str, Callable[[Picture], Picture]] = {
    "crop": WEB["crop"],
    "mirrored": WEB["mirrored"],
    "framed": frame,
    "text": WEB["text"],
    "small": lambda p: p.resize((p.width // 2, p.height // 2)),
    "quarter": lambda p: p.transpose(Image.Transpose.ROTATE_90),
}
PICTURES = 70  # more than are all compared
HOSTILE = "<script>document.title='x'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 photographs, the first four times: under one caption, an edited one too; a flat picture, a tiny one."""
    src = tmp_path_factory.mktemp("run") / "src"
    src.mkdir()
    for number in range(PICTURES):
        Image.fromarray(photograph(number)).save(src / f"{number:02d}.jpg", quality=90)
        (src / f"{number:02d}.txt").write_text(f"Leaves, number {number}")
    shutil.copy(src / "00.jpg", src / "again.jpg")
    Image.fromarray(photograph(0)).save(src / "worse.jpg", quality=70)
    frame(Image.fromarray(photograph(0))).save(src / "edited.jpg", quality=90)
    (src / "01.txt").write_text(HOSTILE)
    Image.new("RGB", (90, 60), (200, 30, 40)).save(src / "flat.png")
    Image.fromarray(photograph(0)[:20, :20]).save(src / "tiny.png")
    deduplicate(src, src.parent / "out", Options(level="copy"), jobs=1)
    return src.parent / "out"


@pytest.fixture(scope="module")
def queries(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three edited copies of each kind, six other pictures, and what is odd."""
    folder = tmp_path_factory.mktemp("queries") / "drawn"
    folder.mkdir()
    for kind, (name, edit) in enumerate(COPIES.items()):
        for number in range(1 + 3 * kind, 4 + 3 * kind):
            edit(Image.fromarray(photograph(number))).save(folder / f"{name}-{number:02d}.jpg", quality=85)
    for number in range(100, 106):
        Image.fromarray(photograph(number)).save(folder / f"other-{number}.jpg")
    shutil.copy(out.parent / "src" / "again.jpg", folder / "bytes.jpg")
    Image.open(out.parent / "src" / "flat.png").save(folder / "flat.bmp")
    Image.open(out.parent / "src" / "tiny.png").save(folder / "tiny.bmp")
    Image.new("RGB", (90, 60), (200, 30, 60)).save(folder / "flat-other.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    truncated = (out.parent / "src" / "05.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(truncated[: len(truncated) // 2])
    return folder


@pytest.fixture(scope="module")
def matched(out: Path, queries: Path) -> Path:
    """What `match_files` made of them, with a prompt for two."""
    folder = queries.parent / "matches"
    prompts = queries.parent / "prompts.csv"
    prompts.write_text('file,prompt\nother-100.jpg," leaves, NUMBER 7 "\ncrop-01.jpg,<b>bold</b>\ngone.jpg,nobody\n')
    match_files.match_files(queries, out, folder, prompts=prompts, jobs=1)
    match_report.write_report(folder, jobs=1)
    return folder


def read(folder: Path) -> dict[str, dict]:
    """The best match of each query."""
    table = pl.read_parquet(folder / "matches.parquet")
    return {row["query"]: row for row in table.filter(pl.col("rank").fill_null(1) == 1).iter_rows(named=True)}


# What is found


def test_edited_copies_are_found_with_their_row_and_evidence(matched: Path, out: Path) -> None:
    best, keys = read(matched), manifest.read(out)["key"]
    missed = []
    for name, row in best.items():
        kind, _, number = name.removesuffix(".jpg").partition("-")
        if kind not in COPIES:
            continue
        if row["class"] != "copy":
            missed.append(name)
            continue
        assert row["key"] == f"{number}.jpg" == keys[row["id"]] == keys[row["kept_id"]]
        assert row["signal"] == "copy"
        assert row["inliers"] >= 8
        assert 0.7 < row["overlap"] <= 1
        assert len(row["transform"]) == 9
        assert row["orientation"] == {"mirrored": "m0", "quarter": "r270"}.get(kind, "r0")
        assert row["represents"] == 1
        assert row["expected_false"] is None or row["expected_false"] < 70
    assert len(missed) <= 1, missed


def test_other_pictures_match_nothing(matched: Path) -> None:
    best = read(matched)
    others = [row for name, row in best.items() if name.startswith(("other", "flat-other"))]
    assert len(others) == 7
    for row in others:
        assert (row["status"], row["rank"], row["class"], row["id"], row["score"]) == ("ok", None, None, None, None)


def test_equal_bytes_and_equal_pixels(matched: Path) -> None:
    best = read(matched)
    assert [best[name]["signal"] for name in ("bytes.jpg", "flat.bmp", "tiny.bmp")] == ["bytes", "pixels", "pixels"]
    assert [best[name]["score"] for name in ("bytes.jpg", "flat.bmp", "tiny.bmp")] == [1, 1, 1]
    assert best["flat.bmp"]["key"] == "flat.png"
    assert best["tiny.bmp"]["key"] == "tiny.png"


def test_how_often_the_match_stands_in_the_dataset(matched: Path, out: Path) -> None:
    """00, its second file, its worse copy and its framed copy are one star, whichever of them is kept."""
    row = read(matched)["bytes.jpg"]
    kept = manifest.read(out).filter(pl.col("id") == row["kept_id"])
    assert row["represents"] == kept["represents"].item() == 4
    assert kept["keep"].item()


def test_every_query_has_rows_in_order(matched: Path, queries: Path) -> None:
    table = pl.read_parquet(matched / "matches.parquet")
    assert dict(table.schema) == match_files.SCHEMA
    names = sorted(path.name for path in queries.iterdir())
    assert table["query"].unique(maintain_order=True).to_list() == names
    assert pl.read_parquet(matched / "queries.parquet")["query"].to_list() == names
    ranks = table.drop_nulls("rank").group_by("query", maintain_order=True).agg("rank", "id")
    for found, ids in ranks.select("rank", "id").iter_rows():
        assert found == list(range(1, len(found) + 1))
        assert len(set(ids)) == len(ids)
    strength = table.drop_nulls("rank").with_columns(pl.col("class").replace_strict(match.STRENGTH))
    assert strength.select((pl.col("class").diff().over("query").fill_null(0) >= 0).all()).item()
    assert pl.read_csv(matched / "matches.csv").height == len(table)


def test_unreadable_queries_are_rows(matched: Path) -> None:
    best = read(matched)
    for name in ("broken.jpg", "truncated.jpg"):
        assert best[name]["status"] == "unreadable"
        assert best[name]["error"]
        assert best[name]["class"] is None


def test_counts_add_up(matched: Path, queries: Path) -> None:
    counts = manifest.read_json(matched / "match.json")["counts"]
    parts = ("copies", "same_scene", "look_alike", "none", "unreadable")
    assert sum(counts[name] for name in parts) == counts["pictures"] == len(list(queries.iterdir()))
    assert counts["unreadable"] == 2
    assert counts["copies"] >= 17 + 3
    assert counts["matched"] == counts["copies"]  # each of another picture
    assert (counts["prompts"], counts["unknown_prompts"]) == (3, 1)


# Prompts


def test_a_prompt_brings_the_rows_with_that_caption(matched: Path, out: Path) -> None:
    assert read(matched)["other-100.jpg"]["prompt"] == " leaves, NUMBER 7 "
    there = match.load(out)
    asked = pl.DataFrame({"query": [4, 5, 6], "prompt": [" leaves, NUMBER 7 ", "no such caption", None]})
    found = match.find_captions(there, asked)
    assert [(query, there.rows["key"][row]) for query, row in found.rows()] == [(4, "07.jpg")]


def test_a_copy_that_is_not_near_is_found_by_its_caption(out: Path) -> None:
    """With a floor that nothing reaches."""
    there = replace(match.load(out), chance=index.Chance(np.array([1.9, 2.0]), np.array([9e9, 1e-9])))
    crop = np.asarray(WEB["crop"](Image.fromarray(photograph(9))))
    assert match.find(there, [crop])["class"].to_list() == [None]
    found = match.find(there, [crop], ["LEAVES, number 9"])
    assert found.select("class", "key", "cosine").rows() == [("copy", "09.jpg", None)]
    assert match.find(there, [crop], ["leaves, number 10"])["class"].to_list() == [None]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,prompt\na,b\n", "it has name, prompt"),
        ("file,text\na,b\n", "it has file, text"),
        ("file,prompt\na,b\na,c\n", "two prompts for a"),
        ("", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(match_files.PromptsError, match=says):
        match_files.read_prompts(tmp_path / "p.csv")


# In Python


def test_find_says_what_the_files_say(out: Path, matched: Path, queries: Path) -> None:
    names = [f"{name}-{1 + 3 * kind:02d}.jpg" for kind, name in enumerate(COPIES)] + ["other-100.jpg"]
    pictures = [np.asarray(Image.open(queries / name).convert("RGB")) for name in names]
    there, best = match.load(out), read(matched)
    found = match.find(there, pictures)
    assert dict(found.schema) == match.FOUND
    told = found.filter(pl.col("rank").fill_null(1) == 1).select("query", "class", "id", "cosine", "expected_false")
    wanted = [
        (n, *(best[name][c] for c in ("class", "id", "cosine", "expected_false"))) for n, name in enumerate(names)
    ]
    assert told.rows() == wanted
    one_by_one = pl.concat(
        [match.find(there, [picture]).with_columns(query=pl.lit(n)) for n, picture in enumerate(pictures)]
    )
    assert one_by_one.cast({"query": pl.Int64}).equals(found)


def test_a_drawing_that_was_drawn_again_is_a_copy_though_no_pixel_is_equal(tmp_path: Path) -> None:
    """Between files of equal size without loss, `dedup` allows only rounding; a model's output is never that near."""
    src = tmp_path / "src"
    src.mkdir()
    happy = draw_face(1)
    happy.save(src / "happy.png")
    Image.fromarray(photograph(0)).save(src / "other.png")
    deduplicate(src, tmp_path / "out", Options(level="copy"), jobs=1)
    drawn = [np.asarray(p) for p in (happy.filter(ImageFilter.GaussianBlur(0.5)), draw_face(-1))]
    found = match.find(match.load(tmp_path / "out"), drawn)
    assert found["class"][0] == "copy"
    assert found["class"][1] in ("look-alike", "same-scene")


def test_find_nothing_and_odd_pictures(out: Path) -> None:
    there = match.load(out)
    assert match.find(there, []).is_empty()
    odd = [np.zeros((5, 900, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), photograph(0)[:33, :33]]
    assert match.find(there, odd).select("query", "class").rows() == [(n, None) for n in range(3)]


def test_features_are_taken_again_when_the_cache_is_gone(out: Path, tmp_path: Path) -> None:
    crop = np.asarray(WEB["crop"](Image.fromarray(photograph(30))))
    there = match.load(out)
    [place] = there.places(there.ids[30:31])
    assert place is not None
    record = features.unpack(np.load(place[0])[place[1]])
    shown = np.asarray(Image.open(there.dataset.src / there.rows["key"][int(there.ids[30])]))
    np.testing.assert_array_equal(record.descriptors, features.extract(shown).descriptors)
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns(".work"))
    match.forget()
    with_cache = match.find(there, [crop])
    match.forget()
    assert match.find(match.load(tmp_path / "out"), [crop]).equals(with_cache)


def test_of_few_pictures_all_are_compared_and_of_many_the_nearest(out: Path) -> None:
    there = match.load(out)
    pixels = photograph(100)
    encoded = [there.encoder.encode(pixels, features.extract(pixels))]
    for n, compared in ((20, 20), (64, 64), (len(there.ids), 16)):
        part = replace(there, ids=there.ids[:n], vectors=there.vectors[:n], background=there.background[:n])
        near = match.find_near(part, np.array([5]), encoded, 1e9, 1)
        assert near.select(pl.col("query").unique(), pl.len(), pl.col("id").n_unique()).row(0) == (
            5,
            compared,
            compared,
        )
        assert near["chance"].is_sorted(descending=True)


def test_the_strongest_match_comes_first(out: Path) -> None:
    there = match.load(out)
    ids = there.ids[:6].tolist()
    kinds = [("look-alike", 0.99), ("copy", 0.8), (None, None), ("same-scene", 0.7), ("copy", 0.9), ("copy", 1.0)]
    near = pl.DataFrame(
        {"query": [0] * 6, "id": ids, "cosine": [0.5] * 6, "chance": [0.5] * 6, "mirrored": [False] * 6}
    )
    evidence = [(kind, score, 9, 1.0, "r0", [1.0] * 9) for kind, score in kinds]
    equal = pl.DataFrame({"query": [0, 0], "id": [ids[2], ids[5]], "signal": ["pixels", "bytes"]})
    found = match.rank(there, 2, near, evidence, equal)
    assert found["id"].to_list() == [ids[5], ids[2], ids[4], ids[1], ids[3], ids[0], None]
    assert found["signal"].to_list()[:3] == ["bytes", "pixels", "copy"]
    assert found["rank"].to_list() == [1, 2, 3, 4, 5, 6, None]


# The null model


def test_expected_false_candidates_of_one_query() -> None:
    """Counted: as many unrelated rows reach the floor as were allowed."""
    rng = np.random.default_rng(0)
    n = 3_000
    drawn = vectors.normalise(rng.standard_normal((n + 400, 64)))
    among, asked = drawn[:n], drawn[n:]
    i, j = threshold.sample_pairs(n, 100_000)
    scores = np.einsum("nd,nd->n", among[i], among[j])
    null = threshold.describe(threshold.fit_tail(scores, n * (n - 1) // 2))
    chance = index.read_chance(null, n, 1)
    for allowed in (1, 3, 10):
        floor = chance.threshold(allowed)
        assert (asked @ among.T >= floor).sum(axis=1).mean() == pytest.approx(allowed, rel=0.25)
        assert chance.count(np.array([floor]))[0] == pytest.approx(allowed, rel=1e-6)
    assert chance.threshold(n) == -1
    assert chance.threshold(0) == chance.threshold(1e-12) == chance.scores[-1]
    assert [chance.supports(few) for few in (0, 1e-12, 1)] == [False, False, True]
    assert np.isnan(chance.count(np.array([-0.9]))).all()
    twice = index.read_chance(null, n, 2)
    np.testing.assert_allclose(twice.expected, 2 * chance.expected)


def test_without_a_null_model_the_nearest_are_compared() -> None:
    for null in ({}, {"error": "too few"}):
        chance = index.read_chance(null, 50, 1)
        assert chance.threshold(3) == -1
        assert np.isnan(chance.count(np.array([0.3]))).all()


# What is refused


def copy_run(out: Path, folder: Path, **options: object) -> Path:
    """OUT again, with other options recorded."""
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns(".work"))
    run = manifest.read_json(folder / "run.json")
    manifest.write_json(folder / "run.json", run | {"options": run["options"] | options})
    return folder


def test_an_out_without_vectors_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(manifest.ManifestError, match=r"no run\.json"):
        match.load(tmp_path)
    with pytest.raises(index.MatchError, match="level hash"):
        match.load(copy_run(out, tmp_path / "hash", level="hash"))
    with pytest.raises(index.MatchError, match="made elsewhere"):
        match.load(copy_run(out, tmp_path / "external", encoder="external"))
    shutil.rmtree(copy_run(out, tmp_path / "gone") / "embeddings")
    with pytest.raises(vectors.EmbeddingError, match="--level copy"):
        match.load(tmp_path / "gone")


def test_another_vocabulary_is_refused(out: Path, tmp_path: Path) -> None:
    folder = copy_run(out, tmp_path / "out") / "embeddings" / "local"
    with (folder / "vocabulary.npz").open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(index.MatchError, match="not the vocabulary"):
        match.load(tmp_path / "out")
    (folder / "vocabulary.npz").unlink()
    with pytest.raises(index.MatchError, match="not the vocabulary"):
        match.load(tmp_path / "out")


def test_another_preprocessing_is_refused(out: Path, tmp_path: Path) -> None:
    path = copy_run(out, tmp_path / "out") / "embeddings" / "local" / "meta.json"
    manifest.write_json(path, manifest.read_json(path) | {"preprocessing": "9 features"})
    with pytest.raises(index.MatchError, match="another preprocessing"):
        match.load(tmp_path / "out")


def test_a_source_that_has_moved_or_changed_is_refused(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in range(3):
        Image.fromarray(photograph(number)).save(src / f"{number}.jpg")
    deduplicate(src, tmp_path / "out", Options(level="copy"), jobs=1)
    there = match.load(tmp_path / "out")
    assert len(there.ids) == 3
    crop = np.asarray(WEB["crop"](Image.fromarray(photograph(1))))  # of so few pictures all are compared
    assert match.find(there, [crop, photograph(50)])["key"].to_list() == ["1.jpg", None]
    Image.fromarray(photograph(9)).save(src / "1.jpg")
    with pytest.raises(OSError, match="has changed since"):
        match.load(tmp_path / "out")
    src.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="put it back"):
        match.load(tmp_path / "out")


@pytest.mark.parametrize("kind", ["table", "parquet", "tar"])
def test_a_source_of_another_kind_is_recognised(tmp_path: Path, kind: str) -> None:
    """Read as the run read it: with its columns and its root."""
    pictures = {f"{number}.png": photograph(number) for number in range(3)}
    (tmp_path / "img").mkdir()
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / "img" / name)
    data = [(tmp_path / "img" / name).read_bytes() for name in pictures]
    if kind == "table":
        pl.DataFrame({"where": list(pictures), "said": "leaves"}).write_csv(tmp_path / "t.csv")
        src, layout = tmp_path / "t.csv", sources.Layout(None, str(tmp_path / "img"), "where", "said")
    elif kind == "parquet":
        pl.DataFrame({"picture": data, "said": "leaves"}).write_parquet(tmp_path / "p.parquet")
        src, layout = tmp_path / "p.parquet", sources.Layout(image_column="picture", caption_column="said")
    else:
        src, layout = tmp_path / "00000.tar", sources.Layout()
        with tarfile.open(src, "w") as tar:
            for name in pictures:
                tar.add(tmp_path / "img" / name, name)
    deduplicate(src, tmp_path / "out", Options(level="copy", layout=layout), jobs=1)
    crop = np.asarray(WEB["crop"](Image.fromarray(photograph(1))))
    found = match.find(match.load(tmp_path / "out"), [crop, photograph(9)])
    assert found.select("class", "id").rows() == [("copy", 1), (None, None)]
    again = match_files.match_files(src, tmp_path / "out", tmp_path / "m", jobs=1) if kind == "tar" else None
    assert again is None or again["counts"]["copies"] == 3


@pytest.mark.parametrize("strict", [False, True])
def test_a_series_is_judged_strictly(out: Path, tmp_path: Path, strict: bool) -> None:
    copy_run(out, tmp_path / "out")
    path = tmp_path / "out" / "embeddings" / "local" / "rows.parquet"
    manifest.write_parquet(path, pl.read_parquet(path).with_columns(strict=pl.lit(strict)))
    faded = np.asarray(EDITS["faded"](Image.fromarray(photograph(20))))  # other colours
    assert (match.find(match.load(tmp_path / "out"), [faded])["class"][0] == "copy") == (not strict)


# The job


def test_the_same_bytes_whatever_the_workers_and_when_it_was_killed(
    out: Path, queries: Path, matched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match_files, "PART", 7)
    prompts = queries.parent / "prompts.csv"
    folder = tmp_path / "two"
    match_files.match_files(queries, out, folder, prompts=prompts, jobs=2)
    for name in ("matches.parquet", "matches.csv", "queries.parquet"):
        assert (folder / name).read_bytes() == (matched / name).read_bytes(), name
    (folder / "match.json").unlink()
    monkeypatch.setattr(queries_module, "match_part", None)  # all of it is done
    match_files.match_files(queries, out, folder, prompts=prompts, jobs=1)
    assert (folder / "match.json").read_bytes() == (matched / "match.json").read_bytes()


def test_one_file_and_a_tar_shard(out: Path, queries: Path, tmp_path: Path) -> None:
    match_files.match_files(queries / "crop-01.jpg", out, tmp_path / "one", jobs=1)
    assert read(tmp_path / "one")["crop-01.jpg"]["key"] == "01.jpg"
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        tar.add(queries / "text-10.jpg", "text.jpg")
        tar.add(queries / "other-101.jpg", "other.jpg")
    match_files.match_files(tmp_path / "00000.tar", out, tmp_path / "tar", jobs=1)
    found = read(tmp_path / "tar")
    assert found["00000.tar:text"]["key"] == "10.jpg"
    assert found["00000.tar:other"]["class"] is None
    with pytest.raises(ValueError, match="lies inside"):
        match_files.match_files(queries, out, queries / "results", jobs=1)


def test_the_command(out: Path, queries: Path, tmp_path: Path) -> None:
    words = ["match", str(queries / "crop-01.jpg"), "--against", str(out), "-o", str(tmp_path / "m"), "--jobs", "1"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    assert "Looked up: 1; copy: 1 (of 1 in OUT), same scene: 0" in shown.output
    assert str(tmp_path / "m" / "index.html") in shown.output
    told = CliRunner().invoke(app, [*words, "--json", "--no-report"])
    assert json.loads(told.stdout)["copies"] == 1
    bad = CliRunner().invoke(app, ["match", str(queries / "broken.jpg"), *words[2:]])
    assert isinstance(bad.exception, TooManyBad)


# The page


def test_the_page_escapes_everything_and_runs_no_script(matched: Path, page: Page) -> None:
    text = (matched / "index.html").read_text()
    assert HOSTILE not in text
    assert "<b>bold</b>" not in text
    page.goto((matched / "index.html").as_uri())
    assert page.title().startswith("30 pictures")
    assert HOSTILE in page.inner_text("#copies")
    assert "<b>bold</b>" in page.inner_text("#copies")
    assert page.locator("script").count() == 0


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_shows_every_picture_and_fits(matched: Path, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((matched / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")  # waits; the page forbids eval
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    first = page.locator("#copies li.group").first
    assert "stands 4 times in the dataset" in first.inner_text()
    counts = manifest.read_json(matched / "match.json")["counts"]
    assert page.locator("#copies li.group").count() == counts["copies"]
    assert page.locator("#none li").count() == counts["none"]
    assert page.locator("#unreadable li").count() == 2


def test_a_long_table_is_cut_and_the_page_says_so(matched: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(matched, folder)
    text = match_report.write_report(folder, jobs=1, limit=5).read_text()
    assert "the first 5 of 30 pictures" in text
    assert len(list((folder / "thumbs").glob("*/*.jpg"))) <= 15


def test_the_difference_of_a_copy_is_dark(matched: Path, queries: Path, out: Path) -> None:
    """The dataset's picture is carried onto the query: laid askew, it would be bright."""
    best = read(matched)
    for name in ("crop-01.jpg", "mirrored-04.jpg", "quarter-16.jpg"):
        row = best[name]
        assert row["class"] == "copy"
        shown = np.asarray(Image.open(queries / name).convert("RGB"))
        other = np.asarray(Image.open(out.parent / "src" / row["key"]).convert("RGB"))
        right = match_report.draw_difference(shown, other, row["transform"], row["orientation"])
        askew = match_report.draw_difference(
            shown, np.asarray(ImageOps.mirror(Image.fromarray(other))), row["transform"], row["orientation"]
        )
        assert right.mean() < 30 < 60 < askew.mean()
