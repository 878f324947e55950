"""eval.targets: what is attacked, and against what. Also the datasets and hand-made runs of all eval tests."""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from PIL import Image

from dedup import manifest
from dedup.hashing import digest
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from defense.distances import flip_min, scale
from eval.calibrate import calibrate
from eval.generate import GENERATIONS, derive_seed
from eval.reference import REFERENCE, TargetError, load_pixels, load_reference
from eval.targets import TARGETS, load_targets
from eval.yardstick import load_yardstick

LEVELS = (0, 1, 2, 5)
RESOLUTION = 32


def paint(number: int, size: int = 128) -> np.ndarray:
    """uint8 (size, size, 3): smooth, and another for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG", compress_level=1)


def make_planted(
    folder: Path,
    levels: tuple[int, ...] = LEVELS,
    canaries: int = 8,
    fillers: int = 20,
    edited: float = 0.5,
    seed: int = 0,
    controls: int = 0,
) -> Path:
    """Pictures → a planted dataset → its dedup run. Returns OUT."""
    spare = sum(max(m - 1, 0) for m in levels) * canaries // len(levels)
    src, dst, out = folder / "pictures", folder / f"planted-{seed}", folder / f"out-{seed}"
    for number in range(canaries + controls + fillers + spare + 10):
        write_png(src / f"{number:03d}.png", paint(number))
        (src / f"{number:03d}.txt").write_text(f"picture number {number}")
    options = {"multiplicities": levels, "fillers": fillers, "edited": edited, "seed": seed, "min_distance": 0.1}
    plant(src, dst, canaries=canaries, controls=controls, spare=spare, **options)
    deduplicate(dst, out, Options(), jobs=1)
    return out


def make_plain(folder: Path, counts: list[int], captions: list[str | None] | None = None) -> Path:
    """A folder in which picture i stands counts[i] times, and its dedup run. Returns OUT."""
    src, out = folder / "plain", folder / "out"
    for number, count in enumerate(counts):
        for copy in range(count):
            write_png(src / f"{number:03d}-{copy}.png", paint(number))
            if (caption := f"picture {number}" if captions is None else captions[number]) is not None:
                (src / f"{number:03d}-{copy}.txt").write_text(caption)
    deduplicate(src, out, Options(), jobs=1)
    return out


def make_run(folder: Path, out: Path, arm: str = "raw", seed: int = 0, **config: object) -> Path:
    """A run as training leaves it, without its model."""
    run = folder / f"{arm}-{seed}"
    values = {"resolution": RESOLUTION, "held_out": 0.0, "threads": 1, "steps": 10, "batch_size": 8} | config
    record = {"arm": arm, "seed": seed, "config": values, "out": str(out), "rows": 36, "versions": {"torch": "2"}}
    record |= {"initial_weights_sha256": f"weights {seed}"}
    manifest.write_json(run / "config.json", record | {"out_sha256": digest((out / "run.json").read_bytes())})
    return run


Answer = Callable[[dict, int], np.ndarray | None]  # target, number of the generation → uint8 (R, R, 3), None = NaN


def write_generations(run: Path, out: Path, answer: Answer, n: int = 8, **options: object) -> pl.DataFrame:
    """What `generate` would leave of a model that answers so."""
    rows = []
    for target in load_targets(out, **options).iter_rows(named=True):
        for j in range(n):
            pixels = answer(target, j)
            file = f"generations/stub/{len(rows):06d}.png"
            if pixels is not None:
                write_png(run / file, pixels)
            row = {"prompt_id": target["target_id"], "seed": derive_seed(target["target_id"], j), "guard": "none"}
            row |= {name: target[name] for name in ("prompt", "prompt_kind", "cluster_id")}
            row |= {"status": "nan", "file": None} if pixels is None else {"status": "ok", "file": file}
            rows.append(row | {"digest": run.name, "guidance_scale": 3.0, "steps": 20, "n": n})
    table = pl.DataFrame(rows, schema=GENERATIONS)
    manifest.write_parquet(run / "generations.parquet", table)
    return table


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    captions = [f"picture {n}" for n in range(9)] + [None, "  "]
    return make_plain(tmp_path_factory.mktemp("plain"), [1, 3, 1, 2, 1, 1, 5, 1, 2, 4, 1], captions)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> Path:
    """A dedup run over three pictures that look much like some of `plain`."""
    folder = tmp_path_factory.mktemp("unlike")
    for number in (1, 2, 6):
        write_png(folder / "src" / f"{number}.png", paint(number) // 4 * 3 + paint(900) // 4)
        (folder / "src" / f"{number}.txt").write_text(f"unlike {number}")
    deduplicate(folder / "src", folder / "out", Options(), jobs=1)
    return folder / "out"


def test_every_canary_is_a_target(planted):
    targets = load_targets(planted)
    truth = pl.read_parquet(planted / "plant.parquet")
    assert dict(targets.schema) == TARGETS
    assert targets["target_id"].to_list() == sorted(truth["canary"].unique())
    given = dict(targets.select("target_id", "multiplicity").iter_rows())
    assert given == dict(truth.select("canary", "multiplicity").unique().iter_rows())
    never = targets.filter(multiplicity=0)
    assert len(never) == 2
    assert never["cluster_id"].null_count() == len(never)
    assert (never["prompt_kind"] == "control").all()
    assert (targets.filter(pl.col("multiplicity") > 0)["prompt_kind"] == "member").all()
    assert targets["mode"].null_count() == 0


def test_a_canary_carries_the_cluster_of_its_first_copy(planted):
    targets = load_targets(planted).filter(pl.col("multiplicity") > 0)
    clusters = dict(manifest.read(planted, ["key", "cluster_id"]).iter_rows())
    truth = pl.read_parquet(planted / "plant.parquet")
    for target in targets.iter_rows(named=True):
        assert target["cluster_id"] == clusters[truth.filter(canary=target["target_id"])["key"][0]]


def test_pixels_of_a_canary_are_those_of_its_original(planted):
    """Also the copies in the dataset that are exact."""
    targets = load_targets(planted)
    pixels = load_pixels(planted, targets, RESOLUTION)
    pictures = [cv2.resize(paint(n), (RESOLUTION,) * 2, interpolation=cv2.INTER_AREA) for n in range(60)]
    for target, ours in zip(targets.iter_rows(named=True), pixels, strict=True):
        number = int(target["prompt"].rsplit(" ", 1)[1])
        np.testing.assert_array_equal(ours, pictures[number])


def test_pixels_are_those_that_training_sees(planted):
    from defense import data

    rows = manifest.read(planted)
    ours = load_pixels(planted, rows, RESOLUTION)
    theirs = data.load_pixels(rows, Path(manifest.read_run(planted)["src"]), RESOLUTION)
    np.testing.assert_array_equal(ours, theirs)


def test_a_changed_source_is_noticed(tmp_path):
    out = make_plain(tmp_path, [1, 1, 1])
    write_png(tmp_path / "plain" / "001-0.png", paint(77))
    with pytest.raises(TargetError, match=r"001-0\.png has changed"):
        load_pixels(out, load_reference(out), RESOLUTION)


def test_reference_holds_every_picture_once(planted):
    """20 fillers, 8 canaries, 10 spares; and no planted copy, whether deduplication found it or not."""
    reference = load_reference(planted)
    assert dict(reference.schema) == REFERENCE
    assert dict(reference["kind"].value_counts().iter_rows()) == {"dataset": 20, "canary": 8, "spare": 10}
    pixels = load_pixels(planted, reference, RESOLUTION)
    assert len({p.tobytes() for p in pixels}) == len(reference)
    copies = pl.read_parquet(planted / "plant.parquet")["key"].drop_nulls()
    assert not set(reference.filter(kind="dataset")["key"]) & set(copies)


def test_a_copy_that_deduplication_missed_stays_out_of_the_reference(planted, tmp_path):
    """The yardstick is not the tool under test: nothing changes when every row is a cluster of its own."""
    blind = tmp_path / "blind"
    rows = manifest.read(planted).with_columns(
        cluster_id="id", component_id="id", keep=pl.lit(True), kept_id=None, represents=pl.lit(1, pl.Int64)
    )
    manifest.write(blind, manifest.conform(rows))
    for name in ("run.json", "plant.parquet"):
        (blind / name).write_bytes((planted / name).read_bytes())
    found, usual = (load_reference(each).drop("component_id", "cluster_id") for each in (blind, planted))
    assert found.equals(usual)
    assert load_targets(blind).drop("cluster_id").equals(load_targets(planted).drop("cluster_id"))


def test_a_target_owns_its_own_picture_alone(planted):
    yardstick = load_yardstick(planted, RESOLUTION)
    assert (yardstick.own.sum(axis=1) == 1).all()
    for target, reference in np.argwhere(yardstick.own):
        np.testing.assert_array_equal(yardstick.target_pixels[target], yardstick.reference_pixels[reference])


def test_controls_are_measured_like_members(tmp_path):
    """Canaries of no multiplicity, which are in no copy's table: their own picture must not shrink δ to nothing."""
    out = make_planted(tmp_path, canaries=4, controls=6, fillers=5)
    yardstick = load_yardstick(out, RESOLUTION)
    controls = yardstick.targets.filter(prompt_kind="control")
    assert len(controls) == 7
    assert controls["mode"].null_count() >= 6
    assert (yardstick.own.sum(axis=1) == 1).all()
    delta = calibrate(yardstick).delta_of(yardstick.targets)
    assert delta.min() > 0.05


