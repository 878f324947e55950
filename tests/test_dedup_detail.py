"""Effective size: an enlarged copy counts as large as its original, a shrunken one never more."""

import io

import cv2
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dedup import detail

ENLARGING = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]


def photograph(seed: int, side: int = 256) -> Image.Image:
    """Coloured noise with the spectrum of photographs: amplitude 1/f (Field 1987), detail up to the last frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    channels = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) / frequency) for _ in range(3)]
    pixels = np.stack(channels, axis=2)
    return Image.fromarray(np.clip(128 + 45 * pixels / pixels.std(), 0, 255).astype(np.uint8))


def drawing(seed: int, side: int = 256) -> Image.Image:
    """Circles with soft edges, flat inside."""
    rng = np.random.default_rng(seed)
    canvas = np.full((side, side, 3), 255, np.uint8)
    for _ in range(12):
        centre, colour = rng.integers(0, side, 2).tolist(), rng.integers(0, 256, 3).tolist()
        cv2.circle(canvas, centre, int(rng.integers(10, side // 3)), colour, -1, cv2.LINE_AA)
    return Image.fromarray(canvas)


def scaled(picture: Image.Image, scale: float, kernel: Image.Resampling) -> Image.Image:
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), kernel)


def saved(picture: Image.Image, quality: int | None) -> Image.Image:
    if quality is None:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def first_holds_more(larger: Image.Image, smaller: Image.Image) -> bool:
    spectra = [detail.power_spectrum(np.asarray(picture)) for picture in (larger, smaller)]
    return detail.holds_more(*spectra, smaller.width / larger.width)


@pytest.mark.parametrize("draw", [photograph, drawing])
@pytest.mark.parametrize("quality", [None, 90, 75])
@pytest.mark.parametrize("kernel", ENLARGING)
def test_enlarging_adds_no_detail(draw, quality: int | None, kernel: Image.Resampling) -> None:  # type: ignore[no-untyped-def]
    original = draw(1)
    for scale in (1.5, 2, 3):
        assert not first_holds_more(saved(scaled(original, scale, kernel), quality), original), scale


@pytest.mark.parametrize("draw", [photograph, drawing])
@pytest.mark.parametrize("quality", [None, 90, 75])
@pytest.mark.parametrize("kernel", ENLARGING)
def test_shrinking_loses_detail(draw, quality: int | None, kernel: Image.Resampling) -> None:  # type: ignore[no-untyped-def]
    for original in (draw(2), saved(draw(2), 75)):
        for scale in (0.75, 0.5):
            assert first_holds_more(original, saved(scaled(original, scale, kernel), quality)), scale


def test_power_spectrum_is_parseval_and_upright() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 1), dtype=np.uint8).repeat(3, axis=2)
    power = detail.power_spectrum(noise)
    assert power.shape == (detail.SEGMENT // 2 + 1,)
    np.testing.assert_allclose(power[2:-1].mean(), noise.var(), rtol=0.05)  # white: equal power everywhere
    np.testing.assert_allclose(power, detail.power_spectrum(noise.transpose(1, 0, 2)), rtol=1e-5)  # either way up


@given(st.integers(1, 200), st.integers(1, 200))
def test_any_size_has_a_spectrum(height: int, width: int) -> None:
    power = detail.power_spectrum(np.zeros((height, width, 3), np.uint8))
    np.testing.assert_allclose(power, detail.FLOOR, rtol=1e-5)


def table(sizes: list[tuple[int, int]], pairs: list[tuple[int, int, str]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = pl.DataFrame(sizes, schema={"width": pl.Int32, "height": pl.Int32}, orient="row")
    rows = rows.with_columns(id=pl.int_range(pl.len(), dtype=pl.Int64), picture=pl.int_range(pl.len(), dtype=pl.UInt32))
    return rows, pl.DataFrame(pairs, schema={"a": pl.Int64, "b": pl.Int64, "class": pl.String}, orient="row")


def test_only_copies_of_clearly_different_size_are_judged() -> None:
    rows, pairs = table(
        [(400, 300), (200, 150), (300, 400), (390, 300), (100, 75)],
        [(0, 1, "copy"), (0, 2, "copy"), (0, 3, "copy"), (1, 4, "look-alike"), (1, 2, "copy")],
    )
    assert detail.size_pairs(rows, pairs).select("larger", "smaller", "ratio").rows() == [(0, 1, 0.5), (2, 1, 0.5)]


def test_a_chain_of_enlargements_ends_at_its_origin() -> None:
    origin = photograph(3, 128)
    pictures = [scaled(origin, scale, Image.Resampling.BICUBIC) for scale in (4, 1, 2)] + [
        scaled(photograph(3, 256), 1, Image.Resampling.BOX)
    ]
    rows, pairs = table([p.size for p in pictures], [(0, 2, "copy"), (1, 2, "copy")])
    spectra = {i: detail.power_spectrum(np.asarray(p)) for i, p in enumerate(pictures)}
    held = detail.effective_pixels(rows, detail.size_pairs(rows, pairs), spectra)
    assert held.to_list() == [128 * 128, 128 * 128, 128 * 128, 256 * 256]
