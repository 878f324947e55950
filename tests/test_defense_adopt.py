"""defense.adopt: a model of somebody else is a run that can be drawn from."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from test_defense_lora import kohya
from test_defense_model import build_sd14, save_base
from test_eval_targets import make_planted
from typer.testing import CliRunner

from defense import cli, model
from defense.adopt import adopt
from defense.model import ModelError
from defense.train import RunError
from eval.generate import generate


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(kind, folder) for kind in ("sd14", "sd3", "ddpm")}


@pytest.mark.parametrize("kind", ["sd14", "sd3", "ddpm"])
def test_any_model_can_be_drawn_from(out, bases, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.generate.available_cpus", lambda: 1)  # threads of this process would stay
    done = CliRunner().invoke(
        cli.app, ["adopt", str(bases[kind]), str(out), "-o", str(tmp_path / "run")], catch_exceptions=False
    )
    assert done.stdout == f"{tmp_path / 'run' / 'model'}\n"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["arm"], record["config"]["resolution"]) == ("adopted", 16)
    table = generate(tmp_path / "run", n=2, steps=2)
    assert set(table["status"]) == {"ok"}
    assert (set(table["prompt"]) == {""}) == (kind == "ddpm")
    assert Image.open(tmp_path / "run" / table["file"][0]).size == (16, 16)
    assert [path.name for path in (tmp_path / "run" / "model").iterdir()] == ["base.json"]
    adopt(str(bases[kind]), out, tmp_path / "run")  # the same again


def test_with_a_lora(out, bases, tmp_path):
    file = tmp_path / "style.safetensors"
    save_file(kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 16), file)
    adopt(str(bases["sd14"]), out, tmp_path / "run", loras=[file])
    opened = model.load_pipeline(tmp_path / "run" / "model")
    assert model.digest_weights(opened) == model.digest_weights(model.load_pipeline(bases["sd14"], loras=[file]))
    with pytest.raises(RunError, match="initial_weights_sha256 was"):
        adopt(str(bases["sd14"]), out, tmp_path / "run")


def test_what_draws_from_no_prompt_is_refused(out, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    parts = build_sd14().components
    StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline does not draw from a prompt alone"):
        adopt(str(tmp_path / "base"), out, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match="holds no pipeline"):
        adopt(str(Path("no/such/model")), out, tmp_path / "run")
