"""No picture goes for another that only three frames, or the upper 8 bits, show as equal; re-encoded ones still do."""

import io
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from PIL import Image
from test_dedup_features import photograph

from dedup import frames, hashing, images, manifest, verify
from dedup.options import Options
from dedup.pipeline import deduplicate


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animate(pictures: list[np.ndarray], kind: str, **options: object) -> bytes:
    first, *others = (Image.fromarray(pixels) for pixels in pictures)
    return encode(first, kind, save_all=True, append_images=others, **options)


def moving(count: int = 9) -> list[np.ndarray]:
    """A bright square wanders over a photograph: uint8 (120, 160), greys, which a GIF holds without loss."""
    pictures = []
    for number in range(count):
        pixels = photograph(5, 160, 120)[..., 1].copy()
        pixels[30:60, 12 * number : 12 * number + 30] = 250
        pictures.append(pixels)
    return pictures


def changed() -> list[np.ndarray]:
    """Other in its third frame alone, which no montage of nine frames shows."""
    pictures = moving()
    pictures[2] = photograph(8, 160, 120)[..., 1]
    return pictures


def encode_deep(values: np.ndarray, kind: str) -> bytes:
    return cv2.imencode(kind, values[..., ::-1] if values.ndim == 3 else values)[1].tobytes()


def deep(colours: bool = False) -> np.ndarray:
    """uint16 over the whole scale."""
    values = photograph(6, 160, 120).astype(np.uint16) * 257
    return values if colours else values[..., 1]


def hidden(seed: int) -> np.ndarray:
    """uint16 (240, 320): something that 8 bits show, and in the dark half of it what they do not."""
    values = photograph(1)[..., 1].astype(np.uint16) * 257
    values[:, 160:] = photograph(seed)[:, 160:, 1] // 3
    return values


def digest(data: bytes) -> str:
    decoded = images.decode(data, montage=True)
    return hashing.pixel_digest(decoded.pixels, frames.read_rest(decoded, data))


def is_same(a: bytes, b: bytes) -> bool:
    x, y = (images.decode(data, montage=True) for data in (a, b))
    assert verify.is_same_picture(x, y) == verify.is_same_picture(y, x)
    return verify.is_same_picture(x, y)


ENCODINGS = [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("WEBP", {"quality": 90}), ("GIF", {})]


@pytest.mark.parametrize(("kind", "options"), ENCODINGS)
def test_all_frames_of_an_animation_count(kind: str, options: dict) -> None:
    data = animate(moving(), kind, **options)
    one, same = animate(moving(), "PNG"), "quality" not in options
    assert (digest(data) == digest(one)) == same
    assert is_same(data, one)
    other = animate(changed(), kind, **options)
    assert digest(other) not in (digest(one), digest(data))
    assert not is_same(other, one)


def test_another_number_of_frames_is_another_picture() -> None:
    still, animation = encode(Image.fromarray(moving()[0]), "PNG"), animate(moving(), "PNG")
    assert not verify.is_same_picture(images.decode(still), images.decode(animation, montage=True))
    with pytest.raises(images.ImageError, match="more frames"):
        list(frames.pair_frames(images.decode(animation), images.decode(still)))


def test_what_cannot_be_read_to_its_end_equals_its_own_bytes_only() -> None:
    whole = animate(moving(), "PNG")
    cut = whole[: whole.rindex(b"fdAT") + 8]
    assert frames.read_rest(images.decode(cut, montage=True), cut) == cut
    assert not is_same(cut, whole)


