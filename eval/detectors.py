"""Statistics of a prompt that need the model and no image: RUN → RUN/scores-<detector>.parquet, one row a prompt.

In: RUN/model and the captions of its OUT. Out also: RUN/detectors.json, how well each tells captions of images that
stand often from others. All are made of the noise that the U-Net predicts for pure noise, with the prompt and
without; higher = more likely memorised. Their scales depend on the latents, so no threshold holds for another
model. Knows nothing of generated images.

    unmemorize detect RUN
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from eval import metrics
from eval.denoiser import Denoiser, DenoiserError, open_denoiser
from eval.generate import derive_seed, digest_model, read_config
from eval.prompts import PROMPTS, list_prompts
from eval.stats import plain

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64  # noises through the model at a time; fixed, because it may change the last bit
GUIDANCE = 7.5  # of the one-step attack (Webster 2023)
LOW_NOISE = 0.041  # timesteps[-3] of 50 with Stable Diffusion's spacing, as a share of all timesteps
LATENT = 4 * 64 * 64  # numbers in a latent of Stable Diffusion 1.4, for which the weights below were chosen
ANISOTROPY = (1.0, 2.0)  # weights of magnitude and cosine; the authors take (1, 0.1) for Stable Diffusion 2
FPRS = (0.01, 0.05)
BLIND = "caption-length"  # what can be said without a model

DETECTIONS: dict[str, pl.DataType | type[pl.DataType]] = {
    **PROMPTS,
    "detector": pl.String,
    "score": pl.Float64,  # null when the model gave no finite numbers
    "n": pl.Int64,  # noises
    "digest": pl.String,  # of model and settings
}

# Predictions for P prompts with n noises each → score (P,)
Detector = Callable[["Predictions"], "Tensor"]


class DetectError(DenoiserError):
    """A detector that does not exist, or a model that it cannot be asked of."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model says to pure noise with some prompts and without: each asked once, for all detectors."""

    denoiser: Denoiser
    noise: "Tensor"  # (P, n, C, h, w)
    context: "Tensor"  # (P, L, W)
    empty: "Tensor"  # (1, L, W)
    known: dict[tuple[bool, int], "Tensor"] = field(default_factory=dict)

    def with_prompt(self, timestep: int) -> "Tensor":
        return self._ask(True, timestep)

    def without(self, timestep: int) -> "Tensor":
        return self._ask(False, timestep)

    def _ask(self, prompted: bool, timestep: int) -> "Tensor":
        """(P, n, D)"""
        if (prompted, timestep) not in self.known:
            count, n = self.noise.shape[:2]
            context = self.context if prompted else self.empty.expand(count, -1, -1)
            told = {"encoder_hidden_states": context.repeat_interleave(n, dim=0)}
            predicted = self.denoiser.predict(self.noise.flatten(0, 1), timestep, told)  # (P · n, C, h, w)
            self.known[prompted, timestep] = predicted.reshape(count, n, -1)
        return self.known[prompted, timestep]


def measure_magnitude(asked: Predictions) -> "Tensor":
    """ℓ2 norm of what the text adds to the predicted noise, at the first step (Wen et al. 2024, sec. 3).

    Averaged over the noises. 2 evaluations a noise.
    """
    first = asked.denoiser.noisiest
    return (asked.with_prompt(first) - asked.without(first)).norm(dim=-1).mean(dim=-1)


def measure_one_step(asked: Predictions) -> "Tensor":
    """Mean squared step from pure noise to the image in one guided step (Webster 2023, white-box score).

    One Heun step to σ = 0 is one Euler step, which moves by σ times the predicted noise. 2 evaluations a noise.
    """
    first = asked.denoiser.noisiest
    guided = asked.without(first) + GUIDANCE * (asked.with_prompt(first) - asked.without(first))
    alpha = asked.denoiser.alphas[first]
    return (guided.square().mean(dim=-1) * (1 - alpha) / alpha).mean(dim=-1)


def measure_anisotropy(asked: Predictions) -> "Tensor":
    """Magnitude at the first step, and how far the text pulls along the unconditional prediction (Asthana & Belagiannis
    2026): cosine of both for the same pure noise at a timestep of little noise.

    The magnitude is scaled to latents of Stable Diffusion's size, or the weights would mean something else for every
    model; that is ours. 4 evaluations a noise.
    """
    import torch

    magnitude = measure_magnitude(asked) * (LATENT / asked.noise[0, 0].numel()) ** 0.5
    low = round(LOW_NOISE * len(asked.denoiser.alphas))
    pull = asked.with_prompt(low) - asked.without(low)
    cosine = torch.cosine_similarity(asked.without(low), pull, dim=-1).mean(dim=-1)
    return ANISOTROPY[0] * magnitude + ANISOTROPY[1] * cosine


