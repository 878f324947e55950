"""How fast webdataset shards are read: our reader against `tarfile` and the `webdataset` package.

    python benchmarks/read_shards.py [--samples 4000] [--image-bytes 24000] [--repeats 3]

Writes shards of three members a sample (KEY.jpg of random bytes, KEY.txt, KEY.json) to a temporary folder: plain USTAR,
the PAX headers that webdataset's writer (hence img2dataset) puts before every member, and gzip. Every reader visits all
bytes of all members from the page cache, in turn; processor time counts, and the best of the repeats.
"""

import gzip
import io
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from dedup import sources
from dedup.sources import webdataset


def write(path: Path, samples: int, image_bytes: int, *, pax: bool) -> None:
    rng = random.Random(0)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as archive:
        for number in range(samples):
            caption = f"picture {number} of a shard"
            record = json.dumps({"caption": caption, "url": f"https://example.org/{number}.jpg", "status": "success"})
            members = {"jpg": rng.randbytes(image_bytes), "txt": caption.encode(), "json": record.encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                info.mtime = 1.5 + number if pax else number  # a fraction needs PAX
                archive.addfile(info, io.BytesIO(data))


def read_ours(path: Path) -> int:
    """As `unmemorize dedup` reads: samples with image and caption."""
    return sum(record.data is not None for record in sources.read_shard(webdataset.list_shards(path.parent, [path])[0]))


def read_members(path: Path) -> int:
    return sum(len(member.data or b"") > 0 for member in webdataset.read_members(path)) // 3


def read_tarfile(path: Path) -> int:
    """Streaming, as most loaders do."""
    with tarfile.open(path, "r|*") as archive:
        files = (archive.extractfile(info) for info in archive)
        return sum(len(file.read()) > 0 for file in files if file is not None) // 3


def read_webdataset(path: Path) -> int:
    import webdataset as wds

    samples: Iterator[dict] = iter(wds.WebDataset(str(path), shardshuffle=False))
    return sum("jpg" in sample for sample in samples)


READERS: dict[str, Callable[[Path], int]] = {
    "ours (samples)": read_ours,
    "ours (members)": read_members,
    "tarfile r|": read_tarfile,
    "webdataset": read_webdataset,
}


def main(
    samples: Annotated[int, typer.Option(help="Samples in the shard.")] = 4_000,
    image_bytes: Annotated[int, typer.Option(help="Bytes of each image.")] = 24_000,
    repeats: Annotated[int, typer.Option(help="The best of so many.")] = 3,
) -> None:
    """Samples per second and ratios to ours, for each kind of shard."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.tar" for name in ("ustar", "pax")}
        for name, path in paths.items():
            write(path, samples, image_bytes, pax=name == "pax")
        paths["ustar, gzip"] = Path(folder) / "ustar.tar.gz"
        paths["ustar, gzip"].write_bytes(gzip.compress(paths["ustar"].read_bytes(), 1))
        print(f"{samples:,} samples of 3 members, {image_bytes:,} bytes an image; samples per second of processor time")
        for kind, path in paths.items():
            seconds = dict.fromkeys(READERS, float("inf"))
            for _ in range(repeats):
                for name, read in READERS.items():
                    start = time.process_time()
                    try:
                        found = read(path)
                    except ModuleNotFoundError:
                        continue
                    seconds[name] = min(seconds[name], time.process_time() - start)
                    if found != samples:
                        raise SystemExit(f"{name} found {found} of {samples} samples in a {kind} shard")
            for name, best in seconds.items():
                rate = samples / best
                print(f"  {kind:12} {name:16} {rate:10,.0f}/s  {seconds['ours (samples)'] / best:6.2f} × ours")


if __name__ == "__main__":
    typer.run(main)
