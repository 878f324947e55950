"""The copy level on a small web: edited photographs, pictures that share a frame, drawings in other colours."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
from made import with_numbers
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from test_dedup_features import photograph
from test_dedup_geometry import EDITS, add_caption_bar, add_shop_frame, draw_circles

from dedup import (
    clustering,
    copies,
    embedding,
    evidence,
    features,
    gaps,
    geometry,
    hashing,
    manifest,
    neighbours,
    overlay,
    policy,
    vectors,
)
from dedup.fingerprint import DecodeOptions
from dedup.options import Options, OptionsError
from dedup.pipeline import deduplicate

type Picture = Image.Image

LOCAL = Options(level="copy", encoder="local")
RESULTS = ["manifest/00000.parquet", "pairs.parquet", "kept.txt", "dropped.csv"]


def frame(picture: Picture) -> Picture:
    return ImageOps.expand(picture, 45, (20, 20, 24))


WEB: dict[str, Callable[[Picture], Picture]] = {
    "crop": lambda p: p.crop((60, 45, 300, 230)),
    "rotated": EDITS["turned"],
    "framed": frame,
    "text": EDITS["text"],
    "faded": EDITS["faded"],
    "mirrored": lambda p: ImageOps.mirror(p.crop((20, 10, 270, 215))),
}
UPRIGHT = [name for name in WEB if name != "mirrored"]


class Run(NamedTuple):
    """One of `deduplicate`: rows by key, pairs with keys."""

    rows: dict[str, dict]
    pairs: pl.DataFrame
    counts: dict


def write_groups(src: Path, groups: int, edits: list[str] | None = None) -> Path:
    """GROUP-base.jpg and one file an edit."""
    src.mkdir(exist_ok=True)
    for group in range(groups):
        picture = Image.fromarray(photograph(group))
        picture.save(src / f"{group:02d}-base.jpg", quality=92)
        for name in WEB if edits is None else edits:
            WEB[name](picture).save(src / f"{group:02d}-{name}.jpg", quality=85)
    return src


def read(out: Path, counts: dict) -> Run:
    table = manifest.read(out)
    keys = table["key"]
    pairs = pl.read_parquet(out / "pairs.parquet")
    pairs = pairs.with_columns(key_a=keys.gather(pairs["a"]), key_b=keys.gather(pairs["b"]))
    return Run({row["key"]: row for row in table.iter_rows(named=True)}, pairs, counts)


def run(src: Path, out: Path, options: Options = LOCAL, jobs: int = 1) -> Run:
    return read(out, deduplicate(src, out, options, jobs=jobs)["counts"])


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """12 photographs and 6 edits of each, 12 that stand alone, 4 under one caption, 3 in a shop's frame, 3 drawings."""
    folder = tmp_path_factory.mktemp("web")
    src = write_groups(folder / "src", 12)
    for number in range(12):
        Image.fromarray(photograph(20 + number)).save(src / f"lone-{number}.jpg", quality=90)
    for number in range(4):
        add_caption_bar(Image.fromarray(photograph(40 + number))).save(src / f"caption-{number}.jpg", quality=90)
    for number in range(3):
        add_shop_frame(Image.fromarray(photograph(44 + number))).save(src / f"shop-{number}.jpg", quality=90)
    for number, colour in enumerate(("red", "blue", "green")):
        drawing = draw_circles(0)
        ImageDraw.Draw(drawing).ellipse((90, 90, 170, 170), fill=colour, outline="black", width=3)
        drawing.save(src / f"drawing-{number}.png")
    return run(src, folder / "out")


def group(key: str) -> str:
    """Photographs belong together by number; of the others each is its own."""
    return key.split("-")[0] if key[0].isdigit() else key


def test_edited_copies_are_found_and_others_stay(web: Run) -> None:
    dropped = [key for key, row in web.rows.items() if row["kept_id"] is not None]
    names = {row["id"]: key for key, row in web.rows.items()}
    assert [key for key in dropped if group(key) != group(names[web.rows[key]["kept_id"]])] == []
    found = web.pairs.filter(pl.col("class") == "copy").select("key_a", "key_b").rows()
    assert [pair for pair in found if group(pair[0]) != group(pair[1])] == []
    assert len(dropped) >= 0.9 * 12 * len(UPRIGHT)
    for name in ("lone", "caption", "shop", "drawing"):
        assert all(row["keep"] for key, row in web.rows.items() if key.startswith(name))


