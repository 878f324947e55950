"""eval.calibrate: thresholds from pictures alone, of the right size, and frozen."""

from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_eval_targets import RESOLUTION, make_plain, make_planted

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from defense.distances import flip, l2, scale
from eval import calibrate as calibration_
from eval.calibrate import CalibrationError, calibrate, freeze
from eval.distances import max_tile_l2
from eval.reference import REFERENCE, nearest_other
from eval.targets import TARGETS
from eval.yardstick import Yardstick, load_yardstick


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("planted"))


def make_yardstick(targets: np.ndarray, others: np.ndarray, captions: list[str | None] | None = None) -> Yardstick:
    """Targets that stand in the reference before the others. uint8 (T, R, R, 3) and (N, R, R, 3)."""
    reference = np.concatenate([targets, others])
    names = captions or [f"picture {n}" for n in range(len(reference))]
    table = pl.DataFrame({"target_id": [f"t{n}" for n in range(len(targets))]})
    own = np.eye(len(targets), len(reference), dtype=bool)
    empty_targets = pl.DataFrame(schema=TARGETS)
    empty_reference = pl.DataFrame(schema=REFERENCE)
    return Yardstick(
        pl.concat([empty_targets, table], how="diagonal"),
        targets,
        pl.concat([empty_reference, pl.DataFrame({"caption": names}, schema={"caption": pl.String})], how="diagonal"),
        reference,
        own,
        others=nearest_other(targets, reference, own),
    )


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def grey(value: int) -> np.ndarray:
    return np.full((1, 16, 16, 3), value, np.uint8)


def test_delta_is_half_the_distance_to_the_nearest_other_picture():
    yardstick = make_yardstick(grey(100), np.concatenate([grey(151), grey(10), noise(3)]))
    assert calibrate(yardstick).delta["t0"] == pytest.approx(51 / 255 / 2, abs=1e-6)


def test_delta_is_at_most_that_of_the_literature():
    assert calibrate(make_yardstick(grey(0), np.concatenate([grey(255), noise(3)]))).delta["t0"] == 0.15


def test_mirror_images_of_others_count_and_its_own_does_not():
    half = grey(0)
    half[:, :, :8] = 200
    yardstick = make_yardstick(half, noise(4))
    assert calibrate(yardstick).delta["t0"] == 0.15  # its own mirror image is as far as pictures get
    symmetric = grey(128)
    assert calibrate(make_yardstick(symmetric, noise(4))).delta["t0"] > 0.1
    nearly = flip(half).copy()
    nearly[:, :, 8:] = 180  # a mirrored relative
    expected = np.sqrt(0.5) * 20 / 255 / 2
    assert calibrate(make_yardstick(half, np.concatenate([nearly, noise(3)]))).delta["t0"] == pytest.approx(
        expected, abs=1e-6
    )


@given(st.integers(0, 10**6), st.floats(0.2, 0.8))
def test_within_delta_no_other_picture_is_nearer(seed, contrast):
    """The reason for the rule: the triangle inequality. The hardest generation lies between target and neighbour."""
    rng = np.random.default_rng(seed)
    pictures = (128 + contrast * (noise(6, seed).astype(float) - 128)).astype(np.uint8)
    yardstick = make_yardstick(pictures[:2], pictures[2:])
    delta = calibrate(yardstick).delta["t0"]
    reference = scale(yardstick.reference_pixels)
    for other in range(1, len(reference)):
        step = rng.uniform(0, 1)
        generation = (1 - step) * reference[:1] + step * reference[other : other + 1]
        distances = l2(generation, reference)[0]
        if distances[0] < delta - 1e-5:
            assert distances.argmin() == 0


def test_edge_threshold_is_the_quantile_of_unrelated_pairs():
    pictures = noise(60)
    calibration = calibrate(make_yardstick(pictures[:3], pictures[3:]))
    tiles = max_tile_l2(scale(pictures))[np.triu_indices(60, 1)]
    assert calibration.edge_pairs == len(tiles) == 60 * 59 // 2
    assert calibration.delta_edge == pytest.approx(np.quantile(tiles, 0.001), abs=1e-6)
    assert list(calibration.edge_quantiles.values()) == sorted(calibration.edge_quantiles.values())
    assert calibration.edge_quantiles["0.001"] == calibration.delta_edge