@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_other_components_is_another_picture(tmp_path, plain, unlike, seed):
    """Look-alikes in one component, of which the reference has one picture: by brute force over all rows."""
    groups = np.random.default_rng(seed).integers(0, 4, 11)
    out = tmp_path / "series"
    rows = manifest.read(plain)
    names = rows["key"].str.slice(0, 3).cast(pl.Int64).to_numpy()
    manifest.write(out, manifest.conform(rows.with_columns(component_id=pl.Series(groups[names]))))
    for name in ("run.json", "pairs.parquet"):
        (out / name).write_bytes((plain / name).read_bytes())
    yardstick = load_yardstick(out, RESOLUTION, controls=unlike)
    assert len(yardstick.reference) == len(set(groups))
    pictures = yardstick.targets["prompt"].str.split(" ").list.to_struct(fields=["kind", "number"]).struct.unnest()
    mine = pictures.select(pl.when(kind="picture").then(pl.col("number").cast(pl.Int64)).otherwise(-1)).to_series()
    assert (mine == -1).sum() == 3
    distances = flip_min(scale(yardstick.target_pixels), scale(load_pixels(out, rows, RESOLUTION)))
    expected = np.where(mine.to_numpy()[:, None] == names, np.inf, distances).min(axis=1)
    np.testing.assert_allclose(yardstick.others, expected, atol=1e-6)


