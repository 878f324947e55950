"""Would the verdict be believed? Simulated audits: no effect, a promised effect, a deduplication of the wrong rows.

Extraction follows a logistic curve in log2 of the multiplicity, images and training runs differ, and which image has
which multiplicity is dealt out by `dedup.plant`, as in a real audit.
"""

import json

import numpy as np
import polars as pl
import pytest
from scipy import special
from test_eval_compare import judge_simply, tabulate

from dedup.plant import assign_levels
from eval import power, stats
from eval.contrasts import A, B, count_pairs, judge_seeds, match_arms, repeated
from eval.recipe import Planting, Recipe

LEVELS = (0, 1, 2, 4, 8, 16, 32, 64)
SHIPPED = Recipe(plant=Planting())  # of configs/audit-cpu.toml: 48 canaries, two seeds


def deal(canaries: int, seeds: int) -> np.ndarray:
    """int (canaries, seeds): multiplicities."""
    return np.array([[m for m, _ in assign_levels(canaries, LEVELS, 0.5, seed)] for seed in range(seeds)]).T


def train_run(rng: np.random.Generator, m: np.ndarray, images: np.ndarray) -> np.ndarray:
    """bool like m (canaries, seeds): given back by a model that saw each image m times."""
    run = power.BETWEEN * rng.standard_normal((1, m.shape[1]))
    chance = special.expit(1.2 * (np.log2(np.maximum(m, 1)) - 3) + images[:, None] + run)
    return rng.random(m.shape) < np.where(m == 0, 0, chance)


def simulate(rng: np.random.Generator, m: np.ndarray, left: np.ndarray) -> dict[str, np.ndarray]:
    """raw saw each image m times, the other arm `left` times: what each gives back."""
    images = rng.standard_normal(len(m))
    return {"raw": train_run(rng, m, images), "refill": train_run(rng, left, images)}


def assign(y: dict[str, np.ndarray], m: np.ndarray) -> stats.Effect:
    """The primary contrast of a planted audit; fewer draws than there, for speed."""
    return stats.assignment_test(y["raw"].astype(int) - y["refill"], m >= 2, draws=999)


def covers(effect: stats.Effect) -> bool:
    return effect.low <= 0 <= effect.high


@pytest.fixture(scope="module")
def nothing_changed() -> list[tuple[stats.Effect, stats.Effect, stats.Effect]]:
    """500 audits of the shipped size in which the second arm is another training on the same rows."""
    m, rng, found = deal(SHIPPED.plant.canaries, SHIPPED.seeds), np.random.default_rng(0), []
    for _ in range(500):
        y = simulate(rng, m, m)
        some = match_arms(tabulate(y, m, SHIPPED.seeds), ("raw", "refill")).filter(repeated(2))
        over_seeds = judge_seeds(some, list(range(SHIPPED.seeds)))
        assert isinstance(over_seeds, stats.Effect)
        found.append((over_seeds, assign(y, m), count_pairs(some, A, B)[1]))
    return found


def test_over_the_seeds_no_effect_is_covered_as_often_as_promised(nothing_changed):
    held = np.mean([covers(over_seeds) for over_seeds, _, _ in nothing_changed])
    assert 0.93 <= held <= 0.97


def test_the_randomisation_test_claims_no_effect_more_rarely_than_promised(nothing_changed):
    """It is conservative here: what varies between runs varies only where images are given back at all."""
    assert np.mean([covers(assignment) for _, assignment, _ in nothing_changed]) >= 0.95
    assert np.mean([assignment.p_value <= 0.05 for _, assignment, _ in nothing_changed]) <= 0.05


def test_intervals_of_the_checkpoints_would_promise_too_much_of_the_procedure(nothing_changed):
    """Why they are labelled "these checkpoints"."""
    assert np.mean([covers(pooled) for _, _, pooled in nothing_changed]) < 0.93


