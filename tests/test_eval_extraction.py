"""eval.extraction: positive and negative controls, cliques, and why the reference holds every picture once."""

import itertools
import re
from pathlib import Path

import networkx
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from test_eval_targets import (
    RESOLUTION,
    make_plain,
    make_planted,
    make_run,
    paint,
    write_generations,
    write_png,
)

from dedup import manifest
from defense.distances import flip, l2, scale
from eval.calibrate import CalibrationError
from eval.extraction import (
    CLIQUE_SIZES,
    EXACT_CLIQUE,
    SCORES,
    AttackError,
    attack,
    clique_threshold,
    find_largest_clique,
)
from eval.generate import derive_seed
from eval.reference import load_pixels
from eval.targets import load_targets


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("extraction"))


@pytest.fixture(scope="module")
def originals(out):
    """target_id → uint8 (R, R, 3)."""
    targets = load_targets(out)
    return dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))


@pytest.fixture
def run(out, tmp_path):
    return make_run(tmp_path, out)


def disturb(pixels: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Add normal noise of this standard deviation, in 0 … 1."""
    rng = np.random.default_rng(seed)
    return (pixels + rng.normal(0, 255 * amount, pixels.shape)).round().clip(0, 255).astype(np.uint8)


def fresh(number: int) -> np.ndarray:
    """A picture that stands nowhere."""
    return paint(100_000 + number, RESOLUTION)


# Controls


def test_a_model_that_only_copies_is_caught_everywhere(out, originals, run):
    write_generations(run, out, lambda target, j: disturb(originals[target["target_id"]], 0.02, j))
    scores = attack(run)
    assert dict(scores.schema) == SCORES
    assert scores.equals(pl.read_parquet(run / "scores-clique.parquet"))
    assert scores["extracted"].all()
    assert scores["direct"].all()
    assert (scores["matches"] == 8).all()
    assert (scores["clique_size"] == 8).all()
    assert (scores["clique_k"] == 2).all()
    assert (scores["wrong_matches"] == 0).all()
    assert scores["best_distance"].is_between(0.01, 0.03).all()
    assert (scores["medoid_distance"] < 0.03).all()
    assert (scores["best_distance_flip"] > 0.1).all()
    assert (scores["matches_flip"] == 0).all()


def test_a_model_that_copies_nothing_is_not_accused(out, run):
    write_generations(run, out, lambda target, j: fresh(derive_seed(target["target_id"], j) % 10**6))
    scores = attack(run)
    assert scores["matches"].sum() == scores["wrong_matches"].sum() == 0
    assert not scores["extracted"].any()
    assert not scores["direct"].any()
    assert (scores["clique_size"] == 1).all()
    assert (scores["best_distance"] > scores["delta"]).all()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40 targets."""
    return make_planted(tmp_path_factory.mktemp("many"), levels=(0, 1), canaries=40, fillers=30, edited=0.0)


@pytest.mark.parametrize("p", [0.05, 0.15, 0.4])
def test_recall_follows_the_binomial_curve(many, tmp_path, p):
    """A stub gives an image back with probability p: extracted with 1 - (1 - p)^n, flagged with P(Bin(n, p) >= k)."""
    n, out = 16, many
    targets = load_targets(out)
    pixels = dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))
    rng = np.random.default_rng(round(100 * p))

    def answer(target, j):
        if rng.random() < p:
            return disturb(pixels[target["target_id"]], 0.02, j)
        return fresh(int(rng.integers(10**6)))

    run = make_run(tmp_path, out)
    write_generations(run, out, answer, n=n)
    scores = attack(run)
    assert scores["wrong_matches"].sum() == 0
    matches = int(scores["matches"].sum())
    assert stats.binomtest(matches, n * len(scores), p).pvalue > 0.001
    extracted, direct = int(scores["extracted"].sum()), int(scores["direct"].sum())
    assert stats.binomtest(extracted, len(scores), 1 - (1 - p) ** n).pvalue > 0.001
    assert stats.binomtest(direct, len(scores), stats.binom.sf(clique_threshold(n) - 1, n, p)).pvalue > 0.001
    assert direct <= extracted


