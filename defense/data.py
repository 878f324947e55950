"""Manifest + arm → tensors; which rows are held out; and in which order the rest is trained on.

In: the rows of an arm, SRC, the frozen halves of the model (autoencoder, text encoder). Out: `Examples`,
everything that training needs in memory: latents, and one condition per distinct caption. Images are decoded
once. Knows nothing of what the arms mean, nor of the training loop.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dedup import images, manifest, sources
from dedup.hashing import digest
from defense.arms import Material
from defense.conditions import Conditions, Embed, embed_captions

SPARE = "spare"  # folder of a planted dataset with images that stand nowhere else


class DataError(OSError):
    """An image of the manifest that cannot be had any more."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What a model is trained on. Row i draws its caption from `caption_ids[first[i] :][: count[i]]`."""

    latents: Tensor  # (N, C, h, w) float32, scaled to unit variance
    conditions: Conditions  # one row per distinct caption; row 0 is the empty caption
    caption_ids: Tensor  # (sum of count,) int64, rows of `conditions`
    first: Tensor  # (N,) int64
    count: Tensor  # (N,) int64, at least 1
    weights: bytes = b""  # of `draw_rows`
    texts: Sequence[str] = ()  # D, what the conditions are of
    embed: Embed | None = None  # more texts → their conditions, which row 0 precedes

    def draw_captions(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """Rows of `conditions` for the rows (B,) int64, chosen by uniform (B,) in [0, 1)."""
        chosen = (uniform * self.count[rows]).long()
        return self.caption_ids[self.first[rows] + chosen.minimum(self.count[rows] - 1)]


def build_examples(rows: pl.DataFrame, src: Path, pipeline: DiffusionPipeline, *, resolution: int) -> Examples:
    """Rows of an arm (`arms.COLUMNS`) → Examples, by the frozen halves of the pipeline. Raises DataError."""
    chunk = fit_chunk(resolution)
    latents = [encode_latents(load_pixels(part, src, resolution), pipeline) for part in rows.iter_slices(chunk)]
    captions = [list(texts) or [""] for texts in rows["captions"]]
    distinct = number_texts(["", *chain.from_iterable(captions)])
    count = torch.tensor([len(texts) for texts in captions])
    return Examples(
        torch.cat(latents),
        embed_captions(pipeline, list(distinct)[1:]),
        caption_ids=torch.tensor([distinct[text] for texts in captions for text in texts]),
        first=count.cumsum(0) - count,
        count=count,
        weights=pack_weights(rows),
        texts=tuple(distinct),
        embed=partial(embed_captions, pipeline),
    )


def fit_chunk(side: int) -> int:
    """How many images of this many pixels a side go through a network at a time: a fixed number of pixels."""
    return max(1, min(64, 2**20 // side**2))


def number_texts(texts: Iterable[str]) -> dict[str, int]:
    """Distinct texts, numbered in order of appearance."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def load_pixels(rows: pl.DataFrame, src: Path, size: int) -> np.ndarray:
    """uint8 (N, size, size, 3): every image upright on white, padded to a square. Raises DataError."""
    pixels = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    for number, row in enumerate(rows.iter_rows(named=True)):
        data = sources.read_image(src, row["shard"], row["offset"], row["size"], row["key"])
        if row["sha256"] is not None and digest(data) != row["sha256"]:
            where = f"{row['key']} in {row['shard']}" if row["shard"] else row["key"]
            raise DataError(f"{src}: {where} has changed: run `unmemorize dedup` again")
        try:
            pixels[number] = images.square(images.decode(data).pixels, size)
        except images.ImageError as error:
            raise DataError(f"{src}: {row['key']} cannot be decoded ({error})") from error
    return pixels


@torch.no_grad()
def encode_latents(pixels: np.ndarray, pipeline: DiffusionPipeline) -> Tensor:
    """uint8 (N, H, W, 3) → float32 (N, C, H/f, W/f): mean of the posterior times the scaling factor.

    Without an autoencoder in the pipeline the pixels themselves, in [-1, 1].
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, H, W)
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return x.contiguous()
    return vae.encode(x.contiguous().to(vae.device)).latent_dist.mode().cpu() * vae.config.scaling_factor


def hold_out(rows: pl.DataFrame, share: float, protected: Collection[str] = ()) -> pl.Series:
    """Boolean per row: True where its component is held out of training.

    The choice is a hash of the component, hence the same for every arm and seed, and two copies of an image
    never stand on both sides. Components that hold a key of `protected` (the canaries) are never held out.
    """
    component = rows["component_id"].fill_null(rows["id"])
    held = [c for c in component.unique() if _hash_to_unit(c) < share]
    safe = component.filter(rows["key"].is_in(list(protected)))
    return (component.is_in(held) & ~component.is_in(safe.to_list())).alias("held_out")


def _hash_to_unit(number: int) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=6).digest(), "big") / 2**48


