"""Pipelines of diffusers on disk: opened without running anything, saved, and told apart by their weights.

A pipeline is a folder with model_index.json, a name on the hub, or the name of one that comes with the package. A
folder with base.json refers to one: where it is, the digest of its weights, and the LoRAs to merge into it, of which
the last may lie beside it. One with line.json refers to two, and how far to go from the one through the other. Knows
nothing of data or training.
"""

import hashlib
import inspect
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from dedup import manifest
from defense import lora
from defense.extrapolation import extrapolate

INDEX, BASE, LINE = "model_index.json", "base.json", "line.json"
# Pipelines that come with the package: their names win over folders; ./tiny-base is a folder.
SHIPPED = {"tiny-base": Path(__file__).parent / "pretrained" / "tiny-base"}
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # org/name, org/name@revision
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
UNUSED = ("safety_checker", "feature_extractor")  # a blackened image would count as one that did not come back
ESSENTIAL = {"unet", "transformer", "vae", "scheduler"}  # a text encoder may be absent: Stable Diffusion 3 has three
# Classes that can be trained, and how. Whatever draws from a prompt can be sampled.
TRAINABLE = {
    "StableDiffusionPipeline": ("full", "LoRA"),
    "StableDiffusionXLPipeline": ("LoRA",),
    "DDPMPipeline": ("full",),
}
# What the two libraries raise about a folder that is not what it should be.
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError),
    *(SafetensorError, pickle.UnpicklingError),
)


class ModelError(ValueError):
    """A model that cannot be built, or must not be opened."""


def load_pipeline(
    base: str | Path, *, loras: Sequence[str | Path] = (), pickled: Sequence[str] = (), device: str = "cpu"
) -> DiffusionPipeline:
    """A pipeline of any class, in float32: RUN/model, another folder, or a name of `SHIPPED` or on the hub.

    loras: merged into its weights, in this order. pickled: files of weights, relative to the folder, that are opened
    although they are no safetensors; torch then loads tensors and nothing else. Code in a folder is never run, and a
    safety checker is left out. Raises ModelError or LoraError.
    """
    folder = find_folder(base, pickled)
    if (folder / LINE).exists():
        pipeline = _load_line(folder)
    else:
        pipeline = _load_changed(folder) if (folder / BASE).exists() else _load_plain(folder, pickled)
    for path in loras:
        lora.merge_lora(pipeline, Path(path))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(pick_device(device))


def find_folder(base: str | Path, pickled: Sequence[str] = ()) -> Path:
    """Where a pipeline lies; one on the hub is fetched, unless it was before. Raises ModelError."""
    if base in SHIPPED:
        return SHIPPED[str(base)]
    if Path(base).is_dir():
        return Path(base)
    name = HUB_NAME.fullmatch(str(base))
    if name is None:
        raise ModelError(f"{base} holds no pipeline: no folder (is the run finished?), no name on the hub (org/name)")
    _be_quiet()
    try:
        safe = None if pickled else True  # None would take what there is
        return Path(DiffusionPipeline.download(name[1], revision=name[2], use_safetensors=safe))
    except UNREADABLE as error:
        raise ModelError(f"{base} is no folder, and the hub does not give it ({_first_line(error)})") from error


