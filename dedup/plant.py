"""Put known images into a dataset at known multiplicities and edits, and keep the truth.

In: any source of captioned images. Out: a webdataset DST of canaries, each as often as its level says, and
fillers; beside it `canaries/` (the originals, those of level 0 included), `spare/` (images that stand nowhere
else, to refill what deduplication removes), `held-out/` (others, to measure how good a model is),
`plant.parquet` (the truth) and `plant.json` (the options). Which images are what depends on the source alone.
`seed` only deals out levels, edits and places, so that L seeds put every canary on each of L levels once. Knows
nothing of how duplicates are found.
"""

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from dedup import hashing, images, sources
from dedup.canaries import PlantError, read_pool, select_held_out, select_images
from dedup.manifest import write_json, write_parquet
from dedup.sources.demo import SAMPLES_PER_SHARD, write_shard

POOL = 8_192  # images that are compared, all pairs: bounds time and memory on a large source
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # other formats are planted as PNG

TRUTH: dict[str, pl.DataType | type[pl.DataType]] = {
    "key": pl.String,  # of the copy in the dataset; null at multiplicity 0
    "canary": pl.String,  # key of the original in `canaries/`
    "multiplicity": pl.Int64,  # how often the canary stands in the dataset
    "edit": pl.String,  # of this copy: "exact" or one of EDITS; null at multiplicity 0
    "mode": pl.String,  # of the canary: "exact" or "edited"
    "caption_mode": pl.String,  # "same": every copy has the caption of the original
    "seed": pl.Int64,
}

Sample = tuple[str, dict[str, bytes]]  # key, {extension: data}


def edit_jpeg(rng: np.random.Generator, image: Image.Image) -> tuple[bytes, str]:
    """Saved as JPEG of quality 60 … 90."""
    return _encode(image, "JPEG", quality=int(rng.integers(60, 91))), "jpg"


def edit_resize(rng: np.random.Generator, image: Image.Image) -> tuple[bytes, str]:
    """Scaled by 0.5 … 0.9 or, as often, by 1.1 … 1.5."""
    scale = rng.uniform(0.5, 0.9) + rng.choice([0.0, 0.6])
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return _encode(image.resize(size, Image.Resampling.LANCZOS), "PNG"), "png"