@pytest.mark.parametrize(
    ("kind", "colours"),
    [(".png", False), (".png", True), (".tiff", False), (".tiff", True), (".pgm", False), (".ppm", True)],
)
def test_values_of_16_bits(kind: str, colours: bool) -> None:
    """One step of 65,535 is a difference to the digest, which only equal values pass, and none to the eye."""
    values = deep(colours)
    data, near = encode_deep(values, kind), values.copy()
    near[20:30, 20:30] ^= 1
    again, other = encode_deep(values, ".tiff" if kind == ".png" else ".png"), encode_deep(near, ".png")
    assert digest(data) == digest(again) != digest(other)
    assert np.array_equal(*(images.decode(each).pixels for each in (again, other)))
    assert is_same(data, again)
    assert is_same(data, other)
    eight = encode(Image.fromarray((values // 257).astype(np.uint8)), "PNG")
    assert digest(eight) != digest(data)
    assert is_same(data, eight)


def test_what_8_bits_do_not_show_is_looked_at() -> None:
    first, second = (encode_deep(hidden(seed), ".png") for seed in (2, 3))
    assert np.abs(images.decode(first).pixels.astype(int) - images.decode(second).pixels).max() <= 1
    assert is_same(first, encode_deep(hidden(2), ".tiff"))
    assert not is_same(first, second)
    eight = encode(Image.fromarray(images.decode(first).pixels), "PNG")
    assert not is_same(first, eight)


def test_pages_of_16_bits() -> None:
    def pages(*seeds: int) -> bytes:
        first, *others = (Image.fromarray(hidden(seed)) for seed in seeds)
        return encode(first, "TIFF", save_all=True, append_images=others)

    assert digest(pages(2, 3, 4, 5)) == digest(pages(2, 3, 4, 5)) != digest(pages(2, 4, 3, 5))
    assert is_same(pages(2, 3, 4, 5), pages(2, 3, 4, 5))
    assert not is_same(pages(2, 3, 4, 5), pages(2, 6, 4, 5))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_values_are_turned_as_pixels_are(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = images.decode(encode(Image.fromarray(deep()), "PNG", exif=exif))
    assert decoded.file is not None
    (frame,) = frames.read_frames(decoded.file)
    assert np.abs(frame.values / 257 - decoded.pixels[..., 0]).max() <= 1


@pytest.mark.parametrize("level", ["exact", "hash", "copy"])
def test_a_different_picture_is_never_dropped(tmp_path: Path, level: str) -> None:
    files = {
        "a.png": animate(moving(), "PNG"),
        "a-again.webp": animate(moving(), "WEBP", lossless=True),
        "a-changed.png": animate(changed(), "PNG"),
        "a-still.png": encode(Image.fromarray(moving()[0]), "PNG"),
        "d.png": encode_deep(hidden(2), ".png"),
        "d-again.tiff": encode_deep(hidden(2), ".tiff"),
        "d-changed.png": encode_deep(hidden(3), ".png"),
        "c.png": encode_deep(deep(colours=True), ".png"),
        "c-again.tiff": encode_deep(deep(colours=True), ".tiff"),
    }
    src = tmp_path / "src"
    src.mkdir()
    for name, data in files.items():
        (src / name).write_bytes(data)
    deduplicate(src, tmp_path / "out", Options(level=level), jobs=1)
    rows = manifest.read(tmp_path / "out")
    key = rows["key"]
    dropped = rows.filter(pl.col("kept_id").is_not_null())
    merged = {frozenset((name, key[kept])) for name, kept in dropped.select("key", "kept_id").iter_rows()}
    again = [("a.png", "a-again.webp"), ("d.png", "d-again.tiff"), ("c.png", "c-again.tiff")]
    assert merged == (set() if level == "exact" else set(map(frozenset, again)))
    if level != "exact":
        pairs = pl.read_parquet(tmp_path / "out" / "pairs.parquet")
        kind = {frozenset((key[a], key[b])): c for a, b, c in pairs.select("a", "b", "class").iter_rows()}
        signal = {frozenset((key[a], key[b])): s for a, b, s in pairs.select("a", "b", "signal").iter_rows()}
        assert {signal[frozenset(pair)] for pair in again} == {"pixels"}
        assert {kind.get(frozenset(pair)) for pair in [("a.png", "a-changed.png"), ("d.png", "d-changed.png")]} <= {
            "look-alike",
            "same-scene",
            None,
        }
