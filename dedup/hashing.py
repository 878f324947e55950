"""Pixels → fingerprints: byte digest, imagehash-equal pHash and dHash, PDQ with quality and all eight orientations.

Per image only what must be done per image (two Pillow resizes, one pair of matrix products); everything after that is
batched. Knows nothing of files and of how fingerprints are searched.

PDQ: Facebook (2019), "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm", and the reference
implementation in ThreatExchange (`pdq/cpp`), whose constants these are.
"""

import functools
import hashlib

import numpy as np
from PIL import Image
from scipy.sparse import csr_array

PDQ_SOURCE = 256  # larger pictures are first shrunk to this side at least
PHASH_SOURCE = 64  # the same for pHash and dHash
PDQ_SIDE = 64  # the luma buffer
PDQ_BITS = 16  # side of the kept block of DCT coefficients
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# cos((i + 1) π (2 j + 1) / 128): DCT-II without its constant row, (16, 64)
DCT = (
    np.sqrt(2 / PDQ_SIDE)
    * np.cos(np.pi / (2 * PDQ_SIDE) * np.outer(np.arange(1, PDQ_BITS + 1), 2 * np.arange(PDQ_SIDE) + 1))
).astype(np.float32)


def digest(data: bytes) -> str:
    """SHA-256 of the bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def pixel_digest(pixels: np.ndarray, rest: bytes = b"") -> str:
    """SHA-256 of upright RGB pixels uint8 (H, W, 3), their shape and `frames.read_rest`: equal for one picture only."""
    shape = f"{pixels.shape[0]}x{pixels.shape[1]}:".encode()
    return hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes() + rest).hexdigest()


def to_hex(bits: np.ndarray) -> list[str]:
    """bool (n, k) → n lowercase hex strings, first bit most significant, as `str(ImageHash)` prints them."""
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


def reduce(grey: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W) → uint8, mean over boxes of the largest whole number of pixels that leaves both sides ≥ `side`."""
    factor = min(grey.shape) // side
    return np.asarray(Image.fromarray(grey).reduce(factor)) if factor > 1 else grey


def grey_thumbnails(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W) → uint8 (32, 32) for pHash and (8, 9) for dHash, as imagehash shrinks them."""
    image = Image.fromarray(grey)
    small = image.resize((32, 32), Image.Resampling.LANCZOS)
    wide = image.resize((9, 8), Image.Resampling.LANCZOS)
    return np.asarray(small), np.asarray(wide)


def phash(grey: np.ndarray) -> np.ndarray:
    """uint8 (n, 32, 32) → bool (n, 64), bit for bit `imagehash.phash`: low 8×8 of the DCT-II, above its median."""
    import scipy.fftpack  # a quarter of a second that only who hashes needs

    rows = scipy.fftpack.dct(grey, axis=1)
    low = scipy.fftpack.dct(rows, axis=2)[:, :8, :8]  # (n, 8, 8)
    return (low > np.median(low, axis=(1, 2), keepdims=True)).reshape(len(grey), 64)


def dhash(grey: np.ndarray) -> np.ndarray:
    """uint8 (n, 8, 9) → bool (n, 64), bit for bit `imagehash.dhash`: brighter than the left neighbour."""
    return (grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(grey), 64)


@functools.lru_cache(maxsize=128)
def jarosz_matrix(length: int, reduced: int) -> csr_array:
    """Sparse float32 (64, reduced): PDQ's two passes of a box filter and the decimation to 64, as one matrix.

    The window is ceil(length / 128) wide; at the borders the mean is over what is there. For a side that was decoded at
    1/2, 1/4 or 1/8 scale the matrix of the full side is folded, so that the result stays that of the full picture.
    """
    window = (length + 2 * PDQ_SIDE - 1) // (2 * PDQ_SIDE)
    ahead = (window + 2) // 2 - 1
    behind = window - ahead - 1
    matrix = np.zeros((PDQ_SIDE, length))
    picks = ((np.arange(PDQ_SIDE) + 0.5) * length / PDQ_SIDE).astype(int)
    for row, pick in enumerate(picks):
        second = range(max(0, pick - behind), min(length, pick + ahead + 1))
        for centre in second:
            first = slice(max(0, centre - behind), min(length, centre + ahead + 1))
            matrix[row, first] += 1 / (len(second) * (first.stop - first.start))
    scale = round(length / reduced)
    if scale > 1:
        matrix = np.add.reduceat(matrix, np.arange(reduced) * scale, axis=1)
    return csr_array(matrix.astype(np.float32))


def pdq_luma(grey: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) → float32 (64, 64) luma in [0, 255], Jarosz-filtered as the picture of `height` × `width` is."""
    rows, columns = grey.shape
    filtered = jarosz_matrix(height, rows) @ grey.astype(np.float32)  # (64, W)
    return (jarosz_matrix(width, columns) @ filtered.T).T


def pdq(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (n, 64, 64) → uint8 (n, 8, 32) codes in the order of `manifest.ORIENTATIONS`, int32 (n,) quality 0 … 100.

    Turning or mirroring a picture only transposes its DCT coefficients and changes their signs, so one transform gives
    all eight codes. Quality is the sum of quantised gradients of the luma buffer, capped.
    """
    quality = _pdq_quality(luma)
    coefficients = DCT @ luma @ DCT.T  # (n, 16, 16)
    alternate = np.where(np.arange(PDQ_BITS) % 2 == 0, -1, 1).astype(np.float32)  # sign of a reversed axis
    rows, columns = alternate[:, None], alternate[None, :]
    r0, m0, m180, r180 = (_above_median(coefficients * signs) for signs in (1, columns, rows, rows * columns))
    t0, t_m0, t_m180, t180 = (bits.transpose(0, 2, 1) for bits in (r0, m0, m180, r180))
    # r90, for one, is the transposed picture with its rows reversed (np.rot90): the mirrored one, transposed.
    eight = np.stack([r0, t_m0, r180, t_m180, m0, t0, m180, t180], axis=1)  # (n, 8, 16, 16)
    # Row-major from the last coefficient, as PDQ prints.
    return np.packbits(eight.reshape(len(luma), 8, PDQ_BITS**2)[:, :, ::-1], axis=2), quality


def _above_median(coefficients: np.ndarray) -> np.ndarray:
    """(n, 16, 16) → bool: above the lower median."""
    flat = coefficients.reshape(len(coefficients), -1)
    median = np.partition(flat, 127, axis=1)[:, 127]
    return coefficients > median[:, None, None]


def _pdq_quality(luma: np.ndarray) -> np.ndarray:
    vertical = np.abs(np.trunc(np.diff(luma, axis=1) * 100 / 255)).sum(axis=(1, 2))
    horizontal = np.abs(np.trunc(np.diff(luma, axis=2) * 100 / 255)).sum(axis=(1, 2))
    return np.minimum((vertical + horizontal) / 90, 100).astype(np.int32)
