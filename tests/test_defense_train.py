"""defense.train: the loop learns, resumes to the bit, counts what it did, and refuses what it must."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from test_defense_data import build_small, make_dataset, write_autoencoder

from defense import batches, data, model
from defense import train as training
from defense.arms import ArmError
from defense.conditions import Conditions
from defense.config import TrainConfig
from defense.loop import DivergedError, training_loop
from defense.train import RunError, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    autoencoder = write_autoencoder(tmp_path_factory.mktemp("autoencoder"))
    return TrainConfig(
        device="cpu",
        autoencoder=str(autoencoder),
        channels=(32, 32),
        text_width=32,
        text_layers=1,
        caption_tokens=8,
        steps=12,
        batch_size=4,
        warmup_steps=2,
        checkpoint_every=5,
    )


@pytest.fixture(scope="module")
def finished(out, config, tmp_path_factory):
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("runs") / "raw"
    train(out, "raw", config, run, 0)
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("train.jsonl", "exposures.parquet", "config.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the loop be interrupted once `step` steps are done and logged."""
    loop = training.training_loop

    def stopping(*args):
        for done in loop(*args):
            yield done
            if done.step == step:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "training_loop", stopping)


def test_what_a_finished_run_holds(finished, out, config):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "model", "train.jsonl", "exposures.parquet", "timings.json"}
    log = [json.loads(line) for line in (finished / "train.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    record = json.loads((finished / "config.json").read_text())
    assert (record["arm"], record["seed"], record["out"], record["rows"]) == ("raw", 0, str(out), 8)
    assert TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}) == config
    opened = model.load_pipeline(finished / "model")
    assert not torch.equal(opened.unet.conv_in.weight, build_small(finished.parent).unet.conv_in.weight)


@pytest.mark.parametrize("step", [3, 5, 7, 12])
def test_an_interrupted_run_ends_with_the_same_bits(finished, out, config, step, tmp_path, monkeypatch):
    run = tmp_path / "raw"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(out, "raw", config, run, 0)
    assert not (run / "model").exists()
    assert (run / training.CHECKPOINT).exists() == (step >= 5)
    train(out, "raw", config, run, 0)
    assert_same_run(run, finished)


def test_a_run_that_stopped_while_it_saved_the_model(finished, out, config, tmp_path, monkeypatch):
    run = tmp_path / "raw"
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_pipeline", lambda pipeline, folder: (run / ".model").mkdir() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(out, "raw", config, run, 0)
    train(out, "raw", config, run, 0)
    assert_same_run(run, finished)


