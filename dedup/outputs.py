"""Decisions → the finished manifest, and every file of OUT but the report.

In: rows, pairs and decisions of a run; what no decision reads is taken from the signatures as it is written. The files
are described in docs/architecture.md.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import clustering, images, manifest, policy, sources, subjects
from dedup.manifest import PLACE
from dedup.options import Options, list_versions, record_options
from dedup.signatures import LATER, Signatures

DECIDED: manifest.Schema = {
    name: pl.Categorical() if name in manifest.FEW else kind
    for name, kind in manifest.SCHEMA.items()
    if name not in LATER
} | {"caption_hash": pl.UInt64, "person": pl.UInt32}
READY = ["id", "source", "shard", "offset", "size", "key", "caption", "captions", "represents", "weight"]


def is_medical(rows: pl.DataFrame) -> bool:
    return bool((rows["format"] == images.DICOM).any())


def decide(rows: pl.DataFrame, pairs: pl.DataFrame, decisions: pl.DataFrame, signatures: Signatures) -> pl.DataFrame:
    """Rows, pairs and decisions → the finished manifest, columns DECIDED; `captions` as by `policy.merge_captions`."""
    evidence = _evidence(pairs, decisions)
    joined = pl.concat([pairs.select("a", "b"), subjects.link_rows(rows["person"])])
    outside = rows["guarded"].gather(decisions["kept_id"]).fill_null(False)  # dropped for a split that is not theirs
    stars = decisions["cluster_id"].to_numpy()
    stood_for = np.bincount(decisions["kept_id"].drop_nulls().to_numpy(), minlength=len(rows))
    table = pl.concat([rows, decisions, evidence], how="horizontal").with_columns(
        keep=pl.col("keep") & (pl.col("status") == "ok"),
        component_id=pl.Series(clustering.components(joined, len(rows))),
        cluster_size=pl.Series(np.bincount(stars)[stars]),
        reason=pl.when(outside)
        .then(pl.lit("policy"))
        .when(pl.col("kept_id").is_not_null())
        .then(pl.col("signal").replace("pdq", "hash")),
    )
    table = table.with_columns(
        represents=pl.when("keep").then(1 + pl.Series(stood_for)).otherwise(0),
        weight=pl.col("keep").cast(pl.Float64),
    )
    own = table.with_columns(kept_id=pl.when(~outside).then("kept_id"))
    return manifest.conform(table.with_columns(captions=policy.merge_captions(own, signatures.read_captions)), DECIDED)


def _evidence(pairs: pl.DataFrame, decisions: pl.DataFrame) -> pl.DataFrame:
    """class, signal, score, orientation of the deciding pair of each row, else of its strongest one."""
    columns = ["class", "signal", "score", "orientation"]
    numbered = manifest.compact(pairs).with_row_index("pair").with_columns(pl.col("pair").cast(pl.Int64))
    ends = pl.concat([numbered.rename({end: "id"}).select("id", "pair", *columns) for end in ("a", "b")])
    strongest = ends.sort(pl.col("class") != "copy", -pl.col("score"), "pair").unique(
        "id", keep="first", maintain_order=True
    )
    ids = decisions.select(id=pl.int_range(pl.len(), dtype=pl.Int64), pair=pl.col("pair").cast(pl.Int64))
    best = ids.join(strongest.select("id", best="pair"), on="id", how="left", maintain_order="left")
    chosen = best.select("id", pair=pl.coalesce("pair", "best"))
    return chosen.join(numbered.select("pair", *columns), on="pair", how="left", maintain_order="left").select(columns)


def write(
    out: Path,
    src: Path,
    origin: str,
    shards: list[sources.Shard],
    signatures: Signatures,
    table: pl.DataFrame,
    pairs: pl.DataFrame,
    leaks: pl.DataFrame,
    options: Options,
    counts: dict[str, Any],
    about: dict[str, Any],
) -> dict:
    """Every file of the contract but the report; `run.json` last, because its existence means finished.

    about: what else `run.json` tells.
    """
    manifest.write(out, table, partial(_complete, signatures))
    manifest.write_parquet(out / "pairs.parquet", pairs)
    manifest.write_parquet(out / "deduplicated.parquet", _list_ready(out))
    manifest.write_atomic(out / "deduplicated.jsonl", lambda path: _write_lines(path, out))
    evidence = table[leaks["id"]].select("signal", "score", "orientation", row=_name(signatures, leaks["id"]))
    leaking = leaks.rename({"cluster_id": "picture"}).drop("id").hstack(evidence)
    if leaking.is_empty():
        (out / "leakage.csv").unlink(missing_ok=True)
    else:
        manifest.write_atomic(out / "leakage.csv", leaking.write_csv)
    manifest.write_atomic(out / "kept.txt", lambda path: _write_kept(path, out))
    kept = table.select(pl.col("kept_id").drop_nulls().unique())
    kept = kept.with_columns(kept=_name(signatures, kept["kept_id"]))
    manifest.write_atomic(out / "dropped.csv", lambda path: _write_dropped(path, out, kept))
    if (src / "plant.parquet").exists():
        shutil.copyfile(src / "plant.parquet", out / "plant.parquet")
    run: dict[str, Any] = {"src": str(src), "origin": origin}
    run |= {"options": record_options(options), "versions": list_versions()}
    layouts = [asdict(layout) for layout in dict.fromkeys(shard.layout for shard in shards)]
    run |= {"layouts": layouts, "source": [shard.fingerprint for shard in shards], "shard_rows": signatures.sizes}
    medical = options.layout.subject_column is not None or is_medical(table)
    run |= about | {"medical": medical, "counts": counts}
    manifest.write_json(out / "run.json", run)
    return run


def _complete(signatures: Signatures, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of `decide` → the same as the manifest has them."""
    return manifest.conform(rows.hstack(signatures.take(rows["id"])).with_columns(policy.tell_captions()))