@pytest.mark.parametrize(("canaries", "seeds"), [(48, 2), (48, 1), (24, 2)])
def test_the_promised_power_is_there(canaries, seeds):
    """A drop as large as the plan says, spread over the images by a dose-response curve instead of evenly."""
    m = deal(canaries, seeds)
    promised = power.smallest_assigned_drop(m >= 2)
    rng, found, drops = np.random.default_rng(canaries + seeds), 0, []
    shift = find_shift(promised)
    for _ in range(200):
        chance = special.expit(
            1.2 * np.log2(np.maximum(m, 1)) + shift + power.BETWEEN * rng.standard_normal((1, seeds))
        )
        raw = (rng.random(m.shape) < chance) & (m >= 2)
        effect = stats.assignment_test(raw.astype(int), m >= 2, draws=999)
        found += effect.p_value <= 0.05
        drops.append(raw[m >= 2].mean())
    assert np.mean(drops) == pytest.approx(promised, abs=0.03)
    assert found / 200 >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / 200)


def find_shift(drop: float) -> float:
    doses = 1.2 * np.log2([m for m in LEVELS if m >= 2])
    grid = np.linspace(-12, 6, 721)
    return float(grid[np.abs([special.expit(doses + shift).mean() - drop for shift in grid]).argmin()])


def test_deduplication_that_removes_random_rows_shows_no_benefit():
    """As many rows go as in a real one, 29 % of them stay, but it does not matter whose copies they are."""
    m, rng = deal(48, 2), np.random.default_rng(1)
    kept = (42 + 250) / (m[:, 0].sum() + 250)
    claims = []
    for _ in range(200):
        # Rows are fewer, steps are the same: each is seen as much more often as there are fewer of them.
        effect = assign(simulate(rng, m, np.round(rng.binomial(m, kept) / kept).astype(int)), m)
        claims.append(effect.p_value <= 0.05 and effect.estimate > 0)
    assert np.mean(claims) <= 0.1


def test_deduplication_that_works_is_seen_every_time():
    m, rng = deal(48, 2), np.random.default_rng(2)
    effects = [assign(simulate(rng, m, np.minimum(m, 1)), m) for _ in range(100)]
    assert all(effect.p_value <= 0.05 and effect.low > 0 for effect in effects)


def test_a_run_that_is_worse_at_everything_is_no_benefit_of_deduplication():
    """The second arm gives back less whatever the multiplicity, canaries planted once and never among them."""
    m, rng = deal(48, 2), np.random.default_rng(3)
    chance = 0.6 * np.ones(m.shape)
    claims = 0
    for _ in range(100):
        y = {"raw": rng.random(m.shape) < chance, "refill": rng.random(m.shape) < chance - 0.4}
        claims += assign(y, m).p_value <= 0.05
    assert claims <= 11  # .05 of 100, within 2.7 standard errors


def test_equal_inputs_give_equal_bytes():
    m, rng = deal(48, 2), np.random.default_rng(4)
    y = {arm: train_run(rng, m, np.zeros(48)) for arm in ("raw", "refill", "hash")}
    rows = tabulate(y, m, 2)
    first, second = (json.dumps(judge_simply(rows.clone()), sort_keys=True) for _ in range(2))
    assert first == second
    shuffled = rows.sample(fraction=1, shuffle=True, seed=1).sort(
        pl.col("arm").replace_strict({"raw": 0, "refill": 1, "hash": 2}), "seed", maintain_order=True
    )
    assert judge_simply(shuffled)["primary"]["estimate"] == json.loads(first)["primary"]["estimate"]


def test_identity_is_not_confounded_with_multiplicity():
    """Over eight seeds every canary has every multiplicity once; in each seed every level has equally many."""
    m = deal(48, 8)
    assert all(sorted(row) == list(LEVELS) for row in m.tolist())
    for seed in range(8):
        assert np.bincount(np.searchsorted(LEVELS, m[:, seed])).tolist() == [6] * 8
