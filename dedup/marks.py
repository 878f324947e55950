"""What a person says of pairs: `decisions.json`, and how its marks overrule the search.

In: the file that the report and `unmemorize review` let their reader download, the marks that OUT remembers, the pairs
table. Out: OUT/decisions.json with all of them, and the pairs table with what they change. A mark speaks of two
pictures, known by the digest of their bytes, so it holds for every row with these bytes, in later runs and in other
orders; shard and key tell rows with equal bytes apart. Knows nothing of how pairs are found.
"""

import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from dedup import hashing, manifest, twins

NAME = "decisions.json"
VERSION = 1
VERDICTS = ("copy", "not-a-copy", "undecided")  # the last takes an earlier mark back
MAX_BYTES, MAX_TEXT = 100_000_000, 10_000  # of a file, and of a key or a note in it
SIGNAL = "decision"
FIRST = pl.col("id").min().over("picture")  # names all rows with equal bytes

type Mark = dict[str, Any]  # a, b: {sha256, shard, key}; verdict, note


class MarksError(ValueError):
    """A file of decisions that cannot be understood."""


def read_marks(path: Path) -> dict[str, Any]:
    """The content of a file of decisions, checked: version, digest, decisions, and what a review adds."""
    if path.stat().st_size > MAX_BYTES:
        raise MarksError(f"{path}: larger than {MAX_BYTES / 1e6:.0f} MB, which is no file of decisions")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MarksError(f"{path} is not JSON ({error}): download it from the report again") from error
    if not isinstance(content, dict) or not isinstance(content.get("decisions"), list):
        raise MarksError(f"{path} holds no `decisions`: is it the file that the report downloads?")
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise MarksError(f"{path} has version {reprlib.repr(content.get('version'))}, and this program reads {VERSION}")
    if not isinstance(content.get("digest"), str | None):
        raise MarksError(f"{path}: its digest is no text")
    marks = [_check_mark(mark, f"{path}, decision {n}") for n, mark in enumerate(content["decisions"], 1)]
    said: dict[tuple[str, ...], tuple[int, str]] = {}
    for n, mark in enumerate(marks, 1):
        before, verdict = said.setdefault(pair_of(mark), (n, mark["verdict"]))
        if verdict != mark["verdict"]:
            raise MarksError(f"{path}: decisions {before} and {n} contradict each other about one pair: delete one")
    return content | {"decisions": marks}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _check_mark(mark: object, where: str) -> Mark:
    if not isinstance(mark, dict):
        raise MarksError(f"{where} is no object")
    ends = {end: _check_end(mark.get(end), f"{where}, {end}") for end in "ab"}
    if ends["a"] == ends["b"]:
        raise MarksError(f"{where}: a and b are the same row")
    if mark.get("verdict") not in VERDICTS:
        raise MarksError(f"{where}: the verdict {reprlib.repr(mark.get('verdict'))} is none of {', '.join(VERDICTS)}")
    note = mark.get("note")
    if note is not None and not _is_text(note):
        raise MarksError(f"{where}: the note is no text of at most {MAX_TEXT:,} characters")
    return ends | {"verdict": mark["verdict"]} | ({"note": note} if note else {})


def _check_end(end: object, where: str) -> dict[str, Any]:
    if not isinstance(end, dict):
        raise MarksError(f"{where} is no object with sha256, shard and key")
    if not isinstance(end.get("sha256"), str) or not re.fullmatch("[0-9a-f]{64}", end["sha256"]):
        raise MarksError(f"{where}: sha256 is not 64 digits 0 … f")
    if not _is_text(end.get("key")) or not (end.get("shard") is None or _is_text(end["shard"])):
        raise MarksError(f"{where}: key is no text, or shard neither text nor null")
    return {name: end.get(name) for name in ("sha256", "shard", "key")}


