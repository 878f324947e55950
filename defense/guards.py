"""Sampling-time defences: sampler → sampler, one signature and a dict. They hide what a model knows; it stays in there.

A sampler takes prompts and seeds and gives `Drawn`. A guard puts something around it: other prompts, other embeddings,
guidance that begins late, or a look at every image. What acts on prompts or on images takes any text-to-image pipeline;
what acts from within says which it supports. Guards are nested in the order of GUARDS, the last one outermost. Whatever
chance decides is a function of the seed of the image alone. Knows nothing of runs or attacks.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from dedup import manifest
from defense import sampling
from defense.captions import PERTURBATIONS, Perturbation
from defense.copy_guard import JUDGED, Training, load_training
from defense.sampling import DenoisingStep, Measure, is_known, measure_prompts

LEARNING_RATE, ITERATIONS = 0.05, 10  # of the embeddings: Wen et al. 2024, sec. 4.2, and their code
REFERENCE = 64  # captions that say which norms are usual

LOG: dict[str, pl.DataType | type[pl.DataType]] = {  # one row a look at an image
    "place": pl.Int64,  # of the image among those that were asked for
    "attempt": pl.Int64,  # 0: with the seed that was asked for
    "seed": pl.Int64,  # that the image was drawn with
    **JUDGED,
}


class GuardError(ValueError):
    """A guard that does not exist, or cannot protect this model."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a sampler gives."""

    pixels: np.ndarray  # uint8 (N, H, W, 3); black unless the status is "ok"
    status: list[str]  # "ok"; "nan": the model gave no finite numbers; "refused": a copy each time it was drawn
    log: pl.DataFrame  # LOG


class Sampler(Protocol):
    """Prompts and seeds → images. The innermost one takes `adjust` and `guide` of `sampling.sample` too."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], **steering: Any) -> Drawn: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What a guard may have to know."""

    pipeline: Any
    steps: int
    guidance_scale: float
    batch_size: int
    side: int  # pixels of the images
    out: Path | None  # dedup run of what the model was trained on


Wrap = Callable[[Sampler, Setting, float], Sampler]  # the number is the guard's own: see GUARDS


@dataclass(frozen=True, slots=True)
class Guard:
    """A defence, and the number that may follow its name (`copy=3`)."""

    wrap: Wrap
    default: float
    meaning: str
    low: float = 0
    high: float = math.inf
    whole: bool = False


def build_sampler(names: Sequence[str], setting: Setting) -> Sampler:
    """A sampler behind the guards of `names`, which `parse_guards` understands. Raises GuardError, or what OUT says."""
    sampler: Sampler = partial(draw, setting)
    for name, number in parse_guards(names).items():
        sampler = GUARDS[name].wrap(sampler, setting, number)
    return sampler


def parse_guards(names: Sequence[str]) -> dict[str, float]:
    """NAME or NAME=NUMBER each → name and number, in the order of GUARDS. Raises GuardError."""
    chosen: dict[str, float] = {}
    for text in names:
        name, given, number = text.partition("=")
        if name not in GUARDS:
            near = difflib.get_close_matches(name, GUARDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(GUARDS)}"
            raise GuardError(f"unknown guard {name!r}: {hint}")
        if name in chosen:
            raise GuardError(f"guard {name} is given twice")
        guard = GUARDS[name]
        try:
            value = float(number) if given else guard.default
        except ValueError:
            value = math.nan
        if not (guard.low <= value <= guard.high and (not guard.whole or value == int(value))):
            raise GuardError(f"--guard {text}: the number is the {guard.meaning}")
        chosen[name] = value
    if {"static-guidance", "dynamic-guidance"} <= chosen.keys():
        raise GuardError("static-guidance and dynamic-guidance both say when guidance begins: take one of them")
    return {name: chosen[name] for name in GUARDS if name in chosen}


def name_guards(names: Sequence[str]) -> str:
    """How tables call them: "random-tokens=2+copy=3"; "none"."""
    return "+".join(f"{name}={number:g}" for name, number in parse_guards(names).items()) or "none"


def draw(setting: Setting, prompts: Sequence[str], seeds: Sequence[int], **steering: Any) -> Drawn:
    """The sampler without guards."""
    finite = np.ones(len(seeds), bool)

    def watch(step: DenoisingStep) -> None:
        batch = step.latents.isfinite().flatten(1).all(dim=1).cpu().numpy()  # (B,)
        finite[step.first : step.first + len(batch)] &= batch

    pixels = sampling.sample(
        setting.pipeline,
        prompts,
        seeds,
        steps=setting.steps,
        guidance_scale=setting.guidance_scale,
        batch_size=setting.batch_size,
        on_step=watch,
        **steering,
    )
    return Drawn(pixels, ["ok" if good else "nan" for good in finite], pl.DataFrame(schema=LOG))