def test_most_duplicated_clusters_come_first(plain):
    targets = load_targets(plain)
    assert targets["multiplicity"].to_list() == [5, 3, 2, 2, 1, 1, 1, 1, 1]  # pictures 9 and 10 have no caption
    assert targets["prompt"][:2].to_list() == ["picture 6", "picture 1"]
    assert (targets["prompt_kind"] == "member").all()
    assert targets["mode"].null_count() == len(targets)
    assert load_targets(plain, limit=3).equals(targets.head(3))  # a limit takes nothing from the middle


def test_single_images_are_a_sample_that_does_not_depend_on_their_order(tmp_path):
    out = make_plain(tmp_path, [1] * 30)
    targets = load_targets(out, limit=8)
    numbers = [int(prompt.split()[1]) for prompt in targets["prompt"]]
    assert numbers != sorted(numbers)
    assert max(numbers) > 12
    src = tmp_path / "plain"
    for number in range(30):  # the same pictures, the other way round
        for suffix in ("png", "txt"):
            (src / f"{number:03d}-0.{suffix}").rename(src / f"x{99 - number}.{suffix}")
    deduplicate(src, tmp_path / "again", Options(), jobs=1)
    again = load_targets(tmp_path / "again", limit=8)
    assert again["target_id"].to_list() == targets["target_id"].to_list()


