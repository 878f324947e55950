"""Was a picture trained on? What the model makes of the picture itself: RUN → RUN/membership.parquet, .json.

In: RUN/model, targets and controls of its OUT with their captions; both kinds were drawn from one pot (planted or not,
trained or held out by component), or the scores would tell two kinds of pictures and not members. Higher = more
likely a member. Knows nothing of generations.

    unmemorize membership RUN
"""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from PIL import Image
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from eval import metrics
from eval.denoiser import Denoiser, open_denoiser
from eval.generate import derive_seed, digest_model, read_config
from eval.inference import infer_dataset, orient
from eval.prompts import list_prompts
from eval.reference import load_pixels
from eval.stats import plain
from eval.targets import load_targets

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64  # noises through the model at a time; fixed, because it may change the last bit
MODERATE = 0.1  # share of the schedule where members are told best: t = 100 of 1,000 in Carlini et al. 2023, sec. 5.2
LIGHT = 0.05  # of the noise under which representations are looked at
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # where the features of a dataset are measured
FPRS = (0.01, 0.05)
FEWEST = 8  # members, and others
BLIND = "jpeg-bytes"  # what can be said without a model: how simple a picture is

MEMBERS: dict[str, pl.DataType | type[pl.DataType]] = {
    "target_id": pl.String,
    "component_id": pl.Int64,
    "prompt": pl.String,
    "multiplicity": pl.Int64,  # in the original data
    "member": pl.Boolean,
    "digest": pl.String,  # of model and settings; beside these a column for every score
}


class MembershipError(ValueError):
    """Too few pictures of a kind, or a model that cannot be asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the model says to some pictures, noised or not, with their captions and without: each asked once."""

    denoiser: Denoiser
    latents: "Tensor"  # (B, C, h, w)
    noise: "Tensor"  # (B, n, C, h, w)
    told: dict[str, Any]  # with the captions; rows (B, …)
    empty: dict[str, Any]  # without
    known: dict[tuple[float, bool, str], "Tensor"] = field(default_factory=dict)

    def error(self, share: float, prompted: bool = True) -> "Tensor":
        """(B,): mean squared error of the noise predicted for the noised picture, over the noises."""
        return self._ask(share, prompted, "error")

    def norm(self, share: float, prompted: bool = True) -> "Tensor":
        """(B,): root mean square of the noise predicted for the picture as it is."""
        return self._ask(share, prompted, "norm")

    def predict_noised(self, share: float, prompted: bool) -> "Tensor":
        """(B · n, C, h, w)"""
        n, timestep = self.noise.shape[1], self.denoiser.at(share)
        noisy = self.denoiser.add_noise(self.latents.repeat_interleave(n, 0), self.noise.flatten(0, 1), timestep)
        told = self.told if prompted else self.empty
        return self.denoiser.predict(noisy, timestep, _repeat(told, n))

    def _ask(self, share: float, prompted: bool, what: str) -> "Tensor":
        key = (share, prompted, what)
        if key not in self.known:
            if what == "norm":
                told = self.told if prompted else self.empty
                predicted = self.denoiser.predict(self.latents, self.denoiser.at(share), told)
                self.known[key] = predicted.flatten(1).square().mean(dim=1).sqrt()
            else:
                wrong = (self.predict_noised(share, prompted) - self.noise.flatten(0, 1)).flatten(1)
                self.known[key] = wrong.square().mean(dim=1).reshape(self.noise.shape[:2]).mean(dim=1)
        return self.known[key]


Score = Callable[[Asked], "Tensor"]  # B pictures → (B,)


def score_loss(asked: Asked) -> "Tensor":
    """Minus the denoising loss at t = 100 of 1,000 (Carlini et al. 2023, sec. 5.2; their t is NOT VERIFIED)."""
    return -asked.error(MODERATE)


def score_sima(asked: Asked) -> "Tensor":
    """Minus the norm of the noise predicted for the clean picture (SimA, arXiv 2509.25003). 1 evaluation.

    The exact statistic and its sign are NOT VERIFIED: a member is its own nearest neighbour, which leaves little to
    predict. `orient` sets the sign by other pictures than those it is judged on.
    """
    return -asked.norm(MODERATE)


