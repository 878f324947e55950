"""Fingerprints → candidate pairs: an exact Hamming radius join over all eight orientations.

In: PDQ codes in keeper order. Out: pairs (i < j) with distance and the orientation that turns j into i. Exact means
that every pair within the radius is found (proved against brute force in the tests), except that a row keeps at most
LIMIT partners, the earliest in keeper order. Knows nothing of images.
"""

from pathlib import Path

import numpy as np
import polars as pl

from dedup import engine, hamming

RADIUS = 35  # PDQ recommends 31 (ThreatExchange, pdq/README); decoding at reduced scale may add a few bits
LIMIT = 64  # partners a row keeps
BRUTE_FORCE = 4_000  # up to here comparing all pairs is faster than loading the compiled join
IN_MEMORY = 200_000  # codes up to which threads are done before processes would have begun


def join_hamming(codes: np.ndarray, *, radius: int = RADIUS, limit: int = LIMIT, jobs: int = 1) -> pl.DataFrame:
    """uint8 (n, 8, 32) codes, orientations in the order of `manifest.ORIENTATIONS` → table i, j, orientation, hamming.

    i < j are row numbers, `orientation` (a number) turns j into i, `hamming` ≤ radius. A pair that is within the radius
    upright is reported upright, else by its closest orientation. Sorted by j, i.
    """
    words = np.ascontiguousarray(codes).view(np.uint64)  # (n, 8, 4)
    if len(words) <= BRUTE_FORCE:
        return _as_table(hamming.join_brute_force(words, radius, limit))
    # numba takes longer to load than a small search takes
    from dedup import bands

    return _as_table(bands.join_bands(words, radius, limit, jobs))


def join_stored(
    folder: Path, workers: engine.Workers, memory: int, *, radius: int = RADIUS, limit: int = LIMIT
) -> pl.DataFrame:
    """The same of the codes in `folder`/codes.npy, which are used up, by all workers, in `memory` bytes."""
    from dedup import blocks

    return _as_table(blocks.join_blocks(folder, radius, limit, workers, memory))


def _as_table(found: np.ndarray) -> pl.DataFrame:
    i, orientation, distance = hamming.unpack(found[:, 1])
    return pl.DataFrame({"i": i, "j": found[:, 0], "orientation": orientation, "hamming": distance})