def test_own_data_have_one_reference_per_component(plain):
    yardstick = load_yardstick(plain, RESOLUTION)
    assert len(yardstick.reference) == 11
    assert (yardstick.own.sum(axis=1) == 1).all()


def test_held_out_components_are_controls_and_no_members(plain):
    from defense.data import hold_out

    share = 0.4
    rows = manifest.read(plain)
    held = set(rows.filter(hold_out(rows, share))["cluster_id"])
    targets = load_targets(plain, held_out=share)
    controls, members = (targets.filter(prompt_kind=kind) for kind in ("control", "member"))
    assert 0 < len(controls) < len(targets)
    assert set(controls["cluster_id"]) <= held
    assert not set(members["cluster_id"]) & held
    assert (controls["multiplicity"] == 0).all()
    assert len(targets) == 9
    assert len(load_yardstick(plain, RESOLUTION, held_out=share).reference) == 11


def test_planted_data_may_have_held_out_controls_besides(planted):
    targets = load_targets(planted, held_out=0.4)
    fresh = targets.filter(pl.col("mode").is_null())
    assert len(fresh) > 2
    assert (fresh["prompt_kind"] == "control").all()
    assert len(targets.filter(pl.col("mode").is_not_null())) == 8


def test_without_captions_there_is_nothing_to_attack(tmp_path):
    out = make_plain(tmp_path, [2, 1, 1], [None] * 3)
    with pytest.raises(TargetError, match="no image with a caption"):
        load_targets(out)


def test_an_incomplete_planted_dataset_is_refused(planted, tmp_path):
    out = tmp_path / "out"
    manifest.write(out, manifest.read(planted))
    (out / "run.json").write_bytes((planted / "run.json").read_bytes())
    truth = pl.read_parquet(planted / "plant.parquet")
    alien = truth.head(1).with_columns(canary=pl.lit("nobody"), key=pl.lit(None, pl.String))
    manifest.write_parquet(out / "plant.parquet", pl.concat([truth, alien]))
    with pytest.raises(TargetError, match="8 of 9 canaries"):
        load_targets(out)
    manifest.write_parquet(out / "plant.parquet", truth.with_columns(key=pl.lit("x") + pl.col("key")))
    with pytest.raises(TargetError, match="not in the manifest"):
        load_targets(out)


def test_a_broken_image_of_the_dataset_is_no_target(tmp_path):
    src = tmp_path / "plain"
    buffer = io.BytesIO()
    Image.fromarray(paint(5)).save(buffer, "PNG")
    src.mkdir()
    (src / "broken.png").write_bytes(buffer.getvalue()[:60])
    (src / "broken.txt").write_text("a broken picture")
    out = make_plain(tmp_path, [1, 1, 2])
    assert "a broken picture" not in load_targets(out)["prompt"]
    assert len(load_reference(out)) == 3


def test_strata_of_multiplicities_get_equal_parts(tmp_path):
    out = make_plain(tmp_path, [1] * 8 + [2] * 4 + [3, 6])
    assert sorted(load_targets(out, limit=6)["multiplicity"], reverse=True) == [6, 3, 2, 2, 1, 1]
    assert load_targets(out, limit=6, order="most-duplicated")["multiplicity"].to_list() == [6, 3, 2, 2, 2, 2]
    assert load_targets(out, limit=None).equals(load_targets(out, limit=None, order="most-duplicated"))
    with pytest.raises(TargetError, match="unknown order"):
        load_targets(out, order="alphabetical")
