"""What decides an audit: a TOML file of small tables ↔ `Recipe`. Written down in DIR before anything is trained.

    seeds = 2
    [plant]            # without this table the dataset is audited as it is
    canaries = 48
    [train]            # the keys of `defense.config.TrainConfig`
    steps = 1600

Absent keys keep their defaults, unknown ones are refused. Knows nothing of how the steps are done.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from defense.arms import ARMS
from defense.config import ConfigError, TrainConfig, parse_config, parse_table, read_toml
from eval.verdict import DECLARED

CONTROLS = 0.1  # of the components of a dataset as it is are held out, as controls, unless the config says otherwise
LATER = ("seeds", "arms", "primary", "at_least", "generate", "utility")  # what may still change, as exploratory


@dataclass(frozen=True, slots=True)
class Planting:
    """Parameters of `dedup.plant.plant`."""

    canaries: int = 48  # 0: the dataset is audited as it is
    controls: int = 0
    multiplicities: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    fillers: int = 250
    edited: float = 0.5
    min_distance: float = 0.25


@dataclass(frozen=True, slots=True)
class Detection:
    """What deduplicates: options of `unmemorize dedup`."""

    level: str = "copy"
    encoder: str = "local"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Parameters of `eval.generate.generate`, and of `eval.unprompted.draw_unprompted`."""

    n: int = 16
    guidance_scale: float = 1.0
    steps: int = 15
    limit: int = 200
    null: int = 256  # images for the empty caption, of each model; 0 draws none


@dataclass(frozen=True, slots=True)
class Utility:
    """How good the images are: KID against held-out ones."""

    images: int = 0  # held-out images; 0 does not measure
    extractor: str = "sscd-distilled"  # of `dedup.embedding`
    margin: float = 0.05  # of KID that a deduplicated model may lose, fixed beforehand


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole audit. Tuples that are empty mean what is usual for the dataset, planted or not."""

    seeds: int = 2
    arms: tuple[str, ...] = ()
    primary: tuple[str, ...] = ()  # arms whose contrast with raw is declared
    at_least: int = 2  # copies from which an image counts as repeated
    widths: tuple[
        int, ...
    ] = ()  # of models that are compared with each other (`eval.capacity`); () is the one of train
    plant: Planting = field(default_factory=lambda: Planting(canaries=0))
    dedup: Detection = field(default_factory=Detection)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: Sampling = field(default_factory=Sampling)
    utility: Utility = field(default_factory=Utility)

    def __post_init__(self) -> None:
        usual = DECLARED[self.planted]
        arms = self.arms or ("raw", *usual)
        object.__setattr__(self, "arms", ("raw", *(arm for arm in dict.fromkeys(arms) if arm != "raw")))
        object.__setattr__(self, "primary", self.primary or tuple(arm for arm in usual if arm in self.arms))
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ConfigError(f"unknown arm {unknown[0]!r}: choose among {', '.join(ARMS)}")
        if missing := [arm for arm in self.primary if arm not in self.arms]:
            raise ConfigError(f"primary names {missing[0]!r}, which is not among the arms {', '.join(self.arms)}")
        if self.seeds < 1 or self.at_least < 2:
            raise ConfigError(f"seeds = {self.seeds} must be at least 1, at_least = {self.at_least} at least 2")
        if any(width < 32 or width % 32 for width in self.widths) or (self.widths and self.train.base):
            raise ConfigError(f"widths = {list(self.widths)}: multiples of 32, of a model that is built from scratch")
        if self.generate.null < 0:
            raise ConfigError(f"generate: null = {self.generate.null} must be 0 or more")
        if self.utility.margin <= 0 or self.utility.images < 0:
            raise ConfigError("utility: margin must be above 0, images 0 or more")

    @property
    def planted(self) -> bool:
        return self.plant.canaries > 0

    def record(self) -> dict[str, Any]:
        """As JSON values, every default spelt out."""
        return _listed(asdict(self))


def load_recipe(path: Path | None, **chosen: Any) -> Recipe:
    """A TOML file → Recipe; None: all defaults. chosen: keys above the tables. Raises ConfigError or OSError."""
    values = (read_toml(path) if path is not None else {}) | chosen
    if "plant" not in values and isinstance(train := values.setdefault("train", {}), dict):
        train.setdefault("held_out", CONTROLS)
    tables: dict[str, Any] = {"plant": Planting, "dedup": Detection, "generate": Sampling, "utility": Utility}
    parsed: dict[str, Any] = {}
    for name in (*tables, "train"):
        if name in values:
            table, where = values.pop(name), f"{path}: [{name}]"
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: {name} must be a table: [{name}]")
            parsed[name] = parse_config(table, where) if name == "train" else parse_table(tables[name], table, where)
    return parse_table(Recipe, values | parsed, str(path))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
