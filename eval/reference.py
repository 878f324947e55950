"""What a generation is compared with: distinct pictures of the original data, and their pixels. Depends on OUT alone.

In: a dedup run OUT and, when it is a planted dataset, the truth in OUT/plant.parquet. Out: a table and pixels. The
reference is not the tool under test: planted copies leave it by that truth, so a copy that deduplication has missed
does not count as another picture. Knows nothing of models and targets.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from dedup import clustering, images, manifest, sources
from dedup.hashing import digest
from defense.distances import flip_min, scale

CANARIES, SPARE = "canaries", "spare"  # folders of a planted dataset: the originals, and images for the refill
LOCATION = ("shard", "offset", "size", "key", "sha256")

REFERENCE: dict[str, pl.DataType | type[pl.DataType]] = {
    "kind": pl.String,  # "dataset", "canary", "spare"
    "component_id": pl.Int64,  # null for canaries and spares
    "cluster_id": pl.Int64,  # as well
    "caption": pl.String,
    **{name: manifest.SCHEMA[name] for name in LOCATION},
}


class TargetError(ValueError):
    """Nothing to attack, or a planted dataset that is not complete."""


def load_reference(out: Path) -> pl.DataFrame:
    """Distinct pictures, columns REFERENCE: one a component of the original data, the canaries, the spares.

    There must be no duplicates in it: among copies of one picture, most measures of memorisation take a further
    copy for nothing special.
    """
    plant = read_plant(out)
    rows = manifest.read(out).filter(pl.col("status") == "ok")
    ours = (
        remove_planted(rows, plant)
        .sort(~pl.col("keep"), -pl.col("represents"), "id")
        .unique("component_id", keep="first")
        .sort("id")
    )
    parts = [ours.with_columns(kind=pl.lit("dataset"))]
    if plant is not None:
        src = source_of(out)
        for folder, kind in ((CANARIES, "canary"), (SPARE, "spare")):
            if (src / folder).is_dir():
                parts.append(read_folder(out, folder).with_columns(kind=pl.lit(kind)))
    missing = [part.with_columns(component_id=None, cluster_id=None) for part in parts[1:]]
    return pl.concat(
        part.select(pl.col(name).cast(kind) for name, kind in REFERENCE.items()) for part in (parts[0], *missing)
    )


def group_copies(out: Path) -> np.ndarray:
    """int64 (rows,): what dedup takes for one picture, by the id of a row; look-alikes of a component differ in it."""
    rows, pairs = manifest.read(out), pl.read_parquet(out / "pairs.parquet")
    stars = rows.select(a="id", b="cluster_id")
    copies = pairs.filter(pl.col("class") == "copy").select(pl.col("a", "b").cast(pl.Int64))
    return clustering.components(pl.concat([stars, copies]), len(rows))


def list_left_out(out: Path, reference: pl.DataFrame) -> pl.DataFrame:
    """Rows of the original data that `load_reference` leaves out and that no row in it equals by bytes; each once."""
    rows = remove_planted(manifest.read(out).filter(pl.col("status") == "ok"), read_plant(out))
    return rows.filter(~pl.col("sha256").is_in(reference["sha256"].implode())).unique("sha256", maintain_order=True)


def nearest_other(pictures: np.ndarray, others: np.ndarray, own: np.ndarray) -> np.ndarray:
    """float32 (N,): distance of each picture to the nearest that is not its own, or to the mirror image of one.

    uint8 (N, R, R, 3) and (M, R, R, 3); own: bool (N, M). Infinite where there is none.
    """
    distances = flip_min(scale(pictures), scale(others))
    return np.where(own, np.inf, distances).min(axis=1, initial=np.inf).astype(np.float32)


def load_pixels(out: Path, rows: pl.DataFrame, resolution: int) -> np.ndarray:
    """uint8 (N, R, R, 3) of rows with the columns LOCATION, as training sees them (`defense.data`, which needs torch).

    Raises TargetError for an image that is gone or no longer the same.
    """
    usual = source_of(out)
    pixels = np.empty((len(rows), resolution, resolution, 3), np.uint8)
    for number, row in enumerate(rows.iter_rows(named=True)):
        src = Path(row.get("root") or usual)
        data = sources.read_image(src, row["shard"], row["offset"], row["size"], row["key"])
        if digest(data) != row["sha256"]:
            raise TargetError(f"{src}: {row['key']} has changed: run `unmemorize dedup` again")
        pixels[number] = images.square(images.decode(data).pixels, resolution)
    return pixels


def read_plant(out: Path) -> pl.DataFrame | None:
    """The truth about a planted dataset; None when OUT is of another."""
    path = out / "plant.parquet"
    return pl.read_parquet(path) if path.exists() else None


def remove_planted(rows: pl.DataFrame, plant: pl.DataFrame | None) -> pl.DataFrame:
    return rows if plant is None else rows.filter(~pl.col("key").is_in(plant["key"].drop_nulls().to_list()))


def source_of(out: Path) -> Path:
    return Path(manifest.read_run(out)["src"])


def read_folder(out: Path, folder: str) -> pl.DataFrame:
    """Location and caption of the images in a folder of a planted dataset, in order."""
    src = source_of(out)
    if not (src / folder).is_dir():
        raise TargetError(f"{src} has no folder `{folder}`: it is not the planted dataset that {out} was made from")
    columns = (*LOCATION, "caption")
    found = list(_read_records(src, folder))
    return pl.DataFrame(found, schema={name: manifest.SCHEMA[name] for name in columns}, orient="row")


def _read_records(src: Path, folder: str) -> Iterator[tuple]:
    for shard in sources.list_shards(src / folder):
        for record in sources.read_shard(shard):
            place = (f"{folder}/{shard.name}", record.offset, record.size, record.key)
            yield (*place, digest(record.data or b""), record.caption)