def edit_crop(rng: np.random.Generator, image: Image.Image) -> tuple[bytes, str]:
    """A window of 7/8 of each side, at a random place."""
    width, height = max(1, image.width * 7 // 8), max(1, image.height * 7 // 8)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return _encode(image.crop((left, top, left + width, top + height)), "PNG"), "png"


def edit_flip(rng: np.random.Generator, image: Image.Image) -> tuple[bytes, str]:
    """Mirrored left-right."""
    return _encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"), "png"


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


Edit = Callable[[np.random.Generator, Image.Image], tuple[bytes, str]]
EDITS: dict[str, Edit] = {"jpeg": edit_jpeg, "resize": edit_resize, "crop": edit_crop, "flip": edit_flip}


def plant(
    src: Path,
    dst: Path,
    *,
    canaries: int = 24,
    controls: int = 0,
    multiplicities: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64),
    fillers: int = 250,
    spare: int | None = None,
    held_out: int = 0,
    edited: float = 0.5,
    seed: int = 0,
    resolution: int = 32,
    min_distance: float = 0.25,
) -> pl.DataFrame:
    """Make the planted dataset DST from the images of SRC; returns the truth (one row a copy, columns TRUTH).

    canaries: a multiple of the number of levels. multiplicities: the levels. fillers: other images, once.
    controls: images chosen as canaries are, planted 0 times whatever the seed: they bound the rate of false matches.
    spare: images for the refill; None = as many as there are copies that deduplication should remove.
    held_out: images of no use to training, to measure how good a model is; they lie in `held-out/`.
    edited: share of the canaries whose copies after the first are edited, by one of EDITS after the other.
    min_distance: of every canary to every other image as it is in SRC (not to the edited copies of another
    canary), see `measure_distances`, at `resolution` pixels.
    A DST that was made from the same images with the same options is left as it is; any other must be new or
    empty. Raises PlantError.
    """
    src, dst = sources.fetch(src, sources.Layout())[0], dst.resolve()
    _check_options(canaries, multiplicities, fillers, edited, seed)
    if spare is None:
        spare = sum(max(m - 1, 0) for m in multiplicities) * (canaries // len(multiplicities))
    options = {
        "source_sha256": fingerprint_source(src),
        "canaries": canaries,
        "controls": controls,
        "multiplicities": list(multiplicities),
        "fillers": fillers,
        "spare": spare,
        "edited": edited,
        "seed": seed,
        "resolution": resolution,
        "min_distance": min_distance,
    }
    if held_out:
        options["held_out"] = held_out
    if _is_planted(src, dst, options):
        return pl.read_parquet(dst / "plant.parquet")

    needed = canaries + controls + fillers + spare + held_out
    pool, thumbnails, counts = read_pool(src, resolution, max(POOL, 4 * needed))
    try:
        chosen = select_images(pool, thumbnails, canaries + controls, fillers, spare, min_distance)
        apart = select_held_out(pool, thumbnails, list(chain(*chosen)), held_out) if held_out else []
    except PlantError as error:
        raise PlantError(f"{src}: {error}") from None
    originals, others, spares = (pool[rows] for rows in chosen)
    levels = assign_levels(canaries, multiplicities, edited, seed)
    total = sum(multiplicity for multiplicity, _ in levels) + fillers
    keys = [f"{place:06d}" for place in np.random.default_rng(seed).permutation(total)]
    names = originals["name"].to_list()
    truth = list_copies(names[:canaries], levels, keys, seed)
    never = pl.DataFrame([(None, name, 0, None, None, "same", seed) for name in names[canaries:]], TRUTH, orient="row")
    truth = pl.concat([truth, never])

    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as temporary:
        folder = Path(temporary) / "planted"
        _write_shards(folder, _copy_samples(src, originals.head(canaries), others, truth, keys), total)
        _write_shards(folder / "canaries", _original_samples(src, originals), canaries + controls)
        _write_shards(folder / "spare", _original_samples(src, spares), spare)
        _write_shards(folder / "held-out", _original_samples(src, pool[apart]), held_out)
        write_parquet(folder / "plant.parquet", truth)
        if (src / "demo.json").exists():  # who drew the pictures, and their licence
            shutil.copyfile(src / "demo.json", folder / "demo.json")
        write_json(folder / "plant.json", {"options": options, "counts": counts | {"rows": total}})
        folder.replace(dst)  # all at once: nobody ever sees half a dataset
    return truth


def _check_options(canaries: int, multiplicities: Sequence[int], fillers: int, edited: float, seed: int) -> None:
    levels = len(multiplicities)
    if not levels or min(multiplicities) < 0:
        raise PlantError(f"multiplicities {list(multiplicities)}: one level or more, none below 0")
    if canaries < 1 or canaries % levels:
        nearest = levels * max(1, round(canaries / levels))
        raise PlantError(f"--canaries {canaries} is no multiple of the {levels} levels: take {nearest}")
    if fillers < 0 or seed < 0 or not 0 <= edited <= 1:
        raise PlantError("--fillers and --seed must be 0 or more, --edited a share of 0 … 1")


def fingerprint_source(src: Path) -> str:
    """SHA-256 over key, caption and bytes of every record: equal for a copy of the source elsewhere."""
    result = hashlib.sha256()
    for shard in sources.list_shards(src):
        for record in sources.read_shard(shard):
            row = [record.key, record.caption, hashing.digest(record.data or b"")]
            result.update(json.dumps(row).encode())
    return result.hexdigest()


def _is_planted(src: Path, dst: Path, options: dict[str, object]) -> bool:
    """True: DST is this dataset. False: it is new or empty. Raises PlantError for everything else."""
    if dst != src and dst.is_relative_to(src):
        raise PlantError(f"{dst} lies inside the source: choose a folder beside it")
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return False
    marker = dst / "plant.json"
    if not marker.exists():
        raise PlantError(f"{dst} is not empty and holds no planted dataset: choose another folder")
    found = json.loads(marker.read_text(encoding="utf-8"))["options"]
    if changes := [f"{k} {found.get(k)} → {v}" for k, v in options.items() if found.get(k) != v]:
        raise PlantError(f"{dst} has other options ({', '.join(changes)}): delete it or choose another")
    return True


def assign_levels(canaries: int, multiplicities: Sequence[int], edited: float, seed: int) -> list[tuple[int, str]]:
    """(multiplicity, mode) of each canary. A Latin square: canary i has level i + seed, modulo the L levels.

    Of the canaries of a level, `edited` times their number (rounded up or down) are in mode "edited". A
    canary keeps its mode for L seeds; then the modes move on by one canary: at edited = 0.5 all of them swap.
    """
    levels = len(multiplicities)
    result = []
    for canary in range(canaries):
        position = canary % levels * (canaries // levels) + canary // levels + seed // levels
        is_edited = int((position + 1) * edited) > int(position * edited)
        result.append((multiplicities[(canary + seed) % levels], "edited" if is_edited else "exact"))
    return result


def list_copies(names: list[str], levels: list[tuple[int, str]], keys: list[str], seed: int) -> pl.DataFrame:
    """The truth: copies get the first of `keys`, in order. Columns: TRUTH."""
    free = iter(keys)
    rows: list[tuple] = []
    for name, (multiplicity, mode) in zip(names, levels, strict=True):
        for copy in range(multiplicity):
            edit = list(EDITS)[(copy - 1) % len(EDITS)] if mode == "edited" and copy else "exact"
            rows.append((next(free), name, multiplicity, edit, mode, "same", seed))
        if multiplicity == 0:
            rows.append((None, name, 0, None, mode, "same", seed))
    return pl.DataFrame(rows, schema=TRUTH, orient="row")


def _copy_samples(
    src: Path, originals: pl.DataFrame, others: pl.DataFrame, truth: pl.DataFrame, keys: list[str]
) -> Iterator[Sample]:
    """The dataset, in the order of its keys; the fillers have those that no copy has."""
    found = dict(_original_samples(src, originals))
    numbers = {name: number for number, name in enumerate(found)}
    copies = truth.with_columns(copy=pl.int_range(pl.len()).over("canary")).drop_nulls("key")
    planted = {row["key"]: row for row in copies.iter_rows(named=True)}
    fillers = dict(zip(keys[len(planted) :], others.iter_rows(named=True), strict=True))
    for key in sorted(keys, key=int):
        if key in fillers:
            yield key, _read_members(src, fillers[key])
        else:
            row = planted[key]
            rng = np.random.default_rng([row["seed"], numbers[row["canary"]], row["copy"]])
            yield key, _edit_members(found[row["canary"]], row["edit"], rng)


def _edit_members(members: dict[str, bytes], edit: str, rng: np.random.Generator) -> dict[str, bytes]:
    if edit == "exact":
        return members
    original = next(data for extension, data in members.items() if extension != "txt")
    data, extension = EDITS[edit](rng, Image.fromarray(images.decode(original).pixels))
    return {extension: data, "txt": members["txt"]}


def _original_samples(src: Path, table: pl.DataFrame) -> Iterator[Sample]:
    return ((row["name"], _read_members(src, row)) for row in table.iter_rows(named=True))


def _read_members(src: Path, row: dict) -> dict[str, bytes]:
    """The bytes of an image as they are, or as PNG if not every reader knows the format; and its caption."""
    data = sources.read_image(src, row["shard"], row["offset"], row["size"], row["key"])
    decoded = images.decode(data)
    if decoded.format not in EXTENSIONS:
        data = _encode(Image.fromarray(decoded.pixels), "PNG")
    members = {EXTENSIONS.get(decoded.format, "png"): data}
    return members | ({"txt": row["caption"].encode()} if row["caption"] else {})


def _write_shards(folder: Path, samples: Iterator[Sample], total: int) -> None:
    for shard, _ in enumerate(range(0, total, SAMPLES_PER_SHARD)):
        write_shard(folder / f"{shard:05d}.tar", islice(samples, SAMPLES_PER_SHARD))
