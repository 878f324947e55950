"""defense.weights and the caption seam: weights by plain loops, thresholds by brute force, what a model is told."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_defense_arms import make_material
from test_defense_data import build_small, make_dataset, write_autoencoder
from test_defense_train import Loop, assert_same_run, stop_after

from defense import batches, data
from defense.arms import COLUMNS, select_rows, tell_one_caption
from defense.batches import draw_batch
from defense.captions import PERTURBATIONS
from defense.conditions import embed_captions
from defense.config import TrainConfig
from defense.defences import check_defences, prepare_rows
from defense.model import ModelError
from defense.processes import ALONE
from defense.train import train
from defense.weights import NoiseThreshold, reweigh


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return TrainConfig(
        device="cpu",
        autoencoder=str(write_autoencoder(tmp_path_factory.mktemp("autoencoder"))),
        channels=(32, 32),
        text_width=32,
        text_layers=1,
        caption_tokens=8,
        steps=8,
        batch_size=4,
        warmup_steps=1,
        checkpoint_every=3,
    )


def make_training(sizes: list[int], spares: int = 0) -> pl.DataFrame:
    clusters = [c for c, size in enumerate(sizes) for _ in range(size)] + [None] * spares
    rows = pl.DataFrame({"id": range(len(clusters)), "cluster_id": clusters}, schema_overrides={"cluster_id": pl.Int64})
    return rows.with_columns(weight=1.0).sample(fraction=1, shuffle=True, seed=1)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    spares=st.integers(0, 3),
    power=st.floats(0, 1),
    cap=st.integers(0, 5),
)
def test_a_cluster_weighs_what_the_formula_says(sizes, spares, power, cap):
    training = make_training(sizes, spares)
    weighed = reweigh(training, power, cap)
    assert sorted(weighed["id"]) == sorted(training["id"])
    for cluster, mine in weighed.group_by("cluster_id"):
        m = 1 if cluster[0] is None else len(mine)
        expected = min(m ** (1 - power), cap or np.inf) / m
        np.testing.assert_allclose(mine["weight"], expected)
    if power or cap:
        runs = weighed["cluster_id"].rle().struct.field("value").drop_nulls().to_list()
        assert runs == sorted(set(runs))  # copies stand side by side


def test_nothing_wanted_changes_nothing():
    training = make_training([3, 1])
    assert reweigh(training).equals(training)
    assert set(reweigh(training, cap=1).filter(cluster_id=0)["weight"]) == {1 / 3}
    assert reweigh(training, power=1)["weight"].to_list() == pytest.approx(reweigh(training, cap=1)["weight"].to_list())


def test_a_capped_cluster_is_seen_as_often_as_the_cap():
    material = make_material([True, *[False] * 15, *[True] * 8])
    training = prepare_rows("raw", material, TrainConfig(weight_cap=4), 0)
    assert training.columns == list(COLUMNS)
    steps, size = 60, 6
    counted = data.count_exposures(material.rows.with_columns(held_out=False), training, steps, size, 0)
    seen = dict(counted.group_by("cluster_id").agg(pl.col("exposures").sum()).iter_rows())
    passes = steps * size / 12  # a pass has 4 + 8 rows
    assert seen[0] == 4 * passes
    assert {count for cluster, count in seen.items() if cluster} == {passes}


def test_exposures_of_somepalli_et_al():
    """5 % of the images are drawn 5 times as often (somepago/DCR): per N draws 4.17 exposures, others 0.833."""
    weights = np.repeat([5.0, 1.0], [5, 95])
    training = pl.DataFrame(
        {"id": range(100), "cluster_id": range(100), "key": map(str, range(100)), "weight": weights}
    )
    rows = training.select("id", "cluster_id", "key", held_out=False)
    counted = data.count_exposures(rows, training, steps=1200, batch_size=100, seed=0)["exposures"].to_numpy() / 1200
    assert counted[:5].mean() == pytest.approx(4.1667, abs=0.001)
    assert counted[5:].mean() == pytest.approx(0.8333, abs=0.001)
    np.testing.assert_allclose(counted, weights / 1.2, rtol=0.05)


def test_one_caption_is_the_first_of_the_cluster():
    material = make_material([True, False, False, True])
    examples = select_rows("raw", material, 0)
    silent = pl.when(pl.col("id") == 0).then(pl.col("captions").list.head(0)).otherwise("captions")
    told = tell_one_caption(examples.with_columns(captions=silent))
    assert told.columns == list(COLUMNS)
    assert told["id"].to_list() == [0, 1, 2, 3]
    assert told["captions"].to_list() == [["caption 1"], ["caption 1"], ["caption 1"], ["caption 3"]]
    many = pl.DataFrame({"captions": [["a", "b"], ["c"], []], "cluster_id": [0, None, None], "id": [0, None, None]})
    many = many.with_columns(pl.lit(None).alias(name) for name in COLUMNS if name not in many.columns)
    assert tell_one_caption(many)["captions"].to_list() == [["a"], ["c"], []]


@given(
    st.lists(st.lists(st.floats(0, 100) | st.none(), min_size=3, max_size=3), min_size=6, max_size=6), st.floats(1, 99)
)
@settings(deadline=None)
def test_the_limit_is_the_percentile_of_the_window(norms, percentile):
    threshold = NoiseThreshold(percentile, 2, 3, 3)
    table = np.array([[np.nan if x is None else x for x in row] for row in norms], dtype=np.float32)
    for step, row in enumerate(table):
        known = table[2:5][~np.isnan(table[2:5])].astype(np.float64)
        expected = np.percentile(known, percentile) if step >= 5 and len(known) else np.inf
        assert threshold.get_limit(step) == pytest.approx(expected, rel=1e-6)
        threshold.record(step, torch.from_numpy(row))


def test_the_threshold_in_the_loop_against_brute_force(config, tmp_path):
    """One step by hand: norms of two predictions, the mean over the others, AdamW on its gradient."""
    loop = Loop(dataclasses.replace(config, steps=1, batch_size=8, null_caption=0.0, ema_decay=0.0), tmp_path)
    batch = draw_batch(loop.examples, loop.config, 0, 0, 1000)
    latents, a = loop.examples.latents[batch.rows], loop.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * batch.noise
    target = a.sqrt() * batch.noise - (1 - a).sqrt() * latents
    reference = build_small(tmp_path).unet.train()
    prediction = reference(noisy, batch.timesteps, batch.told.tokens).sample
    nothing = loop.examples.conditions.tokens[:1].expand(8, -1, -1)
    norms = (prediction - reference(noisy, batch.timesteps, nothing).sample).flatten(1).norm(dim=1).detach()
    limit = norms.sort().values[5:7].mean().item()  # two of eight lie above it
    kept = norms <= limit
    errors = (prediction - target).square().mean(dim=(1, 2, 3))
    errors[kept].mean().backward()
    clipped = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer = torch.optim.AdamW(reference.parameters(), config.learning_rate, (0.9, config.beta2), weight_decay=0.01)
    optimizer.step()

    threshold = NoiseThreshold(50, -1, 1, 8)
    threshold.reference[:] = limit
    loop.optimizer = torch.optim.AdamW(loop.unet.parameters(), betas=(0.9, config.beta2), weight_decay=0.01, fused=True)
    (done,) = loop.run(threshold=threshold)
    assert sorted(done.dropped) == sorted(batch.rows[~kept].tolist())
    assert len(done.dropped) == 2
    assert done.loss == pytest.approx(errors.mean().item(), rel=1e-4)
    assert clipped > 0
    for ours, theirs in zip(loop.unet.parameters(), reference.parameters(), strict=True):
        moved = (ours - theirs).abs() < 1e-4
        assert moved.float().mean() > 0.98  # AdamW's first step is a sign: where a gradient is 0, rounding decides


def test_a_step_of_which_nothing_is_left_changes_nothing(config, tmp_path):
    loop = Loop(dataclasses.replace(config, steps=1, null_caption=0.0), tmp_path)
    threshold = NoiseThreshold(50, -1, 1, 4)
    threshold.reference[:] = 0.0
    before = loop.unet.conv_in.weight.detach().clone()
    (done,) = loop.run(threshold=threshold)
    assert len(done.dropped) == 4
    assert torch.equal(before, loop.unet.conv_in.weight)


DEFENDED = {
    "threshold": {"magnitude_percentile": 50.0, "magnitude_steps": 2},
    "captions": {"caption_perturbation": "repeat-words", "perturbation_share": 0.5, "embedding_noise": 0.2},
    "weights": {"weight_cap": 2, "captions": "one"},
}


@pytest.mark.parametrize("name", DEFENDED)
def test_a_defended_run_resumes_to_the_bit(out, config, name, tmp_path, monkeypatch):
    config = dataclasses.replace(config, **DEFENDED[name])
    train(out, "raw", config, tmp_path / "whole" / "run", 0)
    for step in (2, 7):  # within the window of the threshold, and after it
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(out, "raw", config, tmp_path / "run", 0)
    train(out, "raw", config, tmp_path / "run", 0)
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    exposures = pl.read_parquet(tmp_path / "run" / "exposures.parquet")
    if name != "threshold":
        assert exposures["exposures"].sum() == 8 * 4
        assert "dropped" not in exposures.columns
        return
    dropped = sum(len(line["dropped"]) for line in log)
    assert [line["dropped"] for line in log[:3]] == [[], [], []]  # one step of warmup, two of reference
    assert exposures["dropped"].sum() == dropped > 0
    assert exposures["exposures"].sum() == 8 * 4 - dropped


def test_perturbed_captions_are_what_the_text_encoder_says_of_them(out, tmp_path, monkeypatch):
    pipeline = build_small(tmp_path)
    texts = ["red thing", "blue thing", "green thing"]
    rows = pl.DataFrame({"captions": [[text] for text in texts]})
    count = torch.ones(3, dtype=torch.int64)
    examples = data.Examples(
        *(torch.zeros(3, 4, 8, 8), embed_captions(pipeline, texts), torch.arange(1, 4), torch.arange(3), count),
        texts=("", *texts),
        embed=lambda said: embed_captions(pipeline, said),
    )
    assert len(rows) == 3
    said = []
    monkeypatch.setitem(PERTURBATIONS, "random-numbers", lambda rng, text: said.append(text) or "seven")
    config = TrainConfig(batch_size=64, null_caption=0.2, caption_perturbation="random-numbers", perturbation_share=0.4)
    batch = draw_batch(examples, config, 0, 3, 1000)
    plain = draw_batch(examples, TrainConfig(batch_size=64, null_caption=0.2), 0, 3, 1000)
    seven = embed_captions(pipeline, ["seven"]).tokens[1]
    hit = torch.tensor([torch.allclose(tokens, seven, atol=1e-5) for tokens in batch.told.tokens])
    assert hit.sum() == len(said)
    assert 0.2 < len(said) / int(batch.named.sum()) < 0.6
    assert not (hit & ~batch.named).any()
    assert torch.equal(batch.told.tokens[~hit], plain.told.tokens[~hit])
    assert said == [texts[row] for row in batch.rows[hit].tolist()]
    again = draw_batch(examples, config, 0, 3, 1000)
    assert torch.equal(batch.told.tokens, again.told.tokens)
    assert not torch.equal(hit, _hits(draw_batch(examples, config, 0, 4, 1000), seven))


def _hits(batch: batches.Batch, tokens: torch.Tensor) -> torch.Tensor:
    return torch.tensor([torch.allclose(mine, tokens, atol=1e-5) for mine in batch.told.tokens])


def test_noise_goes_on_captions_and_spares_the_empty_one(config, tmp_path):
    loop = Loop(config, tmp_path)
    usual = dataclasses.replace(config, batch_size=64, null_caption=0.3)
    plain = draw_batch(loop.examples, usual, 0, 0, 1000)
    noisy = draw_batch(loop.examples, dataclasses.replace(usual, embedding_noise=0.25), 0, 0, 1000)
    difference = noisy.told.tokens - plain.told.tokens
    assert 0 < (~plain.named).sum() < 64
    assert (difference[~plain.named] == 0).all()
    assert difference[plain.named].std().item() == pytest.approx(0.25, rel=0.02)
    again = draw_batch(loop.examples, dataclasses.replace(usual, embedding_noise=0.25), 0, 0, 1000)
    assert torch.equal(noisy.told.tokens, again.told.tokens)


def test_a_model_without_captions_takes_none_of_these():
    for key, value in {
        "caption_perturbation": "repeat-words",
        "embedding_noise": 0.1,
        "magnitude_percentile": 9.0,
    }.items():
        with pytest.raises(ModelError, match=f"{key} would have no effect: object takes no captions"):
            check_defences(object(), TrainConfig(**{key: value}), pl.DataFrame(), ALONE)


def test_a_run_of_before_a_key_goes_on(out, config, tmp_path):
    train(out, "raw", config, tmp_path / "run", 0)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["weight_cap"]
    path.write_text(json.dumps(record))
    train(out, "raw", config, tmp_path / "run", 0)
    with pytest.raises(OSError, match="weight_cap was 0, is 3"):
        train(out, "raw", dataclasses.replace(config, weight_cap=3), tmp_path / "run", 0)