def pick_device(device: str) -> torch.device:
    """Raises ModelError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device = {device!r} cannot be used ({_first_line(error)})") from error


def check_trainable(pipeline: DiffusionPipeline, method: str) -> None:
    """Raise ModelError unless the pipeline can be trained by that method, "full" or "LoRA"."""
    name = type(pipeline).__name__
    if method not in TRAINABLE.get(name, ()):
        known = ", ".join(f"{kind} ({' or '.join(methods)})" for kind, methods in TRAINABLE.items())
        raise ModelError(f"{name} cannot be trained ({method}): supported are {known}")
    unet, schedule, vae = pipeline.unet.config, pipeline.scheduler.config, getattr(pipeline, "vae", None)
    if schedule.get("prediction_type") not in ("epsilon", "v_prediction") or "beta_schedule" not in schedule:
        kind = f"{type(pipeline.scheduler).__name__} of prediction_type {schedule.get('prediction_type')}"
        raise ModelError(f"{kind} cannot be trained: supported are epsilon and v_prediction of a noise schedule")
    channels = 3 if vae is None else vae.config.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        found = f"{unet.in_channels} channels in, {unet.out_channels} out"
        raise ModelError(f"the U-Net of this {name} has {found}: supported are {channels} in and out")
    if vae is not None and getattr(vae.config, "latents_mean", None):
        raise ModelError("an autoencoder with latents_mean is not supported")


def set_resolution(pipeline: DiffusionPipeline, resolution: int) -> None:
    """Let the pipeline draw at this many pixels a side. Raises ModelError if its U-Net cannot."""
    factor = getattr(pipeline, "vae_scale_factor", 1)
    least = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % least:
        raise ModelError(f"resolution {resolution} is no multiple of {least}")
    pipeline.unet.register_to_config(sample_size=resolution // factor)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder of safetensors. It is complete as soon as it is there."""
    _be_quiet()
    temporary = _make_temporary(folder)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    for path in (temporary / "model_index.json", *temporary.glob("*/config.json")):
        config = manifest.read_json(path)
        if config.pop("_name_or_path", None) is not None:  # where a part came from: no model depends on that
            manifest.write_json(path, config)
    for path in temporary.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner alone
    temporary.replace(folder)


def save_changed(pipeline: DiffusionPipeline, folder: Path, base: dict[str, Any]) -> None:
    """Write the LoRA of a pipeline and what it belongs to (`describe_base`); `load_pipeline` opens it."""
    temporary = _make_temporary(folder)
    lora.save_lora(pipeline, temporary)
    own = {"path": lora.FILE, "sha256": _digest_files(temporary / lora.FILE)}
    changed = base | {"loras": [*base["loras"], own], "sample_size": pipeline.unet.config.sample_size}
    manifest.write_json(temporary / BASE, changed)
    temporary.replace(folder)


def describe_base(
    pipeline: DiffusionPipeline, base: str | Path, loras: Sequence[str | Path], pickled: Sequence[str]
) -> dict[str, Any]:
    """What base.json says of `load_pipeline(base)`, which is `pipeline`, and of the LoRAs to be merged into it."""
    changed = find_folder(base, pickled) / BASE
    if changed.exists():  # its own base, then: one reference never leads to another
        described = manifest.read_json(changed)
        before = [entry | {"path": str(changed.parent.resolve() / entry["path"])} for entry in described["loras"]]
    else:
        described = {"base": _name_lasting(base), "pickled": list(pickled), "weights_sha256": digest_weights(pipeline)}
        before = []
    merged = [{"path": str(Path(path).resolve()), "sha256": _digest_files(Path(path))} for path in loras]
    return described | {"loras": before + merged}


def save_line(folder: Path, tuned: Path, base: str | Path, weight: float) -> DiffusionPipeline:
    """Write line.json, which `load_pipeline` opens, and return that pipeline. Raises ModelError, ExtrapolationError."""
    ends = load_pipeline(tuned), load_pipeline(base)
    digests = [digest_weights(pipeline) for pipeline in ends]
    line = {"models": [str(Path(tuned).resolve()), _name_lasting(base)], "weights_sha256": digests, "weight": weight}
    pipeline = extrapolate(*ends, weight)
    manifest.write_json(folder / LINE, line)
    return pipeline


def digest_weights(pipeline: DiffusionPipeline) -> str:
    """sha256 over every tensor of the pipeline, by name."""
    state = hashlib.sha256()
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for part in sorted(parts):
        for name, tensor in sorted(parts[part].state_dict().items()):
            state.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def open_network(kind: type[nn.Module], folder: Path, root: Path, pickled: Sequence[str] = ()) -> Any:
    """A network with all of its weights, float32. Pickled ones must be named relative to `root`. Raises ModelError."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    safe = any(file.suffix == ".safetensors" for file in files)
    for file in (file for file in files if not safe and file.suffix in PICKLES):
        name = file.relative_to(root).as_posix()
        if name not in pickled:
            what = f"{file} is pickled, so opening it could run code"
            raise ModelError(f"{what}: convert it to safetensors, or trust it by name: pickled = [{name!r}]")
    # Without safetensors both libraries call torch.load with weights_only=True, which makes tensors and nothing else.
    network, told = open_folder(kind, folder, use_safetensors=safe or not pickled, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} weights of a {kind.__name__}, such as {missing[0]}")
    return network


def open_folder(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a local folder: float32, safetensors unless told, no code. Raises ModelError."""
    for path in sorted(folder.rglob("*.py")):
        raise ModelError(f"{path} could run code when it is opened: delete it")
    options = {"use_safetensors": True, "local_files_only": True} | options
    _be_quiet()
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, **options)
    except UNREADABLE as error:
        raise ModelError(f"{folder} cannot be opened ({_first_line(error)})") from error


