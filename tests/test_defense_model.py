"""defense.model: pipelines of any class opened without running anything. And the pipelines of the other tests."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from test_defense_data import build_small
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from defense import model

WIDTH = 16  # of every text encoder
# Stable Diffusion 1.4, scheduler/scheduler_config.json.
PNDM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def build_letters(length: int) -> CLIPTokenizer:
    """CLIP's tokenizer that knows letters and no words: 514 tokens are opened faster than 49,408."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=length)


def build_text(kind: type, tokenizer) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def build_autoencoder(**options: object) -> AutoencoderKL:
    """f = 2, so that 16 pixels are 8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def build_unet(**options: object) -> UNet2DConditionModel:
    """The blocks and keys of Stable Diffusion 1.4 (unet/config.json), two of its four resolutions."""
    return UNet2DConditionModel(
        **{
            "act_fn": "silu",
            "attention_head_dim": 2,
            "block_out_channels": (16, 32),
            "center_input_sample": False,
            "cross_attention_dim": WIDTH,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": 4,
            "layers_per_block": 1,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-05,
            "norm_num_groups": 8,
            "out_channels": 4,
            "sample_size": 8,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        | options
    ).eval()


def build_sd14(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    tokenizer = build_letters(16)
    return StableDiffusionPipeline(
        vae=build_autoencoder(scaling_factor=0.18215).eval(),
        text_encoder=build_text(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=PNDMScheduler.from_config(PNDM | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl() -> StableDiffusionXLPipeline:
    tokenizer = build_letters(16)
    return StableDiffusionXLPipeline(
        vae=build_autoencoder(scaling_factor=0.13025, force_upcast=True).eval(),
        text_encoder=build_text(CLIPTextModel, tokenizer),
        text_encoder_2=build_text(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=build_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=WIDTH + 6 * 4,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def build_ddpm(**options: object) -> DDPMPipeline:
    """google/ddpm-cifar10-32, smaller."""
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        **options,
    )
    return DDPMPipeline(unet.eval(), DDPMScheduler(variance_type="fixed_large"))


def build_sd3() -> StableDiffusion3Pipeline:
    """A flow-matching pipeline with a transformer, and without its third text encoder."""
    tokenizer = build_letters(77)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_autoencoder(
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        ).eval(),
        text_encoder=build_text(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


BUILDERS = {"sd14": build_sd14, "sdxl": build_sdxl, "ddpm": build_ddpm, "sd3": build_sd3}


def save_base(kind: str, folder: Path, **options: object) -> Path:
    """A pipeline folder as somebody else would have it: the weights of seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BUILDERS[kind](**options).save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A saved pipeline of each class."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, folder) for kind in BUILDERS}


@pytest.fixture
def sd14(bases, tmp_path):
    """A copy of the Stable Diffusion folder to spoil."""
    return Path(shutil.copytree(bases["sd14"], tmp_path / "sd14"))


