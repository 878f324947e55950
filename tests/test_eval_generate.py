"""eval.generate with a tiny untrained pipeline: same noise for every model, nothing lost, nothing done twice."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_defense_data import build_small
from test_defense_model import save_base
from test_eval_targets import make_planted, make_run, paint, write_png

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from defense import sampling
from defense.config import TrainConfig
from defense.model import load_pipeline, save_changed
from defense.train import build_pipeline
from eval import generate as generate_
from eval.extraction import attack
from eval.generate import GENERATIONS, GenerateError, derive_seed, generate, read_config
from eval.reference import TargetError
from eval.summary import describe_scores
from eval.targets import load_targets

SMALL = {"n": 3, "steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two untrained models that differ."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        build_small(folder, seed=seed).save_pretrained(folder / f"model-{seed}")
    return [folder / f"model-{seed}" for seed in (0, 1)]


@pytest.fixture
def run(out, models, tmp_path):
    return new_run(tmp_path, out, models[0])


@pytest.fixture(scope="module")
def finished(out, models, tmp_path_factory):
    """A run with its images, to be read only."""
    run = new_run(tmp_path_factory.mktemp("finished"), out, models[0])
    generate(run, **SMALL)
    return run


def new_run(folder: Path, out: Path, model: Path, arm: str = "raw") -> Path:
    run = make_run(folder, out, arm)
    shutil.copytree(model, run / "model")
    return run


def read(run: Path) -> pl.DataFrame:
    return pl.read_parquet(run / "generations.parquet")


def contents(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in (run / "generations").rglob("*.png")}


def test_every_target_gets_its_images(out, run):
    table = generate(run, **SMALL)
    assert table.equals(read(run))
    assert dict(table.schema) == GENERATIONS
    targets = load_targets(out)
    assert table["prompt_id"].unique(maintain_order=True).to_list() == targets["target_id"].to_list()
    assert len(table) == 3 * len(targets)
    assert set(table["status"]) == {"ok"}
    assert set(table["guard"]) == {"none"}
    joined = table.join(targets, left_on="prompt_id", right_on="target_id", nulls_equal=True)
    for name in ("prompt", "prompt_kind", "cluster_id"):
        assert joined[name].equals(joined[f"{name}_right"], null_equal=True)
    (digest,) = table["digest"].unique()
    assert len(contents(run)) == len(table)
    for file in table["file"]:
        assert file.startswith(f"generations/{digest}/")
        assert Image.open(run / file).size == (32, 32)


def test_images_are_those_of_the_sampler(finished):
    row = read(finished).row(4, named=True)
    pipeline = load_pipeline(finished / "model")
    (pixels,) = sampling.sample(pipeline, [row["prompt"]], [row["seed"]], steps=2, guidance_scale=2.0, batch_size=1)
    ours = np.asarray(Image.open(finished / row["file"])).astype(int)
    assert np.abs(ours - pixels).max() <= 1  # rounding differs with the batch


def test_models_share_their_noise(out, models, finished, tmp_path):
    other = new_run(tmp_path, out, models[1], "refill")
    a, b = read(finished), generate(other, **SMALL)
    shared = ["prompt_id", "prompt", "seed"]
    assert a.select(shared).equals(b.select(shared))
    assert a["seed"].n_unique() == len(a)
    assert set(a["digest"]) != set(b["digest"])
    assert contents(finished).keys() != contents(other).keys()


@given(st.text(), st.text(), st.integers(0, 999), st.integers(0, 999))
def test_seeds_fit_and_differ(a, b, i, j):
    assert 0 <= derive_seed(a, i) < 2**63
    assert (derive_seed(a, i) == derive_seed(b, j)) == ((a, i) == (b, j))


def test_seeds_never_change():
    """Images of different versions of the program can only be compared if these stay as they are."""
    assert derive_seed("canary-7", 3) == 3483714661256702787


def test_an_interrupted_run_goes_on(run, monkeypatch, out, finished):
    sample, prompts = generate_._sample, []

    def stop_at_third(pipeline, prompt, *rest):
        prompts.append(prompt)
        if len(prompts) == 3:
            raise KeyboardInterrupt
        return sample(pipeline, prompt, *rest)

    monkeypatch.setattr(generate_, "_sample", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        generate(run, **SMALL)
    assert not (run / "generations.parquet").exists()
    done = contents(run)
    assert len(done) == 6
    generate(run, **SMALL)
    assert prompts[3:] == [prompts[2], *load_targets(out)["prompt"][3:]]
    assert done.items() <= contents(run).items()
    assert contents(run) == contents(finished)
    assert (run / "generations.parquet").read_bytes() == (finished / "generations.parquet").read_bytes()
    generate(run, **SMALL)
    assert len(prompts) == 3 + 1 + 5  # nothing more


def test_other_settings_and_other_weights_get_another_folder(finished, run, models):
    digests = [read(finished)["digest"][0]]
    for changed in ({"steps": 1}, {"guidance_scale": 1.0}, {"n": 2}):
        digests.append(generate(run, **SMALL | changed)["digest"][0])
    shutil.rmtree(run / "model")
    shutil.copytree(models[1], run / "model")
    digests.append(generate(run, **SMALL)["digest"][0])
    assert len(set(digests)) == len(digests)


def test_images_without_finite_numbers_are_counted(run, monkeypatch):
    sample = sampling.sample

    def spoil(*arguments, on_step, **options):
        def watch(step):
            latents = step.latents.clone()
            latents[1, 0, 0, 0] = torch.nan if step.step == 0 else 1.0  # seen once is enough
            on_step(sampling.DenoisingStep(step.step, step.timestep, step.first, latents, step.conditional, None))

        return sample(*arguments, on_step=watch, **options)

    monkeypatch.setattr(sampling, "sample", spoil)
    table = generate(run, **SMALL)
    assert table["status"].to_list() == ["ok", "nan", "ok"] * 8
    assert table.filter(status="nan")["file"].null_count() == 8
    assert len(contents(run)) == 16


def test_other_prompts_for_the_same_targets(finished, run, out, tmp_path):
    targets = load_targets(out)
    path = tmp_path / "prompts.csv"
    given = {"target_id": targets["target_id"][2:4], "prompt": ["", 'a "new", one']}
    pl.DataFrame(given).write_csv(path)
    usual = read(finished)
    table = generate(run, prompts=path, **SMALL)
    assert table["prompt"].to_list() == [""] * 3 + ['a "new", one'] * 3
    assert table["prompt_id"].unique(maintain_order=True).to_list() == targets["target_id"][2:4].to_list()
    assert table["seed"].equals(usual.filter(pl.col("prompt_id").is_in(targets["target_id"][2:4].to_list()))["seed"])
    assert not set(table["file"]) & set(usual["file"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt\na\n", "needs the columns target_id and prompt"),
        ("target_id,prompt\nnobody,a\n", "are no targets, such as 'nobody'"),
        ("target_id,prompt\nx,a\nx,b\n", "more than one prompt"),
    ],
)
def test_prompts_that_fit_nothing_are_refused(run, tmp_path, text, message):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(GenerateError, match=message):
        generate(run, prompts=path, **SMALL)


def test_what_cannot_be_sampled_is_refused(out, run, tmp_path):
    with pytest.raises(GenerateError, match="no training run"):
        generate(tmp_path, **SMALL)
    with pytest.raises(GenerateError, match="at least 1"):
        generate(run, n=0)
    with pytest.raises(GenerateError, match="at least 1"):
        generate(run, steps=0)
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="no pipeline"):
        generate(run, **SMALL)


def test_a_guarded_model_answers_the_same_prompts_and_seeds_under_its_own_digest(out, run, finished, tmp_path):
    usual = read(finished)
    guarded = generate(run, guards=["random-tokens", "copy=0"], **SMALL)
    shared = ["prompt_id", "prompt", "seed"]
    assert guarded.select(shared).equals(usual.select(shared))
    assert set(guarded["guard"]) == {"random-tokens=2+copy=0"}
    assert set(guarded["digest"]).isdisjoint(usual["digest"])
    log = pl.read_parquet(run / "guards.parquet")
    assert set(log["prompt_id"]) == set(guarded["prompt_id"])
    assert log["copy"].sum() == len(guarded.filter(status="refused"))
    generate(run, guards=["copy=0", "random-tokens=2"], **SMALL)  # nothing is drawn again
    generate(run, **SMALL)
    assert not (run / "guards.parquet").exists()
    assert contents(run).items() >= contents(finished).items()


@given(st.text(), st.text())
def test_names_of_files_hold_no_untrusted_text(target_id, prompt):
    assert re.fullmatch("[0-9a-f]{16}", generate_.name_prompt(target_id, prompt, [0]))
    assert generate_.name_prompt(target_id, prompt, [0]) != generate_.name_prompt(target_id + prompt, "x", [0])


def test_a_lora_run_and_a_model_without_captions_can_be_sampled(out, tmp_path):
    runs = {
        "lora": new_run(tmp_path / "lora", out, save_base("sd14", tmp_path)),
        "ddpm": make_run(tmp_path, out, "raw"),
    }
    shutil.rmtree(runs["lora"] / "model")
    pipeline, base = build_pipeline(TrainConfig(base=str(tmp_path / "sd14"), resolution=16, lora_rank=2), 0)
    save_changed(pipeline, runs["lora"] / "model", base)
    table = generate(runs["lora"], n=2, steps=1, guidance_scale=2.0)
    assert set(table["status"]) == {"ok"}
    assert Image.open(runs["lora"] / table["file"][0]).size == (16, 16)
    save_base("ddpm", tmp_path).rename(runs["ddpm"] / "model")
    config = read_config(runs["ddpm"])
    manifest.write_json(runs["ddpm"] / "config.json", config | {"pipeline": "DDPMPipeline"})
    unprompted = generate(runs["ddpm"], n=2, steps=1)
    assert set(unprompted["prompt"]) == {""}
    assert unprompted["prompt_id"].equals(table["prompt_id"])
    with pytest.raises(ValueError, match="takes no prompts"):
        generate(runs["ddpm"], n=2, steps=1, guidance_scale=2.0)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A picture that stands three times under three captions, one twice under one caption, and single ones."""
    folder = tmp_path_factory.mktemp("captioned")
    for number, captions in enumerate([["a", "b", "c"], ["d", "d"], ["e"], ["f"]]):
        for copy, caption in enumerate(captions):
            write_png(folder / "src" / f"{number}-{copy}.png", paint(number))
            (folder / "src" / f"{number}-{copy}.txt").write_text(caption)
    deduplicate(folder / "src", folder / "out", Options(), jobs=1)
    return folder / "out"


