"""Time and memory of deduplication at scale: made-up signatures to manifest. Real pictures: `scale_pictures.py`.

    python benchmarks/scale.py rows --work DIR [--sizes 100000,1000000,10000000] [--memory-budget 4GB]
    python benchmarks/scale.py plot TABLE.md docs/scale.svg
    python benchmarks/scale.py plan

`rows`: signatures of pictures that do not exist, in files of 10,000, through `dedup --level hash` from there to the
manifest. 1 % of the rows are copies, byte for byte, of others; 1 % have a code within 31 bits of another one's, in a
random orientation; a tenth is one chain, each link 28 bits or less from the next. **No picture is read**: a stand-in
answers for the second reading, and confirms every candidate. All planted pairs must be found. Each size is a process of
its own, the exponent that of time between neighbouring sizes; memory is the largest sum of proportional set sizes over
the process tree, sampled, of each stage. `--planted` leaves out the search: what was planted stands for what it finds.
`plot` draws the table that `rows` printed. `plan`: what larger datasets would take, by arithmetic.
"""

import base64
import itertools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import polars as pl
import psutil
import typer

from dedup import (
    bands,
    detail,
    engine,
    fingerprint,
    hamming,
    look,
    manifest,
    memory,
    options,
    pairing,
    pipeline,
    search,
    sources,
    subjects,
    vectors,
)

