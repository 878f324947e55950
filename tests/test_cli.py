"""The program as its users meet it: exit codes, one-line errors, and the whole line from source to report."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval.audit import QUICK, demo
from eval.cli import app
from eval.recipe import Utility
from eval.terminal import describe_verdict

ROOT = Path(__file__).parent.parent


def unmemorize(*arguments: object, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, after the statement `before`."""
    command = [sys.executable, "-c", f"{before}; from eval.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def draw_pictures(folder: Path, n: int) -> None:
    """Blocks of flat colour, far apart from each other even at 32 pixels, with captions."""
    folder.mkdir()
    for number in range(n):
        grid = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(grid).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"pattern number {number}")


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    shown = unmemorize("--help")
    assert shown.returncode == 0
    verbs = "dedup review export plant train sample generate detect attack membership compare audit audit-model demo"
    for verb in verbs.split():
        assert verb in shown.stdout
    heavy = "import sys, eval.cli; print({'torch', 'polars', 'cv2', 'numba', 'diffusers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout.strip() == "set()"


def test_exit_codes_and_one_line_errors(tmp_path: Path) -> None:
    assert unmemorize("dedup").returncode == 2
    missing = unmemorize("dedup", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert missing.returncode == 3
    assert missing.stderr.count("\n") == 1
    assert "nowhere" in missing.stderr
    draw_pictures(tmp_path / "src", 3)
    (tmp_path / "src" / "bad.png").write_bytes(b"no image")
    bad = unmemorize("dedup", tmp_path / "src", "-o", tmp_path / "out", "--no-report", "--json")
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["unreadable"] == 1
    tolerated = unmemorize("dedup", tmp_path / "src", "-o", tmp_path / "out", "--no-report", "--max-bad", "0.5")
    assert tolerated.returncode == 0
    other = unmemorize("dedup", tmp_path / "src", "-o", tmp_path / "out", "--no-report", "--max-frames", "9")
    assert other.returncode == 2
    assert "max_frames was 1000" in other.stderr


def test_an_interruption_says_how_to_go_on(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "src", 1)
    press = "import dedup.pipeline as p; p.deduplicate = lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt())"
    stopped = unmemorize("dedup", tmp_path / "src", "-o", tmp_path / "out", before=press)
    assert stopped.returncode == 130
    assert stopped.stderr == "unmemorize: interrupted; the same command goes on where it stopped\n"


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "src", 20)
    words = ["dedup", tmp_path / "src", "-o", tmp_path / "out", "--no-report"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    full = unmemorize(*words, before=limit)
    assert full.returncode == 3
    assert "is the disk full?" in full.stderr
    assert full.stderr.count("\n") == 1
    assert not list((tmp_path / "out").rglob(".*.parquet*"))
    assert unmemorize(*words).returncode == 0


@pytest.mark.slow
def test_the_whole_line(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "src", 150)
    planted, out, audit = tmp_path / "planted", tmp_path / "out", tmp_path / "audit"
    steps: list[list[object]] = [
        [
            "plant",
            tmp_path / "src",
            "-o",
            planted,
            "--canaries",
            8,
            "--controls",
            4,
            "--fillers",
            16,
            "--min-distance",
            0.1,
        ],
        ["dedup", planted, "-o", out],
    ]
    for arm in ("raw", "refill"):
        run = tmp_path / arm
        steps.append(["train", out, "--arm", arm, "--config", ROOT / "configs/smoke.toml", "-o", run])
        steps.append(["generate", run, "-n", 4, "--steps", 4])
        steps.append(["attack", run])
    steps.append(["compare", tmp_path / "raw", tmp_path / "refill", "-o", audit])
    for step in steps:  # in this process: importing torch once is enough
        done = CliRunner().invoke(app, [str(word) for word in step])
        assert done.exit_code == 0, f"{step}: {done.exception!r} {done.output[-2000:]}"
    verdict = json.loads((audit / "verdict.json").read_text())
    assert verdict["arms"] == ["raw", "refill"]
    rows = pl.read_parquet(audit / "comparison.parquet")
    assert sorted(set(rows["multiplicity"])) == [0, 1, 2, 4, 8, 16, 32, 64]
    assert len(rows) == 2 * (8 + 4)
    assert (audit / "report" / "index.html").stat().st_size > 10_000


def test_an_audit_says_what_it_takes_and_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "src", 3)
    (tmp_path / "a.toml").write_text("[plant]\ncanary = 3")
    wrong = unmemorize("audit", tmp_path / "src", "-o", tmp_path / "dir", "--config", tmp_path / "a.toml")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"unmemorize: {tmp_path / 'a.toml'}: [plant]: unknown key 'canary'")
    arm = unmemorize("audit", tmp_path / "src", "-o", tmp_path / "dir", "--arms", "raw,all")
    assert "unknown arm 'all'" in arm.stderr
    assert not (tmp_path / "dir").exists()


@pytest.mark.slow
def test_the_demo_runs_and_its_parts_are_not_made_twice(tmp_path: Path) -> None:
    train = replace(QUICK.train, steps=4)
    planting = replace(QUICK.plant, canaries=8, controls=2, fillers=12)
    recipe = replace(QUICK, plant=planting, train=train, generate=replace(QUICK.generate, n=4), utility=Utility())
    verdict = demo(tmp_path, recipe)
    assert verdict["primary"]["n_clusters"] == 6
    assert verdict["control"]["raw"]["prompts"] == 3
    assert (tmp_path / "out-0" / "report" / "index.html").exists()
    model = tmp_path / "raw-0" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = model.stat().st_mtime_ns
    assert demo(tmp_path, recipe) == verdict
    assert model.stat().st_mtime_ns == before


def test_what_an_audit_says_in_the_terminal(tmp_path: Path) -> None:
    """Counts are counts; a difference that is corrected says so, and nothing is less than nothing."""
    counts = {"both": 1, "only_a": 10, "only_b": 0, "neither": 7}
    found = {"contrast": "raw - refill", "estimate": 4 / 9, "interval": [-1e-16, 1.0], "level": 0.95, "n_pairs": 18}
    found |= {"counts": counts, "plain": {"estimate": 5 / 9}}
    told = describe_verdict({"primary": found, "co_primary": [], "label": "describes this"}, tmp_path)
    assert told.splitlines()[0] == (
        "raw gave back 11 of 18, refill gave back 1 of 18 images: a difference of +44.4 points "
        "(95% interval +0.0 … +100.0, corrected for images of few copies)"
    )
    assert "corrected" not in describe_verdict(
        {"primary": found | {"plain": found}, "co_primary": [], "label": ""}, tmp_path
    )