def measure_agreement(asked: Predictions) -> "Tensor":
    """Do different noises lead to the same picture? Mean cosine, over pairs of noises, of predicted minus real noise.

    After Hintersdorf et al. 2024 (NeMo, sec. 3), who take the largest MS-SSIM of the pairs; its windows do not fit
    into small latents. 1 evaluation a noise, of which there must be two.
    """
    import torch

    n = asked.noise.shape[1]
    if n < 2:
        raise DetectError("agreement compares noises with each other: -n 2 or more")
    moves = asked.with_prompt(asked.denoiser.noisiest) - asked.noise.flatten(2)
    directions = torch.nn.functional.normalize(moves, dim=-1)
    return ((directions @ directions.mT).sum(dim=(1, 2)) - n) / (n * (n - 1))


DETECTORS: dict[str, Detector] = {
    "noise-magnitude": measure_magnitude,
    "one-step": measure_one_step,
    "anisotropy": measure_anisotropy,
    "agreement": measure_agreement,
}


def detect(
    run: Path, names: Sequence[str] = tuple(DETECTORS), *, n: int = 4, at_least: int = 2, limit: int = 1_000
) -> dict[str, Any]:
    """Score prompts of the OUT of RUN with n noises each; returns detectors.json.

    Positive are the captions of images that stand `at_least` times in the original data. At most `limit` positives,
    the most duplicated first, and as many others. Raises DetectError, ModelError, TargetError or OSError.
    """
    if unknown := [name for name in names if name not in DETECTORS]:
        raise DetectError(f"unknown detector {unknown[0]!r}: choose of {', '.join(DETECTORS)}")
    if n < 1 or at_least < 1:
        raise DetectError(f"n = {n} noises, images that stand {at_least} times: both must be at least 1")
    import torch

    from defense.model import load_pipeline

    run = run.resolve()
    config = read_config(run)
    prompts = list_prompts(Path(config["out"]), run / "exposures.parquet", at_least, limit)
    torch.set_num_threads(config["config"]["threads"] or available_cpus())
    pipeline = load_pipeline(run / "model", device=config.get("device", "auto"))
    digest = digest_model(run / "model", {"detect": n, "batch": BATCH})
    seeds = [[derive_seed(target, j) for j in range(n)] for target in prompts["prompt_id"]]
    scores = score_prompts(pipeline, prompts["prompt"].to_list(), seeds, names)
    blind = count_tokens(pipeline, prompts["prompt"].to_list())
    for name, values in scores.items():
        columns = {"detector": pl.lit(name), "n": pl.lit(n), "digest": pl.lit(digest)}
        table = prompts.with_columns(score=pl.Series(values).fill_nan(None), **columns)
        table = table.select(pl.col(column).cast(kind) for column, kind in DETECTIONS.items())
        manifest.write_parquet(run / f"scores-{name}.parquet", table)
    summary = summarise(prompts, scores | {BLIND: blind}, at_least)
    summary = plain(summary | {"n": n, "digest": digest})
    manifest.write_json(run / "detectors.json", summary)
    return summary