def pickle_weights(part: Path) -> str:
    """Weights of a component as a .bin file instead of safetensors; returns its name relative to the pipeline."""
    (weights,) = part.glob("*.safetensors")
    name = "pytorch_model.bin" if weights.name == "model.safetensors" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), part / name)
    weights.unlink()
    return f"{part.name}/{name}"


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_pipeline_of_any_class_is_opened_as_it_is(bases, kind):
    opened = model.load_pipeline(bases[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = BUILDERS[kind]()
    assert type(opened) is type(built)
    assert model.digest_weights(opened) == model.digest_weights(built)
    assert {
        p.dtype for part in opened.components.values() if hasattr(part, "parameters") for p in part.parameters()
    } == {torch.float32}


def test_what_is_saved_holds_no_pickle_and_opens_as_it_was(tmp_path):
    pipeline = build_small(tmp_path)
    model.save_pipeline(pipeline, tmp_path / "model")
    assert {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file()} <= {".json", ".safetensors", ".txt"}
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert {v[0] for v in index.values() if isinstance(v, list)} <= {None, "diffusers", "transformers"}
    again = model.load_pipeline(tmp_path / "model")
    assert model.digest_weights(again) == model.digest_weights(pipeline)
    assert again.tokenizer.model_max_length == 8


def test_an_old_pipeline_of_one_network_is_flat(bases, tmp_path):
    """google/ddpm-cifar10-32 has its weights beside model_index.json."""
    folder = Path(shutil.copytree(bases["ddpm"], tmp_path / "flat"))
    for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        file.rename(folder / file.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    expected = model.digest_weights(model.load_pipeline(bases["ddpm"]))
    assert model.digest_weights(model.load_pipeline(folder)) == expected
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(model.ModelError, match=r"pickled = \['diffusion_pytorch_model\.bin'\]"):
        model.load_pipeline(folder)
    named = model.load_pipeline(folder, pickled=["diffusion_pytorch_model.bin"])
    assert model.digest_weights(named) == expected


def test_a_name_on_the_hub_is_found_in_its_cache(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--tiny"
    shutil.copytree(bases["ddpm"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for name in ("org/tiny", f"org/tiny@{commit}"):
        pipeline = model.load_pipeline(name)
        assert model.digest_weights(pipeline) == model.digest_weights(model.load_pipeline(bases["ddpm"]))
        assert model.describe_base(pipeline, name, [], [])["base"] == f"org/tiny@{commit}"
    with pytest.raises(model.ModelError, match="org/none is no folder, and the hub does not give it") as caught:
        model.load_pipeline("org/none")
    assert "\n" not in str(caught.value)


def test_a_safety_checker_is_left_out(sd14):
    index = json.loads((sd14 / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (sd14 / "model_index.json").write_text(json.dumps(index))
    assert model.load_pipeline(sd14).safety_checker is None


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_opened_only_by_name(sd14, bases, part):
    name = pickle_weights(sd14 / part)
    with pytest.raises(model.ModelError, match="pickled, so opening it could run code") as caught:
        model.load_pipeline(sd14)
    assert f"pickled = ['{name}']" in str(caught.value)
    assert "\n" not in str(caught.value)
    opened = model.load_pipeline(sd14, pickled=[name])
    assert model.digest_weights(opened) == model.digest_weights(model.load_pipeline(bases["sd14"]))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_that_is_named_still_runs_no_code(sd14, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    name = pickle_weights(sd14 / "unet")
    torch.save({"conv_in.weight": Bomb()}, sd14 / name)
    with pytest.raises(model.ModelError, match="cannot be opened"):
        model.load_pipeline(sd14, pickled=[name])
    assert not (tmp_path / "ran").exists()
    torch.load(sd14 / name, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_pickles_beside_safetensors_are_not_opened(sd14, bases, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    for name in ("old.ckpt", "unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (sd14 / name).write_bytes(pickle.dumps(Bomb()))
    opened = model.load_pipeline(sd14)
    assert model.digest_weights(opened) == model.digest_weights(model.load_pipeline(bases["sd14"]))
    assert not (tmp_path / "ran").exists()


def test_code_is_never_run(sd14, tmp_path):
    (sd14 / "unet" / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    index = json.loads((sd14 / "model_index.json").read_text())
    (sd14 / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "UNet"]}))
    with pytest.raises(model.ModelError, match=r"mine\.py could run code"):
        model.load_pipeline(sd14)
    (sd14 / "unet" / "mine.py").unlink()
    with pytest.raises(model.ModelError, match="cannot be opened"):
        model.load_pipeline(sd14)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "WorldModelPipeline"}, "is a WorldModelPipeline, which diffusers"),
        ({"_class_name": ["mine", "Pipeline"]}, "which diffusers"),
        ({"unet": ["os", "system"]}, "cannot be opened"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "cannot be opened"),
        ({"vae": [None, None]}, "cannot be opened"),
    ],
)
def test_an_index_that_makes_no_sense(sd14, index, message):
    path = sd14 / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(model.ModelError, match=message) as caught:
        model.load_pipeline(sd14)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_missing_are_never_made_up(sd14, name):
    path = sd14 / f"{name}.safetensors"
    weights = load_file(path)
    gone = sorted(weights)[0]
    del weights[gone]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(model.ModelError, match=f"lacks 1 weights of a .*, such as {gone}"):
        model.load_pipeline(sd14)


def test_places_without_a_pipeline(tmp_path, monkeypatch):
    with pytest.raises(model.ModelError, match=r"no model_index\.json"):
        model.load_pipeline(tmp_path)
    with pytest.raises(model.ModelError, match=r"no folder \(is the run finished\?\), no name on the hub"):
        model.load_pipeline(tmp_path / "nowhere")
    with pytest.raises(model.ModelError, match="device = 'warp'"):
        model.pick_device("warp")
    with pytest.raises(model.ModelError, match="device = 'cuda:77'"):
        model.pick_device("cuda:77")
