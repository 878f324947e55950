"""Which of two copies is kept, and what becomes of the captions.

Keeper order is a total order of the rows, independent of the order of arrival: larger picture first, then more bytes,
then one that has a caption, then by content hash and key.
"""

import polars as pl


def keeper_rank(rows: pl.DataFrame) -> pl.Series:
    """Rank of every row in keeper order: 0 = kept before all others. Rows that are not `ok` come last."""
    order = rows.with_row_index("row").sort(
        pl.col("status") != "ok",
        -(pl.col("width").cast(pl.Int64) * pl.col("height").cast(pl.Int64)).fill_null(0),
        -pl.col("size").fill_null(0),
        ~has_caption(),
        pl.col("sha256").fill_null(""),
        "key",
        "row",
    )["row"]
    rank = pl.DataFrame({"row": order, "rank": pl.int_range(len(order), eager=True)}).sort("row")
    return rank["rank"]


def has_caption() -> pl.Expr:
    return pl.col("caption").fill_null("").str.strip_chars() != ""


def merge_captions(rows: pl.DataFrame) -> pl.Series:
    """Distinct captions of all rows that a kept row stands for, its own first, then in input order; null on the rest.

    rows: id, caption, keep, kept_id, in input order.
    """
    stands = rows.select(
        owner=pl.when("keep").then("id").otherwise("kept_id"),
        own=~pl.col("keep"),
        id="id",
        caption=pl.when(has_caption()).then("caption"),
    ).drop_nulls("owner")
    lists = (
        stands.sort("owner", "own", "id")
        .group_by("owner", maintain_order=True)
        .agg(captions=pl.col("caption").drop_nulls().unique(maintain_order=True))
    )
    return rows.select(id="id").join(lists, left_on="id", right_on="owner", how="left", maintain_order="left")[
        "captions"
    ]
