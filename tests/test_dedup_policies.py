"""Policies against brute force: who is kept by scope, beside a guarded split, with several copies; preferences."""

from itertools import combinations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import with_numbers

from dedup import clustering, manifest, policy, scopes, twins

N = 7
ORIENTATION = st.sampled_from(["r0", "r0", "r0", "r0", "m0", "r90"])
CLASS = st.sampled_from(["copy", "copy", "copy", "look-alike"])


@st.composite
def webs(draw: st.DrawFn) -> tuple[pl.DataFrame, list[int], dict[str, pl.Series]]:
    """Pairs, keeper order, and of each row: scope, whether it is guarded (and comes first), and published (then)."""
    ends = draw(st.lists(st.sampled_from(list(combinations(range(N), 2))), unique=True))
    rows = [(a, b, draw(CLASS), draw(ORIENTATION)) for a, b in ends]
    schema = {"a": pl.Int64, "b": pl.Int64, "class": pl.String, "orientation": pl.String}
    pairs = pl.DataFrame(rows, schema=schema, orient="row").with_columns(signal=pl.lit("pdq"))
    scope = draw(st.lists(st.sampled_from("ABT"), min_size=N, max_size=N))
    guard = draw(st.sampled_from(["T", None]))
    guarded = [name == guard for name in scope]
    published = draw(st.lists(st.sampled_from([False, False, True]), min_size=N, max_size=N))
    order = sorted(draw(st.permutations(range(N))), key=lambda row: (not guarded[row], not published[row]))
    told = {"scope": pl.Series(scope), "guarded": pl.Series(guarded), "published": pl.Series(published)}
    return pairs, order, told


def rank_of(order: list[int]) -> pl.Series:
    return pl.Series([order.index(row) for row in range(len(order))])


def decide_by_hand(pairs: pl.DataFrame, order: list[int], told: dict[str, pl.Series], most: int) -> list:
    """kept_id of every row, None where it is kept."""
    scope, guarded, published = told.values()
    copies = {
        frozenset(ends): turn
        for *ends, kind, turn in pairs.select("a", "b", "class", "orientation").iter_rows()
        if kind == "copy"
    }
    kept_id: list[int | None] = [None] * N
    for place, row in enumerate(order):
        for other in order[:place]:
            within = scope[row] == scope[other] and not published[row]
            may = (within or guarded[other]) and not guarded[row]
            if may and kept_id[other] is None and copies.get(frozenset((row, other))) == "r0":
                kept_id[row] = other
                break
    again: dict[int, int] = {}
    for row in order:
        other = kept_id[row]
        if other is not None and not guarded[other] and again.get(other, 1) < most:
            again[other] = again.get(other, 1) + 1
            kept_id[row] = None
    return kept_id


@settings(deadline=None)
@given(webs(), st.integers(1, 4))
def test_decisions_agree_with_brute_force(web: tuple, most: int) -> None:
    pairs, order, told = web
    rank = rank_of(order)
    first = clustering.decide(pairs, rank, **told)
    found = clustering.keep_more(first, rank, most, told["guarded"])
    assert found["kept_id"].to_list() == decide_by_hand(pairs, order, told, most)
    assert (found["keep"] == found["kept_id"].is_null()).all()
    assert found["cluster_id"].equals(first["cluster_id"])
    stars = found["cluster_id"]
    for row, kept_id in enumerate(found["kept_id"]):
        assert kept_id is None or stars[row] == stars[kept_id]
        assert found["keep"][stars[row]]
        assert most > 1 or first["kept_id"][row] == kept_id  # one copy is what `decide` says


@settings(deadline=None)
@given(webs(), st.integers(1, 3), st.permutations(range(N)))
def test_decisions_do_not_depend_on_the_order_of_arrival(web: tuple, most: int, new: list[int]) -> None:
    """new: where each row is moved to."""
    pairs, order, told = web

    def run(pairs: pl.DataFrame, order: list[int], told: dict[str, pl.Series]) -> pl.DataFrame:
        rank = rank_of(order)
        return clustering.keep_more(clustering.decide(pairs, rank, **told), rank, most, told["guarded"])

    moved = pl.Series(new)
    a, b = moved.gather(pairs["a"]), moved.gather(pairs["b"])
    low, high = (pl.select(pick(a, b)).to_series() for pick in (pl.min_horizontal, pl.max_horizontal))
    inverse = pl.Series([new.index(row) for row in range(N)])
    elsewhere = {name: column.gather(inverse) for name, column in told.items()}
    other = run(pairs.with_columns(a=low, b=high), [new[row] for row in order], elsewhere)
    one = run(pairs, order, told)
    assert [None if k is None else new[k] for k in one["kept_id"]] == other["kept_id"].gather(moved).to_list()
    assert one["keep"].to_list() == other["keep"].gather(moved).to_list()


ROWS = st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ABT")), min_size=2, max_size=8)


