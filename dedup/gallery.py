"""Manifest and pairs → the groups that the report shows: data pages, and the index to filter them by.

In: OUT's tables. Out: OUT/report/data/*.js. A page opened from disk may not fetch, so data are scripts that hand their
value to `receive`; 100,000 groups cost no more to open than ten. Knows nothing of the page around the groups.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dedup import clustering, manifest, sources, thumbnails

MEMBERS = 500  # members of a group that are listed at all
CHUNK_GROUPS, CHUNK_ROWS = 500, 5_000

# Kinds of group, as bits: one may hold removed and mirrored copies, and upright ones that a policy keeps.
DUPLICATES, TURNED, ALIKE, SCENE, ALLOWED = 1, 2, 4, 8, 16
MEASURES = ["class", "signal", "score", "hamming", "residual", "worst_tile"]
EVIDENCE = [*MEASURES, "orientation", "cosine", "inliers", "overlap", "transform"]
TRANSFORM = pl.List(pl.Float64)
QUARTER = np.array([[0.0, 1, 0], [-1, 0, 1], [0, 0, 1]])  # a turn to the left of the square 0 … 1, y downwards
MIRROR = np.array([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
# What the page is told of a row, in this order; the scripts read the names from the index.
FIELDS = [
    "key",
    "shard",
    "sha256",
    "caption",
    "width",
    "height",
    "format",
    "size",
    "thumb",
    "role",
    *EVIDENCE,
    "reason",
    "partner",
]
LISTED = [*FIELDS, "at"]  # where in its group the row's partner stands, if it has one


def group_rows(rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Every row that the gallery shows: FIELDS, id, location, `kind`, `number` of its group, `place` in it.

    Duplicates come before look-alikes, larger groups first; in a group the kept row, then what a person
    should see first: the weakest matches among copies, the closest among look-alikes. `transform` carries positions
    of the row's partner onto the row, each in units of its own longer side; a mirror is part of it.
    """
    pairs = pairs.with_columns(transform=_with_mirrors(pairs, rows))
    members = pl.concat([_copies(rows, pairs), _look_alikes(rows, pairs)])
    alike = pl.col("kind").is_in([ALIKE, SCENE])
    ordered = members.with_columns(alike=alike, group_size=pl.len().over("group", alike).cast(pl.Int64))
    ordered = ordered.sort("alike", -pl.col("group_size"), "group", "order", "id")
    number = pl.struct("alike", "group").rle_id().cast(pl.Int64)
    numbered = ordered.with_columns(number=number).with_columns(place=pl.int_range(pl.len()).over("number"))
    places = numbered.select("number", other="id", at="place")
    return numbered.join(places, on=["number", "other"], how="left", maintain_order="left")


def _is_external() -> pl.Expr:
    """Rows that went with their whole group, for pictures from outside: they have a page of their own."""
    return pl.col("reason").eq_missing("external")


