"""Candidate pairs → judged pairs and decisions: every pair that decides something is looked at, cheaply, then closely.

In: rows with their hashes, candidates of the search. Out: the pairs table, decisions, and how many pixels each row
holds. Reads pictures again through a `Reader`; knows nothing of how they were found.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import polars as pl

from dedup import clustering, copies, detail, hamming, look, manifest, marks, policy, twins, verify
from dedup.manifest import ORIENTATIONS
from dedup.reader import Reader
from dedup.signatures import Signatures

ASKED = 50_000  # pairs or pictures that are asked about at a time: what is known of each takes about 2 KB


def accept_pairs(
    rows: pl.DataFrame, candidates: pl.DataFrame, reader: Reader, *, flat: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Verify the candidates. Returns the rows with `pixel_digest` filled where it was needed, and the pairs table.

    flat: whether pictures without texture are compared by their pixels.
    """
    near = candidates.filter(pl.col("signal") != "bytes")
    hashed = verify.verify_pairs(near, reader.thumbnails(_list_distinct(near["i"], near["j"])))
    certain = {
        "class": pl.lit("copy"),
        "score": pl.lit(1.0),
        "residual": pl.lit(0.0),
        "worst_tile": pl.lit(0.0),
    }
    equal_bytes = candidates.filter(pl.col("signal") == "bytes").with_columns(**certain)
    identical = hashed.filter((pl.col("hamming") == 0) & (pl.col("residual") == 0) & (pl.col("orientation") == 0))
    flat_rows = _flat_rows(rows, reader.signatures) if flat else pl.Series([], dtype=pl.Int64)
    wanted = _list_distinct(identical["i"], identical["j"], flat_rows)
    digests = _ask(look.digest_pixels, wanted, reader)
    digest = pl.DataFrame({"id": wanted, "pixel_digest": pl.Series(digests, dtype=pl.String)})
    of_pixels = rows.select("id").join(digest, on="id", how="left", maintain_order="left")["pixel_digest"]
    rows = rows.with_columns(of_pixels)
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


def _list_distinct(*ids: pl.Series) -> pl.Series:
    return pl.concat(ids).unique().sort()


def _flat_rows(rows: pl.DataFrame, signatures: Signatures) -> pl.Series:
    """Pictures without texture have no perceptual hash worth the name. Those of equal size and hash may be equal."""
    is_flat = (pl.col("status") == "ok") & (pl.col("pdq_quality") < verify.MIN_QUALITY)
    flat = rows.select("id", "status", "width", "height", "pdq_quality").filter(is_flat)
    hashes = ("phash", "dhash", "pdq")
    flat = flat.hstack(signatures.take(flat["id"], hashes))
    return flat.filter(pl.len().over("width", "height", *hashes) > 1)["id"]


def _flat_pairs(rows: pl.DataFrame) -> pl.DataFrame:
    """Flat pictures with equal pixels: each pairs with the first of them in keeper order."""
    flat = rows.select("id", "rank", "pdq_quality", "pixel_digest")
    flat = flat.filter((pl.col("pdq_quality") < verify.MIN_QUALITY) & pl.col("pixel_digest").is_not_null()).sort("rank")
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
        manifest.conform(table, manifest.PAIRS_SCHEMA)
        .unique(["a", "b"], keep="first", maintain_order=True)
        .sort("a", "b")
    )


