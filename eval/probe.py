"""Hidden, or gone? What the U-Net is told in place of a caption, optimised until the model gives a picture back.

In: RUN/model and the targets of its OUT. Out: RUN/scores-probe.parquet, one row a target, and attack-probe.json. DoRI
(arXiv 2507.16880, ICML 2026) finds such tokens for images that a mitigation was to remove. A probe with enough freedom
draws anything, so it says nothing without the same probe for pictures that the model never saw: the controls.

    unmemorize probe RUN
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from PIL import Image
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from eval.calibrate import calibrate, freeze
from eval.denoiser import DenoiserError, open_denoiser
from eval.extraction import CLIQUE, EVERY, FEWEST, count_copies, read_images, score_clique
from eval.generate import derive_seed, digest_model, read_config
from eval.summary import summarise_scores
from eval.yardstick import load_yardstick

if TYPE_CHECKING:
    from torch import Tensor

STARTS = ("caption", "random")  # where the search begins
STEPS = 50  # of Adam
RATE = 0.1  # learning rate, for tokens scaled to unit deviation
TIMES = (0.25, 0.5, 0.75)  # shares of the schedule whose denoising loss is lowered
PROBE = EVERY | CLIQUE | {"start": pl.String}


class ProbeError(ValueError):
    """A probe that cannot be made so."""


def probe(run: Path, *, start: str = "caption", n: int = 4, steps: int = 15, limit: int = 20) -> pl.DataFrame:
    """Probe the model of RUN, with n images a target; returns scores-probe.parquet, columns PROBE.

    start: one of STARTS. steps: of sampling. limit: members, the most duplicated first, and as many controls. A target
    that is done is not done again. Raises ProbeError, DenoiserError, CalibrationError, TargetError, ModelError or
    OSError.
    """
    import torch

    from defense.data import encode_latents
    from defense.model import load_pipeline

    if start not in STARTS or n < FEWEST:
        raise ProbeError(f"a probe starts from {' or '.join(STARTS)}, and draws {FEWEST} images or more")
    run = run.resolve()
    config = read_config(run)
    out, options = Path(config["out"]), config["config"]
    yardstick = load_yardstick(out, options["resolution"], held_out=options["held_out"])
    calibration = freeze(calibrate(yardstick, config.get("pipeline")), run / "calibration.json")
    copies = count_copies(out, yardstick, calibration)
    torch.set_num_threads(options["threads"] or available_cpus())
    pipeline = load_pipeline(run / "model", device=options.get("device", "auto"))
    settings = {"start": start, "n": n, "steps": steps, "search": [STEPS, RATE, *TIMES]}
    digest = digest_model(run / "model", settings)
    scores = []
    for place in tqdm(choose_targets(yardstick.targets, limit), f"probe {run.name}", file=sys.stderr, disable=None):
        target = yardstick.targets.row(place, named=True)
        name = f"probe/{digest}/{yardstick.targets['sha256'][place]}"
        files = [f"{name}-{j:03d}.png" for j in range(n)]
        if not (run / files[-1]).exists():  # written last
            latents = encode_latents(yardstick.target_pixels[place : place + 1], pipeline)[0]
            seeds = [derive_seed(target["target_id"], j) for j in range(n)]
            tokens = find_tokens(pipeline, latents, target["prompt"], start, seeds)
            for file, pixels in zip(files, draw(pipeline, tokens, target["prompt"], seeds, steps), strict=True):
                manifest.write_atomic(run / file, partial(Image.fromarray(pixels).save, format="PNG"))
        images = read_images(run, pl.Series(files), options["resolution"])
        found = score_clique(images, place, yardstick, calibration, n)
        for column in ("best_file", "medoid_file"):
            found[column] = None if found[column] is None else files[found[column]]
        found["matched_files"] = [files[number] for number in found["matched_files"]]
        shown = {"caption_kind": "probe", "start": start, "digest": digest, "eidetic_k": copies[place]}
        scores.append(target | found | shown | {"n_generations": n, "n_nan": 0})
    table = pl.DataFrame(scores, schema=PROBE)
    manifest.write_parquet(run / "scores-probe.parquet", table)
    manifest.write_json(run / "attack-probe.json", summarise_scores(table))
    return table


def choose_targets(targets: pl.DataFrame, limit: int) -> list[int]:
    """Places of the `limit` members that stand most often, and of as many controls."""
    ordered = targets.with_row_index("place").sort(-pl.col("multiplicity"), "place")
    return [place for kind in ("member", "control") for place in ordered.filter(prompt_kind=kind)["place"].head(limit)]


def draw(pipeline: Any, tokens: "Tensor", caption: str, seeds: Sequence[int], steps: int) -> Any:
    """uint8 (N, R, R, 3): images of the model that is told the tokens (L, W) instead of the caption."""
    from defense.sampling import sample

    return sample(
        pipeline,
        [caption] * len(seeds),
        seeds,
        steps=steps,
        guidance_scale=1.0,
        batch_size=len(seeds),
        adjust=lambda measure, told: tokens.to(told).expand_as(told),
    )


def find_tokens(
    pipeline: Any, latents: "Tensor", caption: str, start: str, seeds: Sequence[int], steps: int = STEPS
) -> "Tensor":
    """Latents (C, h, w) of the target → tokens (L, W) float32, on the CPU.

    Adam on the denoising loss at three timesteps, with fresh noise from seeds[0] in every step. "random" starts from
    noise of the mean and deviation of the caption's tokens. Weights and global random state stay as they are. Number of
    steps and timesteps are ours, those of the authors are NOT VERIFIED.
    Raises DenoiserError for a model without captions or U-Net.
    """
    import torch

    from defense.conditions import embed_captions

    denoiser = open_denoiser(pipeline)
    conditions = embed_captions(pipeline, [caption])
    if conditions.tokens is None:
        raise DenoiserError(f"{type(pipeline).__name__} takes no captions: there is nothing to probe it with")
    device, chance = denoiser.unet.device, torch.Generator().manual_seed(seeds[0])
    known = conditions.tokens[1].to(device)  # (L, W)
    mean, deviation = known.mean(), known.std()
    told = conditions.select(torch.ones(len(TIMES), dtype=torch.int64), device)
    begin = (known - mean) / deviation
    if start == "random":
        begin = torch.randn(known.shape, generator=chance).to(device)
    tokens = begin.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([tokens], lr=RATE)
    timesteps = torch.tensor([denoiser.at(share) for share in TIMES], device=device)
    clean = latents.to(device).expand(len(TIMES), *latents.shape)
    for _ in range(steps):
        noise = torch.randn(clean.shape, generator=chance).to(device)
        noisy = denoiser.add_noise(clean, noise, timesteps)
        context = (tokens * deviation + mean).expand(len(TIMES), *known.shape)
        predicted = denoiser.predict(noisy, timesteps, told | {"encoder_hidden_states": context})
        (gradient,) = torch.autograd.grad(torch.nn.functional.mse_loss(predicted, noise), tokens)
        tokens.grad = gradient  # and no other: the weights keep none
        optimizer.step()
    return (tokens * deviation + mean).detach().cpu()
