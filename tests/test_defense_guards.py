"""defense.guards: each does what it says, or refuses. Images come from stubs wherever that is enough."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_defense_data import build_small
from test_defense_model import build_ddpm, build_sd3, build_sdxl
from test_eval_targets import make_planted, paint

from dedup import images, manifest, sources
from defense import guards
from defense.captions import PERTURBATIONS
from defense.copy_guard import DELTA, JUDGED, SAME, calibrate, load_small, load_training
from defense.guards import GUARDS, LOG, Drawn, GuardError, Setting, build_sampler, find_switch, lower_magnitude
from defense.sampling import measure_prompts


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_planted(tmp_path_factory.mktemp("guards"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pipeline = build_small(tmp_path_factory.mktemp("small"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def setting(pipeline, out=None, **options) -> Setting:
    return Setting(
        **{"steps": 3, "guidance_scale": 1.0, "batch_size": 8, "side": 32} | options, pipeline=pipeline, out=out
    )


def stub(answer, asked=None):
    """A sampler that gives `answer(prompt, seed)`."""

    def sampler(prompts, seeds, **steering):
        if asked is not None:
            asked.append((list(prompts), list(seeds), steering))
        pixels = np.stack([answer(*pair) for pair in zip(prompts, seeds, strict=True)])
        return Drawn(pixels, ["ok"] * len(seeds), pl.DataFrame(schema=LOG))

    return sampler


def training_picture(out: Path, row: int, side: int = 32) -> np.ndarray:
    src = Path(manifest.read_run(out)["src"])
    place = manifest.read(out, ["shard", "offset", "size", "key"]).row(row)
    return images.square(images.decode(sources.read_image(src, *place)).pixels, side)


def noisy(pixels: np.ndarray, seed: int, sigma: float = 8.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (pixels + rng.normal(0, sigma, pixels.shape)).clip(0, 255).astype(np.uint8)


def unrelated(prompt: str, seed: int) -> np.ndarray:
    return images.square(paint(5_000 + seed % 1_000), 32)


# The copy guard


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_model_that_gives_a_training_picture_back_is_caught_at_every_draw(out, mirrored):
    original = training_picture(out, 3)[:, :: -1 if mirrored else 1]
    asked = []
    regurgitate = stub(lambda prompt, seed: noisy(original, seed), asked)
    guarded = guards.watch_copies(regurgitate, load_training(out, 32), attempts=2)
    drawn = guarded(["a"] * 4, [1, 2, 3, 4])
    assert drawn.status == ["refused"] * 4
    assert not drawn.pixels.any()
    assert dict(drawn.log.schema) == LOG
    assert drawn.log.filter("copy").height == len(drawn.log) == 4 * 3
    (row,) = drawn.log["id"].unique()
    same = manifest.read(out, ["id", "component_id"]).filter(pl.col("id").is_in([row, 3]))
    assert same["component_id"].n_unique() == 1
    assert (drawn.log["distance"] <= drawn.log["delta"]).all()
    assert asked[0][1] == [1, 2, 3, 4]
    seeds = [seed for _, some, _ in asked for seed in some]
    assert len(set(seeds)) == len(seeds)


def test_unrelated_pictures_pass_untouched(out):
    asked = []
    guarded = guards.watch_copies(stub(unrelated, asked), load_training(out, 32), attempts=5)
    drawn = guarded(["a"] * 6, list(range(6)))
    assert drawn.status == ["ok"] * 6
    assert len(asked) == 1
    np.testing.assert_array_equal(drawn.pixels, np.stack([unrelated("", seed) for seed in range(6)]))
    assert drawn.log["attempt"].to_list() == [0] * 6
    assert not drawn.log["copy"].any()
    assert (drawn.log["distance"] > drawn.log["delta"]).all()


def test_only_what_was_a_copy_is_drawn_again_and_the_second_draw_stands(out):
    original, asked = training_picture(out, 0), []
    once = stub(lambda prompt, seed: original if seed == 7 else unrelated(prompt, seed), asked)
    drawn = guards.watch_copies(once, load_training(out, 32), attempts=3)(["a", "b", "c"], [6, 7, 8])
    assert drawn.status == ["ok"] * 3
    assert [prompts for prompts, _, _ in asked] == [["a", "b", "c"], ["b"]]
    again = asked[1][1][0]
    np.testing.assert_array_equal(drawn.pixels[1], unrelated("", again))
    assert drawn.log.filter(place=1).select("attempt", "seed", "copy").rows() == [(0, 7, True), (1, again, False)]
    refused = guards.watch_copies(once, load_training(out, 32), attempts=0)(["a", "b", "c"], [6, 7, 8])
    assert refused.status == ["ok", "refused", "ok"]


def test_no_number_is_no_copy_and_is_not_drawn_again(out):
    def sampler(prompts, seeds):
        return Drawn(np.zeros((len(seeds), 32, 32, 3), np.uint8), ["nan"] * len(seeds), pl.DataFrame(schema=LOG))

    drawn = guards.watch_copies(sampler, load_training(out, 32), attempts=3)(["a"], [1])
    assert drawn.status == ["nan"]
    assert drawn.log.is_empty()


def test_thresholds_of_the_copy_guard_are_half_way_to_the_next_picture():
    grey = np.zeros((4, 8, 8, 3), np.uint8)
    for place, level in enumerate((0, 25, 60, 200)):
        grey[place] = level
    delta, alarms = calibrate(grey, np.arange(4))
    np.testing.assert_allclose(delta, np.minimum([25 / 510, 25 / 510, 35 / 510, DELTA], DELTA), atol=1e-6)
    assert alarms == 0.25  # without 25 the next picture of 0 is 60, so up to 30 counts as 0; the others are far enough
    joined, _ = calibrate(grey, np.array([0, 0, 1, 2]))  # copies leave the δ of each other alone
    np.testing.assert_allclose(joined[1], 35 / 510, atol=1e-6)
    grey[1] = int(255 * SAME)  # a copy that deduplication has missed
    missed, _ = calibrate(grey, np.arange(4))
    np.testing.assert_allclose(missed[0], 60 / 510, atol=1e-6)


def test_every_readable_picture_is_in_the_reference_once(out):
    small = load_small(out, 32)
    rows = manifest.read(out, ["status", "sha256"]).filter(status="ok")
    assert len(small.rows) == len(small.pixels) == rows["sha256"].n_unique()
    assert small.rows["represents"].min() >= 1
    assert (small.delta > 0).all()
    judged = load_training(out, 32).judge(small.pixels[:5], ["a"] * 5)
    assert dict(judged.schema) == JUDGED
    assert judged["copy"].all()


# Guards of prompts


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbed_prompts_differ_by_image_and_come_back_with_the_seed(name):
    asked = []
    wrapped = GUARDS[name].wrap(stub(unrelated, asked), setting(build_sd3()), 2)
    prompts, seeds = ["a red fox on a hill"] * 4, [1, 2, 3, 2**62]
    wrapped(prompts, seeds)
    wrapped(prompts[::-1], seeds[::-1])
    (first, told, _), (second, _, _) = asked
    assert told == seeds
    assert first == second[::-1]
    assert len(set(first)) == 4
    assert "a red fox on a hill" not in first


# Guards inside the denoising


def test_the_dynamic_switch_on_a_synthetic_norm_curve():
    falls_and_rises = torch.tensor([9.0, 7, 5, 4, 6, 5, 3, 8])
    falls, rises = torch.arange(8.0, 0, -1), torch.arange(8.0)
    norms = torch.stack([falls_and_rises, falls, rises], dim=1)  # (8, 3)
    switched = [find_switch(norms[:steps]).tolist() for steps in range(1, 9)]
    assert [row[0] for row in switched] == [False] * 4 + [True] * 4  # the step after the minimum, and from then on
    assert not any(row[1] or row[2] for row in switched)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_the_switch_is_the_first_local_minimum(curve):
    norms = torch.tensor(curve, dtype=torch.float64)[:, None]
    inner = range(1, len(curve) - 1)
    assert bool(find_switch(norms)[0]) == any(curve[i - 1] > curve[i] < curve[i + 1] for i in inner)


def test_delayed_guidance_is_unconditional_before_the_switch(small):
    options = {"steps": 4, "guidance_scale": 3.0}
    prompts, seeds = ["a red fox", "two hats"], [1, 2]
    never = build_sampler(["static-guidance=0"], setting(small, **options))(prompts, seeds).pixels
    empty = build_sampler([], setting(small, steps=4))(["", ""], seeds).pixels
    assert np.abs(never.astype(int) - empty).max() <= 1
    always = build_sampler(["static-guidance=1"], setting(small, **options))(prompts, seeds).pixels
    guided = build_sampler([], setting(small, **options))(prompts, seeds).pixels
    assert np.abs(always.astype(int) - guided).max() <= 1
    half = build_sampler(["static-guidance"], setting(small, **options))(prompts, seeds).pixels
    assert np.abs(half.astype(int) - guided).max() > 1 < np.abs(half.astype(int) - empty).max()
    seen = []
    wrapped = GUARDS["dynamic-guidance"].wrap(stub(unrelated, seen), setting(small, **options), 0.0)
    wrapped(prompts, seeds)
    guide = seen[0][2]["guide"]
    norms = torch.tensor([[3.0, 1.0], [2.0, 2.0], [4.0, 3.0]])
    assert guide(500, norms).tolist() == [3.0, 0.0]
    assert guide(500, norms[:2]).tolist() == [0.0, 0.0]


def test_embeddings_are_moved_to_the_target_and_no_further():
    """A norm that is the length of the second token: it shrinks until it is small enough."""
    tokens = torch.ones(3, 4, 8)
    tokens[1] *= 0.1
    tokens[2] *= 50
    calls = []

    def measure(moved):
        calls.append(moved.detach().clone())
        return moved[:, 1].norm(dim=1)

    moved = lower_magnitude(measure, tokens, target=2.0)
    assert measure(moved)[0] <= 2.0 < measure(tokens)[0]
    torch.testing.assert_close(moved[1], tokens[1])  # was below the target
    assert 0 < (tokens[2] - moved[2]).abs().max() <= 10 * guards.LEARNING_RATE + 1e-4  # out of reach: ten steps
    torch.testing.assert_close(moved[:, 0], tokens[:, 0])
    torch.testing.assert_close(lower_magnitude(measure, tokens[:1], target=2.0), moved[:1])
    assert len(calls) < 40


def test_optimised_embeddings_lower_the_first_norm_of_a_real_pipeline(small, out):
    prompts, seeds, options = ["picture number 1", "a red fox"], [4, 5], {"steps": 3, "batch_size": 8}
    before, asked = measure_prompts(small, prompts, seeds, **options), []
    GUARDS["embedding"].wrap(stub(unrelated, asked), setting(small, out), 50)(prompts, seeds)
    captions = guards.list_usual_captions(out, "embedding")
    usual = measure_prompts(small, captions, [guards.derive_seed("usual", i) for i in range(len(captions))], **options)
    assert asked[0][2]["adjust"].keywords["target"] == pytest.approx(np.median(usual))
    after = []

    def watch(measure, tokens):
        moved = lower_magnitude(measure, tokens, target=0.0)
        after.append(measure(moved))
        assert torch.equal(moved[:, 0], tokens[:, 0])
        return moved

    unguarded = guards.draw(setting(small), prompts, seeds)
    drawn = guards.draw(setting(small), prompts, seeds, adjust=watch)
    assert (after[0].numpy() < before).all()
    assert np.abs(drawn.pixels.astype(int) - unguarded.pixels).max() > 0
    assert drawn.status == ["ok", "ok"]


# All of them


def test_any_pipeline_can_be_guarded_from_outside(out):
    pipeline = build_sd3()
    pipeline.set_progress_bar_config(disable=True)
    sampler = build_sampler(["copy=1", "random-tokens"], setting(pipeline, out, side=16, steps=2))
    drawn = sampler(["a", "b"], [1, 2])
    assert drawn.pixels.shape == (2, 16, 16, 3)
    assert len(drawn.log) >= 2
    again = sampler(["a", "b"], [1, 2])
    np.testing.assert_array_equal(drawn.pixels, again.pixels)
    assert drawn.log.equals(again.log)


def test_without_a_guard_nothing_changes(small):
    a = build_sampler([], setting(small))(["a"], [1])
    np.testing.assert_array_equal(a.pixels, guards.draw(setting(small), ["a"], [1]).pixels)
    assert guards.name_guards([]) == "none"


def test_guards_are_named_and_nested_in_one_order():
    assert guards.name_guards(["copy", "random-tokens=3"]) == "random-tokens=3+copy=5"
    assert guards.name_guards(["random-tokens=3", "copy"]) == "random-tokens=3+copy=5"
    assert list(GUARDS)[-1] == "copy"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["copies"], "unknown guard 'copies': did you mean copy"),
        (["x"], "choose of embedding, static-guidance"),
        (["copy", "copy=2"], "given twice"),
        (["copy=1.5"], "the number is the times that a copy is drawn again"),
        (["copy=many"], "the number is"),
        (["embedding=101"], "0 to 100"),
        (["static-guidance=nan"], "0 to 1"),
        (["static-guidance", "dynamic-guidance"], "take one of them"),
    ],
)
def test_guards_that_make_no_sense_are_refused(names, message):
    with pytest.raises(GuardError, match=message):
        guards.parse_guards(names)


def test_what_a_guard_cannot_protect_is_refused_in_one_line(small, out, tmp_path):
    unprompted, flow, xl = (setting(build(), out) for build in (build_ddpm, build_sd3, build_sdxl))
    cases = [
        (unprompted, "random-tokens", "DDPMPipeline takes no prompts that could be changed"),
        (unprompted, "static-guidance", "DDPMPipeline takes no prompts, so nothing is guided"),
        (unprompted, "embedding", "DDPMPipeline takes no prompts"),
        (
            flow,
            "dynamic-guidance",
            "StableDiffusion3Pipeline we do not know: supported are StableDiffusionPipeline and",
        ),
        (xl, "embedding", "StableDiffusionXLPipeline we do not know: supported are StableDiffusionPipeline;"),
        (setting(small), "embedding", "needs the OUT"),
        (setting(small), "copy", "needs the OUT"),
        (setting(small, guidance_scale=3.0), "dynamic-guidance=3", "nothing would change"),
    ]
    for what, name, message in cases:
        with pytest.raises(GuardError, match=message) as caught:
            build_sampler([name], what)
        assert "\n" not in str(caught.value)
    with pytest.raises(manifest.ManifestError, match="nowhere"):
        build_sampler(["copy"], setting(small, tmp_path / "nowhere"))
    build_sampler(["static-guidance"], xl)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline cannot be steered"):
        guards.draw(flow, ["a"], [1], guide=lambda timestep, norms: norms[0])
