"""Deduplication of many real pictures: by one process and by two, by Ray, and killed in the middle.

    python benchmarks/scale_pictures.py images --work DIR --photos DIR [--pictures 100000]
    python benchmarks/scale_pictures.py engines --work DIR --photos DIR [--pictures 100000]
    python benchmarks/scale_pictures.py kills --work DIR --photos DIR [--times 20]

`images`: JPEGs of 256 pixels, blends of two photographs, a twentieth of them copies of others, in tars of 1,000,
through `dedup --level hash` by one process and by two. `engines`: the same by two local processes and by Ray.
`kills`: a few such pictures in tars of 50; the run is killed (SIGKILL) at a random moment and started again.
"""

import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import cv2
import numpy as np
import typer
from scale import Jobs, Work, measure

from dedup import fingerprint, options, pipeline, sources
from dedup.fingerprint import fingerprint_shard

app = typer.Typer()
Photos = Annotated[Path, typer.Option(help="Folder of photographs that are blended.")]
Pictures = Annotated[int, typer.Option(help="So many are made.")]


def make_pictures(photos: Path, folder: Path, count: int, each: int = 1_000) -> Path:
    """JPEGs of 256 pixels in tars: blends of crops of two photographs; one in twenty is one of these again."""
    if (folder / "done").exists():
        return folder / "shards"
    (folder / "shards").mkdir(parents=True)
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pool = [
        picture for path in files if (picture := cv2.imread(str(path))) is not None and min(picture.shape[:2]) > 160
    ]
    rng, earlier = np.random.default_rng(count), list[np.ndarray]()
    for number, start in enumerate(range(0, count, each)):
        with tarfile.open(folder / "shards" / f"{number:05d}.tar", "w") as archive:
            for row in range(start, min(start + each, count)):
                is_copy = earlier and rng.random() < 1 / 20
                picture = earlier[rng.integers(len(earlier))] if is_copy else _blend(pool, rng)
                earlier = [*earlier[-200:], picture]
                data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(80, 96))])[1].tobytes()
                for name, content in ((f"{row:09d}.jpg", data), (f"{row:09d}.txt", b"a picture")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    (folder / "done").touch()
    return folder / "shards"


def _blend(pool: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    crops = []
    for picture in (pool[k] for k in rng.choice(len(pool), 2, replace=False)):
        side = int(rng.integers(128, min(picture.shape[:2])))
        y, x = (int(rng.integers(0, length - side + 1)) for length in picture.shape[:2])
        crops.append(cv2.resize(picture[y : y + side, x : x + side], (256, 256), interpolation=cv2.INTER_AREA))
    return cv2.addWeighted(crops[0], 0.5, crops[1], 0.5, 0)


def _command(src: Path, out: Path, jobs: int, *more: str) -> list[str]:
    program = str(Path(sys.executable).parent / "unmemorize")
    chosen = ["--level", "hash", "--jobs", str(jobs), "--no-report", *more]
    return [program, "dedup", str(src), "-o", str(out), *chosen]


def _time_runs(src: Path, work: Path, count: int, runs: dict[str, list[str]], repeats: int) -> dict[str, list[float]]:
    """A line of the table for each run, by turns; seconds of each."""
    print(
        "| run | seconds | CPU s | images/s | fingerprint alone, images/s | peak GB |\n|---|---:|---:|---:|---:|---:|"
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, arguments) in itertools.product(range(repeats), runs.items()):
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        taken, processor, peaks = measure(_command(src, out, *arguments))
        peak = max(peaks.values())
        seconds[name].append(taken)
        hashing = json.loads((out / "timings.json").read_text())["fingerprint"]
        told = f"{taken:.1f} | {processor:.1f} | {count / taken:.0f} | {count / hashing:.0f} | {peak:.2f}"
        print(f"| {name} | {told} |", flush=True)
    return seconds


@app.command()
def images(work: Work, photos: Photos, pictures: Pictures = 100_000, repeats: int = 1) -> None:
    """Images a second by one process and by two."""
    src = make_pictures(photos, work / f"pictures-{pictures}", pictures)
    seconds = _time_runs(src, work, pictures, {"1 process": ["1"], "2 processes": ["2"]}, repeats)
    print(f"Efficiency of two: {min(seconds['1 process']) / min(seconds['2 processes']) / 2:.0%}")


@app.command()
def engines(work: Work, photos: Photos, pictures: Pictures = 100_000, repeats: int = 1) -> None:
    """Ray beside local processes; the start of Ray is measured by itself, and taken off."""
    src = make_pictures(photos, work / f"pictures-{pictures}", pictures)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import ray; ray.init(num_cpus=2, log_to_driver=False)"], check=True)
    begun = time.perf_counter() - start
    seconds = _time_runs(src, work, pictures, {"local": ["2"], "ray": ["2", "--engine", "ray"]}, repeats)
    more = (min(seconds["ray"]) - begun) / min(seconds["local"]) - 1
    print(f"Ray takes {begun:.1f} s to start and end; without that it takes {more:+.0%} of the time.")


# Kills


def begin_shard(shard: sources.Shard, index: int, work: Path, *more: Any) -> tuple[int, int]:
    """`fingerprint.fingerprint_shard`, which says so when it has something to do."""
    if not (work / f"{index:05d}.parquet").exists():
        with (work.parent / "begun.txt").open("a") as log:
            log.write(f"{index}\n")
    return fingerprint_shard(shard, index, work, *more)


@app.command(hidden=True)
def logged(src: Path, out: Path, jobs: int) -> None:
    """Deduplicate, with `begin_shard`."""
    with mock.patch.object(fingerprint, "fingerprint_shard", begin_shard):
        pipeline.deduplicate(src, out, options.Options(level="hash"), jobs=jobs)


@app.command()
def kills(work: Work, photos: Photos, pictures: Pictures = 3_000, times: int = 20, jobs: Jobs = 2) -> None:
    """Kill, start again, and compare with an undisturbed run."""
    src = make_pictures(photos, work / f"killed-{pictures}", pictures, each=50)
    whole, out = work / "whole", work / "killed"
    shutil.rmtree(whole, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, __file__, "logged", str(src), str(whole), str(jobs)]
    subprocess.run(command, check=True)
    taken = time.perf_counter() - start
    expected = {path.relative_to(whole): path.read_bytes() for path in list_results(whole)}
    print("| killed after s | shards done by then | of these made again | begun twice | results that differ |")
    print("|---:|---:|---:|---:|---:|")
    command[-2] = str(out)
    rng = np.random.default_rng(0)
    for after in sorted(rng.uniform(0.2, taken, times)):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(after)
        process.kill()
        process.wait()
        folder = out / ".work" / "signatures"
        done = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
        subprocess.run(command, check=True)
        again = sum(path.stat().st_mtime_ns != mtime for path, mtime in done.items())
        found = {path.relative_to(out): path.read_bytes() for path in list_results(out)}
        begun = (out / ".work" / "begun.txt").read_text().split()
        differing = sum(found.get(name) != expected.get(name) for name in found | expected)
        told = f"{len(done)} | {again} | {len(begun) - len(set(begun))} | {differing} of {len(expected)}"
        print(f"| {after:.1f} | {told} |", flush=True)


def list_results(out: Path) -> list[Path]:
    """Files of a run that must be equal."""
    names = ("run.json", "pairs.parquet", "kept.txt", "dropped.csv", "deduplicated.parquet", "deduplicated.jsonl")
    return [*(out / "manifest").glob("*.parquet"), *(out / name for name in names)]


if __name__ == "__main__":
    app()
