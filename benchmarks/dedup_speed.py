"""Speed, memory and recall of deduplication against peers, on photographs, in one run.

    python benchmarks/dedup_speed.py --photos DIR --work DIR [--tools "immaculate pdq"] [--sets few,many]

photos-T (recall): every photograph to its longest side ≤ 640, JPEG quality 90, and five copies: random crop 7/8, both
flips, turned by 25°, square; the six form a group. Speed: `--files` distinct 640×480 collages, of which 5 % or 30 % are
replaced by copies of others (same bytes, JPEG quality 70, half size in turn), and a fifteenth as many of 2560×1920, as
cameras make them. Each tool runs in an environment of its own, made below `--work`; tools take turns, `--runs`
times (one that takes three times as long as ours runs once). Wall seconds are medians; memory is the
largest sum of proportional set sizes over the process tree, sampled. `floor` only decodes: libjpeg-turbo, grey, at 1/8
scale, one process a core.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import polars as pl
import psutil
import typer
from PIL import Image

from dedup import clustering

PEERS = {"immaculate": "immaculate==0.3.0", "imgcheck": "imgcheck==0.2.1", "cleanvision": "cleanvision==0.3.7"}
PEERS |= {"imagehash": "imagehash==4.3.2"}
SETS = {"few": (0.05, 1, 1), "many": (0.3, 1, 1), "camera": (0.05, 4, 15)}  # share of copies, grid, so many times fewer
CLEANVISION = """
import json, sys
from cleanvision import Imagelab
lab = Imagelab(data_path=sys.argv[1])
lab.find_issues({"exact_duplicates": {}, "near_duplicates": {}}, n_jobs=2, verbose=False)
print(json.dumps([s for kind in ("exact_duplicates", "near_duplicates") for s in lab.info[kind]["sets"]]))
"""
IMAGEHASH = """
import json, sys, collections, pathlib, imagehash
from PIL import Image
groups = collections.defaultdict(list)
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.jpg")):
    groups[str(imagehash.phash(Image.open(path)))].append(str(path))
