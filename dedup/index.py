"""A finished run of level copy → its index in memory: vectors, rows, and what made them, checked.

In: OUT, with SRC where the run saw it. Out: an `Index`, for `match`. Reads no picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import embedding, features, hashing, images, look, manifest, sources, vectors
from dedup import vocabulary as vocabularies
from dedup.fingerprint import DecodeOptions
from dedup.reader import ROWS

FEWEST = 1e-300  # has a logarithm
COLUMNS = ["id", "source", *look.LOCATION, "caption", "width", "height", "status", "pixel_digest"]
COLUMNS += ["phash", "dhash", "pdq", "cluster_id", "keep", "kept_id", "represents"]


class MatchError(ValueError):
    """An OUT that nothing can be compared with: what, and how to mend it, in one line."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """How the vectors of OUT were made, so that a worker can make more of them."""

    name: str
    weights: str | None  # `local`: the file of its vocabulary
    sha256: str | None

    def encode(self, pixels: np.ndarray, found: features.Features) -> np.ndarray:
        """float32 (2, d): the picture, and its mirror image."""
        if self.name == "local":
            words = vocabularies.load(Path(self.weights or ""), self.sha256 or "")
            return np.stack([words.encode(found), words.encode(features.mirror(found))])
        encoder = embedding.resolve(self.name, self.weights, self.sha256)
        small = images.shrink(pixels, encoder.side)
        return encoder.encode(np.stack([small, small[:, ::-1]]))


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a worker needs to know of OUT to look at its pictures."""

    src: Path
    decode: DecodeOptions


