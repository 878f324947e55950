"""defense.arms: which rows each arm trains on, and with which captions."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup import manifest
from defense.arms import ARMS, COLUMNS, ArmError, select_rows


def make_rows(keep: list[bool], unreadable: int = 0) -> pl.DataFrame:
    n = len(keep)
    rows = pl.DataFrame(
        {
            "id": range(n + unreadable),
            "cluster_id": range(n + unreadable),
            "key": [f"k{i}" for i in range(n + unreadable)],
            "caption": [f"caption {i}" for i in range(n + unreadable)],
            "status": ["ok"] * n + ["unreadable"] * unreadable,
            "keep": keep + [False] * unreadable,
        }
    )
    return manifest.conform(rows)


def make_spare(n: int) -> pl.DataFrame:
    rows = pl.DataFrame({"key": [f"s{i}" for i in range(n)], "caption": [f"spare {i}" for i in range(n)]})
    return manifest.conform(rows).select("shard", "offset", "size", "key", "caption")


@given(keep=st.lists(st.booleans(), min_size=1, max_size=20), unreadable=st.integers(0, 3))
def test_row_counts_and_places(keep, unreadable):
    rows, spare = make_rows([True, *keep], unreadable), make_spare(25)
    raw, refill, dedup = (ARMS[arm](rows, spare, 0) for arm in ("raw", "refill", "dedup"))
    kept = [True, *keep]
    assert raw["id"].to_list() == list(range(len(kept)))
    assert len(refill) == len(raw)
    assert refill["id"].to_list() == [i if k else None for i, k in enumerate(kept)]
    assert refill.filter(pl.col("id").is_null())["key"].to_list() == [f"s{i}" for i in range(kept.count(False))]
    assert dedup["id"].to_list() == [i for i, k in enumerate(kept) if k]
    assert all(tuple(arm.columns) == COLUMNS for arm in (raw, refill, dedup))
    assert raw.schema == refill.schema == dedup.schema


def test_a_copy_keeps_its_caption_in_raw_and_leaves_it_behind_when_dropped():
    rows = make_rows([True, False, True]).with_columns(
        captions=pl.Series([["caption 0", "caption 1"], None, None], dtype=pl.List(pl.String))
    )
    assert ARMS["raw"](rows, None, 0)["captions"].to_list() == [["caption 0"], ["caption 1"], ["caption 2"]]
    assert ARMS["dedup"](rows, None, 0)["captions"].to_list() == [["caption 0", "caption 1"], ["caption 2"]]
    refill = ARMS["refill"](rows, make_spare(1), 0)
    assert refill["captions"].to_list() == [["caption 0", "caption 1"], ["spare 0"], ["caption 2"]]


@pytest.mark.parametrize("arm", ARMS)
def test_rows_without_a_caption_stay_with_the_empty_one(arm):
    rows = make_rows([True, True, True]).with_columns(caption=pl.Series([None, "  ", "text"]))
    assert ARMS[arm](rows, make_spare(1), 0)["captions"].to_list() == [[], [], ["text"]]


def test_refill_without_spare_images():
    with pytest.raises(ArmError, match="unmemorize plant"):
        select_rows("refill", make_rows([True, False]), None, 0)


def test_refill_with_too_few_spare_images():
    with pytest.raises(ArmError, match="needs 2 spare images, the dataset has 1"):
        select_rows("refill", make_rows([True, False, False]), make_spare(1), 0)


def test_an_unknown_arm_lists_the_known_ones():
    with pytest.raises(ArmError, match="'rwa': choose one of raw, refill, dedup"):
        select_rows("rwa", make_rows([True]), None, 0)


def test_an_empty_arm_is_an_error():
    with pytest.raises(ArmError, match="no readable row"):
        select_rows("raw", make_rows([], unreadable=2), None, 0)
