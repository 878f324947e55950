"""Models are trained, drawn from and attacked on a Ray cluster as on one machine, to the same bytes."""

import os
from functools import partial
from pathlib import Path

import pytest
from test_cli import draw_pictures
from test_dedup_cluster import read_tree
from test_eval_audit import CONFIGS
from test_eval_generate import SMALL, contents, models, new_run, out, read
from typer.testing import CliRunner

from dedup.cluster import HERE
from eval import audit as auditing
from eval.cli import app
from eval.generate import BATCH, generate, generate_runs
from eval.recipe import load_recipe
from eval.unprompted import draw_unprompted

pytestmark = pytest.mark.slow
__all__ = ["models", "out"]  # fixtures
# Planting again gives the files other times, and OUT another secret: these name a digest of one of both.
DATED = {
    "run.json",
    "shards.json",
    "subject.json",
    "subject.key",
    "marks.js",
    "config.json",
    "verdict.json",
    "index.html",
}


def test_the_images_of_several_runs(out, models, tmp_path):
    names = ("raw", "refill")
    alone, there = (
        [new_run(tmp_path / place, out, model, arm) for model, arm in zip(models, names, strict=True)]
        for place in ("alone", "there")
    )
    same = {name: SMALL[name] for name in ("steps", "guidance_scale")}
    unasked = partial(draw_unprompted, n=BATCH + 2, **same)
    here = os.getpid()

    def note(run: Path) -> None:  # by value, because no worker can import a test
        (run.parent / f"by-{os.getpid()}").touch()
        unasked(run)

    counts = list(generate_runs(there, HERE, note, **SMALL))
    workers = list((tmp_path / "there").glob("by-*"))
    assert workers
    assert here not in [int(path.name[3:]) for path in workers]
    for a, b, told in zip(alone, there, counts, strict=True):
        unasked(a)
        table = generate(a, **SMALL)
        assert (a / "unprompted.parquet").read_bytes() == (b / "unprompted.parquet").read_bytes()
        assert len(contents(b)) == len(table) + BATCH + 2
        assert table.equals(read(b))
        assert contents(a) == contents(b)
        assert told == {"images": len(table), "prompts": table["prompt_id"].n_unique(), "nan": 0, "refused": 0}
    lone = new_run(tmp_path / "verb", out, models[0], "raw")
    command = ["generate", str(lone), "-n", "3", "--steps", "2", "--guidance-scale", "2", "--engine", "ray"]
    done = CliRunner().invoke(app, [*command, "--null", str(BATCH + 2)])
    assert done.exit_code == 0, done.exception
    assert contents(lone) == contents(alone[0])
    refused = CliRunner().invoke(app, ["generate", str(there[0]), "--budget", "--engine", "ray"])
    assert refused.exit_code == 2


def test_an_audit(tmp_path):
    draw_pictures(tmp_path / "src", 190)
    recipe = load_recipe(CONFIGS / "audit-smoke.toml")
    trees = []
    for address in (None, HERE):
        folder = tmp_path / "dir"  # of one name, because results name their inputs
        verdict = auditing.audit(tmp_path / "src", folder, recipe, jobs=2, address=address)
        assert verdict["failed"] == []
        trees.append(read_tree(folder))
        folder.rename(tmp_path / f"dir-{len(trees)}")
    names = sorted((trees[0].keys() | trees[1].keys()), reverse=True)
    differing = (name for name in names if trees[0].get(name) != trees[1].get(name))
    first = {name.split("/")[0]: name for name in differing if name.rpartition("/")[2] not in DATED}
    assert first == {}  # of each step
    assert trees[0].keys() == trees[1].keys()
    assert trees[0].keys() >= {f"raw-0/{name}" for name in ("generations.parquet", "scores-clique.parquet")}