def score_prompts(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """float64 (P,) by detector: one score a prompt, from the noises of its seeds; NaN without finite numbers.

    The global random state is left as it was, and memory is bounded by the batch. Raises DetectError.
    """
    import torch

    from defense.conditions import embed_captions
    from defense.sampling import make_generators

    denoiser = check_pipeline(pipeline)
    unet = denoiser.unet
    side = unet.config.sample_size
    shape = (unet.config.in_channels, *((side, side) if isinstance(side, int) else side))
    scores = {name: np.empty(len(prompts)) for name in names}
    size = max(1, BATCH // len(seeds[0])) if len(prompts) else 1
    with torch.inference_mode():
        for first in tqdm(range(0, len(prompts), size), "detect", file=sys.stderr, disable=None):
            chunk = slice(first, first + size)
            chances = [make_generators(mine) for mine in seeds[chunk]]
            drawn = [torch.stack([torch.randn(shape, generator=chance) for chance in each]) for each in chances]
            noise = torch.stack(drawn).to(unet.device)  # (B, n, C, h, w)
            told = embed_captions(pipeline, prompts[chunk]).tokens
            assert told is not None  # `check_pipeline` has seen the text encoder
            asked = Predictions(denoiser, noise, told[1:].to(unet.device), told[:1].to(unet.device))
            for name in names:
                scores[name][chunk] = DETECTORS[name](asked).cpu().numpy()
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in scores.items()}


def check_pipeline(pipeline: Any) -> Denoiser:
    """The denoiser of a pipeline of the Stable Diffusion class. Raises DetectError or DenoiserError for another."""
    denoiser = open_denoiser(pipeline)
    problems = {
        "no single text encoder": getattr(pipeline, "text_encoder", None) is None
        or getattr(pipeline, "text_encoder_2", None) is not None,
        "a U-Net that is conditioned on more than text": getattr(denoiser.unet.config, "addition_embed_type", None)
        not in (None, "text"),
    }
    if found := [problem for problem, there in problems.items() if there]:
        kind = type(pipeline).__name__
        raise DetectError(f"{kind} has {found[0]}: detectors need a text-to-image pipeline like Stable Diffusion's")
    return denoiser


def count_tokens(pipeline: Any, prompts: Sequence[str]) -> np.ndarray:
    """float64 (P,): the blind baseline, which knows the caption alone."""
    return np.array([len(pipeline.tokenizer(text, truncation=True).input_ids) for text in prompts], dtype=float)


def summarise(prompts: pl.DataFrame, scores: dict[str, np.ndarray], at_least: int) -> dict[str, Any]:
    """How well scores tell the captions of images that stand `at_least` times from the others, as JSON values.

    In a planted dataset the AUC is that among canaries, to which multiplicities were dealt at random; other pictures
    differ from them in kind, and a model in which nothing is repeated would be accused or praised for that. The blind
    baseline counts in the direction that suits it. A detector beats it when the interval of its AUC lies above one
    half, and that of the difference above 0.
    """
    positive = (prompts["multiplicity"] >= at_least).to_numpy()
    canary = (prompts["kind"] == "canary").to_numpy()
    among = canary if positive[canary].any() and not positive[canary].all() else np.ones(len(prompts), bool)
    unseen = None if prompts["exposures"].has_nulls() else int((prompts["exposures"] == 0).sum())
    summary: dict[str, Any] = {
        "at_least": at_least,
        "positives": int(positive.sum()),
        "negatives": int((~positive).sum()),
        "unseen": unseen,
        "among": "canaries" if among is canary else "all",
        "detectors": {},
    }
    if positive.all() or not positive.any():
        return summary | {"reason": "captions of both kinds are needed: images that stand often, and others"}
    blind = scores[BLIND]
    blind = -blind if metrics.auc(blind[among], positive[among]).estimate < 0.5 else blind
    for name, values in (scores | {BLIND: blind}).items():
        finite = np.isfinite(values)
        summary["detectors"][name] = {"nan": int((~finite).sum())}
        few = among & finite
        if positive[few].all() or not positive[few].any():
            summary["detectors"][name]["reason"] = "no finite scores of one kind"
            continue
        area = metrics.auc(values[few], positive[few])
        gain = metrics.auc_difference(values[few], blind[few], positive[few])
        all_of_them = (values[finite], positive[finite])
        summary["detectors"][name] |= {
            "auc": asdict(area),
            "over_blind": asdict(gain),
            "beats_blind": area.low > 0.5 and gain.low > 0,
            "auc_all": asdict(metrics.auc(*all_of_them)),
            "tpr_at_fpr": {f"{fpr:g}": asdict(metrics.tpr_at_fpr(*all_of_them, fpr)) for fpr in FPRS},
            "precision": asdict(metrics.precision_at(*all_of_them, metrics.CARLINI_BASE_RATE)),
        }
    return summary


def describe(summary: dict[str, Any], run: Path) -> str:
    """detectors.json as lines for a terminal: 80 columns."""
    unseen = "" if summary["unseen"] is None else f", {summary['unseen']} of them never trained on"
    who = f"{summary['positives']} captions of images that stand {summary['at_least']} times or more"
    lines = [f"{who}, {summary['negatives']} others{unseen}"]
    if "reason" in summary:
        return "\n".join([*lines, summary["reason"], f"scores: {run}/scores-*.parquet"])
    where = f"AUC ({summary['among']})"
    lines.append(f"{'':<16} {where:<21} {'at 5 % false':<13} precision at 94 of 350,000")
    for name, found in summary["detectors"].items():
        if "reason" in found:
            lines.append(f"{name:<16} {found['reason']}")
            continue
        area, tpr, precision = found["auc"], found["tpr_at_fpr"]["0.05"], found["precision"]
        share = "-" if tpr["reason"] else f"{tpr['tpr']['estimate']:.0%}"
        sure = "" if found["beats_blind"] or name == BLIND else ", no better than blind"
        interval = f"{area['estimate']:.3f} ({area['low']:.3f} … {area['high']:.3f})"
        lines.append(f"{name:<16} {interval:<21} {share:<13} {precision['low']:.2g} or more{sure}")
    return "\n".join([*lines, f"details: {run}/detectors.json, scores: {run}/scores-*.parquet"])