@settings(deadline=None)
@given(ROWS, st.booleans(), st.randoms())
def test_equal_files_stand_in_for_each_other(contents: list[tuple[str, str]], guard: bool, random) -> None:  # type: ignore[no-untyped-def]
    """All pairs that decide something are there: within a scope, with what is guarded, and of the first of all."""
    n = len(contents)
    sha256, scope = zip(*contents, strict=True)
    guarded = [guard and name == "T" for name in scope]
    order = sorted(random.sample(range(n), n), key=lambda row: not guarded[row])
    rows = pl.DataFrame({"id": range(n), "sha256": sha256, "scope": scope, "guarded": guarded})
    rows = rows.with_columns(
        pl.col("scope").cast(pl.Categorical),
        pl.col("sha256").rank("dense").alias("picture"),
        status=pl.lit("ok"),
        width=pl.lit(9),
        height=pl.lit(9),
    )
    by_content = {name: sha256.index(name) for name in sha256}
    known = [(a, b) for a, b in combinations(sorted(by_content.values()), 2) if {sha256[a], sha256[b]} != {"x", "z"}]
    told = {"class": "copy", "signal": "pdq", "orientation": "r90", "score": 0.9}
    pairs = pl.DataFrame(known, schema={"a": pl.Int64, "b": pl.Int64}, orient="row")
    pairs = manifest.conform(pairs.with_columns(pl.lit(v).alias(k) for k, v in told.items()), manifest.PAIRS_SCHEMA)
    found = twins.stand_in(pairs, rows, rank_of(order))
    alike = {frozenset((sha256[a], sha256[b])) for a, b in known}
    firsts = {(sha256[row], scope[row]): row for row in reversed(order)}
    of_all = {sha256[row]: row for row in reversed(order)}
    expected = set()
    for p, q in combinations(firsts.values(), 2):
        if frozenset((sha256[p], sha256[q])) in alike:
            both_first = of_all[sha256[p]] == p and of_all[sha256[q]] == q
            beside = any(guarded[end] and of_all[sha256[end]] == end for end in (p, q))
            if scope[p] == scope[q] or both_first or beside:
                expected.add((min(p, q), max(p, q)))
    assert set(found.select("a", "b").rows()) == expected
    assert len(found) == len(expected)
    for a, b, turn in found.select("a", "b", "orientation").iter_rows():  # as in the pair it was taken from
        same_way = by_content[sha256[a]] < by_content[sha256[b]]
        assert turn == ("r90" if same_way else "r270")
    equal = twins.pair_equal(rows, rank_of(order))
    assert all(sha256[a] == sha256[b] for a, b in equal.select("a", "b").iter_rows())
    joined = clustering.components(equal, n).tolist()
    assert all((joined[p] == joined[q]) == (sha256[p] == sha256[q]) for p, q in combinations(range(n), 2))


def test_equal_files_in_another_scope_join_the_star_of_a_dropped_one() -> None:
    """0 ← 1 in A, and 2 in B has the bytes of 1."""
    pairs = pl.DataFrame({"a": [0, 1], "b": [1, 2], "class": "copy", "signal": ["pdq", "bytes"], "orientation": "r0"})
    found = clustering.decide(pairs, pl.Series([0, 1, 2]), scope=pl.Series(["A", "A", "B"]))
    assert found["kept_id"].to_list() == [None, 0, None]
    assert found["cluster_id"].to_list() == [0, 0, 0]
    assert scopes.count_leaks(scopes.list_leaks(found.with_row_index("id"), pl.Series(["A", "A", "B"]))) == [
        {"scopes": ["A", "B"], "pictures": 1, "rows": [1, 1]}
    ]


# Preferences


def ranked(prefer: str, *rows: dict, partners: list[int] | None = None) -> list[int]:
    usual = {"status": "ok", "width": 4, "height": 2, "size": 8, "caption": "a", "sha256": "0", "link": False}
    usual |= {"format": "JPEG", "source": "x", "shard": None}
    table = pl.DataFrame(
        [usual | {"key": f"{n}"} | row for n, row in enumerate(rows)], schema_overrides={"shard": pl.String}
    )
    counted = None if partners is None else pl.Series(partners)
    return policy.keeper_rank(with_numbers(table), partners=counted, prefer=policy.parse_preferences(prefer)).to_list()


