"""What a model predicts, as noise, whatever it was trained to predict: for all that looks into a model.

In: a pipeline with a U-Net and a discrete noise schedule (Stable Diffusion 1.x, 2.x, XL, DDPM). Knows nothing of
prompts or pictures.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NOISIEST = 0.00466  # share of signal (ᾱ) at the last timestep of Stable Diffusion 1.4
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DenoiserError(ValueError):
    """A model that cannot be looked into."""


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A U-Net and its noise schedule."""

    unet: Any
    alphas: "Tensor"  # (T,) ᾱ: share of signal in the variance
    prediction_type: str

    @property
    def noisiest(self) -> int:
        """The last timestep with no less signal than Stable Diffusion 1.4 has at its end.

        A schedule of zero terminal SNR ends without any: there the noise is the input, whatever the prompt.
        """
        return int((self.alphas >= NOISIEST).nonzero().max())

    def at(self, share: float) -> int:
        """The timestep at a share of the schedule."""
        return round(share * len(self.alphas))

    def add_noise(self, clean: "Tensor", noise: "Tensor", timestep: "int | Tensor") -> "Tensor":
        """The noisy pictures at a timestep, or one (B,) each; all of shape (B, C, h, w)."""
        alpha = self.alphas[timestep].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def predict(self, x: "Tensor", timestep: "int | Tensor", told: dict[str, Any]) -> "Tensor":
        """Noisy (B, C, h, w), what the U-Net is told beside it → predicted noise (B, C, h, w)."""
        out = self.unet(x, timestep, **told, return_dict=False)[0]
        alpha = self.alphas[timestep].reshape(-1, 1, 1, 1)
        if self.prediction_type == "v_prediction":  # Salimans & Ho 2022, appendix D
            return alpha.sqrt() * out + (1 - alpha).sqrt() * x
        return (x - alpha.sqrt() * out) / (1 - alpha).sqrt() if self.prediction_type == "sample" else out


def open_denoiser(pipeline: Any) -> Denoiser:
    """The denoiser of a pipeline. Raises DenoiserError, which says what is missing."""
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    config = getattr(unet, "config", None)
    problems = {
        "no U-Net": config is None,
        "a scheduler without a discrete noise schedule": not hasattr(scheduler, "alphas_cumprod"),
        "a U-Net that takes more than noise": config is not None and config.in_channels != config.out_channels,
        f"a scheduler that predicts {prediction!r}": prediction not in PREDICTIONS,
    }
    if found := [problem for problem, there in problems.items() if there]:
        what = f"{type(pipeline).__name__} has {found[0]}"
        raise DenoiserError(f"{what}: only U-Nets that predict noise, v or the image can be looked into")
    assert unet is not None  # the problems
    assert scheduler is not None
    assert prediction is not None
    return Denoiser(unet, scheduler.alphas_cumprod.to(unet.device), prediction)