def score_spikiness(asked: Asked) -> "Tensor":
    """Deviation of the activations of the middle of the U-Net for the lightly noised picture, without a caption.

    After "Memorization and generalization via representations" (2026), who tell memorised *generations* by it. Raises
    MembershipError for a U-Net without a middle.
    """
    middle = getattr(asked.denoiser.unet, "mid_block", None)
    if middle is None:
        raise MembershipError("a U-Net without mid_block has no representation to look at")
    seen: list[Tensor] = []
    hook = middle.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        asked.predict_noised(LIGHT, prompted=False)
    finally:
        hook.remove()
    return seen[0].flatten(1).std(dim=1).reshape(asked.noise.shape[:2]).mean(dim=1)


SCORES: dict[str, Score] = {"loss": score_loss, "sima": score_sima, "spikiness": score_spikiness}
# What the scoring model of dataset inference is given.
FEATURES: dict[str, Score] = {
    **{f"loss {share}": partial(Asked.error, share=share) for share in SHARES},
    **{f"loss {share}, no caption": partial(Asked.error, share=share, prompted=False) for share in SHARES},
    **{f"norm {share}": partial(Asked.norm, share=share) for share in SHARES},
}
UNSIGNED = ("sima",)  # scores whose sign is set by other pictures than those they are judged on


def infer_membership(run: Path, *, n: int = 4, limit: int = 1_000) -> dict[str, Any]:
    """Score the targets of RUN with n noises each; returns membership.json.

    Of a component one picture counts. Raises MembershipError, DenoiserError, TargetError, ModelError or OSError.
    """
    import torch

    from defense.model import load_pipeline

    run = run.resolve()
    config = read_config(run)
    out, options = Path(config["out"]), config["config"]
    targets = load_targets(out, limit=limit, held_out=options["held_out"])
    single = targets["component_id"].is_null() | targets["component_id"].is_first_distinct()
    seen = list_prompts(out, run / "exposures.parquet", 1, 2**31).select("exposures", target_id="prompt_id")
    targets = targets.filter(single).join(seen, on="target_id", how="left", maintain_order="left")
    targets = targets.with_columns(
        member=pl.coalesce(pl.col("exposures") > 0, pl.col("prompt_kind") == "member"),
    )
    counts = {"members": int(targets["member"].sum()), "others": int((~targets["member"]).sum())}
    if min(counts.values()) < FEWEST:
        raise MembershipError(
            f"{run}: {counts['members']} members and {counts['others']} others of the same kind; {FEWEST} of each are "
            "needed: train with held_out, or plant canaries with --controls"
        )
    torch.set_num_threads(options["threads"] or available_cpus())
    pipeline = load_pipeline(run / "model", device=options.get("device", "auto"))
    digest = digest_model(run / "model", {"membership": n, "batch": BATCH})
    pixels = load_pixels(out, targets, options["resolution"])
    seeds = [[derive_seed(target, j) for j in range(n)] for target in targets["target_id"]]
    found = score_pictures(pipeline, pixels, targets["prompt"].to_list(), seeds, SCORES | FEATURES)
    found[BLIND] = measure_simplicity(pixels)
    table = targets.with_columns(digest=pl.lit(digest)).select(pl.col(c).cast(kind) for c, kind in MEMBERS.items())
    table = table.with_columns(pl.Series(name, values).fill_nan(None) for name, values in found.items())
    manifest.write_parquet(run / "membership.parquet", table)
    summary = counts | summarise(table) | {"n": n, "digest": digest}
    manifest.write_json(run / "membership.json", summary)
    return summary


