"""Small models that are trained from scratch, made of diffusers' own parts and opened without this package.

`build_tiny` makes a text-to-image model of the Stable Diffusion class from a seed, `build_tiny_uncond` one of pixels
that takes no captions. Knows nothing of data or training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from defense.captions import read_merges
from defense.model import SHIPPED, ModelError, open_network

AUTOENCODER = SHIPPED["tiny-base"] / "vae"
HEADS = 4  # attention heads; diffusers passes their number as `attention_head_dim`
GROUPS = 16  # of the group norms


def build_tiny(
    seed: int,
    *,
    resolution: int = 32,
    autoencoder: Path = AUTOENCODER,
    channels: Sequence[int] = (64, 128),
    layers_per_block: int = 1,
    text_width: int = 64,
    text_layers: int = 2,
    caption_tokens: int = 32,
    prediction_type: str = "v_prediction",
) -> StableDiffusionPipeline:
    """An untrained pipeline, float32, on the CPU; U-Net and frozen text encoder depend on the seed alone.

    A random text encoder is enough: it tells captions apart, and there is little to understand across a few
    hundred of them. The global random state is left as it was. Raises ModelError.
    """
    vae = load_autoencoder(autoencoder)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    _check_sizes(resolution, factor, channels, GROUPS * 2)
    if text_width % GROUPS:
        raise ModelError(f"text_width must be a multiple of {GROUPS}")
    tokenizer = build_tokenizer(caption_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=resolution // factor,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            block_out_channels=tuple(channels),
            # Attention costs most where the picture is largest and is missed there least.
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(channels) - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (len(channels) - 1), "UpBlock2D"),
            layers_per_block=layers_per_block,
            cross_attention_dim=text_width,
            attention_head_dim=HEADS,
            norm_num_groups=GROUPS,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",  # the pooled caption joins the time embedding: it reaches every block
            addition_embed_type_num_heads=HEADS,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=2 * text_width,
                projection_dim=text_width,
                num_hidden_layers=text_layers,
                num_attention_heads=HEADS,
                max_position_embeddings=caption_tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return StableDiffusionPipeline(
        vae=vae.eval().requires_grad_(False),
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tiny_uncond(
    seed: int,
    *,
    resolution: int = 16,
    channels: Sequence[int] = (32, 64, 128),
    layers_per_block: int = 1,
    prediction_type: str = "v_prediction",
) -> DDPMPipeline:
    """An untrained pipeline without captions or autoencoder, float32, on the CPU; the U-Net depends on the seed alone.

    Its scheduler is that of `build_tiny`, so it is sampled in as few steps. The global random state is left as it was.
    Raises ModelError.
    """
    _check_sizes(resolution, 1, channels, GROUPS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=resolution,
            in_channels=3,
            out_channels=3,
            block_out_channels=tuple(channels),
            down_block_types=(*["DownBlock2D"] * (len(channels) - 1), "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * (len(channels) - 1)),
            layers_per_block=layers_per_block,
            attention_head_dim=channels[-1] // HEADS,
            norm_num_groups=GROUPS,
            resnet_time_scale_shift="scale_shift",
        )
    return DDPMPipeline(unet=unet.eval(), scheduler=build_scheduler(prediction_type))


def _check_sizes(resolution: int, factor: int, channels: Sequence[int], multiple: int) -> None:
    """Whether a U-Net behind an autoencoder of this factor can halve the picture as often as it must."""
    if resolution % (factor * 2 ** (len(channels) - 1)):
        raise ModelError(f"resolution {resolution} is no multiple of {factor * 2 ** (len(channels) - 1)}")
    if any(width % multiple for width in channels):
        raise ModelError(f"channels must be multiples of {multiple}")


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise schedule, sampled as Lin et al. 2024 (arXiv 2305.08891) advise.

    Their zero terminal SNR needs v-prediction: at the last timestep there is no signal left to divide by.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,  # what StableDiffusionPipeline insists on; "trailing" does not use it
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=prediction_type == "v_prediction",
    )


def build_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's tokenizer (Radford et al. 2021; 49,408 byte-pair tokens), cut to `length` tokens a caption."""
    merges: list[Any] = [tuple(line.split()) for line in read_merges()]
    alphabet = list(bytes_to_unicode().values())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """An AutoencoderKL in float32. Raises ModelError when the weights are missing or pickled."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} holds no autoencoder (no config.json): set `autoencoder` to the folder of one")
    return open_network(AutoencoderKL, folder, folder)
