"""The Hamming join of more codes than one process should hold: block against block, by all workers.

The codes lie in a file, in keeper order. A task is a block of earlier rows and a piece of later ones: a pure function
of the file and four numbers. The first partners of a row are the first of those that it has in each block, so neither
the cut nor who does the work decides anything, and nothing moves between workers.
"""

import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dedup import bands, engine, groups

EARLIER, LATER = 60, 1_000  # bytes that a task takes for a row of its block, and at most for one of its piece
FEWEST = 20_000  # rows of a piece


def join_blocks(folder: Path, radius: int, limit: int, workers: engine.Workers, memory: int) -> np.ndarray:
    """uint64 (n, 8, 4) in `folder`/codes.npy → int64 (found, 2), as `bands.join_bands`. Uses the file up.

    memory: bytes for all the tasks that run at once on a machine.
    """
    path, upright = folder / "codes.npy", folder / "upright.npy"
    group, first = groups.collapse(path)
    groups.keep(path, upright, first)
    blocks, pieces = cut(len(first), workers.jobs, memory)
    # the last pieces have most before them: they come first, so that no worker waits for another at the end
    asked = [[(*block, *piece) for block in blocks if block[0] < piece[1]] for piece in reversed(pieces)]
    tasks = [(folder, *four, radius, limit) for of_piece in asked for four in of_piece]
    done = workers.run(join_two, tasks)
    results = iter(tqdm(done, desc="search", total=len(tasks), unit=" blocks", file=sys.stderr, disable=None))
    found = [choose_first(np.concatenate(list(islice(results, len(of_piece)))), limit) for of_piece in asked]
    path.unlink()
    upright.unlink()
    return groups.expand(np.concatenate(found[::-1]), group, first, limit)


def cut(n: int, jobs: int, memory: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Begin and end of each block and of each piece: half of a worker's memory for either."""
    each = memory // (2 * jobs)
    block = max(FEWEST, each // EARLIER)
    piece = max(FEWEST, min(each // LATER, -(-n // (4 * jobs))))
    return _cut(n, block), _cut(n, piece)


def _cut(n: int, most: int) -> list[tuple[int, int]]:
    """As few parts as can be, of about the same size."""
    edges = [n * part // -(-n // most) for part in range(-(-n // most) + 1)]
    return list(pairwise(edges))


def join_two(folder: Path, start: int, end: int, begin: int, stop: int, radius: int, limit: int) -> np.ndarray:
    """Partners of the rows `begin` … `stop` among the rows `start` … `end`: see `bands.join_block`."""
    # "c": numba would compile everything again for arrays that are read-only
    codes, upright = (np.load(folder / name, mmap_mode="c") for name in ("codes.npy", "upright.npy"))
    earlier, later = np.asarray(upright[start : min(end, stop)]), np.asarray(codes[begin:stop])
    return bands.join_block(earlier, start, later, begin, radius, limit)


def choose_first(found: np.ndarray, limit: int) -> np.ndarray:
    """int64 (found, 2): of the partners of each row, the keys ascending, the first `limit`; sorted by row."""
    found = found[np.argsort(found[:, 0], kind="stable")]
    return found[np.arange(len(found)) - np.searchsorted(found[:, 0], found[:, 0]) < limit]