@dataclass(frozen=True, slots=True, eq=False)
class Chance:
    """Scores, rising, and how many unrelated rows are expected to reach them with one query; empty: unknown."""

    scores: np.ndarray
    expected: np.ndarray

    def count(self, scores: np.ndarray) -> np.ndarray:
        """Expected number at each score; NaN below the scores that are known, never less than the sample can tell."""
        if not len(self.scores):
            return np.full(len(scores), np.nan)
        counts = np.exp(np.interp(scores, self.scores, np.log(self.expected)))
        return np.where(scores < self.scores[0], np.nan, counts)

    def threshold(self, max_false: float) -> float:
        """The least score with at most so many; −1 if they cannot be told or so many that the nearest are limit enough.

        The strictest known score when fewer were asked for than the sample can tell.
        """
        if not len(self.scores) or max_false >= self.expected[0]:
            return -1.0
        return float(np.interp(-np.log(max(max_false, FEWEST)), -np.log(self.expected), self.scores))

    def supports(self, max_false: float) -> bool:
        """Whether so few can be told."""
        return not len(self.scores) or bool(max_false >= self.expected[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """A finished run of level copy, in memory: `load`."""

    out: Path
    dataset: Dataset
    encoder: Encoder
    rows: pl.DataFrame  # COLUMNS of all rows of the manifest; `strict`: in a series; `said`: their captions by `fold`
    ids: np.ndarray  # int64 (n,): the row of each vector
    vectors: np.ndarray  # int16 (n, d), of `products.quantise`
    background: np.ndarray  # float32 (n,)
    chance: Chance
    by_pixels: dict[str, int]  # known pixel digest → row
    parts: list[str]  # names of files of features, see `Reader.write_parts`

    def places(self, ids: np.ndarray) -> list[tuple[Path, int] | None]:
        """Where the run may have left the features of these rows: a file that need not be there, and a number."""
        position = np.searchsorted(self.ids, ids)
        known = position < len(self.ids)
        known[known] = self.ids[position[known]] == ids[known]
        folder = self.out / ".work" / "features-0"
        return [
            (folder / self.parts[at // ROWS], at % ROWS) if there else None
            for at, there in zip(position.tolist(), known.tolist(), strict=True)
        ]


def load(out: Path) -> Index:
    """Read a finished run. Raises MatchError, ManifestError, EmbeddingError, EncoderError or SourceError."""
    run = manifest.read_run(out)
    options, counts = run["options"], run["counts"]
    src = Path(run["src"])
    if options.get("level") != "copy":
        raise MatchError(
            f"{out} was made at level {options.get('level')}, which has no embeddings: run "
            f"`unmemorize dedup {src} --level copy -o` with another folder"
        )
    if options["encoder"] == "external":
        raise MatchError(
            f"the embeddings of {out} were made elsewhere, so new pictures cannot be compared with them: run "
            f"`unmemorize dedup {src} --level copy --encoder local -o` with another folder"
        )
    sources.list_again(out, run)  # its pictures are what a query is compared with
    search = counts.get("copy_search", {})
    return build(out, src, options, search, manifest.read(out, COLUMNS))


def build(out: Path, src: Path, options: dict[str, Any], search: dict[str, Any], rows: pl.DataFrame) -> Index:
    """As `load`, of a run that may not be finished but for its embeddings.

    search: counts["copy_search"] of `run.json`; rows: COLUMNS of the manifest.
    """
    from dedup import products

    meta, described, raw = vectors.read_embeddings(out, options["encoder"])
    ids = described["id"].to_numpy()
    encoder = check_encoder(out, options, meta)
    sha256 = rows["sha256"].gather(ids).to_list()
    parts = [hashing.digest("".join(sha256[n : n + ROWS]).encode())[:20] for n in range(0, len(ids), ROWS)]
    known = rows.filter(pl.col("pixel_digest").is_not_null()).sort("keep", "id", descending=[False, True])
    strict = pl.col("strict").fill_null(False)
    rows = rows.join(described.select("id", "strict"), on="id", how="left", maintain_order="left")
    decode = DecodeOptions(options["max_pixels"], options["max_frames"], options["hash_decode"])
    return Index(
        out=out,
        dataset=Dataset(src, decode),
        encoder=encoder,
        rows=rows.with_columns(strict, said=fold(rows["caption"])),
        ids=ids,
        vectors=products.quantise(raw),
        background=described["background"].to_numpy(),
        chance=read_chance(search.get("null") or {}, len(ids), 1 if options["encoder"] == "local" else 2),
        by_pixels=dict(zip(known["pixel_digest"], known["id"], strict=True)),
        parts=[f"{name}.npy" for name in parts],
    )


def check_encoder(out: Path, options: dict[str, Any], meta: dict[str, Any]) -> Encoder:
    """The encoder of the run, if it still is what made these vectors. Raises MatchError or EncoderError."""
    name = options["encoder"]
    if name == "local":
        path = out / "embeddings" / "local" / "vocabulary.npz"
        try:
            words = vocabularies.load(path, meta["weights_sha256"])
        except (OSError, ValueError) as error:
            raise MatchError(
                f"{path} is not the vocabulary that the embeddings of {out} were made with ({error}): remove {out} "
                f"and run `unmemorize dedup` again"
            ) from error
        width = len(words.mean) if words.projection is None else words.projection.shape[1]
        there = {"preprocessing": vocabularies.DESCRIPTION, "dimension": width}
        encoder = Encoder(name, str(path), meta["weights_sha256"])
    else:
        encoder = Encoder(name, options["weights"], options["weights_sha256"])
        there = embedding.resolve(encoder.name, encoder.weights, encoder.sha256).meta()
    for key, value in there.items():
        if meta[key] != value:
            raise MatchError(
                f"the embeddings of {out} were made with another {key} ({meta[key]}, now {value}): put the encoder "
                f"back as it was, or run `unmemorize dedup` with another -o"
            )
    return encoder


def read_chance(null: dict[str, Any], n: int, views: int) -> Chance:
    """The null model of a run over n representatives (`threshold.describe`) → what to expect for one query.

    A random pair reaches score t with probability expected(t) / pairs_total, and pairs_total = n (n − 1) / 2. A query
    that resembles unrelated rows as they resemble each other meets n of them: n × expected / pairs_total =
    2 × expected / (n − 1). views: how often it is looked up by another vector than the null model knows: a mirrored
    view counts once more unless random pairs were scored in both (only `local` was).
    """
    curve = null.get("curve", [])
    scores = np.array([point["threshold"] for point in curve], np.float64)
    expected = np.array([point["expected"] for point in curve], np.float64)
    return Chance(scores, views * n * expected / max(1, null.get("pairs_total", 1)))


def fold(texts: pl.Series) -> pl.Series:
    """Texts without the space around them and without case."""
    return pl.Series([None if text is None else text.strip().casefold() for text in texts], dtype=pl.String)