def test_all_captions_of_a_cluster_get_an_equal_share(captioned, models, tmp_path):
    run = new_run(tmp_path, captioned, models[0])
    table = generate(run, n=6, steps=1)
    shares = table.group_by("prompt_id", "prompt", "caption_kind").len()
    assert sorted(shares.filter(pl.col("prompt").is_in(["a", "b", "c"]))["len"]) == [2, 2, 2]
    assert sorted(shares.filter(pl.col("prompt").is_in(["d", "e", "f"]))["len"]) == [6, 6, 6]
    assert shares.filter(caption_kind="dropped")["prompt"].sort().to_list() == ["b", "c"]
    for (target,), rows in table.group_by("prompt_id"):
        assert sorted(rows["seed"]) == sorted(derive_seed(target, j) for j in range(6))
    assert len(contents(run)) == len(table)


def test_captions_by_kind(captioned, models, tmp_path):
    run = new_run(tmp_path, captioned, models[0])
    assert set(generate(run, n=2, steps=1, captions="survivor")["prompt"]) == {"a", "d", "e", "f"}
    dropped = generate(run, n=2, steps=1, captions="dropped")
    assert set(dropped["prompt"]) == {"b", "c"}
    nothing = generate(run, n=2, steps=1, captions="null")
    assert set(nothing["prompt"]) == {""}
    assert set(nothing["caption_kind"]) == {"null"}
    with pytest.raises(TargetError, match="unknown kind of captions"):
        generate(run, captions="loud", **SMALL)


def test_what_the_autoencoder_alone_costs_is_told(run):
    generate(run, **SMALL | {"n": 4})
    table = attack(run)
    told = json.loads((run / "reconstruction.json").read_text())
    assert told["n"] == len(table)
    assert 0 < told["median"] <= told["max"] < 1
    summary = json.loads((run / "attack-clique.json").read_text())
    assert summary["reconstruction"] == told
    assert summary["delta"]["max"] == table["delta"].max()
    assert f"autoencoder alone    {told['median']:.3f} from an image" in describe_scores(summary, "clique")