def _name(signatures: Signatures, ids: pl.Series) -> pl.Series:
    """PLACE of these rows."""
    return signatures.take(ids, ("shard", "key")).select(PLACE).to_series()


# The lists are made of the files of the manifest, one by one: their text would be most of what is in memory.


def _list_ready(out: Path) -> Iterator[pl.DataFrame]:
    """The rows that are kept, with what a training needs."""
    for rows in manifest.read_parts(out, [*READY, "keep"]):
        yield rows.filter("keep").select(READY)


def _write_lines(path: Path, out: Path) -> None:
    """The same as JSON."""
    with path.open("wb") as file:
        for rows in _list_ready(out):
            rows.write_ndjson(file)


def _write_kept(path: Path, out: Path) -> None:
    """PLACE of each row that is kept, a line each."""
    with path.open("wb") as file:
        for rows in manifest.read_parts(out, ["shard", "key", "keep"]):
            rows.filter("keep").select(PLACE).write_csv(file, include_header=False, quote_style="never")


def _write_dropped(path: Path, out: Path, kept: pl.DataFrame) -> None:
    """Each row that was dropped, beside the one that is kept for it. kept: kept_id and its PLACE."""
    evidence = ["reason", "signal", "score", "orientation"]
    columns = ["shard", "key", "status", "keep", "kept_id", *evidence]
    with path.open("wb") as file:
        for number, rows in enumerate(manifest.read_parts(out, columns)):
            gone = rows.filter((pl.col("status") == "ok") & ~pl.col("keep"))
            named = gone.join(kept, on="kept_id", how="left", maintain_order="left")
            named.select(PLACE.alias("dropped"), "kept", *evidence).write_csv(file, include_header=not number)


def count(table: pl.DataFrame, pairs: pl.DataFrame, signatures: Signatures) -> dict[str, Any]:
    """What happened to the rows, in numbers."""
    narrow = table.select("status", "keep", "reason", "size")
    dropped = narrow.filter((pl.col("status") == "ok") & ~pl.col("keep"))
    unreadable = narrow.filter(pl.col("status") != "ok")
    return {
        "rows": len(table),
        "kept": int(table["keep"].sum()),
        "dropped": len(dropped),
        "unreadable": len(unreadable),
        "status": dict(sorted(table["status"].value_counts().iter_rows())),
        "reasons": dict(sorted(dropped["reason"].value_counts().iter_rows())),
        "pairs": dict(sorted(pairs["class"].value_counts().iter_rows())),
        "bytes": int(table["size"].sum()),
        "bytes_dropped": int(dropped["size"].sum()),
        "without_caption": table["caption_hash"].null_count(),
        "captions": policy.count_captions(table, signatures.read_captions),
    }
