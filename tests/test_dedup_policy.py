"""Keeper order is a total order; captions are merged and counted as by hand."""

from collections import Counter

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st
from made import with_numbers

from dedup import policy

ROW = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["ok", "ok", "unreadable"]),
        "width": st.sampled_from([1, 2, 4]) | st.none(),
        "height": st.just(2),
        "size": st.integers(0, 2),
        "caption": st.sampled_from([None, " ", "a", "b"]),
        "sha256": st.sampled_from(["0", "1"]) | st.none(),
        "link": st.booleans(),
        "held": st.integers(1, 8),
    }
)
SCHEMA = {"status": pl.String, "width": pl.Int32, "height": pl.Int32, "size": pl.Int64, "caption": pl.String}
SCHEMA |= {"sha256": pl.String, "link": pl.Boolean, "held": pl.Int64, "key": pl.String}


def make_rows(rows: list[dict]) -> pl.DataFrame:
    return with_numbers(pl.DataFrame([row | {"key": f"{n:03d}"} for n, row in enumerate(rows)], schema=SCHEMA))


@settings(deadline=None)
@given(st.lists(ROW, max_size=12), st.randoms())
def test_keeper_order_is_total_and_knows_no_order_of_arrival(rows: list[dict], random) -> None:  # type: ignore[no-untyped-def]
    table = make_rows(rows)
    for held in (None, "held"):
        rank = policy.keeper_rank(table, table[held] if held else None)
        assert sorted(rank) == list(range(len(rows)))
        ranked = table.with_columns(rank=policy.keeper_rank(table))
        assert policy.keeper_rank(ranked, table[held] if held else None).equals(rank)
        order = list(range(len(rows)))
        random.shuffle(order)
        shuffled = table[order]
        assert policy.keeper_rank(shuffled, shuffled[held] if held else None).to_list() == rank.gather(order).to_list()


def rank_of(*rows: dict, held: list[int] | None = None) -> list[int]:
    plain = {"status": "ok", "width": 4, "height": 2, "size": 1, "caption": "a", "sha256": "0", "held": 8}
    plain["link"] = False
    table = make_rows([plain | row for row in rows])
    return policy.keeper_rank(table, pl.Series(held) if held else None).to_list()


def test_what_comes_first() -> None:
    assert rank_of({"width": 2}, {}) == [1, 0]  # pixels
    assert rank_of({"link": True}, {}) == [1, 0]  # a link may point to the other
    assert rank_of({"width": 2, "size": 2}, {}) == [1, 0]  # pixels before bytes
    assert rank_of({"width": 40}, {"width": 20}, held=[40, 40]) == [1, 0]  # an enlarged copy does not win
    assert rank_of({"width": 40}, {"width": 20}, held=[80, 40]) == [0, 1]
    assert rank_of({}, {"size": 2}) == [1, 0]
    assert rank_of({"caption": " "}, {}) == [1, 0]
    assert rank_of({"sha256": "1"}, {"sha256": "0"}) == [1, 0]
    assert rank_of({"status": "unreadable", "width": 400}, {}) == [1, 0]


def test_captions_of_all_that_a_kept_row_stands_for() -> None:
    rows = pl.DataFrame(
        {
            "id": [0, 1, 2, 3, 4],
            "caption": ["b", "a", None, " ", "a"],
            "keep": [False, True, False, True, False],
            "kept_id": [1, None, 1, None, 1],
        }
    )
    rows = rows.with_columns(captions=policy.merge_captions(rows, rows["caption"].gather))
    assert rows["captions"].to_list() == [None, ["a", "b"], None, None, None]
    assert rows.select(policy.tell_captions())["captions"].to_list() == [None, ["a", "b"], None, [], None]


SAID = st.tuples(
    st.integers(0, 3), st.sampled_from([None, "", " ", "a", "b", "a "]), st.sampled_from(["ok", "ok", "missing"])
)


@given(st.lists(SAID, max_size=12))
def test_caption_counts_agree_with_counting_by_hand(said: list[tuple[int, str | None, str]]) -> None:
    schema = {"cluster_id": pl.Int64, "caption": pl.String, "status": pl.String}
    rows = pl.DataFrame(said, schema=schema, orient="row").with_row_index("id").with_columns(policy.hash_caption())
    tables, counts = (
        function(rows, rows["caption"].gather) for function in (policy.repeated_captions, policy.count_captions)
    )
    both = Counter(
        (cluster, text.strip()) for cluster, text, status in said if status == "ok" and text and text.strip()
    )
    captions_of = Counter(cluster for cluster, _ in both)
    pictures_of = Counter(text for _, text in both)
    for name, counter in zip(counts, (both, captions_of, pictures_of), strict=True):
        repeated = sorted((count for count in counter.values() if count > 1), reverse=True)
        assert tables[name]["count"].to_list() == repeated
        assert counts[name] == {"cases": len(repeated), "total": sum(repeated)}
