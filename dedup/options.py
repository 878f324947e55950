"""What decides a result, and the folder OUT before a run: its options, its lock, what is left in it that still holds.

An OUT is of one source and of one set of options, but for those that only decide anew. Knows nothing of the stages.
"""

import fcntl
import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dedup import images, manifest, sources, subjects

# Options that another run on OUT may choose anew: nothing is hashed again.
POLICIES = ("flips", "rotations", "prefer", "per", "against_split", "max_copies", "max_loss", "base", "against")
LIBRARIES = ("unmemorize", "pillow", "imagehash", "numpy", "polars", "opencv-python-headless", "simplejpeg")
DECODERS = ("pydicom", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "python-gdcm")


class OutputError(OSError):
    """OUT cannot be used now: another run is in it."""


class OptionsError(ValueError):
    """OUT must not be used: it lies inside SRC, or holds a run with other options."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the result; recorded in run.json. Two runs with equal options on one source give equal bytes."""

    level: str = "hash"  # "exact": equal bytes only; "hash": PDQ candidates, verified; "copy": edited copies too
    encoder: str = "local"  # of level "copy": "local", "external" or a name in `embedding.ENCODERS`
    weights: str | None = None  # a file, a folder or a hub id; of "external": the folder that holds the vectors
    weights_sha256: str | None = None
    max_false_pairs: float | None = None  # unrelated pairs that may be compared; None: three a picture
    hash_decode: str = "fast"
    max_pixels: int = images.MAX_PIXELS
    max_frames: int = images.MAX_FRAMES
    flips: str = "keep"
    rotations: str = "keep"
    prefer: str = ""  # criteria of `policy.parse_preferences` that come before the usual keeper order
    per: str = "auto"  # one of `scopes.PER`: rows of different ones do not delete each other
    against_split: str | None = None  # rows of other splits that match it are dropped, and none of its own
    max_copies: int = 1  # rows of a star that are kept
    max_loss: float = 0.5  # share of its rows that a scope may lose before it is said
    layout: sources.Layout = field(default_factory=sources.Layout)  # how SRC is read
    base: str | None = None  # absolute: a finished run over older rows; what it kept stays kept
    against: tuple[str, ...] = ()  # sources or finished runs; what is a copy of a picture there goes, with its star


def resolve_auto(level: str, encoder: str, out: Path, base: Path | None = None) -> tuple[str, str]:
    """What `auto` means: level and encoder of the run that OUT holds, or else the base, else the best there is.

    The encoder `local` finds more than SSCD's student and needs no weights (docs/benchmarks.md).
    """
    recorded = [out / ".work" / "options.json", *([base / "run.json"] if base else [])]
    before: dict[str, Any] = next((manifest.read_json(path)["options"] for path in recorded if path.exists()), {})
    return (
        before.get("level", "copy") if level == "auto" else level,
        before.get("encoder", Options().encoder) if encoder == "auto" else encoder,
    )


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """One run per OUT. The lock goes with the process, however it ends."""
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{out} is in use by another run: wait for it or choose another -o") from error
        yield


def check(out: Path, src: Path, options: Options) -> list[str]:
    """Names of the policies that were others in the run that OUT holds. Raises OptionsError, before OUT is touched."""
    path = out / ".work" / "options.json"
    chosen, changed = record_options(options), []
    if path.exists():
        before = manifest.read_json(path)
        before["options"] = record_options(Options()) | before["options"]  # an older run knew fewer
        changed = [k for k in chosen if before["options"][k] != chosen[k]]
        differing = [k for k in changed if k not in POLICIES]
        if before["src"] != str(src):
            raise OptionsError(f"{out} holds a run over {before['src']}: choose another -o or delete it")
        if differing:
            what = ", ".join(f"{k} was {before['options'][k]!r}" for k in differing)
            raise OptionsError(f"{out} was made with other options ({what}): choose another -o or delete it")
    return changed


def prepare(out: Path, src: Path, shards: list[sources.Shard], options: Options, key: Path) -> Path:
    """The work folder, with signatures of shards that have changed since the last run removed."""
    path = out / ".work" / "options.json"
    recorded = {"src": str(src), "options": record_options(options), "versions": list_versions()}
    changed = check(out, src, options)
    if path.exists():
        before = manifest.read_json(path)
        if changed or options.base or options.against:
            (out / "run.json").unlink(missing_ok=True)  # it is of other policies until it is decided anew
        if before["versions"] != recorded["versions"]:
            for folder in ("thumbnails", "features-*", "embeddings-*", "verdicts"):
                for stale in (out / ".work").glob(folder):
                    shutil.rmtree(stale)
    work = out / ".work"
    manifest.write_json(path, recorded)
    stamps_path = out / ".work" / "shards.json"
    before_stamps = manifest.read_json(stamps_path) if stamps_path.exists() else []
    stamps = stamp(shards, key)
    for index, now in enumerate(stamps):
        if index >= len(before_stamps) or before_stamps[index] != now:
            (work / "signatures" / f"{index:05d}.parquet").unlink(missing_ok=True)
    if stamps != before_stamps:
        (out / "run.json").unlink(missing_ok=True)  # what stands there is of another source now
    manifest.write_json(stamps_path, stamps)
    return work


def stamp(shards: list[sources.Shard], key: Path) -> list[str]:
    """What the signatures of each shard depend on, but for the options: other libraries and keys hash otherwise."""
    return [f"{shard.fingerprint} {list_versions()} {subjects.check_key(key)}" for shard in shards]


def record_options(options: Options) -> dict[str, Any]:
    """As run.json and the command line have them: those of the layout beside the others."""
    chosen = asdict(options) | {"against": list(options.against)}
    return chosen | chosen.pop("layout")


@functools.cache
def list_versions() -> dict[str, str]:
    """Of all that decides about pixels, as far as it is installed."""
    found = {name: version(name) for name in LIBRARIES}
    for name in DECODERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
