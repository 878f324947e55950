"""When a prompt gets images, and when it has had enough. Numbers in, decisions out; knows nothing of models and files.

Every number of a rule is fixed before anything is drawn; benchmarks/budget.py tunes them on some seeds and judges them
on others.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAFT = "draft"
EVALUATIONS = {"noise-magnitude": 2, "one-step": 2, "anisotropy": 4, "agreement": 1}  # of the denoiser, a noise
MAD = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


class BudgetError(ValueError):
    """Runs that cannot share a schedule, or a rule that makes no sense."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The defaults are those of benchmarks/budget.py.

    A draft is an image in very few steps. What is memorised can be seen in it (Webster 2023 needs one step), and we
    know which picture to look for; whoever does not know it has to ask a detector.
    """

    detector: str | None = DRAFT  # or one of EVALUATIONS; None: every prompt gets its first images
    noises: int = 1  # of each caption
    draft_steps: int = 3
    within: float = 1.2  # a prompt goes on when its draft is within so many δ
    spread: float = -0.5  # of a detector: median absolute deviations (as standard deviations) above the median
    first: int = 4  # images before a prompt is given up
    near: float = 1.5  # it goes on as long as its nearest image is within so many δ
    until: str = "extracted"  # or "direct": the column of the clique attack that settles a prompt
    check: float = 0.1  # share of the prompts given up that get the full schedule


DEFAULT = Rule()

# Target, number of its images → what the clique attack says of them in every run
Look = Callable[[str, int], Sequence[dict[str, Any]]]


def check_rule(rule: Rule) -> None:
    """Raise BudgetError unless it makes sense."""
    if rule.detector not in (None, DRAFT, *EVALUATIONS):
        raise BudgetError(f"unknown detector {rule.detector!r}: choose of {', '.join((DRAFT, *EVALUATIONS))}, or none")
    if rule.until not in ("extracted", "direct"):
        raise BudgetError(f"a prompt is settled by `extracted` or `direct`, not by {rule.until!r}")
    if min(rule.noises, rule.first, rule.draft_steps) < 1 or not 0 <= rule.check <= 1:
        raise BudgetError("noises, first and draft_steps must be at least 1, and check a share from 0 to 1")


def count_evaluations(rule: Rule, guided: int) -> int:
    """Of the denoiser, for the look at one caption. guided: evaluations a step of an image."""
    if rule.detector is None:
        return 0
    return rule.noises * (rule.draft_steps * guided if rule.detector == DRAFT else EVALUATIONS[rule.detector])


def choose(rule: Rule, looks: Sequence[np.ndarray]) -> np.ndarray:
    """Scores (P,) of every run, higher = more likely memorised → bool (P,): whether the prompt gets images.

    Drafts: minus the distance in δ. Detectors: so far above the usual in any of the runs, in deviations from the
    median, because the scale of a detector is that of its model; prompts that are memorised must be a minority. What
    has no score is chosen.
    """
    chosen = np.zeros(len(looks[0]), bool)
    for values in looks:
        if rule.detector == DRAFT:
            least = -rule.within
        else:
            middle = np.nanmedian(values)
            least = middle + rule.spread * MAD * np.nanmedian(np.abs(values - middle))
        chosen |= ~(values < least)
    return chosen


def list_rounds(n: int) -> list[int]:
    """Images after each round: 1, 2, 4 … n."""
    return [2**power for power in range(n.bit_length()) if 2**power < n] + [n]


def is_decided(rule: Rule, score: dict[str, Any], images: int) -> bool:
    """Settled, or nothing near it among its first images."""
    if score[rule.until]:
        return True
    near = score["best_distance"] is not None and score["best_distance"] <= rule.near * score["delta"]
    return images >= rule.first and not near


def run_rounds(rule: Rule, targets: Sequence[str], n: int, look: Look) -> dict[str, int]:
    """Target → images it has had when it was decided in every run."""
    drawn = dict.fromkeys(targets, 0)
    left = list(targets)
    for images in list_rounds(n):
        drawn |= dict.fromkeys(left, images)
        left = [target for target in left if not all(is_decided(rule, each, images) for each in look(target, images))]
    return drawn


def draw_check(given_up: Sequence[str], share: float) -> list[str]:
    """A random part of these targets, the same for all runs, rounded up."""
    order = sorted(given_up, key=lambda name: hashlib.blake2b(f"check {name}".encode()).hexdigest())
    chosen = set(order[: math.ceil(share * len(order))])
    return [name for name in given_up if name in chosen]