print(json.dumps([g for g in groups.values() if len(g) > 1]))
"""


def make_transformed(photos: Path, folder: Path) -> None:
    rng = np.random.default_rng(0)
    seen: list[np.ndarray] = []
    for path in sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
        width, height = picture.size
        if min(width, height) < 200:
            continue
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), float)
        if any(np.sqrt(((small - other) ** 2).mean()) < 25 for other in seen):
            continue  # the same view again: its copies would be neither true nor false
        seen.append(small)
        w, h = width * 7 // 8, height * 7 // 8
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        side = min(width, height)
        copies = {
            "base": picture,
            "crop": picture.crop((left, top, left + w, top + h)),
            "hflip": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            "vflip": picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
            "rot25": picture.rotate(25, Image.Resampling.BICUBIC),
            "square": picture.resize((side, side), Image.Resampling.LANCZOS),
        }
        for name, copy in copies.items():
            copy.save(folder / f"{path.stem}@{name}.jpg", quality=90)


def make_collage(pool: list[Image.Image], rng: np.random.Generator, grid: int) -> Image.Image:
    """640×480, or as many of these as a square grid holds."""
    whole = Image.new("RGB", (640 * grid, 480 * grid))
    for cell in range(grid * grid):
        whole.paste(make_cell(pool, rng), (cell % grid * 640, cell // grid * 480))
    return whole


def make_cell(pool: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    """Distinct pictures with the detail of photographs: two random crops side by side, or one above the other."""
    picture = Image.new("RGB", (640, 480))
    beside = rng.random() < 0.5
    boxes = ((0, 0, 320, 480), (320, 0, 640, 480)) if beside else ((0, 0, 640, 240), (0, 240, 640, 480))
    for box in boxes:
        source = pool[rng.integers(len(pool))]
        share = rng.uniform(0.4, 0.9)
        w, h = int(source.width * share), int(source.height * share)
        left, top = int(rng.integers(source.width - w + 1)), int(rng.integers(source.height - h + 1))
        part = source.crop((left, top, left + w, top + h))
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.paste(part.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS), box[:2])
    return picture


def make_distinct(photos: Path, folder: Path, numbers: list[int], grid: int) -> None:
    pool = [Image.open(p).convert("RGB") for p in sorted(photos.rglob("*.jpg"))]
    for number in numbers:
        make_collage(pool, np.random.default_rng(number), grid).save(folder / f"{number:06d}.jpg", quality=90)


def make_copy(source: Path, path: Path, kind: int) -> None:
    """The same bytes, JPEG quality 70, or half the size."""
    if kind == 0:
        path.write_bytes(source.read_bytes())
    elif kind == 1:
        Image.open(source).save(path, quality=70)
    else:
        picture = Image.open(source)
        picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS).save(path, quality=90)


def make_set(photos: Path, folder: Path, files: int, duplicates: float, grid: int) -> Path:
    """`folder/all`, because one of the peers wants class folders."""
    inner = folder / "all"
    if (folder / "done").exists():
        return folder
    inner.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    is_copy = rng.random(files) < duplicates
    distinct, copies = np.flatnonzero(~is_copy), np.flatnonzero(is_copy)
    with ProcessPoolExecutor() as pool:
        tasks = [distinct[s : s + 100].tolist() for s in range(0, len(distinct), 100)]
        for _ in pool.map(make_distinct, *zip(*[(photos, inner, task, grid) for task in tasks], strict=True)):
            pass
        sources = [inner / f"{n:06d}.jpg" for n in rng.choice(distinct, len(copies))]
        paths = [inner / f"{n:06d}.jpg" for n in copies]
        list(pool.map(make_copy, sources, paths, (copies % 3).tolist(), chunksize=100))
    (folder / "done").touch()
    return folder


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)


def decode_floor(folder: Path) -> float:
    paths = sorted(folder.rglob("*.jpg"))
    with ProcessPoolExecutor(2, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        list(pool.map(len, [[1]] * 4))  # started
        start = time.perf_counter()
        list(pool.map(decode_all, [paths[k::16] for k in range(16)]))
        return time.perf_counter() - start


def measure(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak proportional set size of the process tree in MB, standard output."""
    output = Path("/tmp") / f"benchmark-{time.monotonic_ns()}"
    start = time.perf_counter()
    peak = 0
    # Without this variable Python keeps compiled modules, as it does for everybody.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with (
        output.open("wb") as handle,
        subprocess.Popen(command, stdout=handle, stderr=subprocess.DEVNULL, env=environment) as process,
    ):
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                members = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(p.memory_full_info().pss for p in members))
            except psutil.Error:  # a process ended while it was looked at
                pass
            time.sleep(0.2)
        seconds = time.perf_counter() - start
    text = output.read_text()
    output.unlink()
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}")
    return seconds, peak / 1e6, text


def make_environments(work: Path, tools: Iterable[str]) -> None:
    """Of the peers among the tools."""
    for name, package in PEERS.items():
        python = work / "environments" / name / "bin" / "python"
        if any(tool.startswith(name) for tool in tools) and not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)


