"""defense.arms: which rows each arm trains on, with which captions, weights and steps; against plain loops."""

import collections

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import manifest
from defense import cli, data
from defense.arms import ARMS, COLUMNS, ArmError, Material, count_steps, select_rows

REFILLING = ("refill", "oracle", "hash")


def make_rows(keep: list[bool], unreadable: int = 0) -> pl.DataFrame:
    """Rows of which a dropped one belongs to the last kept one before it."""
    n = len(keep)
    keeper = [max([j for j in range(i + 1) if keep[j]], default=0) for i in range(n)]
    rows = pl.DataFrame(
        {
            "id": range(n + unreadable),
            "cluster_id": keeper + list(range(n, n + unreadable)),
            "key": [f"k{i}" for i in range(n + unreadable)],
            "caption": [f"caption {i}" for i in range(n + unreadable)],
            "status": ["ok"] * n + ["unreadable"] * unreadable,
            "keep": keep + [False] * unreadable,
            "kept_id": [None if keep[i] else keeper[i] for i in range(n)] + [None] * unreadable,
        },
        schema_overrides={"kept_id": pl.Int64},
    )
    return manifest.conform(rows)


def make_spare(n: int) -> pl.DataFrame:
    rows = pl.DataFrame({"key": [f"s{i}" for i in range(n)], "caption": [f"spare {i}" for i in range(n)]})
    return manifest.conform(rows).select("shard", "offset", "size", "key", "caption")


def make_pairs(pairs: list[tuple[int, int, str]]) -> pl.LazyFrame:
    """Upright copies (a, b, signal)."""
    table = pl.DataFrame(pairs, schema=["a", "b", "signal"], orient="row").with_columns(
        pl.lit("copy").alias("class"), orientation=pl.lit("r0"), score=pl.lit(1.0)
    )
    return manifest.conform(table, manifest.PAIRS_SCHEMA).lazy()


def make_material(keep: list[bool], unreadable: int = 0, spares: int = 30) -> Material:
    """Every dropped row was found by its hash, and is a planted copy of what it was dropped for."""
    rows = make_rows(keep, unreadable)
    dropped = rows.filter(pl.col("kept_id").is_not_null())
    pairs = [(a, b, "pdq") for a, b in dropped.select("kept_id", "id").iter_rows()]
    canary = pl.when(pl.col("kept_id").is_not_null()).then("kept_id").otherwise("id")
    return Material(
        rows,
        make_spare(spares),
        truth=rows.select("key", canary=canary.cast(pl.String)),
        pairs=make_pairs(pairs) if pairs else make_pairs([(0, 1, "pdq")]).clear(),
    )


def choose(arm: str, material: Material, seed: int = 0) -> pl.DataFrame:
    return ARMS[arm](material, seed)


@settings(deadline=None)
@given(keep=st.lists(st.booleans(), max_size=20), unreadable=st.integers(0, 3), seed=st.integers(0, 9))
def test_rows_places_and_weights(keep, unreadable, seed):
    keep = [True, *keep]
    n, kept = len(keep), [i for i, k in enumerate(keep) if k]
    material = make_material(keep, unreadable)
    chosen = {arm: choose(arm, material, seed) for arm in ARMS}
    for arm, examples in chosen.items():
        assert tuple(examples.columns) == COLUMNS
        assert examples.schema == chosen["raw"].schema
        assert arm == "reweighted" or set(examples["weight"]) == {1.0}
    assert chosen["raw"]["id"].to_list() == list(range(n))
    assert chosen["dedup"]["id"].to_list() == chosen["dedup-exposure"]["id"].to_list() == kept
    for arm in REFILLING:  # here all three find the same copies
        assert chosen[arm]["id"].to_list() == [i if k else None for i, k in enumerate(keep)]
        fresh = chosen[arm].filter(pl.col("id").is_null())
        assert fresh["key"].to_list() == [f"s{i}" for i in range(n - len(kept))]
    drawn = chosen["random-drop"]["id"].to_list()
    assert len(drawn) == len(kept)
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(n))
    size = collections.Counter(material.rows["cluster_id"][:n])
    weighted = chosen["reweighted"].select("id", "cluster_id", "weight").rows()
    assert [(c, i) for i, c, _ in weighted] == sorted((material.rows["cluster_id"][i], i) for i in range(n))
    assert all(weight == 1 / size[cluster] for _, cluster, weight in weighted)


