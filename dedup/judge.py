"""Candidate pairs → judged pairs and decisions: every pair that decides something is looked at, cheaply, then closely.

In: rows with their hashes, candidates of the search. Out: the pairs table, decisions, and how many pixels each row
holds. Reads pictures again through a `Reader`; knows nothing of how they were found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from dedup import clustering, detail, engine, hamming, hashing, look, manifest, policy, verify
from dedup.fingerprint import DecodeOptions
from dedup.manifest import ORIENTATIONS

ROWS = 64  # of a file of thumbnails
ITEMS = 16  # rows or pairs of another task: these take milliseconds each, and all workers should have some


@dataclass(frozen=True, slots=True)
class Reader:
    """What the second reading of rows needs: where they are, how they are decoded, and who does it."""

    src: Path
    work: Path
    decode: DecodeOptions
    workers: engine.Workers

    def run[T](self, function: Callable[..., list[T]], items: list) -> list[T]:
        """`function(src, part, options)` over parts of the items; the results of all."""
        parts = [items[start : start + ITEMS] for start in range(0, len(items), ITEMS)]
        results = self.workers.run(function, [(self.src, part, self.decode) for part in parts])
        return [result for part in results for result in part]

    def thumbnails(self, rows: pl.DataFrame) -> look.Thumbnails:
        """Of the given rows; each file is named by what is in it, so a second run makes none anew."""
        folder = self.work / "thumbnails"
        parts = list(rows.select(look.LOCATION).iter_slices(ROWS))
        names = [hashing.digest("".join(part["sha256"]).encode())[:20] for part in parts]
        paths = [folder / f"{name}.npy" for name in names]
        tasks = [(self.src, part.rows(), path, self.decode) for part, path in zip(parts, paths, strict=True)]
        list(self.workers.run(look.make_thumbnails, tasks))
        for stale in set(folder.glob("*.npy")) - set(paths):
            stale.unlink()
        return look.Thumbnails(rows["id"].to_numpy(), paths, ROWS)


def accept_pairs(
    rows: pl.DataFrame, candidates: pl.DataFrame, reader: Reader, *, flat: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Verify the candidates. Returns the rows with `pixel_digest` filled where it was needed, and the pairs table.

    flat: whether pictures without texture are compared by their pixels.
    """
    near = candidates.filter(pl.col("signal") != "bytes")
    paired = rows[pl.concat([near["i"], near["j"]]).unique().sort().to_list()]
    hashed = verify.verify_pairs(near, reader.thumbnails(paired))
    certain = {
        "class": pl.lit("copy"),
        "score": pl.lit(1.0),
        "residual": pl.lit(0.0),
        "worst_tile": pl.lit(0.0),
    }
    equal_bytes = candidates.filter(pl.col("signal") == "bytes").with_columns(**certain)
    identical = hashed.filter((pl.col("hamming") == 0) & (pl.col("residual") == 0) & (pl.col("orientation") == 0))
    flat_rows = _flat_rows(rows) if flat else pl.Series([], dtype=pl.Int64)
    wanted = rows[pl.concat([identical["i"], identical["j"], flat_rows]).unique().sort().to_list()]
    digests = reader.run(look.digest_pixels, wanted.select(look.LOCATION).rows())
    digest = pl.DataFrame({"id": wanted["id"], "pixel_digest": pl.Series(digests, dtype=pl.String)})
    rows = rows.join(digest, on="id", how="left", maintain_order="left")
    of_pixels = rows["pixel_digest"]
    hashed = hashed.with_columns(
        signal=pl.when(of_pixels.gather(hashed["i"]) == of_pixels.gather(hashed["j"]))
        .then(pl.lit("pixels"))
        .otherwise("signal")
    )
    flat_pairs = _flat_pairs(rows).with_columns(**certain)
    pairs = pl.concat([equal_bytes, hashed, flat_pairs], how="diagonal_relaxed").unique(
        ["i", "j"], keep="first", maintain_order=True
    )
    return rows, _by_id(pairs)


def _flat_rows(rows: pl.DataFrame) -> pl.Series:
    """Pictures without texture have no perceptual hash worth the name. Those of equal size and hash may be equal."""
    flat = rows.filter((pl.col("status") == "ok") & (pl.col("pdq_quality") < verify.MIN_QUALITY))
    alike = ["width", "height", "phash", "dhash", "pdq"]
    return flat.filter(pl.len().over(alike) > 1)["id"]


def _flat_pairs(rows: pl.DataFrame) -> pl.DataFrame:
    """Flat pictures with equal pixels: each pairs with the first of them in keeper order."""
    flat = rows.filter((pl.col("pdq_quality") < verify.MIN_QUALITY) & pl.col("pixel_digest").is_not_null()).sort("rank")
    first = flat.group_by("pixel_digest", maintain_order=True).agg(i=pl.col("id").first())
    pairs = flat.join(first, on="pixel_digest").filter(pl.col("id") != pl.col("i")).select("i", j="id")
    return pairs.with_columns(orientation=pl.lit(0, pl.Int32), hamming=pl.lit(0, pl.Int32), signal=pl.lit("pixels"))


