"""Whose picture a row is: the person as a keyed hash, and what that changes.

A hash without a key would be no protection: the few digits of a patient's number are soon tried out. So it is
HMAC-SHA256 with a key that no result holds: a file that the user gives (the same key gives the same hashes, so that two
runs can be compared), or 32 random bytes in `OUT/.work`, made once. Without the key nobody can ask which rows are of
whom; which rows are of one person stands in the manifest.

In: what a column or a header says; a finished manifest. Out: the column `subject`; counts.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup.manifest import read_json, write_json

KEY = "subject.key"
RECORD = "subject.json"  # which key it was, for the next run
MIN_KEY = 16  # bytes
CAUTION = (
    "diffusion models give back pictures that they were trained on, and should not be trained on privacy-sensitive "
    "images without protection; removing duplicates is not enough (Carlini et al. 2023, Extracting Training Data from "
    "Diffusion Models)"
)


class SubjectError(ValueError):
    """Pictures of persons that nobody has said yes to, or a key that cannot be used."""


def refuse(src: Path, what: str) -> SubjectError:
    return SubjectError(f"{src} holds {what}: {CAUTION}: go on with --i-understand")


def choose_key(work: Path, given: Path | None, base: Path | None = None) -> Path:
    """The file with the key: the user's, or the run's own, which is that of its base. Raises SubjectError or OSError.

    work: of the run, base: of the one that it starts from. A run with a key of the user's goes on with that one only;
    for one that has lost its own there is a new one.
    """
    path, record = given or work / KEY, work / RECORD
    if given is None and not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        known = base is not None and (base / KEY).exists()
        _write_secret(path, (base / KEY).read_bytes() if base and known else secrets.token_bytes(32))
    if not path.is_file():
        raise SubjectError(f"--subject-key {path}: no such file: head -c 32 /dev/urandom > {path}")
    if path.stat().st_size < MIN_KEY:
        raise SubjectError(f"{path}: a key needs {MIN_KEY} bytes: head -c 32 /dev/urandom > {path}")
    now = {"given": given is not None, "check": check_key(path)}
    before = read_json(record) if record.exists() else now
    if before != now and (before["given"] or now["given"]):
        raise SubjectError(
            f"{work.parent} was made with another --subject-key: give that one, choose another -o or delete it"
        )
    write_json(record, now)
    return path


def check_key(key: Path) -> str:
    """What tells two keys apart, and says nothing of either: nobody is named by an empty text."""
    return hash_subject(key, "")


def _write_secret(path: Path, data: bytes) -> None:
    """At no time may others read it, nor is there half of it."""
    temporary = path.with_name(f".{path.name}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123
        file.write(data)
    temporary.replace(path)


def hash_subject(key: Path, text: str) -> str:
    """32 hex digits of HMAC-SHA256, the first half of it. key: the file that holds it."""
    return hmac.new(key.read_bytes(), text.encode(), hashlib.sha256).hexdigest()[:32]


def link_rows(persons: pl.Series) -> pl.DataFrame:
    """Each row with the first one of its person, as pairs a, b: what one person has is one component."""
    known = pl.DataFrame({"b": pl.int_range(len(persons), eager=True), "person": persons}).drop_nulls("person")
    return known.select(pl.col("b").first().over("person").alias("a"), "b")


def count(table: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, Any]:
    """How the rows of `outputs.decide` divide among persons. `copies_across`: pairs of copies that two persons have."""
    each = table.drop_nulls("person").group_by("person").agg(rows=pl.len(), kept=pl.col("keep").sum())
    copies = pairs.filter(pl.col("class") == "copy")
    a, b = (table["person"].gather(copies[end]) for end in ("a", "b"))
    return {
        "subjects": len(each),
        "rows": int(each["rows"].sum()),
        "kept": int(each["kept"].sum()),
        "without_kept_rows": int((each["kept"] == 0).sum()),
        "rows_per_subject": dict(zip(("median", "most"), _summarise(each["rows"]), strict=True)),
        "kept_per_subject": dict(zip(("median", "most"), _summarise(each["kept"]), strict=True)),
        "copies_across": int((a != b).sum()),
    }


def _summarise(counts: pl.Series) -> tuple[float, int]:
    return float(np.median(counts)), int(counts.to_numpy().max())
