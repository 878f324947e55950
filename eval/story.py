"""The verdict in plain words, whichever it is: headline, meaning, every seed, threats, what it says of privacy.

In: verdict.json and the comparison table. Out: strings and counts for the page. Knows nothing of files or HTML.
"""

from collections.abc import Iterator
from typing import Any

import polars as pl

from eval.contrasts import repeated
from eval.power import clusters_needed
from eval.stats import clopper_pearson, wilson

OFTEN = 32  # copies from which an image counts as planted often
ARM_NAMES = {
    "raw": "raw model",
    "refill": "refilled model",
    "dedup": "deduplicated model",
    "dedup-exposure": "deduplicated model at equal exposure",
    "random-drop": "model with random rows dropped",
    "reweighted": "reweighted model",
    "oracle": "model of perfect detection",
    "hash": "model of detection by hash",
}
TIMES = {2: "twice"}


def name_arm(arm: str) -> str:
    return ARM_NAMES.get(arm, f"model of arm “{arm}”")


def name_images(planted: bool, at_least: int) -> str:
    """ "images planted twice or more"."""
    times = TIMES.get(at_least, f"{at_least} times")
    return f"images planted {times} or more" if planted else f"images that stand {times} or more"


def count(rows: pl.DataFrame) -> dict[str, Any]:
    """Targets × seeds of these rows, those given back, and their share: Wilson's interval, exact for none or all."""
    k, n = int(rows["extracted"].sum()), len(rows)
    rate = (wilson if 0 < k < n else clopper_pearson)(k, n)
    return {"hits": k, "n": n, "share": rate.estimate, "low": rate.low, "high": rate.high}


def count_arm(rows: pl.DataFrame, arm: str, at_least: int) -> dict[str, Any]:
    """One line of the table of arms."""
    mine = rows.filter(pl.col("arm") == arm)
    tried, matched = int(mine["n_generations"].sum()), int(mine["matches"].sum())
    often = mine.filter(repeated(at_least))
    return {
        "arm": arm,
        "name": name_arm(arm),
        "seeds": sorted(mine["seed"].unique()),
        "rows": mine["training_rows"].max(),
        "copies": often["copies"].mean(),
        "repeated": count(often),
        "single": count(mine.filter(prompt_kind="member", multiplicity=1)),
        "never": count(mine.filter(prompt_kind="control")),
        "tried": tried,
        "matched": matched,
    }


def tell_story(rows: pl.DataFrame, verdict: dict[str, Any]) -> dict[str, Any]:
    """Headline, verdict, meaning, what was planted often, and what the training seeds say."""
    planted, at_least, primary = bool(rows["mode"].is_not_null().any()), verdict["at_least"], verdict["primary"]
    some = rows.filter(repeated(at_least))
    what = name_images(planted, at_least)
    if primary is None:
        arm = verdict["arms"][0]
        found = count(some if len(some) else rows.filter(prompt_kind="member"))
        kind = what if len(some) else "images with a caption"
        headline = f"The {name_arm(arm)} gave back {found['hits']:,} of {found['n']:,} {kind}."
        return {
            "headline": headline,
            "verdict": "nothing to compare",
            "meaning": f"{_upper(verdict['label'])}.",
            "often": "",
            "counted": "",
        }
    arms = primary["contrast"].split(" - ")
    first, second = (count(some.filter(pl.col("arm") == arm)) for arm in arms)
    often = rows.filter(pl.col("multiplicity") >= OFTEN)
    counts = [count(often.filter(pl.col("arm") == arm)) for arm in arms]
    more = ""
    if len(often) and (counts[0]["n"], counts[1]["n"]) != (first["n"], second["n"]):
        parts = [f"{c['hits']:,} of {c['n']:,}" for c in counts]
        verb = "planted" if planted else "that stand"
        more = f"Of those {verb} {OFTEN} times or more it was {parts[0]} against {parts[1]}."
    word, meaning = _judge(first, second, primary, name_arm(arms[1]))
    low, high = primary["interval"]
    return {
        "counted": say_counted(primary),
        "headline": _say_headline(first, second, [name_arm(arm) for arm in arms], what),
        "verdict": word,
        "meaning": meaning,
        "often": more,
        "estimate": say_points(primary["estimate"]),
        "interval": say_interval(low, high),
        "seeds": say_seeds(primary),
    }