def _load_plain(folder: Path, pickled: Sequence[str]) -> DiffusionPipeline:
    """The pipeline of a folder with model_index.json. Raises ModelError."""
    if not (folder / INDEX).exists():
        raise ModelError(f"{folder} holds no pipeline (no {INDEX}): is the run finished?")
    index = manifest.read_json(folder / INDEX)
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ModelError(f"{folder} is a {name}, which diffusers {diffusers.__version__} does not have")
    parts = {part: value for part, value in index.items() if isinstance(value, list) and len(value) == 2}
    absent = {part for part, (library, _) in parts.items() if library is None} - ESSENTIAL
    options: dict[str, Any] = dict.fromkeys([*absent, *(part for part in UNUSED if part in parts)])
    options |= {key: False for key in ("requires_safety_checker", "add_watermarker") if _takes(kind, key)}
    for part in sorted(parts.keys() - options.keys()):
        network = getattr(LIBRARIES.get(parts[part][0]), str(parts[part][1]), None)
        if isinstance(network, type) and issubclass(network, nn.Module):
            place = folder / part if (folder / part).is_dir() else folder  # old pipelines of one network are flat
            options[part] = open_network(network, place, folder, pickled)
    return open_folder(DiffusionPipeline, folder, **options)


def _load_line(folder: Path) -> DiffusionPipeline:
    """The pipeline of a folder with line.json. Raises ModelError or ExtrapolationError."""
    line = manifest.read_json(folder / LINE)
    tuned, base = (load_pipeline(place) for place in line["models"])
    for place, pipeline, digest in zip(line["models"], (tuned, base), line["weights_sha256"], strict=True):
        if digest_weights(pipeline) != digest:
            raise ModelError(f"{place} is no longer the model that {folder} was made from")
    return extrapolate(tuned, base, line["weight"])


def _load_changed(folder: Path) -> DiffusionPipeline:
    """The pipeline of a folder with base.json. Raises ModelError or LoraError."""
    changed = manifest.read_json(folder / BASE)
    pipeline = _load_plain(find_folder(changed["base"], changed["pickled"]), changed["pickled"])
    if digest_weights(pipeline) != changed["weights_sha256"]:
        raise ModelError(f"{changed['base']} is no longer the pipeline that {folder} was trained from")
    for entry in changed["loras"]:
        path = folder / entry["path"]
        if _digest_files(path) != entry["sha256"]:
            raise ModelError(f"{path} is no longer the LoRA that {folder} was trained with")
        lora.merge_lora(pipeline, path)
    if changed["sample_size"] is not None:
        pipeline.unet.register_to_config(sample_size=changed["sample_size"])
    return pipeline


def _name_lasting(base: str | Path) -> str:
    """What will find the same pipeline again: an absolute path, or the name, with the commit if it is on the hub."""
    if base in SHIPPED:
        return str(base)
    if Path(base).is_dir():
        return str(Path(base).resolve())
    return f"{str(base).partition('@')[0]}@{find_folder(base).name}"  # the cache names folders by commit


def _digest_files(path: Path) -> str:
    """sha256 of a file, or of the files in a folder. Raises ModelError."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    state = hashlib.sha256()
    for file in files:
        if not file.exists():
            raise ModelError(f"{file} does not exist")
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        state.update(f"{file.relative_to(path).as_posix()} {content}\n".encode())
    return state.hexdigest()


def _make_temporary(folder: Path) -> Path:
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _takes(kind: Any, option: str) -> bool:
    return option in inspect.signature(kind.__init__).parameters


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _be_quiet() -> None:
    """A bar for files that take milliseconds is noise."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
