"""Odd files become upright 8-bit RGB on white, or an error with a status; limits hold before any pixel."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dedup import frames, images


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def gradient() -> np.ndarray:
    """uint8 (40, 60, 3): red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
    return np.stack([red, green, np.full_like(red, 90)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(gradient: np.ndarray, orientation: int) -> None:
    undo = images.EXIF_TRANSPOSE.get(orientation)
    inverse = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    stored = Image.fromarray(gradient)
    if undo is not None:
        stored = stored.transpose(inverse.get(undo, undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encode(stored, "PNG", exif=exif))
    assert np.array_equal(decoded.pixels, gradient)
    assert (decoded.width, decoded.height) == (60, 40)


def test_transparent_pixels_are_white(gradient: np.ndarray) -> None:
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:20] = 255
    pixels = images.decode(encode(Image.fromarray(np.dstack([gradient, alpha])), "PNG")).pixels
    assert np.array_equal(pixels[:20], gradient[:20])
    assert (pixels[20:] == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    pixels = images.decode(encode(Image.fromarray(values.astype(np.uint16)), "PNG")).pixels
    assert np.abs(pixels[..., 0] - values / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(gradient: np.ndarray, mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = images.decode(encode(Image.fromarray(gradient).convert(mode), kind)).pixels
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8


def test_an_animation_is_more_than_its_first_frame(gradient: np.ndarray) -> None:
    frames = [Image.fromarray(gradient), Image.fromarray(255 - gradient), Image.fromarray(gradient[::-1])]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert images.decode(data).pixels.shape == (40, 60, 3)
    assert images.decode(data, montage=True).pixels.shape == (120, 60, 3)
    with pytest.raises(images.ImageError, match="3 frames, limit 2"):
        images.decode(data, max_frames=2)


def test_a_bomb_is_refused_by_its_header() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(images.ImageError) as caught:
        images.decode(data)
    assert caught.value.status == "too-large"


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_unreadable(data: bytes) -> None:
    with pytest.raises(images.ImageError) as caught:
        images.decode(data)
    assert caught.value.status == "unreadable"


def test_square_pads_with_white_and_never_asks_for_much() -> None:
    strip = np.zeros((50_000, 1, 3), np.uint8)
    assert images.square(strip, 32).shape == (32, 32, 3)
    wide = images.square(np.zeros((20, 40, 3), np.uint8), 32)
    assert (wide[:7] == 255).all()
    assert (wide[9:23] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_luma_of_a_jpeg_is_that_of_its_colours(gradient: np.ndarray, orientation: int, scale: int) -> None:
    picture = Image.fromarray(np.kron(gradient, np.ones((scale, scale, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, "JPEG", quality=95, exif=exif)
    full = images.decode(data)
    luma = images.decode_luma(data, min_side=40)
    assert (luma.width, luma.height) == (full.width, full.height)
    assert min(luma.grey.shape) == 40
    grey = Image.fromarray(full.pixels).convert("L").reduce(scale)
    assert np.abs(luma.grey.astype(int) - np.asarray(grey, int)).max() <= 4


@pytest.mark.parametrize("min_side", [None, 12, 30, 64])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_colours_of_a_jpeg_are_those_of_pillow(min_side: int | None, subsampling: str, progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 133, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(noise), "JPEG", subsampling=subsampling, progressive=progressive, exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        if min_side is not None:
            picture.draft("RGB", (min_side, min_side))
        expected = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    decoded = images.decode(data, min_side=min_side)
    assert (decoded.width, decoded.height, decoded.format) == (61, 133, "JPEG")
    assert (decoded.pixels == expected).all()


def test_a_jpeg_says_whether_it_is_plain(gradient: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    picture, second = Image.fromarray(gradient), Image.fromarray(gradient[::-1])
    assert images._is_plain(encode(picture, "JPEG", comment=b"Exif", progressive=True))
    assert not images._is_plain(encode(picture, "JPEG", exif=exif))
    assert not images._is_plain(encode(picture, "JPEG", icc_profile=b"\0" * 100))
    assert images.decode(encode(picture, "MPO", save_all=True, append_images=[second])).format == "MPO"


def test_what_the_fast_decoder_refuses_goes_the_slow_way(gradient: np.ndarray) -> None:
    for mode in ("CMYK", "L"):
        data = encode(Image.fromarray(gradient).convert(mode), "JPEG")
        luma = images.decode_luma(data, min_side=16)
        assert np.abs(luma.grey.astype(int).mean() - np.asarray(Image.fromarray(gradient).convert("L")).mean()) < 3
    with pytest.raises(images.ImageError, match=r"(?i)truncated"):
        images.decode_luma(encode(Image.fromarray(gradient), "JPEG")[:-300], min_side=16)


def test_a_damaged_later_frame_does_not_spoil_the_first(gradient: np.ndarray) -> None:
    frames = [Image.fromarray(gradient), Image.fromarray(255 - gradient), Image.fromarray(gradient[::-1])]
    whole = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert len(images.decode(whole, montage=True).pixels) == 3 * len(gradient)
    cut = whole[: whole.rindex(b"fdAT") + 8]
    assert 1 <= len(images.decode(cut, montage=True).pixels) / len(gradient) < 3


@pytest.mark.parametrize("head", [b"\0\0\0\x18ftypheic", b"\xff\x0a", b"8BPS"])
def test_formats_without_a_decoder_say_so(head: bytes) -> None:
    with pytest.raises(images.ImageError, match="convert it first") as error:
        images.decode(head + bytes(100))
    assert error.value.status == "unsupported"


def test_a_later_frame_that_is_too_large() -> None:
    """The header says 40 × 30 pixels, the second frame of a GIF 20,000², the second page of a TIFF 12,000²."""
    frames = [Image.new("P", (40, 30), colour) for colour in (1, 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], disposal=2, optimize=False)
    data = bytearray(buffer.getvalue())
    second = data.rindex(b"\x2c\x00\x00\x00\x00")
    data[second + 5 : second + 9] = (20_000).to_bytes(2, "little") * 2
    pages = io.BytesIO()
    large = Image.new("1", (12_000, 12_000))
    Image.new("1", (40, 30)).save(pages, "TIFF", save_all=True, append_images=[large], compression="group4")
    for bomb in (bytes(data), pages.getvalue()):
        assert images.decode(bomb).pixels.shape == (30, 40, 3)
        for read in (images.decode_luma, lambda bomb: images.decode(bomb, montage=True)):
            with pytest.raises(images.ImageError) as error:
                read(bomb)
            assert error.value.status == "too-large"


def test_transparency_of_a_damaged_animation() -> None:
    """Frames out of order: the first one can be read while the others are counted, and not alone."""
    pictures = [Image.new("RGBA", (40, 30), (200, 0, 0, alpha)) for alpha in (100, 200)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG", save_all=True, append_images=pictures[1:])
    data = bytearray(buffer.getvalue())
    start = data.index(b"fdAT")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    data[start + 4 : start + 8] = (99).to_bytes(4, "big")
    data[start + 4 + size : start + 8 + size] = zlib.crc32(data[start : start + 4 + size]).to_bytes(4, "big")
    damaged = images.decode(bytes(data))
    assert frames.read_rest(damaged, bytes(data)) == bytes(data)
    assert len(frames.read_rest(images.decode(buffer.getvalue()), buffer.getvalue())) == 2 * 32
    still = images.Decoded(damaged.pixels, 40, 30, "PNG")
    assert frames.read_rest(still, b"no image") == b"no image"
    assert frames.read_rest(still, encode(pictures[0], "PNG")) == bytes([100]) * 1_200
