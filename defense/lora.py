"""LoRA (Hu et al. 2022, arXiv 2106.09685): small matrices added to frozen weights. Put in, written, merged.

Written as diffusers does (`pytorch_lora_weights.safetensors`), read as people have them: that, a folder of peft, a
single file of kohya's trainer. In: pipelines of diffusers. Knows nothing of training.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # of a pipeline, that a LoRA may change
PEFT = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


class LoraError(ValueError):
    """A LoRA that does not fit the model, or a file that holds none."""


def add_lora(unet: Any, rank: int, alpha: int, targets: tuple[str, ...], seed: int) -> None:
    """Freeze `unet` and add a LoRA to the layers whose names end as `targets` say: the only ones that train now.

    It depends on the seed alone and changes nothing yet. alpha: the update is scaled by alpha / rank; 0 is rank.
    Raises LoraError.
    """
    from peft import LoraConfig

    unet.requires_grad_(False)
    options = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet.add_adapter(options)
        except ValueError as error:
            raise LoraError(f"lora_targets = {list(targets)}: {' '.join(str(error).split())}") from error


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write what `add_lora` added to the U-Net, for `load_lora_weights` of diffusers. Equal weights: equal bytes."""
    from peft import get_peft_model_state_dict

    _write(folder, {"unet": (get_peft_model_state_dict(pipeline.unet), pipeline.unet.peft_config["default"])})


def merge_lora(pipeline: DiffusionPipeline, path: Path) -> None:
    """Add a LoRA of any kind to the weights of the pipeline, for good. Raises LoraError or OSError."""
    if not path.exists():
        raise LoraError(f"{path} does not exist")
    if not hasattr(pipeline, "load_lora_weights"):
        raise LoraError(f"{type(pipeline).__name__} takes no LoRA")
    try:
        with tempfile.TemporaryDirectory() as temporary, _silence():
            folder, name = _find_file(path, Path(temporary))
            pipeline.load_lora_weights(folder, weight_name=name, use_safetensors=True, local_files_only=True)
            given = sum(w.numel() for key, w in load_file(folder / name).items() if not key.endswith(".alpha"))
        layers = [layer for part in PARTS for layer in _list_layers(getattr(pipeline, part, None))]
        taken = sum(weight.numel() for layer in layers for weight in layer.parameters())
        if taken < given:
            kind = type(pipeline).__name__
            raise LoraError(f"{path}: {given - taken:,} of its {given:,} numbers belong to no layer of this {kind}")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except LoraError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise LoraError(f"{path} cannot be merged into {type(pipeline).__name__} ({why})") from error


def _list_layers(part: nn.Module | None) -> list[nn.Module]:
    """The small matrices that were added to a part of a pipeline."""
    if part is None:
        return []
    kinds = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    return [module for name, module in part.named_modules() if name.rpartition(".")[2] in kinds]


@contextmanager
def _silence() -> Iterator[None]:
    """diffusers warns of every text encoder that a LoRA leaves alone; what does not fit is found otherwise."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def _find_file(path: Path, temporary: Path) -> tuple[Path, str]:
    """Folder and name of a file that diffusers reads; what peft wrote is rewritten to `temporary`."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LoraError(f"{path} is no safetensors file: opening it could run code")
        return path.parent, path.name
    peft = {"unet": path} if (path / PEFT).exists() else {part: path / part for part in PARTS}
    if found := {part: folder for part, folder in peft.items() if (folder / PEFT).exists()}:
        _write(temporary, {part: _read_peft(folder) for part, folder in found.items()})
        return temporary, FILE
    files = [path / FILE] if (path / FILE).exists() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise LoraError(f"{path} holds {len(files)} safetensors files: name the one that is the LoRA")
    return path, files[0].name


def _read_peft(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    from peft import LoraConfig

    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise LoraError(f"{folder} has no {weights.name}: save the adapter as safetensors")
    if (kind := json.loads((folder / PEFT).read_text(encoding="utf-8")).get("peft_type")) != "LORA":
        raise LoraError(f"{folder} is an adapter of type {kind}, and only LORA is supported")
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(weights).items()}
    return tensors, LoraConfig.from_pretrained(str(folder))


def _write(folder: Path, parts: dict[str, tuple[dict[str, torch.Tensor], Any]]) -> None:
    """Weights and peft configuration of each part of a pipeline → FILE, which `load_lora_weights` reads."""
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, Any] = {}
    for part, (weights, config) in parts.items():
        tensors |= {f"{part}.{name}": tensor.contiguous() for name, tensor in weights.items()}
        # Sets have no order of their own, and equal weights shall be equal files. So diffusers' own
        # `save_lora_weights` will not do: safetensors writes more than one entry of metadata in any order.
        ordered = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
        described |= {f"{part}.{key}": value for key, value in ordered.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, {LORA_ADAPTER_METADATA_KEY: json.dumps(described, sort_keys=True)})
    (folder / FILE).chmod(0o644)  # safetensors writes for the owner alone