def test_every_kind_of_edit_is_found(web: Run) -> None:
    """Of each at most two of twelve do not hang together with their photograph."""
    for name in WEB:
        joined = [
            web.rows[f"{number:02d}-{name}.jpg"]["component_id"] == web.rows[f"{number:02d}-base.jpg"]["component_id"]
            for number in range(12)
        ]
        assert sum(joined) >= 10, name


def test_a_row_goes_only_to_one_that_it_matches_itself(web: Run) -> None:
    direct = set(web.pairs.filter(pl.col("class") == "copy").select("a", "b").rows())
    kept = {row["id"] for row in web.rows.values() if row["keep"]}
    for row in web.rows.values():
        if row["kept_id"] is None:
            assert row["reason"] is None
            continue
        assert (min(row["id"], row["kept_id"]), max(row["id"], row["kept_id"])) in direct
        assert row["kept_id"] in kept
        assert row["class"] == "copy"
        assert row["signal"] == row["reason"].replace("hash", "pdq")
        assert row["orientation"] == "r0"
        assert row["score"] > 0.5


def test_pairs_carry_their_evidence(web: Run) -> None:
    """Nobody looked at pairs without a score: they are implied, and left out."""
    assert web.pairs.filter(pl.col("score").is_null() | pl.col("class").is_null()).is_empty()
    assert web.pairs.select("a", "b").is_unique().all()
    assert web.pairs.select((pl.col("a") < pl.col("b")).all()).item()
    found = web.pairs.filter((pl.col("signal") == "copy") & (pl.col("class") == "copy"))
    assert len(found) > 40
    assert found["inliers"].min() >= geometry.MIN_EVIDENCE
    assert found["overlap"].is_between(overlay.MIN_OVERLAP, 1).all()
    assert (found["transform"].list.len() == 9).all()
    assert found["hamming"].null_count() == len(found)


def test_transforms_lay_a_on_b(web: Run) -> None:
    """The crop's left upper corner is where it was cut out."""
    for number in range(12):
        base, crop = f"{number:02d}-base.jpg", f"{number:02d}-crop.jpg"
        pair = web.pairs.filter(pl.col("key_a").is_in([base, crop]) & pl.col("key_b").is_in([base, crop]))
        for transform, first in pair.select("transform", "key_a").iter_rows():
            if transform is None:
                continue
            onto_base = np.reshape(transform, (3, 3))
            if first == base:
                onto_base = np.linalg.inv(onto_base)
            corner = onto_base @ (0, 0, 1)
            np.testing.assert_allclose(corner[:2] / corner[2] * 320, (60, 45), atol=5)


def test_mirrored_copies_name_their_orientation_and_stay(web: Run) -> None:
    for key, row in web.rows.items():
        if key.endswith("-mirrored.jpg"):
            assert row["keep"]
    turned = web.pairs.filter(
        (pl.col("class") == "copy")
        & (pl.col("key_a").str.contains("mirrored") != pl.col("key_b").str.contains("mirrored"))
    )
    assert len(turned) >= 10
    assert turned["orientation"].unique().to_list() == ["m0"]


def test_drawings_in_other_colours_are_look_alikes(web: Run) -> None:
    drawn = web.pairs.filter(pl.col("key_a").str.starts_with("drawing") & pl.col("key_b").str.starts_with("drawing"))
    assert len(drawn) >= 2
    assert set(drawn["class"]) == {"look-alike"}


def test_what_is_counted(web: Run) -> None:
    counted = web.counts["copy_search"]
    assert counted["encoder"] == "local"
    assert counted["candidates"] > 100
    assert counted["pictures"] <= len(web.rows) == 12 * 7 + 12 + 4 + 3 + 3
    assert web.counts["dropped"] == sum(row["kept_id"] is not None for row in web.rows.values())


