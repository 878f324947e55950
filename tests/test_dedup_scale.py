"""What a large dataset needs: searches in little memory, tables without what nobody reads, chains, and kills."""

import os
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dedup_pipeline import encode, picture
from typer.testing import CliRunner

from dedup import blocks, clustering, manifest, memory, policy, search
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.signatures import LATER, Signatures
from eval.cli import app

RESULTS = ("pairs.parquet", "kept.txt", "dropped.csv", "deduplicated.parquet", "deduplicated.jsonl", "run.json")


def read_results(out: Path) -> dict[str, bytes]:
    paths = [*(out / "manifest").glob("*.parquet"), *(out / name for name in RESULTS)]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some pictures in several versions, in two sources, and a file that is none."""
    src = tmp_path_factory.mktemp("crowd") / "src"
    for seed in range(12):
        for number in range(1 + seed % 5):
            path = src / "ab"[number % 2] / f"{seed:02d}-{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(seed), "JPEG", quality=95 - 5 * (number // 2)))
            path.with_suffix(".txt").write_text(f"picture {seed}, version {number // 2}")
    (src / "a" / "broken.jpg").write_bytes(b"<html>")
    return src


def test_the_budget_of_memory_decides_nothing(crowd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(per="source", prefer="quality")
    deduplicate(crowd, tmp_path / "usual", options, jobs=1)
    monkeypatch.setattr(search, "IN_MEMORY", 0)
    monkeypatch.setattr(blocks, "FEWEST", 3)
    deduplicate(crowd, tmp_path / "small", options, jobs=2, memory_budget=1)
    assert read_results(tmp_path / "small") == read_results(tmp_path / "usual")
    assert not list((tmp_path / "small" / ".work" / "codes").iterdir())


def test_sizes_are_read_and_refused() -> None:
    assert [memory.parse_size(text) for text in ("4GB", "1.5 g", "500M", "7", "2GiB")] == [
        4 * 10**9, 15 * 10**8, 5 * 10**8, 7, 2 * 10**9
    ]  # fmt: skip
    for text in ("", "0", "much", "-4GB", "4 GB of it"):
        with pytest.raises(ValueError, match="no amount of memory: say, for example, 4GB"):
            memory.parse_size(text)
    told = CliRunner().invoke(app, ["dedup", "nowhere", "--memory-budget", "plenty"])
    assert told.exit_code == 2
    assert "no amount of memory" in told.output


def test_the_default_budget_heeds_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine = memory.default_budget()
    monkeypatch.setattr(memory, "CONTROL", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.default_budget() >= of_machine
    (tmp_path / "memory.max").write_text("1000000000\n")
    assert memory.default_budget() == 250_000_000


def test_signatures_are_read_in_any_order(tmp_path: Path) -> None:
    sizes, rng = [3, 0, 5, 1], np.random.default_rng(0)
    frames = []
    for file, size in enumerate(sizes):
        texts = {name: [f"{name}-{file}-{row}" for row in range(size)] for name in LATER}
        texts |= {"sha256": [f"{10 * file + row:064x}" for row in range(size)]}
        codes = [rng.bytes(256) for _ in range(size)]
        frames.append(
            pl.DataFrame(texts | {"size": [file] * size}).with_columns(pdq_d4=pl.Series(codes, dtype=pl.Binary))
        )
        frames[-1] = frames[-1].cast(dict.fromkeys(LATER[:-1], pl.String) | {"size": pl.Int64})
        frames[-1].write_parquet(tmp_path / f"{file:05d}.parquet")
    whole, signatures = pl.concat(frames), Signatures(tmp_path, sizes)
    read = signatures.read()
    assert read.columns == ["id", "size", "caption_hash", "picture", "person", "name"]
    assert read["id"].to_list() == list(range(9))
    assert read["size"].equals(whole["size"])
    for ids in ([8, 0, 4, 3, 7], [5], [], list(range(9))):
        chosen = pl.Series(ids, dtype=pl.Int64)
        assert signatures.take(chosen).equals(whole[chosen].select(LATER))
        codes = signatures.read_codes(chosen)
        assert [code.tobytes() for code in codes] == whole["pdq_d4"].gather(chosen).to_list()
        if ids:
            signatures.write_codes(chosen, tmp_path / "codes" / "codes.npy")
            assert np.array_equal(np.load(tmp_path / "codes" / "codes.npy"), codes.view(np.uint64))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "00", "0a", "f0"]), st.sampled_from("abc"), st.sampled_from([None, " ", "x", "x "])
        ),
        max_size=12,
    ),
    st.integers(0, 12),
)
def test_numbers_are_equal_and_in_order_as_the_texts_are(rows: list[tuple], cut: int) -> None:
    schema = {"sha256": pl.String, "key": pl.String, "caption": pl.String}
    whole = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.lit(None, pl.String).alias(name) for name in LATER if name not in schema
    )
    with TemporaryDirectory() as folder:
        for file, part in enumerate((whole[:cut], whole[cut:])):
            part.write_parquet(Path(folder) / f"{file:05d}.parquet")
        read = Signatures(Path(folder), [len(whole[:cut]), len(whole[cut:])]).read()
    in_order = whole.select(pl.arg_sort_by("sha256", "key", maintain_order=True)).to_series()
    assert read.select(pl.arg_sort_by("picture", "name", maintain_order=True)).to_series().equals(in_order)
    assert read["picture"].rank("dense").equals(whole["sha256"].rank("dense"))
    said = [(caption or "").strip() or None for caption in whole["caption"]]
    for (one, other), (mine, theirs) in zip(combinations(said, 2), combinations(read["caption_hash"], 2), strict=True):
        assert (one == other) == (mine == theirs)
    assert [one is None for one in said] == read["caption_hash"].is_null().to_list()


def test_a_giant_chain_is_one_component_and_deletes_only_neighbours() -> None:
    n = 200_000
    order = np.random.default_rng(0).permutation(n)
    a, b = np.minimum(order[:-1], order[1:]), np.maximum(order[:-1], order[1:])
    pairs = pl.DataFrame({"a": a, "b": b}).with_columns(
        signal=pl.lit("pdq"), orientation=pl.lit("r0"), **{"class": pl.lit("copy")}
    )
    assert not clustering.components(pairs, n).any()
    decisions = clustering.decide(pairs, pl.Series(np.arange(n)))
    place = np.empty(n, int)
    place[order] = np.arange(n)
    dropped = decisions.with_row_index("row").drop_nulls("kept_id")
    assert n / 3 < len(dropped) < n / 1.5
    assert (np.abs(place[dropped["row"]] - place[dropped["kept_id"]]) == 1).all()
    assert decisions["keep"].gather(dropped["kept_id"]).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["x", "x ", "y", "", None])), min_size=1, max_size=14))
def test_captions_are_merged_and_counted_as_by_hand(told: list[tuple[int, str | None]]) -> None:
    owner = [min(star, row) for row, (star, _) in enumerate(told)]
    keep = [of == row for row, of in enumerate(owner)]
    owner = [of if keep[of] else row for row, of in enumerate(owner)]
    keep = [of == row for row, of in enumerate(owner)]
    rows = pl.DataFrame(
        {
            "id": range(len(told)),
            "keep": keep,
            "kept_id": pl.Series([None if k else of for k, of in zip(keep, owner, strict=True)], dtype=pl.Int64),
            "cluster_id": owner,
            "status": "ok",
            "caption": pl.Series([caption for _, caption in told], dtype=pl.String),
        }
    )
    of_star: dict[int, list[str]] = defaultdict(list)
    for row in sorted(range(len(told)), key=lambda row: (not keep[row], row)):
        caption = told[row][1]
        if caption and caption not in of_star[owner[row]]:
            of_star[owner[row]].append(caption)
    expected = [of_star[row] if keep[row] else None for row in range(len(told))]
    merged = rows.with_columns(captions=policy.merge_captions(rows, rows["caption"].gather))
    assert merged.select(policy.tell_captions())["captions"].to_list() == expected
    said = [(of, caption.strip()) for of, (_, caption) in zip(owner, told, strict=True) if caption]
    by_hand = {
        "same_image_same_caption": [said.count(pair) for pair in set(said)],
        "same_image_other_captions": [len({c for of, c in said if of == star}) for star in {of for of, _ in said}],
        "same_caption_other_images": [len({of for of, c in said if c == text}) for text in {c for _, c in said}],
    }
    counted = {
        name: {"cases": sum(n > 1 for n in counts), "total": sum(n for n in counts if n > 1)}
        for name, counts in by_hand.items()
    }
    hashed = rows.with_columns(policy.hash_caption())
    assert policy.count_captions(hashed, rows["caption"].gather) == counted


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on(crowd: Path, tmp_path: Path) -> None:
    """Shards that were done are not made again, and the results are those of an undisturbed run."""
    src = tmp_path / "shards"
    src.mkdir()
    paths = sorted(crowd.rglob("*.*"))
    for number in range(8):
        with tarfile.open(src / f"{number:05d}.tar", "w") as archive:
            for path in paths[number::8]:
                archive.add(path, path.name)
    program = [sys.executable, "-c", "from eval.cli import main; main()", "dedup", str(src), "--level", "copy"]
    program += ["--no-report", "--max-bad", "1", "--jobs", "2", "-o"]
    start = time.perf_counter()
    subprocess.run([*program, tmp_path / "whole"], check=True, capture_output=True)
    taken = time.perf_counter() - start
    for number, after in enumerate(np.random.default_rng(0).uniform(0.5, taken, 5)):
        out = tmp_path / f"killed-{number}"
        process = subprocess.Popen([*program, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after)
        process.kill()
        process.wait()
        done = {path: path.stat().st_mtime_ns for path in (out / ".work" / "signatures").glob("*.parquet")}
        subprocess.run([*program, out], check=True, capture_output=True)
        assert done == {path: path.stat().st_mtime_ns for path in done}
        assert read_results(out) == read_results(tmp_path / "whole")
    assert manifest.read(tmp_path / "whole")["keep"].sum() < 30


WRITE = """
import sys, polars as pl
from pathlib import Path
from dedup import manifest
n = 400_000
frame = pl.DataFrame({"id": range(n), "text": [f"caption {i % 1000} " + "x" * (i % 37) for i in range(n)]})
frame = frame.with_columns(captions=pl.when(pl.col("id") % 10 == 0).then(pl.concat_list("text", pl.lit("b"))))
frame = frame.filter(pl.col("id") % 9 > 0)  # in pieces, as many as there are threads, of which polars makes pages
manifest.write_parquet(Path(sys.argv[1]), frame)
assert pl.read_parquet(sys.argv[1]).equals(frame)
"""


def test_equal_tables_are_equal_bytes_on_any_number_of_processors(tmp_path: Path) -> None:
    paths = []
    for threads in (1, 7):
        paths.append(tmp_path / f"{threads}.parquet")
        command = [sys.executable, "-c", WRITE, str(paths[-1])]
        subprocess.run(command, check=True, env=os.environ | {"POLARS_MAX_THREADS": str(threads)})
    assert paths[0].read_bytes() == paths[1].read_bytes()
