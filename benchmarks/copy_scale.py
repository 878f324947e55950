"""Copy detection at scale: seconds by stage, memory, and what a peer needs.

    python benchmarks/copy_scale.py --work DIR [--files 100000] [--copies 0.05]
    python benchmarks/copy_scale.py --work DIR --pictures DIR --files 20000 --copies 0.3 --peers

Without `--pictures` the distinct files are made up: dead leaves, unevenly lit, with noise, 192 × 144 pixels, which have
as many local features as photographs. With it, they are drawn from the pictures below DIR, whatever their format.
Copies are the same bytes, JPEG quality 70, half the size, and a crop to two thirds of either side, in turn. Tools take
turns, once each. Memory is the largest sum of proportional set sizes over the process tree, sampled.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import copy_detection
import cv2
import dedup_speed
import numpy as np
import typer
from PIL import Image

from dedup.images import SUFFIXES

STAGES = ("fingerprint", "search", "verify", "embed", "nearest", "match", "lay over", "decide", "write")
TASK = 100


def draw(seed: int, width: int = 192, height: int = 144) -> Image.Image:
    """Dead leaves (Lee, Mumford & Huang 2001): the statistics of occlusion in photographs."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), rng.uniform(40, 215, 3), np.float32)
    for _ in range(220):
        centre = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        radius = min(4 * (1 - rng.random()) ** -0.6, 40)
        axes = int(radius), int(max(2, radius * rng.uniform(0.4, 1)))
        cv2.ellipse(picture, centre, axes, rng.uniform(0, 180), 0, 360, tuple(rng.uniform(10, 245, 3)), -1)
    light = rng.normal(size=(6, 6, 3)).astype(np.float32) * 16
    picture += cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 3, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def make_distinct(folder: Path, numbers: list[int], sources: list[Path] | None) -> None:
    for place, number in enumerate(numbers):
        picture = draw(number) if sources is None else Image.open(sources[place]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        flat.save(folder / f"{number:06d}.jpg", quality=90)


def make_copy(source: Path, path: Path, kind: int) -> None:
    if kind < 3:
        dedup_speed.make_copy(source, path, kind)
        return
    picture = Image.open(source)
    left, top = picture.width // 6, picture.height // 6
    picture.crop((left, top, picture.width - left, picture.height - top)).save(path, quality=85)


def make_set(folder: Path, files: int, share: float, pictures: Path | None) -> int:
    """`folder/all`, made once; how many of its files are copies."""
    rng = np.random.default_rng(0)
    is_copy = rng.random(files) < share
    distinct, copies = np.flatnonzero(~is_copy), np.flatnonzero(is_copy)
    if (folder / "done").exists():
        return len(copies)
    inner = folder / "all"
    inner.mkdir(parents=True, exist_ok=True)
    sources = None
    if pictures is not None:
        found = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
        if len(found) < len(distinct):
            raise typer.BadParameter(f"{pictures} holds {len(found)} pictures, {len(distinct)} are needed")
        sources = [found[n] for n in np.sort(rng.choice(len(found), len(distinct), replace=False))]
    with ProcessPoolExecutor() as pool:
        parts = [slice(start, start + TASK) for start in range(0, len(distinct), TASK)]
        tasks = [pool.submit(make_distinct, inner, distinct[p].tolist(), sources and sources[p]) for p in parts]
        for task in tasks:
            task.result()
        of = [inner / f"{n:06d}.jpg" for n in rng.choice(distinct, len(copies))]
        paths = [inner / f"{n:06d}.jpg" for n in copies]
        list(pool.map(make_copy, of, paths, (copies % 4).tolist(), chunksize=TASK))
    (folder / "done").touch()
    return len(copies)


def main(
    work: Annotated[Path, typer.Option(help="Sets, environments and results are made here.")],
    files: Annotated[int, typer.Option(help="Of the set.")] = 100_000,
    copies: Annotated[float, typer.Option(help="Share of the files.")] = 0.05,
    pictures: Annotated[Path | None, typer.Option(help="Folder of distinct pictures; else they are made up.")] = None,
    peers: Annotated[bool, typer.Option(help="Immaculate with sscd_distilled, too.")] = False,
    only_make: Annotated[bool, typer.Option(help="Make the set and stop.")] = False,
) -> None:
    """Print a table of tools, and one of our stages."""
    folder = work / f"scale-{files}-{copies}-{pictures.name if pictures else 'leaves'}"
    count = make_set(folder, files, copies, pictures)
    if only_make:
        return
    tools = copy_detection.make_tools(work, peers)
    chosen = ["unmemorize local", *(["immaculate sscd_distilled"] if peers else [])]
    print(f"\n{files} files, {count} of them copies\n")
    copy_detection.print_header("tool", "seconds", "MB", "dropped")
    stages: dict[str, float] = {}
    for name in chosen:
        out = work / "out"
        seconds, memory, found = copy_detection.run(tools[name], folder, out)
        dropped = len(found.rows.filter(~found.rows["keep"]))
        copy_detection.print_row(name, f"{seconds:.1f}", f"{memory:.0f}", dropped)
        if (out / "timings.json").exists():
            stages = json.loads((out / "timings.json").read_text())
    print()
    copy_detection.print_header(*STAGES)
    copy_detection.print_row(*(f"{stages.get(stage, 0):.1f}" for stage in STAGES))


if __name__ == "__main__":
    typer.run(main)
