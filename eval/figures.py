"""Numbers → positions in the charts of the reports of audits. Knows nothing of files or HTML."""

import math
from typing import Any

import polars as pl

from eval.story import count, name_arm

# The dose-response chart, in units of its viewBox; never-planted images stand apart at NEVER, m = 1 at ONCE.
TOP, BOTTOM, NEVER, ONCE, RIGHT = 16, 256, 78, 150, 790
DODGE = 9  # between the arms of one multiplicity


def draw_interval(found: dict[str, Any], reach: float | None = None) -> dict[str, float]:
    """Positions in percent of the width for the estimate and its interval; the scale is symmetric about 0."""
    low, high = found["interval"]
    reach = reach or min(1.0, max(0.1, math.ceil(10 * max(abs(low), abs(high), abs(found["estimate"]))) / 10))
    places = {"low": max(low, -reach), "high": min(high, reach), "estimate": max(-reach, min(found["estimate"], reach))}
    return {name: round(50 + 50 * value / reach, 2) for name, value in places.items()} | {"reach": reach}


def draw_dose(rows: pl.DataFrame, arms: list[str]) -> dict[str, Any]:
    """Points, bars, bands and lines of the dose-response chart, in its viewBox."""
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
        line = [p for p in points if p["m"]]
        path = " ".join(f"{p['x']},{p['y_share']}" for p in line)
        edges = [f"{p['x']},{p['y_high']}" for p in line] + [f"{p['x']},{p['y_low']}" for p in reversed(line)]
        curve = {"arm": arm, "name": name_arm(arm), "number": number, "points": points, "path": path}
        curves.append(curve | {"band": " ".join(edges) if len(line) > 1 else ""})
    return {"curves": curves, "ticks": [{"m": m, "x": round(x[m], 2)} for m in _spread(levels, x)]}


def draw_capacity(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Points, bars and lines of share given back against log2 of parameters a row, a curve a seed, in its viewBox."""
    ordered = sorted(runs, key=lambda run: run["parameters_per_row"])
    rooms = [math.log2(run["parameters_per_row"]) for run in ordered]
    least, most = min(rooms, default=0.0), max(rooms, default=0.0)
    width = (RIGHT - NEVER) / (most - least + 0.5)  # of a doubling
    x = [round(NEVER + width * (room - least + 0.25), 2) for room in rooms]
    seeds = sorted({run["seed"] for run in ordered})
    curves = []
    for number, seed in enumerate(seeds):
        points = []
        for run, place in zip(ordered, x, strict=True):
            if run["seed"] == seed:
                heights = {f"y_{k}": round(BOTTOM - (BOTTOM - TOP) * run[k], 2) for k in ("share", "low", "high")}
                points.append(run | heights | {"x": place + DODGE * (number - (len(seeds) - 1) / 2)})
        path = " ".join(f"{p['x']},{p['y_share']}" for p in points)
        curves.append({"seed": seed, "number": number, "points": points, "path": path})
    ticks = {run["width"]: run | {"x": place} for run, place in zip(ordered, x, strict=True)}
    return {"curves": curves, "ticks": list(ticks.values())}


def _spread(levels: list[int], x: dict[int, float], least: float = 26) -> list[int]:
    """Levels whose labels do not run into each other."""
    shown: list[int] = []
    for m in levels:
        if not shown or x[m] - x[shown[-1]] >= least:
            shown.append(m)
    return shown