def _copies(rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Rows of every group of copies, with the evidence of the pair that ties each to its group."""
    members = rows.filter((pl.col("status") == "ok") & (pl.col("cluster_size") > 1) & ~_is_external())
    best = (
        members.select("id", "cluster_id", wanted=pl.coalesce("kept_id", "cluster_id"))
        .join(_both_ends(pairs.filter(pl.col("class") == "copy")), on="id")
        .join(rows.select(other="id", other_cluster="cluster_id"), on="other")
        .filter(pl.col("cluster_id") == pl.col("other_cluster"))
        .sort(pl.col("other") != pl.col("wanted"), -pl.col("score"), "other")
        .unique("id", keep="first", maintain_order=True)
    )
    first = pl.col("id") == pl.col("cluster_id")
    role = pl.when(first).then(pl.lit("keeper")).when("keep").then(pl.lit("also-kept")).otherwise(pl.lit("removed"))
    stays = pl.when(pl.col("orientation") == "r0").then(ALLOWED).otherwise(TURNED)
    kind = pl.when(first).then(0).when("keep").then(stays).otherwise(DUPLICATES)
    order = pl.when(first).then(-2.0).when("keep").then(-1.0).otherwise("score")
    members = members.with_columns(role=role, kind=kind, group="cluster_id", first="cluster_id")
    return _describe(members, best, rows, order)


def _look_alikes(rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Kept rows of different groups that were found near each other and not merged, by connected component.

    A pair stands for the kept rows that its rows went to: it is turned and carried on to them. Every row is shown with
    its pair to the row of the component that has most of them, else with its closest one.
    """
    stands = rows.filter(~_is_external()).select("id", "cluster_id", kept=pl.coalesce("kept_id", "id"))
    near = (
        pairs.filter(pl.col("class") != "copy")
        .join(stands.select(a="id", kept_a="kept", cluster_a="cluster_id"), on="a")
        .join(stands.select(b="id", kept_b="kept", cluster_b="cluster_id"), on="b")
        .filter(pl.col("cluster_a") != pl.col("cluster_b"))
        .with_columns(low=pl.min_horizontal("kept_a", "kept_b"), high=pl.max_horizontal("kept_a", "kept_b"))
        .sort(-pl.col("score"), "low", "high", "a", "b")
        .unique(["low", "high"], keep="first", maintain_order=True)
    )
    near = near.with_columns(transform=_between_kept(near, rows, pairs)).drop("a", "b")
    ends = _both_ends(near.rename({"kept_a": "a", "kept_b": "b"})).join(rows.select("id", "component_id"), on="id")
    degree = ends.group_by("component_id", "id").agg(pairs=pl.len().cast(pl.Int64))
    hubs = degree.sort("component_id", -pl.col("pairs"), "id").unique("component_id", keep="first")
    best = (
        ends.join(hubs.select("component_id", first="id"), on="component_id")
        .sort(pl.col("other") != pl.col("first"), -pl.col("score"), "other")
        .unique("id", keep="first", maintain_order=True)
    )
    members = rows.join(best.select("id", "first", best="class"), on="id", maintain_order="left")
    kind = pl.when(pl.col("best") == "same-scene").then(SCENE).otherwise(ALIKE)
    members = members.with_columns(role=pl.lit("look-alike"), kind=kind, group="component_id")
    return _describe(
        members, best, rows, pl.when(pl.col("id") == pl.col("first")).then(-2.0).otherwise(-pl.col("score"))
    )


def _both_ends(pairs: pl.DataFrame) -> pl.DataFrame:
    """Each pair twice: id, other and its evidence; `orientation` and `transform` turn `other` into `id`."""
    inverse = {name: clustering.inverse_orientation(name) for name in manifest.ORIENTATIONS}
    forward = pairs.select(*EVIDENCE, id="b", other="a")
    backward = pairs.select(*EVIDENCE, id="a", other="b").with_columns(
        pl.col("orientation").replace(inverse), transform=_to_column(pairs, np.linalg.inv(_matrices(pairs)))
    )
    return pl.concat([forward, backward])


def _matrices(pairs: pl.DataFrame) -> np.ndarray:
    """float64 (m, 3, 3): the transforms of those that have one."""
    found = pairs["transform"].drop_nulls()
    return found.list.to_array(9).to_numpy().reshape(-1, 3, 3) if len(found) else np.zeros((0, 3, 3))


def _to_column(pairs: pl.DataFrame, matrices: np.ndarray) -> pl.Series:
    """Inverse of `_matrices`; the last number of each is 1, as far as it can be."""
    last = matrices[:, 2:, 2:]
    flat = pl.Series((matrices / np.where(last == 0, 1, last)).reshape(-1, 9), dtype=pl.Array(pl.Float64, 9))
    place = pl.select(pl.when(pairs["transform"].is_not_null()).then(pairs["transform"].is_not_null().cum_sum() - 1))
    return flat.cast(TRANSFORM).gather(place.to_series())


def _with_mirrors(pairs: pl.DataFrame, rows: pl.DataFrame) -> pl.Series:
    """Transforms of the pairs table, which speak of a mirrored a where the orientation says so → of a itself."""
    found = pairs.filter(pl.col("transform").is_not_null())
    frame = _frames(found["a"], rows)
    mirror = np.where(found["orientation"].str.starts_with("m").to_numpy()[:, None, None], MIRROR, np.eye(3))
    return _to_column(pairs, _matrices(pairs) @ frame @ mirror @ np.linalg.inv(frame))


def _frames(ids: pl.Series, rows: pl.DataFrame) -> np.ndarray:
    """float64 (m, 3, 3): what carries the square 0 … 1 onto each picture, in units of its longer side."""
    sides = rows.select("width", "height").to_numpy()[ids.to_numpy()].astype(float)  # (m, 2)
    diagonal = np.column_stack([sides / sides.max(axis=1, keepdims=True), np.ones(len(sides))])
    return np.eye(3) * diagonal[:, None]


def _between_kept(near: pl.DataFrame, rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.Series:
    """Transforms of a → b carried on to the rows that these went to: kept_a → a → b → kept_b."""
    found = near.filter(pl.col("transform").is_not_null())
    to_a, to_b = (_from_kept(found.select(id=end, kept=f"kept_{end}"), rows, pairs) for end in ("a", "b"))
    return _to_column(near, np.linalg.inv(to_b) @ _matrices(near) @ to_a)


def _from_kept(wanted: pl.DataFrame, rows: pl.DataFrame, pairs: pl.DataFrame) -> np.ndarray:
    """(id, kept) → float64 (m, 3, 3), what carries the kept row onto the row; where no transform is known, a turn."""
    gone = wanted.with_row_index("number").filter(pl.col("id") != pl.col("kept"))
    copies = pairs.filter(pl.col("class") == "copy", pl.any_horizontal(pl.col("a", "b").is_in(gone["id"].implode())))
    ends = _both_ends(copies).unique(["id", "other"], keep="first", maintain_order=True)
    gone = gone.join(ends, left_on=["id", "kept"], right_on=["id", "other"], maintain_order="left")
    orientations = [manifest.ORIENTATIONS.index(name) for name in gone["orientation"].fill_null("r0")]
    turns = np.array([np.linalg.matrix_power(QUARTER, n % 4) @ (MIRROR if n >= 4 else np.eye(3)) for n in orientations])
    carried = np.tile(np.eye(3), (len(wanted), 1, 1))
    number = gone["number"].to_numpy()
    carried[number] = _frames(gone["id"], rows) @ turns.reshape(-1, 3, 3) @ np.linalg.inv(_frames(gone["kept"], rows))
    carried[number[gone["transform"].is_not_null().to_numpy()]] = _matrices(gone)
    return carried


def _describe(members: pl.DataFrame, best: pl.DataFrame, rows: pl.DataFrame, order: pl.Expr) -> pl.DataFrame:
    """Members (with role, kind, group, and first: the id that leads the group) → one finished row each."""
    is_first = pl.col("id") == pl.col("first")
    table = members.drop(EVIDENCE, strict=False)
    table = table.join(best.select("id", "other", *EVIDENCE), on="id", how="left", maintain_order="left")
    table = table.join(rows.select(other="id", other_key="key"), on="other", how="left", maintain_order="left")
    text = pl.col("caption").str.strip_chars()
    return table.with_columns(
        *[pl.when(~is_first).then(column).alias(column) for column in EVIDENCE],
        order=order.fill_null(0.0),  # of a pair that only a person knows of
        caption=pl.when(text != "").then(text),
        thumb=pl.col("sha256").str.head(thumbnails.LARGE_NAME),
        partner=pl.when(~is_first & (pl.col("other") != pl.col("first"))).then("other_key"),
    ).select(*FIELDS, "id", "other", "source", "offset", "kind", "group", "order")


def with_examples(listed: pl.DataFrame, rows: pl.DataFrame, examples: list[dict[str, Any]]) -> pl.DataFrame:
    """`listed`, and before it the pictures of example pairs (ids `a`, `b`) that the page shows apart: `number` null."""
    ids = sorted({example[end] for example in examples for end in ("a", "b")})
    thumb = pl.col("sha256").str.head(thumbnails.LARGE_NAME)
    pictures = rows.filter(pl.col("id").is_in(ids))
    pictures = pictures.select("id", "key", "caption", "shard", "offset", "size", thumb=thumb)
    return pl.concat([pictures, listed], how="diagonal")


def write_groups(src: Path, folder: Path, members: pl.DataFrame, listed: pl.DataFrame) -> dict[str, Any]:
    """Write the groups in chunks, and the index that the page filters by; returns the index.

    src: where the page finds images that are files of their own. members: all rows of `group_rows`; listed: those
    of them that the page lists.
    """
    names = {column: sorted(members[column].drop_nulls().unique()) for column in ("signal", "source")}
    code = {column: {name: number for number, name in enumerate(names[column])} for column in names}
    removed = pl.col("role") == "removed"
    groups = members.group_by("number", maintain_order=True).agg(
        pl.len().alias("size"),
        pl.col("signal").drop_nulls().unique(),
        pl.col("source").unique().sort(),
        pl.col("kind").unique().sum(),
        weakest=pl.coalesce(pl.col("score").filter(removed).min(), pl.col("score").min(), 0).round(4),
        removed=removed.sum(),
    )
    starts: list[int] = []
    for start, chunk in _chunks(listed, groups):
        manifest.write_text(folder / f"{len(starts):05d}.js", to_script(len(starts), chunk))
        starts.append(start)
    index: dict[str, Any] = {
        "base": find_base(src),
        "fields": LISTED,
        "starts": starts,
        "signal_names": names["signal"],
        "source_names": names["source"],
        "size": groups["size"].to_list(),
        "kind": groups["kind"].to_list(),
        "weakest": groups["weakest"].to_list(),
        "signals": [sum(1 << code["signal"][name] for name in some) for some in groups["signal"]],
        "sources": [[code["source"][name] for name in some] for some in groups["source"]],
    }
    manifest.write_text(folder / "index.js", to_script("index", index))
    for path in folder.glob("[0-9]*.js"):  # an earlier report may have had more
        if int(path.stem) >= len(starts):
            path.unlink()
    return index


def find_base(src: Path) -> str | None:
    """Where a page finds images that are files of their own."""
    return f"{sources.find_root(src).as_uri()}/" if src.exists() else None


def _chunks(listed: pl.DataFrame, groups: pl.DataFrame) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first group, groups); bounded in groups and, but for the first of them, in rows."""
    shown = listed.group_by("number", maintain_order=True).len()["len"]
    rounded = pl.col("score", "residual", "worst_tile", "cosine", "overlap").round(4)
    exact = pl.col("transform").list.eval(pl.element().round_sig_figs(6))
    rows = listed.select(LISTED).with_columns(rounded, exact).iter_rows()
    chunk: list[dict[str, Any]] = []
    held = start = 0
    for number, (count, size, removed) in enumerate(zip(shown, groups["size"], groups["removed"], strict=True)):
        if chunk and (len(chunk) == CHUNK_GROUPS or held + count > CHUNK_ROWS):
            yield start, chunk
            chunk, held, start = [], 0, number
        chunk.append({"rows": [next(rows) for _ in range(count)], "hidden": size - count, "removed": removed})
        held += count
    if chunk:
        yield start, chunk


def to_script(name: str | int, value: object) -> str:
    """A script that hands `value` to the page; safe inside HTML too, whatever the strings in it."""
    text = json.dumps([name, value], ensure_ascii=False, separators=(",", ":"))
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"receive(...{text});\n"