def settle(
    rows: pl.DataFrame,
    pairs: pl.DataFrame,
    reader: Reader,
    *,
    flips: str,
    rotations: str,
    prefer: Sequence[str] = (),
    told: pl.DataFrame,
    search: copies.CopySearch | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame, pl.Series, pl.Series]:
    """Pairs, decisions, effective pixels and rank, such that every pair that decides something was looked at up close.

    Decisions name the pairs that matter, those are compared again (copies that do not hold become look-alikes, copies
    of other sizes are measured), and what that changes is decided anew, until nothing changes. Then `search` may add
    pairs, and all begins again. Of its pairs those count that join two clusters or decide something; what they imply
    is left out. rows: with their rank, scope and whether they are guarded. told: of `marks.resolve`, what persons said
    of pairs: nobody looks at those again. Copies that only a person knows of come last, so that they change nothing of
    the search.
    """
    pairs, open_marks = marks.overrule(pairs, told, rows), True
    held, rank = detail.effective_pixels(rows, detail.size_pairs(rows, pairs.clear()), {}), rows["rank"]
    confirmed = np.zeros(len(pairs), bool)
    spectra: dict[int, np.ndarray] = {}
    while True:
        among = {name: rows[name] for name in ("published", "scope", "guarded")}
        decisions = clustering.decide(pairs, rank, flips=flips, rotations=rotations, **among)
        deciding = decisions["pair"].drop_nulls().unique().sort().to_numpy()
        doubted = deciding[~confirmed[deciding] & (pairs["signal"].gather(deciding) == "pdq").to_numpy()]
        if len(doubted):
            confirmed[doubted] = True
            refuted = doubted[~np.array(_confirm(pairs[doubted], reader))]
            wrong = pl.int_range(pl.len()).is_in(refuted)
            pairs = pairs.with_columns(pl.when(wrong).then(pl.lit("look-alike")).otherwise("class").alias("class"))
            if len(refuted):
                continue
        claimed = deciding[~confirmed[deciding] & (pairs["signal"].gather(deciding) == "copy").to_numpy()]
        confirmed[deciding] = True
        if search is not None and len(claimed):
            pairs = _replace(pairs, claimed, search.confirm(pairs[claimed]))
            continue
        whole = pairs["hamming"].is_not_null() | (pairs["signal"] == "bytes")  # a part of a picture holds less
        whole &= pl.Series(confirmed)
        sized = detail.size_pairs(rows, pairs.filter(whole))
        wanted = rows.select("id", "picture")[_list_distinct(sized["larger"], sized["smaller"])]
        known = pl.Series(list(spectra), dtype=wanted["picture"].dtype)
        spectra |= _measure(wanted.filter(~pl.col("picture").is_in(known.implode())), reader)
        held = detail.effective_pixels(rows, sized, spectra)
        before, rank = rank, policy.keeper_rank(rows, held, policy.count_partners(pairs, len(rows), prefer), prefer)
        if not rank.equals(before):
            continue
        more = pairs.clear() if search is None else marks.overrule(search.find(pairs, decisions, rank), told, rows)
        if open_marks:
            more = pl.concat([more, marks.missing(pl.concat([pairs, more]), told, rows, rank)])
            open_marks = False
        if len(more):
            pairs, confirmed = pl.concat([pairs, more]), np.append(confirmed, np.zeros(len(more), bool))
            rank = policy.keeper_rank(rows, held, policy.count_partners(pairs, len(rows), prefer), prefer)
            continue
        if search is not None:
            links = _links(pairs, confirmed, len(rows))
            if len(links):
                confirmed[links] = True
                pairs = _replace(pairs, links, search.confirm(pairs[links]))
                continue
            pairs, decisions = _leave_out(pairs, decisions, confirmed)
        return pairs, decisions, held, rank


def _confirm(pairs: pl.DataFrame, reader: Reader) -> list[bool]:
    """Whether these pairs hold up close."""
    holds: list[bool] = []
    ids = _list_distinct(pairs["a"], pairs["b"])
    located = reader.locate(ids)  # once, because any of them may be in any file
    for part in pairs.select("a", "b", "orientation").iter_slices(ASKED):
        a, b = (located[ids.search_sorted(part[end])].rows() for end in "ab")
        closely = list(zip(a, b, map(ORIENTATIONS.index, part["orientation"]), strict=True))
        keys = [(a[-1], b[-1], orientation) for a, b, orientation in closely]
        holds += reader.ask(look.confirm_pairs, keys, partial(_pick, closely))
    return holds


def _measure(rows: pl.DataFrame, reader: Reader) -> dict[int, np.ndarray]:
    """Power spectra of rows, id and picture, by picture."""
    rows = rows.unique("picture", keep="first", maintain_order=True)
    spectra = map(look.read_spectrum, _ask(look.measure_detail, rows["id"], reader))
    return dict(zip(rows["picture"], spectra, strict=True))