def commands(work: Path, out: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Tool → the command for a folder."""
    bins = {name: work / "environments" / name / "bin" for name in PEERS}
    unmemorize = str(Path(sys.executable).parent / "unmemorize")
    ours = [unmemorize, "dedup", "--out", str(out), "--level", "hash", "--jobs", "2", "--no-report"]
    return {
        "unmemorize": lambda folder: [*ours, str(folder)],
        "immaculate pdq": lambda f: [str(bins["immaculate"] / "immaculate"), "--method", "pdq", "--json", str(f)],
        "imgcheck": lambda f: [
            *(str(bins["imgcheck"] / "imgcheck"), "clean", "--dataset", str(f), "--output", str(out / "clean")),
            *("--report", str(out / "report.xlsx")),
        ],
        "cleanvision": lambda f: [str(bins["cleanvision"] / "python"), "-c", CLEANVISION, str(f)],
        "imagehash loop": lambda f: [str(bins["imagehash"] / "python"), "-c", IMAGEHASH, str(f)],
    }


def pairs_found(tool: str, out: Path, text: str) -> set[tuple[str, str]] | None:
    """Pairs of file names in one group; None where the tool prints none."""
    if tool == "imgcheck":
        return None
    if tool == "unmemorize":
        names = pl.read_parquet(out / "manifest" / "*.parquet", columns=["key"])["key"]
        pairs = pl.read_parquet(out / "pairs.parquet").filter(pl.col("class") == "copy")
        label = clustering.components(pairs, len(names))
        table = pl.DataFrame({"key": names, "label": label})
        groups = table.group_by("label").agg("key").filter(pl.col("key").list.len() > 1)["key"].to_list()
    else:
        found = json.loads(text if tool.startswith("immaculate") else text.strip().splitlines()[-1])
        groups = found["exact"] + found["near"] if isinstance(found, dict) else found
    return {pair for group in groups for pair in itertools.combinations(sorted({Path(name).name for name in group}), 2)}


def main(
    photos: Annotated[Path, typer.Option(help="Photographs.")],
    work: Annotated[Path, typer.Option(help="Sets, environments and results are made here.")],
    files: Annotated[int, typer.Option(help="Files of the speed sets.")] = 30_000,
    runs: Annotated[int, typer.Option(help="Times that each tool runs; 0 only makes sets and environments.")] = 3,
    tools: Annotated[str, typer.Option(help="Of the peers, comma-separated; all, or none.")] = "all",
    sets: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SETS),
) -> None:
    """Print the tables."""
    out = work / "out"
    wanted = {"unmemorize", *tools.split(",")}  # the others are measured against it
    chosen = {k: v for k, v in commands(work, out).items() if tools == "all" or k in wanted}
    make_environments(work, chosen)
    transformed = work / "photos-T"
    if not transformed.exists():
        (transformed / "all").mkdir(parents=True)
        make_transformed(photos, transformed / "all")
    names = sorted(p.name for p in transformed.rglob("*.jpg"))
    true = {(a, b) for a, b in itertools.combinations(names, 2) if a.split("@")[0] == b.split("@")[0]}
    print(f"photos-T: {len(names)} files, {len(true)} true pairs")
    for name, command in chosen.items() if runs else ():
        seconds, memory, found, _ = run(name, command, transformed, out)
        if found is not None:
            hits = len(found & true)
            score = f"precision {hits / max(1, len(found)):.2%}, recall {hits / len(true):.1%}"
            print(f"  {name:16} {score}, {seconds:.1f} s, {memory:.0f} MB", flush=True)
    slow: set[str] = set()
    for kind in sets.split(","):
        duplicates, grid, fewer = SETS[kind]
        count = files // fewer
        folder = make_set(photos, work / f"set-{count}-{duplicates:g}", count, duplicates, grid)
        if not runs:
            continue
        measured: dict[str, list[tuple[float, float]]] = {"floor": []}
        for _ in range(runs):
            measured["floor"].append((decode_floor(folder), 0))
            for name, command in chosen.items():
                if name in slow:
                    continue
                seconds, memory, _, report = run(name, command, folder, out)
                measured.setdefault(name, []).append((seconds, memory))
                if report:
                    measured.setdefault("unmemorize report", []).append((report, 0))
                if seconds > 3 * measured["unmemorize"][0][0]:
                    slow.add(name)
        print(f"\n{count} files of {640 * grid}×{480 * grid}, {duplicates:.0%} copies; medians of {runs}\n")
        print("| tool | seconds | all runs | peak MB | files/s | seconds : ours |\n|---|---:|---|---:|---:|---:|")
        ours = statistics.median(s for s, _ in measured["unmemorize"])
        for name, values in measured.items():
            seconds = statistics.median(s for s, _ in values)
            each = " ".join(f"{s:.1f}" for s, _ in values)
            peak = f"{max(m for _, m in values):.0f}" if values[0][1] else ""
            print(
                f"| {name} | {seconds:.1f} | {each} | {peak} | {count / seconds:.0f} | {seconds / ours:.2f} |",
                flush=True,
            )


def run(
    name: str, command: Callable[[Path], list[str]], folder: Path, out: Path
) -> tuple[float, float, set[tuple[str, str]] | None, float]:
    """Wall seconds, peak MB, pairs, and for ours the seconds of a report afterwards."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    out.mkdir()
    seconds, memory, text = measure(command(folder))
    found = pairs_found(name, out, text)
    report = 0.0
    if name == "unmemorize":
        code = (
            f"from pathlib import Path; from dedup.report import write_report; write_report(Path({str(out)!r}), jobs=2)"
        )
        report, *_ = measure([sys.executable, "-c", code])
    return seconds, memory, found, report


if __name__ == "__main__":
    typer.run(main)
