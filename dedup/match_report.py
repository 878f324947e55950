"""What `unmemorize match` found → a contact sheet: DIR/index.html, opened from disk, the strongest match first.

In: DIR's tables, the pictures that were asked about, OUT's rows and pictures. Out: the page and DIR/thumbs. Knows
nothing of how matches are found. Names, captions and prompts are untrusted: Jinja2 escapes them, and no script runs.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from dedup import engine, hashing, images, manifest, match, sources, thumbnails
from dedup.report import environment

SHOWN = 2_000  # queries on the page: about a minute on one core, and 60 MB
SIDE = 320  # of a thumbnail, longer side
TASK = 16  # queries a task
OUTSIDE = 96  # grey of what does not overlap
SECTIONS = (  # class, id, title, what it says
    ("copy", "copies", "Copies", "The same picture, perhaps cropped, framed, turned, recoloured or written on."),
    (
        "same-scene",
        "scenes",
        "Same scene",
        "Details agree in place, the pictures do not: another view, frame or moment.",
    ),
    ("look-alike", "look-alikes", "Look-alikes", "The same place, other content or colour up close."),
    (None, "none", "No match", "Nothing in the dataset was found to be this picture."),
    ("unreadable", "unreadable", "Unreadable", "These could not be compared."),
)
LOCATION = ["shard", "offset", "size", "key"]


def write_report(folder: Path, *, jobs: int = 0, limit: int = SHOWN) -> Path:
    """Write DIR/index.html and return its path. jobs: processes that make thumbnails, 0 = one per processor."""
    finished = manifest.read_json(folder / "match.json")
    options = finished["options"]
    out = Path(options["against"])
    queries = pl.read_parquet(folder / "queries.parquet").with_row_index("number")
    ranked = rank_queries(queries, pl.read_parquet(folder / "matches.parquet"))
    shown = ranked.head(limit).join(
        manifest.read(out, ["id", "offset", "size", "sha256", "width", "height"]).rename(lambda name: f"of_{name}"),
        left_on="id",
        right_on="of_id",
        how="left",
        maintain_order="left",
    )
    rows = shown.rows(named=True)
    write_thumbnails(Path(options["images"]), Path(manifest.read_run(out)["src"]), folder / "thumbs", rows, jobs)
    of_section = dict(ranked["section"].value_counts().iter_rows())
    sections = [
        {"name": name, "title": title, "says": says, "total": of_section.get(kind, 0)}
        | {"rows": [row for row in rows if row["section"] == kind]}
        for kind, name, title, says in SECTIONS
    ]
    text = environment().get_template("match.html").render(**finished, sections=sections, limit=limit, shown=len(rows))
    manifest.write_text(folder / "index.html", text)
    return folder / "index.html"


def rank_queries(queries: pl.DataFrame, matches: pl.DataFrame) -> pl.DataFrame:
    """Every query once, with its best match and the number of others: the strongest first, then in their order."""
    strength = pl.col("class").replace_strict(match.STRENGTH, default=len(match.STRENGTH))
    others = matches.group_by("query").agg(others=pl.col("rank").count() - 1)
    best = matches.filter(pl.col("rank").is_null() | (pl.col("rank") == 1)).drop("status", "error", "prompt")
    best = best.rename({"source": "of_source", "shard": "of_shard", "key": "of_key"})
    table = queries.join(best, on="query", how="left", maintain_order="left").join(others, on="query", how="left")
    section = pl.when(pl.col("status") == "ok").then("class").otherwise(pl.lit("unreadable"))
    return table.with_columns(section=section).sort(
        pl.col("status") != "ok", strength, pl.col("signal") == "copy", -pl.col("score"), "number", nulls_last=True
    )


def write_thumbnails(src: Path, of_src: Path, folder: Path, rows: list[dict[str, Any]], jobs: int) -> None:
    """JPEGs named by what they show; adds to each row `thumb`, `of_thumb` and `difference`: a name or None."""
    for row in rows:
        row["thumb"] = row["sha256"][: thumbnails.LARGE_NAME] if row["status"] == "ok" else None
        row["of_thumb"] = row["of_sha256"][: thumbnails.LARGE_NAME] if row["id"] is not None else None
        what = f"{row['sha256']} {row['of_sha256']} {row['transform']}"
        row["difference"] = hashing.digest(what.encode())[: thumbnails.LARGE_NAME] if row["transform"] else None
    names = {row[name] for row in rows for name in ("thumb", "of_thumb", "difference")} - {None}
    for path in folder.glob("*/*.jpg"):
        if path.stem not in names:
            path.unlink()
    tasks = [(src, of_src, folder, rows[start : start + TASK]) for start in range(0, len(rows), TASK)]
    jobs = min(jobs or engine.available_cpus(), max(1, len(tasks) // 4))  # a process must be worth its start
    failed = {name for part in engine.run(draw_rows, tasks, jobs=jobs) for name in part}
    for row in rows:
        row |= {name: None for name in ("thumb", "of_thumb", "difference") if row[name] in failed}


def draw_rows(src: Path, of_src: Path, folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write the thumbnails of some rows; returns the names of those that cannot be read again."""
    failed = []
    for row in rows:
        wanted = [
            name for name in ("thumb", "of_thumb", "difference") if row[name] and not _path(folder, row[name]).exists()
        ]
        pictures: dict[str, np.ndarray] = {}
        for name, where, prefix in (("thumb", src, ""), ("of_thumb", of_src, "of_")):
            if not {name, "difference"} & set(wanted) or not row[name]:
                continue
            try:
                data = sources.read_image(where, *(row[prefix + column] for column in LOCATION))
                pictures[name] = images.decode(data, min_side=SIDE, montage=True).pixels
            except (OSError, images.ImageError):
                failed += [row[name], row["difference"]]
        if pictures.keys() == {"thumb", "of_thumb"} and "difference" in wanted:
            pictures["difference"] = draw_difference(
                pictures["thumb"], pictures["of_thumb"], row["transform"], row["orientation"]
            )
        for name in set(wanted) & set(pictures):
            write = partial(Path.write_bytes, data=thumbnails.encode_jpeg(pictures[name], SIDE))
            manifest.write_atomic(_path(folder, row[name]), write)
    return failed


