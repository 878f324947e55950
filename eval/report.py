"""AUDIT → a page that says what deduplication bought: AUDIT/report/index.html, opened from disk.

In: AUDIT/comparison.parquet, verdict.json, calibration.json; the generations in the runs that the table
names, and the training images through the source of their dedup run. Out: the page and its pictures. Counts
come from the table; the contrast, and what may be claimed, from the verdict. Knows nothing of attacks.
"""

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import polars as pl

from dedup import images, manifest, sources
from dedup.report import environment, read_credit
from eval.stats import wilson

TEMPLATES = Path(__file__).parent / "templates"
CASES, CONTROLS = 300, 60  # targets × seeds that the page shows
OFTEN = 16  # copies from which an image counts as planted often
ARM_NAMES = {"raw": "raw model", "refill": "refilled model", "dedup": "deduplicated model"}
CANARIES = "canaries"  # folder of a planted dataset with the originals
# The dose-response chart, in units of its viewBox; never-planted images stand apart at NEVER, m = 1 at ONCE.
TOP, BOTTOM, NEVER, ONCE, RIGHT = 16, 256, 78, 150, 790
DODGE = 9  # between the arms of one multiplicity


def write_report(audit: Path) -> Path:
    """Write AUDIT/report and return the path of its index.html. Raises OSError when a file is missing."""
    verdict = manifest.read_json(audit / "verdict.json")
    rows = pl.read_parquet(audit / "comparison.parquet").sort(-pl.col("multiplicity"), "target_id", "seed")
    runs = {path: manifest.read_json(Path(path) / "config.json") for path in rows["run"].unique().sort()}
    arms = list(verdict["arms"])
    originals = {run["out"]: read_originals(Path(run["out"]), rows["key"].unique().to_list()) for run in runs.values()}
    pictures: dict[str, bytes] = {}
    planted, never = rows.filter(pl.col("multiplicity") > 0), rows.filter(pl.col("multiplicity") == 0)
    text = (
        environment(TEMPLATES)
        .get_template("comparison.html")
        .render(
            audit=audit.resolve().name,
            arms=[count_arm(rows, arm) for arm in arms],
            story=tell_story(rows, arms, verdict["primary"]),
            interval=draw_interval(verdict["primary"]),
            dose=draw_dose(rows, arms),
            cases=collect_cases(planted, arms, runs, originals, pictures, CASES),
            controls=collect_cases(never, arms, runs, originals, pictures, CONTROLS),
            deltas=[rows["delta"].min(), rows["delta"].median(), rows["delta"].max()],
            generations=rows["n_generations"].max(),
            verdict=verdict,
            calibration=manifest.read_json(audit / "calibration.json"),
            runs=runs,
            credits=sorted({c for out in originals if (c := read_credit(source_of(Path(out))))}),
        )
    )
    folder = audit / "report" / "images"
    for name, data in pictures.items():
        manifest.write_atomic(folder / name, partial(Path.write_bytes, data=data))
    for path in set(folder.glob("*.png")) - {folder / name for name in pictures}:
        path.unlink()
    manifest.write_text(audit / "report" / "index.html", text)
    return audit / "report" / "index.html"


def name_arm(arm: str) -> str:
    return ARM_NAMES.get(arm, f"model of arm “{arm}”")


def count(rows: pl.DataFrame) -> dict[str, Any]:
    """Targets × seeds of these rows, those given back, and the Wilson interval of their share."""
    rate = wilson(int(rows["extracted"].sum()), len(rows))
    return {"hits": rate.count, "n": rate.n, "share": rate.estimate, "low": rate.low, "high": rate.high}


def count_arm(rows: pl.DataFrame, arm: str) -> dict[str, Any]:
    """One line of the table of arms."""
    mine = rows.filter(pl.col("arm") == arm)
    tried, matched = int(mine["n_generations"].sum()), int(mine["matches"].sum())
    return {
        "arm": arm,
        "name": name_arm(arm),
        "seeds": sorted(mine["seed"].unique()),
        "repeated": count(mine.filter(pl.col("multiplicity") > 1)),
        "single": count(mine.filter(pl.col("multiplicity") == 1)),
        "never": count(mine.filter(pl.col("multiplicity") == 0)),
        "tried": tried,
        "matched": matched,
    }


