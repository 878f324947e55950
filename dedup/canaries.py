"""Which images of a source become canaries, fillers and spares: far enough apart, and the same for every seed.

In: any source of captioned images. Out: rows of a pool of distinct images. Knows nothing of levels and edits.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl

from dedup import hashing, images, sources
from dedup.manifest import SCHEMA
from dedup.policy import has_caption

SPARE_DISTANCE = 0.05  # of a spare to every other image: no families of look-alikes
EXACT_TERMS = 1_024  # so many products of integers in -128 … 127 add up exactly in float32: at most 2^24
ROWS = 512  # of the distance matrix at a time


class PlantError(ValueError):
    """A dataset that cannot be planted: what, where, how to mend."""


def read_pool(src: Path, resolution: int, limit: int) -> tuple[pl.DataFrame, np.ndarray, dict[str, int]]:
    """At most `limit` distinct images of SRC, by the order of their pixel digests: random, yet fixed.

    Returns a table (shard, offset, size, key, caption; name: a key that is unique and a safe member name;
    unique: whether no other image of SRC has this caption), thumbnails uint8 (N, resolution, resolution, 3)
    of its rows, and counts. Raises PlantError when SRC has no readable image.
    """
    counts = {"images": 0, "unreadable": 0, "identical": 0}
    rows: dict[str, tuple] = {}  # by pixel digest: of identical pictures the first
    thumbnails: dict[str, np.ndarray] = {}
    for shard in sources.list_shards(src):
        for record in sources.read_shard(shard):
            counts["images"] += 1
            try:
                pixels = images.decode(record.data or b"").pixels
            except images.ImageError:
                counts["unreadable"] += 1
                continue
            digest = hashing.pixel_digest(pixels)
            if digest in rows:
                counts["identical"] += 1
                continue
            rows[digest] = (record.file or shard.name, record.offset, record.size, record.key, record.caption)
            thumbnails[digest] = images.square(pixels, resolution)
    if not rows:
        raise PlantError(f"{src}: none of its {counts['images']} images is readable")
    order = sorted(rows)
    schema = {name: SCHEMA[name] for name in ("shard", "offset", "size", "key", "caption")}
    table = pl.DataFrame([rows[digest] for digest in order], schema=schema, orient="row").with_columns(
        name=pl.Series(_name_images([rows[digest][3] for digest in order], order)),
        unique=pl.len().over("caption") == 1,
    )
    counts["compared"] = min(limit, len(order))
    return table.head(limit), np.stack([thumbnails[digest] for digest in order[:limit]]), counts


def _name_images(keys: list[str], digests: list[str]) -> list[str]:
    """Keys without dots and slashes, which webdataset reads as structure, and short enough for USTAR."""
    names = [re.sub(r"[^A-Za-z0-9-]+", "_", key)[-80:] for key in keys]
    seen = Counter(names)
    return [f"{n}-{d[:12]}" if seen[n] > 1 else n for n, d in zip(names, digests, strict=True)]


def measure_distances(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 (N, R, R, 3) → float32 (N, N) normalised ℓ2 in 0 … 1: root of the mean squared difference.

    The smaller of the distances to the image and to its mirror image; the diagonal is infinite. The same with
    every BLAS: the sums of products of centred 8-bit values are integers that float32 holds.
    """
    n = len(thumbnails)
    flat = (thumbnails.astype(np.float32) - 128).reshape(n, -1)  # (N, D)
    mirrored = (thumbnails[:, :, ::-1].astype(np.float32) - 128).reshape(n, -1)
    norms = np.square(flat.astype(np.float64)).sum(axis=1)
    distances = np.empty((n, n), np.float32)
    for start in range(0, n, ROWS):
        block = flat[start : start + ROWS]
        product = np.maximum(_multiply(block, flat), _multiply(block, mirrored))
        squares = norms[start : start + ROWS, None] + norms - 2 * product
        distances[start : start + ROWS] = np.sqrt(squares / flat.shape[1]) / 255
    np.fill_diagonal(distances, np.inf)
    return distances


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 (n, D) and (m, D) of integers in -128 … 127 → float64 (n, m), a @ b.T without rounding."""
    result = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], EXACT_TERMS):
        part = slice(start, start + EXACT_TERMS)
        result += a[:, part] @ b[:, part].T
    return result


def select_images(
    pool: pl.DataFrame, thumbnails: np.ndarray, canaries: int, fillers: int, spare: int, min_distance: float
) -> tuple[list[int], list[int], list[int]]:
    """Rows of the canaries, of the fillers and of the spares, each in the order of the pool.

    Every neighbour of a canary, an image nearer than `min_distance`, is left out. So an image can be a canary
    if it has a caption and so few neighbours that the rest is enough for everything else; a unique
    caption comes first. A spare is at least SPARE_DISTANCE from everything chosen. Raises PlantError.
    """
    needed = canaries + fillers + spare
    if len(pool) < needed:
        raise PlantError(
            f"{len(pool)} distinct images, but {needed} are needed ({canaries} canaries, {fillers} fillers, "
            f"{spare} spares): lower --canaries or --fillers"
        )
    distances = measure_distances(thumbnails)
    near = distances < min_distance
    affordable = (len(pool) - needed) // canaries  # neighbours that a canary may cost
    eligible = pool.select(has_caption()).to_series().to_numpy() & (near.sum(axis=1) <= affordable)
    chosen: list[int] = []
    for row in sorted(np.flatnonzero(eligible).tolist(), key=lambda row: not pool["unique"][row]):
        if len(chosen) < canaries and not near[row, chosen].any():
            chosen.append(row)
    if len(chosen) < canaries:
        raise PlantError(
            f"{len(chosen)} of {canaries} canaries found: of {len(pool)} distinct images {eligible.sum()} "
            f"have a caption and at most {affordable} others nearer than {min_distance}, some near each "
            "other: lower --min-distance or --canaries"
        )
    free = ~near[chosen].any(axis=0)
    free[chosen] = False
    rest = np.flatnonzero(free).tolist()
    others = rest[:fillers]
    spares: list[int] = []
    alike = (distances[chosen + others] < SPARE_DISTANCE).any(axis=0)
    for row in rest[fillers:]:
        if len(spares) < spare and not alike[row]:
            spares.append(row)
            alike |= distances[row] < SPARE_DISTANCE
    if len(spares) < spare:
        raise PlantError(f"{len(spares)} of {spare} spares found that resemble nothing: lower --canaries")
    return chosen, others, spares


def select_held_out(
    pool: pl.DataFrame, thumbnails: np.ndarray, planted: list[int], held_out: int, distance: float = SPARE_DISTANCE
) -> list[int]:
    """Rows of captioned images that are not planted, and not like one that is. Raises PlantError."""
    far = (measure_distances(thumbnails)[planted] >= distance).all(axis=0)
    far[planted] = False
    rows = np.flatnonzero(far & pool.select(has_caption()).to_series().to_numpy()).tolist()
    if len(rows) < held_out:
        raise PlantError(
            f"{len(rows)} of {held_out} held-out images found that resemble no planted one: lower --held-out"
        )
    return rows[:held_out]
