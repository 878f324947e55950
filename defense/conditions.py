"""Captions → what a U-Net is told beside the noisy picture, as the pipeline of its class does it.

In: a Stable Diffusion 1.x, 2.x or XL pipeline, or one that takes no captions. Out: tensors on the CPU, one row a
caption, computed once. Knows nothing of datasets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

CHUNK = 64  # captions at a time through a text encoder; fixed, so that results are too


@dataclass(frozen=True, slots=True)
class Conditions:
    """Row 0 says nothing (what classifier-free guidance leads away from). None is what the U-Net is not told."""

    tokens: Tensor | None = None  # (D, L, W) float32
    pooled: Tensor | None = None  # (D, P) float32
    time_ids: Tensor | None = None  # (6,): height and width of the original, top and left of the crop, its size

    def pick(self, rows: Tensor) -> "Conditions":
        """Those of the rows (B,) int64, in this order."""
        return self._map(lambda tensor: tensor[rows])

    def put(self, places: Tensor, others: "Conditions") -> "Conditions":
        """With rows 1 … of `others`, what `embed_captions` says of texts, at the places (B,) bool."""
        tokens, pooled = (
            mine if mine is None or new is None else mine.masked_scatter(_widen(places, mine), new[1:])
            for mine, new in ((self.tokens, others.tokens), (self.pooled, others.pooled))
        )
        return Conditions(tokens, pooled, self.time_ids)

    def add_noise(self, places: Tensor, scale: float, generator: torch.Generator) -> "Conditions":
        """With `scale` · N(0, 1) on every number at the places (B,) bool."""
        return self._map(lambda x: x + scale * torch.randn(x.shape, generator=generator) * _widen(places, x))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditions":
        tokens, pooled = (None if x is None else change(x) for x in (self.tokens, self.pooled))
        return Conditions(tokens, pooled, self.time_ids)

    def select(self, rows: Tensor, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the U-Net for the rows (B,) int64."""
        if self.tokens is None:
            return {}
        arguments: dict[str, Any] = {"encoder_hidden_states": self.tokens[rows].to(device)}  # (B, L, W)
        if self.pooled is not None and self.time_ids is not None:
            sizes = self.time_ids.expand(len(rows), -1)  # (B, 6)
            told = {"text_embeds": self.pooled[rows], "time_ids": sizes}
            arguments["added_cond_kwargs"] = {name: tensor.to(device) for name, tensor in told.items()}
        return arguments


Embed = Callable[[Sequence[str]], Conditions]  # texts → conditions, row i + 1 for text i


def _widen(places: Tensor, tensor: Tensor) -> Tensor:
    """(B,) → (B, 1, …), to lie on the tensor."""
    return places.view(-1, *[1] * (tensor.dim() - 1))


@torch.no_grad()
def embed_captions(pipeline: DiffusionPipeline, captions: Sequence[str]) -> Conditions:
    """Row i + 1 for captions[i], padded or cut to the tokens of the tokenizer."""
    if not hasattr(pipeline, "tokenizer"):
        return Conditions()
    texts = ["", *captions]
    if hasattr(pipeline, "tokenizer_2"):
        return _embed_twice(pipeline, texts)
    chunks = _encode(pipeline.tokenizer, pipeline.text_encoder, texts)
    return Conditions(torch.cat([chunk[0].cpu() for chunk in chunks]))


def _embed_twice(pipeline: DiffusionPipeline, texts: Sequence[str]) -> Conditions:
    """Stable Diffusion XL (Podell et al. 2023, sec. 2.1): two encoders side by side, and what the second sums up."""
    pairs = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    tokens, pooled = [], []
    for tokenizer, encoder in (pair for pair in pairs if pair[1] is not None):
        chunks = [(c.hidden_states[-2].cpu(), c[0].cpu()) for c in _encode(tokenizer, encoder, texts)]
        tokens.append(torch.cat([hidden for hidden, _ in chunks]))  # (D, L, W of this encoder)
        pooled.append(torch.cat([summary for _, summary in chunks]))
    joined, summary = torch.cat(tokens, dim=-1), pooled[-1]
    if pipeline.config.force_zeros_for_empty_prompt:
        joined[0], summary[0] = 0, 0
    # Every picture is trained at the size at which it is drawn, and said to have come so.
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return Conditions(joined, summary, torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32))


def _encode(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> Iterator[Any]:
    """What a text encoder says of one chunk of texts after the other."""
    attended = getattr(encoder.config, "use_attention_mask", False)
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        tokens = tokenizer(chunk, padding="max_length", truncation=True, return_tensors="pt").to(encoder.device)
        mask = tokens.attention_mask if attended else None
        yield encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True)
