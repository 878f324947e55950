"""defense.sample and its sheet: images for any prompts, nothing twice, and a page that opens from disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from test_defense_data import build_small
from test_defense_guards import noisy, training_picture
from test_defense_model import save_base
from test_eval_targets import make_planted, make_run
from typer.testing import CliRunner

from dedup import manifest
from defense import cli, guards
from defense.sample import SAMPLES, SampleError, choose_prompts, read_prompts, sample_run, sample_trained
from defense.sheet import write_sheet

PROMPTS = ["a red fox", "<script>alert(1)</script> & more"]
SMALL = {"n": 2, "steps": 1}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def run(out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_small(folder).save_pretrained(folder / "model")
    run = make_run(folder, out)
    shutil.move(folder / "model", run / "model")
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_images_are_those_of_the_sampler_and_come_again_to_the_byte(run, tmp_path):
    table = sample_run(run, [*PROMPTS, PROMPTS[0]], tmp_path / "a", **SMALL)
    assert dict(table.schema) == SAMPLES
    assert table["prompt"].to_list() == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert table["seed"].n_unique() == 4
    assert set(table["status"]) == {"ok"}
    assert set(table["attempts"]) == {1}
    drawn = {}
    for row in table.iter_rows(named=True):
        drawn[row["file"]] = np.asarray(Image.open(tmp_path / "a" / row["file"]))
        assert drawn[row["file"]].shape == (32, 32, 3)
    assert len({pixels.tobytes() for pixels in drawn.values()}) == 4
    assert pl.read_csv(tmp_path / "a" / "samples.csv")["prompt"].to_list() == table["prompt"].to_list()
    sample_run(run, PROMPTS, tmp_path / "b", **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    alone = sample_run(run, PROMPTS[1:], tmp_path / "c", **SMALL)
    assert alone.equals(table[2:])
    assert not sample_run(run, PROMPTS[1:], tmp_path / "c", seed=1, **SMALL)["seed"].equals(alone["seed"])
    assert len(list((tmp_path / "c" / "images").iterdir())) == 2  # the first ones are still there


def test_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    whole, draw, calls = tmp_path / "whole", guards.draw, []
    sample_run(run, PROMPTS, whole, **SMALL)

    def stop_at_second(setting, prompts, seeds, **steering):
        calls.append(prompts[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(setting, prompts, seeds, **steering)

    monkeypatch.setattr(guards, "draw", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        sample_run(run, PROMPTS, tmp_path / "cut", **SMALL)
    assert not (tmp_path / "cut" / "samples.parquet").exists()
    sample_run(run, PROMPTS, tmp_path / "cut", **SMALL)
    assert calls == [PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert contents(tmp_path / "cut") == contents(whole)
    sample_run(run, PROMPTS, tmp_path / "cut", **SMALL)
    assert len(calls) == 3


def test_a_refused_copy_is_a_row_without_a_file_and_the_page_says_of_what(run, out, tmp_path, monkeypatch, page):
    original = training_picture(out, 2)

    def regurgitate(setting, prompts, seeds, **steering):
        pixels = np.stack([noisy(original, seed % 1_000) for seed in seeds])
        return guards.Drawn(pixels, ["ok"] * len(seeds), pl.DataFrame(schema=guards.LOG))

    monkeypatch.setattr(guards, "draw", regurgitate)
    table = sample_run(run, PROMPTS, tmp_path / "s", guards=["copy=2"], **SMALL)
    assert set(table["status"]) == {"refused"}
    assert set(table["attempts"]) == {3}
    assert table["file"].null_count() == 4
    assert not list((tmp_path / "s").rglob("*.png"))
    log = pl.read_parquet(tmp_path / "s" / "guards.parquet")
    assert len(log) == 4 * 3
    assert set(log["prompt"]) == set(PROMPTS)
    page.goto(write_sheet(tmp_path / "s").as_uri())
    text = page.inner_text("body")
    assert "4 of 4 images refused" in text
    assert f"A copy of {log['key'][-1]}" in text
    assert "<script>alert(1)</script> & more" in text
    assert "it is still in there" in text


def test_the_sheet_shows_every_image_at_any_width(run, tmp_path, page):
    sample_run(run, PROMPTS, tmp_path, **SMALL)
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(write_sheet(tmp_path).as_uri())
        page.evaluate("document.querySelectorAll('img').forEach(image => { image.loading = 'eager' })")
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth === 32)")
        assert page.locator(".drawn img").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_command_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr("defense.sample.available_cpus", lambda: 1)
    file = tmp_path / "prompts.txt"
    file.write_text("two hats\n\n")
    words = ["sample", str(run), "--prompts", str(file), "--prompt", PROMPTS[0], "-n", "2", "--steps", "1"]
    words += ["--guard", "random-tokens", "-o", str(tmp_path / "s"), "--json"]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told == {"images": 4, "prompts": 2, "ok": 4, "refused": 0, "nan": 0, "redrawn": 0}
    assert (tmp_path / "s" / "index.html").exists()
    assert set(pl.read_parquet(tmp_path / "s" / "samples.parquet")["guard"]) == {"random-tokens=2"}


def test_a_model_without_captions_takes_no_prompts(out, tmp_path):
    ddpm = make_run(tmp_path, out)
    save_base("ddpm", tmp_path).rename(ddpm / "model")
    manifest.write_json(ddpm / "config.json", manifest.read_json(ddpm / "config.json") | {"pipeline": "DDPMPipeline"})
    table = sample_run(ddpm, [], tmp_path / "s", **SMALL)
    assert table["prompt"].to_list() == ["", ""]
    with pytest.raises(SampleError, match="takes no prompts"):
        sample_run(ddpm, ["a"], tmp_path / "s", **SMALL)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", " one \n\ntwo\n", [" one ", "two"]),
        ("a.csv", 'caption,x\n"one, two",3\n,4\n', ["one, two"]),
        ("a.tsv", "x\tprompt\tcaption\n1\ta\tb\n", ["a"]),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', ["a"]),
    ],
)
def test_prompts_from_files(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.csv", "x\n1\n", "needs a column prompt, caption or text"),
        ("a.jsonl", '{"text": 3}', "with texts"),
        ("a.parquet", "none", "cannot be read"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SampleError, match=message):
        read_prompts(tmp_path / name)


def test_what_cannot_be_sampled_is_refused(run, tmp_path):
    with pytest.raises(SampleError, match="no run"):
        sample_run(tmp_path, ["a"], tmp_path / "s")
    with pytest.raises(SampleError, match="there is no prompt"):
        sample_run(run, [], tmp_path / "s")
    with pytest.raises(SampleError, match="at least 1"):
        sample_run(run, ["a"], tmp_path / "s", n=0)
    assert not (tmp_path / "s").exists()


def test_captions_of_the_sheet_after_training(out):
    chosen = choose_prompts(out, 6)
    kept = manifest.read(out, ["caption", "keep", "represents"]).filter("keep")
    times = dict(kept.select("caption", "represents").iter_rows())
    assert len(set(chosen)) == 6
    assert sorted((times[caption] for caption in chosen[:3]), reverse=True) == sorted(times.values(), reverse=True)[:3]
    assert [times[caption] for caption in chosen[3:]] == [1] * 3


def test_the_sheet_after_training_is_drawn_from_the_run(out, run):
    sample_trained(out, run, 2)
    table = pl.read_parquet(run / "samples" / "samples.parquet")
    assert table["prompt"].unique(maintain_order=True).to_list() == choose_prompts(out, 2)
    assert set(table["status"]) == {"ok"}
    assert manifest.read_json(run / "samples" / "sample.json")["options"]["guidance_scale"] == 1.0
    shutil.rmtree(run / "samples")
