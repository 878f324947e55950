"""Fine-tuning of pipelines that somebody else made: all weights or a LoRA, resumed to the bit, opened by diffusers."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from test_defense_data import make_dataset, readable, source
from test_defense_model import build_ddpm, build_sd14, build_sdxl, save_base

from defense import data, lora, model
from defense import loop as loop_
from defense import train as training
from defense.batches import Batch
from defense.config import TrainConfig
from defense.loop import pose, predict
from defense.sampling import sample
from defense.train import RunError, build_pipeline, train

KINDS = [("sd14", 0), ("sd14", 2), ("sdxl", 2), ("ddpm", 0)]  # class, and rank of the LoRA


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, folder) for kind in ("sd14", "sdxl", "ddpm", "sd3")}


def configure(base: Path, rank: int = 0, **options: object) -> TrainConfig:
    usual = {"resolution": 16, "steps": 4, "batch_size": 4, "warmup_steps": 0, "checkpoint_every": 2, "device": "cpu"}
    return TrainConfig(base=str(base), lora_rank=rank, **usual | options)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "train.jsonl").read_text().splitlines()]


def files(run: Path) -> dict[str, bytes]:
    """Everything that a run leaves, but for how long it took."""
    found = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if name not in ("timings.json", ".lock")}


def weights(pipeline, part: str = "unet") -> dict[str, torch.Tensor]:
    return getattr(pipeline, part).state_dict()


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_the_loss_falls(out, bases, kind, rank, tmp_path):
    targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out")
    options = {"lora_targets": targets} if rank else {}
    rate = 1e-2 if rank else 2e-3
    train(out, "raw", configure(bases[kind], rank, steps=30, learning_rate=rate, **options), tmp_path / "run", 0)
    told = losses(tmp_path / "run")
    assert np.mean(told[-8:]) < 0.85 * np.mean(told[:4])


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_an_interrupted_run_ends_with_the_same_bits(out, bases, kind, rank, tmp_path, monkeypatch):
    config = configure(bases[kind], rank)
    train(out, "raw", config, tmp_path / "whole" / "run", 0)
    loop = training.training_loop

    def stopping(*arguments):
        for done in loop(*arguments):
            yield done
            if done.step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_loop", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(out, "raw", config, tmp_path / "run", 0)
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    train(out, "raw", config, tmp_path / "run", 0)
    assert files(tmp_path / "run") == files(tmp_path / "whole" / "run")


@pytest.mark.parametrize("kind", ["sd14", "ddpm"])
def test_a_full_run_is_a_pipeline_of_its_own(out, bases, kind, tmp_path):
    train(out, "raw", configure(bases[kind], resolution=32), tmp_path / "run", 0)
    before = DiffusionPipeline.from_pretrained(bases[kind], safety_checker=None)
    after = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")  # without any code of ours
    assert type(after) is type(before)
    assert type(after.scheduler) is type(before.scheduler)
    assert all(not torch.equal(weights(before)[name], w) for name, w in weights(after).items() if w.dim() > 1)
    for part in {"vae", "text_encoder"} & after.components.keys():
        assert all(torch.equal(weights(before, part)[name], w) for name, w in weights(after, part).items())
    images = sample(after, ["a"], [0], steps=1, guidance_scale=1.0, batch_size=1)
    assert images.shape == (1, 32, 32, 3)  # it draws at the size at which it was trained


@pytest.mark.parametrize("kind", ["sd14", "sdxl"])
def test_a_lora_run_is_a_lora_and_names_its_base(out, bases, kind, tmp_path):
    before = {path: path.read_bytes() for path in bases[kind].rglob("*") if path.is_file()}
    run = tmp_path / "run"
    train(out, "raw", configure(bases[kind], 2, lora_alpha=8, learning_rate=1e-2), run, 0)
    assert {path.name for path in (run / "model").iterdir()} == {"base.json", lora.FILE}
    assert before == {path: path.read_bytes() for path in bases[kind].rglob("*") if path.is_file()}
    plain = DiffusionPipeline.from_pretrained(bases[kind], **{"safety_checker": None} if kind == "sd14" else {})
    untouched = sample(plain, ["a"], [0], steps=2, guidance_scale=1.0, batch_size=1).astype(int)
    plain.load_lora_weights(run / "model")
    theirs = sample(plain, ["a"], [0], steps=2, guidance_scale=1.0, batch_size=1).astype(int)
    ours = sample(model.load_pipeline(run / "model"), ["a"], [0], steps=2, guidance_scale=1.0, batch_size=1)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - untouched).max() > 3


def test_the_lora_changes_with_the_first_step(out, bases, tmp_path):
    config = configure(bases["sd14"], 2, steps=1, ema_decay=0.0)
    train(out, "raw", config, tmp_path / "run", 0)
    untrained, _ = build_pipeline(config, 0)
    lora.save_lora(untrained, tmp_path / "untrained")
    before, after = (load_file(tmp_path / name / lora.FILE) for name in ("untrained", "run/model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed >= {name for name in before if "lora_B" in name}  # while B is zero, A gets no gradient


def test_a_lora_of_a_lora_names_one_base(out, bases, tmp_path):
    train(out, "raw", configure(bases["sd14"], 2, learning_rate=1e-2), tmp_path / "one", 0)
    train(out, "raw", configure(tmp_path / "one" / "model", 3, learning_rate=1e-2), tmp_path / "two", 0)
    described = json.loads((tmp_path / "two" / "model" / "base.json").read_text())
    assert described["base"] == str(bases["sd14"])
    assert [entry["path"] for entry in described["loras"]] == [str(tmp_path / "one" / "model" / lora.FILE), lora.FILE]
    expected = model.load_pipeline(tmp_path / "one" / "model", loras=[tmp_path / "two" / "model" / lora.FILE])
    opened = model.load_pipeline(tmp_path / "two" / "model")
    assert model.digest_weights(opened) == model.digest_weights(expected)


def test_training_may_start_from_a_lora_of_somebody_else(out, bases, tmp_path):
    train(out, "raw", configure(bases["sd14"], 2, learning_rate=1e-2), tmp_path / "other", 0)
    file = str(tmp_path / "other" / "model" / lora.FILE)
    merged, _ = build_pipeline(configure(bases["sd14"], loras=(file,)), 0)
    assert model.digest_weights(merged) == model.digest_weights(model.load_pipeline(tmp_path / "other" / "model"))
    train(out, "raw", configure(bases["sd14"], 2, loras=(file,)), tmp_path / "run", 0)
    assert [entry["path"] for entry in json.loads((tmp_path / "run" / "model" / "base.json").read_text())["loras"]] == [
        file,
        lora.FILE,
    ]
    model.load_pipeline(tmp_path / "run" / "model")
    Path(file).write_bytes(Path(file).read_bytes() + b" ")
    with pytest.raises(model.ModelError, match=r"is no longer the LoRA that .*run/model was trained with"):
        model.load_pipeline(tmp_path / "run" / "model")


def test_a_base_that_changed_or_moved_is_noticed(out, bases, tmp_path):
    base = Path(shutil.copytree(bases["sd14"], tmp_path / "base"))
    train(out, "raw", configure(base, 2), tmp_path / "run", 0)
    changed = model.load_pipeline(base)
    with torch.no_grad():
        changed.unet.conv_in.bias += 1
    changed.unet.save_pretrained(base / "unet")
    with pytest.raises(model.ModelError, match=r"base is no longer the pipeline that .*run/model was trained from"):
        model.load_pipeline(tmp_path / "run" / "model")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(model.ModelError, match="base holds no pipeline"):
        model.load_pipeline(tmp_path / "run" / "model")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_error_is_that_of_the_noise_schedule_of_the_base(out, prediction_type):
    pipeline = build_sd14(prediction_type)  # PNDM, which knows no velocity
    rows = readable(out).with_columns(captions=pl.lit(["one"]), weight=1.0)
    examples = data.build_examples(rows, source(out), pipeline, resolution=16)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    chosen, captions, timesteps = torch.tensor([0, 5]), torch.tensor([1, 0]), torch.tensor([10, 800])
    noise = torch.randn(2, 4, 8, 8)
    batch = Batch(chosen, noise, timesteps, examples.conditions.pick(captions), captions > 0)
    cpu, both = torch.device("cpu"), torch.arange(2)
    noisy, wanted = pose(schedule, examples, batch, both, cpu, torch.channels_last)
    with torch.no_grad():
        predicted = predict(pipeline.unet, noisy, timesteps, batch.told.select(both, cpu), "float32")
    latents = examples.latents[chosen]
    signal = pipeline.scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    a, s = signal.sqrt(), (1 - signal).sqrt()
    context = torch.cat([pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("one", "")])
    with torch.no_grad():
        prediction = pipeline.unet(a * latents + s * noise, timesteps, context).sample
    target = a * noise - s * latents if prediction_type == "v_prediction" else noise
    torch.testing.assert_close(predicted, prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(wanted, target, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_less_memory_gives_the_same_model(out, bases, kind, rank, tmp_path):
    usual = configure(bases[kind], rank, steps=2)
    cheap = dataclasses.replace(usual, accumulation=4, gradient_checkpointing=True)
    coarse = dataclasses.replace(cheap, precision="bfloat16")
    found = []
    for name, config in {"usual": usual, "cheap": cheap, "coarse": coarse}.items():
        train(out, "raw", config, tmp_path / name, 0)
        found.append(losses(tmp_path / name))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=3e-2)
    assert found[2] != found[1]
    opened = model.load_pipeline(tmp_path / "coarse" / "model")
    assert {w.dtype for w in opened.unet.parameters()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(out, bases, tmp_path):
    """Started by accelerate, on CPUs; so also through the command line."""
    config = configure(bases["sd14"], 2, steps=3, ema_decay=0.0)
    train(out, "raw", config, tmp_path / "one", 0)
    toml = [f"base = {str(bases['sd14'])!r}", "lora_rank = 2", "resolution = 16", "steps = 3", "batch_size = 4"]
    toml += ["warmup_steps = 0", "checkpoint_every = 2", "device = 'cpu'", "ema_decay = 0.0"]
    (tmp_path / "c.toml").write_text("\n".join(toml))
    (tmp_path / "unmemorize.py").write_text("from eval.cli import main; main()")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    verb = ["train", str(out), "--arm", "raw", "--config", str(tmp_path / "c.toml"), "-o", str(tmp_path / "two")]
    command = [sys.executable, *launch, str(tmp_path / "unmemorize.py"), *verb]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    found = [load_file(tmp_path / name / "model" / lora.FILE) for name in ("one", "two")]
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-4, rtol=1e-2)
    assert (tmp_path / "two" / "exposures.parquet").read_bytes() == (
        tmp_path / "one" / "exposures.parquet"
    ).read_bytes()


def test_arms_start_from_equal_weights(out, bases, tmp_path):
    records = []
    for arm, seed in (("raw", 0), ("refill", 0), ("raw", 1)):
        run = tmp_path / f"{arm}-{seed}"
        train(out, arm, configure(bases["sd14"], 2, steps=1), run, seed)
        records.append(json.loads((run / "config.json").read_text()))
    raw, refill, other = (record["initial_weights_sha256"] for record in records)
    assert raw == refill != other
    assert records[0]["pipeline"] == "StableDiffusionPipeline"


def spoil(build, folder: Path, change) -> Path:
    pipeline = build()
    change(pipeline)
    pipeline.save_pretrained(folder)
    return folder


def predict_sample(pipeline) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample")


def learn_variance(pipeline) -> None:
    pipeline.unet = type(pipeline.unet).from_config({**pipeline.unet.config, "out_channels": 6})


def say_mean(pipeline) -> None:
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


@pytest.mark.parametrize(
    ("base", "rank", "message"),
    [
        ("sdxl", 0, r"StableDiffusionXLPipeline cannot be trained \(full\): supported are StableDiffusionPipeline"),
        ("sd3", 2, r"StableDiffusion3Pipeline cannot be trained \(LoRA\): supported are .*DDPMPipeline \(full\)"),
        ("ddpm", 2, r"DDPMPipeline cannot be trained \(LoRA\)"),
        ((build_sd14, predict_sample), 0, "of prediction_type sample cannot be trained"),
        ((build_ddpm, learn_variance), 0, "has 3 channels in, 6 out: supported are 3 in and out"),
        ((build_sdxl, say_mean), 2, "latents_mean is not supported"),
    ],
)
def test_what_cannot_be_trained_says_what_can(bases, base, rank, message, tmp_path):
    folder = bases[base] if isinstance(base, str) else spoil(base[0], tmp_path / "base", base[1])
    with pytest.raises(model.ModelError, match=message) as caught:
        build_pipeline(configure(folder, rank), 0)
    assert "\n" not in str(caught.value)


def test_a_resolution_that_does_not_fit(bases):
    with pytest.raises(model.ModelError, match="resolution 18 is no multiple of 4"):
        build_pipeline(configure(bases["sd14"], resolution=18), 0)


def test_out_of_memory_names_the_keys_that_help(out, bases, tmp_path, monkeypatch):
    def exhaust(*arguments, **options):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(loop_, "predict", exhaust)
    with pytest.raises(RunError, match="out of memory; less is needed with gradient_checkpointing = true") as caught:
        train(out, "raw", configure(bases["sd14"], precision="bfloat16"), tmp_path / "run", 0)
    assert "accumulation = 4, lora_rank = 4, a smaller resolution" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(loop_, "predict", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(out, "raw", configure(bases["sd14"]), tmp_path / "other", 0)


def test_a_pickled_base_is_trained_only_by_name(out, bases, tmp_path):
    base = Path(shutil.copytree(bases["sd14"], tmp_path / "base"))
    (safe,) = (base / "unet").glob("*.safetensors")
    torch.save(load_file(safe), base / "unet" / "diffusion_pytorch_model.bin")
    safe.unlink()
    with pytest.raises(model.ModelError, match="pickled = "):
        train(out, "raw", configure(base, 2), tmp_path / "run", 0)
    named = configure(base, 2, steps=1, pickled=("unet/diffusion_pytorch_model.bin",))
    train(out, "raw", named, tmp_path / "run", 0)
    assert isinstance(model.load_pipeline(tmp_path / "run" / "model"), StableDiffusionPipeline)


@pytest.mark.parametrize(("kind", "rank"), KINDS)
def test_every_class_can_be_trained_privately(out, bases, kind, rank, tmp_path):
    config = configure(bases[kind], rank, steps=2, dp_noise_multiplier=0.5, noise_multiplicity=2, save_steps=(1,))
    train(out, "raw", config, tmp_path / "run", 0)
    early, late = (
        load_file(next((tmp_path / "run" / folder).rglob("*lora*.safetensors" if rank else "unet/*.safetensors")))
        for folder in ("steps/1/model", "model")
    )
    assert all(not torch.equal(early[name], late[name]) for name in late)  # after the second step, too
    said = [json.loads((tmp_path / "run" / name).read_text()) for name in ("privacy.json", "steps/1/privacy.json")]
    assert [entry["steps"] for entry in said] == [2, 1]
    assert weights(model.load_pipeline(tmp_path / "run" / "model"))  # hooks left nothing behind


@pytest.mark.parametrize(("kind", "rank"), [("sd14", 2), ("sdxl", 2)])
def test_what_every_class_is_told_can_be_perturbed(out, bases, kind, rank, tmp_path):
    usual = configure(bases[kind], rank, steps=2, learning_rate=1e-2)
    told = {"caption_perturbation": "random-numbers", "perturbation_share": 1.0, "embedding_noise": 0.1}
    found = []
    for name, config in {"usual": usual, "told": dataclasses.replace(usual, **told)}.items():
        train(out, "raw", config, tmp_path / name, 0)
        found.append(losses(tmp_path / name))
    assert found[0] != found[1]
    again = dataclasses.replace(usual, **told)
    train(out, "raw", again, tmp_path / "again" / "told", 0)
    assert files(tmp_path / "again" / "told") == files(tmp_path / "told")
