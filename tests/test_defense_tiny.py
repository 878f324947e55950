"""defense.tiny: a pipeline built from a seed, of diffusers' own parts."""

import numpy as np
import pytest
import torch
from test_defense_data import build_small, write_autoencoder

from defense import tiny
from defense.model import ModelError, digest_weights


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