def say_counted(primary: dict[str, Any]) -> str:
    """What the counts of the headline add up, where that is more than one model an arm."""
    sizes = {one["n_clusters"] for one in primary["per_seed"]}
    if len(primary["seeds"]) == 1:
        return ""
    each = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    return f"Counted over {len(primary['seeds'])} training seeds, with {each} such images in each."


def _say_headline(first: dict[str, Any], second: dict[str, Any], names: list[str], what: str) -> str:
    images = f"{first['n']:,} {what}"
    if first["hits"] == second["hits"] == 0:
        return f"Neither model gave back any of the {images}."
    if first["hits"] == second["hits"]:
        return f"Both models gave back {first['hits']:,} of the {images}."
    return (
        f"The {names[0]} gave back {first['hits']:,} of {images}; the {names[1]} {second['hits']:,} of {second['n']:,}."
    )


def _judge(first: dict[str, Any], second: dict[str, Any], primary: dict[str, Any], name: str) -> tuple[str, str]:
    low, high = primary["interval"]
    if first["hits"] == second["hits"] == 0:
        return "nothing to compare", "Without an image given back, this audit cannot show what deduplication does."
    if low > 0:
        return "fewer given back", f"The {name} gives back fewer: the interval does not reach zero."
    if high < 0:
        return "more given back", f"The {name} gives back more: the interval does not reach zero."
    meaning = "The interval includes zero: these data neither show an effect nor rule one out."
    return "no difference shown", meaning


def say_seeds(primary: dict[str, Any]) -> str:
    """What the training seeds alone allow to be said."""
    over, seeds = primary["over_seeds"], primary["seeds"]
    if len(seeds) == 1:
        return "One training seed: how much another training run would differ is not known."
    agree = "all agree in sign" if primary["signs_agree"] else "they do not agree in sign"
    interval = say_interval(*over["interval"])
    return f"{len(seeds)} training seeds, {agree}; over them alone, by Student's t: {interval}."


def say_points(difference: float) -> str:
    """0.375 → "37.5 points fewer": what the second arm gives back, against the first."""
    if round(100 * difference, 1) == 0:
        return "no difference"
    return f"{abs(100 * difference):.1f} points {'fewer' if difference > 0 else 'more'}"


