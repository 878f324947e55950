"""Train the small f = 4 autoencoder of the `tiny` model on folders of images.

Purpose: the `tiny` Stable-Diffusion-class model works on 8 x 8 latents of 32 x 32 RGB images. Its `AutoencoderKL` is
trained once, on pictures that belong to no demo set, and shipped frozen with the package.

The packaged weights come from Debian's `openclipart-png` and npm's `@lobehub/fluent-emoji-3d` 1.1.0, both unpacked:
    python benchmarks/train_autoencoder.py OPENCLIPART FLUENT --out defense/pretrained/tiny-base/vae --held-out OTHER
Expected: held-out normalised l2 of OpenMoji drawings .0485 in the median, .0837 at 95 % (.03 is wanted).
Runtime: 20 minutes on one quiet core (6.7 steps a second), 37 on a shared one. The same seed on the same machine gives
the same weights.
"""

import json
import random
import time
import warnings
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32
STORE = 48  # images are kept at this side, so that crops of SIDE pixels can be drawn at several scales
MAX_PIXELS = 8_000_000  # larger files are skipped before they are decoded: decompression bombs
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


class Muon:
    """Muon (Jordan et al. 2024): momentum whose matrix is orthogonalised; here for convolutions. No weight decay."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.state = [(p, torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter, average in self.state:
            gradient = parameter.grad
            if gradient is None:
                continue
            average.mul_(self.momentum).add_(gradient)
            update = orthogonalise((gradient + self.momentum * average).flatten(1))
            scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            parameter.add_(update.view_as(parameter), alpha=-rate * scale)
            parameter.grad = None


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix with all singular values near 1, by five quintic Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def load(path: Path, side: int) -> np.ndarray | None:
    """The picture on white, centred in a square, resized with antialiasing; None if it cannot be used."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS or min(image.size) < SIDE // 2:
                return None
            rgba = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    square = Image.new("RGBA", (max(rgba.size),) * 2, "white")
    square.alpha_composite(rgba, ((square.width - rgba.width) // 2, (square.height - rgba.height) // 2))
    return np.asarray(square.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))


def load_folders(folders: list[Path], side: int) -> Tensor:
    """Every distinct readable picture below the folders as uint8 (N, 3, side, side), in path order."""
    found = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    arrays = {a.tobytes(): a for a in (load(p, side) for p in found if not p.is_symlink()) if a is not None}
    return torch.from_numpy(np.stack(list(arrays.values()))).permute(0, 3, 1, 2).contiguous()


def augment(batch: Tensor, rng: random.Random) -> Tensor:
    """Random scale, crop, mirror image and order of colours of uint8 (B, 3, STORE, STORE), as floats in [-1, 1]."""
    x = batch.float() / 127.5 - 1
    scale = rng.choice((SIDE, SIDE, SIDE, 36, 40, STORE))
    if scale != STORE:
        x = F.interpolate(x, size=(scale, scale), mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = rng.randint(0, scale - SIDE), rng.randint(0, scale - SIDE)
    x = x[..., top : top + SIDE, left : left + SIDE]
    if rng.random() < 0.5:
        x = x.flip(-1)
    if rng.random() < 0.5:
        x = x[:, rng.sample(range(3), 3)]
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def errors(model: AutoencoderKL, images: Tensor) -> tuple[np.ndarray, float]:
    """Normalised l2 of every reconstruction (pixels in [0, 1]), and the standard deviation of all latents."""
    l2, latents = [], []
    for chunk in images.split(64):
        x = (chunk.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        latents.append(model.encode(x).latent_dist.mode())
        y = model.decode(latents[-1]).sample.clamp(-1, 1)
        l2.append(((x - y) / 2).square().flatten(1).mean(1).sqrt())
    return torch.cat(l2).numpy(), float(torch.cat(latents).std())


def build(channels: int) -> AutoencoderKL:
    """An untrained autoencoder: residual branches begin at zero, and the posterior begins narrow."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    for name, parameter in model.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
    with torch.no_grad():
        model.quant_conv.weight[channels:] *= 0.1
        model.quant_conv.bias[channels:] = -6.0  # logarithm of the variance
    return model.to(memory_format=torch.channels_last)


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of training images, searched recursively.")],
    out: Annotated[Path, typer.Option(help="Where to write config.json and the fp16 safetensors.")],
    held_out: Annotated[Path | None, typer.Option(help="Images never trained on, to measure reconstruction.")] = None,
    steps: int = 8000,
    batch: int = 8,
    channels: int = 8,
    kl_weight: float = 1e-6,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train, measure and save the autoencoder."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    store = load_folders(folders, STORE)
    typer.echo(f"{len(store)} distinct training images")
    model = build(channels)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    ends = ("encoder.conv_in", "decoder.conv_out", "quant_conv")
    inner = [p for n, p in model.named_parameters() if p.ndim == 4 and not any(end in n for end in ends)]
    others = [p for p in model.parameters() if all(p is not q for q in inner)]
    muon, adam = Muon(inner), torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    start, order = time.perf_counter(), list[int]()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50) * (1 - step / steps)
        if len(order) < batch:
            order = rng.sample(range(len(store)), len(store))
        x = augment(store[[order.pop() for _ in range(batch)]], rng)
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample()).sample
        loss = F.mse_loss(y, x) + 0.02 * F.l1_loss(y, x) + kl_weight * posterior.kl().mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        adam.param_groups[0]["lr"] = 2e-3 * factor
        adam.step()
        muon.step(0.03 * factor)
        average.update_parameters(model)
        if step % 500 == 499:
            typer.echo(f"step {step + 1}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s")
    model = cast(AutoencoderKL, average.module).eval()
    small = F.interpolate(store[::5].float(), size=SIDE, mode="bicubic", antialias=True).clamp(0, 255)
    model.register_to_config(scaling_factor=round(1 / errors(model, small)[1], 5))
    model.to(memory_format=torch.contiguous_format).half().save_pretrained(out)
    typer.echo(f"scaling_factor {model.config.scaling_factor}, saved in {out}")
    if held_out is not None:
        l2, _ = errors(AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32), load_folders([held_out], SIDE))
        quantiles = {q: round(float(np.quantile(l2, q)), 4) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}
        typer.echo(f"held-out normalised l2 of {len(l2)} images: {json.dumps(quantiles)}")


if __name__ == "__main__":
    typer.run(main)
