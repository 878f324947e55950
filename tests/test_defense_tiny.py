"""defense.tiny: pipelines built from a seed, of diffusers' own parts; and the one that comes trained."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from hatchling.builders.wheel import WheelBuilder
from test_defense_data import build_small, make_dataset, write_autoencoder

from defense import tiny
from defense.config import TrainConfig
from defense.model import SHIPPED, ModelError, digest_weights, find_folder, load_pipeline, save_pipeline
from defense.sample import digest_model
from defense.train import train

BASE = SHIPPED["tiny-base"]


def test_the_tokenizer_is_that_of_clip():
    tokenizer = tiny.build_tokenizer(77)
    assert len(tokenizer) == 49_408
    # Published token ids of openai/clip-vit-large-patch14.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("Hello,  WORLD!", padding="max_length").input_ids
    assert padded[:6] == [49406, 3306, 267, 1002, 256, 49407]
    assert set(padded[6:]) == {49407}
    assert len(padded) == 77


def test_a_missing_vocabulary_is_a_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        tiny.build_tokenizer(8)
    assert caught.value.name == "open-clip-torch"


def test_weights_depend_on_the_seed_alone(tmp_path):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = digest_weights(build_small(tmp_path, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert digest_weights(build_small(tmp_path, seed=1)) == first
    assert digest_weights(build_small(tmp_path, seed=2)) != first


def test_a_missing_autoencoder_is_never_made_up(tmp_path):
    with pytest.raises(ModelError, match="holds no autoencoder"):
        tiny.build_tiny(0, autoencoder=tmp_path)


def test_damaged_weights_are_one_line(tmp_path):
    write_autoencoder(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be opened") as caught:
        tiny.load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resolution": 36}, "multiple of 8"), ({"channels": (30, 60)}, "multiples of 32")],
)
def test_sizes_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        build_small(tmp_path, **options)


def test_the_noise_schedule_ends_without_signal_for_v_and_with_some_for_epsilon():
    signal = {kind: tiny.build_scheduler(kind).alphas_cumprod for kind in ("v_prediction", "epsilon")}
    assert signal["v_prediction"][-1] == 0
    assert signal["epsilon"][-1] > 0
    np.testing.assert_allclose(signal["v_prediction"][0], signal["epsilon"][0], rtol=1e-6)


def test_half_precision_weights_are_opened_in_full(tmp_path):
    half = tiny.load_autoencoder(write_autoencoder(tmp_path)).to(torch.float16)
    half.save_pretrained(tmp_path)
    opened = tiny.load_autoencoder(tmp_path)
    assert opened.dtype == torch.float32
    assert opened.config.scaling_factor == 1.5


OPEN_WITHOUT_US = """
import json, sys, torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
prompts = json.loads(sys.argv[2])
image = pipeline(*prompts, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
ours = {"dedup", "defense", "eval"} & set(sys.modules)
told = [type(pipeline).__name__, str(pipeline.unet.dtype), image.shape, bool((image == image).all()), len(ours)]
print(json.dumps(told))
"""


def open_without_us(folder: Path, *prompts: str) -> list:
    command = [sys.executable, "-I", "-c", OPEN_WITHOUT_US, str(folder), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_base_opens_without_our_code():
    told = open_without_us(BASE, "a red apple")
    assert told == ["StableDiffusionPipeline", "torch.float32", [1, 32, 32, 3], True, 0]


def test_the_base_is_what_its_origin_says():
    origin = json.loads((BASE / "origin.json").read_text())
    base = load_pipeline("tiny-base")
    assert digest_weights(base) == origin["weights_sha256"]
    assert len(base.tokenizer) == 49_408
    assert all(picture["licence"] in ("MIT", "public domain") for picture in origin["pictures"])
    counts = origin["counts"]
    assert counts["copies left"] == 0
    assert counts["files"] - counts["unreadable"] - counts["near a drawing"] == counts["rows"] > counts["kept"] > 5_000
    assert "/" not in origin["config"]["base"]


def test_the_name_of_the_base_wins_over_a_folder(tmp_path, monkeypatch):
    (tmp_path / "tiny-base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_folder("tiny-base") == BASE
    assert find_folder("./tiny-base") == Path("tiny-base")


def test_the_wheel_holds_the_base(tmp_path):
    (wheel,) = WheelBuilder(str(Path(__file__).parent.parent)).build(directory=str(tmp_path), versions=["standard"])
    shipped = {f"defense/pretrained/tiny-base/{path.relative_to(BASE).as_posix()}" for path in BASE.rglob("*.*")}
    assert len(shipped) > 8
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())
    assert Path(wheel).stat().st_size < 12e6


def test_a_saved_model_does_not_say_where_its_parts_came_from(tmp_path):
    shutil.copytree(BASE, tmp_path / "copy")
    for name, base in (("here", BASE), ("there", tmp_path / "copy")):
        save_pipeline(load_pipeline(base), tmp_path / name)
    assert digest_model(tmp_path / "here", {}) == digest_model(tmp_path / "there", {})
    texts = [path.read_text() for path in (tmp_path / "there").rglob("*.json")]
    assert len(texts) > 5
    assert not any(str(tmp_path) in text for text in texts)


def test_a_model_without_captions_opens_without_our_code(tmp_path):
    pipeline = tiny.build_tiny_uncond(3, resolution=16, channels=(16, 32))
    assert isinstance(pipeline, DDPMPipeline)
    save_pipeline(pipeline, tmp_path / "model")
    assert open_without_us(tmp_path / "model") == ["DDPMPipeline", "torch.float32", [1, 16, 16, 3], True, 0]
    assert digest_weights(load_pipeline(tmp_path / "model")) == digest_weights(pipeline)


def test_weights_without_captions_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (digest_weights(tiny.build_tiny_uncond(seed, channels=(16, 32))) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "message"),
    [({"resolution": 36, "channels": (16, 16, 16, 16)}, "multiple of 8"), ({"channels": (24, 32)}, "multiples of 16")],
)
def test_sizes_without_captions_that_do_not_fit(options, message):
    with pytest.raises(ModelError, match=message):
        tiny.build_tiny_uncond(0, **options)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"base": "tiny-base"}, "StableDiffusionPipeline"),
        ({"model": "tiny-uncond", "resolution": 16, "channels": (16, 32)}, "DDPMPipeline"),
    ],
)
def test_what_a_config_names_is_trained(options, kind, tmp_path):
    out, run = make_dataset(tmp_path / "dataset"), tmp_path / "run"
    train(out, "raw", TrainConfig(steps=2, batch_size=4, device="cpu", **options), run, 0)
    assert len((run / "train.jsonl").read_text().splitlines()) == 2
    trained = load_pipeline(run / "model")
    assert type(trained).__name__ == kind
    start = load_pipeline("tiny-base") if "base" in options else tiny.build_tiny_uncond(0, channels=(16, 32))
    weights = zip(trained.unet.parameters(), start.unet.parameters(), strict=True)
    assert any(not torch.equal(after, before) for after, before in weights)
