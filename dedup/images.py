"""Bytes → pixels. Every image of the project passes through `decode`, or for hashing through `decode_luma`.

In: the bytes of one file, untrusted. Out: upright 8-bit RGB on white, or its luma, or an `ImageError` with a status of
the manifest. Size and frame limits are checked on the header, before any pixel is decoded. DICOM goes to `dicom.py`.
Knows nothing of hashes or training.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from dedup import dicom

MAX_PIXELS = 100_000_000
MAX_FRAMES = 1_000
MAX_SIDE = 65_535  # of a JPEG by its format; longer strips are no pictures and cost memory out of proportion
# Formats with a decoder in Pillow itself. EPS, for one, would start an outside program on untrusted bytes. TGA has no
# signature, so it is tried last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "TGA")
# What people have beside those: (offset, signature) → name.
UNSUPPORTED = {
    (4, b"ftyphei"): "HEIC",
    (4, b"ftypmif1"): "HEIF",
    (0, b"\xff\x0a"): "JPEG XL",
    (4, b"JXL "): "JPEG XL",
    (0, b"8BPS"): "Photoshop",
}
DICOM = "DICOM"  # as the format of a picture
cv2.setNumThreads(1)  # pictures are many and small: several processes with several threads each are slower
warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of a damaged file becomes its status
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"),
        *("ppm", "pgm", "pbm", "pnm", "tga", "jp2", "j2k", "ico", "mpo"),
        *("dcm", "dicom"),
        *("heic", "heif", "jxl", "psd"),  # rows that say `unsupported`
    )
)

# EXIF orientation → what makes the picture upright (EXIF 2.3, tag 0x0112).
EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PLAIN = frozenset((0xDB, 0xDD, 0xE0, 0xFE, *range(0xC0, 0xD0)))  # tables, frame, JFIF, comment (JPEG, table B.1)
SWAPS_SIDES = (5, 6, 7, 8)


class ImageError(ValueError):
    """An image that cannot be used; `status` is one of `manifest.STATUS`."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(status, message)  # both, so that it survives the way back from a worker
        self.status, self.message = status, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class File:
    """A picture that holds more than its `pixels` show, and the limits under which it was decoded: see `frames.py`."""

    data: bytes
    max_pixels: int
    max_frames: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """`pixels`: uint8 (H, W, 3), upright, on white. `width`, `height`: of the original, upright.

    `file`: of animations and of what has more than 8 bits, else None.
    """

    pixels: np.ndarray
    width: int
    height: int
    format: str
    file: File | None = None


def decode(
    data: bytes,
    *,
    min_side: int | None = None,
    montage: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_frames: int = MAX_FRAMES,
) -> Decoded:
    """Decode one image.

    min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 scale (in the DCT, cheap) as long as both sides stay at
        least this long; None = full size.
    montage: stack first, middle and last frame of an animation, so that animations with one frame in common
        differ; else the first frame.
    Raises ImageError.
    """
    if not data:
        raise ImageError("unreadable", "zero bytes")
    Image.MAX_IMAGE_PIXELS = None  # of the first frame we say ourselves what is too large
    try:
        if dicom.is_dicom(data):
            frames = dicom.decode(data, montage=montage, max_pixels=max_pixels, max_frames=max_frames)
            file = File(data, max_pixels, max_frames)
            return Decoded(stack(frames), frames[0].shape[1], frames[0].shape[0], DICOM, file)
        plain = _decode_jpeg(data, "RGB", min_side, max_pixels)
        if plain is not None:
            return plain
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _decode_open(image, min_side, montage, File(data, max_pixels, max_frames))
    except ImageError:
        raise
    except dicom.DicomError as error:
        raise ImageError(error.status, str(error)) from error
    except Image.UnidentifiedImageError as error:
        for (offset, signature), name in UNSUPPORTED.items():
            if data.startswith(signature, offset):
                raise ImageError("unsupported", f"{name} is not read: convert it first") from error
        raise ImageError("unreadable", f"not an image ({data[:8]!r}…)") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", f"a later frame has more than {2 * max_pixels:,} pixels") from error
    except MemoryError as error:
        raise ImageError("too-large", "out of memory while decoding") from error
    except Exception as error:  # decoders of untrusted bytes raise nearly every exception there is
        raise ImageError("unreadable", f"{type(error).__name__}: {error}"[:200]) from error


