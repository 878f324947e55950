"""How fast `unmemorize export` copies: against `tar`, which writes the same members, in turn.

    python benchmarks/export_speed.py [--samples 8000] [--side 96] [--repeats 3]

Draws noise as JPEG (most of it kept, a tenth of it copies), packs it in shards of 2,000 samples with three members
each (KEY.jpg, KEY.txt, KEY.json), and lays the same files into a folder. `tar` writes an archive of the members that
are kept from files that lie there already extracted; for the folder it copies them, `tar -c | tar -x`. One process,
files in the page cache; wall time, the best of the repeats. Export reads the dropped members too, and hashes every
image.
"""

import io
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from dedup import manifest
from dedup.export import Options, export
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate
from dedup.sources.demo import write_shard

PER_SHARD = 2_000


def draw_samples(count: int, side: int) -> list[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(0)
    samples: list[tuple[str, dict[str, bytes]]] = []
    for number in range(count):
        if number % 10 == 9:
            data = samples[number // 2][1]["jpg"]
        else:
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=95)
            data = buffer.getvalue()
        caption = f"picture {number} of a shard"
        record = json.dumps({"caption": caption, "url": f"https://example.org/{number}.jpg"})
        samples.append((f"{number:09d}", {"jpg": data, "txt": caption.encode(), "json": record.encode()}))
    return samples


def measure(work: Path, function: Callable[[Path], object], repeats: int) -> float:
    """Seconds of the fastest repeat, each into a folder of its own."""
    best = float("inf")
    for number in range(repeats):
        dest = work / f"{number}"
        start = time.perf_counter()
        function(dest)
        best = min(best, time.perf_counter() - start)
        shutil.rmtree(dest)
    return best


def archive(dest: Path, folder: Path, names: list[str]) -> None:
    """As many archives as there are shards."""
    dest.mkdir()
    for start in range(0, len(names), 3 * PER_SHARD):
        listed = "\n".join(names[start : start + 3 * PER_SHARD])
        command = ["tar", "-cf", str(dest / f"{start}.tar"), "-C", str(folder), "-T", "-"]
        subprocess.run(command, input=listed.encode(), check=True)


def copy(dest: Path, folder: Path, names: list[str]) -> None:
    dest.mkdir()
    command = ["tar", "-cf", "-", "-C", str(folder), "-T", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        with subprocess.Popen(["tar", "-xf", "-", "-C", str(dest)], stdin=reader.stdout) as writer:
            assert reader.stdin is not None
            reader.stdin.write("\n".join(names).encode())
            reader.stdin.close()
        if writer.wait() or reader.wait():
            raise SystemExit("tar failed")


def main(
    samples: Annotated[int, typer.Option(help="Samples in all shards.")] = 8_000,
    side: Annotated[int, typer.Option(help="Pixels a side of each image.")] = 96,
    repeats: Annotated[int, typer.Option(help="The best of so many.")] = 3,
) -> None:
    """MB/s of the members that are kept, and the share of tar's."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        drawn = draw_samples(samples, side)
        (work / "shards").mkdir()
        (work / "files").mkdir()
        (work / "dest").mkdir()
        for number in range(0, samples, PER_SHARD):
            write_shard(work / "shards" / f"{number // PER_SHARD:05d}.tar", drawn[number : number + PER_SHARD])
        for key, members in drawn:
            for extension, data in members.items():
                (work / "files" / f"{key}.{extension}").write_bytes(data)
        options = DedupOptions(level="exact")
        for name in ("shards", "files"):
            deduplicate(work / name, work / f"{name}-out", options, jobs=1)
        rows = manifest.read(work / "shards-out").filter("keep")
        kept = dict(drawn)
        names = [f"{key}.{extension}" for key in rows["key"] for extension in ("jpg", "txt", "json")]
        size = sum(len(data) for key in rows["key"] for data in kept[key].values()) / 1e6
        print(f"{samples:,} samples, {len(rows):,} kept ({size:,.0f} MB, {rows['size'].mean():,.0f} bytes an image)")
        for source, tar, formats in (
            ("shards", archive, ("same", "parquet", "huggingface")),
            ("files", copy, ("same", "imagefolder", "webdataset", "parquet")),
        ):
            base = measure(work / "dest", lambda dest, tar=tar: tar(dest, work / "files", names), repeats)
            print(f"  {source:7} {'tar':12} {size / base:8,.0f} MB/s")
            for format_ in formats:

                def run(dest: Path, source: str = source, format_: str = format_) -> None:
                    export(work / f"{source}-out", dest, Options(format_), jobs=1)

                seconds = measure(work / "dest", run, repeats)
                print(f"  {source:7} {format_:12} {size / seconds:8,.0f} MB/s  {base / seconds:6.2f} × tar")


if __name__ == "__main__":
    typer.run(main)