def say_interval(low: float, high: float) -> str:
    """(-0.05, 0.12) → "5.0 points more to 12.0 points fewer"; (0.05, 0.12) → "5.0 to 12.0 points fewer"."""
    if low * high <= 0:
        return f"{say_points(low)} to {say_points(high)}"
    near, far = sorted((low, high), key=abs)
    return f"{abs(100 * near):.1f} to {say_points(far)}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def list_threats(rows: pl.DataFrame, verdict: dict[str, Any], some: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What could make this wrong, each with the numbers of this run. some: config.json of one of the runs."""
    primary, config = verdict["primary"], some["config"]
    seeds = sorted(rows["seed"].unique())
    if verdict["changed"]:
        what = ", ".join(verdict["changed"])
        yield (
            "Changed after looking.",
            f"{_upper(what)} changed after models were trained: read all of this as exploratory.",
        )
    for failed in verdict["failed"]:
        yield "A run is missing.", f"{failed['arm']} with seed {failed['seed']} failed; the rest is reported."
    if len(seeds) == 1:
        yield (
            "One training seed.",
            f"Every arm was trained once, with seed {seeds[0]}. The numbers say which images these checkpoints give "
            "back; another training run could differ by more.",
        )
    else:
        yield (
            f"{len(seeds)} training seeds.",
            f"Chance in training is covered only as far as {len(seeds)} repetitions can show it.",
        )
    if primary is not None:
        n, drop = verdict["power"]["n_clusters"], verdict["power"]["smallest_drop"]
        if drop is None:
            yield (
                "Too few images.",
                f"One checkpoint of each arm with {n} such images can show no drop at all with 80 % power; one of 25 "
                f"points takes {clusters_needed(0.25)} of them.",
            )
        else:
            yield (
                "Power.",
                f"One checkpoint of each arm with {n} such images shows a drop of {100 * drop:.0f} points or more with "
                "80 % power; a smaller one would probably be missed.",
            )
    side = config["resolution"]
    yield (
        "A small model and small pictures." if side <= 64 else "One model.",
        f"{side} × {side} pixels, {config['steps']:,} steps of {config['batch_size']}, {some['rows']:,} training "
        "images. Other models have more or less room to memorise; do not carry the rates over.",
    )
    delta = verdict["delta"]
    yield (
        "What δ means.",
        f"A generation counts within δ of its own training image: here {delta['min']:.3f} to {delta['max']:.3f} "
        f"(median {delta['median']:.3f}), never more than half the way to the nearest other image. It is a distance of "
        "pixels (root mean square, 0 … 1): a picture can be recognisable outside it, and two plain ones can be near "
        "without being copies. The gallery shows both.",
    )
    alone = delta.get("reconstruction")
    how_far = "" if alone is None else f"Its reconstruction of an image is {alone['median']:.3f} away in the median. "
    yield (
        "The autoencoder stands between.",
        f"{how_far}What it cannot reconstruct, no generation can give back exactly: copies are never at distance 0, "
        "and fine detail is not tested.",
    )
    n = verdict["generations"]["n"]
    yield (
        f"{n} generations an image.",
        f"An image that comes back more rarely than about once in {n} tries is likely to be missed, in every arm.",
    )
    yield (
        "The attacker knows the caption.",
        "Every prompt is a caption from the training data. Without it fewer images may come back; with adversarial "
        "prompts, more.",
    )
    yield "False matches.", _say_controls(verdict)
    yield from _list_singletons(verdict)


def _say_controls(verdict: dict[str, Any]) -> str:
    parts = [f"{found['hits']} of {found['prompts']} for {arm}" for arm, found in verdict["control"].items()]
    first = next(iter(verdict["control"].values()))
    if not first["prompts"]:
        return "There are no controls: how often the test is wrong is not known."
    bound = f"so many controls bound the rate at {100 * first['upper_bound']:.1f} % (95 %, one-sided)"
    others = [
        f"{found['wrong']['k']:,} of {found['wrong']['n']:,} for {arm}" for arm, found in verdict["control"].items()
    ]
    return (
        f"Images that no model saw tell how often the test is wrong: {', '.join(parts)}; {bound}. Generations within "
        f"that δ of some other picture than the one asked for: {', '.join(others)}; none of them counts."
    )


def _list_singletons(verdict: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Images that stood once: said apart, because at equal steps a smaller dataset shows each of them more often."""
    contrasts = [verdict["primary"], *verdict["co_primary"], *verdict["contrasts"]] if verdict["primary"] else []
    for found in contrasts:
        single = found["singletons"]
        if single is not None and single["more_in_second"]:
            counts = single["counts"]
            first, second = (counts["both"] + counts[side] for side in ("only_a", "only_b"))
            arm = found["contrast"].split(" - ")[1]
            yield (
                "Single images came back more often.",
                f"Of {single['n_pairs']} images that stood once, raw gave back {first}, {arm} {second}.",
            )


def tell_privacy(arms: list[dict[str, Any]]) -> list[str]:
    """What may be said of privacy, with the numbers of this run."""
    lines = [
        "Not extracted is not proof of privacy: other prompts, other attacks or more samples may succeed. Nothing here "
        "is a guarantee as differential privacy gives one.",
        "What was not recognised as a copy was not removed, and images that stand once can be memorised too.",
    ]
    for arm in arms:
        single = arm["single"]
        if single["n"]:
            lines.append(
                f"The {arm['name']} gave back {single['hits']:,} of {single['n']:,} images that stood once; their true "
                f"share may be as high as {100 * single['high']:.1f} % (95 % interval)."
            )
    return lines