def read_material(out: Path, held_out: float) -> tuple[pl.DataFrame, Material]:
    """All rows of OUT with a column `held_out`, and what the arms choose from: the others, with what is known."""
    rows, run = manifest.read(out), manifest.read_run(out)
    rows = rows.with_columns(hold_out(rows, held_out, read_canary_keys(out)))
    plant, pairs = out / "plant.parquet", out / "pairs.parquet"
    policies = {name: run["options"][name] for name in ("flips", "rotations") if name in run.get("options", {})}
    return rows, Material(
        rows.filter(~pl.col("held_out")),
        read_spare(Path(run["src"])),
        truth=pl.read_parquet(plant, columns=["key", "canary"]) if plant.exists() else None,
        pairs=pl.scan_parquet(pairs) if pairs.exists() else None,
        **policies,
    )


def read_canary_keys(out: Path) -> list[str]:
    """Keys of the planted copies; none when the dataset was not planted."""
    path = out / "plant.parquet"
    return pl.read_parquet(path, columns=["key"])["key"].drop_nulls().to_list() if path.exists() else []


def read_spare(src: Path) -> pl.DataFrame | None:
    """Location and caption of the spare images of a planted dataset, in order; None when it has none."""
    folder = src / SPARE
    if not folder.is_dir():
        return None
    columns = ("shard", "offset", "size", "key", "caption")
    found = [
        (f"{SPARE}/{shard.name}", record.offset, record.size, record.key, record.caption)
        for shard in sources.list_shards(folder)
        for record in sources.read_shard(shard)
    ]
    return pl.DataFrame(found, schema={column: manifest.SCHEMA[column] for column in columns}, orient="row")


def draw_rows(n: int, batch_size: int, seed: int, step: int, weights: bytes = b"") -> np.ndarray:
    """int64 (B,): rows of a batch, out of 0 … n-1. Shuffled passes follow each other.

    A pass has each row once. With weights (float64, one a row, their sum W) it has W rows, rounded: row i as often as
    its weight says on average, and of neighbours whose weights add up to a whole number exactly so many.
    """
    size = max(1, round(float(np.frombuffer(weights).sum()))) if weights else n
    passes, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), size)
    chosen = [_shuffle(n, seed, p, weights)[places[passes == p]] for p in range(passes[0], passes[-1] + 1)]
    return np.concatenate(chosen)


@lru_cache(maxsize=4)
def _shuffle(n: int, seed: int, number: int, weights: bytes) -> np.ndarray:
    rng = np.random.default_rng([seed, 0, number])
    if not weights:
        return rng.permutation(n)
    reached = np.frombuffer(weights).cumsum()
    size = max(1, round(float(reached[-1])))
    points = (np.arange(size) + rng.random(size)) * (reached[-1] / size)  # one in each of equal parts
    return rng.permutation(np.searchsorted(reached, points, side="right").clip(max=n - 1))


def draw_poisson(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """int64 (B,), B by chance: each of the rows 0 … n-1 with probability batch_size / n, whatever the others do."""
    return np.flatnonzero(np.random.default_rng([seed, 5, step]).random(n) < batch_size / n)


def pack_weights(training: pl.DataFrame) -> bytes:
    """The weights of an arm as `draw_rows` takes them: none when all are equal."""
    weights = training["weight"].to_numpy()
    return b"" if (weights == weights[0]).all() else weights.astype(np.float64).tobytes()


def derive_seed(*numbers: int) -> int:
    """A seed for torch that depends on these numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def draw_noise(batch_size: int, shape: Sequence[int], seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal (B, *shape), uniform (3, B) in [0, 1), and a permutation (B,) of 0 … B-1."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 1, step))
    return (
        torch.randn((batch_size, *shape), generator=generator),
        torch.rand((3, batch_size), generator=generator),
        torch.randperm(batch_size, generator=generator),
    )


def count_exposures(
    rows: pl.DataFrame,
    training: pl.DataFrame,
    steps: int,
    batch_size: int,
    seed: int,
    *,
    poisson: bool = False,
    dropped: np.ndarray | None = None,
) -> pl.DataFrame:
    """How often each row was trained on: id, cluster_id, key, held_out, exposures.

    rows: the manifest with `held_out`; training: the rows of the arm. Every row of the manifest is there,
    with 0 if the arm left it out; then the spare images that were used, without id and cluster. dropped: int64 (N,),
    how often the loss of each row of the arm did not count: no exposures, but a column of their own.
    """
    counts = {"exposures": np.zeros(len(training), dtype=np.int64)}
    weights = pack_weights(training)
    for step in range(steps):
        if poisson:
            drawn = draw_poisson(len(training), batch_size, seed, step)
        else:
            drawn = draw_rows(len(training), batch_size, seed, step, weights)
        np.add.at(counts["exposures"], drawn, 1)
    if dropped is not None:
        counts = {"exposures": counts["exposures"] - dropped, "dropped": dropped}
    counted = training.select("id", "cluster_id", "key", **{name: pl.Series(count) for name, count in counts.items()})
    ours = rows.select("id", "cluster_id", "key", "held_out").join(
        counted.select("id", *counts), on="id", how="left", maintain_order="left"
    )
    fresh = counted.filter(pl.col("id").is_null()).with_columns(held_out=pl.lit(False))
    return pl.concat([ours.with_columns(pl.col(*counts).fill_null(0)), fresh.select(ours.columns)])