def test_random_drop_depends_on_the_seed_alone_and_takes_every_row_sometimes():
    material = make_material([True, False, False] * 4)
    drawn = [tuple(choose("random-drop", material, seed)["id"]) for seed in range(60)]
    assert drawn[3] == tuple(choose("random-drop", material, 3)["id"])
    counts = collections.Counter(row for rows in drawn for row in rows)
    assert set(counts) == set(range(12))
    assert max(counts.values()) < 2.5 * min(counts.values())


def test_a_copy_keeps_its_caption_in_raw_and_leaves_it_behind_when_dropped():
    material = make_material([True, False, True])
    rows = material.rows.with_columns(captions=pl.Series([["chosen by policy"], None, None], dtype=pl.List(pl.String)))
    material = Material(rows, material.spare, material.truth, material.pairs)
    texts = {arm: choose(arm, material)["captions"].to_list() for arm in ARMS}
    assert texts["raw"] == texts["reweighted"] == [["caption 0"], ["caption 1"], ["caption 2"]]
    assert texts["dedup"] == [["chosen by policy"], ["caption 2"]]
    assert texts["refill"] == [["chosen by policy"], ["spare 0"], ["caption 2"]]
    assert texts["oracle"] == texts["hash"] == [["caption 0", "caption 1"], ["spare 0"], ["caption 2"]]


@pytest.mark.parametrize("arm", ARMS)
def test_rows_without_a_caption_stay_with_the_empty_one(arm):
    material = make_material([True, True, True])
    rows = material.rows.with_columns(caption=pl.Series([None, "  ", "text"]))
    material = Material(rows, material.spare, material.truth, material.pairs)
    assert choose(arm, material)["captions"].to_list() == [[], [], ["text"]]


def test_the_oracle_knows_copies_that_deduplication_missed_and_forgives_what_it_took_for_one():
    """Rows 0, 2 and 3 are one canary; deduplication dropped 1 for 0, and 2."""
    material = make_material([True, False, False, True])
    truth = pl.DataFrame({"key": ["k0", "k2", "k3", None], "canary": ["a", "a", "a", "b"]})
    material = Material(material.rows, material.spare, truth)
    assert choose("oracle", material)["id"].to_list() == [0, 1, None, None]


def test_the_hash_level_keeps_what_only_the_copy_level_finds():
    """0 ~ 1 by hash; 2 and 3 were dropped for 0 as crops, and are equal to each other."""
    material = make_material([True, False, False, False])
    pairs = make_pairs([(0, 1, "pdq"), (0, 2, "copy"), (0, 3, "copy"), (2, 3, "bytes")])
    examples = choose("hash", Material(material.rows, material.spare, pairs=pairs))
    assert examples["id"].to_list() == [0, None, 2, None]
    assert examples["captions"].to_list() == [
        ["caption 0", "caption 1"],
        ["spare 0"],
        ["caption 2", "caption 3"],
        ["spare 1"],
    ]


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.sampled_from(["pdq", "copy"])), max_size=25),
    keep=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_the_hash_level_deletes_only_against_a_survivor(pairs, keep):
    linked = {(min(a, b), max(a, b)): (min(a, b), max(a, b), signal) for a, b, signal in pairs if a != b}
    table = make_pairs(list(linked.values()) or [(0, 1, "copy")])
    examples = choose("hash", Material(make_rows(keep), make_spare(12), pairs=table))
    stays = [row is not None for row in examples["id"]]
    hashed = [(a, b) for a, b, signal in linked.values() if signal == "pdq"]
    partners = {i: {a + b - i for a, b in hashed if i in (a, b)} for i in range(12)}
    assert not any(stays[a] and stays[b] for a, b in hashed)
    assert all(stays[i] or any(stays[j] for j in partners[i]) for i in range(12))


@pytest.mark.parametrize("arm", REFILLING)
def test_refilling_needs_spare_images(arm):
    full = make_material([True, False, False])
    for spare, message in ((None, "unmemorize plant"), (make_spare(1), "needs 2 spare images, the dataset has 1")):
        material = Material(full.rows, spare, full.truth, full.pairs)
        with pytest.raises(ArmError, match=f"{arm} needs .*{message}|{arm} {message}"):
            select_rows(arm, material, 0)


