"""The whole before/after job in order: draw, plant, deduplicate, train both arms, attack both, compare, report.

Every step is the library function of its own verb and resumes by itself, so the same command goes on after a kill.
In: nothing but the packages of the extra `demo`. Out: DIR/audit with verdict.json and report/index.html.

    unmemorize demo --quick -o DIR
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dedup import engine, manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.report import write_report as write_dedup_report
from dedup.sources.demo import render_demo
from eval.compare import compare
from eval.extraction import attack
from eval.generate import generate
from eval.report import write_report

ARMS = ("raw", "refill")


def demo(
    directory: Path,
    *,
    seeds: int = 1,
    canaries: int = 24,
    controls: int = 48,
    fillers: int = 250,
    steps: int = 1600,
    samples: int = 16,
) -> dict[str, Any]:
    """Run the job on the OpenMoji drawings; returns verdict.json.

    seeds: training seeds, each with its own assignment of the canaries to multiplicities. controls: images that are
    never planted; no hit in 51 bounds the rate of false matches per prompt at 6 %. steps: of training. samples: images
    a prompt.
    """
    seconds: dict[str, float] = {}
    with _stage(seconds, "draw"):
        render_demo(directory / "drawings")
    runs: dict[str, list[Path]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        planted, out = directory / f"planted-{seed}", directory / f"dedup-{seed}"
        with _stage(seconds, "plant"):
            plant(directory / "drawings", planted, canaries=canaries, controls=controls, fillers=fillers, seed=seed)
        with _stage(seconds, "dedup"):
            deduplicate(planted, out, Options(level="copy", encoder="local"))
            write_dedup_report(out)
        tasks = [(out, arm, steps, directory / f"{arm}-{seed}", seed, samples) for arm in ARMS]
        with _stage(seconds, "train, generate and attack"):  # the two arms side by side, one core each
            for arm, run in zip(ARMS, engine.run(_train_and_attack, tasks, jobs=2), strict=True):
                runs[arm].append(run)
    with _stage(seconds, "compare and report"):
        verdict = compare(runs["raw"], runs["refill"], directory / "audit")
        write_report(directory / "audit")
    manifest.write_json(directory / "timings.json", {name: round(value, 1) for name, value in seconds.items()})
    return verdict


def _train_and_attack(out: Path, arm: str, steps: int, run: Path, seed: int, samples: int) -> Path:
    from defense.config import TrainConfig
    from defense.train import train

    train(out, arm, TrainConfig(steps=steps), run, seed)
    generate(run, n=samples)
    attack(run)
    return run


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Say what begins, on stderr, and add up how long it takes."""
    print(f"── {name}", file=sys.stderr)
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