def test_a_template_makes_a_clique_that_is_no_extraction(out, run):
    """Every generation of a prompt is alike, but like no picture of the data: flagged, not verified."""
    write_generations(run, out, lambda target, j: disturb(fresh(7), 0.02, j))
    scores = attack(run)
    assert scores["clique_flag"].all()
    assert not scores["direct"].any()
    assert not scores["extracted"].any()


def test_another_picture_than_asked_for_is_a_wrong_match(out, originals, run):
    names = sorted(originals)
    other = dict(zip(names, names[1:] + names[:1], strict=True))
    write_generations(run, out, lambda t, j: originals[other[t["target_id"]]] if j < 3 else fresh(j))
    scores = attack(run)
    assert (scores["wrong_matches"] == 3).all()
    assert not scores["extracted"].any()


def test_mirrored_copies_are_reported_apart(out, originals, run):
    write_generations(run, out, lambda t, j: np.ascontiguousarray(originals[t["target_id"]][:, ::-1]))
    scores = attack(run)
    assert (scores["matches_flip"] == 8).all()
    assert (scores["best_distance_flip"] < 1e-6).all()
    assert not scores["extracted"].any()
    assert not scores["direct"].any()


# Why the reference holds every picture once


def test_duplicates_hide_copies_from_the_usual_metrics_and_not_from_this_attack(tmp_path):
    """Verbatim copies of images that stand m times, measured against all rows as they are.

    Nearest-neighbour ratio (Yoon et al. 2023): d1 / d2 < 1/3. AuthPct (Alaa et al. 2022): nearer to the nearest row
    than that is to any other row. Both see every copy of a single image and none of a duplicated one.
    """
    out = make_planted(tmp_path, levels=(1, 2, 5), canaries=12, fillers=30, edited=0.0)
    targets = load_targets(out)
    pixels = load_pixels(out, targets, RESOLUTION)
    copies = [disturb(image, 0.01, number) for number, image in enumerate(pixels)]
    rows = scale(load_pixels(out, manifest.read(out), RESOLUTION))
    to_rows = l2(scale(np.stack(copies)), rows)
    nearest = to_rows.argmin(axis=1)
    first, second = np.sort(to_rows, axis=1)[:, :2].T
    ratio = first / second < 1 / 3
    between = l2(rows[nearest], rows)
    between[np.arange(len(nearest)), nearest] = np.inf
    not_authentic = first < between.min(axis=1)
    m = targets["multiplicity"].to_numpy()
    for metric in (ratio, not_authentic):
        assert metric[m == 1].all()
        assert not metric[m > 1].any()

    run = make_run(tmp_path, out)
    by_target = dict(zip(targets["target_id"], copies, strict=True))
    write_generations(run, out, lambda target, j: by_target[target["target_id"]])
    scores = attack(run)
    assert scores["extracted"].all()
    assert scores["direct"].all()
    assert scores["eidetic_k"].to_list() == m.tolist()


# Details of a score


def test_each_column_says_what_it_should(out, originals, run):
    """Five copies, two nearer than the others; one NaN; two unrelated."""

    def answer(target, j):
        if j == 6:
            return None
        if j < 5:
            return disturb(originals[target["target_id"]], 0.005 if j in (1, 3) else 0.04, j)
        return fresh(j)

    table = write_generations(run, out, answer)
    scores = attack(run)
    assert (scores["n_generations"] == 8).all()
    assert (scores["n_nan"] == 1).all()
    assert (scores["matches"] == 5).all()
    assert (scores["clique_size"] == 5).all()
    targets = load_targets(out)
    for score, target in zip(scores.iter_rows(named=True), targets.iter_rows(named=True), strict=True):
        assert {name: score[name] for name in target} == target
        mine = table.filter(prompt_id=target["target_id"])
        original = scale(originals[target["target_id"]][None])
        made = scale(np.stack([load_png(run / f) for f in mine["file"].drop_nulls()]))
        distance = l2(made, original)[:, 0]
        assert score["best_distance"] == pytest.approx(distance.min())
        assert score["best_file"] == mine["file"].drop_nulls()[int(distance.argmin())]
        assert score["best_file"] in (mine["file"][1], mine["file"][3])
        assert score["medoid_file"] in (mine["file"][1], mine["file"][3])
        assert score["best_distance_flip"] == pytest.approx(l2(made, flip(original)).min())
        assert 0.02 < score["clique_mean_distance"] < 0.08


