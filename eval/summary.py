"""Scores of an attack in the terms of Carlini et al. 2023: what came back, of how many, and how often by chance.

In: a table of scores, one row a target, and what was drawn by captions of which kind. Out: JSON values; every rate with
its denominator, its interval, and that of the controls beside it. Knows nothing of models or files.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from eval import metrics
from eval.replication import summarise_similarity
from eval.stats import Effect, plain, wilson

# Stable Diffusion 1.4, sec. 4.2: captions of the most duplicated images, 500 generations each; found by ℓ2, and with
# the near-copies that were found by eye.
LITERATURE = {"prompts": 350_000, "generations": 175_000_000, "direct": 94, "with_near": 109}
DRAWS = 9_999
GROUPS = {"members": "member", "controls": "control"}  # name here → prompt_kind


def summarise_scores(scores: pl.DataFrame, told: pl.DataFrame | None = None, level: float = 0.95) -> dict[str, Any]:
    """Scores of one attack on one run → counts and rates of members and controls, in all and by kind of caption.

    told: of `count_by_caption`; without it each target counts under the one kind that its scores name.
    direct: all of the rule of the attack. near: extracted otherwise. The unit of the rate per generation is the prompt.
    What cannot match (`matches` is null: a target without a template) is in no denominator: no control is, then.
    """
    asked = scores.filter(pl.col("matches").is_not_null())
    groups = {name: asked.filter(prompt_kind=kind) for name, kind in GROUPS.items()}
    summary: dict[str, Any] = {name: _count(rows, level) for name, rows in groups.items()}
    extracted = [int(groups[name]["extracted"].sum()) for name in groups]
    sizes = [len(rows) for rows in groups.values()]
    difference = rate_difference(extracted[0], sizes[0], extracted[1], sizes[1], level)
    by_kind = rate_captions(scores, [scores if told is None else told], level)
    summary |= {"difference": None if difference is None else plain(difference), "by_caption_kind": by_kind}
    if "similarity" in scores.columns:
        summary["similarity"] = {name: _summarise(rows) for name, rows in groups.items()}
    return summary | {"cannot_match": len(scores) - len(asked), "literature": LITERATURE}


def count_by_caption(generations: pl.DataFrame, scores: pl.DataFrame) -> pl.DataFrame:
    """target_id, caption_kind, n_generations, n_nan, matches: a row a target and kind of captions it was asked by.

    As in the scores, whose `matched_files` say which images match. Pruned prompts count, with no generations.
    """
    matched = scores.select("target_id", file="matched_files").explode("file").drop_nulls().with_columns(near=True)
    drawn = generations.select("caption_kind", "status", "file", target_id="prompt_id")
    drawn = drawn.filter(pl.col("target_id").is_in(scores["target_id"].to_list()))
    drawn = drawn.join(matched, on=["target_id", "file"], how="left", maintain_order="left")
    counts = {
        "n_generations": pl.col("status") != "pruned",
        "n_nan": ~pl.col("status").is_in(["pruned", "ok"]),
        "matches": pl.col("near").fill_null(False),
    }
    each = drawn.group_by("target_id", "caption_kind", maintain_order=True)
    return each.agg(true.sum().cast(pl.Int64).alias(name) for name, true in counts.items())


def rate_captions(scores: pl.DataFrame, told: Sequence[pl.DataFrame], level: float = 0.95) -> dict[str, Any]:
    """Kind of captions → what came back by them alone, of the members and of the controls that were asked so.

    told: tables with the columns of `count_by_caption`; of one target and kind they count together. extracted: a
    generation for such a caption matches. Several kinds share the generations of a target, so a control is fair
    beside a member only where both have as many: `generations` says that.
    """
    columns = ("n_generations", "n_nan", "matches")
    each = pl.concat(part.select("target_id", "caption_kind", pl.col(columns).cast(pl.Int64)) for part in told)
    each = each.drop_nulls("caption_kind").group_by("target_id", "caption_kind").agg(pl.col(columns).sum())
    asked = scores.filter(pl.col("matches").is_not_null()).select("target_id", "prompt_kind")
    rows = asked.join(each, on="target_id", maintain_order="left").with_columns(extracted=pl.col("matches") > 0)
    return {
        kind: {name: _count(rows.filter(caption_kind=kind, prompt_kind=one), level) for name, one in GROUPS.items()}
        for kind in sorted(rows["caption_kind"].unique())
    }


def _count(rows: pl.DataFrame, level: float) -> dict[str, Any]:
    made = (rows["n_generations"] - rows["n_nan"]).to_numpy()
    found = {"prompts": len(rows), "generations": int(made.sum()), "nan": int(rows["n_nan"].sum())}
    extracted = int(rows["extracted"].sum())
    if "direct" in rows.columns:
        direct = int(rows["direct"].sum())
        found |= {"direct": direct, "near": int((rows["extracted"] & ~rows["direct"]).sum())}
    found["extracted"] = extracted
    if not len(rows):
        return found
    matches = rows["matches"].to_numpy()
    per_prompt = plain(metrics.rate(extracted, len(rows), level))
    return found | {"per_prompt": per_prompt, "per_generation": _rate_generations(matches, made, level)}


def _rate_generations(matches: np.ndarray, made: np.ndarray, level: float) -> dict[str, Any]:
    """Share of all generations that match, with an interval over prompts: those of one prompt are not independent.

    Bootstrap (BCa); where no prompt or every one has a match, or BCa fails, the bound that so many allow.
    """
    found = {"count": int(matches.sum()), "n": int(made.sum()), "level": level}
    estimate = found["count"] / max(1, found["n"])
    share = matches / np.maximum(made, 1)
    low = high = math.nan
    method = "bootstrap of prompts (BCa)"
    if len(share) >= 3 and share.min() < share.max():
        interval = stats.bootstrap(
            (matches, made),
            lambda m, n, axis: m.sum(axis=axis) / np.maximum(n.sum(axis=axis), 1),
            paired=True,
            confidence_level=level,
            n_resamples=DRAWS,
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        bound = metrics.rate(int((matches > 0).sum()), len(matches), level)
        low, high, method = min(bound.low, estimate), max(bound.high, estimate), f"of prompts, {bound.method}"
    return found | plain({"estimate": estimate, "low": low, "high": high, "method": method})


def rate_difference(a: int, n_a: int, b: int, n_b: int, level: float = 0.95) -> Effect | None:
    """a of n_a minus b of n_b, independent: hybrid score interval (Newcombe 1998, method 10), exact test of Fisher.

    None where one of them has no cases.
    """
    if not (n_a and n_b):
        return None
    first, second = wilson(a, n_a, level), wilson(b, n_b, level)
    gap = a / n_a - b / n_b
    low = gap - math.hypot(first.estimate - first.low, second.high - second.estimate)
    high = gap + math.hypot(first.high - first.estimate, second.estimate - second.low)
    p = float(stats.fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue)
    return Effect(gap, low, high, level, n_a + n_b, p, "Newcombe's method 10, Fisher's exact test")


def _summarise(rows: pl.DataFrame) -> dict[str, float] | None:
    values = rows["similarity"].explode().drop_nulls().to_numpy()
    return plain(summarise_similarity(values)) if len(values) else None


def describe_scores(summary: dict[str, Any], name: str) -> str:
    """The summary as lines for a terminal."""
    lines = [f"{name:<20} {'training images':<28} controls (never trained on)"]
    members, controls = summary["members"], summary["controls"]
    for label, key in (("prompts", "prompts"), ("generations", "generations"), ("direct", "direct"), ("near", "near")):
        if key in members:
            lines.append(f"{label:<20} {members[key]:<28,} {controls[key]:,}")
    lines.append(f"{'extracted':<20} {members['extracted']:<28,} {controls['extracted']:,}")
    for label, key in (("per prompt", "per_prompt"), ("per generation", "per_generation")):
        cells = [_describe_rate(group.get(key)) for group in (members, controls)]
        lines.append(f"{label:<20} {cells[0]:<28} {cells[1]}")
    lines += _describe_captions(summary["by_caption_kind"])
    if summary["difference"] is None:
        lines.append("no controls: how often this attack is wrong is not known; train with held_out, or plant canaries")
    else:
        gap = summary["difference"]
        interval = f"({gap['low']:+.1%} … {gap['high']:+.1%}, 95 %)"
        lines.append(f"{'difference':<20} {gap['estimate']:+.1%} {interval}, p = {gap['p_value']:.2g}")
    if (alone := summary.get("reconstruction")) is not None:
        lines.append(
            f"{'autoencoder alone':<20} {alone['median']:.3f} from an image in the median, at most {alone['max']:.3f}; "
            f"δ is {summary['delta']['median']:.3f} in the median"
        )
    if summary["cannot_match"]:
        lines.append(f"{summary['cannot_match']} targets have nothing that could match; they are not counted")
    for group, figures in summary.get("similarity", {}).items():
        if figures is not None:
            lines.append(f"similarity, {group:<8} " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    known = LITERATURE
    lines.append(
        f"Carlini et al. 2023, Stable Diffusion 1.4: {known['direct']} direct, {known['with_near']} with near ones, of "
        f"{known['prompts']:,} prompts and {known['generations']:,} generations"
    )
    return "\n".join(lines)


def _describe_captions(by_kind: dict[str, Any]) -> list[str]:
    """A line for captions of each kind; none where there is one kind, which the rates above are of."""
    lines = []
    for kind, found in by_kind.items() if len(by_kind) > 1 else ():
        members, controls = (found[name] for name in GROUPS)
        label = f"{kind}: {members['extracted']:,} of {members['prompts']:,}"
        beside = f"{controls['extracted']:,} of {controls['prompts']:,}: {_describe_rate(controls.get('per_prompt'))}"
        lines.append(f"{label:<20} {_describe_rate(members.get('per_prompt')):<28} {beside}")
    return lines


def _describe_rate(rate: dict[str, Any] | None) -> str:
    return "-" if rate is None else f"{rate['estimate']:.2%} ({rate['low']:.2%} … {rate['high']:.2%})"