def test_an_arm_that_lacks_what_it_needs():
    rows, spare = make_rows([True, False]), make_spare(1)
    with pytest.raises(ArmError, match="oracle needs the truth"):
        select_rows("oracle", Material(rows, spare), 0)
    with pytest.raises(ArmError, match="hash needs pairs"):
        select_rows("hash", Material(rows, spare), 0)


def test_an_unknown_arm_lists_the_known_ones():
    with pytest.raises(ArmError, match="'rwa': choose one of raw, refill, dedup, dedup-exposure, "):
        select_rows("rwa", make_material([True]), 0)
    assert all(arm in cli.ARMS for arm in ARMS)


@pytest.mark.parametrize("arm", ["raw", "dedup", "random-drop", "reweighted"])
def test_an_empty_arm_is_an_error(arm):
    with pytest.raises(ArmError, match="no readable row"):
        select_rows(arm, make_material([], unreadable=2), 0)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("raw", {8: 8 / 20, 4: 4 / 20, 1: 1 / 20}),
        ("refill", {8: 1 / 20, 4: 1 / 20, 1: 1 / 20}),
        ("oracle", {8: 1 / 20, 4: 1 / 20, 1: 1 / 20}),
        ("hash", {8: 1 / 20, 4: 1 / 20, 1: 1 / 20}),
        ("dedup", {8: 1 / 10, 4: 1 / 10, 1: 1 / 10}),
        ("dedup-exposure", {8: 1 / 20, 4: 1 / 20, 1: 1 / 20}),
        ("reweighted", {8: 1 / 10, 4: 1 / 10, 1: 1 / 10}),
    ],
)
def test_exposures_of_a_cluster_are_those_of_the_design(arm, expected):
    """Clusters of 8, 4 and eight times 1 rows: N0 = 20, N1 = 10. Per image that is seen, in units of S · B."""
    material = make_material([True, *[False] * 7, True, *[False] * 3, *[True] * 8])
    steps, batch_size, seed = 250, 6, 5
    training = select_rows(arm, material, seed)
    counted = data.count_exposures(
        material.rows.with_columns(held_out=False), training, count_steps(arm, material, steps), batch_size, seed
    )
    weights = data.pack_weights(training)
    seen = collections.Counter()
    for step in range(count_steps(arm, material, steps)):
        seen.update(training["key"].gather(data.draw_rows(len(training), batch_size, seed, step, weights)).to_list())
    assert dict(seen) == {key: count for key, count in counted.select("key", "exposures").iter_rows() if count}
    by_cluster = counted.drop_nulls("cluster_id").group_by("cluster_id").agg(pl.col("exposures").sum(), m=pl.len())
    for m, total in by_cluster.select("m", "exposures").iter_rows():
        assert total == pytest.approx(expected[m] * steps * batch_size, abs=m)


def test_the_exposure_of_random_drop_keeps_the_copies():
    material = make_material([True, *[False] * 7, True, *[False] * 3, *[True] * 8])
    kept = np.mean(
        [select_rows("random-drop", material, seed).filter(pl.col("cluster_id") == 0).height for seed in range(200)]
    )
    assert kept == pytest.approx(8 * 10 / 20, abs=0.3)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_a_weighted_pass_takes_one_row_of_every_cluster(sizes, seed):
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    weights = np.repeat(1 / np.array(sizes), sizes).tobytes()
    drawn = data.draw_rows(len(cluster), len(sizes), seed, 7, weights)
    assert sorted(cluster[drawn]) == list(range(len(sizes)))
    whole = data.draw_rows(len(cluster), 3 * len(sizes), seed, 2, weights)  # passes 6, 7 and 8
    assert whole[len(sizes) : 2 * len(sizes)].tolist() == drawn.tolist()


def test_weights_are_the_shares_of_draws():
    weights = np.array([0.5, 0.5, 1.0, 0.25, 0.75])
    drawn = np.concatenate([data.draw_rows(5, 4, 0, step, weights.tobytes()) for step in range(3000)])
    np.testing.assert_allclose(np.bincount(drawn) / 12000 * 4, weights / weights.sum() * 4, atol=0.03)
    assert data.pack_weights(pl.DataFrame({"weight": [1.0, 1.0]})) == b""
    assert data.pack_weights(pl.DataFrame({"weight": [1.0, 0.5]})) == np.array([1.0, 0.5]).tobytes()