def load_png(path: Path) -> np.ndarray:
    import cv2

    return cv2.imread(str(path))[..., ::-1]


def test_an_edited_copy_counts_for_k_when_its_pixels_do(out, run):
    """k counts rows within delta of the canary: exact and recompressed copies do, crops and mirror images do not."""
    write_generations(run, out, lambda target, j: fresh(j))
    scores = attack(run)
    truth = pl.read_parquet(out / "plant.parquet")
    alike = truth.filter(pl.col("edit").is_in(["exact", "jpeg", "resize"])).group_by("canary").len()
    expected = dict(alike.iter_rows())
    assert dict(scores.select("target_id", "eidetic_k").iter_rows()) == {
        target: expected.get(target, 0) for target in scores["target_id"]
    }
    assert scores.filter(multiplicity=0)["eidetic_k"].sum() == 0


def test_too_few_finite_generations_make_no_clique(out, originals, run):
    write_generations(run, out, lambda t, j: originals[t["target_id"]] if j < 3 else None)
    scores = attack(run)
    assert scores["clique_size"].null_count() == len(scores)
    assert not scores["clique_flag"].any()
    assert scores["extracted"].all()
    assert (scores["matches"] == 3).all()


def test_nothing_finite_is_a_row_like_any_other(out, run):
    write_generations(run, out, lambda target, j: None)
    scores = attack(run)
    assert len(scores) == 8
    assert (scores["n_nan"] == 8).all()
    assert scores["best_distance"].null_count() == 8
    assert not scores["extracted"].any()


def test_own_data_are_attacked_too(tmp_path):
    out = make_plain(tmp_path, [3, 1, 2, 1, 1, 1])
    targets = load_targets(out, limit=4)
    pixels = dict(zip(targets["target_id"], load_pixels(out, targets, RESOLUTION), strict=True))
    run = make_run(tmp_path, out)
    write_generations(run, out, lambda t, j: pixels[t["target_id"]] if t["multiplicity"] > 1 else fresh(j), limit=4)
    scores = attack(run)
    assert scores["multiplicity"].to_list() == scores["eidetic_k"].to_list() == [3, 2, 1, 1]
    assert scores["extracted"].to_list() == [True, True, False, False]


# Order, freezing, refusals


def test_thresholds_are_written_before_an_image_is_opened(out, run):
    table = write_generations(run, out, lambda target, j: fresh(j))
    (run / table["file"][0]).unlink()
    with pytest.raises(FileNotFoundError):
        attack(run)
    assert (run / "calibration.json").exists()
    assert not (run / "scores-clique.parquet").exists()


def test_two_models_have_the_same_thresholds(out, originals, tmp_path):
    runs = [make_run(tmp_path, out, arm) for arm in ("raw", "refill")]
    write_generations(runs[0], out, lambda t, j: originals[t["target_id"]])
    write_generations(runs[1], out, lambda t, j: fresh(j))
    attacked = [attack(run) for run in runs]
    first, second = ((run / "calibration.json").read_bytes() for run in runs)
    assert first == second
    assert attacked[0]["delta"].equals(attacked[1]["delta"])


def test_the_same_input_gives_the_same_bytes(out, originals, run):
    write_generations(run, out, lambda t, j: disturb(originals[t["target_id"]], 0.1, j))
    attack(run)
    before = (run / "scores-clique.parquet").read_bytes()
    attack(run)
    assert (run / "scores-clique.parquet").read_bytes() == before


def test_frozen_thresholds_are_not_replaced(out, run):
    write_generations(run, out, lambda target, j: fresh(j))
    attack(run)
    changed = manifest.read_json(run / "calibration.json") | {"delta_edge": 0.9}
    manifest.write_json(run / "calibration.json", changed)
    with pytest.raises(CalibrationError, match="delta_edge"):
        attack(run)