def test_a_series_among_other_pictures_is_told_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pictures are of one kind, and a third of its pairs have a few features in common."""
    monkeypatch.setattr(neighbours, "CELL_ROWS", 100)
    rng = np.random.default_rng(0)
    ids = np.arange(400) * 2
    series = np.arange(400) % 2 == 0
    upright = np.where(series[:, None], np.eye(16)[0], np.eye(16)[1]) + 0.1 * rng.normal(size=(400, 16))
    upright = (upright / np.linalg.norm(upright, axis=1, keepdims=True)).astype(np.float16)
    reader: Any = SimpleNamespace(workers=SimpleNamespace(jobs=1))

    def find(in_common: int) -> tuple[np.ndarray, dict]:
        search = copies.CopySearch(pl.DataFrame(), reader, Path(), "local", (None, None), None)
        inliers = pl.when((pl.col("a") % 4 == 0) & (pl.col("b") % 3 == 0)).then(in_common).otherwise(0)
        monkeypatch.setattr(search, "_match", lambda pairs: pairs.select(inliers=inliers))
        return search._find_series(ids, upright), search.counts

    crowded, counts = find(geometry.MIN_INLIERS)
    assert np.array_equal(crowded, series)
    assert counts["series"] == 200
    assert counts["chance"] < 0.3
    assert not find(geometry.MIN_INLIERS - 1)[0].any()
    assert not find(geometry.MIN_EVIDENCE)[0].any()  # they may be copies


# Small webs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = write_groups(tmp_path_factory.mktemp("small") / "src", 3, ["crop", "text", "mirrored"])
    Image.fromarray(photograph(30)).save(src / "lone.jpg")
    return src


@pytest.fixture(scope="module")
def small_run(small: Path) -> Path:
    """OUT of it, to be read only."""
    run(small, small.parent / "out")
    return small.parent / "out"


def test_the_same_bytes_whatever_the_workers_and_when_it_was_killed(small: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(small, one, jobs=1)
    run(small, two, jobs=2)
    before = [(one / name).read_bytes() for name in RESULTS]
    assert [(two / name).read_bytes() for name in RESULTS] == before
    stored = sorted((one / ".work").rglob("*.npy"))
    assert any("features" in str(path) for path in stored)
    (one / "run.json").unlink()
    (one / "pairs.parquet").unlink()
    shutil.rmtree(one / "embeddings")
    for path in stored:
        path.unlink()
    run(small, one, jobs=1)
    assert [(one / name).read_bytes() for name in RESULTS] == before
    (one / "run.json").unlink()
    run(small, one, jobs=1)  # everything stored is there
    assert [(one / name).read_bytes() for name in RESULTS] == before


def test_mirrored_copies_go_when_asked(small: Path, tmp_path: Path) -> None:
    found = run(small, tmp_path / "out", Options(level="copy", encoder="local", flips="drop"))
    assert [key for key, row in found.rows.items() if "mirrored" in key and row["keep"]] == []
    kept = [key for key, row in found.rows.items() if row["keep"]]
    assert len(kept) == 4
    assert "lone.jpg" in kept


def test_another_encoder_into_the_same_output_is_refused(small: Path, small_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_run.rglob("*") if path.name != ".lock"}
    for encoder in ("sscd-distilled", "sscd"):
        with pytest.raises(OptionsError, match="encoder was 'local'"):
            run(small, small_run, Options(level="copy", encoder=encoder))
    with pytest.raises(OptionsError, match="level was 'copy'"):
        run(small, small_run, Options())
    assert before == {path: path.stat().st_mtime_ns for path in small_run.rglob("*") if path.name != ".lock"}


@pytest.mark.skipif(not embedding.is_available("sscd-distilled"), reason="needs the extra with its weights")
def test_with_a_network_as_encoder(small: Path, tmp_path: Path) -> None:
    found = run(small, tmp_path / "out", Options(level="copy", encoder="sscd-distilled"))
    assert found.counts["copy_search"]["encoder"] == "sscd-distilled"
    kept = {key for key, row in found.rows.items() if row["keep"]}
    assert len(kept - {key for key in kept if "mirrored" in key}) == 4
    names = {row["id"]: key for key, row in found.rows.items()}
    for key, row in found.rows.items():
        if row["kept_id"] is not None:
            assert group(key) == group(names[row["kept_id"]])


def test_with_vectors_that_somebody_else_made(small: Path, small_run: Path, tmp_path: Path) -> None:
    expected = {row["key"]: row["kept_id"] for row in manifest.read(small_run).iter_rows(named=True)}
    _, rows, found = vectors.read_embeddings(small_run, "local")
    keys = [f"photos/{key}" for key in expected]
    assert len(rows) == len(keys)  # nothing is found by hash
    folder = tmp_path / "clip"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb/img_emb_0.npy", found[::-1])
    pl.DataFrame({"image_path": keys[::-1]}).write_parquet(folder / "metadata/metadata_0.parquet")
    options = Options(level="copy", encoder="external", weights=str(folder))
    other = run(small, tmp_path / "external", options)
    assert other.counts["copy_search"]["encoder"] == "external"
    assert {key: row["kept_id"] for key, row in other.rows.items()} == expected
    with pytest.raises(vectors.EmbeddingError, match="holds no img_emb"):
        run(small, tmp_path / "none", Options(level="copy", encoder="external", weights=str(tmp_path)))
    assert not (tmp_path / "none").exists()  # it is said at once


def test_small_pictures_are_left_to_the_hashes(tmp_path: Path) -> None:
    """A crop of an icon would be found, were it larger."""
    src = tmp_path / "src"
    src.mkdir()
    icon = Image.fromarray(photograph(50)).resize((30, 30), Image.Resampling.LANCZOS)
    icon.save(src / "icon.png")
    icon.save(src / "icon.webp", lossless=True)
    icon.crop((3, 3, 28, 28)).save(src / "icon-crop.png")
    for number in range(2):
        Image.fromarray(photograph(number)).save(src / f"{number}.jpg")
    found = run(src, tmp_path / "out")
    assert sum(not row["keep"] for row in found.rows.values()) == 1
    assert not found.rows["icon.png"]["keep"] or not found.rows["icon.webp"]["keep"]
    assert found.rows["icon-crop.png"]["keep"]
    assert found.counts["copy_search"]["pictures"] == 2


@pytest.mark.parametrize("pictures", [0, 1])
def test_nothing_to_compare(tmp_path: Path, pictures: int) -> None:
    """Icons only, and one picture among them; neither flat nor broken ones matter."""
    src = tmp_path / "src"
    src.mkdir()
    Image.fromarray(photograph(50)).resize((20, 20)).save(src / "icon.png")
    (src / "broken.jpg").write_bytes(b"nothing")
    for number in range(pictures):
        Image.fromarray(photograph(number)).save(src / f"{number}.png")
    found = run(src, tmp_path / "out")
    assert sum(row["keep"] for row in found.rows.values()) == 1 + pictures
    assert found.pairs.is_empty()


@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_folder_of_two_or_three(tmp_path: Path, others: int) -> None:
    """A vocabulary that is learned from a picture and its copy alone finds them unlike: all pairs must be compared."""
    src = tmp_path / "src"
    src.mkdir()
    picture = Image.fromarray(photograph(0))
    picture.save(src / "whole.png")
    WEB["crop"](picture).save(src / "crop.png")
    for number in range(others):
        Image.fromarray(photograph(20 + number)).save(src / f"other-{number}.png")
    found = run(src, tmp_path / "out")
    assert sum(row["keep"] for row in found.rows.values()) == 1 + others


@pytest.mark.parametrize("mirrored", [False, True])
def test_equal_bytes_on_either_side_of_their_keeper(tmp_path: Path, mirrored: bool) -> None:
    """a.png and c.png are one crop of b.png. Transforms carry positions of the first of a pair (mirrored, if so)."""
    src = write_groups(tmp_path / "src", 8, [])
    whole = Image.fromarray(photograph(50))
    whole.save(src / "b.png")
    for name in "ac":
        crop = whole.crop((60, 45, 300, 230))
        (ImageOps.mirror(crop) if mirrored else crop).save(src / f"{name}.png")
    found = run(src, tmp_path / "out", Options(level="copy", encoder="local", flips="drop"))
    whole_kept = found.rows["b.png"]
    assert [found.rows[name]["kept_id"] for name in ("a.png", "c.png")] == [whole_kept["id"]] * 2
    pairs = {
        (a, b): np.reshape(t, (3, 3)) for a, b, t in found.pairs.select("key_a", "key_b", "transform").iter_rows() if t
    }
    left = 20 if mirrored else 60  # of the crop in the (mirrored) whole
    onto_whole, onto_crop = pairs["a.png", "b.png"], pairs["b.png", "c.png"]
    corner = onto_whole @ (0, 0, 1)
    np.testing.assert_allclose(corner[:2] / corner[2] * 320, (60, 45), atol=3)
    corner = onto_crop @ (left / 320, 45 / 320, 1)
    np.testing.assert_allclose(corner[:2] / corner[2] * 240, (0, 0), atol=3)


def draw_face(mouth: int, eyes: str = "black") -> Picture:
    """The same head and hat; another mouth and other eyes."""
    picture = Image.new("RGB", (256, 256), (250, 250, 245))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((4, 4, 251, 251), outline="black", width=3)
    draw.ellipse((48, 60, 208, 230), fill=(240, 200, 160), outline="black", width=3)
    draw.polygon([(60, 80), (128, 12), (196, 80)], fill=(60, 90, 160), outline="black", width=3)
    for star in range(12):
        x, y = 20 + star * 19, (20, 232)[star % 2]
        draw.regular_polygon((x, y, 9), 3 + star % 4, star * 13, fill="black")
    for x in (96, 160):
        draw.ellipse((x - 12, 112, x + 12, 136), fill="white", outline="black", width=2)
        draw.ellipse((x - 5, 118, x + 5, 130), fill=eyes)
    draw.arc((92, 160 - 20 * (mouth < 0), 164, 205), *((10, 170) if mouth > 0 else (190, 350)), fill="black", width=4)
    return picture


def judge_files(src: Path, first: Picture, second: Picture, quality: int) -> tuple[str | None, bool]:
    """Class of two pictures as the copy search judges them, and whether their features matched."""
    src.mkdir(parents=True)
    places, found = [], []
    for name, picture in (("a.jpg", first), ("b.jpg", second)):
        picture.save(src / name, quality=quality)
        data = (src / name).read_bytes()
        places.append((None, 0, len(data), name, hashing.digest(data)))
        found.append(features.extract(np.asarray(Image.open(src / name).convert("RGB"))))
    match = geometry.match(*found)
    if match is None:
        return None, False
    name = manifest.ORIENTATIONS[geometry.orientation(match)]
    item = (*places, name, match.inliers, match.transform.ravel().tolist(), False)
    [(kind, score, overlap)] = evidence.judge_pairs(src, [item], DecodeOptions())
    assert 0 <= min(score, overlap) <= max(score, overlap) <= 1
    return kind, True


@pytest.mark.parametrize("quality", [60, 90])
def test_another_face_in_the_same_frame_is_no_copy(tmp_path: Path, quality: int) -> None:
    happy = draw_face(1)
    series = {"same": happy, "sad": draw_face(-1), "eyes": draw_face(1, "red")}
    series["hat"] = happy.copy()
    ImageDraw.floodfill(series["hat"], (128, 50), (200, 40, 40))
    judged = {name: judge_files(tmp_path / name, happy, other, quality) for name, other in series.items()}
    assert all(matched for _, matched in judged.values())
    assert judged["same"][0] == "copy"
    assert {judged[name][0] for name in ("sad", "eyes", "hat")} <= {"look-alike", "same-scene"}


@pytest.mark.parametrize(("width", "kind"), [(400, "copy"), (120, "look-alike")])
def test_pictures_too_small_for_details_are_compared_in_all_they_have(tmp_path: Path, width: int, kind: str) -> None:
    """A sticker lies on a large photograph; what would be one on a small picture may be what it is about."""
    picture = Image.fromarray(photograph(3)).resize((width, width * 3 // 4), Image.Resampling.LANCZOS)
    other = picture.copy()
    ImageDraw.Draw(other).ellipse((width // 2, width // 4, width // 2 + width // 8, width * 3 // 8), fill="red")
    assert judge_files(tmp_path / "src", picture, other, 90) == (kind, True)


def test_flat_pictures_are_compared_by_pixels(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for name, colour in {"red": "red", "blue": "blue", "red-again": "red"}.items():
        Image.new("RGB", (100, 80), colour).save(src / f"{name}.png")
    Image.new("RGB", (50, 40), "red").save(src / "red-small.png")
    found = run(src, tmp_path / "out")
    assert sum(row["keep"] for row in found.rows.values()) == 3


def test_a_chain_of_crops_deletes_nothing_that_does_not_overlap(tmp_path: Path) -> None:
    """Left half, middle, right half: each overlaps the next, the ends have nothing in common."""
    src = tmp_path / "src"
    src.mkdir()
    panorama = Image.fromarray(np.hstack([photograph(60), photograph(61)[:, ::-1]])).filter(
        ImageFilter.GaussianBlur(0.5)
    )
    for number, left in enumerate((0, 120, 240, 360)):
        panorama.crop((left, 0, left + 280, 240)).save(src / f"{number}.jpg", quality=92)
    found = run(src, tmp_path / "out")
    direct = set(found.pairs.filter(pl.col("class") == "copy").select("a", "b").rows())
    for row in found.rows.values():
        if row["kept_id"] is not None:
            assert (min(row["id"], row["kept_id"]), max(row["id"], row["kept_id"])) in direct
    ends = {"0.jpg", "3.jpg"}
    assert found.pairs.filter(pl.col("key_a").is_in(ends) & pl.col("key_b").is_in(ends)).is_empty()
    assert {found.rows[key]["kept_id"] for key in ends} & {found.rows[key]["id"] for key in ends} == set()


# By hand


def make_pairs(*rows: tuple[int, int, str]) -> pl.DataFrame:
    table = pl.DataFrame(list(rows), schema=["a", "b", "orientation"], orient="row")
    return manifest.conform(
        table.with_columns(**{"class": pl.lit("copy")}, signal=pl.lit("copy")), manifest.PAIRS_SCHEMA
    )


def bridged(pairs: pl.DataFrame, rank: list[int]) -> list[tuple]:
    order = pl.Series(rank)
    return gaps.bridges(pairs, clustering.decide(pairs, order), order).select("a", "b").rows()


def test_who_matches_a_dropped_row_may_match_its_keeper() -> None:
    """2 matches 1, which went to 0."""
    assert bridged(make_pairs((0, 1, "r0"), (1, 2, "r0")), [0, 1, 2]) == [(0, 2)]


def test_nothing_is_bridged_within_a_star() -> None:
    assert bridged(make_pairs((0, 1, "r0"), (0, 2, "r0")), [0, 1, 2]) == []
    assert bridged(make_pairs(), [0, 1, 2]) == []


def test_look_alikes_are_no_bridges() -> None:
    pairs = make_pairs((0, 1, "r0"), (1, 2, "r0"))
    pairs = pairs.with_columns(pl.Series("class", ["copy", "look-alike"]))
    assert bridged(pairs, [0, 1, 2]) == []


def test_those_turned_alike_may_be_upright_to_each_other() -> None:
    """2 is the keeper; r90 turns 0 into 2, r270 turns 2 into 3, so r90 turns 3 into 2; r90 turns 2 into 4."""
    pairs = make_pairs((0, 2, "r90"), (2, 3, "r270"), (2, 4, "r90"))
    assert bridged(pairs, [1, 5, 0, 2, 3]) == [(0, 3)]
    mirrored = make_pairs((0, 1, "m0"), (0, 2, "m0"), (0, 3, "m0"), (0, 4, "m90"))
    assert bridged(mirrored, [0, 2, 1, 3, 4]) == [(1, 2), (2, 3)]  # with the first in keeper order


def test_keepers_are_those_that_most_others_share_parts_with() -> None:
    rows = pl.DataFrame(
        {
            "key": ["a", "b", "c", "d", "e"],
            "status": ["ok", "ok", "ok", "ok", "corrupt"],
            "width": [100, 200, 300, 400, 500],
            "height": [100] * 5,
            "size": [1] * 5,
            "caption": [None] * 5,
            "sha256": ["0", "1", "2", "3", "4"],
            "link": [False] * 5,
        },
        schema_overrides={"caption": pl.String},
    )
    rows = with_numbers(rows)
    assert policy.keeper_rank(rows).to_list() == [3, 2, 1, 0, 4]
    partners = pl.Series([3, 1, 2, 0, 9])  # powers of two of one more: 2, 1, 1, 0
    assert policy.keeper_rank(rows, partners=partners).to_list() == [0, 2, 1, 3, 4]
    assert policy.keeper_rank(rows, partners=pl.Series([7, 7, 7, 7, 0])).to_list() == [3, 2, 1, 0, 4]


def test_partners_are_pairs_of_the_copy_search() -> None:
    pairs = make_pairs((0, 1, "r0"), (1, 2, "r0"), (1, 3, "m0"), (0, 3, "r0"))
    pairs = pairs.with_columns(
        pl.Series("class", ["copy", "copy", "copy", "same-scene"]),
        pl.Series("signal", ["decision", "pdq", "copy", "copy"]),  # a person may have confirmed one
        pl.Series("inliers", [12, None, 30, 20]),
    )
    assert policy.count_partners(pairs, 5).to_list() == [1, 2, 0, 1, 0]
    assert policy.count_partners(pairs.clear(), 2).to_list() == [0, 0]
