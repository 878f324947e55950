"""DP-SGD (Abadi et al. 2016) with Opacus: the gradient step, the accountant, and what the guarantee says of copies.

In: a U-Net whose gradients of single images are clipped and blurred, and the numbers that decide ε. The accountant is
Opacus's, by privacy loss distributions (Gopi et al. 2021); it composes Poisson-subsampled Gaussian steps, so rows must
be drawn by `data.draw_poisson`. Knows nothing of data.
"""

import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from defense.data import derive_seed

ACCOUNTANT = "prv"
NOT_COVERED = (
    "the weights are covered, intermediate ones too; train.jsonl (losses) and exposures.parquet are not",
    "sampling and noise follow from the seed: publish neither it nor config.json",
    "noise is drawn in floating point by torch's generator, which is no cryptographic one (Mironov 2012)",
    "what deduplication chose is taken as given",
)


class PrivacyError(ValueError):
    """DP-SGD that cannot be done, or would not be what it says."""


class PrivateGradient:
    """Gradients of single images, each the mean over `multiplicity` draws (Dockhorn et al. 2023, DPDM, sec. 3.2), are
    clipped to an ℓ2 norm of max_grad_norm and added up, with noise of noise_multiplier · max_grad_norm on the sum.

    The sum is divided by the expected number of images, for theirs is not public.
    """

    def __init__(
        self,
        unet: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        batch_size: int,
        multiplicity: int,
    ) -> None:
        self.unet, self.batch_size, self.multiplicity = unet, batch_size, multiplicity
        # Opacus hangs its tensors on the parameters themselves.
        self.names: dict[Any, str] = {weight: name for name, weight in unet.named_parameters() if weight.requires_grad}
        self.checked = False
        device = next(iter(self.names)).device
        try:
            self.hooks = GradSampleHooks(unet, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            raise PrivacyError(f"DP-SGD: a layer has no gradients of single images ({error})") from error
        # Opacus 1.6 reads the memory of what goes into a convolution as if it were in the usual order, and what an
        # attention layer gives is not.
        convolutions = (layer for layer in unet.modules() if isinstance(layer, nn.Conv2d))
        self.handles = [layer.register_forward_pre_hook(_put_in_order) for layer in convolutions]
        self.optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=batch_size,
            generator=torch.Generator(device),
        )

    def add(self, errors: Tensor) -> None:
        """Clip and add up the gradients of errors (B,), those of one image side by side."""
        with warnings.catch_warnings():
            # Full backward hooks of layers whose input needs no gradient, such as the first.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            errors.sum().backward()
        if not self.checked:
            self._check()
        for weight in self.names:
            weight.grad = None
            weight.grad_sample = weight.grad_sample.unflatten(0, (-1, self.multiplicity)).mean(dim=1)
        self.optimizer.clip_and_accumulate()
        for weight in self.names:
            weight.grad_sample = None

    def _check(self) -> None:
        """Gradients of single images must add up to that of all, which autograd computes anyway.

        Hooks that are not there, or that take a layer for another, give gradients that are wrong in silence.
        """
        whole = torch.stack([weight.grad.norm() for weight in self.names]).norm()
        for weight, name in self.names.items():
            if weight.grad_sample is None:
                raise PrivacyError(f"DP-SGD: {name} has no gradients of single images, so it cannot be trained")
            off = (weight.grad_sample.sum(dim=0) - weight.grad).norm()
            if off > 1e-3 * weight.grad.norm() + 1e-5 * whole:
                raise PrivacyError(
                    f"DP-SGD: gradients of single images do not add up in {name}, so it cannot be trained"
                )
        self.checked = True

    def finish(self, seed: int, step: int) -> None:
        """Fill `.grad` with the blurred mean. A batch without images is noise, too: that nothing came is private."""
        self.optimizer.generator.manual_seed(derive_seed(seed, 6, step))
        for weight in self.names:
            if weight.summed_grad is None:
                weight.summed_grad = torch.zeros_like(weight.detach())
        self.optimizer.add_noise()
        for weight in self.names:
            weight.grad /= self.batch_size
            weight.summed_grad = None

    def close(self) -> None:
        """Leave the U-Net as it was."""
        self.hooks.cleanup()
        for handle in self.handles:
            handle.remove()
        for weight in self.names:
            del weight.summed_grad


def _put_in_order(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)


def assert_changed(before: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
    """After a step of noise every tensor is another, or what is trained is not what is stepped (opacus #820)."""
    if stuck := [name for name, tensor in before.items() if torch.equal(weights[name].detach(), tensor)]:
        raise PrivacyError(f"DP-SGD: {len(stuck)} of {len(weights)} weights do not train, such as {stuck[0]}")


def find_noise_multiplier(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise that spends at most ε, as Opacus finds it. Raises PrivacyError."""
    try:
        return get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=sampling_rate, steps=steps, accountant=ACCOUNTANT
        )
    except ValueError as error:
        raise PrivacyError(f"dp_epsilon = {epsilon}: {error}") from error


def spend(noise_multiplier: float, delta: float, sampling_rate: float, steps: int) -> float:
    """ε after so many steps, an upper bound by Opacus's accountant."""
    accountant = create_accountant(ACCOUNTANT)
    accountant.history = [(noise_multiplier, sampling_rate, steps)]
    return float(accountant.get_epsilon(delta))


def protect_group(epsilon: float, delta: float, copies: int) -> dict[str, Any]:
    """What (ε, δ) for one row means for a picture that stands in `copies` rows: mε, and m · e^((m-1)ε) · δ.

    Group privacy (Dwork & Roth 2014, theorem 2.2; δ by Vadhan 2017, lemma 2.2). From δ = 1 on it says nothing.
    """
    exponent = math.log(copies) + (copies - 1) * epsilon + math.log(delta)
    group_delta = copies * math.exp((copies - 1) * epsilon) * delta if exponent < 0 else 1.0
    guarantee = group_delta < 1
    return {
        "copies": copies,
        "epsilon": copies * epsilon if guarantee else None,
        "delta": group_delta if guarantee else None,
        "guarantee": "differential privacy" if guarantee else "no guarantee",
    }


def describe(
    *,
    noise_multiplier: float,
    delta: float,
    rows: int,
    batch_size: int,
    steps: int,
    max_grad_norm: float,
    multiplicity: int,
    copies: Mapping[int, int],
) -> dict[str, Any]:
    """privacy.json: what was spent on what, and what it says of pictures that stand in several rows.

    copies: number of clusters of m rows, by m.
    """
    epsilon = spend(noise_multiplier, delta, batch_size / rows, steps)
    return {
        "epsilon": epsilon,
        "delta": delta,
        "unit": "one row: an image with its captions, added or taken away",
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": max_grad_norm,
        "noise_multiplicity": multiplicity,
        "sampling": "Poisson",
        "sampling_rate": batch_size / rows,
        "rows": rows,
        "expected_batch_size": batch_size,
        "steps": steps,
        "accountant": f"{ACCOUNTANT}, opacus {version('opacus')}",
        "groups": [protect_group(epsilon, delta, m) | {"clusters": copies[m]} for m in sorted(copies)],
        "groups_count": "copies that deduplication has found; those that it missed are in no group",
        "not_covered": list(NOT_COVERED),
    }
