"""Nothing is compared twice: not when other policies decide, not when a run was killed; and the bytes are the same."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image
from test_dedup_copies import write_groups
from test_dedup_features import photograph

from dedup import evidence, look, manifest, pipeline, reader
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.signatures import Signatures
from dedup.verdicts import Verdicts

ROOT = Path(__file__).parent.parent
RESULTS = ["manifest/00000.parquet", "pairs.parquet", "kept.txt", "dropped.csv", "deduplicated.jsonl", "run.json"]
COMPARISONS = [
    (look, "digest_pixels"),
    (look, "confirm_pairs"),
    (look, "measure_detail"),
    (evidence, "match_pairs"),
    (evidence, "judge_pairs"),
]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edited copies in two sources, equal files, another format, an enlarged copy."""
    src = write_groups(tmp_path_factory.mktemp("src") / "a", 2, ["crop", "mirrored"]).parent
    (src / "b").mkdir()
    for n in range(2):
        Image.open(src / "a" / f"{n:02d}-base.jpg").save(src / "b" / f"{n}.webp", quality=90)
        shutil.copy(src / "a" / f"{n:02d}-crop.jpg", src / "b")
    large = Image.fromarray(photograph(3)).resize((640, 480), Image.Resampling.BICUBIC)
    large.save(src / "b" / "large.png")
    Image.fromarray(photograph(3)).save(src / "b" / "plain.png")
    return src


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What has been compared, in order. The calls go on to the functions themselves."""
    seen: list[tuple] = []

    def watch(function: Callable[..., list]) -> Callable[..., list]:
        @wraps(function)
        def call(src: Path, items: list, options: Any) -> list:
            seen.extend((function.__name__, repr(item)) for item in items)
            return function(src, items, options)

        return call

    for module, name in COMPARISONS:
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    return seen


def kill_after(calls: int, function: Callable[..., list]) -> Callable[..., list]:
    """The function, until it has been called so often."""
    left = iter(range(calls))

    @wraps(function)
    def call(*arguments: Any) -> list:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def run(src: Path, out: Path, **options: Any) -> list[bytes]:
    deduplicate(src, out, Options(**{"level": "copy", **options}), jobs=1)
    return [(out / name).read_bytes() for name in RESULTS]


def read_times(out: Path) -> dict[str, int]:
    """When each thumbnail and each feature of a representative was made."""
    parts = [path for name in ("thumbnails", "features-0") for path in (out / ".work" / name).iterdir()]
    assert len(parts) > 1
    return {path.name: path.stat().st_mtime_ns for path in parts}


def test_another_policy_compares_nothing_again(src: Path, tmp_path: Path, compared: list[tuple]) -> None:
    out = tmp_path / "out"
    first = run(src, out)
    assert {name for name, _ in compared} >= {"confirm_pairs", "measure_detail", "match_pairs", "judge_pairs"}
    assert len(compared) == len(set(compared))
    compared.clear()
    assert run(src, out) == first
    assert compared == []
    grown = run(src, tmp_path / "grown", base=str(out))
    assert compared == []
    assert grown[:5] == first[:5]
    mirrored = run(src, out, flips="drop", max_copies=2)
    assert compared == []
    assert mirrored == run(src, tmp_path / "mirrored", flips="drop", max_copies=2)
    run(src, out)
    before, known = read_times(out), Verdicts(out / ".work" / "verdicts").known
    policies = {"per": "source", "prefer": "source:b,quality"}
    again = run(src, out, **policies)
    assert read_times(out) == before  # no thumbnail, no feature of a representative is made anew
    new = Verdicts(out / ".work" / "verdicts").known.join(known, on="key", how="anti")
    assert run(src, tmp_path / "new", **policies) == again
    assert len(new) < 0.1 * len(known)  # gaps that another keeper leaves


def test_a_run_that_was_killed_goes_on(
    src: Path, tmp_path: Path, compared: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(src, tmp_path / "whole")
    everything = sorted(compared, key=repr)
    compared.clear()
    monkeypatch.setattr(reader, "REMEMBERED", 1)
    for module, name, done in ((look, "confirm_pairs", 0), (evidence, "match_pairs", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill_after(done, getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                run(src, tmp_path / "out")
        assert not (tmp_path / "out" / "run.json").exists()
    places = f"Path({str(src)!r}), Path({str(tmp_path / 'out')!r})"
    script = f"""
