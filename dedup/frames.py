"""What the montage of a picture does not show: every frame of an animation, and values of more than 8 bits.

In: the file of a picture that `images.decode` has read. Out: all its frames, what tells equal pictures apart, and pairs
of frames to look at. Asked only of pictures that the search has paired up. Knows nothing of thresholds.
"""

import hashlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from dedup import dicom, images
from dedup.images import Decoded, File, ImageError

cv2.utils.logging.setLogLevel(0)  # what it would say of damaged files; here they are an error
SIDE = 512  # pixels of the longer side at which deep values are compared
TURNS = {2: 4, 3: 2, 4: 6, 5: 5, 6: 3, 7: 7, 8: 1}  # EXIF orientation → number of `manifest.ORIENTATIONS`

TO_RGB = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}  # by channels


class Frame(NamedTuple):
    """`values`: upright, uint8 (H, W, 3) on white, or what is deeper as stored, (H, W) or (H, W, 3 or 4)."""

    values: np.ndarray
    alpha: bytes  # transparency of 8-bit frames, empty when all of it is opaque


def read_frames(file: File, *, stored: bool = True) -> Iterator[Frame]:
    """Every frame in order. Raises ImageError where one of them cannot be had in full.

    stored: values of DICOM as they are stored, not as a viewer shows them.
    """
    try:
        if dicom.is_dicom(file.data):
            limits = {"max_pixels": file.max_pixels, "max_frames": file.max_frames}
            yield from (Frame(values, b"") for values in dicom.read_frames(file.data, stored=stored, **limits))
            return
        with Image.open(io.BytesIO(file.data), formats=images.FORMATS) as image:
            frames, orientation = images.count_frames(image), 1
            for number in range(frames):
                image.seek(number)
                if image.width * image.height > file.max_pixels:
                    raise ImageError("too-large", f"frame {number} has {image.width}×{image.height} pixels")
                deep = images.is_deep(image, file.data)  # before EXIF is asked for, which loads a PNG
                orientation = images.exif_orientation(image) if number == 0 else orientation
                if deep:
                    yield Frame(_turn(_read_stored(image, file.data, number, frames), orientation), b"")
                else:
                    yield Frame(images.upright(image, images.EXIF_TRANSPOSE.get(orientation)), _alpha(image))
    except (ImageError, GeneratorExit):
        raise
    except Exception as error:  # see `images.decode`
        raise ImageError("unreadable", f"{type(error).__name__}: {error}"[:200]) from error


def _read_stored(image: Image.Image, data: bytes, number: int, frames: int) -> np.ndarray:
    """Pillow has colours in 8 bits only, and OpenCV only the pages of a TIFF."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        narrow = values.dtype.kind in "iu" and values.min(initial=0) >= 0 and values.max(initial=0) <= 65_535
        return values.astype(np.uint16) if narrow else values  # PGM and PNG of the same values are equal
    found: list[np.ndarray | None] = []
    if frames == 1:
        found = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)]
    elif image.format == "TIFF":
        pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED, range=(number, number + 1))
        found = list(pages[1])
    colours = found[0] if found else None
    if colours is None or colours.dtype == np.uint8:
        raise ImageError("unsupported", f"frame {number} cannot be had at full depth")
    return colours if colours.ndim == 2 else cv2.cvtColor(colours, TO_RGB[colours.shape[2]])


def _turn(values: np.ndarray, orientation: int) -> np.ndarray:
    turn = TURNS.get(orientation, 0)
    return np.rot90(values[:, ::-1] if turn >= 4 else values, turn % 4)


def _alpha(image: Image.Image) -> bytes:
    if not image.has_transparency_data:
        return b""
    alpha = image.convert("RGBA").getchannel("A")
    return b"" if alpha.getextrema() == (255, 255) else alpha.tobytes()


def read_rest(decoded: Decoded, data: bytes) -> bytes:
    """What tells a picture from others with its `pixels`: transparency, or all its frames at full depth.

    Empty for an opaque picture of one frame and 8 bits; all of the data when it is damaged beyond what `pixels` show,
    or cannot be had in full: then only equal files are equal.
    """
    try:
        if decoded.file is None:
            with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
                return _alpha(image)
        return b"".join(_digest(frame) for frame in read_frames(decoded.file))
    except Exception:  # see `images.decode`
        return data


def _digest(frame: Frame) -> bytes:
    told = f"{frame.values.dtype.str}{frame.values.shape}:".encode()
    return hashlib.sha256(told + np.ascontiguousarray(frame.values).tobytes() + frame.alpha).digest()


def pair_frames(a: Decoded, b: Decoded) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The frames of two pictures, each uint8 (H, W, 3) and beside the one with its number.

    Where one has more than 8 bits, both are shown with their tones spread (`_spread`): two scans that 8 bits show as
    one black may differ. A DICOM file beside another format is taken as a viewer shows it. Raises ImageError where a
    frame cannot be had in full, or one picture has more frames than the other.
    """
    stored = (a.format == images.DICOM) == (b.format == images.DICOM)
    of_a, of_b = (
        iter([Frame(picture.pixels, b"")]) if picture.file is None else read_frames(picture.file, stored=stored)
        for picture in (a, b)
    )
    while True:
        x, y = next(of_a, None), next(of_b, None)
        if x is None and y is None:
            return
        if x is None or y is None:
            raise ImageError("unreadable", "one of them has more frames")
        plain = x.values.dtype == y.values.dtype == np.uint8
        yield (x.values, y.values) if plain else _spread(x.values, y.values)


def _spread(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of any depth → uint8 (h, w, 3): each value becomes its rank among those of both pictures."""
    small = [_shrink(values) for values in (a, b)]
    every = np.sort(np.concatenate([values.ravel() for values in small]))
    ranks = [np.searchsorted(every, values) + np.searchsorted(every, values, side="right") for values in small]
    x, y = (np.rint(rank * (255 / (2 * len(every)))).astype(np.uint8) for rank in ranks)
    return x, y


def _shrink(values: np.ndarray) -> np.ndarray:
    """→ float32 (h, w, 3), 0 … 1 of the full scale, on white, SIDE pixels at most."""
    height, width = values.shape[:2]
    full = np.float32(images.full_scale(values))
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    kept = values if values.dtype in (np.uint8, np.uint16) else values.astype(np.float32)
    small = cv2.resize(np.ascontiguousarray(kept), size, interpolation=cv2.INTER_AREA)
    small = np.atleast_3d(np.nan_to_num(small.astype(np.float32)) / full)
    if small.shape[2] == 4:
        small = small[..., :3] * small[..., 3:] + (1 - small[..., 3:])
    return np.broadcast_to(small, (*small.shape[:2], 3))
