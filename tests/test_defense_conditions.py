"""defense.conditions: what a U-Net is told is what diffusers would tell it."""

import pytest
import torch
from test_defense_data import build_small
from test_defense_model import build_ddpm, build_sd14, build_sdxl

from defense.conditions import CHUNK, Conditions, embed_captions

CAPTIONS = ["a fox", "", "a long caption that goes on and on, past the last token"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("build", [build_sd14, build_small])
def test_stable_diffusion(build, tmp_path):
    pipeline = build(tmp_path) if build is build_small else build()
    ours = embed_captions(pipeline, CAPTIONS)
    theirs, nothing = pipeline.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=True)
    torch.testing.assert_close(ours.tokens, torch.cat([nothing[:1], theirs]))
    assert ours.pooled is ours.time_ids is None
    assert list(ours.select(torch.tensor([0, 1]), CPU)) == ["encoder_hidden_states"]


@pytest.mark.parametrize("zeros", [True, False])
def test_stable_diffusion_xl(zeros):
    pipeline = build_sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    ours = embed_captions(pipeline, CAPTIONS)
    tokens, no_tokens, pooled, not_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu")
    torch.testing.assert_close(ours.tokens, torch.cat([no_tokens[:1], tokens]))
    torch.testing.assert_close(ours.pooled, torch.cat([not_pooled[:1], pooled]))
    assert (ours.tokens[0] == 0).all() == zeros
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, arguments, told: seen.append(told["added_cond_kwargs"]), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(["a fox", "a hat"], num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    told = embed_captions(pipeline, ["a fox", "a hat"]).select(torch.tensor([1, 2]), CPU)["added_cond_kwargs"]
    torch.testing.assert_close(told["time_ids"], seen[0]["time_ids"])
    torch.testing.assert_close(told["text_embeds"], seen[0]["text_embeds"])


def test_a_model_without_captions_is_told_nothing():
    conditions = embed_captions(build_ddpm(), CAPTIONS)
    assert conditions == Conditions()
    assert conditions.select(torch.tensor([0, 3]), CPU) == {}


def test_many_captions_stay_in_order():
    pipeline = build_sd14()
    captions = [f"hat {number}" for number in range(CHUNK + 3)]
    tokens = embed_captions(pipeline, captions).tokens
    assert len(tokens) == CHUNK + 4
    torch.testing.assert_close(tokens[-1:], embed_captions(pipeline, captions[-1:]).tokens[1:])
