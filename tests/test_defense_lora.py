"""defense.lora: put in, written, and merged from every kind of file that people have."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_defense_model import WIDTH, build_ddpm, build_sd14, build_sdxl

from defense.lora import FILE, LoraError, add_lora, merge_lora, save_lora
from defense.model import digest_weights

TARGETS = ("to_q", "to_out.0")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "encoder.layers.0.self_attn.q_proj"


def seeded(build, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def fill(unet: torch.nn.Module) -> None:
    """Give a LoRA some effect, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


def weight_of(pipeline, layer: str = LAYER, part: str = "unet") -> torch.Tensor:
    (found,) = [m for name, m in getattr(pipeline, part).named_modules() if name.endswith(layer)]
    return found.weight.detach()


def test_only_the_lora_is_trained_and_it_changes_nothing_yet():
    pipeline, untouched = seeded(build_sd14), seeded(build_sd14)
    add_lora(pipeline.unet, 3, 0, TARGETS, 0)
    trained = {name: w for name, w in pipeline.unet.named_parameters() if w.requires_grad}
    assert trained
    assert all("lora_" in name and any(target in name for target in TARGETS) for name in trained)
    assert {w.shape[0] for name, w in trained.items() if "lora_A" in name} == {3}
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, WIDTH)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, 5, context).sample, untouched.unet(x, 5, context).sample)


def test_it_depends_on_the_seed_alone():
    digests = []
    for seed in (1, 1, 2):
        pipeline = seeded(build_sd14)
        torch.rand(1)
        add_lora(pipeline.unet, 3, 0, TARGETS, seed)
        digests.append(digest_weights(pipeline))
    assert digests[0] == digests[1] != digests[2]


def test_targets_that_are_nowhere():
    with pytest.raises(LoraError, match=r"lora_targets = \['nothing'\]") as caught:
        add_lora(build_sd14().unet, 3, 0, ("nothing",), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [build_sd14, build_sdxl])
def test_what_is_saved_is_what_diffusers_reads(build, tmp_path):
    trained = seeded(build)
    add_lora(trained.unet, 2, 6, TARGETS, 0)  # scaled by 6 / 2
    fill(trained.unet)
    save_lora(trained, tmp_path)
    plain, merged = seeded(build), seeded(build)
    plain.load_lora_weights(tmp_path)
    merge_lora(merged, tmp_path)
    options = {"num_inference_steps": 2, "output_type": "latent", "prompt": "a"}
    images = [p(**options, generator=torch.Generator().manual_seed(0)).images for p in (trained, plain, merged)]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(images[0], images[2], atol=1e-4, rtol=1e-4)
    state = {name: w.detach() for name, w in trained.unet.named_parameters()}
    change = 3 * state[f"{LAYER}.lora_B.default.weight"] @ state[f"{LAYER}.lora_A.default.weight"]
    torch.testing.assert_close(weight_of(merged) - weight_of(seeded(build)), change, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in merged.unet.named_parameters())


