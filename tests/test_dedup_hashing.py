"""Fingerprints against the packages they must equal: imagehash and pdqhash."""

import io

import imagehash
import numpy as np
import pdqhash
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dedup import fingerprint, hashing, images
from dedup.verify import orient


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Noise at several scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
    return (total * (255 / total.max())).astype(np.uint8)


def pdq_of(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    codes, quality = hashing.pdq(hashing.pdq_luma(grey, *grey.shape)[None])
    return codes[0], int(quality[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 300), st.integers(20, 300))
def test_phash_and_dhash_equal_imagehash(seed: int, height: int, width: int) -> None:
    image = Image.fromarray(picture(seed, height, width))
    small, wide = hashing.grey_thumbnails(np.asarray(image.convert("L")))
    assert hashing.to_hex(hashing.phash(small[None])) == [str(imagehash.phash(image))]
    assert hashing.to_hex(hashing.dhash(wide[None])) == [str(imagehash.dhash(image))]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(64, 400), st.integers(64, 400))
def test_pdq_is_that_of_the_reference(seed: int, height: int, width: int) -> None:
    image = picture(seed, height, width)
    codes, quality = pdq_of(image)
    reference, reference_quality = pdqhash.compute(image)
    # ours takes luma in whole grey levels
    assert (np.unpackbits(codes[0]) != np.asarray(reference)).sum() <= 6
    assert abs(quality - reference_quality) <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(128, 1_500), st.integers(128, 1_500), st.sampled_from(["JPEG", "PNG"]))
def test_shrinking_first_moves_few_bits(seed: int, height: int, width: int, kind: str) -> None:
    """What dedup hashes by default, against the reference on all pixels."""
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(buffer, kind, compress_level=1)
    luma = images.decode_luma(buffer.getvalue(), min_side=fingerprint.JPEG_SIDE)
    grey = hashing.reduce(luma.grey, hashing.PDQ_SOURCE)
    codes, _ = hashing.pdq(hashing.pdq_luma(grey, height, width)[None])
    reference, quality = pdqhash.compute(images.decode(buffer.getvalue()).pixels)
    assert quality < 80 or (np.unpackbits(codes[0, 0]) != np.asarray(reference)).sum() <= 10


@pytest.mark.parametrize("number", range(8))
def test_the_eight_codes_are_those_of_the_turned_picture(number: int) -> None:
    image = picture(3, 64, 64)  # the luma buffer is the picture itself, so that turning it is exact
    turned = np.ascontiguousarray(orient(image[None], number)[0])
    distance = (np.unpackbits(pdq_of(image)[0][number]) != np.unpackbits(pdq_of(turned)[0][0])).sum()
    assert distance <= 2
