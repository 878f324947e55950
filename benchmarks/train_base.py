"""Train `tiny-base`, the small pretrained model of the package, on drawings that are in no demo or benchmark set.

    python benchmarks/train_base.py OPENCLIPART FLUENT --work DIR [--out defense/pretrained/tiny-base]

OPENCLIPART: Debian's `openclipart-png` 1:0.18+dfsg-19 unpacked (public domain), captions are the titles of its files.
FLUENT: npm's `@lobehub/fluent-emoji-3d` 1.1.0 unpacked (MIT), captions are CLDR short names. Everything is done by the
project's own stages: the pictures become a dataset; `dedup --against` drops its duplicates and what is a copy of a
drawing of the demo, with its whole star; `train --arm dedup` trains the network of configs/tiny.toml on the rest.
Emoji of two vendors mean the same things, and a red square is a red square: so that the base knows no drawing of the
demo by another name, pictures nearer than NEAR to one are left out before. Writes half-precision weights, and
origin.json beside them: what they were made of, and how many copies of drawings are among that.

Runtime: see docs/benchmarks.md. The same seed on the same machine gives the same weights.
"""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from PIL import Image

from dedup import images, manifest, sources
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources.demo import list_drawings, render_demo, write_shard
from defense import model
from defense.config import TrainConfig
from defense.tiny import build_tiny
from defense.train import train

SIDE, SMALL = 128, 32  # pixels: of the dataset, and of the pictures as the model sees them
NEAR = 0.2  # normalised l2 at SMALL pixels; what counts as extracted in the demo is nearer than .15
PER_SHARD = 1_000
EMBEDDING = 0.02  # standard deviation of CLIP's token embeddings
PICTURES = [
    {"name": "openclipart-png", "version": "1:0.18+dfsg-19", "from": "Debian", "licence": "public domain"},
    {"name": "@lobehub/fluent-emoji-3d", "version": "1.1.0", "from": "npm", "licence": "MIT"},
]


def list_pictures(openclipart: Path, fluent: Path) -> Iterator[tuple[str, Path, str]]:
    """Key, file and caption of every picture, in the order of the files."""
    names = {key.replace("-FE0F", ""): caption for key, caption in list_drawings().items()}
    for path in sorted(fluent.rglob("*.webp")):
        yield f"fluent-{path.stem}", path, names.get(path.stem.upper().replace("-FE0F", ""), "")
    for number, path in enumerate(sorted(openclipart.rglob("*.png"))):
        if not path.is_symlink():
            yield f"openclipart-{number:05d}", path, path.stem.replace("_", " ").replace("-", " ")


def read_picture(path: Path) -> np.ndarray | None:
    """uint8 (SIDE, SIDE, 3) on white, or None for what cannot be read."""
    try:
        return images.square(images.decode(path.read_bytes()).pixels, SIDE)
    except images.ImageError:
        return None


def find_near(pictures: np.ndarray, drawings: np.ndarray) -> np.ndarray:
    """bool (N,): whether uint8 (N, S, S, 3) lies nearer than NEAR to a drawing (M, S, S, 3) or its mirror image."""
    flat = (pictures.astype(np.float32) - 128).reshape(len(pictures), -1)  # (N, D)
    nearest = np.full(len(flat), np.inf)
    for drawn in (drawings, drawings[:, :, ::-1]):
        other = (drawn.astype(np.float32) - 128).reshape(len(drawn), -1)  # (M, D)
        squares = np.square(flat).sum(1)[:, None] + np.square(other).sum(1) - 2 * flat @ other.T  # (N, M)
        nearest = np.minimum(nearest, np.sqrt(squares.clip(0).min(1) / flat.shape[1]) / 255)
    return nearest < NEAR


def read_drawings(folder: Path) -> np.ndarray:
    """uint8 (M, SMALL, SMALL, 3): the drawings of the demo."""
    records = (record for shard in sources.list_shards(folder) for record in sources.read_shard(shard))
    return np.stack([images.square(images.decode(record.data or b"").pixels, SMALL) for record in records])


