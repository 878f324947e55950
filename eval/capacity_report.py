"""DIR/capacity.json → a page that says whether more room an image meant more memorised ones: DIR/report/index.html.

Reads that file only; shows no images. The page of each size lies in DIR/width-<W>/audit/report.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dedup import manifest
from dedup.report import environment
from eval.figures import draw_capacity
from eval.report import TEMPLATES, write_page
from eval.story import name_images, say_points


def write_capacity_report(directory: Path) -> Path:
    """Write DIR/report and return the path of its index.html. Raises OSError when there is no capacity.json."""
    found = manifest.read_json(directory / "capacity.json")
    what = name_images(found["planted"], found["at_least"])
    text = (
        environment(TEMPLATES)
        .get_template("capacity.html")
        .render(
            found=found,
            what=what,
            headline=tell(found["runs"], what),
            slope=say_slope(found["slope"]),
            chart=draw_capacity(found["runs"]),
            threats=list(list_threats(found)),
            widths=sorted({run["width"] for run in found["runs"]}),
        )
    )
    return write_page(directory / "report", text, {})


def tell(runs: list[dict[str, Any]], what: str) -> str:
    """The outcome in one sentence: the smallest model beside the largest, all seeds together."""
    if not runs:
        return "No model could be measured."
    widths = sorted({run["width"] for run in runs})
    ends = [[run for run in runs if run["width"] == width] for width in (widths[0], widths[-1])]
    counts = [f"{sum(run['hits'] for run in end):,} of {sum(run['n'] for run in end):,}" for end in ends]
    if len(widths) == 1:
        return f"The model gave back {counts[0]} {what}."
    return f"The smallest model gave back {counts[0]} {what}, the largest {counts[1]}."


def say_slope(slope: dict[str, Any]) -> str:
    """The slope in words, and whether it is told from none."""
    if slope["estimate"] is None:
        return "One size has no slope: two or more are needed."
    change = f"{100 * slope['estimate']:+.1f} points for every doubling of parameters an image"
    low, high = slope["interval"]
    if low is None:
        return f"{change}, from one training seed: without an interval, this is no evidence."
    bounds = f"{100 * low:+.1f} to {100 * high:+.1f}, 95 % interval over {len(slope['per_seed'])} training seeds"
    if low <= 0 <= high:
        return f"{change} ({bounds}): these runs neither show that room matters nor rule it out."
    more = "more" if low > 0 else "fewer"
    return f"{change} ({bounds}): with more room, {more} images came back."


def list_threats(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What could make this wrong, each with the numbers of this run."""
    runs, slopes = found["runs"], found["slope"]["per_seed"]
    for failed in found["failed"]:
        yield "A run is missing.", f"Width {failed['width']}, seed {failed['seed']} failed; the rest is reported."
    each = ", ".join(say_points(-slope).replace("fewer", "less") for slope in slopes)
    yield f"{len(slopes)} training seed{'s' if len(slopes) != 1 else ''}.", f"By seed, for every doubling: {each}."
    if runs:
        rows = sorted({run["rows"] for run in runs})
        yield (
            "Size is not the only thing that differs.",
            f"All sizes take the same steps over {' or '.join(f'{n:,}' for n in rows)} training images, at one "
            "learning rate: a wider model also learns more in each step. Parameters are those of the U-Net alone.",
        )
        shares = [run["share"] for run in runs]
        if min(shares) < 0.05 or max(shares) > 0.95:
            yield (
                "A straight line fits badly near none and all.",
                f"Shares go from {min(shares):.0%} to {max(shares):.0%}: there a doubling can show little.",
            )
    yield (
        "Small models, small pictures.",
        "The slope says in which direction room goes here; it is no law for models of another kind or size.",
    )