@dataclass(frozen=True, slots=True)
class Luma:
    """`grey`: uint8 (H, W), upright, animations as a montage. `width`, `height`: of the original, upright."""

    grey: np.ndarray
    width: int
    height: int
    format: str


def decode_luma(
    data: bytes, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES
) -> Luma:
    """Decode what hashes see.

    A JPEG stores its luma by itself, so that colours need not be decoded, and may be decoded at 1/2, 1/4 or 1/8 scale
    as long as both sides stay at least `min_side`; None = all pixels, by way of RGB. Raises ImageError.
    """
    plain = None if min_side is None else _decode_jpeg(data, "GRAY", min_side, max_pixels)
    if plain is not None:
        return Luma(plain.pixels[:, :, 0], plain.width, plain.height, "JPEG")
    decoded = decode(data, montage=True, max_pixels=max_pixels, max_frames=max_frames)
    grey = np.asarray(Image.fromarray(decoded.pixels).convert("L"))
    return Luma(grey, decoded.width, decoded.height, decoded.format)


def _decode_jpeg(data: bytes, colours: str, min_side: int | None, max_pixels: int) -> Decoded | None:
    """By libjpeg-turbo, `pixels` (H, W, 1) for colours "GRAY" or (H, W, 3) for "RGB": as Pillow, in half the time.

    None for all that Pillow should judge: other formats and colour spaces, limits, damage.
    """
    if not data.startswith(b"\xff\xd8\xff") or dicom.is_dicom(data):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        kind, orientation = "JPEG", 1
        if not _is_plain(data):
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
                kind, orientation = header.format or "", exif_orientation(header) if "exif" in header.info else 1
        if width * height > max_pixels or space not in (("YCbCr", "Gray") if colours == "GRAY" else ("YCbCr",)):
            return None
        scale = 1 if min_side is None else next((s for s in (8, 4, 2) if min(height, width) // s >= min_side), 1)
        least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        pixels = simplejpeg.decode_jpeg(data, colours, **least)
    except Exception:  # headers of untrusted bytes raise nearly every exception there is
        return None
    if orientation in EXIF_TRANSPOSE:
        stored = Image.fromarray(pixels[:, :, 0] if colours == "GRAY" else pixels)
        pixels = np.atleast_3d(np.asarray(stored.transpose(EXIF_TRANSPOSE[orientation])))
    if orientation in SWAPS_SIDES:
        width, height = height, width
    return Decoded(pixels, width, height, kind)


def _is_plain(data: bytes) -> bool:
    """Whether a JPEG has nothing but tables before its scan: no EXIF, no further picture. Faster than to open it."""
    place = 2
    while data[place] == 0xFF and data[place + 1] in PLAIN:
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return data[place : place + 2] == b"\xff\xda"


def _decode_open(image: Image.Image, min_side: int | None, montage: bool, file: File) -> Decoded:
    width, height, kind = image.width, image.height, image.format or ""
    if width * height > file.max_pixels:
        raise ImageError("too-large", f"{width}×{height} pixels, limit {file.max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise ImageError("too-large", f"{width}×{height} pixels, limit of a side {MAX_SIDE:,}")
    frames, more = count_frames(image), is_deep(image, file.data)
    if frames > file.max_frames:
        raise ImageError("too-large", f"{frames:,} frames, limit {file.max_frames:,}")
    if min_side is not None and kind in ("JPEG", "MPO") and image.mode == "RGB":
        image.draft("RGB", (min_side, min_side))
    orientation = exif_orientation(image)
    transpose = EXIF_TRANSPOSE.get(orientation)
    Image.MAX_IMAGE_PIXELS = file.max_pixels  # a later frame of a GIF makes all of it larger while it is looked for
    if frames > 1 and montage:
        later = _later_frames(image, frames, transpose, file.max_pixels)
        pixels = stack([upright(image, transpose), *later])
    else:
        pixels = upright(image, transpose)
    if orientation in SWAPS_SIDES:
        width, height = height, width
    return Decoded(pixels, width, height, kind, file if more or frames > 1 else None)


def count_frames(image: Image.Image) -> int:
    return getattr(image, "n_frames", 1) if image.format in ("GIF", "WEBP", "PNG", "AVIF", "TIFF") else 1


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether its frame has more than 8 bits, by the header. Not asked of AVIF, which nothing here reads in full."""
    if image.format == "JPEG2000":  # its first component (ISO/IEC 15444-1, A.5.1)
        place = data.find(b"\xff\x4f\xff\x51") + 42
        return 42 <= place < len(data) and data[place] & 0x7F > 7
    if image.format not in ("PNG", "TIFF", "PPM"):
        return False
    tiles = getattr(image, "tile", None)
    told = tiles[0].args if tiles else ()
    brightest = told[1] if image.format == "PPM" and isinstance(told, tuple) else 255
    return image.mode.startswith(("I", "F")) or ";16" in str(told) or brightest > 255


def _later_frames(
    image: Image.Image, frames: int, transpose: Image.Transpose | None, max_pixels: int
) -> Iterator[np.ndarray]:
    """The middle and the last frame, as far as they can be read: one that is damaged does not spoil the first."""
    for number in sorted({frames // 2, frames - 1} - {0}):
        try:
            image.seek(number)
            if image.width * image.height > max_pixels:
                raise ImageError("too-large", f"frame {number} has {image.width}×{image.height} pixels")
            yield upright(image, transpose)
        except ImageError:
            raise
        except (OSError, ValueError, SyntaxError, EOFError):
            return


def stack(pictures: list[np.ndarray]) -> np.ndarray:
    """One above the other, on white where they are narrower than the widest."""
    width = max(picture.shape[1] for picture in pictures)
    margins = [((0, 0), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.concatenate(
        [np.pad(picture, margin, constant_values=255) for picture, margin in zip(pictures, margins, strict=True)]
    )


def upright(image: Image.Image, transpose: Image.Transpose | None) -> np.ndarray:
    rgb = _to_rgb(image)
    return np.asarray(rgb.transpose(transpose) if transpose is not None else rgb)


def exif_orientation(image: Image.Image) -> int:
    if image.format not in ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"):
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error):
        return 1  # broken EXIF does not make the pixels unreadable


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB on white; 16- and 32-bit greys are scaled, not clipped."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if mode.startswith(("I", "F")):
        return _scale_high_depth(np.asarray(image, dtype=np.float64))
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_high_depth(values: np.ndarray) -> Image.Image:
    """Grey values of unknown depth → 8 bits."""
    values = np.nan_to_num(values)
    grey = np.clip(np.rint(values * (255.0 / full_scale(values))), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def full_scale(values: np.ndarray) -> float:
    """What is white: the smallest usual full scale that holds the maximum."""
    top = float(np.nan_to_num(values).max(initial=0))
    return next((s for s in (1.0, 255.0, 65535.0) if top <= s), top)


def shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) → uint8 (size, size, 3), stretched; area average when shrinking."""
    height, width = pixels.shape[:2]
    smaller = height >= size and width >= size
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(pixels), (size, size), interpolation=interpolation)


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) → uint8 (size, size, 3): centred in a white square, area average when shrinking."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    if side > 8 * size:  # bounds the canvas: a strip of 50,000 × 1 pixels would ask for gigabytes
        scale = 8 * size / side
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = cv2.resize(np.ascontiguousarray(pixels), shape, interpolation=cv2.INTER_AREA)
        height, width = pixels.shape[:2]
        side = max(height, width)
    if height == width:
        return shrink(pixels, size)
    canvas = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return shrink(canvas, size)
