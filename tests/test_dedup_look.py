"""Rows are read again as they were hashed, or not at all."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dedup import detail, hashing, images, look, sources
from dedup.fingerprint import DecodeOptions


@pytest.fixture
def row(tmp_path: Path) -> tuple:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((96, 64), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    return (None, 0, len(buffer.getvalue()), "a.png", hashing.digest(buffer.getvalue()))


def test_what_is_read_again(tmp_path: Path, row: tuple) -> None:
    pixels = images.decode((tmp_path / "a.png").read_bytes()).pixels
    assert look.digest_pixels(tmp_path, [row], DecodeOptions()) == [hashing.pixel_digest(pixels)]
    spectra = list(map(look.read_spectrum, look.measure_detail(tmp_path, [row, row], DecodeOptions())))
    np.testing.assert_array_equal(spectra, [detail.power_spectrum(pixels)] * 2)
    look.make_thumbnails(tmp_path, [row] * 3, tmp_path / "0.npy", DecodeOptions())
    thumbnails = look.Thumbnails(np.array([4, 5, 9]), [tmp_path / "0.npy"], 3)
    np.testing.assert_array_equal(thumbnails[np.array([9, 4])], [images.shrink(pixels, look.THUMBNAIL)] * 2)


def test_a_mirrored_picture_holds_up_when_it_is_turned_back(tmp_path: Path, row: tuple) -> None:
    buffer = io.BytesIO()
    mirrored = Image.open(tmp_path / "a.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(buffer, "PNG")
    (tmp_path / "m.png").write_bytes(buffer.getvalue())
    other = (None, 0, len(buffer.getvalue()), "m.png", hashing.digest(buffer.getvalue()))
    pairs = [(row, other, 4), (row, other, 0), (row, row, 0)]
    assert look.confirm_pairs(tmp_path, pairs, DecodeOptions()) == [True, False, True]


def test_a_file_that_has_changed_is_an_error(tmp_path: Path, row: tuple) -> None:
    for function in (look.digest_pixels, look.measure_detail):
        with pytest.raises(sources.SourceError, match=r"a\.png has changed"):
            function(tmp_path, [(*row[:4], "0" * 64)], DecodeOptions())
