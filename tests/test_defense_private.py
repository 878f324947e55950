"""defense.private: gradients against one image at a time, ε against Opacus, and what cannot be private."""

import dataclasses
import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.utils import get_noise_multiplier
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from test_defense_data import build_small, make_dataset, write_autoencoder
from test_defense_train import Loop, assert_same_run, stop_after

from defense import data, lora
from defense.arms import ArmError
from defense.config import TrainConfig
from defense.defences import check_defences
from defense.private import PrivacyError, PrivateGradient, assert_changed, describe, protect_group, spend
from defense.processes import ALONE, Processes
from defense.train import train

CLIP = 1.2  # some gradients of the tests are longer, some are not


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
        steps=6,
        batch_size=4,
        warmup_steps=2,
        checkpoint_every=4,
        dp_noise_multiplier=0.7,
        noise_multiplicity=2,
    )


def make_private(unet, multiplicity=1, **options):
    optimizer = torch.optim.AdamW([weight for weight in unet.parameters() if weight.requires_grad], fused=True)
    given = {"noise_multiplier": 1e-9, "max_grad_norm": CLIP, "batch_size": 4} | options
    return PrivateGradient(unet, optimizer, multiplicity=multiplicity, **given)


def measure(unet, x, t, c):
    return unet(x, t, c, return_dict=False)[0].square().flatten(1).mean(dim=1)  # (B,)


@pytest.mark.parametrize(("rank", "multiplicity"), [(0, 1), (0, 3), (2, 2)])
def test_clipped_gradients_are_those_of_one_image_at_a_time(tmp_path, rank, multiplicity):
    unet = build_small(tmp_path).unet.train()
    if rank:
        lora.add_lora(unet, rank, 0, ("to_q", "to_v", "conv1"), 0)
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, std=0.1)  # so that A has a gradient, too
    images = 5
    n = images * multiplicity
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, 8, 8, generator=generator) * torch.linspace(0.1, 3, n).view(-1, 1, 1, 1)
    t, c = torch.arange(n) * 50, torch.randn(n, 8, 32, generator=generator)
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    expected, norms = [torch.zeros_like(weight) for weight in trained], []
    for image in range(images):
        mine = slice(image * multiplicity, (image + 1) * multiplicity)
        found = torch.autograd.grad(measure(unet, x[mine], t[mine], c[mine]).mean(), trained)
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in found)))
        for total, gradient in zip(expected, found, strict=True):
            total += gradient * min(1, CLIP / norms[-1]) / 4
    assert min(norms) < CLIP < max(norms) or rank  # some are clipped, some are not
    private = make_private(unet, multiplicity)
    for part in torch.arange(n).split(2 * multiplicity):  # in parts, the last one smaller
        private.add(measure(unet, x[part], t[part], c[part]))
    private.finish(0, 0)
    for weight, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)
    private.close()
    assert not any(hasattr(weight, "grad_sample") or hasattr(weight, "summed_grad") for weight in trained)


def test_the_noise_has_its_size_and_comes_from_seed_and_step(tmp_path):
    unet = build_small(tmp_path).unet.train()
    private = make_private(unet, noise_multiplier=3.0, max_grad_norm=0.5, batch_size=10)
    drawn = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        private.finish(seed, step)  # no image came: noise alone
        drawn.append(torch.cat([weight.grad.flatten() for weight in unet.parameters()]))
    assert drawn[0].std().item() == pytest.approx(3 * 0.5 / 10, rel=0.01)
    assert abs(drawn[0].mean().item()) < 4 * drawn[0].std().item() / math.sqrt(len(drawn[0]))
    assert torch.equal(drawn[0], drawn[1])
    assert all(abs(torch.corrcoef(torch.stack([drawn[0], other]))[0, 1]) < 0.02 for other in drawn[2:])


def test_gradients_that_do_not_add_up_are_noticed(tmp_path):
    """Opacus 1.6 reads convolutions in channels_last as if they were in the usual format."""
    unet = build_small(tmp_path).unet.train().to(memory_format=torch.channels_last)
    private = make_private(unet)
    for handle in private.handles:
        handle.remove()
    x = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(PrivacyError, match="do not add up in ") as caught:
        private.add(measure(unet, x, torch.arange(3), torch.randn(3, 8, 32)))
    assert "\n" not in str(caught.value)