def _path(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name}.jpg"


def draw_difference(query: np.ndarray, other: np.ndarray, transform: list[float], orientation: str) -> np.ndarray:
    """uint8 (H, W, 3) twice → uint8 (h, w, 3): in the query's frame, the other one laid over and subtracted.

    Twice as bright as it is; grey where they do not overlap.
    """
    onto = np.reshape(transform, (3, 3))
    height, width = query.shape[:2]
    if orientation.startswith("m"):
        onto = onto @ np.array([[-1, 0, width / max(width, height)], [0, 1, 0], [0, 0, 1]])
    frame = _resize(query, SIDE)
    zoom = math.sqrt(abs(np.linalg.det(onto[:2, :2]))) / abs(onto[2, 2])  # sides of the other one that a side covers
    small = _resize(other, min(max(16.0, SIDE / zoom), max(other.shape[:2])))  # no finer than the frame shows it
    pixels = (
        np.diag([max(small.shape), max(small.shape), 1.0])
        @ onto
        @ np.diag([1 / max(frame.shape), 1 / max(frame.shape), 1.0])
    )
    size, flags = frame.shape[1::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpPerspective(small, pixels, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpPerspective(np.ones(small.shape[:2], np.uint8), pixels, size, flags=flags).astype(bool)
    difference = np.minimum(2 * cv2.absdiff(frame, laid).astype(np.int32), 255).astype(np.uint8)
    return np.where(inside[..., None], difference, np.uint8(OUTSIDE))


def _resize(pixels: np.ndarray, side: float) -> np.ndarray:
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return cv2.resize(
        np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