def tell_story(rows: pl.DataFrame, arms: list[str], primary: dict[str, Any]) -> dict[str, str]:
    """The outcome in plain words, whichever it is: headline, verdict, meaning, and the images planted often.

    primary: the contrast arms[0] - arms[1], so a positive estimate means that arms[1] gives back less.
    """
    repeated = rows.filter(pl.col("multiplicity") > 1)
    first, second = (count(repeated.filter(pl.col("arm") == arm)) for arm in arms[:2])
    names = [name_arm(arm) for arm in arms[:2]]
    images_ = f"{first['n']:,} images planted twice or more"
    if first["hits"] == second["hits"] == 0:
        headline = f"Neither model gave back any of the {images_}."
    elif first["hits"] == second["hits"]:
        headline = f"Both models gave back {first['hits']:,} of the {images_}."
    else:
        headline = (
            f"The {names[0]} gave back {first['hits']:,} of {images_}; "
            f"the {names[1]} {second['hits']:,} of {second['n']:,}."
        )
    low, high = primary["interval"]
    if first["hits"] == second["hits"] == 0:
        verdict, meaning = (
            "nothing to compare",
            "Without an image given back, this audit cannot show what deduplication does.",
        )
    elif low > 0:
        verdict, meaning = (
            "fewer given back",
            f"The {names[1]} gives back fewer: the interval excludes no difference.",
        )
    elif high < 0:
        verdict, meaning = (
            "more given back",
            f"The {names[1]} gives back more: the interval excludes no difference.",
        )
    else:
        verdict = "no difference shown"
        meaning = "The interval includes no difference: these data neither show an effect nor rule one out."
    often = rows.filter(pl.col("multiplicity") >= OFTEN)
    counts = [count(often.filter(pl.col("arm") == arm)) for arm in arms[:2]]
    if len(often) and (counts[0]["n"], counts[1]["n"]) != (first["n"], second["n"]):
        parts = [f"{c['hits']:,} of {c['n']:,}" for c in counts]
        more = f"Of those planted {OFTEN} times or more it was {parts[0]} against {parts[1]}."
    else:
        more = ""
    story = {"headline": headline, "verdict": verdict, "meaning": meaning, "often": more}
    return story | {"estimate": say_points(primary["estimate"]), "interval": say_interval(low, high)}


def say_points(difference: float) -> str:
    """0.375 → "37.5 points fewer": what arms[1] gives back, against arms[0]."""
    if round(100 * difference, 1) == 0:
        return "no difference"
    return f"{abs(100 * difference):.1f} points {'fewer' if difference > 0 else 'more'}"


def say_interval(low: float, high: float) -> str:
    """(-0.05, 0.12) → "5.0 points more to 12.0 points fewer"; (0.05, 0.12) → "5.0 to 12.0 points fewer"."""
    if low * high <= 0:
        return f"{say_points(low)} to {say_points(high)}"
    near, far = sorted((low, high), key=abs)
    return f"{abs(100 * near):.1f} to {say_points(far)}"


def draw_interval(primary: dict[str, Any]) -> dict[str, float]:
    """Positions in percent of the width for the estimate and its interval; the scale is symmetric about 0."""
    low, high = primary["interval"]
    reach = min(1.0, max(0.1, math.ceil(10 * max(abs(low), abs(high), abs(primary["estimate"]))) / 10))
    places = {"low": max(low, -reach), "high": min(high, reach), "estimate": primary["estimate"]}
    return {name: round(50 + 50 * value / reach, 2) for name, value in places.items()} | {"reach": reach}


