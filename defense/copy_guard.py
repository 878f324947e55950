"""Is this drawing a training picture? What a finished dedup run OUT knows of, as a guard asks it while a model draws.

In: OUT, with SRC where the run saw it. Out: for each drawing the row that it is a copy of, with the evidence. Two
comparisons: `match.find`, the one behind `unmemorize match`; and for drawings of at most SMALL pixels a side, which
hold too little for local features, the pixels of all pictures at that size. Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from dedup import images, manifest, match, sources
from dedup.index import Index
from defense.distances import flip_min, scale

SMALL = 64  # pixels a side up to which pixels are compared
DELTA = 0.15  # no larger ℓ2 is a copy (Carlini et al. 2023, sec. 4.2)
SAME = 0.05  # nearer pictures are one, whatever deduplication says of them: the smallest δ of that paper
SAMPLE = 2_000  # pictures that are left out in turn to count false alarms
BLOCK = 512  # pictures that are compared with all others at a time

JUDGED: dict[str, pl.DataType | type[pl.DataType]] = {
    "copy": pl.Boolean,
    "signal": pl.String,  # "pixels" (equal), "copy" (features), "l2"; null: nothing near
    "id": pl.Int64,  # row of OUT: the best match, or else the nearest row
    "key": pl.String,
    "represents": pl.Int64,  # how often its picture stands in the data
    "score": pl.Float64,  # of the match, higher = more alike; null without one
    "distance": pl.Float64,  # ℓ2 to the nearest row or its mirror image; null where pixels are not compared
    "delta": pl.Float64,  # of that row: up to here it is a copy
}


@dataclass(frozen=True, slots=True, eq=False)
class Small:
    """Pictures of OUT at the size at which a small model draws."""

    rows: pl.DataFrame  # id, key, represents; one row for equal bytes
    pixels: np.ndarray  # uint8 (R, side, side, 3)
    delta: np.ndarray  # float32 (R,)
    false_alarms: float  # share of pictures that would be taken for another one's copy if they were drawings


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """What drawings are compared with: at least one of the two."""

    index: Index | None
    small: Small | None

    def judge(self, pixels: np.ndarray, prompts: Sequence[str]) -> pl.DataFrame:
        """uint8 (N, H, W, 3) and what each was drawn for → table JUDGED."""
        judged = pl.DataFrame({"place": np.arange(len(pixels))})
        for name in JUDGED:
            judged = judged.with_columns(pl.lit(None, JUDGED[name]).alias(name))
        if self.small is not None:
            judged = _fill(judged, self._judge_pixels(self.small, pixels))
        if self.index is not None:
            found = match.find(self.index, list(pixels), list(prompts), jobs=1)
            first = found.filter((pl.col("rank") == 1) & (pl.col("class") == "copy"))
            columns = ["signal", "id", "key", "represents", "score"]
            judged = _fill(judged, first.select(*columns, place="query", copy=pl.lit(True)))
        return judged.with_columns(pl.col("copy").fill_null(False)).select(list(JUDGED))

    @staticmethod
    def _judge_pixels(small: Small, pixels: np.ndarray) -> pl.DataFrame:
        distances = flip_min(scale(pixels), scale(small.pixels))  # (N, R)
        nearest = (distances - small.delta).argmin(axis=1)  # the row that is furthest below its δ
        row = small.rows[nearest]
        least, delta = distances[np.arange(len(pixels)), nearest], small.delta[nearest]
        found = row.with_columns(place=np.arange(len(pixels)), distance=pl.Series(least), delta=pl.Series(delta))
        return found.with_columns(copy=pl.col("distance") <= pl.col("delta"), signal=pl.lit("l2"))


def _fill(judged: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """What was found replaces what was known of the same drawing."""
    found = found.select("place", *(pl.col(name).cast(JUDGED[name]) for name in JUDGED if name in found.columns))
    return judged.update(found, on="place")


def load_training(out: Path, side: int) -> Training:
    """side: pixels of the drawings. Raises ManifestError, MatchError, SourceError or OSError."""
    small = load_small(out, side) if side <= SMALL else None
    if small is not None and manifest.read_run(out)["options"].get("level") != "copy":
        return Training(None, small)
    return Training(match.load(out), small)


def load_small(out: Path, side: int) -> Small:
    """All readable pictures of OUT, padded and shrunk as training does, with a δ for each."""
    src = Path(manifest.read_run(out)["src"])
    columns = ["id", "shard", "offset", "size", "key", "sha256", "component_id", "kept_id", "represents", "status"]
    rows = manifest.read(out, columns)
    kept = pl.coalesce("kept_id", "id")
    times = rows.select(kept="id", times="represents")
    rows = rows.with_columns(kept=kept).join(times, on="kept", how="left", maintain_order="left")
    rows = rows.filter(pl.col("status") == "ok").unique("sha256", keep="first", maintain_order=True)
    pixels = np.empty((len(rows), side, side, 3), np.uint8)
    for place, row in enumerate(rows.select("shard", "offset", "size", "key").iter_rows()):
        pixels[place] = images.square(images.decode(sources.read_image(src, *row)).pixels, side)
    components = rows["component_id"].fill_null(rows["id"]).to_numpy()
    delta, false_alarms = calibrate(pixels, components)
    return Small(rows.select("id", "key", represents="times"), pixels, delta, false_alarms)


def calibrate(pixels: np.ndarray, components: np.ndarray) -> tuple[np.ndarray, float]:
    """uint8 (R, s, s, 3) and the component (R,) of each → δ (R,), and the share of false alarms.

    δ: half the ℓ2 to the nearest picture of another component or to its mirror image, at most DELTA: the rule by which
    an attack counts a generation as extracted. Pictures within SAME of each other are one picture here, or a copy that
    deduplication has missed would leave no room for a δ. False alarms: every picture (a fixed sample of SAMPLE) is left
    out and then judged as if it were drawn; its own component does not count. Takes R² comparisons.
    """
    floats = scale(pixels)
    nearest, second = (np.full(len(pixels), np.inf, np.float32) for _ in range(2))
    owner = np.full(len(pixels), -1, np.int64)  # component of the nearest
    for start in range(0, len(pixels), BLOCK):
        part = slice(start, start + BLOCK)
        distances = flip_min(floats[part], floats)  # (b, R)
        distances[(components[part, None] == components) | (distances <= SAME)] = np.inf
        chosen = distances.argmin(axis=1)
        nearest[part], owner[part] = distances[np.arange(len(chosen)), chosen], components[chosen]
        distances[components[chosen][:, None] == components] = np.inf
        second[part] = distances.min(axis=1)
    sample = np.unique(components, return_index=True)[1][:SAMPLE]  # one picture of each component
    alarms = 0
    for picture in sample:
        distances = flip_min(floats[picture : picture + 1], floats)[0]
        without = np.where(owner == components[picture], second, nearest)
        others = components != components[picture]
        alarms += bool((others & (distances <= np.minimum(DELTA, without / 2))).any())
    return np.minimum(DELTA, nearest / 2), alarms / max(1, len(sample))