def test_a_layer_without_hooks_is_noticed(tmp_path):
    unet = build_small(tmp_path).unet.train()
    private = make_private(unet)
    private.hooks.disable_hooks()
    with pytest.raises(PrivacyError, match=r"conv_in.weight has no gradients of single images"):
        private.add(measure(unet, torch.randn(3, 4, 8, 8), torch.arange(3), torch.randn(3, 8, 32)))


def test_weights_that_do_not_train_are_noticed():
    """What opacus #820 reports: a falling loss, a right ε, and weights that nobody stepped."""
    weights = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("a", "b")}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    weights["a"].data += 1
    with pytest.raises(PrivacyError, match="1 of 2 weights do not train, such as b"):
        assert_changed(before, weights)
    assert_changed({"a": before["a"]}, weights)


def test_rows_come_independently_and_as_often_as_the_accountant_is_told():
    n, size, steps = 40, 6, 3000
    drawn = [data.draw_poisson(n, size, 0, step) for step in range(steps)]
    taken = np.zeros((steps, n))
    for step, rows in enumerate(drawn):
        taken[step, rows] = 1
    rate = size / n
    error = math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(taken.mean(axis=0) - rate).max() < 4.5 * error
    correlation = np.corrcoef(taken.T)[~np.eye(n, dtype=bool)]
    assert np.abs(correlation).max() < 5 / math.sqrt(steps)
    lengths = taken.sum(axis=1)
    assert lengths.var() == pytest.approx(n * rate * (1 - rate), rel=0.15)  # batches of a fixed size would have 0


def test_epsilon_is_that_of_opacus_step_by_step():
    accountant = PRVAccountant()
    for _ in range(50):
        accountant.step(noise_multiplier=1.1, sample_rate=0.05)
    assert spend(1.1, 1e-5, 0.05, 50) == accountant.get_epsilon(1e-5)
    assert spend(1.1, 1e-5, 0.05, 100) > spend(1.1, 1e-5, 0.05, 50)


@given(epsilon=st.floats(0.01, 5), m=st.integers(1, 200))
@settings(deadline=None)
def test_copies_are_protected_as_a_group(epsilon, m):
    said = protect_group(epsilon, 1e-6, m)
    exact = math.log(m) + (m - 1) * epsilon + math.log(1e-6)
    assert said["copies"] == m
    if exact >= 0:
        assert (said["guarantee"], said["epsilon"], said["delta"]) == ("no guarantee", None, None)
    else:
        assert said["epsilon"] == pytest.approx(m * epsilon)
        assert said["delta"] == pytest.approx(math.exp(exact))
    alone = protect_group(epsilon, 1e-6, 1)
    assert (alone["epsilon"], alone["delta"]) == (epsilon, 1e-6)


def test_a_private_run_says_what_it_spent_and_resumes_to_the_bit(out, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, save_steps=(5,))
    train(out, "raw", config, tmp_path / "whole" / "run", 0)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(out, "raw", config, tmp_path / "run", 0)
    assert not (tmp_path / "run" / "privacy.json").exists()
    train(out, "raw", config, tmp_path / "run", 0)
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")
    said = [json.loads((tmp_path / name / "privacy.json").read_text()) for name in ("run", "whole/run", "run/steps/5")]
    assert said[0] == said[1]
    assert (said[0]["steps"], said[0]["rows"], said[0]["sampling_rate"]) == (6, 8, 0.5)
    assert said[0]["epsilon"] == spend(0.7, 1e-5, 0.5, 6)
    assert said[2]["epsilon"] == spend(0.7, 1e-5, 0.5, 5) < said[0]["epsilon"]
    assert [(group["copies"], group["clusters"]) for group in said[0]["groups"]] == [(1, 5), (3, 1)]
    exposures = pl.read_parquet(tmp_path / "run" / "exposures.parquet")
    assert exposures["exposures"].sum() == sum(len(data.draw_poisson(8, 4, 0, step)) for step in range(6))


def test_a_target_finds_the_noise_that_opacus_finds(out, config, tmp_path):
    wanted = dataclasses.replace(config, steps=2, dp_noise_multiplier=0.0, dp_epsilon=3.0)
    train(out, "raw", wanted, tmp_path / "run", 0)
    said = json.loads((tmp_path / "run" / "privacy.json").read_text())
    expected = get_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, sample_rate=0.5, steps=2, accountant="prv")
    assert said["noise_multiplier"] == expected
    assert 2.98 < said["epsilon"] <= 3.0


