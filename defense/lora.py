"""LoRA (Hu et al. 2022, arXiv 2106.09685): small matrices added to frozen weights. Put in, written, merged.

Written as diffusers does (`pytorch_lora_weights.safetensors`), read as people have them: that, a folder of peft, a
single file of kohya's trainer. In: pipelines of diffusers. Knows nothing of training.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

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
            raise LoraError(f"lora_targets = {list(targets)}: {_first_line(error)}") from error


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write what `add_lora` added to the U-Net, for `load_lora_weights` of diffusers. Equal weights: equal bytes."""
    from peft import get_peft_model_state_dict

    weights = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(pipeline.unet).items()}
    _write(type(pipeline), folder, {"unet": (weights, pipeline.unet.peft_config["default"])})


def merge_lora(pipeline: DiffusionPipeline, path: Path) -> None:
    """Add a LoRA of any kind to the weights of the pipeline, for good. Raises LoraError or OSError."""
    if not path.exists():
        raise LoraError(f"{path} does not exist")
    if not hasattr(pipeline, "load_lora_weights"):
        raise LoraError(f"{type(pipeline).__name__} takes no LoRA")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder, name = _find_file(type(pipeline), path, Path(temporary))
            pipeline.load_lora_weights(folder, weight_name=name, use_safetensors=True, local_files_only=True)
        if not pipeline.get_list_adapters():
            raise LoraError(f"{path}: none of its weights belongs to a {type(pipeline).__name__}")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except LoraError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoraError(f"{path} cannot be merged into {type(pipeline).__name__} ({_first_line(error)})") from error


def _find_file(kind: type[DiffusionPipeline], path: Path, temporary: Path) -> tuple[Path, str]:
    """Folder and name of a file that diffusers reads; what peft wrote is rewritten to `temporary`."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LoraError(f"{path} is no safetensors file: opening it could run code")
        return path.parent, path.name
    peft = {"unet": path} if (path / PEFT).exists() else {part: path / part for part in PARTS}
    if found := {part: folder for part, folder in peft.items() if (folder / PEFT).exists()}:
        _write(kind, temporary, {part: _read_peft(folder) for part, folder in found.items()})
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


def _write(kind: type[DiffusionPipeline], folder: Path, parts: dict[str, tuple[dict[str, torch.Tensor], Any]]) -> None:
    """Weights and peft configuration of each part → FILE."""
    options: dict[str, Any] = {}
    for part, (weights, config) in parts.items():
        options[f"{part}_lora_layers"] = weights
        # Sets have no order of their own, and equal weights shall be equal files.
        described = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        options[f"{part}_lora_adapter_metadata"] = described
    try:
        kind.save_lora_weights(folder, **options)
    except TypeError as error:
        raise LoraError(f"{kind.__name__} takes no LoRA of {' and '.join(parts)}") from error
    (folder / FILE).chmod(0o644)  # safetensors writes for the owner alone


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
