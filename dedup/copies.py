"""The copy level: pictures that were cropped, framed, turned, faded … → pairs with evidence.

In: rows, and the stars that the hash level made of them. One representative of each star is embedded and looked up
among the others; each candidate is matched by local features and laid over (`overlay`). Then gaps are closed: a kept
row whose partner was dropped is compared with the row that it was dropped to, because only a direct match may delete.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import (
    embedding,
    engine,
    evidence,
    features,
    gaps,
    geometry,
    manifest,
    overlay,
    twins,
    vectors,
    vocabulary,
)
from dedup.manifest import Schema
from dedup.reader import ITEMS, ROWS, Reader

ALL_PAIRS = 64  # pictures of which all pairs are candidates: too few to learn a vocabulary from
CHANCE_PICTURES, CHANCE_PAIRS = 300, 300  # of a cell, taken at random, to know what unrelated pictures have in common
CHANCE_FEWEST = 100  # pairs; smaller cells are as all of them together
SERIES = 0.1  # share of them with a few features in common: photographs 0.013, emoji 0.06, solar cells 0.16
MIN_SIDE = 32  # pixels: smaller pictures hold too little to tell a copy from a look-alike
CANDIDATE: Schema = {"a": pl.Int64, "b": pl.Int64, "cosine": pl.Float64, "score": pl.Float64, "mirrored": pl.Boolean}


def check_encoder(name: str, weights: str | None, sha256: str | None) -> None:
    """Raise EncoderError or EmbeddingError now, and not after an hour, when there is no such encoder."""
    if name == "external":
        vectors.list_external(Path(weights or ""))
    elif name != "local":
        embedding.resolve(name, weights, sha256)


@dataclass
class CopySearch:
    """`find` more pairs until there are none, `confirm` those that matter, `describe` it all at the end."""

    rows: pl.DataFrame
    reader: Reader
    out: Path
    encoder: str
    weights: tuple[str | None, str | None]  # where they are, and their SHA-256; None: as installed
    max_false_pairs: float | None  # unrelated pairs that may be compared; None: three a picture
    stores: list[tuple[list[Path], int]] = field(default_factory=list)  # files of features, and rows of a file
    stars: pl.Series | None = None  # cluster_id by the default policies, if others decide: what is searched is the same
    compared: pl.DataFrame | None = None
    random: pl.DataFrame | None = None  # pairs a, b of representatives, with their score
    near: pl.DataFrame | None = None  # CANDIDATEs of the search
    strict: np.ndarray = field(init=False)  # bool (rows,): see `_find_series`
    stored: np.ndarray = field(init=False)  # int32 (rows, 2): which of the stores, from 1 on, and number in it; 0: none
    counts: dict[str, Any] = field(default_factory=dict)  # for run.json
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the work
    known: dict[str, tuple[Path, int]] = field(default_factory=dict)  # features of an earlier run, by sha256

    def __post_init__(self) -> None:
        self.strict = np.zeros(len(self.rows), bool)
        self.stored = np.zeros((len(self.rows), 2), np.int32)

    def find(self, pairs: pl.DataFrame, decisions: pl.DataFrame, rank: pl.Series) -> pl.DataFrame:
        """New rows of the pairs table (`manifest.PAIRS_SCHEMA`), signal `copy`: their features agree; see `confirm`."""
        copied = pairs.filter(pl.col("class") == "copy")
        is_first = self.compared is None
        if self.compared is None:
            near = self._search(decisions["cluster_id"] if self.stars is None else self.stars)
            self.compared = near.select("a", "b").clear()
        else:
            near = gaps.bridges(pairs, decisions, rank, self.rows["scope"])
        for known in (self.compared, copied):
            near = near.join(known, on=["a", "b"], how="anti", maintain_order="left")
        self.compared = pl.concat([self.compared, near.select("a", "b")])
        found = self._compare(near)
        if self.stars is None:
            return found
        found = twins.stand_in(found, self.rows, rank).join(copied, on=["a", "b"], how="anti", maintain_order="left")
        return self.find(pairs, decisions, rank) if is_first and found.is_empty() else found

    def _compare(self, near: pl.DataFrame) -> pl.DataFrame:
        strict = pl.Series(self.strict).gather(near["a"]) | pl.Series(self.strict).gather(near["b"])
        least = pl.when(strict).then(overlay.COPY_EVIDENCE).otherwise(geometry.MIN_EVIDENCE)
        found = pl.concat([near.select("a", "b", "cosine"), self._match(near)], how="horizontal")
        found = found.filter(pl.col("inliers") >= least)
        found = found.with_columns(**{"class": pl.lit("copy")}, signal=pl.lit("copy"))
        return manifest.conform(found, manifest.PAIRS_SCHEMA)

    def _match(self, candidates: pl.DataFrame) -> pl.DataFrame:
        def make_items(numbers: list[int]) -> list[tuple]:
            asked = candidates[numbers]
            places = self._places(asked.select("a", "b").to_numpy().ravel())
            return [(*a, *b, hint) for a, b, hint in zip(places[::2], places[1::2], asked["mirrored"], strict=True)]

        ids = pl.concat([candidates["a"], candidates["b"]]).unique().sort()
        sha256 = self.reader.signatures.take(ids, ("sha256",))["sha256"]
        of_a, of_b = (sha256.gather(ids.search_sorted(candidates[end])) for end in "ab")
        keys = list(zip(of_a, of_b, candidates["mirrored"], strict=True))
        with engine.timed(self.seconds, "match"):
            found = self.reader.ask(evidence.match_pairs, keys, make_items)
        return pl.DataFrame(found, schema=evidence.MATCH, orient="row")

    def confirm(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """The pairs with what a look at their pictures says: class (null: nothing), score, overlap."""
        a, b = (self.reader.locate(pairs[end]).rows() for end in "ab")
        strict = (self.strict[pairs["a"].to_numpy()] | self.strict[pairs["b"].to_numpy()]).tolist()
        matches = pairs.select("orientation", "inliers", "transform").rows()
        items = [(x, y, *match, is_strict) for x, y, match, is_strict in zip(a, b, matches, strict, strict=True)]
        keys = [(a[-1], b[-1], *asked) for a, b, *asked in items]
        with engine.timed(self.seconds, "lay over"):
            found = self.reader.ask(evidence.judge_pairs, keys, lambda numbers: [items[n] for n in numbers])
        judged = pl.DataFrame(found, schema=evidence.VERDICT, orient="row")
        return pairs.with_columns(judged.get_columns())

    def forget(self) -> None:
        """Remove the features that an earlier run needed and this one did not."""
        for folder in self.reader.work.glob("features-*"):
            if int(folder.name.partition("-")[2]) >= len(self.stores):
                shutil.rmtree(folder)

    def _search(self, stars: pl.Series) -> pl.DataFrame:
        """CANDIDATEs: ids a < b, cosine, score, and whether a mirrored resembles b more, if known."""
        side = pl.min_horizontal("width", "height")
        chosen = self.rows.filter((stars == self.rows["id"]) & (pl.col("status") == "ok") & (side >= MIN_SIDE))
        if len(chosen) < 2:
            return pl.DataFrame(schema=CANDIDATE)
        from dedup import candidates

        with engine.timed(self.seconds, "embed"):
            meta, upright, mirrored = self._embed(chosen["id"])
        jobs = self.reader.workers.jobs
        with engine.timed(self.seconds, "nearest"):
            views = candidates.see(upright, mirrored, jobs)
        ids = chosen["id"].to_numpy()
        self.random = _by_id(candidates.score_random(views), ids)
        crowded = pl.DataFrame({"cluster_id": ids, "strict": self._find_series(ids, upright)})
        rows = crowded.rename({"cluster_id": "id"}).with_columns(background=views.background)
        vectors.write_embeddings(self.out, meta, rows, upright)
        of_row = pl.DataFrame({"cluster_id": stars}).join(crowded, on="cluster_id", how="left", maintain_order="left")
        self.strict = of_row["strict"].fill_null(False).to_numpy()
        chosen_floor = candidates.choose_floor(self.random["score"].to_numpy(), len(ids), self.max_false_pairs)
        floor, recall = candidates.MIN_SCORE, 1.0
        if chosen_floor is not None:
            floor = max(floor, round(chosen_floor.value, 4))
            self.counts["supported"] = chosen_floor.supported
        if len(ids) <= ALL_PAIRS:
            near = pl.DataFrame(dict(zip("ij", np.triu_indices(len(ids), 1), strict=True)))
            near = near.with_columns(cosine=None, score=None, mirrored=None)
        else:
            with engine.timed(self.seconds, "nearest"):
                near, recall = candidates.find_near(views, floor, jobs)
        self.near = manifest.conform(_by_id(near, ids), CANDIDATE)
        self.counts |= {"encoder": self.encoder, "pictures": len(ids), "floor": floor, "recall": recall}
        self.counts |= {"candidates": len(near)}
        return self.near

    def describe(self, pairs: pl.DataFrame) -> dict[str, Any]:
        """For run.json: the search, how alike unrelated pictures are, examples. pairs: of the finished run."""
        from dedup import candidates

        if self.random is None or self.near is None:
            return self.counts
        n, floor = self.counts["pictures"], self.counts["floor"]
        near, random = self.near, self.random
        if self.stars is not None:  # who was searched for need not be who stands for that picture now
            pairs = pairs.sort(pl.col("class") != "copy", maintain_order=True)
            near, random, pairs = (twins.name_first(table, self.rows) for table in (near, random, pairs))
        found = pairs.join(near.select("a", "b"), on=["a", "b"], how="semi")
        return self.counts | {
            "accepted": found.filter(pl.col("inliers").is_not_null() & (pl.col("class") == "copy")).height,
            "null": candidates.describe_null(random, pairs, n, len(self.rows), floor),
            "examples": candidates.choose_examples(near, random, pairs, floor),
        }

    def _embed(self, ids: pl.Series) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
        """What tells these vectors from others, and float16 (n, d) twice: upright, and mirrored if that is known."""
        if self.encoder == "local":
            return self._encode_locally(ids)
        if self.encoder == "external":
            found = vectors.read_external(Path(self.weights[0] or ""), self.reader.locate(ids)["key"].to_list())
            meta = {"encoder": "external", "weights_sha256": None, "preprocessing": None, "dimension": found.shape[1]}
            return meta, found, None
        meta = embedding.resolve(self.encoder, *self.weights).meta()
        vectors.check_same(self.out, meta)
        paths = self.reader.write_parts(
            f"embeddings-{self.encoder}",
            self.reader.locate(ids),
            embedding.embed_rows,
            *(self.encoder, *self.weights),
            gpu=True,
        )
        return meta, np.concatenate([np.load(path) for path in paths]), None

    def _find_series(self, ids: np.ndarray, upright: np.ndarray) -> np.ndarray:
        """Bool of every picture: do those around it share more features than chance has it?

        One object, frame or style in all of them: what tells them apart is then little and local, so copies must agree
        everywhere. Asked of random pairs among the pictures of each cell of similar ones, because a dataset may hold
        photographs and a product series. Pairs that share many features may be copies and are not counted, unless
        most pairs of a cell do.
        """
        from dedup import neighbours, threshold

        cell = neighbours.find_cells(upright, jobs=self.reader.workers.jobs)
        pairs = []
        for number in range(cell.max() + 1):
            members = np.random.default_rng(0).permutation(ids[cell == number])[:CHANCE_PICTURES]
            i, j = threshold.sample_pairs(len(members), CHANCE_PAIRS)
            a, b = np.minimum(members[i], members[j]), np.maximum(members[i], members[j])
            pairs.append(pl.DataFrame({"a": a, "b": b, "cell": number}, schema_overrides={"cell": pl.Int64}))
        chosen = pl.concat(pairs).with_columns(mirrored=pl.lit(None, pl.Boolean))
        inliers = self._match(chosen)["inliers"]
        few = chosen.with_columns(inliers=inliers).filter(pl.col("inliers") < geometry.MIN_EVIDENCE)
        weak = (pl.col("inliers") >= geometry.MIN_INLIERS).mean()
        share = float(few.select(weak).item() or 0)
        told = (
            chosen.group_by("cell")
            .agg(pairs=pl.len())
            .join(few.group_by("cell").agg(few=pl.len(), share=weak), on="cell", how="left")
        )
        enough = pl.col("few").fill_null(0) >= CHANCE_FEWEST
        many = (pl.col("pairs") >= CHANCE_FEWEST) & ~enough  # most pairs have much in common
        rate = pl.when(enough).then("share").when(many).then(1.0).otherwise(share if len(few) >= CHANCE_FEWEST else 0.0)
        crowded = np.isin(cell, told.filter(rate > SERIES)["cell"])
        self.counts |= {"chance_pairs": len(chosen), "chance": round(share, 4), "series": int(crowded.sum())}
        return crowded

    def _encode_locally(self, ids: pl.Series) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Vectors of the pictures and of their mirror images, float16 (n, d) each."""
        paths = self._extract(ids)
        step = -(-len(ids) // vocabulary.SAMPLE)
        sample = (evidence.open_features(paths[n // ROWS])[n % ROWS] for n in range(0, len(ids), step))
        learned = vocabulary.learn([features.unpack(record) for record in sample])
        path = self.out / "embeddings" / "local" / "vocabulary.npz"
        digest = vocabulary.save(path, learned)
        items = [(part, path, digest) for part in paths]
        encoded = np.concatenate(list(self.reader.workers.run(evidence.encode_features, items)), axis=1)
        meta = {"encoder": "local", "weights_sha256": digest, "preprocessing": vocabulary.DESCRIPTION}
        return meta | {"dimension": encoded.shape[2]}, encoded[0], encoded[1]

    def _extract(self, ids: pl.Series, each: int = ROWS) -> list[Path]:
        folder, located = f"features-{len(self.stores)}", self.reader.locate(ids)
        paths = self.reader.write_parts(folder, located, evidence.extract_features, each=each, known=self.known)
        self.stores.append((paths, each))
        self.stored[ids.to_numpy(), 0], self.stored[ids.to_numpy(), 1] = len(self.stores), np.arange(len(ids))
        return paths

    def _places(self, ids: np.ndarray) -> list[tuple[Path, int]]:
        """Where the features of these rows are: file, and number in it. Extracted now where they are not."""
        missing = np.unique(ids[self.stored[ids, 0] == 0])
        if len(missing):
            self._extract(pl.Series(missing), ITEMS)  # so few that all workers should have some
        places = []
        for store, number in self.stored[ids].tolist():
            paths, each = self.stores[store - 1]
            places.append((paths[number // each], number % each))
        return places


def _by_id(pairs: pl.DataFrame, ids: np.ndarray) -> pl.DataFrame:
    """Row numbers i, j → ids a, b."""
    numbers = pl.Series(ids)
    return pairs.with_columns(a=numbers.gather(pairs["i"]), b=numbers.gather(pairs["j"])).drop("i", "j")