app = typer.Typer()
STAGES = ("fingerprint", "search", "verify", "decide", "write")
PER_FILE = 10_000
PLANTED = 100  # one row in so many is a copy of the bytes, one in so many a near code
CHAIN = 10  # one row in so many is a link
FLAT = base64.b64encode(np.ones(detail.SEGMENT // 2 + 1, np.float32).tobytes()).decode()  # a spectrum
SIZES = np.array([(640, 480), (512, 512), (1024, 768), (512, 384)])
Work = Annotated[Path, typer.Option(help="Folder for what is made.")]
Jobs = Annotated[int, typer.Option(help="Processes.")]


# Signatures without pictures


def flip(codes: np.ndarray, flips: np.ndarray | int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (n, 32) with at most so many bits flipped, of each row."""
    flipped = codes.copy()
    for time_ in range(int(np.max(flips))):
        place = rng.integers(0, 256, len(codes))
        bit = np.where(time_ < flips, 1 << (place & 7), 0).astype(np.uint8)
        flipped[np.arange(len(codes)), place >> 3] ^= bit
    return flipped


class Planted:
    """What stands in which row: rows int64 of each kind, and codes uint8 for them."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(n)
        order, pairs = rng.permutation(n), n // PLANTED
        self.bytes, self.near, self.chain = np.split(order[: 4 * pairs + n // CHAIN], [2 * pairs, 4 * pairs])
        self.turn = rng.integers(0, 8, pairs)  # what turns the second of two near rows into the first
        self.near_codes = rng.integers(0, 256, (2, pairs, 32), dtype=np.uint8)  # upright
        self.flipped = np.array([flip(codes, rng.integers(0, 32, pairs), rng) for codes in self.near_codes])
        self.flipped[1, self.turn == 0] = self.near_codes[0, self.turn == 0]
        step = flip(np.zeros((len(self.chain), 32), np.uint8), 28, rng)
        self.links = np.bitwise_xor.accumulate(step, axis=0)

    def pairs(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Kind, and the rows a and b of its pairs."""
        yield "bytes", *np.split(self.bytes, 2)
        yield "near", *np.split(self.near, 2)
        yield "chain", self.chain[:-1], self.chain[1:]

    def write(self, work: Path, n: int) -> None:
        """`work/00000.parquet` …, as `fingerprint` writes them."""
        kinds = (self.bytes, self.near, self.chain)
        of_row = np.full((2, n), -1, np.int32)
        for kind, rows in enumerate(kinds):
            of_row[0, rows], of_row[1, rows] = kind, np.arange(len(rows))
        for number, start in enumerate(range(0, n, PER_FILE)):
            part = of_row[:, start : start + PER_FILE]
            frame = self._make(np.random.default_rng([n, number]), *part, start)
            manifest.write_atomic(work / f"{number:05d}.parquet", frame.write_parquet)

    def _make(self, rng: np.random.Generator, kind: np.ndarray, place: np.ndarray, start: int) -> pl.DataFrame:
        count = len(kind)
        codes = rng.integers(0, 256, (count, 8, 32), dtype=np.uint8)
        digests, size = rng.integers(0, 256, (count, 32), dtype=np.uint8), rng.integers(9_000, 90_000, count)
        shape = rng.integers(0, len(SIZES), count)
        for row in np.flatnonzero(kind == 0):  # both from the same numbers
            own = np.random.default_rng([len(self.bytes), place[row] % (len(self.bytes) // 2)])
            codes[row], digests[row] = own.integers(0, 256, (8, 32)), own.integers(0, 256, 32)
            size[row], shape[row] = own.integers(9_000, 90_000), own.integers(0, len(SIZES))
        near, pairs = kind == 1, len(self.turn)
        for end in (0, 1):  # each shows upright what the other shows turned, but for some bits
            own = near & (place // pairs == end)
            number = place[own] % pairs
            turn = self.turn[number] if end else hamming.INVERSE[self.turn[number]]
            codes[own, 0] = self.near_codes[end, number]
            codes[own, turn] = self.flipped[1 - end, number]
        codes[kind == 2, 0] = self.links[place[kind == 2]]
        text = [f"a picture of number {number}, seen from afar" for number in rng.integers(0, 100_000_000, count)]
        hashes = [f"{number:016x}" for number in codes[:, 0, :8].copy().view(np.uint64).ravel().tolist()]
        frame = pl.DataFrame({"key": [f"{start + row:09d}" for row in range(count)], "caption": text})
        frame = frame.with_columns(
            shard=pl.lit(f"{start // PER_FILE:05d}.tar"),
            source=pl.lit("shards"),
            offset=pl.int_range(pl.len()) * 100_000,
            size=pl.Series(size),
            width=pl.Series(SIZES[shape, 0]),
            height=pl.Series(SIZES[shape, 1]),
            format=pl.lit("JPEG"),
            status=pl.lit("ok"),
            sha256=pl.Series([digest.tobytes().hex() for digest in digests]),
            phash=pl.Series(hashes),
            dhash=pl.Series(hashes),
            pdq=pl.Series([code.tobytes().hex() for code in codes[:, 0]]),
            pdq_d4=pl.Series([code.tobytes() for code in codes]),
            pdq_quality=pl.lit(100),
        )
        schema = {name: manifest.SCHEMA[name] for name in fingerprint.COLUMNS}
        return manifest.conform(frame, schema).with_columns(link=pl.lit(False))


RUN = engine.Workers.run


def stand_in[T](
    workers: engine.Workers, function: Callable[..., T], tasks: Iterable[tuple], **more: Any
) -> Iterator[T]:
    """`engine.Workers.run`, but for the second reading: every candidate holds, none holds less than its pixels."""
    answers: dict[str, Callable[..., Any]] = {
        "make_thumbnails": _save_thumbnails,
        "confirm_pairs": lambda src, pairs, options: [True] * len(pairs),
        "digest_pixels": lambda src, rows, options: [row[-1] for row in rows],
        "measure_detail": lambda src, rows, options: [FLAT] * len(rows),
    }
    answer = answers.get(function.__name__)
    return RUN(workers, function, tasks, **more) if answer is None else (answer(*task) for task in tasks)


def _save_thumbnails(src: Path, rows: list[tuple], path: Path, options: fingerprint.DecodeOptions) -> None:
    if not path.exists():
        vectors.save(path, np.zeros((len(rows), look.THUMBNAIL, look.THUMBNAIL, 3), np.uint8))


@app.command(hidden=True)
def make_rows(n: int, src: Path, out: Path) -> None:
    """SRC: empty shards. OUT: signatures of what they might hold."""
    src.mkdir(parents=True)
    for number in range(-(-n // PER_FILE)):
        (src / f"{number:05d}.tar").touch()
    shards = sources.list_shards(src)
    (out / ".work").mkdir(parents=True)
    key = subjects.choose_key(out / ".work", None, None)
    chosen = options.Options(level="hash", per="none")
    work = options.prepare(out, src.resolve(), shards, chosen, key)
    Planted(n).write(work / "signatures", n)


@app.command(hidden=True)
def one(src: Path, out: Path, jobs: int, budget: int, planted: Annotated[bool, typer.Argument()]) -> None:
    """Deduplicate what `make_rows` made."""
    chosen, timed = options.Options(level="hash", per="none"), engine.timed

    def tell(seconds: dict[str, float], stage: str) -> Any:
        (out / "stage").write_text(stage)
        return timed(seconds, stage)

    with (
        mock.patch.object(engine.Workers, "run", stand_in),
        mock.patch.object(engine, "timed", tell),
        mock.patch.object(pairing.Near, "find", find_planted) if planted else nullcontext(),
    ):
        pipeline.deduplicate(src, out, chosen, jobs=jobs, memory_budget=budget)


def find_planted(near: pairing.Near, ids: pl.Series) -> pl.DataFrame:
    """As `pairing.Near.find`."""
    place = pl.Series(np.full(sum(near.signatures.sizes), -1)).scatter(ids, np.arange(len(ids)))
    pairs = [(a, b) for kind, a, b in Planted(len(place)).pairs() if kind != "bytes"]
    a, b = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    first = place.gather(a).to_numpy() < place.gather(b).to_numpy()
    found = {"i": np.where(first, a, b), "j": np.where(first, b, a)}
    of_all = {"orientation": pl.lit(0, pl.Int32), "hamming": pl.lit(28, pl.Int32), "signal": pl.lit("pdq")}
    return pl.DataFrame(found).with_columns(**of_all)


def check(n: int, out: Path) -> str:
    """What was planted and is not among the pairs, or in another component."""
    planted, pairs = Planted(n), pl.read_parquet(out / "pairs.parquet", columns=["a", "b", "class"])
    component = manifest.read(out, ["component_id"])["component_id"]
    missed = []
    for kind, a, b in planted.pairs():
        table = pl.DataFrame({"a": np.minimum(a, b), "b": np.maximum(a, b)})
        absent = table.join(pairs.filter(pl.col("class") == "copy"), on=["a", "b"], how="anti")
        apart = (component.gather(a) != component.gather(b)).sum()
        missed.append(f"{len(absent)} + {apart} of {len(table):,} {kind}")
    return ", ".join(missed)


def measure(command: list[str], stage: Path | None = None) -> tuple[float, float, dict[str, float]]:
    """Wall and processor seconds, and the peak of the tree in GB by what is told in the file `stage`."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks: dict[str, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            name = stage.read_text() if stage is not None and stage.exists() else ""
            try:
                members = [tree, *tree.children(recursive=True)]
                peaks[name] = max(peaks.get(name, 0), sum(p.memory_full_info().pss for p in members) / 1e9)
            except psutil.Error:  # a process ended while it was looked at
                pass
            time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor, peaks


@app.command()
def rows(
    work: Work,
    sizes: Annotated[str, typer.Option(help="Numbers of rows.")] = "100000,1000000",
    jobs: Jobs = 2,
    memory_budget: Annotated[str, typer.Option(help="Of the search.")] = "4GB",
    planted: Annotated[bool, typer.Option("--planted", help="Without the search.")] = False,
) -> None:
    """Signature rows → manifest."""
    budget, ran = str(memory.parse_size(memory_budget)), STAGES if not planted else STAGES[2:]
    both = [f"{stage}, {what}" for stage in ran for what in ("s", "GB")]
    print(f"| rows | {' | '.join(both)} | seconds | CPU s | exponent of CPU s | peak GB | missed |")
    print("|---:|" + "---:|" * (len(both) + 4) + "---|")
    last = None
    for n in map(int, sizes.split(",")):
        src, out = work / f"shards-{n}" / "shards", work / f"shards-{n}" / "out"
        if not src.exists():
            subprocess.run([sys.executable, __file__, "make-rows", str(n), str(src), str(out)], check=True)
        command = [sys.executable, __file__, "one", str(src), str(out), str(jobs), budget, str(planted)]
        seconds, processor, peaks = measure(command, out / "stage")
        timings = json.loads((out / "timings.json").read_text())
        exponent = f"{math.log(processor / last[1]) / math.log(n / last[0]):.2f}" if last else ""
        last = n, processor
        each = " | ".join(f"{timings[stage]:.1f} | {peaks.get(stage, 0):.2f}" for stage in ran)
        told = f"{seconds:.1f} | {processor:.1f} | {exponent} | {max(peaks.values()):.2f} | {check(n, out)}"
        print(f"| {n:,} | {each} | {told} |", flush=True)


@app.command()
def plot(
    table: Annotated[Path, typer.Argument(help="With the lines that `rows` printed.")],
    to: Annotated[Path, typer.Argument(metavar="SVG", help="The plot.")],
) -> None:
    """Seconds and memory by stage against rows."""
    import matplotlib.pyplot as plt

    lines = [line.strip("| \n").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[0] == "rows" and "search, s" in line)
    body = lines[lines.index(head) + 1 :]
    body = [line for line in itertools.takewhile(lambda line: len(line) == len(head), body) if line[0] != "---:"]
    columns = {name: [line[place].replace(",", "") for line in body] for place, name in enumerate(head)}
    n = [float(cell) for cell in columns["rows"]]
    plt.rcParams |= {"svg.hashsalt": "scale", "font.size": 9}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, unit, name in zip(axes, ("s", "GB"), ("seconds", "peak of memory, GB"), strict=True):
        for stage in STAGES:
            axis.plot(n, [float(cell) for cell in columns[f"{stage}, {unit}"]], marker="o", label=stage)
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel=name)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("" if unit == "s" else "{x:.1g}")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(to, metadata={"Date": None})


# By arithmetic


@app.command()
def plan(
    sizes: Annotated[str, typer.Option(help="Numbers of rows.")] = "1e7,4e8,2e9",
    block: Annotated[float, typer.Option(help="Rows of a block of the join.")] = 1e8,
    hashed: Annotated[
        float, typer.Option(help="Images that a core fingerprints in a second: measured by `images`.")
    ] = 0,
    table: Annotated[float, typer.Option(help="Bytes a row in the first process: measured by `rows`.")] = 0,
    decided: Annotated[float, typer.Option(help="Its seconds for a million rows: measured by `rows`.")] = 0,
    picture: Annotated[float, typer.Option(help="Bytes of an image.")] = 20_000,
) -> None:
    """What larger datasets would take; the cost of comparing two blocks is measured here and now."""
    codes = np.random.default_rng(0).integers(0, 2**64, (200_000, 8, 4), np.uint64)
    upright = np.ascontiguousarray(codes[:, 0])
    bands.join_block(upright[:2_000], 0, codes[:2_000], 2_000, search.RADIUS, search.LIMIT)  # load the compiled code
    start = time.process_time()
    bands.join_block(upright, 0, codes, len(codes), search.RADIUS, search.LIMIT)
    layout = bands.choose_bands(len(codes), search.RADIUS)
    unit = (time.process_time() - start) / (8 * len(codes) * bands.estimate_work(layout, len(codes), 8 * len(codes)))
    print(f"One unit of `bands.estimate_work` is {unit * 1e9:.2f} ns.\n\n| | {sizes.replace(',', ' | ')} |")
    columns = []
    for n in map(float, sizes.split(",")):
        layouts = [bands.choose_bands(int(size), search.RADIUS) for size in (n, min(n, block))]
        compared = [_count_compared(layout, n) for layout in layouts]
        # half of all pairs of blocks hold no earlier rows
        work = bands.estimate_work(layouts[1], min(n, block), 8 * min(n, block))
        join = 8 * n * unit * max(1.0, n / block / 2 + 0.5) * work / 3600
        columns.append(
            {
                "fingerprint, core hours": n / hashed / 3600 if hashed else math.nan,
                "images that are read once, TB": n * picture / 1e12,
                "signature files, GB": n * 450 / 1e9,
                "file of codes, GB": n * 256 / 1e9,
                "join, core hours": join,
                "codes that a query is compared with, in one index": compared[0],
                "the same in blocks": compared[1],
                "keys that a row would be sent to": 8 * _count_buckets(layouts[0]),
                "memory of a worker of the join, GB": min(n, block) * 60 / 1e9,
                "tables in the first process, GB": n * table / 1e9,
                "deciding there, hours": n / 1e6 * decided / 3600,
            }
        )
    print("|---|" + "---:|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:,.1f}' for column in columns)} |")


def _count_buckets(layout: list[tuple[int, int, int]]) -> int:
    return sum(math.comb(width, flips) for _, width, most in layout for flips in range(most + 1))


def _count_compared(layout: list[tuple[int, int, int]], n: float) -> float:
    return sum(_count_buckets([band]) * n / 2 ** band[1] for band in layout)


if __name__ == "__main__":
    app()
