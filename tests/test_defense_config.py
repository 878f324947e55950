"""defense.config: TOML ↔ TrainConfig, one to one, and every mistake is one line."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from defense.config import DEFENCES, FINETUNE, ConfigError, TrainConfig, load_config

CONFIGS = Path(__file__).parent.parent / "configs"
TRAINING = sorted(path.name for path in CONFIGS.glob("*.toml") if "unmemorize train" in path.read_text())  # not audits


def test_the_shipped_default_is_the_dataclass():
    assert load_config(CONFIGS / "tiny.toml") == TrainConfig()
    keys = tomllib.loads((CONFIGS / "tiny.toml").read_text())
    assert list(keys) == [f.name for f in dataclasses.fields(TrainConfig) if f.name not in (*FINETUNE, *DEFENCES)]


@pytest.mark.parametrize("name", TRAINING)
def test_a_config_says_what_it_is_for(name):
    header = (CONFIGS / name).read_text().split("\n\n")[0]
    assert f"--config configs/{name}" in header
    assert all(f"# {word}:" in header for word in ("command", "purpose", "expected", "time"))
    load_config(CONFIGS / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1", "unknown key 'learning_rat': did you mean 'learning_rate'?"),
        ("zzz = 1", "unknown key 'zzz': known keys: resolution, "),
        ("steps = 1.5", "steps = 1.5 must be of type int"),
        ("steps = true", "steps = True must be of type int"),
        ("steps = 0", "steps = 0 is out of range"),
        ("channels = [64, 'x']", "must be a list of whole numbers"),
        ("channels = [64]", r"channels = \(64,\) is out of range"),
        ("null_caption = 1", "null_caption = 1.0 is out of range"),
        ("learning_rate = nan", "learning_rate = nan is out of range"),
        ("prediction_type = 'x'", "prediction_type = 'x' is out of range: choose one of v_prediction, epsilon"),
        ("precision = 'float16'", "precision = 'float16' is out of range: choose one of float32, bfloat16"),
        ("accumulation = 3", "batch_size = 16 is no multiple of accumulation = 3"),
        ("loras = ['a.safetensors']", "loras would have no effect: there is no base to fine-tune"),
        ("base = 'a/b'\nchannels = [32, 64]", "channels would have no effect: the model is that of base"),
        ("base = 'a/b'\nmodel = 'tiny'", "model would have no effect: the model is that of base"),
        (
            "model = 'tiny-uncond'\ntext_width = 32",
            "text_width would have no effect: tiny-uncond has no base, no captions",
        ),
        ("model = 'tiny-uncond'\nlora_rank = 4", "lora_rank would have no effect: tiny-uncond has no base"),
        ("model = 'large'", "model = 'large' is out of range: choose one of tiny, tiny-uncond"),
        ("base = 'a/b'\nloras = [1]", r"loras = \[1\] must be a list of strings"),
        ("base = 'a/b'\nlora_targets = []", r"lora_targets = \(\) is out of range"),
        ("base = 'a/b'\nlora_rank = -1", "lora_rank = -1 is out of range"),
        ("captions = 'two'", "captions = 'two' is out of range: choose one of all, one"),
        ("caption_perturbation = 'x'", "caption_perturbation = 'x' is out of range: choose one of '', random-tokens, "),
        ("perturbation_share = 0", "perturbation_share = 0.0 is out of range"),
        ("weight_power = 1.5", "weight_power = 1.5 is out of range"),
        ("weight_cap = -1", "weight_cap = -1 is out of range"),
        ("magnitude_percentile = 100", "magnitude_percentile = 100.0 is out of range"),
        ("steps = 5\nsave_steps = [6]", r"save_steps = \(6,\) is out of range"),
        ("noise_multiplicity = 2", "noise_multiplicity would have no effect without DP-SGD: set dp_epsilon"),
        ("dp_epsilon = 1\ndp_noise_multiplier = 1", "dp_epsilon and dp_noise_multiplier decide the same"),
        ("dp_epsilon = 1\ndp_delta = 0", "dp_delta = 0.0 is out of range"),
        ("dp_epsilon = 1\nweight_cap = 2", "weight_cap does not go with DP-SGD: the accountant knows one"),
        ("dp_epsilon = 1\nweight_power = 0.5", "weight_power does not go with DP-SGD"),
        ("dp_epsilon = 1\nmagnitude_percentile = 90", "magnitude_percentile does not go with DP-SGD"),
        ("dp_epsilon = 1\ngradient_checkpointing = true", "gradient_checkpointing does not go with DP-SGD"),
        ("dp_epsilon = 1\nprecision = 'bfloat16'", "precision = 'bfloat16' does not go with DP-SGD"),
        ("steps = ", "no valid TOML"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_number_may_stand_for_a_float(tmp_path):
    path = tmp_path / "right.toml"
    path.write_text("learning_rate = 1\nchannels = [32, 64]")
    assert load_config(path) == TrainConfig(learning_rate=1.0, channels=(32, 64))


def test_a_lora_needs_a_base():
    with pytest.raises(ConfigError, match="set base"):
        TrainConfig(lora_rank=4)
