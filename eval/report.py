"""AUDIT → a page that says what deduplication bought: AUDIT/report/index.html, opened from disk.

In: AUDIT/comparison.parquet, verdict.json, calibration.json; the generations in the runs that the table
names, and the training images through the source of their dedup run. Out: the page and its pictures. Counts
come from the table; the contrasts, and what may be claimed, from the verdict.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from dedup import images, manifest, sources
from dedup.report import environment, read_credit
from defense.distances import l2, scale
from eval.asked import list_captions, say_captions
from eval.distances import max_tile_l2
from eval.extraction import find_largest_clique, read_images
from eval.figures import draw_dose, draw_interval
from eval.story import count_arm, list_threats, name_arm, name_images, tell_privacy, tell_story

TEMPLATES = Path(__file__).parent / "templates"
CASES, CONTROLS, CLIQUES = 300, 60, 6  # targets × seeds that the page shows
CANARIES = "canaries"  # folder of a planted dataset with the originals
REDACTED = "(left out)"


def write_report(audit: Path, *, redact: bool = False) -> Path:
    """Write AUDIT/report and return the path of its index.html. Raises OSError when a file is missing.

    redact: no images, no captions, no paths: a page that may go where the images may not.
    """
    verdict = manifest.read_json(audit / "verdict.json")
    rows = pl.read_parquet(audit / "comparison.parquet").sort(-pl.col("multiplicity"), "target_id", "seed")
    runs = {path: manifest.read_json(Path(path) / "config.json") for path in rows["run"].unique().sort()}
    arms = list(verdict["arms"])
    sources_ = {run["out"]: source_of(Path(run["out"])) for run in runs.values()}
    pictures: dict[str, bytes] = {}
    if redact:
        rows = rows.with_columns(prompt=pl.lit(REDACTED), best_file=pl.lit(None, pl.String), target_id=_number(rows))
        originals: dict[str, dict[str, bytes]] = {out: {} for out in sources_}
    else:
        originals = {out: read_originals(Path(out), rows["key"].unique().to_list()) for out in sources_}
    gather = partial(collect_cases, arms=arms, runs=runs, originals=originals, pictures=pictures)
    planted, never = rows.filter(prompt_kind="member"), rows.filter(prompt_kind="control")
    counted = [count_arm(rows, arm, verdict["at_least"]) for arm in arms]
    what = name_images(bool(rows["mode"].is_not_null().any()), verdict["at_least"])
    asked = list_captions(verdict)
    subject = verdict["primary"]["contrast"].split(" - ")[1] if verdict["primary"] else arms[0]
    text = (
        environment(TEMPLATES)
        .get_template("comparison.html")
        .render(
            audit=REDACTED if redact else audit.resolve().parent.name,
            redact=redact,
            arms=counted,
            story=tell_story(rows, verdict),
            what=what,
            asked=asked,
            said_of_captions=say_captions(asked, subject, name_arm(subject), what),
            is_planted=bool(rows["mode"].is_not_null().any()),
            interval=draw_interval(verdict["primary"]) if verdict["primary"] else None,
            contrasts=describe_contrasts(verdict),
            dose=draw_dose(rows, arms),
            first=gather(most_memorised(planted, arms[0]), limit=6),
            cliques=[] if redact else collect_cliques(planted, runs, originals, pictures),
            cases=gather(planted, limit=CASES),
            controls=gather(never, limit=CONTROLS),
            threats=list(list_threats(rows, verdict, next(iter(runs.values())))),
            privacy=tell_privacy(counted),
            generations=rows["n_generations"].max(),
            verdict=verdict,
            calibration=manifest.read_json(audit / "calibration.json"),
            runs=_hide(runs) if redact else runs,
            credits=sorted({c for src in sources_.values() if (c := read_credit(src))}),
        )
    )
    return write_page(audit / "report", text, pictures)


def write_page(folder: Path, text: str, pictures: dict[str, bytes]) -> Path:
    """FOLDER/index.html and FOLDER/images with these pictures and no others; returns the page."""
    images = folder / "images"
    for name, data in pictures.items():
        manifest.write_atomic(images / name, partial(Path.write_bytes, data=data))
    for path in set(images.glob("*.png")) - {images / name for name in pictures}:
        path.unlink()
    manifest.write_text(folder / "index.html", text)
    return folder / "index.html"


def _number(rows: pl.DataFrame) -> pl.Series:
    """Names of files are names of images: a number takes their place."""
    return rows["target_id"].rank("dense").cast(pl.String)


def _hide(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {Path(path).name: {k: v for k, v in run.items() if k != "out"} for path, run in runs.items()}


def describe_contrasts(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """Every contrast with its name, and its interval on one scale; more than one only."""
    if verdict["primary"] is None or not (others := [*verdict["co_primary"], *verdict["contrasts"]]):
        return []
    found = [verdict["primary"], *others]
    return [one | {"name": name_arm(one["contrast"].split(" - ")[1]), "bar": draw_interval(one, 1.0)} for one in found]


def most_memorised(planted: pl.DataFrame, arm: str) -> pl.DataFrame:
    """Targets × seeds that the arm gives back most often come first."""
    first = planted.filter(pl.col("arm") == arm).select("target_id", "seed", often="matches")
    ranked = planted.join(first, on=["target_id", "seed"], how="left", maintain_order="left")
    return ranked.sort(-pl.col("often").fill_null(0), -pl.col("multiplicity"), "target_id", "seed", maintain_order=True)


def collect_cases(
    rows: pl.DataFrame,
    *,
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


def collect_cliques(
    planted: pl.DataFrame,
    runs: dict[str, dict],
    originals: dict[str, dict[str, bytes]],
    pictures: dict[str, bytes],
    limit: int = CLIQUES,
) -> list[dict[str, Any]]:
    """All generations of the prompts with the largest cliques, of any arm: who is in the clique, and who within δ."""
    flagged = planted.filter("clique_flag").sort(
        -pl.col("clique_size"), "clique_mean_distance", "target_id", "seed", maintain_order=True
    )
    shown = []
    for row in flagged.unique("target_id", keep="first", maintain_order=True).head(limit).iter_rows(named=True):
        path, run = Path(row["run"]), runs[row["run"]]
        files = _list_files(path, row["target_id"])
        if not files:
            continue
        side = run["config"]["resolution"]
        drawn = read_images(path, pl.Series(files), side)
        clique = find_largest_clique(max_tile_l2(drawn) <= row["delta_edge"])
        data = originals[run["out"]].get(row["key"])
        near = np.zeros(len(files), bool)
        if data is not None:
            target = scale(images.square(images.decode(data).pixels, side)[None])
            near = l2(drawn, target)[:, 0] <= row["delta"]
        answers = [
            {"picture": _add((path / file).read_bytes(), pictures), "in": n in clique, "hit": bool(near[n])}
            for n, file in enumerate(files)
        ]
        original = add_original(data, side, pictures)
        names = ("arm", "seed", "prompt", "multiplicity", "clique_size", "clique_k", "clique_mean_distance")
        shown.append({name: row[name] for name in names} | {"original": original, "answers": answers})
    return shown


def _list_files(run: Path, target: str) -> list[str]:
    """Generations of a target that lie in the run, in order."""
    table = pl.read_parquet(run / "generations.parquet", columns=["prompt_id", "status", "file"])
    files = table.filter(pl.col("prompt_id") == target, pl.col("status") == "ok")["file"].to_list()
    return [file for file in files if _inside(run, file) is not None]


def _inside(run: Path, file: str | None) -> Path | None:
    """A PNG of the run; None when it is gone or lies outside."""
    path = (run.resolve() / (file or "")).resolve()
    return path if path.suffix == ".png" and path.is_relative_to(run.resolve()) and path.is_file() else None


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
    path = _inside(Path(row["run"]), row["best_file"])
    return None if path is None else _add(path.read_bytes(), pictures)


def _add(data: bytes, pictures: dict[str, bytes]) -> str:
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.png"
    pictures[name] = data
    return name


def source_of(out: Path) -> Path:
    return Path(manifest.read_run(out)["src"])


def read_originals(out: Path, keys: Sequence[str]) -> dict[str, bytes]:
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