def optimise_embedding(sampler: Sampler, setting: Setting, number: float) -> Sampler:
    """Move the embedding until the prompt moves the first prediction no more than is usual (Wen et al. 2024, sec. 4.2).

    AdamW on the embedding of each image, at its first step, at most 10 times; the token that begins the text stays.
    Their target is a norm of 3, which means nothing for latents of another size or for a model that predicts something
    else: here it is a percentile of the norms of captions whose picture stands once in OUT. White box: a pipeline of
    Stable Diffusion's class with one text encoder, and OUT. Costs up to 10 evaluations with a gradient.
    """
    _check_steered(setting, "embedding", one_encoder=True)
    captions = list_usual_captions(setting.out, "embedding")
    seeds = [derive_seed("usual", place) for place in range(len(captions))]
    options = {"steps": setting.steps, "batch_size": setting.batch_size}
    norms = measure_prompts(setting.pipeline, captions, seeds, **options)
    return partial(sampler, adjust=partial(lower_magnitude, target=float(np.percentile(norms, number))))


def lower_magnitude(measure: Measure, tokens: Tensor, target: float) -> Tensor:
    """Embeddings (B, L, W) → others, each with a norm of at most `target` if ten steps lead there.

    No weight decay, which would move the first token as well. An image does not depend on the others in its batch.
    """
    found = tokens.detach().clone()
    with torch.enable_grad():
        moving = found.clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([moving], lr=LEARNING_RATE, weight_decay=0.0)
        busy = torch.ones(len(found), dtype=torch.bool, device=found.device)
        for _ in range(ITERATIONS):
            norms = measure(moving)  # (B,)
            busy &= norms.detach() > target
            if not busy.any():
                break
            (gradient,) = torch.autograd.grad(norms.sum(), [moving])
            gradient[:, 0] = 0
            moving.grad = gradient
            optimizer.step()
            found[busy] = moving.detach()[busy]
    return found


def delay_statically(sampler: Sampler, setting: Setting, number: float) -> Sampler:
    """The unconditional prediction down to a timestep, then guidance (Jain et al. 2025, attraction basins).

    Without classifier-free guidance (scale 1) the prompt speaks only after that timestep. White box: Stable Diffusion
    and its XL.
    """
    _check_steered(setting, "static-guidance")
    last = number * setting.pipeline.scheduler.config.num_train_timesteps

    def guide(timestep: int, norms: Tensor) -> Tensor:
        return norms.new_full(norms.shape[1:], 0.0 if timestep > last else setting.guidance_scale)

    return partial(sampler, guide=guide)


def delay_dynamically(sampler: Sampler, setting: Setting, number: float) -> Sampler:
    """Guidance from the first local minimum of the norm on, another scale before (Jain et al. 2025).

    That scale is 0, the unconditional prediction, unless a number says otherwise: their code has 1, and -7.5 for what
    they call opposite guidance. Norms are those of the difference that the prompt makes to what the model predicts,
    because at the first step of a schedule that ends without signal predicted noise is the input, whatever the prompt.
    An image without a minimum is never guided. White box: Stable Diffusion and its XL.
    """
    _check_steered(setting, "dynamic-guidance")
    if number == setting.guidance_scale:
        raise GuardError(f"dynamic-guidance={number:g} is the guidance scale itself, so nothing would change")

    def guide(_: int, norms: Tensor) -> Tensor:
        return torch.where(find_switch(norms), setting.guidance_scale, number)

    return partial(sampler, guide=guide)


def find_switch(norms: Tensor) -> Tensor:
    """Norms (s, B) of the steps so far → bool (B,): whether there has been a local minimum."""
    before, middle, after = norms[:-2], norms[1:-1], norms[2:]
    return ((before > middle) & (after > middle)).any(dim=0)


def perturb(perturbation: Perturbation, name: str, sampler: Sampler, setting: Setting, number: float) -> Sampler:
    """Another prompt for every image (Somepalli et al. 2023b, sec. 5). Black box: whatever takes prompts."""
    if not _takes_prompts(setting.pipeline):
        raise GuardError(f"{name}: {type(setting.pipeline).__name__} takes no prompts that could be changed")

    def guarded(prompts: Sequence[str], seeds: Sequence[int], **steering: Any) -> Drawn:
        changed = list(prompts)
        for place, seed in enumerate(seeds):
            rng = np.random.default_rng([seed, *name.encode()])
            for _ in range(int(number)):
                changed[place] = perturbation(rng, changed[place])
        return sampler(changed, seeds, **steering)

    return guarded


