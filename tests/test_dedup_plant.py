"""Planting: the choice of images against brute force, the Latin square, edits, bytes, refusals."""

import io
import json
import math
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dedup import images, sources
from dedup.canaries import SPARE_DISTANCE, PlantError, measure_distances, select_images
from dedup.plant import EDITS, TRUTH, assign_levels, plant
from dedup.sources.demo import write_shard

LEVELS = (0, 1, 2, 6)
SMALL: dict[str, Any] = {
    "canaries": 8,
    "multiplicities": LEVELS,
    "fillers": 10,
    "resolution": 16,
    "min_distance": 0.2,
}
SPARE = 2 * (1 + 5)
ROWS = 2 * sum(LEVELS) + 10


def draw(rng: np.random.Generator) -> Image.Image:
    """A picture of 40 × 32 with big shapes and noise: two of them are rarely near each other."""
    image = Image.new("RGB", (40, 32), tuple(int(v) for v in rng.integers(0, 256, 3)))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = (int(v) for v in rng.integers(0, 30, 2))
        w, h = (int(v) for v in rng.integers(8, 25, 2))
        pen.ellipse((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    noisy = np.asarray(image).astype(int) + rng.integers(-8, 9, (32, 40, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_source(folder: Path, captions: list[str | None], *, twins: int = 0) -> Path:
    """A folder of pictures, X.png with X.txt; `twins` further ones differ from the first by a pixel."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    drawn = [draw(rng) for _ in captions]
    for number in range(twins):
        twin = drawn[number].copy()
        twin.putpixel((1, 1), (255, 0, 255))
        drawn.append(twin)
    for number, image in enumerate(drawn):
        (folder / f"img.{number:03d}.png").write_bytes(encode(image))
        caption = captions[number] if number < len(captions) else f"twin {number}"
        if caption is not None:
            (folder / f"img.{number:03d}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("plant") / "src", [f"picture {n}" for n in range(70)], twins=10)


@pytest.fixture(scope="module")
def planted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, pl.DataFrame]]:
    """One planted dataset for each of L seeds."""
    root = tmp_path_factory.mktemp("planted")
    folders = {seed: root / f"seed-{seed}" for seed in range(len(LEVELS))}
    return {seed: (dst, plant(source, dst, seed=seed, **SMALL)) for seed, dst in folders.items()}


def read(folder: Path) -> dict[str, sources.Record]:
    records = [r for shard in sources.list_shards(folder) for r in sources.read_shard(shard)]
    assert len({r.key for r in records}) == len(records)
    return {r.key: r for r in records}


def pixels_of(record: sources.Record) -> np.ndarray:
    return images.decode(record.data or b"").pixels


def brute_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Smaller of the normalised ℓ2 to `b` and to its mirror image, the slow way. uint8 (R, R, 3)."""
    x, y = a / 255, b / 255
    return min(float(np.sqrt(np.mean((x - z) ** 2))) for z in (y, y[:, ::-1]))


# The choice of images


@given(n=st.integers(2, 5), side=st.sampled_from([1, 8, 19, 40]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_distances_equal_brute_force(n: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    thumbnails = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    thumbnails[-1] = thumbnails[0][:, ::-1]
    found = measure_distances(thumbnails)
    assert found.shape == (n, n)
    for i in range(n):
        for j in range(n):
            expected = np.inf if i == j else brute_distance(thumbnails[i], thumbnails[j])
            assert found[i, j] == pytest.approx(expected, rel=1e-6)
    assert found[0, -1] == 0  # exactly: no rounding error where two pictures are the same


def test_distances_are_exact_at_the_extremes() -> None:
    """Black, white and checkerboard at 64 pixels: sums far beyond 2^24, which float32 alone would round."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    near = board.copy()
    near[3, 5] ^= 1
    stack = np.stack([np.zeros_like(board), np.full_like(board, 255), board, near])
    found = measure_distances(stack)
    assert found[0, 1] == 1
    assert found[2, 3] == np.float32(np.sqrt(3 / board.size) / 255)


def test_every_canary_is_far_from_everything_else(planted: dict[int, tuple[Path, pl.DataFrame]]) -> None:
    dst, truth = planted[0]
    dataset, canaries, spare = read(dst), read(dst / "canaries"), read(dst / "spare")
    assert (len(dataset), len(canaries), len(spare)) == (ROWS, 8, SPARE)
    owner = dict(truth.drop_nulls("key").select("key", "canary").iter_rows())
    fillers = [record for key, record in dataset.items() if key not in owner]
    assert len(fillers) == SMALL["fillers"]

    def thumbnail(record: sources.Record) -> np.ndarray:
        return images.square(pixels_of(record), 16)

    others = [thumbnail(record) for record in [*fillers, *spare.values()]]
    found = [thumbnail(record) for record in canaries.values()]
    for number, canary in enumerate(found):
        rest = others + found[:number] + found[number + 1 :]
        assert min(brute_distance(canary, other) for other in rest) >= 0.2
    spares = [thumbnail(record) for record in spare.values()]
    for number, one in enumerate(spares):
        rest = spares[:number] + spares[number + 1 :] + [thumbnail(record) for record in fillers]
        assert min(brute_distance(one, other) for other in rest) >= SPARE_DISTANCE


def test_an_image_with_many_neighbours_is_no_canary() -> None:
    """Eight families of one-colour pictures and 40 loners: members of a large family would cost too much."""
    rng = np.random.default_rng(0)
    loners = rng.choice([0, 255], (40, 8, 8, 3)).astype(np.uint8)
    family = np.full((30, 8, 8, 3), 128, np.uint8)
    family[:, 0, 0, 0] = np.arange(30)
    thumbnails = np.concatenate([family, loners])
    pool = pl.DataFrame({"caption": ["x"] * 70, "unique": [True] * 70})
    canaries, fillers, spares = select_images(pool, thumbnails, 8, 20, 10, 0.3)
    assert min(canaries) >= 30
    assert set(range(20)) == set(fillers)  # the family serves as filler
    assert len({*canaries, *fillers, *spares}) == 8 + 20 + 10
    assert set(spares).isdisjoint(range(30))  # but not as spares: they are look-alikes of the fillers


def test_no_two_canaries_or_spares_are_near_each_other() -> None:
    """Six pairs of mirrored twins, six loners, a family of thirty of which one at most may be a spare."""
    rng = np.random.default_rng(1)
    twins = rng.choice([0, 255], (6, 8, 8, 3)).astype(np.uint8)
    loners = rng.choice([0, 255], (6, 8, 8, 3)).astype(np.uint8)
    family = np.full((30, 8, 8, 3), 128, np.uint8)
    family[:, 0, 0, 0] = np.arange(30)
    pairs = np.stack([twins, twins[:, :, ::-1]], axis=1).reshape(12, 8, 8, 3)
    thumbnails = np.concatenate([family, pairs, loners])
    pool = pl.DataFrame({"caption": ["x"] * 48, "unique": [True] * 42 + [False] * 6})
    canaries, fillers, spares = select_images(pool, thumbnails, 6, 0, 7, 0.3)
    assert canaries == [30, 32, 34, 36, 38, 40]  # one of each pair
    assert fillers == []
    assert spares == [0, 42, 43, 44, 45, 46, 47]
    with pytest.raises(PlantError, match="7 of 8 spares found"):
        select_images(pool, thumbnails, 6, 0, 8, 0.3)


def test_canaries_have_captions_and_unique_ones_come_first(tmp_path: Path) -> None:
    captions: list[str | None] = [None] * 20 + ["the same"] * 20 + [f"own {n}" for n in range(6)]
    src = write_source(tmp_path / "src", captions)
    few: dict[str, Any] = {"multiplicities": (0, 1), "resolution": 16, "min_distance": 0.1}
    plant(src, tmp_path / "a", canaries=4, fillers=5, **few)
    found = [record.caption for record in read(tmp_path / "a" / "canaries").values()]
    assert all(caption and caption.startswith("own") for caption in found)
    plant(src, tmp_path / "b", canaries=8, fillers=5, **few)
    found = [record.caption for record in read(tmp_path / "b" / "canaries").values()]
    assert None not in found
    assert found.count("the same") >= 2
    with pytest.raises(PlantError, match=r"of 30 canaries found: of 46 distinct images \d+ have a caption"):
        plant(src, tmp_path / "c", canaries=30, fillers=5, **few)
    assert not (tmp_path / "c").exists()


def test_identical_pictures_are_used_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    drawn = [draw(rng) for _ in range(12)]
    samples = [(f"{n:03d}", {"png": encode(image), "txt": b"a"}) for n, image in enumerate(drawn)]
    again = [(f"9{n:02d}", {"bmp": encode(image, "BMP"), "txt": b"b"}) for n, image in enumerate(drawn)]
    broken = [("bad", {"png": b"no image", "txt": b"c"})]
    write_shard(tmp_path / "src" / "00000.tar", samples + again + broken)
    small: dict[str, Any] = {"multiplicities": (1,), "resolution": 8, "min_distance": 0.1, "spare": 0}
    plant(tmp_path / "src", tmp_path / "dst", canaries=2, fillers=10, **small)
    dataset = read(tmp_path / "dst")
    assert len({pixels_of(record).tobytes() for record in dataset.values()}) == len(dataset) == 12
    counts = json.loads((tmp_path / "dst" / "plant.json").read_text())["counts"]
    assert counts == {"images": 25, "unreadable": 1, "identical": 12, "compared": 12, "rows": 12}
    assert not (tmp_path / "dst" / "spare").exists()
    with pytest.raises(PlantError, match="12 distinct images, but 13 are needed"):
        plant(tmp_path / "src", tmp_path / "more", canaries=2, fillers=11, **small)


# The assignment


@given(
    levels=st.integers(1, 9),
    each=st.integers(1, 5),
    edited=st.sampled_from([0, 0.25, 0.5, 1]),
    seed=st.integers(0, 40),
)
def test_latin_square(levels: int, each: int, edited: float, seed: int) -> None:
    names = [10 * level for level in range(levels)]
    runs = [assign_levels(levels * each, names, edited, s) for s in range(seed, seed + levels)]
    for run in runs:  # each level equally often, and its share of edited canaries
        assert Counter(level for level, _ in run) == dict.fromkeys(names, each)
        for level in names:
            share = sum(mode == "edited" for found, mode in run if found == level)
            assert math.floor(each * edited) <= share <= math.ceil(each * edited)
    for canary in zip(*runs, strict=True):  # each canary on every level once
        assert sorted(level for level, _ in canary) == names


def test_modes_are_balanced_over_seeds() -> None:
    """Three canaries a level cannot be halved; over 2 L seeds every canary has every level in both modes."""
    cells = Counter(
        (canary, level, mode)
        for seed in range(2 * 8)
        for canary, (level, mode) in enumerate(assign_levels(24, (0, 1, 2, 4, 8, 16, 32, 64), 0.5, seed))
    )
    assert len(cells) == 24 * 8 * 2
    assert set(cells.values()) == {1}


def test_the_seed_changes_only_levels_and_places(planted: dict[int, tuple[Path, pl.DataFrame]]) -> None:
    first = planted[0][0]
    level_sets: dict[str, list[int]] = {}
    filler_sets = []
    for seed, (dst, truth) in planted.items():
        for name in ("canaries/00000.tar", "spare/00000.tar"):
            assert (dst / name).read_bytes() == (first / name).read_bytes()
        for canary, level in truth.select("canary", "multiplicity").unique().iter_rows():
            level_sets.setdefault(canary, []).append(level)
        copies = set(truth["key"].drop_nulls())
        filler_sets.append({r.data for key, r in read(dst).items() if key not in copies})
        assert truth["seed"].unique().to_list() == [seed]
    assert all(sorted(levels) == list(LEVELS) for levels in level_sets.values())
    assert all(found == filler_sets[0] for found in filler_sets)
    assert not planted[0][1].select("key", "canary").equals(planted[1][1].select("key", "canary"))


def test_places_say_nothing(planted: dict[int, tuple[Path, pl.DataFrame]]) -> None:
    for _, truth in planted.values():
        places = truth.drop_nulls("key").with_columns(pl.col("key").cast(pl.Int64))
        for _, copies in places.filter(multiplicity=6).group_by("canary"):
            found = sorted(copies["key"])
            assert found[-1] - found[0] > 6  # not side by side
        assert set(places["key"]) != set(range(len(places)))  # nor all before the fillers


# What stands on disk


def test_truth_is_true(planted: dict[int, tuple[Path, pl.DataFrame]]) -> None:
    edited = 0
    for dst, truth in planted.values():
        assert dict(truth.schema) == TRUTH
        assert truth.equals(pl.read_parquet(dst / "plant.parquet"))
        dataset, canaries = read(dst), read(dst / "canaries")
        assert set(truth["canary"]) == set(canaries)
        assert set(dataset) == {f"{number:06d}" for number in range(ROWS)}
        for row in truth.iter_rows(named=True):
            original = canaries[row["canary"]]
            if row["multiplicity"] == 0:
                assert (row["key"], row["edit"]) == (None, None)
                continue
            copy = dataset[row["key"]]
            assert copy.caption == original.caption
            assert (copy.data == original.data) == (row["edit"] == "exact")
            edited += check_edit(row["edit"], pixels_of(original), pixels_of(copy))
        for _, copies in truth.drop_nulls("key").group_by("canary", maintain_order=True):
            assert len(copies) == copies["multiplicity"][0]
            cycle = ["exact", "jpeg", "resize", "crop", "flip", "jpeg"]
            expected = cycle if copies["mode"][0] == "edited" else ["exact"] * 6
            assert copies["edit"].to_list() == expected[: len(copies)]
    assert edited > 20


def check_edit(edit: str, original: np.ndarray, copy: np.ndarray) -> bool:
    """That `copy` is what its edit says; whether it was edited at all."""
    height, width = original.shape[:2]
    if edit == "flip":
        assert (copy == original[:, ::-1]).all()
    elif edit == "crop":
        assert copy.shape == (height * 7 // 8, width * 7 // 8, 3)
        windows = np.lib.stride_tricks.sliding_window_view(original, copy.shape)
        assert (windows == copy).all(axis=(-3, -2, -1)).any()
    elif edit == "resize":
        scale = copy.shape[1] / width
        assert 0.48 <= scale <= 0.92 or 1.08 <= scale <= 1.52
        assert copy.shape[0] / height == pytest.approx(scale, abs=0.05)
    elif edit == "jpeg":
        assert copy.shape == original.shape
        assert 0 < np.abs(copy.astype(int) - original).mean() < 30
    else:
        assert edit == "exact"
    return edit != "exact"


@given(seed=st.integers(0, 10_000), width=st.integers(1, 60), height=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_edits_take_every_size(seed: int, width: int, height: int) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for edit in EDITS.values():
        data, extension = edit(rng, image)
        assert images.decode(data).format == {"jpg": "JPEG", "png": "PNG"}[extension]


def test_draws_of_an_edit_differ() -> None:
    image = draw(np.random.default_rng(1))
    for name in ("jpeg", "resize", "crop"):
        found = {EDITS[name](np.random.default_rng([0, 0, copy]), image)[0] for copy in range(8)}
        assert len(found) > 3


def test_equal_runs_give_equal_bytes(source: Path, planted: dict, tmp_path: Path) -> None:
    dst = planted[2][0]
    plant(source, tmp_path / "again", seed=2, **SMALL)
    names = sorted(p.relative_to(dst) for p in dst.rglob("*") if p.is_file())
    expected = ["00000.tar", "canaries/00000.tar", "plant.json", "plant.parquet", "spare/00000.tar"]
    assert [str(name) for name in names] == expected
    assert all((dst / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_a_webdataset_gives_the_same_plant_as_a_folder(source: Path, planted: dict, tmp_path: Path) -> None:
    """The choice depends on the pictures, not on their place, order and names."""
    records = [r for shard in sources.list_shards(source) for r in sources.read_shard(shard)]
    samples = [(f"x{n:03d}", {"png": r.data or b"", "txt": (r.caption or "").encode()}) for n, r in enumerate(records)][
        ::-1
    ]
    write_shard(tmp_path / "src" / "00000.tar", samples[:40])
    write_shard(tmp_path / "src" / "00001.tar", samples[40:])
    plant(tmp_path / "src", tmp_path / "dst", **SMALL)
    assert (tmp_path / "dst" / "00000.tar").read_bytes() == (planted[0][0] / "00000.tar").read_bytes()


def test_bytes_of_usual_formats_are_planted_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    kinds = [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG"), ("bmp", "BMP")]
    originals = {name: encode(draw(rng), kind) for name, kind in kinds}
    samples = [(f"{n}", {name: data, "txt": name.encode()}) for n, (name, data) in enumerate(originals.items())]
    write_shard(tmp_path / "src" / "00000.tar", samples)
    plant(tmp_path / "src", tmp_path / "dst", canaries=2, multiplicities=(1,), fillers=2, min_distance=0.05)
    with tarfile.open(tmp_path / "dst" / "00000.tar") as archive:
        suffixes = sorted(name.partition(".")[2] for name in archive.getnames())
    assert suffixes == ["jpg", "png", "png", "txt", "txt", "txt", "txt", "webp"]
    for record in read(tmp_path / "dst").values():
        original = originals[str(record.caption)]
        if record.caption == "bmp":
            assert images.decode(record.data or b"").format == "PNG"
            assert (pixels_of(record) == images.decode(original).pixels).all()
        else:
            assert record.data == original


def test_keys_of_canaries_are_unique_and_safe(tmp_path: Path) -> None:
    """Dots, folders, other alphabets, names too long for a tar header."""
    rng = np.random.default_rng(9)
    keys = ["a.b", "a_b", "süß/zoo", "plain-1"]
    for key in keys:
        path = tmp_path / "src" / "one" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(rng)))
        path.with_suffix(".txt").write_text("caption")
    folder = tmp_path / "src" / "two" / ("x" * 200)
    folder.mkdir(parents=True)
    (folder / ("y" * 200 + ".png")).write_bytes(encode(draw(rng)))
    (folder / ("y" * 200 + ".txt")).write_text("caption")
    truth = plant(tmp_path / "src", tmp_path / "dst", canaries=5, multiplicities=(0,), fillers=0, min_distance=0.02)
    names = truth["canary"].to_list()
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[\w-]{1,95}", name, re.ASCII) for name in names)
    assert set(read(tmp_path / "dst" / "canaries")) == set(names)
    assert "one_plain-1_png" in names


# Reuse and refusals


def test_same_options_are_reused_and_others_refused(source: Path, planted: dict, tmp_path: Path) -> None:
    dst, truth = planted[1]
    stamps = {path: path.stat().st_mtime_ns for path in dst.rglob("*")}
    assert plant(source, dst, seed=1, **SMALL).equals(truth)
    with pytest.raises(PlantError, match="seed 1 → 2"):
        plant(source, dst, seed=2, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in dst.rglob("*")} == stamps
    other = write_source(tmp_path / "other", [f"picture {n}" for n in range(70)])
    with pytest.raises(PlantError, match="source_sha256"):
        plant(other, dst, seed=1, **SMALL)


def test_foreign_folders_are_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_bytes(b"precious")
    with pytest.raises(PlantError, match="not empty"):
        plant(source, tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "00000.tar").read_bytes() == b"precious"
    with pytest.raises(PlantError, match="not empty"):
        plant(source, source, **SMALL)
    with pytest.raises(PlantError, match="inside the source"):
        plant(source, source / "planted", **SMALL)
    (tmp_path / "empty").mkdir()
    assert len(plant(source, tmp_path / "empty", **SMALL)) == 2 * (1 + sum(LEVELS))


def test_a_failure_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr("dedup.plant.write_json", fail)  # the last file
    with pytest.raises(OSError, match="disk gone"):
        plant(source, tmp_path / "dst", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canaries": 10}, "--canaries 10 is no multiple of the 4 levels: take 8"),
        ({"canaries": 1}, "take 4"),
        ({"canaries": 0}, "take 4"),
        ({"multiplicities": ()}, "one level or more"),
        ({"multiplicities": (0, -1)}, "none below 0"),
        ({"edited": 1.5}, "--edited"),
        ({"seed": -1}, "--seed"),
        ({"canaries": 80}, "80 canaries"),
        ({"min_distance": 0.9}, r"0 of 8 canaries found.*lower --min-distance or --canaries"),
        ({"spare": 60}, "spares found|canaries found"),
    ],
)
def test_impossible_wishes_say_how_to_mend(source: Path, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(PlantError, match=message):
        plant(source, tmp_path / "dst", **(SMALL | change))
    assert not (tmp_path / "dst").exists()


def test_edited_zero_means_exact_copies_only(source: Path, tmp_path: Path) -> None:
    truth = plant(source, tmp_path / "dst", edited=0.0, **SMALL)
    assert truth["mode"].unique().to_list() == ["exact"]
    assert set(truth["edit"].drop_nulls()) == {"exact"}


def test_controls_are_like_canaries_and_stand_nowhere(source: Path, tmp_path: Path) -> None:
    truth = plant(source, tmp_path / "dst", controls=6, **SMALL)
    controls = truth.filter(pl.col("mode").is_null())
    assert controls["multiplicity"].to_list() == [0] * 6
    assert controls["key"].null_count() == 6
    assert controls["canary"].n_unique() == 6
    moved = plant(source, tmp_path / "other", controls=6, seed=1, **SMALL)
    assert moved.filter(pl.col("mode").is_null())["canary"].equals(controls["canary"])


def test_held_out_images_stand_nowhere_else(source: Path, tmp_path: Path) -> None:
    few = SMALL | {"fillers": 4}
    plant(source, tmp_path / "a", held_out=5, **few)
    apart = {r.data for r in read(tmp_path / "a" / "held-out").values()}
    used = [read(tmp_path / "a" / name) for name in ("", "canaries", "spare")]
    assert len(apart) == 5
    assert not apart & {record.data for records in used for record in records.values()}
    plant(source, tmp_path / "b", **few)
    assert not (tmp_path / "b" / "held-out").exists()
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    with pytest.raises(PlantError, match="of 500 held-out images found"):
        plant(source, tmp_path / "c", held_out=500, **few)
