"""A finished run → what a run over the grown dataset takes over from it: signatures, features, and its survivors.

In: BASE, an OUT that is only read, and the rows of the grown dataset. Out: signature files of shards that need not be
read, signatures by the digest of the bytes, places of features, and which rows BASE has published. A row of BASE is
known again by its bytes: at its place, else by its key, else anywhere. Knows nothing of how anything is decided.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dedup import fingerprint, hashing, manifest, sources
from dedup.reader import ROWS

# Options that decide signatures, or what is found by them: they must be those of BASE.
DECISIVE = ("level", "encoder", "weights", "weights_sha256", "hash_decode", "max_pixels", "max_frames")
COLUMNS = ["id", "shard", "key", "keep", *fingerprint.OF_BYTES]


class BaseError(ValueError):
    """A BASE that cannot be used: what, and how to mend it, in one line."""


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A finished run that another one starts from."""

    out: Path
    src: Path
    digest: str  # of its run.json
    rows: pl.DataFrame  # COLUMNS
    same_versions: bool  # of the libraries: else it is hashed anew, and only its survivors count


def load(out: Path, options: dict[str, Any], defaults: dict[str, Any], versions: dict[str, str]) -> Base:
    """Read BASE for a run with these options. Raises BaseError or ManifestError.

    defaults: of options that an older run did not record.
    """
    run = manifest.read_run(out)
    recorded = defaults | run["options"]
    differing = [name for name in DECISIVE if recorded[name] != options[name]]
    if differing:
        what = ", ".join(f"{name} was {recorded[name]!r}, not {options[name]!r}" for name in differing)
        raise BaseError(f"{out} cannot be the base, it was made with other options ({what}): give those, or no --base")
    digest = hashing.digest((out / "run.json").read_bytes())
    return Base(out, Path(run["src"]), digest, manifest.read(out, COLUMNS), run["versions"] == versions)


def take_over(base: Base, shards: list[sources.Shard], stamps: list[str], signatures: Path) -> Path | None:
    """Write the signatures of shards that BASE has seen as they are; returns a file for `fingerprint_shard`.

    stamps: of the shards, as the pipeline records them. None when other libraries made BASE's signatures.
    """
    if not base.same_versions:
        return None
    recorded = base.out / ".work" / "shards.json"
    seen = {stamp: number for number, stamp in enumerate(manifest.read_json(recorded) if recorded.exists() else [])}
    root = str(sources.find_root(base.src))
    for number, (shard, stamp) in enumerate(zip(shards, stamps, strict=True)):
        theirs = base.out / ".work" / "signatures" / f"{seen.get(stamp, -1):05d}.parquet"
        ours = signatures / f"{number:05d}.parquet"
        if stamp not in seen or ours.exists() or not theirs.exists():
            continue
        rows = pl.read_parquet(theirs)
        if root != shard.root:  # where a shard lies is told in two places
            if rows["error"].str.contains(root, literal=True).any():
                continue
            source = [fingerprint.locate(shard, key)["source"] for key in rows["key"]]
            rows = rows.with_columns(source=pl.Series(source, dtype=pl.String))
        manifest.write_atomic(ours, rows.write_parquet)
    known = signatures.parent / f"base-{base.digest[:20]}.arrow"
    for stale in set(known.parent.glob("base-*.arrow")) - {known}:
        stale.unlink()
    if not known.exists():
        fingerprint.write_known(known, base.rows)
    return known


def find_published(base: Base, rows: pl.DataFrame) -> pl.Series:
    """bool of each row: is it one that BASE kept? With its bytes at its place, else by its key, else anywhere.

    rows: with key and sha256. Each row of BASE is at most one: of equal files as many are published as BASE kept.
    """
    theirs = base.rows.filter("keep").select("shard", "key", "sha256")
    ours = rows.select("id", pl.col("shard").cast(pl.String), "key", "sha256")
    found: list[pl.Series] = []
    for same in (["shard", "key", "sha256"], ["key", "sha256"], ["sha256"]):
        number = pl.int_range(pl.len()).over(same)
        theirs, ours = (table.with_columns(number=number) for table in (theirs, ours))
        on = {"on": [*same, "number"], "nulls_equal": True, "maintain_order": "left"}
        found.append(ours.join(theirs, how="semi", **on)["id"])  # type: ignore[arg-type]
        ours, theirs = ours.join(theirs, how="anti", **on), theirs.join(ours, how="anti", **on)  # type: ignore[arg-type]
    return rows["id"].is_in(pl.concat(found).implode()).alias("published")


def describe(base: Base, rows: pl.DataFrame) -> dict[str, Any]:
    """For run.json. rows: sha256 and published of the grown dataset.

    known: rows with bytes that BASE has seen; gone: pictures of BASE that SRC no longer holds, of them kept ones.
    """
    now = rows.group_by("sha256").agg(now=pl.len().cast(pl.Int64))
    before = base.rows.drop_nulls("sha256").group_by("sha256").agg(before=pl.len().cast(pl.Int64))
    missing = before.join(now, on="sha256", how="left").select(
        (pl.col("before") - pl.col("now").fill_null(0)).clip(0).sum()
    )
    return {
        "out": str(base.out),
        "run_sha256": base.digest,
        "rows": len(base.rows),
        "known": rows.join(before, on="sha256", how="semi").height,
        "hashed_again": not base.same_versions,
        "published": int(rows["published"].sum()),
        "gone": int(missing.item()),
        "kept_gone": int(base.rows["keep"].sum()) - int(rows["published"].sum()),
    }


def list_verdicts(base: Base | None) -> list[Path]:
    """Folders of what was said of pairs before (`verdicts.py`)."""
    return [base.out / ".work" / "verdicts"] if base is not None and base.same_versions else []


def find_features(base: Base) -> dict[str, tuple[Path, int]]:
    """sha256 → file and number of the local features that BASE has left (`Reader.write_parts`), as far as it has."""
    listed = base.out / "embeddings" / "local" / "rows.parquet"
    if not base.same_versions or not listed.exists():
        return {}
    sha256 = base.rows["sha256"].gather(pl.read_parquet(listed, columns=["id"])["id"])
    places: dict[str, tuple[Path, int]] = {}
    for start in range(0, len(sha256), ROWS):
        part = sha256[start : start + ROWS]
        path = base.out / ".work" / "features-0" / f"{hashing.digest(''.join(part).encode())[:20]}.npy"
        if path.exists():
            places |= {digest: (path, number) for number, digest in enumerate(part)}
    return places