def test_pairs_with_one_caption_do_not_set_the_edge_threshold():
    """Two near-copies under one caption would pull it to 0; images without a caption are of different ones."""
    pictures = noise(40)
    pictures[7] = pictures[8]
    captions: list[str | None] = [f"picture {n}" for n in range(40)]
    low = calibrate(make_yardstick(pictures[:2], pictures[2:], list(captions)))
    captions[7] = captions[8] = "one caption"
    high = calibrate(make_yardstick(pictures[:2], pictures[2:], list(captions)))
    assert low.delta_edge < high.delta_edge
    assert (low.edge_pairs, high.edge_pairs) == (780, 779)
    captions[7] = captions[8] = None
    assert calibrate(make_yardstick(pictures[:2], pictures[2:], list(captions))).edge_pairs == 780


def test_literature_values_come_with_their_measured_share():
    """Of six pictures two lie 0.08 apart and a third 0.12 from the nearer of them."""
    pictures = np.concatenate([grey(20), grey(20 + 20), grey(20 + 20 + 31), grey(140), grey(190), grey(240)])
    calibration = calibrate(make_yardstick(pictures[:1], pictures[1:]))
    shares = {entry["delta"]: entry["share"] for entry in calibration.literature}
    assert shares == {0.15: pytest.approx(3 / 6), 0.10: pytest.approx(2 / 6, abs=1e-6), 0.05: 0}
    assert calibration.nearest_quantiles["0.5"] == pytest.approx(np.median([20, 20, 31, 50, 50, 50]) / 255, abs=1e-6)


def test_mirrored_neighbours_count_in_the_shares():
    half = grey(0)
    half[:, :, :8] = 200
    calibration = calibrate(make_yardstick(half, np.concatenate([flip(half), noise(2)])))
    assert calibration.literature[-1]["share"] == pytest.approx(0.5)


def test_the_digest_knows_the_pictures_and_not_their_order():
    pictures = noise(12)
    a = calibrate(make_yardstick(pictures[:1], pictures[1:]))
    b = calibrate(make_yardstick(pictures[:1], pictures[:0:-1]))
    c = calibrate(make_yardstick(pictures[:1], noise(11, seed=9)))
    assert a == b
    assert a.reference_sha256 != c.reference_sha256


def test_a_large_reference_is_sampled_alike_in_every_order(monkeypatch):
    monkeypatch.setattr(calibration_, "SAMPLE", 10)
    pictures = noise(50)
    a = calibrate(make_yardstick(pictures[:1], pictures[1:]))
    assert a.edge_pairs == 45
    assert a == calibrate(make_yardstick(pictures[:1], pictures[:0:-1]))


def test_too_little_to_calibrate_with_is_refused():
    with pytest.raises(CalibrationError, match="too few"):
        calibrate(make_yardstick(grey(0), grey(9)))
    with pytest.raises(CalibrationError, match="one caption"):
        calibrate(make_yardstick(grey(0), noise(5), ["same"] * 6))


def test_thresholds_stay_as_they_were_set(tmp_path):
    pictures = noise(9)
    path = tmp_path / "calibration.json"
    first = calibrate(make_yardstick(pictures[:2], pictures[2:]))
    freeze(first, path)
    before = path.read_bytes()
    freeze(first, path)
    assert path.read_bytes() == before
    assert manifest.read_json(path) == asdict(first)
    freeze(calibrate(make_yardstick(pictures[:1], pictures[1:])), path)  # fewer targets
    assert path.read_bytes() == before
    for other in (make_yardstick(pictures[:3], pictures[3:]), make_yardstick(pictures[:2], noise(7, seed=5))):
        with pytest.raises(CalibrationError, match=r"delta.* differ"):
            freeze(calibrate(other), path)
    assert path.read_bytes() == before


def test_multiplicities_dealt_out_anew_leave_the_thresholds_alone(planted, tmp_path):
    """Another seed of `plant`: same pictures, other copies. Same deltas, whatever deduplication makes of it."""
    a = calibrate(load_yardstick(planted, RESOLUTION))
    b = calibrate(load_yardstick(make_planted(tmp_path, seed=1), RESOLUTION))
    assert a == b
    assert a.n_reference == 38


def test_a_missed_copy_does_not_shrink_delta(planted, tmp_path):
    """With detection of equal bytes only, edited copies stay in the manifest as pictures of their own."""
    src = manifest.read_run(planted)["src"]
    blunt = tmp_path / "blunt"
    deduplicate(type(planted)(src), blunt, Options(level="exact"), jobs=1)
    assert manifest.read(blunt)["keep"].sum() > manifest.read(planted)["keep"].sum()
    assert calibrate(load_yardstick(blunt, RESOLUTION)) == calibrate(load_yardstick(planted, RESOLUTION))


def test_own_data_are_calibrated_by_components(tmp_path):
    out = make_plain(tmp_path, [4, 2, 1, 1, 1, 1])
    calibration = calibrate(load_yardstick(out, RESOLUTION))
    assert calibration.n_reference == 6
    assert min(calibration.delta.values()) > 0.05
