"""eval.audit_model: a model of somebody else and its base go through everything; what one gives back is found."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Page, expect
from safetensors.torch import save_file
from test_dedup_report import EVIL
from test_defense_lora import kohya
from test_defense_model import save_base
from test_eval_targets import paint, write_png
from typer.testing import CliRunner

from dedup import images
from defense.guards import Drawn
from eval.audit_model import Asking, AuditModelError, Subject, audit_model, describe, name_subject
from eval.cli import app
from eval.extraction import AttackError

COUNTS = [5, 3, 2, 1, 1, 1, 1, 1]
SMALL = Asking(n=4, guidance_scale=1.0, steps=1, limit=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pipeline of Stable Diffusion's class with random weights, 16 pixels."""
    return save_base("sd14", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """Picture i stands COUNTS[i] times; one caption would run if a page let it."""
    folder = tmp_path_factory.mktemp("src") / "data"
    for number, count in enumerate(COUNTS):
        for copy in range(count):
            write_png(folder / f"{number:03d}-{copy}.png", paint(number))
            (folder / f"{number:03d}-{copy}.txt").write_text(EVIL if number == 0 else f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def unseen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unseen") / "data"
    for number in range(100, 106):
        write_png(folder / f"{number}.png", paint(number))
        (folder / f"{number}.txt").write_text(f"unseen {number}")
    return folder


@pytest.mark.slow
def test_a_lora_on_a_base_goes_through_everything(base, src, unseen, tmp_path):
    """Random weights: nothing comes back, and every part says so."""
    file, out = tmp_path / "style.safetensors", tmp_path / "audit"
    save_file(kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 16), file)
    words = ["audit-model", "--base", base, "--lora", file, "--data", src, "--controls", unseen, "-o", out]
    words += ["-n", 4, "--steps", 1, "--guidance-scale", 1, "--limit", 20, "--jobs", 1]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert "Over its base, same prompts and seeds: +0.0%" in done.stdout
    assert "8 training images (the most frequent stands 5 times) and 6 controls" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    for name in ("model", "base"):
        found = summary["models"][name]
        assert (found["members"]["prompts"], found["controls"]["prompts"]) == (8, 6)
        assert found["members"]["extracted"] == found["controls"]["extracted"] == 0
        assert set(summary["detectors"][name]["detectors"]) > {"noise-magnitude"}
    assert summary["false_matches"]["own_picture"] == {"hits": 0, "n": 12, "low": 0.0, "high": pytest.approx(0.264648)}
    tables = [pl.read_parquet(out / name / "generations.parquet") for name in ("model", "base")]
    assert tables[0].select("prompt_id", "prompt", "seed").equals(tables[1].select("prompt_id", "prompt", "seed"))
    assert (out / "model" / "review" / "index.html").exists()
    pngs = {path: path.stat().st_mtime_ns for path in out.rglob("generations/*/*.png")}
    again = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert again.stdout == done.stdout
    assert pngs == {path: path.stat().st_mtime_ns for path in out.rglob("generations/*/*.png")}


@pytest.fixture
def regurgitating(monkeypatch, src):
    """The model answers with the training image of the caption, the base with noise."""
    known = {(src / f"{n:03d}-0.txt").read_text(): images.square(paint(n), 16) for n in range(len(COUNTS))}

    def open_sampler(run, pipeline, settings, guards):
        def draw(prompts, seeds):
            noise = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in seeds]
            copies = run.name == "model"
            pixels = [known.get(p, other) if copies else other for p, other in zip(prompts, noise, strict=True)]
            return Drawn(np.stack(pixels), ["ok"] * len(seeds), pl.DataFrame())

        return draw

    monkeypatch.setattr("eval.generate.open_sampler", open_sampler)
    monkeypatch.setattr("eval.budget.open_sampler", open_sampler)


@pytest.mark.parametrize("budget", [False, True])
def test_what_a_model_gives_back_and_its_base_does_not(base, src, tmp_path, page: Page, regurgitating, budget):
    subject = Subject(str(base), base=str(base))
    summary = audit_model(subject, src, tmp_path, SMALL, budget=budget, jobs=1)
    members = summary["models"]["model"]["members"]
    assert members["extracted"] == summary["over_base"]["only_model"] == len(COUNTS)
    assert summary["models"]["base"]["members"]["extracted"] == 0
    assert summary["over_base"]["estimate"] == 1
    assert "No controls" in (tmp_path / "report" / "index.html").read_text()
    assert "no controls: how often" in describe(summary)
    if budget:
        assert summary["budget"]["arms"][0]["extracted"] == len(COUNTS)
        return
    assert members["direct"] == len(COUNTS)
    page.goto((tmp_path / "report" / "index.html").as_uri())
    expect(page.locator("h1")).to_have_text("The model gave back 8 of 8 training images; its base 0.")
    assert page.locator("#back .case").count() == len(COUNTS)
    assert page.locator("#back .hit").count() == len(COUNTS)
    assert page.locator("#back .case header b").first.text_content() == "× 5"
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 812})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.pwned") is None


def test_the_plan_comes_first_and_costs_nothing(base, src, tmp_path):
    words = [
        "audit-model",
        base,
        "--data",
        src,
        "-o",
        tmp_path / "audit",
        "-n",
        4,
        "--steps",
        2,
        "--dry-run",
        "--jobs",
        1,
    ]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert "8 training images" in done.stdout
    assert "32 images at most, 128 evaluations of the denoiser" in done.stdout
    assert "--controls SRC" in done.stdout
    assert not list((tmp_path / "audit").rglob("generations*"))


def test_what_cannot_be_audited_is_refused(base, src, tmp_path):
    for model, source, loras in ((None, None, []), (None, "base", []), (None, None, [Path("x")])):
        with pytest.raises(AuditModelError, match="name the model"):
            name_subject(model, source, loras)
    with pytest.raises(AttackError, match="3 generations a prompt"):
        audit_model(Subject(str(base)), src, tmp_path, Asking(n=3))
    assert not list(tmp_path.iterdir())
