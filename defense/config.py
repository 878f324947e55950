"""What decides a training run beside arm and seed: a flat TOML file ↔ `TrainConfig`, one to one.

Absent keys keep their defaults, unknown ones are refused. Knows nothing of models.
"""

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from defense.captions import PERTURBATIONS

# Keys of a model to fine-tune, and keys of one that is built from scratch: a config has the one or the other.
FINETUNE = ("base", "pickled", "loras", "lora_rank", "lora_alpha", "lora_targets")
TINY = (
    *("model", "autoencoder", "channels", "layers_per_block"),
    *("text_width", "text_layers", "caption_tokens", "prediction_type"),
)
CAPTIONED = ("autoencoder", "text_width", "text_layers", "caption_tokens", "null_caption")  # of no use without captions
# Keys that protect training images, described in docs/training.md; without them nothing is defended.
DEFENCES = (
    *("captions", "caption_perturbation", "perturbation_share", "embedding_noise", "weight_power", "weight_cap"),
    *("magnitude_percentile", "magnitude_steps", "dp_epsilon", "dp_noise_multiplier", "dp_delta", "noise_multiplicity"),
    "save_steps",
)
WORDS = {
    "model": ("tiny", "tiny-uncond"),
    "prediction_type": ("v_prediction", "epsilon"),
    "precision": ("float32", "bfloat16"),
    "captions": ("all", "one"),
    "caption_perturbation": ("", *PERTURBATIONS),
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
    # defences
    captions: str = "all"  # distinct ones of a cluster; "one": every row of a cluster is told its first, always
    caption_perturbation: str = ""  # random-tokens, repeat-words, random-caption or random-numbers; "" is none
    perturbation_share: float = 0.1  # of the captions that are perturbed, anew each time
    embedding_noise: float = 0.0  # standard deviation of what is added to embedded captions
    weight_power: float = 0.0  # each of m copies is drawn with weight 1 / m^weight_power
    weight_cap: int = 0  # a cluster is drawn at most as often as this many rows; 0 is no cap
    magnitude_percentile: float = 0.0  # losses of captions above it do not count; 0 is off
    magnitude_steps: int = 100  # steps after the warmup whose noise magnitudes that percentile is of
    dp_epsilon: float = 0.0  # DP-SGD that spends this much; 0 is off
    dp_noise_multiplier: float = 0.0  # or DP-SGD with this much noise; max_grad_norm then holds for each image alone
    dp_delta: float = 1e-5
    noise_multiplicity: int = 1  # noises and timesteps that the gradient of an image is the mean of
    save_steps: tuple[int, ...] = ()  # steps after which a model is kept, in RUN/steps
    # machine
    device: str = "auto"  # "auto" is cuda where there is one; "cpu", "cuda:1"
    precision: str = "float32"  # or "bfloat16": mixed, the trained weights stay float32
    accumulation: int = 1  # parts in which a batch goes through the model: as many times less memory
    gradient_checkpointing: bool = False  # computes activations twice instead of keeping them
    threads: int = 1  # 0 = one per processor; other numbers may round differently
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        shares = ("held_out", "null_caption", "beta2", "ema_decay", "dp_delta")
        positive = (
            *("resolution", "layers_per_block", "text_width", "text_layers", "steps", "batch_size", "accumulation"),
            *(
                "learning_rate",
                "max_grad_norm",
                "checkpoint_every",
                "magnitude_steps",
                "noise_multiplicity",
                "dp_delta",
            ),
        )
        from_zero = (
            *("warmup_steps", "weight_decay", "threads", "lora_rank", "lora_alpha", "embedding_noise", "weight_cap"),
            *("dp_epsilon", "dp_noise_multiplier"),
        )
        limits = {name: 0 <= getattr(self, name) < 1 for name in shares}
        limits |= {name: getattr(self, name) > 0 for name in positive}
        limits |= {name: getattr(self, name) >= 0 for name in from_zero}
        limits |= {name: getattr(self, name) in words for name, words in WORDS.items()}
        limits["caption_tokens"] = self.caption_tokens > 2
        limits["channels"] = len(self.channels) > 1 and min(self.channels) > 0
        limits["lora_targets"] = len(self.lora_targets) > 0
        limits["perturbation_share"] = 0 < self.perturbation_share <= 1
        limits["weight_power"] = 0 <= self.weight_power <= 1
        limits["magnitude_percentile"] = 0 <= self.magnitude_percentile < 100
        limits["save_steps"] = all(0 < step <= self.steps for step in self.save_steps)
        for name, holds in limits.items():
            if not holds:
                hint = (
                    f": choose one of {', '.join(word or repr(word) for word in WORDS[name])}" if name in WORDS else ""
                )
                raise ConfigError(f"{name} = {getattr(self, name)!r} is out of range{hint}")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size = {self.batch_size} is no multiple of accumulation = {self.accumulation}")
        if not self.base and (self.lora_rank or self.loras):
            raise ConfigError("a LoRA needs weights that it changes: set base")
        self._check_defences()

    @property
    def private(self) -> bool:
        """Whether this is DP-SGD."""
        return self.dp_epsilon > 0 or self.dp_noise_multiplier > 0

    def _check_defences(self) -> None:
        if not self.private:
            if self.noise_multiplicity > 1:
                raise ConfigError("noise_multiplicity would have no effect without DP-SGD: set dp_epsilon")
            return
        if self.dp_epsilon and self.dp_noise_multiplier:
            raise ConfigError("dp_epsilon and dp_noise_multiplier decide the same: set one of them")
        clashes = {
            "weight_power": (self.weight_power, "the accountant knows one sampling rate for all rows"),
            "weight_cap": (self.weight_cap, "the accountant knows one sampling rate for all rows"),
            "magnitude_percentile": (self.magnitude_percentile, "a threshold that is read off the data is not private"),
            "gradient_checkpointing": (self.gradient_checkpointing, "gradients of single images need one forward pass"),
            "precision = 'bfloat16'": (self.precision != "float32", "clipping needs gradients in float32"),
        }
        for key, (given, why) in clashes.items():
            if given:
                raise ConfigError(f"{key} does not go with DP-SGD: {why}")


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