def test_equal_weights_are_equal_files(tmp_path):
    """A file has no order of its own: one entry of metadata, and in it lists instead of sets."""
    pipeline = seeded(build_sd14)
    add_lora(pipeline.unet, 2, 6, TARGETS, 0)
    save_lora(pipeline, tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as saved:
        (described,) = saved.metadata().values()
    assert list(json.loads(described)) == sorted(json.loads(described))
    assert json.loads(described)["unet.target_modules"] == sorted(TARGETS)
    _, _, metadata = type(pipeline).lora_state_dict(tmp_path, return_lora_metadata=True)
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (2, 6)


def write_peft(network: torch.nn.Module, targets: list[str], folder: Path) -> torch.Tensor:
    """A folder as peft writes it; returns the change of the first target."""
    adapted = get_peft_model(network, LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    fill(adapted)
    adapted.save_pretrained(folder)
    state = load_file(folder / "adapter_model.safetensors")
    (a,) = [w for name, w in state.items() if f"{targets[0]}.lora_A" in name]
    (b,) = [w for name, w in state.items() if f"{targets[0]}.lora_B" in name]
    return 4 * b @ a


def test_a_folder_of_peft(tmp_path):
    change = write_peft(seeded(build_sd14).unet, [LAYER, "mid_block.attentions.0.proj_in"], tmp_path)
    merged = seeded(build_sd14)
    merge_lora(merged, tmp_path)
    torch.testing.assert_close(weight_of(merged) - weight_of(seeded(build_sd14)), change, atol=1e-5, rtol=1e-4)


def test_folders_of_peft_one_for_each_part(tmp_path):
    other = seeded(build_sd14)
    changes = {
        "unet": write_peft(other.unet, [LAYER], tmp_path / "unet"),
        "text_encoder": write_peft(other.text_encoder, [TEXT_LAYER], tmp_path / "text_encoder"),
    }
    merged, untouched = seeded(build_sd14), seeded(build_sd14)
    merge_lora(merged, tmp_path)
    for part, layer in (("unet", LAYER), ("text_encoder", TEXT_LAYER)):
        change = weight_of(merged, layer, part) - weight_of(untouched, layer, part)
        torch.testing.assert_close(change, changes[part], atol=1e-5, rtol=1e-4)


def kohya(name: str, width: int, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """A layer as kohya's trainer writes it."""
    generator = torch.Generator().manual_seed(2)
    return {
        f"{name}.lora_down.weight": torch.randn(2, width, generator=generator),
        f"{name}.lora_up.weight": torch.randn(16, 2, generator=generator),
        f"{name}.alpha": torch.tensor(alpha),
    }


@pytest.mark.parametrize(
    ("build", "unet", "text"),
    [
        (build_sd14, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te"),
        (build_sdxl, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "lora_te1"),
    ],
)
def test_a_single_file_of_kohya(build, unet, text, tmp_path):
    texts = [f"{text}_text_model_encoder_layers_0_self_attn_{name}_proj" for name in ("q", "k", "v", "out")]
    tensors = kohya(unet, 16)
    for text in texts:
        tensors |= kohya(text, WIDTH, alpha=4.0)
    save_file(tensors, tmp_path / "style.safetensors")
    merged, untouched = seeded(build), seeded(build)
    merge_lora(merged, tmp_path / "style.safetensors")
    for part, layer, name, scale in (("unet", LAYER, unet, 0.5), ("text_encoder", TEXT_LAYER, texts[0], 2.0)):
        expected = scale * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        change = weight_of(merged, layer, part) - weight_of(untouched, layer, part)
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


def write_loha(folder: Path) -> None:
    get_peft_model(build_sd14().unet, LoHaConfig(r=2, target_modules=[LAYER])).save_pretrained(folder)


def write_old_peft(folder: Path) -> None:
    write_peft(build_sd14().unet, [LAYER], folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b""), "holds 0 safetensors files"),
        (lambda folder: [save_file({}, folder / f"{n}.safetensors") for n in "ab"], "holds 2 safetensors files"),
        (lambda folder: save_file({"x.weight": torch.ones(2)}, folder / "a.safetensors"), "cannot be merged"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"{"), "cannot be merged"),
        (lambda folder: save_file(kohya(f"lora_unet_{LAYER.replace('.', '_')}", 20), folder / "a.safetensors"), "size"),
        (write_loha, "adapter of type LOHA"),
        (write_old_peft, r"no adapter_model\.safetensors"),
    ],
)
def test_what_is_no_lora_for_this_model_is_refused(write, message, tmp_path):
    write(tmp_path)
    with pytest.raises(LoraError, match=message) as caught:
        merge_lora(build_sd14(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_lora_that_fits_in_part_is_refused(tmp_path):
    name = LAYER.replace(".", "_")
    stranger = {key.replace("down_blocks_0", "down_blocks_7"): w for key, w in kohya(f"lora_unet_{name}", 16).items()}
    save_file(kohya(f"lora_unet_{name}", 16) | stranger, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="64 of its 128 numbers belong to no layer of this StableDiffusionPipeline"):
        merge_lora(build_sd14(), tmp_path / "a.safetensors")


def test_other_refusals(tmp_path):
    (tmp_path / "style.pt").touch()
    with pytest.raises(LoraError, match=r"style\.pt is no safetensors file"):
        merge_lora(build_sd14(), tmp_path / "style.pt")
    with pytest.raises(LoraError, match="does not exist"):
        merge_lora(build_sd14(), tmp_path / "none.safetensors")
    save_file(kohya("lora_unet_x", 16), tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="DDPMPipeline takes no LoRA"):
        merge_lora(build_ddpm(), tmp_path / "a.safetensors")