def _by_id(pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs in keeper order (i, j; orientation turns j into i) → PAIRS_SCHEMA: a < b, orientation turns a into b."""
    names = pl.Series(ORIENTATIONS)
    forward = names.gather(pl.Series(hamming.INVERSE).gather(pairs["orientation"]))
    backward = names.gather(pairs["orientation"])
    table = pairs.with_columns(
        a=pl.min_horizontal("i", "j"),
        b=pl.max_horizontal("i", "j"),
        orientation=pl.when(pl.col("i") < pl.col("j")).then(forward).otherwise(backward),
    )
    return (
        table.select(pl.col(c).cast(t) for c, t in manifest.PAIRS_SCHEMA.items())
        .unique(["a", "b"], keep="first", maintain_order=True)
        .sort("a", "b")
    )


def settle(
    rows: pl.DataFrame, pairs: pl.DataFrame, reader: Reader, *, flips: str, rotations: str
) -> tuple[pl.DataFrame, pl.DataFrame, pl.Series]:
    """Pairs, decisions and effective pixels, such that every pair that decides something was looked at up close.

    Decisions name the pairs that matter, those are compared again (copies that do not hold become look-alikes, copies
    of other sizes are measured), and what that changes is decided anew, until nothing changes.
    """
    location = rows.select(look.LOCATION).rows()
    held, rank = detail.effective_pixels(rows, detail.size_pairs(rows, pairs.clear()), {}), rows["rank"]
    confirmed = np.zeros(len(pairs), bool)
    spectra: dict[str, np.ndarray] = {}
    while True:
        decisions = clustering.decide(pairs, rank, flips=flips, rotations=rotations)
        deciding = decisions["pair"].drop_nulls().unique().sort().to_numpy()
        doubted = deciding[~confirmed[deciding] & (pairs["signal"].gather(deciding) == "pdq").to_numpy()]
        confirmed[deciding] = True
        if len(doubted):
            columns = pairs[doubted].select("a", "b", "orientation").iter_rows()
            closely = [(location[a], location[b], ORIENTATIONS.index(orientation)) for a, b, orientation in columns]
            refuted = doubted[~np.array(reader.run(look.confirm_pairs, closely))]
            wrong = pl.int_range(pl.len()).is_in(refuted)
            pairs = pairs.with_columns(pl.when(wrong).then(pl.lit("look-alike")).otherwise("class").alias("class"))
            if len(refuted):
                continue
        sized = detail.size_pairs(rows, pairs.filter(pl.Series(confirmed)))
        wanted = {location[row][-1]: location[row] for row in pl.concat([sized["larger"], sized["smaller"]])}
        missing = sorted(sha256 for sha256 in wanted if sha256 not in spectra)
        spectra |= zip(missing, reader.run(look.measure_detail, [wanted[sha256] for sha256 in missing]), strict=True)
        before, held = held, detail.effective_pixels(rows, sized, spectra)
        if held.equals(before):
            return *share_fate(pairs, decisions, rank), held
        rank = policy.keeper_rank(rows, held)


def share_fate(pairs: pl.DataFrame, decisions: pl.DataFrame, rank: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs and decisions, such that rows with the bytes of a dropped row go where that one went, on its evidence."""
    equal = pairs.filter(pl.col("signal") == "bytes")
    a_first = rank.gather(equal["a"]) < rank.gather(equal["b"])
    first = pl.select(pl.when(a_first).then(equal["a"]).otherwise(equal["b"])).to_series()
    other = pl.select(pl.when(a_first).then(equal["b"]).otherwise(equal["a"])).to_series()
    gone = decisions["kept_id"].gather(first).is_not_null()
    first, other = first.filter(gone), other.filter(gone)
    fate = decisions[first.to_list()]
    inverse = {name: clustering.inverse_orientation(name) for name in ORIENTATIONS}
    turns = (first < fate["kept_id"]) == (other < fate["kept_id"])
    shared = pairs[fate["pair"].to_list()].with_columns(
        pl.when(turns).then("orientation").otherwise(pl.col("orientation").replace(inverse)).alias("orientation"),
        a=pl.min_horizontal(fate["kept_id"], other),
        b=pl.max_horizontal(fate["kept_id"], other),
    )
    numbers = pl.select(pl.int_range(len(pairs), len(pairs) + len(shared), dtype=pl.Int64)).to_series()
    fate = fate.with_columns(id=other, pair=numbers.cast(fate["pair"].dtype))
    decisions = decisions.with_row_index("id").with_columns(pl.col("id").cast(pl.Int64)).update(fate, on="id")
    return pl.concat([pairs, shared]), decisions.drop("id")