def test_lora_and_privacy_train_what_is_exported(tmp_path, config):
    small = dataclasses.replace(config, base="somewhere", lora_rank=2, steps=1, noise_multiplicity=1)
    loop = Loop(dataclasses.replace(config, noise_multiplicity=1, steps=1), tmp_path)
    lora.add_lora(loop.unet, 2, 0, small.lora_targets, 0)
    before = {name: weight.clone() for name, weight in get_peft_model_state_dict(loop.unet).items()}
    frozen = loop.unet.conv_in.weight.clone()
    loop.weights = {name: weight for name, weight in loop.unet.named_parameters() if weight.requires_grad}
    loop.average = {name: weight.detach().clone() for name, weight in loop.weights.items()}
    loop.optimizer = torch.optim.AdamW(loop.weights.values(), fused=True)
    private = PrivateGradient(
        loop.unet, loop.optimizer, noise_multiplier=1.0, max_grad_norm=1.0, batch_size=4, multiplicity=1
    )
    list(loop.run(private=private))
    private.close()
    after = get_peft_model_state_dict(loop.unet)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(frozen, loop.unet.conv_in.weight)


def test_an_empty_batch_is_a_step_of_noise(config, tmp_path, monkeypatch):
    monkeypatch.setattr("defense.batches.draw_poisson", lambda *arguments: np.array([], dtype=np.int64))
    loop = Loop(dataclasses.replace(config, steps=2), tmp_path)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "batch_size": 4, "multiplicity": 2}
    private = PrivateGradient(loop.unet, loop.optimizer, **options)
    first = loop.unet.conv_in.weight.detach().clone()
    assert all(math.isnan(done.loss) for done in loop.run(private=private))
    assert not torch.equal(first, loop.unet.conv_in.weight)


def test_what_does_not_go_with_privacy(out, config, tmp_path):
    with pytest.raises(ArmError, match="dp_noise_multiplier does not go with the arm reweighted"):
        train(out, "reweighted", config, tmp_path / "run", 0)
    pipeline, rows = build_small(tmp_path), pl.DataFrame({"id": range(8)})
    cases = [
        (config, Processes(0, 2), "several processes"),
        (dataclasses.replace(config, batch_size=9), ALONE, "batch_size = 9 is more than the 8 rows"),
        (dataclasses.replace(config, dp_delta=0.2), ALONE, "dp_delta = 0.2 would publish one of 8 rows"),
    ]
    for wrong, processes, message in cases:
        with pytest.raises(PrivacyError, match=message):
            check_defences(pipeline, wrong, rows, processes)
    check_defences(pipeline, config, rows, ALONE)


def test_the_description_is_json_with_every_multiplicity():
    numbers = {"rows": 100, "batch_size": 10, "steps": 20, "max_grad_norm": 1.0, "multiplicity": 4}
    said = describe(noise_multiplier=2.0, delta=1e-5, copies={1: 36, 64: 1}, **numbers)
    assert json.loads(json.dumps(said)) == said
    assert [group["guarantee"] for group in said["groups"]] == ["differential privacy", "no guarantee"]


def test_the_exported_model_is_the_average(out, config, tmp_path):
    """save_steps must not disturb what follows; the last one equals the model."""
    plain, saving = (
        dataclasses.replace(config, dp_noise_multiplier=0.0, noise_multiplicity=1, save_steps=s) for s in ((), (3, 6))
    )
    train(out, "raw", plain, tmp_path / "plain", 0)
    train(out, "raw", saving, tmp_path / "saving", 0)
    name = "model/unet/diffusion_pytorch_model.safetensors"
    first, last, early = (
        load_file(tmp_path / folder / name) for folder in ("plain", "saving/steps/6", "saving/steps/3")
    )
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert not torch.equal(first["conv_in.weight"], early["conv_in.weight"])
    assert json.loads((tmp_path / "saving/steps/3/config.json").read_text())["steps_of_arm"] == 3
    assert pl.read_parquet(tmp_path / "saving/steps/3/exposures.parquet")["exposures"].sum() == 3 * 4
