"""Parts of a dataset that are deduplicated each by itself: sources or splits. What each loses, and what is left in two.

In: rows of the manifest. Out: the scope of each, alarms, and leakage: pictures that are kept in several scopes.
"""

from collections.abc import Sequence

import polars as pl

from dedup.sources import Shard

PER = ("none", "source", "split")
LISTED = 100  # pairs of scopes, and alarms, that run.json names
# What `datasets` calls a parquet file says its split: data/train-00000-of-00002.parquet. The source of a saved dataset
# is its split; elsewhere a split is what lies in a top folder, as a source is.
SPLIT = pl.coalesce(
    pl.col("shard").cast(pl.String).str.extract(r"(?:^|/)([^/]+?)-\d{5}-of-\d{5}[^/]*\.parquet(?:#.*)?$"),
    pl.col("source").cast(pl.String),
)


def resolve_per(per: str, shards: Sequence[Shard]) -> str:
    """What `auto` means: by split where the files say of which split they are."""
    if per != "auto":
        return per
    names = pl.DataFrame({"shard": [shard.name for shard in shards], "source": None}, schema_overrides=NAMES)
    told = any(shard.kind == "huggingface" for shard in shards) or names.select(SPLIT.is_not_null().any()).item()
    return "split" if told else "none"


NAMES = {"shard": pl.String, "source": pl.String}


def name_scopes(rows: pl.DataFrame, per: str, against_split: str | None = None) -> pl.DataFrame:
    """Columns `scope` (rows of different scopes do not delete each other) and `guarded` (Boolean) of all rows.

    Guarded are the rows of the split that others must not match: they stay whatever they match, and delete in all
    scopes.
    """
    scope = {"none": pl.lit(""), "source": pl.col("source"), "split": SPLIT}[per]
    guarded = pl.lit(False) if against_split is None else SPLIT.eq_missing(against_split)
    scope = pl.when(guarded).then(SPLIT).otherwise(scope.cast(pl.String))
    return rows.select(scope=scope.cast(pl.Categorical), guarded=guarded)


def list_losses(rows: pl.DataFrame, scope: pl.Series, max_loss: float) -> list[dict[str, object]]:
    """Scopes that lose more than a share of their rows, those that lose most of all first: scope, rows, kept."""
    counted = (
        rows.select("keep", scope=scope).group_by("scope").agg(rows=pl.len().cast(pl.Int64), kept=pl.col("keep").sum())
    ).with_columns(pl.col("scope").cast(pl.String))
    lost = 1 - pl.col("kept") / pl.col("rows")
    return counted.filter(lost > max_loss).sort(-lost, "scope").to_dicts()


def list_leaks(rows: pl.DataFrame, scope: pl.Series) -> pl.DataFrame:
    """Kept rows of pictures that are kept in several scopes: id, cluster_id, scope, by picture."""
    kept = rows.select("id", "cluster_id", "keep", scope=scope).filter("keep").drop("keep")
    kept = kept.filter(stands_again("cluster_id")).with_columns(pl.col("scope").cast(pl.String))
    return kept.filter(pl.col("scope").n_unique().over("cluster_id") > 1).sort("cluster_id", "id")


def stands_again(column: str) -> pl.Expr:
    """Whether another row has the same value; as `is_duplicated`, in far less memory."""
    return ~(pl.col(column).is_first_distinct() & pl.col(column).is_last_distinct())


def count_leaks(leaks: pl.DataFrame) -> list[dict[str, object]]:
    """For each two scopes that keep the same pictures: scopes, how many pictures, how many rows of each."""
    each = leaks.group_by("cluster_id", "scope").agg(n=pl.len().cast(pl.Int64))
    both = each.join(each, on="cluster_id", suffix="_b").filter(pl.col("scope") < pl.col("scope_b"))
    pairs = both.group_by("scope", "scope_b").agg(pl.len().cast(pl.Int64).alias("pictures"), pl.col("n", "n_b").sum())
    listed = pairs.sort(-pl.col("pictures"), "scope", "scope_b").head(LISTED)
    return listed.select(
        pl.concat_list("scope", "scope_b").alias("scopes"), "pictures", rows=pl.concat_list("n", "n_b")
    ).to_dicts()