def guard_copies(sampler: Sampler, setting: Setting, number: float) -> Sampler:
    """Compare each image with the training data, and draw a copy again with another seed; refuse what stays one.

    Black box. The log has every comparison.
    """
    if setting.out is None:
        raise GuardError("copy compares images with the training data: it needs the OUT of `unmemorize dedup`")
    return watch_copies(sampler, load_training(setting.out, setting.side), int(number))


def watch_copies(sampler: Sampler, training: Training, attempts: int) -> Sampler:
    """`guard_copies` with what images are compared with, already loaded."""

    def guarded(prompts: Sequence[str], seeds: Sequence[int], **steering: Any) -> Drawn:
        drawn = sampler(prompts, seeds, **steering)
        pixels, status, log = drawn.pixels.copy(), list(drawn.status), [drawn.log]
        now = list(seeds)
        open_ = [place for place in range(len(seeds)) if status[place] == "ok"]
        for attempt in range(attempts + 1):
            if attempt and open_:
                for place in open_:
                    now[place] = derive_seed(seeds[place], attempt)
                again = sampler([prompts[p] for p in open_], [now[p] for p in open_], **steering)
                pixels[open_] = again.pixels
                for place, found in zip(open_, again.status, strict=True):
                    status[place] = found
                log.append(again.log)
                open_ = [place for place in open_ if status[place] == "ok"]
            if not open_:
                break
            judged = training.judge(pixels[open_], [prompts[p] for p in open_])
            told = {"place": open_, "attempt": [attempt] * len(open_), "seed": [now[p] for p in open_]}
            log.append(pl.DataFrame(told).hstack(judged).select(pl.col(name).cast(kind) for name, kind in LOG.items()))
            open_ = [place for place, copy in zip(open_, judged["copy"], strict=True) if copy]
        for place in open_:
            status[place] = "refused"
        pixels[[place for place, what in enumerate(status) if what != "ok"]] = 0
        return Drawn(pixels, status, pl.concat(log))

    return guarded


GUARDS: dict[str, Guard] = {
    "embedding": Guard(
        optimise_embedding, 50, "percentile of usual norms that an embedding is brought to, 0 to 100", high=100
    ),
    "static-guidance": Guard(
        delay_statically, 0.5, "share of the timesteps down to which nothing is guided, 0 to 1", high=1
    ),
    "dynamic-guidance": Guard(delay_dynamically, 0, "guidance scale before the switch", low=-math.inf),
    **{
        name: Guard(partial(perturb, change, name), 1 if name == "random-caption" else 2, "times it is applied", low=1)
        for name, change in PERTURBATIONS.items()
    },
    "copy": Guard(guard_copies, 5, "times that a copy is drawn again before it is refused", whole=True, high=1000),
}


def derive_seed(*parts: object) -> int:
    """0 … 2^63 - 1, from whatever tells one drawing from another."""
    text = json.dumps(parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def list_usual_captions(out: Path | None, guard: str) -> list[str]:
    """Captions of pictures that stand once in OUT, at most REFERENCE, in the random order of their digests."""
    if out is None:
        raise GuardError(
            f"{guard} measures what is usual by captions of the data: it needs the OUT of `unmemorize dedup`"
        )
    once = manifest.read(out, ["caption", "sha256", "keep", "represents"]).filter("keep", represents=1)
    captions = once.sort("sha256")["caption"].drop_nulls().unique(maintain_order=True).head(REFERENCE).to_list()
    if not captions:
        raise GuardError(f"{guard}: {out} has no captioned picture that stands once, so nothing says what is usual")
    return captions


def _takes_prompts(pipeline: Any) -> bool:
    return not is_known(pipeline) or hasattr(pipeline, "tokenizer")


def _check_steered(setting: Setting, guard: str, one_encoder: bool = False) -> None:
    """Raise GuardError unless the guard can act inside this pipeline."""
    pipeline, kind = setting.pipeline, type(setting.pipeline).__name__
    supported = ["StableDiffusionPipeline"] + ([] if one_encoder else ["StableDiffusionXLPipeline"])
    if is_known(pipeline) and not _takes_prompts(pipeline):
        raise GuardError(f"{guard}: {kind} takes no prompts, so nothing is guided by one")
    if not is_known(pipeline) or (one_encoder and hasattr(pipeline, "tokenizer_2")):
        raise GuardError(
            f"{guard} acts inside the denoising, which of a {kind} we do not know: supported are "
            f"{' and '.join(supported)}; {', '.join([*PERTURBATIONS, 'copy'])} take any pipeline"
        )
