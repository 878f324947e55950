"""What decides a training run beside arm and seed: a flat TOML file ↔ `TrainConfig`, one to one.

Absent keys keep their defaults, unknown ones are refused. Knows nothing of models.
"""

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

# Keys of a model to fine-tune, and keys of one that is built from scratch: a config has the one or the other.
FINETUNE = ("base", "pickled", "loras", "lora_rank", "lora_alpha", "lora_targets")
TINY = (
    *("model", "autoencoder", "channels", "layers_per_block"),
    *("text_width", "text_layers", "caption_tokens", "prediction_type"),
)
CAPTIONED = ("autoencoder", "text_width", "text_layers", "caption_tokens", "null_caption")  # of no use without captions
WORDS = {
    "model": ("tiny", "tiny-uncond"),
    "prediction_type": ("v_prediction", "epsilon"),
    "precision": ("float32", "bfloat16"),
}


class ConfigError(ValueError):
    """A config file that cannot be used: which key, and what it may be."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What decides a run beside arm and seed. TOML files have these keys, configs/tiny.toml these values."""

    # data
    resolution: int = 32  # pixels a side
    held_out: float = 0.0  # share of components that no arm trains on
    null_caption: float = 0.1  # share of examples trained with the empty caption (classifier-free guidance)
    # model: one to fine-tune
    base: str = ""  # "tiny-base", pipeline folder, name on the hub (org/name, org/name@revision); "" builds one
    pickled: tuple[str, ...] = ()  # weights of base (unet/diffusion_pytorch_model.bin) to be opened although pickled
    loras: tuple[str, ...] = ()  # LoRA files or folders that are merged into base first
    lora_rank: int = 0  # 0 trains all weights of the U-Net
    lora_alpha: int = 0  # the update is scaled by lora_alpha / lora_rank; 0 is lora_rank
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # ends of names of layers
    # model: one to train from scratch
    model: str = "tiny"  # or "tiny-uncond", which takes no captions
    autoencoder: str = ""  # folder of an AutoencoderKL; "" is the one that comes with the package
    channels: tuple[int, ...] = (64, 128)  # of the U-Net, one a resolution
    layers_per_block: int = 1
    text_width: int = 64
    text_layers: int = 2
    caption_tokens: int = 16  # longer captions are cut
    prediction_type: str = "v_prediction"  # or "epsilon"
    # optimisation
    steps: int = 1600
    batch_size: int = 16
    learning_rate: float = 1e-3  # constant after the warmup
    warmup_steps: int = 100
    weight_decay: float = 0.01
    beta2: float = 0.99  # of AdamW
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99  # of the averaged weights, which are the ones saved
    # machine
    device: str = "auto"  # "auto" is cuda where there is one; "cpu", "cuda:1"
    precision: str = "float32"  # or "bfloat16": mixed, the trained weights stay float32
    accumulation: int = 1  # parts in which a batch goes through the model: as many times less memory
    gradient_checkpointing: bool = False  # computes activations twice instead of keeping them
    threads: int = 1  # 0 = one per processor; other numbers may round differently
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        shares = ("held_out", "null_caption", "beta2", "ema_decay")
        positive = (
            *("resolution", "layers_per_block", "text_width", "text_layers", "steps", "batch_size", "accumulation"),
            *("learning_rate", "max_grad_norm", "checkpoint_every"),
        )
        from_zero = ("warmup_steps", "weight_decay", "threads", "lora_rank", "lora_alpha")
        limits = {name: 0 <= getattr(self, name) < 1 for name in shares}
        limits |= {name: getattr(self, name) > 0 for name in positive}
        limits |= {name: getattr(self, name) >= 0 for name in from_zero}
        limits |= {name: getattr(self, name) in words for name, words in WORDS.items()}
        limits["caption_tokens"] = self.caption_tokens > 2
        limits["channels"] = len(self.channels) > 1 and min(self.channels) > 0
        limits["lora_targets"] = len(self.lora_targets) > 0
        for name, holds in limits.items():
            if not holds:
                hint = f": choose one of {', '.join(WORDS[name])}" if name in WORDS else ""
                raise ConfigError(f"{name} = {getattr(self, name)!r} is out of range{hint}")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size = {self.batch_size} is no multiple of accumulation = {self.accumulation}")
        if not self.base and (self.lora_rank or self.loras):
            raise ConfigError("a LoRA needs weights that it changes: set base")


def load_config(path: Path) -> TrainConfig:
    """A flat TOML file → TrainConfig. Raises ConfigError or OSError."""
    return parse_config(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError or OSError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid TOML ({error})") from error


def parse_config(values: dict[str, Any], where: str) -> TrainConfig:
    """The keys of a flat table → TrainConfig. Raises ConfigError, which names `where`."""
    idle, why = list(FINETUNE[1:]), "there is no base to fine-tune"
    if values.get("base"):
        idle, why = list(TINY), "the model is that of base"
    elif values.get("model") == "tiny-uncond":
        idle, why = [*idle, *CAPTIONED], "tiny-uncond has no base, no captions and no autoencoder"
    if given := [key for key in values if key in idle]:
        raise ConfigError(f"{where}: {', '.join(given)} would have no effect: {why}")
    return parse_table(TrainConfig, values, where)


def parse_table[T](kind: Callable[..., T], values: dict[str, Any], where: str) -> T:
    """A table → the dataclass `kind`, whose fields are its keys. Raises ConfigError, which names `where`."""
    types = get_type_hints(kind)
    for key in (key for key in values if key not in types):
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(types)}"
        raise ConfigError(f"{where}: unknown key {key!r}: {hint}")
    try:
        return kind(**{key: _convert(key, value, types[key]) for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(key: str, value: Any, kind: Any) -> Any:
    """A TOML value as the type of its field: a whole number may stand for a float, nothing else may."""
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, list) and all(type(v) is item for v in value):
            return tuple(value)
        raise ConfigError(f"{key} = {value!r} must be a list of {'whole numbers' if item is int else 'strings'}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} = {value!r} must be of type {kind.__name__}")
    return value
