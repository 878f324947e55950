"""What the steps of `dedup --level hash` cost one picture: milliseconds of processor time, the least of several.

    python benchmarks/dedup_steps.py FOLDER [--pictures 10] [--repeats 12]

FOLDER holds JPEGs, such as a set of `dedup_speed.py`; its first ones are taken. To compare two versions of the code,
run it by turns with each of them on PYTHONPATH. Means over the pictures; a pair is a picture and itself.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import dedup
from dedup import detail, fingerprint, hashing, images, look, sources, verify


def least(work: Callable[[], object], repeats: int) -> float:
    """Milliseconds of this thread."""
    seconds = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return 1e3 * min(seconds)


def main(
    folder: Annotated[Path, typer.Argument(help="JPEGs, not below other folders.")],
    pictures: Annotated[int, typer.Option(help="So many of them.")] = 10,
    repeats: Annotated[int, typer.Option(help="Times that each step is done.")] = 12,
) -> None:
    """Print a line for each step."""
    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))[:pictures]]
    lumas = [images.decode_luma(data, min_side=fingerprint.JPEG_SIDE) for data in files]
    colours = [images.decode(data, min_side=look.CLOSE_SIDE).pixels for data in files]
    steps: dict[str, tuple[Callable[..., object], list]] = {
        "decode luma": (lambda data: images.decode_luma(data, min_side=fingerprint.JPEG_SIDE), files),
        "SHA-256": (hashing.digest, files),
        "box means": (lambda luma: hashing.reduce(luma.grey, hashing.PHASH_SOURCE), lumas),
        "Lanczos": (hashing.grey_thumbnails, [hashing.reduce(luma.grey, hashing.PHASH_SOURCE) for luma in lumas]),
        "PDQ's filter": (lambda luma: hashing.pdq_luma(luma.grey, luma.height, luma.width), lumas),
        "decode colours, thumbnail": (lambda data: images.decode(data, min_side=look.SIDE), files),
        "decode colours, close look": (lambda data: images.decode(data, min_side=look.CLOSE_SIDE), files),
        "close look at a pair": (lambda pixels: verify.local_differences(pixels, pixels), colours),
        "spectrum": (detail.power_spectrum, colours),
    }
    print(f"{Path(dedup.__file__).parent}, {len(files)} pictures\n\n| step | ms |\n|---|---:|")
    for name, (function, items) in steps.items():
        milliseconds = np.mean([least(partial(function, item), repeats) for item in items])
        print(f"| {name} | {milliseconds:.3f} |", flush=True)
    shard = sources.list_shards(folder, sources.Layout())[0]

    def hash_all() -> None:
        with tempfile.TemporaryDirectory() as work:
            fingerprint.fingerprint_shard(shard, 0, Path(work), fingerprint.DecodeOptions())

    print(f"| a fingerprint, all in all, of {len(shard.members)} | {least(hash_all, 3) / len(shard.members):.3f} |")


if __name__ == "__main__":
    typer.run(main)
