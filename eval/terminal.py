"""What a verdict says in the terminal. The page says more, and in other words: `story`."""

from pathlib import Path

ONLY = ("only_a", "only_b")  # of the two arms of a contrast


def describe_verdict(verdict: dict, page: Path) -> str:
    """The declared contrasts in a line each, what they are good for, and where the page is."""
    primary = verdict["primary"]
    if primary is None:
        return f"{verdict['label']}\nReport: {page}"
    told = [_describe_contrast(found) for found in (primary, *verdict["co_primary"])]
    return "\n".join([*told, f"It {verdict['label']}.", f"Report: {page}"])


def _describe_contrast(found: dict) -> str:
    """Counts, and the difference in points: not that of the counts, where it is corrected by the multiplicities."""
    arms, counts, n = found["contrast"].split(" - "), found["counts"], found["n_pairs"]
    back = [f"{arm} gave back {counts['both'] + counts[side]} of {n}" for arm, side in zip(arms, ONLY, strict=True)]
    estimate, low, high = (round(100 * value, 1) + 0.0 for value in (found["estimate"], *found["interval"]))
    corrected = (
        "" if abs(found["estimate"] - found["plain"]["estimate"]) < 1e-9 else ", corrected for images of few copies"
    )
    interval = f"{found['level']:.0%} interval {low:+.1f} … {high:+.1f}"
    return f"{', '.join(back)} images: a difference of {estimate:+.1f} points ({interval}{corrected})"
