"""Which images are attacked. Depends on a dedup run OUT alone, never on an arm.

In: OUT and, when it is a planted dataset, the truth in OUT/plant.parquet. Out: a table. Knows nothing of models.
"""

from pathlib import Path

import polars as pl

from dedup import manifest
from dedup.policy import has_caption
from eval.reference import (
    CANARIES,
    LOCATION,
    SPARE,
    TargetError,
    read_folder,
    read_plant,
    remove_planted,
    source_of,
)

STRATA = (2, 3, 5, 10, 20, 50, 100)  # multiplicities at which another stratum begins
ORDERS = ("stratified", "most-duplicated")

TARGETS: dict[str, pl.DataType | type[pl.DataType]] = {
    "target_id": pl.String,  # key of the canary, or "row-" and the start of the sha256 of the image
    "cluster_id": pl.Int64,  # of the manifest; null for a canary that stands nowhere
    "component_id": pl.Int64,  # of the manifest; null for every canary
    "prompt": pl.String,
    "prompt_kind": pl.String,  # "member", or "control": no model was trained on the image
    "multiplicity": pl.Int64,  # how often the image stands in the original data; 0 for controls
    "mode": pl.String,  # of a canary: "exact" or "edited"; null for what was not planted
    **{name: manifest.SCHEMA[name] for name in LOCATION},
    "root": pl.String,  # absolute path of what the location lies in; null: the source of OUT
}


def load_targets(
    out: Path,
    *,
    limit: int | None = 200,
    held_out: float = 0.0,
    order: str = "stratified",
    controls: Path | None = None,
) -> pl.DataFrame:
    """One row a target, columns TARGETS.

    A planted dataset: every canary; those that stand nowhere are controls. Any other: the keepers of clusters
    that have a caption, at most `limit`, in one of ORDERS: equally many of each stratum of multiplicities as far as
    it has so many, or most duplicated first (the choice of Carlini et al. 2023, sec. 4.2). Components that training
    holds out are no members; `held_out` is the share in the config of the runs, and of those components at most `limit`
    are controls. controls: a dedup run over pictures that no model was trained on; at most `limit` of its keepers, in a
    fixed random order, are controls as well, without those whose bytes or caption stand in OUT. Raises TargetError.
    """
    if order not in ORDERS:
        raise TargetError(f"unknown order {order!r}: choose of {', '.join(ORDERS)}")
    rows = manifest.read(out).filter(pl.col("status") == "ok")
    plant = read_plant(out)
    rows = rows.with_columns(_hold_out(out, rows, held_out))
    most = len(rows) if limit is None else limit
    keepers = _list_keepers(remove_planted(rows, plant))
    unseen = keepers.filter("held_out").unique("component_id", keep="first", maintain_order=True)
    unseen = unseen.head(most).with_columns(prompt_kind=pl.lit("control"), multiplicity=pl.lit(0))
    trained = keepers.filter(~pl.col("held_out"))
    trained = trained.head(most) if order == "most-duplicated" else _stratify(trained, most)
    members = trained if plant is None else _list_canaries(out, plant, rows)
    if members.is_empty():
        raise TargetError(f"{out}: no image with a caption, so there is no prompt to attack with")
    parts = [part.with_columns(root=pl.lit(None, pl.String)) for part in (members, unseen)]
    if controls is not None:
        foreign = _list_controls(out, controls, rows)
        parts.append(foreign if limit is None else foreign.head(limit))
    return pl.concat(part.select(pl.col(name).cast(kind) for name, kind in TARGETS.items()) for part in parts)


def _stratify(keepers: pl.DataFrame, most: int) -> pl.DataFrame:
    """Of each stratum in turn, in its order, until there are enough; the result in the order of the keepers."""
    stratum = pl.sum_horizontal((pl.col("multiplicity") >= bound).cast(pl.Int64) for bound in STRATA)
    placed = keepers.with_row_index("place").with_columns(stratum=stratum)
    # equals in the random order of their digests, so that of each stratum a random part is taken
    turn = pl.int_range(pl.len()).over("stratum", order_by="sha256")
    chosen = placed.with_columns(turn=turn).sort("turn", -pl.col("stratum"), "place").head(most)
    return chosen.sort("place").drop("place", "stratum", "turn")


def _list_controls(out: Path, controls: Path, rows: pl.DataFrame) -> pl.DataFrame:
    """Keepers of the run `controls`, in random order, but for those whose bytes or caption stand in OUT."""
    src = source_of(out)
    known = [rows] + [read_folder(out, folder) for folder in (CANARIES, SPARE) if (src / folder).is_dir()]
    digests, captions = (pl.concat(part[name] for part in known) for name in ("sha256", "caption"))
    free = _list_keepers(manifest.read(controls).filter(pl.col("status") == "ok"))
    free = free.filter(
        ~pl.col("sha256").is_in(digests.to_list()), ~pl.col("prompt").is_in(captions.drop_nulls().to_list())
    )
    if free.is_empty():
        raise TargetError(f"{controls}: no picture with a caption that {out} does not hold, so there are no controls")
    return free.sort("sha256").with_columns(
        target_id="control-" + pl.col("sha256").str.slice(0, 16),
        cluster_id=None,
        component_id=None,
        prompt_kind=pl.lit("control"),
        multiplicity=0,
        root=pl.lit(str(source_of(controls))),
    )


def _hold_out(out: Path, rows: pl.DataFrame, share: float) -> pl.Series | pl.Expr:
    if share == 0:
        return pl.lit(False).alias("held_out")
    from defense.data import hold_out, read_canary_keys  # takes seconds to import

    return hold_out(rows, share, read_canary_keys(out))


def _list_keepers(rows: pl.DataFrame) -> pl.DataFrame:
    """Keepers of clusters with a caption, as members: duplicates first, equals in the random order of their digests."""
    named = rows.filter("keep", pl.col("id") == pl.col("cluster_id")).with_columns(
        prompt=pl.coalesce(pl.when(has_caption()).then("caption"), pl.col("captions").list.first()),
    )
    table = named.filter(pl.col("prompt").is_not_null()).with_columns(
        target_id="row-" + pl.col("sha256").str.slice(0, 16),
        prompt_kind=pl.lit("member"),
        multiplicity="represents",
        mode=pl.lit(None, pl.String),
    )
    return table.sort(-pl.col("multiplicity"), "sha256")


def _list_canaries(out: Path, plant: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    truth = plant.group_by("canary").agg(pl.col("key", "multiplicity", "mode").first())
    missing = set(truth["key"].drop_nulls()) - set(rows["key"])
    if missing:
        raise TargetError(f"{out}: {len(missing)} planted copies are not in the manifest, such as {min(missing)}")
    originals = read_folder(out, CANARIES).rename({"caption": "prompt"})
    canaries = originals.join(truth.rename({"key": "copy"}), left_on="key", right_on="canary", how="inner")
    if len(canaries) < len(truth):
        raise TargetError(f"{out}: the source has {len(canaries)} of {len(truth)} canaries in `{CANARIES}`")
    if canaries["prompt"].fill_null("").str.strip_chars().eq("").any():
        raise TargetError(f"{out}: a canary without a caption cannot be attacked: plant captioned images")
    never = pl.col("multiplicity") == 0
    return (
        canaries.join(rows.select("cluster_id", copy="key"), on="copy", how="left")
        .with_columns(
            target_id="key",
            component_id=pl.lit(None, pl.Int64),
            prompt_kind=pl.when(never).then(pl.lit("control")).otherwise(pl.lit("member")),
        )
        .sort("key")
    )