@pytest.mark.slow
def test_a_killed_process_loses_nothing(finished, out, config, tmp_path):
    run = tmp_path / "raw"
    longer = dataclasses.replace(config, steps=150)
    train(out, "raw", longer, tmp_path / "whole" / "raw", 0)
    code = (
        "from pathlib import Path; from defense.config import TrainConfig; from defense.train import train; "
        f"train(Path({str(out)!r}), 'raw', {longer!r}, Path({str(run)!r}), 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (run / training.CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (run / "model").exists()
    train(out, "raw", longer, run, 0)
    assert_same_run(run, tmp_path / "whole" / "raw")


def test_a_finished_run_is_left_alone(finished, out, config, monkeypatch):
    monkeypatch.setattr(training, "build_examples", lambda *args, **options: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    train(out, "raw", config, finished, 0)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}


def test_other_options_are_refused_and_named(finished, out, config):
    with pytest.raises(RunError, match=r"\(steps was 12, is 13\)"):
        train(out, "raw", dataclasses.replace(config, steps=13), finished, 0)
    with pytest.raises(RunError, match="arm was 'raw', is 'dedup'"):
        train(out, "dedup", config, finished, 0)
    with pytest.raises(RunError, match="seed was 0, is 1"):
        train(out, "raw", config, finished, 1)


def test_a_folder_of_something_else_is_refused(out, config, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="no training run and not empty"):
        train(out, "raw", config, tmp_path, 0)
    with pytest.raises(RunError, match="no training run and not empty"):
        train(out, "raw", config, out, 0)


def test_arms_share_initial_weights_and_the_steps_of_kept_rows(finished, out, config, tmp_path):
    train(out, "refill", config, tmp_path / "refill", 0)
    raw, refill = (json.loads((run / "config.json").read_text()) for run in (finished, tmp_path / "refill"))
    assert raw["initial_weights_sha256"] == refill["initial_weights_sha256"]
    assert raw["rows"] == refill["rows"]
    trained = [weights(run)["conv_in.weight"] for run in (finished, tmp_path / "refill")]
    assert not torch.equal(*trained)
    exposures = [pl.read_parquet(run / "exposures.parquet") for run in (finished, tmp_path / "refill")]
    kept = [frame.filter(pl.col("id").is_in([0, 3, 4, 5, 6, 7])) for frame in exposures]
    assert kept[0].equals(kept[1])
    assert exposures[1].filter(pl.col("id").is_null())["key"].to_list() == ["s0", "s1"]


def test_exposures_are_what_the_loop_trained_on(out, config, tmp_path, monkeypatch):
    seen = []
    draw = data.Examples.draw_captions
    monkeypatch.setattr(data.Examples, "draw_captions", lambda self, rows, u: seen.append(rows) or draw(self, rows, u))
    config = dataclasses.replace(config, held_out=0.99)
    train(out, "raw", config, tmp_path / "run", 3)
    exposures = pl.read_parquet(tmp_path / "run" / "exposures.parquet")
    trained = exposures.filter(~pl.col("held_out") & (pl.col("key") != "0008"))
    assert trained["exposures"].to_list() == torch.bincount(torch.cat(seen), minlength=len(trained)).tolist()
    assert exposures["exposures"].sum() == 12 * 4
    assert exposures.filter("held_out")["id"].to_list() == [3, 4, 5, 6, 7, 8]  # all but the canary
    assert exposures.filter("held_out")["exposures"].sum() == 0


@dataclasses.dataclass
class Loop:
    """The loop alone, on eight random latents with a caption each."""

    config: TrainConfig
    folder: Path

    def __post_init__(self) -> None:
        pipeline = build_small(self.folder, prediction_type=self.config.prediction_type)
        self.unet = pipeline.unet
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.weights = dict(self.unet.named_parameters())
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), fused=True)
        generator = torch.Generator().manual_seed(0)
        self.examples = data.Examples(
            latents=torch.randn(8, 4, 8, 8, generator=generator),
            conditions=Conditions(torch.randn(9, 8, 32, generator=generator)),
            caption_ids=torch.arange(1, 9),
            first=torch.arange(8),
            count=torch.ones(8, dtype=torch.int64),
        )

    def run(self, **defences):
        parts = (self.unet, self.weights, self.average, self.optimizer, self.scheduler)
        return training_loop(*parts, self.examples, self.config, 0, **defences)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_loss_falls(config, tmp_path, prediction_type):
    longer = dataclasses.replace(config, steps=30, batch_size=16, prediction_type=prediction_type)
    losses = [done.loss for done in Loop(longer, tmp_path).run()]
    learned = 0.9 if prediction_type == "v_prediction" else 0.7  # without training 0.99 … 1.01
    assert np.mean(losses[-10:]) < learned * np.mean(losses[:5])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_first_loss_is_the_formula(config, tmp_path, prediction_type):
    loop = Loop(dataclasses.replace(config, prediction_type=prediction_type), tmp_path)
    untrained = build_small(tmp_path, prediction_type=prediction_type).unet
    noise, uniform, order = data.draw_noise(4, (4, 8, 8), 0, 0)
    rows = data.draw_rows(8, 4, 0, 0)
    timesteps = torch.floor((order + uniform[0]) / 4 * 1000).long()
    assert sorted((timesteps // 250).tolist()) == [0, 1, 2, 3]
    latents = loop.examples.latents[rows]
    context = loop.examples.conditions.tokens[torch.from_numpy(rows + 1) * (uniform[2] >= 0.1)]
    signal = loop.scheduler.alphas_cumprod[timesteps].view(4, 1, 1, 1)  # Salimans & Ho 2022, section 4
    a, s = signal.sqrt(), (1 - signal).sqrt()
    with torch.no_grad():
        prediction = untrained(a * latents + s * noise, timesteps, context).sample
    target = a * noise - s * latents if prediction_type == "v_prediction" else noise
    expected = (prediction - target).square().mean()
    assert next(loop.run()).loss == pytest.approx(expected.item(), rel=1e-5)


def test_some_examples_are_trained_with_the_empty_caption(config, tmp_path):
    loop = Loop(dataclasses.replace(config, null_caption=0.25, batch_size=32, steps=10), tmp_path)
    seen = []
    loop.unet.register_forward_pre_hook(
        lambda module, arguments, told: seen.append(told["encoder_hidden_states"]), with_kwargs=True
    )
    list(loop.run())
    empty = (torch.cat(seen) == loop.examples.conditions.tokens[0]).all((1, 2)).float().mean()
    assert 0.17 < empty < 0.33


def test_the_learning_rate_warms_up_and_stays(config, tmp_path):
    loop = Loop(dataclasses.replace(config, warmup_steps=4, steps=6, learning_rate=0.01), tmp_path)
    rates = [loop.optimizer.param_groups[0]["lr"] for _ in loop.run()]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_average_follows_the_formula(config, tmp_path):
    loop = Loop(dataclasses.replace(config, ema_decay=0.3, steps=6), tmp_path)
    expected = loop.average["conv_out.weight"].double()
    for number, _ in enumerate(loop.run()):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * loop.unet.conv_out.weight.detach().double()
        torch.testing.assert_close(loop.average["conv_out.weight"].double(), expected, atol=1e-6, rtol=1e-5)


def test_a_diverging_run_keeps_its_last_good_checkpoint(out, config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    draw = batches.draw_noise

    def spoiled(batch_size, shape, seed, step):
        noise, *rest = draw(batch_size, shape, seed, step)
        return (noise * float("inf") if step == 7 else noise), *rest

    with monkeypatch.context() as patch:
        patch.setattr(batches, "draw_noise", spoiled)
        with pytest.raises(DivergedError, match=r"at step 8: lower learning_rate; step 5 is kept in") as caught:
            train(out, "raw", config, run, 0)
    assert "\n" not in str(caught.value)
    kept = load_file(run / training.CHECKPOINT)
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert not (run / "model").exists()


def test_the_weights_are_never_spoiled(config, tmp_path):
    loop = Loop(dataclasses.replace(config, learning_rate=1e30, warmup_steps=0), tmp_path)
    with pytest.raises(DivergedError):
        list(loop.run())
    assert all(p.isfinite().all() for p in (*loop.unet.parameters(), *loop.average.values()))


def test_medical_data_are_warned_of(out, config, tmp_path, capsys):
    shutil.copytree(out, tmp_path / "out")
    recorded = json.loads((out / "run.json").read_text())
    for medical in (True, False):
        (tmp_path / "out" / "run.json").write_text(json.dumps(recorded | {"medical": medical}))
        with pytest.raises(ArmError):
            train(tmp_path / "out", "none", config, tmp_path / "run", 0)
        said = capsys.readouterr().err
        assert said.startswith("Warning: diffusion models give back pictures") == medical
        assert said.count("\n") == medical


@pytest.mark.parametrize(("arm", "steps"), [("dedup-exposure", 9), ("reweighted", 12)])
def test_an_arm_decides_its_steps_and_weights_and_resumes(out, config, arm, steps, tmp_path, monkeypatch):
    train(out, arm, config, tmp_path / "whole" / "run", 0)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(out, arm, config, tmp_path / "run", 0)
    train(out, arm, config, tmp_path / "run", 0)
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")
    assert len((tmp_path / "run" / "train.jsonl").read_text().splitlines()) == steps
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["steps_of_arm"], record["config"]["steps"]) == (steps, 12)
    exposures = pl.read_parquet(tmp_path / "run" / "exposures.parquet")
    seen = exposures.group_by("cluster_id").agg(pl.col("exposures").sum()).filter(pl.col("exposures") > 0)
    assert seen["exposures"].to_list() == [steps * 4 // 6] * 6  # six clusters, equally often