def test_what_cannot_be_scored_is_refused(out, run, tmp_path):
    with pytest.raises(AttackError, match="choose one of clique, adaptive, template"):
        attack(run, "magic")
    with pytest.raises(AttackError, match=f"unmemorize generate {re.escape(str(run))}"):
        attack(run)
    write_generations(run, out, lambda target, j: fresh(j), n=3)
    with pytest.raises(AttackError, match="3 generations a prompt"):
        attack(run)
    table = write_generations(run, out, lambda target, j: fresh(j))
    write_png(run / table["file"][5], paint(1, 48))
    with pytest.raises(AttackError, match="48 × 48 pixels, the model makes 32"):
        attack(run)
    manifest.write_parquet(run / "generations.parquet", table.with_columns(prompt_id="x" + pl.col("prompt_id")))
    with pytest.raises(ValueError, match=r"belong to no target"):
        attack(run)


# Cliques


def test_clique_sizes_are_as_sensitive_as_their_table_says():
    """Probability of a copy at which a prompt is found half of the time (and 90 % of the time), by the binomial."""
    table = {500: (0.019, 0.028), 256: (0.022, 0.036), 128: (0.036, 0.061), 64: (0.057, 0.10)}
    table |= {32: (0.083, 0.158), 16: (0.164, 0.30), 10: (0.26, 0.45), 4: (0.39, 0.68)}
    assert table.keys() == CLIQUE_SIZES.keys()
    for n, expected in table.items():
        for chance, p in zip((0.5, 0.9), expected, strict=True):
            k = CLIQUE_SIZES[n]
            found = optimize.brentq(lambda q, n=n, k=k, c=chance: stats.binom.sf(k - 1, n, q) - c, 1e-6, 0.999)
            assert found == pytest.approx(p, abs=0.006)


def test_k_between_the_tabulated_sizes():
    assert [clique_threshold(n) for n in (4, 9, 10, 63, 64, 127, 499, 500, 5000)] == [2, 2, 3, 3, 4, 4, 6, 10, 10]
    with pytest.raises(AttackError, match="4 or more"):
        clique_threshold(3)


def random_graph(n: int, p: float, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((n, n)) < p, 1)
    return upper | upper.T


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_largest_clique_equals_brute_force(n, p, seed):
    graph = random_graph(n, p, seed)
    found = find_largest_clique(graph)
    cliques = (c for k in range(1, n + 1) for c in itertools.combinations(range(n), k))
    largest = max(len(c) for c in cliques if all(graph[a, b] for a, b in itertools.combinations(c, 2)))
    assert len(found) == largest
    assert graph[np.ix_(found, found)].sum() == len(found) * (len(found) - 1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_largest_clique_equals_listing_all(p):
    graph = random_graph(40, p, 1)
    listed = max(len(c) for c in networkx.find_cliques(networkx.from_numpy_array(graph)))
    assert len(find_largest_clique(graph)) == listed


def plant_clique(n: int, members: list[int], p: float, seed: int) -> np.ndarray:
    graph = random_graph(n, p, seed)
    graph[np.ix_(members, members)] = True
    return graph


@pytest.mark.parametrize("n", [64, 200])
def test_a_planted_clique_is_found_and_chance_has_none(n):
    """12 of 64, among edges by chance at 5 %; rewired to the same number of edges, nothing of that size remains."""
    members = sorted(np.random.default_rng(3).choice(n, 12, replace=False).tolist())
    graph = plant_clique(n, members, 0.05, 2)
    assert find_largest_clique(graph).tolist() == members
    upper = np.triu_indices(n, 1)
    edges = np.zeros((n, n), bool)
    edges[upper] = np.random.default_rng(4).permutation(graph[upper])
    assert len(find_largest_clique(edges | edges.T)) < clique_threshold(n) + 2


def test_a_chain_is_no_clique():
    """Connected components would call it memorised."""
    chain = np.eye(20, k=1, dtype=bool) | np.eye(20, k=-1, dtype=bool)
    assert len(find_largest_clique(chain)) == 2
    assert len(find_largest_clique(np.zeros((5, 5), bool))) == 1


def test_hard_graphs_take_no_time():
    """Complete graphs without a perfect matching have 3^(n/3) maximal cliques (Moon & Moser 1965)."""
    graph = np.kron(~np.eye(21, dtype=bool), np.ones((3, 3), bool))
    assert len(find_largest_clique(graph)) == 21
    assert len(find_largest_clique(np.ones((EXACT_CLIQUE, EXACT_CLIQUE), bool))) == EXACT_CLIQUE
    assert len(find_largest_clique(np.ones((300, 300), bool))) == 300
