"""Which of two copies is kept, and what becomes of the captions.

Keeper order is a total order of the rows, independent of the order of arrival. What an earlier run has published
(`base.py`) comes before all else. At copy level the picture that most
others share parts with comes first (in powers of two): a row is only dropped to one that it matches itself, and what
lies in the middle leaves fewest behind. Then the picture that holds more pixels; of those that hold the same, the one
that was not enlarged; then more bytes, then one that has a caption, then by content hash, then a file before a link to
it, then by key.
"""

import numpy as np
import polars as pl


def keeper_rank(
    rows: pl.DataFrame, effective_pixels: pl.Series | None = None, partners: pl.Series | None = None
) -> pl.Series:
    """Rank of every row in keeper order: 0 = kept before all others. Rows that are not `ok` come last.

    rows: a column `published` is heeded. effective_pixels: of `detail.effective_pixels`; None = width × height.
    partners: of `count_partners`; None = none.
    """
    if partners is not None:  # equal files stay together
        partners = rows.with_columns(partners=partners).select(pl.col("partners").max().over("sha256")).to_series()
    area = (pl.col("width").cast(pl.Int64) * pl.col("height").cast(pl.Int64)).fill_null(0)
    order = rows.with_row_index("row").sort(
        pl.col("status") != "ok",
        *([~pl.col("published")] if "published" in rows.columns else []),
        *([] if partners is None else [-(partners + 1).log(2).floor()]),
        -(area if effective_pixels is None else pl.lit(effective_pixels)),
        area,
        -pl.col("size").fill_null(0),
        ~has_caption(),
        pl.col("sha256").fill_null(""),
        "link",
        "key",
        "row",
    )["row"]
    rank = pl.DataFrame({"row": order, "rank": pl.int_range(len(order), eager=True)}).sort("row")
    return rank["rank"]


def count_partners(pairs: pl.DataFrame, n: int) -> pl.Series:
    """How many pairs of the copy search each of n rows has: they hold parts of it, or it is a part of them."""
    edited = pairs.filter((pl.col("signal") == "copy") & (pl.col("class") == "copy"))
    ends = np.concatenate([edited["a"].to_numpy(), edited["b"].to_numpy()])
    return pl.Series("partners", np.bincount(ends, minlength=n))


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


def repeated_captions(rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """How pictures and captions repeat: tables with `caption` and `count` ≥ 2, one row a case, most frequent first.

    rows: cluster_id, caption, status. A picture is a group of copies; a missing caption repeats nothing.
    """
    text = pl.col("caption").str.strip_chars()
    said = rows.filter((pl.col("status") == "ok") & has_caption()).select("cluster_id", caption=text)
    count = pl.len().cast(pl.Int64).alias("count")
    both = said.group_by("cluster_id", "caption").agg(count)
    usual = pl.col("caption").sort_by(-pl.col("count"), "caption").first()
    tables = {
        "same_image_same_caption": both,  # count: rows
        "same_image_other_captions": both.group_by("cluster_id").agg(usual, count),  # count: captions
        "same_caption_other_images": both.group_by("caption").agg(count),  # count: pictures
    }
    return {
        name: table.filter(pl.col("count") > 1).sort(-pl.col("count"), "caption").select("count", "caption")
        for name, table in tables.items()
    }


def count_captions(rows: pl.DataFrame) -> dict[str, dict[str, int]]:
    """`repeated_captions` in numbers: cases, and the sum of their counts."""
    tables = repeated_captions(rows)
    return {name: {"cases": len(table), "total": int(table["count"].sum())} for name, table in tables.items()}
