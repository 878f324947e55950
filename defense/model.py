"""The `tiny` model: a small text-to-image model of the Stable Diffusion class, made of diffusers' own parts.

`build_tiny` makes one from a seed, `load_pipeline` opens a saved one. What is saved is a plain
StableDiffusionPipeline folder of safetensors that diffusers opens without this package. Knows nothing of data
or training.
"""

import functools
import gzip
import hashlib
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

AUTOENCODER = Path(__file__).parent / "weights" / "autoencoder"
MERGES = 49_152 - 256 - 2  # of the vocabulary file; CLIP uses no more (openai/CLIP, simple_tokenizer.py)
UNSAFE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py"})
HEADS = 4  # attention heads; diffusers passes their number as `attention_head_dim`
GROUPS = 16  # of the group norms


class ModelError(ValueError):
    """A model that cannot be built, or must not be opened."""


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
    if resolution % (factor * 2 ** (len(channels) - 1)):
        raise ModelError(f"resolution {resolution} is no multiple of {factor * 2 ** (len(channels) - 1)}")
    if any(width % (GROUPS * 2) for width in channels) or text_width % GROUPS:
        raise ModelError(f"channels must be multiples of {GROUPS * 2} and text_width of {GROUPS}")
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
    """CLIP's tokenizer (Radford et al. 2021; 49,408 byte-pair tokens), cut to `length` tokens a caption.

    The vocabulary file comes with the package open-clip-torch. It is only read: that package is never
    imported.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("CLIP's vocabulary comes with open-clip-torch", name="open-clip-torch")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    vocabulary, merges = read_vocabulary(path, MERGES)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


@functools.cache
def read_vocabulary(path: Path, count: int) -> tuple[dict[str, int], list[Any]]:
    """The number of every token, and the first `count` pairs of tokens that merge."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges: list[Any] = [tuple(line.split()) for line in lines[1 : count + 1]]
    alphabet = list(bytes_to_unicode().values())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    return {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """An AutoencoderKL in float32. Raises ModelError when the weights are missing or pickled."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} holds no autoencoder (no config.json): set `autoencoder` to the folder of one")
    return _open(AutoencoderKL, folder)


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A saved pipeline (RUN/model, or any Stable Diffusion folder) in float32. Raises ModelError."""
    if not (folder / "model_index.json").exists():
        raise ModelError(f"{folder} holds no pipeline (no model_index.json): is the run finished?")
    pipeline = _open(StableDiffusionPipeline, folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder of safetensors. It is complete as soon as it is there."""
    _hide_progress()
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    for path in temporary.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner alone
    temporary.replace(folder)


def _hide_progress() -> None:
    """A bar for files that take milliseconds is noise."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _open(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a local folder, float32, safetensors only. Raises ModelError."""
    refuse_unsafe(folder)
    _hide_progress()
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be opened ({str(error).splitlines()[0]})") from error


def refuse_unsafe(folder: Path) -> None:
    """Raise ModelError if the folder holds pickled weights or code: opening them could run anything."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in UNSAFE:
            raise ModelError(f"{path} could run code when it is opened: use safetensors and delete it")


def digest_weights(pipeline: StableDiffusionPipeline) -> str:
    """sha256 over every tensor of the pipeline, by name."""
    state = hashlib.sha256()
    for part in ("vae", "text_encoder", "unet"):
        for name, tensor in sorted(getattr(pipeline, part).state_dict().items()):
            state.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            state.update(tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()