def test_what_is_preferred_comes_first() -> None:
    large, small = {"width": 9}, {"width": 4, "size": 99}
    assert ranked("", large, small) == [0, 1]
    assert ranked("bytes", large, small) == [1, 0]
    assert ranked("bytes", large, {"width": 4}) == [0, 1]  # what is not named follows in the usual order
    assert ranked("caption", large | {"caption": " "}, small) == [1, 0]
    assert ranked("first", small, large) == [0, 1]
    assert ranked("source:y", large, small | {"source": "y"}) == [1, 0]
    assert ranked("source:z,source:y", large, {"source": "y"}, {"source": "z"}) == [2, 1, 0]
    assert ranked("split:test", large, {"source": "test"}) == [1, 0]
    assert ranked("split:test", large, {"source": "data", "shard": "data/test-00000-of-00002.parquet"}) == [1, 0]
    assert ranked("quality", large, {"format": "PNG", "size": 1}) == [1, 0]  # nothing was lost
    assert ranked("quality", large, {"size": 7}) == [1, 0]  # 8 bytes for 18 pixels, and 7 for 8
    assert ranked("quality", {"size": 7}, {"size": 9}) == [1, 0]
    other = {"sha256": "1"}
    assert ranked("", {}, other | small, partners=[1, 2]) == [1, 0]
    assert ranked("resolution", large, other, partners=[1, 9]) == [0, 1]
    assert ranked("", large, other, partners=[3, 4]) == [0, 1]  # alike in powers of two
    assert ranked("medoid", large, other, partners=[3, 4]) == [1, 0]
    assert ranked("first", {"status": "missing"}, {}) == [1, 0]


def test_the_medoid_counts_all_copies_when_it_is_asked_for() -> None:
    pairs = pl.DataFrame({"a": [0, 1], "b": [1, 2], "class": "copy", "signal": ["pdq", "copy"]})
    pairs = pairs.with_columns(inliers=pl.Series([None, 30]))
    assert policy.count_partners(pairs, 3).to_list() == [0, 1, 1]
    assert policy.count_partners(pairs, 3, ("medoid",)).to_list() == [1, 2, 1]


@pytest.mark.parametrize(
    ("prefer", "said"),
    [
        (
            "resolutoin",
            r"^--prefer resolutoin: no such criterion; did you mean resolution\? There are resolution, qual",
        ),
        ("bytes,sauce:laion", r"^--prefer sauce:laion: no such criterion; did you mean source\?"),
        ("zzz", r"^--prefer zzz: no such criterion; There are .*source:NAME, split:NAME$"),
        ("bytes:3", r"no such criterion"),
        ("source", r"^--prefer source: a source needs its name, as in source:laion$"),
        ("split:", r"a split needs its name"),
        ("bytes,,caption", r"^--prefer : no such criterion"),
    ],
)
def test_an_unknown_criterion_is_one_clear_line(prefer: str, said: str) -> None:
    with pytest.raises(policy.PolicyError, match=said) as error:
        policy.parse_preferences(prefer)
    assert "\n" not in str(error.value)


def test_names_that_no_row_has() -> None:
    rows = pl.DataFrame({"source": ["laion", "cc12m"], "shard": [None, "data/train-00000-of-00001.parquet"]})
    policy.check_names(rows, ("source:laion", "split:train", "bytes"), "laion")
    with pytest.raises(
        policy.PolicyError, match=r"^--prefer source:lion: there is no such source; did you mean laion\? T"
    ):
        policy.check_names(rows, ("source:lion",), None)
    with pytest.raises(
        policy.PolicyError, match=r"^--against-split tset: there is no such split; There are laion, train$"
    ):
        policy.check_names(rows, (), "tset")


def test_the_splits_that_files_tell() -> None:
    names = ["data/train-00000-of-00002.parquet", "en/val_x-00001-of-00002-ab12.parquet#image", "test-1.parquet", None]
    rows = pl.DataFrame({"shard": names, "source": ["data", "en", "s", "top"]})
    assert rows.select(scopes.SPLIT).to_series().to_list() == ["train", "val_x", "s", "top"]
    guarded = scopes.name_scopes(rows, "none", "train")
    assert guarded["scope"].to_list() == ["train", "", "", ""]
    assert guarded["guarded"].to_list() == [True, False, False, False]


def test_losses_and_leaks_are_counted() -> None:
    keep = [True, False, False, True, True, True, True, False]
    rows = pl.DataFrame({"id": range(8), "keep": keep, "cluster_id": [0, 0, 0, 0, 4, 4, 4, 4]})
    scope = pl.Series(["a", "a", "a", "b", "a", "b", "c", "c"])
    lost = {"scope": "a", "rows": 4, "kept": 2}
    assert scopes.list_losses(rows, scope, 0.5) == []
    assert scopes.list_losses(rows, scope, 0.4) == [lost, {"scope": "c", "rows": 2, "kept": 1}]
    assert scopes.count_leaks(scopes.list_leaks(rows, scope)) == [
        {"scopes": ["a", "b"], "pictures": 2, "rows": [2, 2]},
        {"scopes": ["a", "c"], "pictures": 1, "rows": [1, 1]},
        {"scopes": ["b", "c"], "pictures": 1, "rows": [1, 1]},
    ]
    assert scopes.count_leaks(scopes.list_leaks(rows, pl.repeat("", 8, eager=True))) == []