import os
from pathlib import Path
from dedup import overlay, reader
from dedup.options import Options
from dedup.pipeline import deduplicate
reader.REMEMBERED = 1
overlay.align = lambda *_, **__: os._exit(9)  # nobody tidies up; all features have been matched by then
deduplicate({places}, Options("copy"), jobs=1)
"""
    died = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    before = len(compared)
    assert run(src, tmp_path / "out") == whole
    matched = [item for name, item in compared[before:] if name == "match_pairs"]
    assert len(matched) < sum(name == "match_pairs" for name, _ in everything) / 4  # but for gaps
    swap = str(tmp_path / "whole"), str(tmp_path / "out")
    expected = sorted(((name, item.replace(*swap)) for name, item in everything), key=repr)
    compared += [one for one in expected if one[0] == "match_pairs" and one not in compared]  # by the process that died
    assert sorted(compared, key=repr) == expected


def test_what_is_not_used_is_forgotten(src: Path, tmp_path: Path, compared: list[tuple]) -> None:
    """And other versions of the libraries remember nothing."""
    copied = shutil.copytree(src, tmp_path / "src")
    run(copied, tmp_path / "out")
    folder = tmp_path / "out" / ".work" / "verdicts"
    size = len(Verdicts(folder).known)
    for path in copied.glob("a/01*"):
        path.unlink()
    run(copied, tmp_path / "out")
    assert 0 < len(Verdicts(folder).known) < size
    assert len(list(folder.iterdir())) == 1
    recorded = tmp_path / "out" / ".work" / "options.json"
    before = manifest.read_json(recorded)
    manifest.write_json(recorded, before | {"versions": before["versions"] | {"numpy": "0"}})
    compared.clear()
    run(copied, tmp_path / "out")
    assert len(compared) >= len(Verdicts(folder).known) > 0


def test_the_same_question_about_other_bytes_or_limits_is_another(tmp_path: Path) -> None:
    def answer(src: Path, items: list, options: Any) -> list:
        asked.extend(items)
        return [(item, 0.1 + 0.2, None) for item in items]

    def make(max_pixels: int) -> reader.Reader:
        decode = pipeline.fingerprint.DecodeOptions(max_pixels)
        workers = pipeline.engine.Workers(1)
        return reader.Reader(
            tmp_path, tmp_path, decode, workers, Verdicts(tmp_path / "verdicts"), Signatures(tmp_path, [])
        )

    asked: list[str] = []
    keys = [("x", "y", True), ("x", "y", None), ("x", "y", True)]
    for max_pixels, expected in ((9, 2), (9, 0), (8, 2)):
        asked.clear()
        found = make(max_pixels).ask(answer, keys, lambda numbers: [f"{n}" for n in numbers])
        assert found == [["0", 0.1 + 0.2, None], ["1", 0.1 + 0.2, None], ["0", 0.1 + 0.2, None]]
        assert len(asked) == expected
    with pytest.raises(ZeroDivisionError):
        make(9).ask(lambda *_: [1 / 0], [1], lambda _: [1])
    assert pl.read_parquet(sorted((tmp_path / "verdicts").iterdir()))["key"].n_unique() == 4


def test_code_that_has_changed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    for code in ("a", "a", "b"):
        monkeypatch.setattr(reader, "_digest_code", lambda module, code=code: code + module)
        decode, workers = pipeline.fingerprint.DecodeOptions(), pipeline.engine.Workers(1)
        one = reader.Reader(
            tmp_path, tmp_path, decode, workers, Verdicts(tmp_path / "verdicts"), Signatures(tmp_path, [])
        )
        one.ask(lambda src, items, options: items, ["key"], lambda numbers: places.append(numbers) or numbers)
    assert places == [[0], [], [0]]