def score_pictures(
    pipeline: Any, pixels: np.ndarray, captions: list[str], seeds: list[list[int]], scores: dict[str, Score]
) -> dict[str, np.ndarray]:
    """uint8 (N, R, R, 3), captions, seeds of the noises → float64 (N,) by name; NaN without finite numbers."""
    import torch

    from defense.conditions import embed_captions
    from defense.data import encode_latents
    from defense.sampling import make_generators

    denoiser = open_denoiser(pipeline)
    device = denoiser.unet.device
    conditions = embed_captions(pipeline, captions)
    found = {name: np.empty(len(pixels)) for name in scores}
    size = max(1, BATCH // len(seeds[0]))
    with torch.inference_mode():
        for first in tqdm(range(0, len(pixels), size), "membership", file=sys.stderr, disable=None):
            chunk = slice(first, first + size)
            latents = encode_latents(pixels[chunk], pipeline)
            drawn = [[torch.randn(latents.shape[1:], generator=g) for g in make_generators(s)] for s in seeds[chunk]]
            noise = torch.stack([torch.stack(each) for each in drawn])  # (B, n, C, h, w)
            rows = torch.arange(first, first + len(latents)) + 1
            told, empty = (conditions.select(which, device) for which in (rows, torch.zeros_like(rows)))
            asked = Asked(denoiser, latents.to(device), noise.to(device), told, empty)
            for name, score in scores.items():
                found[name][chunk] = score(asked).cpu().numpy()
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


def _repeat(told: dict[str, Any], n: int) -> dict[str, Any]:
    """Every row n times, at any depth."""
    return {k: _repeat(v, n) if isinstance(v, dict) else v.repeat_interleave(n, dim=0) for k, v in told.items()}


def measure_simplicity(pixels: np.ndarray) -> np.ndarray:
    """float64 (N,): bytes of each picture as JPEG of quality 90 (as in Somepalli et al. 2023): knows no model."""

    def weigh(picture: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=90)
        return buffer.tell()

    return np.array([weigh(picture) for picture in pixels], dtype=float)


def summarise(table: pl.DataFrame) -> dict[str, Any]:
    """How well members are told from others, as JSON values. No score is judged on what set its sign or weights.

    The blind baseline counts in the direction that suits it.
    """
    table = table.filter(pl.all_horizontal(pl.col(name).is_not_null() for name in (*SCORES, *FEATURES)))
    member = table["member"].to_numpy()
    folds = np.array([derive_seed(target, -1) % 2 for target in table["target_id"]]).astype(bool)
    scores = {name: table[name].to_numpy() for name in SCORES}
    scores |= {name: orient(scores[name], member, folds) for name in UNSIGNED}
    dataset, p_value = infer_dataset(table.select(*FEATURES).to_numpy(), member, folds)
    blind = table[BLIND].to_numpy()
    blind = -blind if metrics.auc(blind, member).estimate < 0.5 else blind
    summary: dict[str, Any] = {"scores": {}, "dataset": {"p_value": float(f"{p_value:.6g}")}, "finite": len(table)}
    for name, values in (scores | {"dataset": dataset, BLIND: blind}).items():
        area, gain = metrics.auc(values, member), metrics.auc_difference(values, blind, member)
        by = {
            str(m): float(f"{metrics.auc(values[some], member[some]).estimate:.6g}")
            for m in sorted(set(table["multiplicity"].to_list()) - {0})
            if member[some := (~member) | (table["multiplicity"] == m).to_numpy()].any()
        }
        summary["scores"][name] = {
            "auc": plain(area),
            "over_blind": plain(gain),
            "beats_blind": area.low > 0.5 and gain.low > 0,
            "auc_by_multiplicity": by,
            "tpr_at_fpr": {f"{fpr:g}": plain(metrics.tpr_at_fpr(values, member, fpr)) for fpr in FPRS},
        }
    return summary


def describe(summary: dict[str, Any], run: Path) -> str:
    """membership.json as lines for a terminal."""
    lines = [f"{summary['members']} pictures that were trained on, {summary['others']} of the same kind that were not"]
    lines.append(f"{'':<12} {'AUC':<24} at 5 % false")
    for name, found in summary["scores"].items():
        area, tpr = found["auc"], found["tpr_at_fpr"]["0.05"]
        share = "too few others" if tpr["reason"] else f"{tpr['tpr']['estimate']:.0%}"
        sure = "" if found["beats_blind"] or name == BLIND else ", no better than blind"
        lines.append(f"{name:<12} {area['estimate']:.3f} ({area['low']:.3f} … {area['high']:.3f})    {share}{sure}")
    lines.append(f"as a whole: p = {summary['dataset']['p_value']:.2g} of seeing this if none of them was trained on")
    return "\n".join([*lines, f"details: {run}/membership.json, scores: {run}/membership.parquet"])