def _is_text(value: object) -> bool:
    """Text that a file can hold: no half of a surrogate pair."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and not re.search("[\ud800-\udfff]", value)


def pair_of(mark: Mark) -> tuple[str, ...]:
    """What makes two marks speak of the same pair: both digests, or, where these are equal, the places of both rows."""
    first, second = sorted((mark[end]["sha256"], mark[end]["shard"] or "", mark[end]["key"]) for end in "ab")
    return first + second if first[0] == second[0] else (first[0], second[0])


def merge(marks: Iterable[Mark]) -> list[Mark]:
    """One mark a pair, the last one, in an order of their own; none where that is `undecided`."""
    last = {pair_of(mark): mark for mark in marks}
    return [last[pair] for pair in sorted(last) if last[pair]["verdict"] != "undecided"]


def digest(marks: list[Mark]) -> str:
    """Of what decides: pairs and verdicts, of a list that is merged."""
    return hashing.digest(json.dumps([[*pair_of(mark), mark["verdict"]] for mark in marks]).encode())


def remember(out: Path, marks: list[Mark], base: Path | None = None) -> list[Mark]:
    """Merge marks into those of OUT/decisions.json, write them there and return them.

    base: an earlier run, whose marks count when OUT has none of its own yet.
    """
    path = out / NAME
    before = read_marks(path)["decisions"] if path.exists() else []
    earlier = base / NAME if base is not None and not path.exists() else path
    merged = merge([*(read_marks(earlier)["decisions"] if earlier.exists() else []), *marks])
    if merged != before:
        if digest(merged) != digest(before):
            (out / "run.json").unlink(missing_ok=True)  # until it is decided anew, what stands there is of other marks
        manifest.write_json(path, {"version": VERSION, "digest": None, "decisions": merged})
    return merged


def resolve(marks: list[Mark], rows: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Merged marks → the table told (ids a < b, verdict), and for run.json how many there are.

    rows: id, picture, sha256, shard, key of all rows. a and b are the first rows in input order with the bytes that are
    spoken of, or, where these are equal, the rows themselves. Marks of pictures that are not there are counted as
    `absent`. Equal bytes are a copy without any mark.
    """
    if not marks:
        nobody = {name.replace("-", "_"): 0 for name in VERDICTS[:2]} | {"absent": 0, "digest": digest(marks)}
        return pl.DataFrame(schema={"a": pl.Int64, "b": pl.Int64, "verdict": pl.String}), nobody
    ends = ("sha256", "shard", "key")
    listed = [[mark[end][name] for end in "ab" for name in ends] + [mark["verdict"]] for mark in marks]
    names = [f"{name}_{end}" for end in "ab" for name in ends]
    table = pl.DataFrame(listed, schema=dict.fromkeys([*names, "verdict"], pl.String), orient="row")
    equal = pl.col("sha256_a") == pl.col("sha256_b")
    known = rows.filter(pl.col("sha256").is_not_null()).select(pl.col(ends).cast(pl.String), "id", first=FIRST)
    pictures = known.unique("sha256", keep="first", maintain_order=True)
    places = known.unique(ends, keep="first", maintain_order=True)
    for end in "ab":
        theirs = [f"{name}_{end}" for name in ends]
        of_picture = table.join(
            pictures, left_on=theirs[0], right_on="sha256", how="left", maintain_order="left", suffix="_of"
        )
        of_place = table.join(
            places, left_on=theirs, right_on=ends, how="left", maintain_order="left", nulls_equal=True
        )
        table = table.with_columns(
            pl.when(equal).then(of_place["id"]).otherwise(of_picture["first"]).cast(pl.Int64).alias(f"id_{end}")
        )
    there = table.filter(pl.col("id_a").is_not_null() & pl.col("id_b").is_not_null())
    told = there.filter(~equal | (pl.col("verdict") != "copy"))
    told = told.select(a=pl.min_horizontal("id_a", "id_b"), b=pl.max_horizontal("id_a", "id_b"), verdict="verdict")
    counts: dict[str, Any] = {name.replace("-", "_"): there["verdict"].eq(name).sum() for name in VERDICTS[:2]}
    return told, counts | {"absent": len(table) - len(there), "digest": digest(marks)}


def overrule(pairs: pl.DataFrame, told: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """The pairs, those that somebody marked with signal `decision` and the class of the mark; evidence stays."""
    if told.is_empty():
        return pairs
    verdict = _name(pairs, rows).join(told, on=["a", "b"], how="left", maintain_order="left")["verdict"]
    denied = (verdict == "not-a-copy") & pairs["class"].eq_missing("copy")
    return pairs.with_columns(
        pl.when(verdict == "copy").then(pl.lit("copy")).when(denied).then(pl.lit("look-alike")).otherwise("class")
        .alias("class"),
        pl.when(verdict.is_not_null()).then(pl.lit(SIGNAL)).otherwise("signal").alias("signal"),
    )  # fmt: skip


def missing(pairs: pl.DataFrame, told: pl.DataFrame, rows: pl.DataFrame, rank: pl.Series) -> pl.DataFrame:
    """The pairs that somebody calls copies and that no search found, as rows of the pairs table; upright.

    rank: keeper order. Of rows with equal bytes those are paired that stand for them (`twins.stand_in`).
    """
    if told.is_empty():
        return pairs.clear()
    found = _name(pairs, rows)
    new = told.filter(verdict="copy").join(found, on=["a", "b"], how="anti", maintain_order="left").select("a", "b")
    said = {"class": pl.lit("copy"), "signal": pl.lit(SIGNAL), "orientation": pl.lit("r0")}
    return twins.stand_in(manifest.conform(new.with_columns(**said), manifest.PAIRS_SCHEMA), rows, rank)


def _name(pairs: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """a < b of each pair as `resolve` names them."""
    first = rows.select(FIRST).to_series()
    a, b = first.gather(pairs["a"]), first.gather(pairs["b"])
    equal = a == b
    return pairs.select(
        a=pl.when(equal).then("a").otherwise(pl.min_horizontal(a, b)),
        b=pl.when(equal).then("b").otherwise(pl.max_horizontal(a, b)),
    )