def write_dataset(pictures: Iterator[tuple[str, Path, str]], drawings: np.ndarray, folder: Path) -> dict[str, int]:
    """The pictures that can be read and are not near a drawing, as shards; how many were left out."""
    read = [(key, read_picture(path), caption) for key, path, caption in pictures]
    found = [(key, pixels, caption) for key, pixels, caption in read if pixels is not None]
    near = find_near(np.stack([images.square(pixels, SMALL) for _, pixels, _ in found]), drawings)
    kept = [sample for sample, is_near in zip(found, near, strict=True) if not is_near]
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(kept), PER_SHARD)):
        part = kept[start : start + PER_SHARD]
        members = ((key, {"png": encode(pixels), "txt": caption.encode()}) for key, pixels, caption in part)
        write_shard(folder / f"{number:05d}.tar", members)
    return {"files": len(read), "unreadable": len(read) - len(found), "near a drawing": len(found) - len(kept)}


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def begin(folder: Path, seed: int, config: TrainConfig) -> None:
    """The untrained pipeline. Token embeddings have one of two values each: packed, they need a bit and not sixteen."""
    pipeline = build_tiny(seed, caption_tokens=config.caption_tokens)
    with torch.no_grad():
        embedding = pipeline.text_encoder.get_input_embeddings().weight
        embedding.copy_(embedding.sign() * EMBEDDING)
    model.save_pipeline(pipeline, folder)


def drop_copies(drawings: Path, work: Path) -> dict[str, Any]:
    """Drop duplicates, and what is a copy of a drawing with its whole star. Counts: what is kept has no copies left."""
    options = Options(level="copy", encoder="local", against=(str(drawings.resolve()),))
    deduplicate(work / "dataset", work / "dedup", options, jobs=1)
    rows = manifest.read(work / "dedup").filter(pl.col("status") == "ok")
    matches = pl.read_parquet(work / "dedup" / "against.parquet").unique("id", keep="first")
    kinds = {kind: int((matches["class"] == kind).sum()) for kind in ("copy", "same-scene", "look-alike")}
    left = rows.filter(pl.col("keep") & pl.col("id").is_in(matches.filter(pl.col("class") == "copy")["id"].to_list()))
    return {"rows": len(rows), "kept": int(rows["keep"].sum()), "copies left": len(left), "against the drawings": kinds}


def ship(run: Path, out: Path, counts: dict[str, Any]) -> None:
    """Write the pipeline of RUN in half precision, and in origin.json what it was made of."""
    pipeline = model.load_pipeline(run / "model")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.half()
    shutil.rmtree(out, ignore_errors=True)
    model.save_pipeline(pipeline, out)
    for path in (out / model.INDEX, *out.rglob("config.json")):  # they name the folders of this machine
        settings = {key: value for key, value in manifest.read_json(path).items() if key != "_name_or_path"}
        manifest.write_json(path, settings)
    digest = model.digest_weights(model.load_pipeline(out))
    made = {key: manifest.read_json(run / "config.json")[key] for key in ("seed", "config", "versions")}
    made["config"]["base"] = ""  # the untrained pipeline of the seed
    manifest.write_json(out / "origin.json", {"weights_sha256": digest, "pictures": PICTURES, "counts": counts} | made)


def main(
    openclipart: Annotated[Path, typer.Argument(help="openclipart-png, unpacked.")],
    fluent: Annotated[Path, typer.Argument(help="@lobehub/fluent-emoji-3d, unpacked.")],
    work: Annotated[Path, typer.Option(help="Working folder; the same command goes on in it.")],
    out: Annotated[Path, typer.Option(help="Pipeline folder to write.")] = Path("defense/pretrained/tiny-base"),
    steps: int = 6_000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Gather, deduplicate, train, write."""
    drawings, dataset, told = work / "drawings", work / "dataset", work / "pictures.json"
    render_demo(drawings)
    if not told.exists():
        counts = write_dataset(list_pictures(openclipart, fluent), read_drawings(drawings), dataset)
        manifest.write_json(told, counts)
    counts = manifest.read_json(told) | drop_copies(drawings, work)
    typer.echo(json.dumps(counts))
    size = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    config = TrainConfig(base=str(work / "untrained"), ema_decay=0.999, **size)
    if not (work / "untrained").exists():
        begin(work / "untrained", seed, config)
    train(work / "dedup", "dedup", config, work / "run", seed)
    ship(work / "run", out, counts)


if __name__ == "__main__":
    typer.run(main)