def draw_dose(rows: pl.DataFrame, arms: list[str]) -> dict[str, Any]:
    """Points, interval bars and lines of the dose-response chart, in its viewBox."""
    levels = sorted(rows["multiplicity"].unique())
    widest = max(1.0, math.log2(max(levels[-1], 1)))
    x = {m: ONCE + (RIGHT - ONCE) * math.log2(m) / widest if m else NEVER for m in levels}
    curves = []
    for number, arm in enumerate(arms):
        points = []
        for m in levels:
            cell = rows.filter((pl.col("arm") == arm) & (pl.col("multiplicity") == m))
            if len(cell):
                place = {"m": m, "x": round(x[m] + DODGE * (number - (len(arms) - 1) / 2), 2)} | count(cell)
                heights = {
                    f"y_{name}": round(BOTTOM - (BOTTOM - TOP) * place[name], 2) for name in ("share", "low", "high")
                }
                points.append(place | heights)
        path = " ".join(f"{p['x']},{p['y_share']}" for p in points if p["m"])
        curves.append({"arm": arm, "name": name_arm(arm), "number": number, "points": points, "path": path})
    return {"curves": curves, "ticks": [{"m": m, "x": round(x[m], 2)} for m in levels]}


def collect_cases(
    rows: pl.DataFrame,
    arms: list[str],
    runs: dict[str, dict],
    originals: dict[str, dict[str, bytes]],
    pictures: dict[str, bytes],
    limit: int,
) -> dict[str, Any]:
    """Targets × seeds: training image and nearest generation of every arm. Adds PNGs to `pictures`."""
    groups = rows.group_by("multiplicity", "target_id", "seed", maintain_order=True)
    shown = []
    for (multiplicity, target, seed), group in list(groups)[:limit]:
        by_arm = {row["arm"]: row for row in group.iter_rows(named=True)}
        some = next(iter(by_arm.values()))
        run = runs[some["run"]]
        original = add_original(originals[run["out"]].get(some["key"]), run["config"]["resolution"], pictures)
        answers = [by_arm[arm] | {"picture": add_generation(by_arm[arm], pictures)} for arm in arms if arm in by_arm]
        case = {
            "target": target,
            "seed": seed,
            "multiplicity": multiplicity,
            "original": original,
            "answers": answers,
        }
        shown.append(case | {name: some[name] for name in ("prompt", "mode", "delta")})
    return {"shown": shown, "total": rows.select("target_id", "seed").n_unique()}


def add_original(data: bytes | None, resolution: int, pictures: dict[str, bytes]) -> str | None:
    """The training image as the model saw it: padded to a square of `resolution` pixels."""
    if data is None:
        return None
    try:
        pixels = images.square(images.decode(data).pixels, resolution)
    except images.ImageError:
        return None
    return _add(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(), pictures)


def add_generation(row: dict[str, Any], pictures: dict[str, bytes]) -> str | None:
    """The generation that came nearest, its bytes untouched; None when it is gone or lies outside its run."""
    run = Path(row["run"]).resolve()
    path = (run / (row["best_file"] or "")).resolve()
    if path.suffix != ".png" or not path.is_relative_to(run) or not path.is_file():
        return None
    return _add(path.read_bytes(), pictures)


def _add(data: bytes, pictures: dict[str, bytes]) -> str:
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.png"
    pictures[name] = data
    return name


def source_of(out: Path) -> Path:
    return Path(manifest.read_run(out)["src"])


def read_originals(out: Path, keys: list[str]) -> dict[str, bytes]:
    """Key → bytes of the training images, from the planted originals if there are any, else the dataset."""
    src = source_of(out)
    if (src / CANARIES).is_dir():
        shards = sources.list_shards(src / CANARIES)
        found = {r.key: r.data for shard in shards for r in sources.read_shard(shard) if r.data is not None}
    else:
        found = {}
    place = ["shard", "offset", "size", "key"]
    rows = manifest.read(out, [*place, "status"]).filter((pl.col("status") == "ok") & pl.col("key").is_in(keys))
    for row in rows.filter(~pl.col("key").is_in(list(found))).select(place).iter_rows(named=True):
        try:
            found[row["key"]] = sources.read_image(src, **row)
        except OSError:
            continue  # shown as missing
    return found
