"""Pictures of a source → small JPEGs that a page shows, named by the content of what they show.

In: rows with their location. Out: files; nothing is made twice. Knows nothing of groups and pages.
"""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import polars as pl

from dedup import engine, images, manifest, sources

THUMBNAIL_SIDE = 128
LARGE_SIDE, LARGE = 320, 2_000  # of pictures inside archives that are laid over each other; at most so many, 40 MB
SHOWN_SIDE = 96  # pixels on the page: a JPEG may be decoded at reduced scale down to this
NAME, LARGE_NAME = 20, 24  # hex digits of the content's SHA-256
THUMBNAILS_PER_TASK = 256
MEMBERS_FIRST = 12  # what report.js shows of a group before "show more": those get their thumbnails first


def write_thumbnails(
    src: Path, folder: Path, listed: pl.DataFrame, *, limit: int, jobs: int
) -> tuple[pl.DataFrame, dict[str, int]]:
    """JPEGs named by content: equal files share one, and a second report makes none anew.

    Those of pictures that are laid over each other are larger, and have longer names.

    Returns `listed` with `thumb` null where there is none, and how many were wanted, written and failed.
    """
    by_need = listed.sort(pl.col("place") >= MEMBERS_FIRST, "number", "place")
    laid = by_need.filter(pl.col("transform").is_not_null())
    in_archive = pl.col("shard").is_not_null() & pl.col("id").is_in(pl.concat([laid["id"], laid["other"]]).implode())
    large = by_need.filter(in_archive)["thumb"].unique(maintain_order=True).head(LARGE)
    is_large = pl.col("thumb").is_in(large.implode())
    listed, by_need = (
        table.with_columns(
            thumb=pl.when(is_large).then("thumb").otherwise(pl.col("thumb").str.head(NAME)),
            side=pl.when(is_large).then(LARGE_SIDE).otherwise(THUMBNAIL_SIDE),
        )
        for table in (listed, by_need)
    )
    different = by_need.unique("thumb", keep="first", maintain_order=True)
    chosen = different.head(limit)
    failed = write_pictures(src, folder, chosen, jobs)
    made = [name for name in chosen["thumb"] if name not in failed]
    counts = {"wanted": len(different), "written": len(made), "failed": len(failed)}
    return listed.with_columns(thumb=pl.when(pl.col("thumb").is_in(made)).then("thumb")), counts


def write_pictures(src: Path, folder: Path, chosen: pl.DataFrame, jobs: int) -> set[str]:
    """JPEGs of rows (thumb: its name, side, location) that are not there yet; others are removed.

    Returns the names of those that cannot be read again.
    """
    present = {path.stem for path in folder.glob("*/*.jpg")}
    for stale in present - set(chosen["thumb"]):
        _thumbnail_path(folder, stale).unlink()
    missing = chosen.filter(~pl.col("thumb").is_in(list(present)))
    missing = missing.select("thumb", "side", "shard", "offset", "size", "key")
    tasks = [(src, folder, part.rows()) for part in missing.iter_slices(THUMBNAILS_PER_TASK)]
    jobs = min(jobs or engine.available_cpus(), max(1, len(tasks) // 4))  # a process must be worth its start
    return {name for names in engine.run(make_thumbnails, tasks, jobs=jobs) for name in names}


def make_thumbnails(src: Path, folder: Path, rows: list[tuple]) -> list[str]:
    """Write the thumbnails of (name, side, shard, offset, size, key); returns the names of those that failed."""
    failed = []
    for name, side, shard, offset, size, key in rows:
        try:
            data = sources.read_image(src, shard, offset, size, key)
            pixels = images.decode(data, min_side=SHOWN_SIDE if side == THUMBNAIL_SIDE else side).pixels
        except (OSError, images.ImageError):
            failed.append(name)
            continue
        write = partial(Path.write_bytes, data=encode_jpeg(pixels, side))
        manifest.write_atomic(_thumbnail_path(folder, name), write)
    return failed


def _thumbnail_path(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name}.jpg"


def encode_jpeg(pixels: np.ndarray, side: int = THUMBNAIL_SIDE) -> bytes:
    """uint8 (H, W, 3) → JPEG with its longer side at most `side`."""
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()