def _ask(function: Callable[..., list], ids: pl.Series, reader: Reader) -> list:
    """What the function says of each of these rows, by the digest of its bytes."""
    told: list = []
    for part in reader.locate(ids).iter_slices(ASKED):
        told += reader.ask(function, part["sha256"].to_list(), partial(_pick, part.rows()))
    return told


def _pick(items: list, numbers: list[int]) -> list:
    return [items[number] for number in numbers]


def _links(pairs: pl.DataFrame, confirmed: np.ndarray, n: int) -> np.ndarray:
    """Numbers of pairs of the copy search that would join two components: the best one for each two."""
    found = (pairs["signal"] == "copy") & pairs["class"].eq_missing("copy")
    known = pairs.filter((pl.Series(confirmed) | (pairs["signal"] != "copy")) & pairs["class"].eq_missing("copy"))
    component = pl.Series(clustering.components(known, n))
    open_ = pairs.with_row_index("pair").filter(found & ~pl.Series(confirmed)).select("pair", "a", "b", "inliers")
    a, b = component.gather(open_["a"]), component.gather(open_["b"])
    apart = open_.with_columns(low=pl.min_horizontal(a, b), high=pl.max_horizontal(a, b)).filter(a != b)
    best = apart.sort(-pl.col("inliers"), "pair").unique(["low", "high"], keep="first", maintain_order=True)
    return best["pair"].sort().to_numpy()


def _replace(pairs: pl.DataFrame, numbers: np.ndarray, rows: pl.DataFrame) -> pl.DataFrame:
    """The table with these rows instead of those of these numbers."""
    order = np.arange(len(pairs))
    order[numbers] = len(pairs) + np.arange(len(numbers))
    return pl.concat([pairs, rows])[order]


def _leave_out(
    pairs: pl.DataFrame, decisions: pl.DataFrame, confirmed: np.ndarray
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Without the pairs of the copy search that are implied (nobody looked at them) or refuted (no class)."""
    stays = pairs["class"].is_not_null() & (pl.Series(confirmed) | (pairs["signal"] != "copy"))
    number = stays.cast(pl.Int64).cum_sum() - 1
    chosen = number.gather(decisions["pair"]).cast(decisions["pair"].dtype)
    return pairs.filter(stays), decisions.with_columns(pair=chosen)


def share_fate(
    rows: pl.DataFrame, pairs: pl.DataFrame, decisions: pl.DataFrame, rank: pl.Series
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Pairs and decisions, such that rows with the bytes of a dropped row of their scope go where that one went."""
    scope = rows["scope"]
    equal = pairs.filter((pl.col("signal") == "bytes") & (scope.gather(pairs["a"]) == scope.gather(pairs["b"])))
    a_first = rank.gather(equal["a"]) < rank.gather(equal["b"])
    first = pl.select(pl.when(a_first).then(equal["a"]).otherwise(equal["b"])).to_series()
    other = pl.select(pl.when(a_first).then(equal["b"]).otherwise(equal["a"])).to_series()
    gone = decisions["kept_id"].gather(first).is_not_null()
    first, other = first.filter(gone), other.filter(gone)
    fate = decisions[first]
    evidence, kept_id = pairs[fate["pair"]], fate["kept_id"]
    x, y = (pl.select(pl.when(evidence[end] == first).then(other).otherwise(kept_id)).to_series() for end in "ab")
    shared = twins.turn_pairs(evidence, rows, x, y)
    numbers = pl.select(pl.int_range(len(pairs), len(pairs) + len(shared), dtype=pl.Int64)).to_series()
    fate = fate.with_columns(id=other, pair=numbers.cast(fate["pair"].dtype))
    decisions = decisions.with_row_index("id").with_columns(pl.col("id").cast(pl.Int64)).update(fate, on="id")
    return pl.concat([pairs, shared]), decisions.drop("id")
