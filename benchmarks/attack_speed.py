"""How long scoring takes, in processor time, and how much memory: pictures made of noise, no model.

    python benchmarks/attack_speed.py

148 targets with 16 generations each against a reference of 1,000 pictures of 32 pixels by the clique attack; 500 × 500
largest tile distances of one prompt at 32, 64 and 256 pixels. One thread. Memory: the largest of what numpy allocates.
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import Annotated

import numpy as np
import polars as pl
import typer
from threadpoolctl import threadpool_limits

from defense.distances import scale
from eval.calibrate import calibrate
from eval.distances import max_tile_l2
from eval.extraction import score_clique
from eval.reference import REFERENCE
from eval.targets import TARGETS
from eval.yardstick import Yardstick


def make_yardstick(targets: int, reference: int, side: int) -> Yardstick:
    """Pictures of noise, of which the first are the targets."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (reference, side, side, 3), dtype=np.uint8)
    named = pl.DataFrame({"caption": [f"picture {number}" for number in range(reference)]})
    table = pl.DataFrame({"target_id": named["caption"].head(targets)})
    return Yardstick(
        pl.concat([pl.DataFrame(schema=TARGETS), table], how="diagonal"),
        pixels[:targets],
        pl.concat([pl.DataFrame(schema=REFERENCE), named], how="diagonal"),
        pixels,
        own=np.eye(targets, reference, dtype=bool),
        others=np.ones(targets, np.float32),
    )


def measure(name: str, job: Callable[[], object]) -> None:
    tracemalloc.start()
    before = time.process_time()
    job()
    seconds = time.process_time() - before
    print(f"| {name} | {seconds:.1f} | {tracemalloc.get_traced_memory()[1] / 2**20:,.0f} |", flush=True)
    tracemalloc.stop()


def main(
    targets: Annotated[int, typer.Option(help="Prompts.")] = 148,
    n: Annotated[int, typer.Option("-n", help="Generations a prompt.")] = 16,
    reference: Annotated[int, typer.Option(help="Pictures to compare with.")] = 1_000,
) -> None:
    rng = np.random.default_rng(1)
    print("| job | seconds of processor | MiB |\n|---|---:|---:|")
    with threadpool_limits(1):
        yardstick = make_yardstick(targets, reference, 32)
        measure(f"thresholds from {reference:,} pictures", lambda: calibrate(yardstick))
        calibration = calibrate(yardstick)

        def score() -> None:
            for place in range(targets):
                made = scale(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
                score_clique(made, place, yardstick, calibration, n)

        measure(f"clique, {targets} prompts × {n}", score)
        for side in (32, 64, 256):
            pictures = rng.random((500, side, side, 3), dtype=np.float32)
            measure(f"500 × 500 tile distances, {side} pixels", lambda pictures=pictures: max_tile_l2(pictures))


if __name__ == "__main__":
    typer.run(main)
