"""DICOM files → pictures as a viewer first shows them. Needs pydicom, which the extra `medical` brings.

In: the bytes of one file, untrusted. Out: 8-bit RGB frames, or a `DicomError` with a status of the manifest. Only
elements that describe pixels are read, and the size of the picture, of the header and of what is compressed is checked
before any pixel is decoded. Who is shown is passed over unread: only `read_patient` asks for the PatientID, and no
message quotes a file. Overlays, and windows that belong to single frames, are not read.
"""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dedup.windowing import to_grey

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

PREAMBLE = 128
MAGIC = b"DICM"
MAX_HEADER = 1 << 22  # bytes that are parsed before the pixels: each may become some hundred bytes of objects
MAX_RLE = 1 << 25  # compressed bytes of a frame: each may become 64
EXTRA = "DICOM needs pydicom: pip install 'unmemorize[medical]'"
ELEMENTS = (
    *("SOPClassUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *(f"{c}PaletteColorLookupTable{part}" for part in ("Descriptor", "Data") for c in ("Red", "Green", "Blue")),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
PATIENT = 0x00100020
DEFLATED, RLE, EXTENDED = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51"
NATIVE = "1.2.840.10008.1.2.1"  # what a deflated file is inside
# Transfer syntaxes that pydicom decodes once this is installed.
DECODERS = {
    EXTENDED: "pylibjpeg pylibjpeg-libjpeg",  # JPEG Extended, of 12 bits
    "1.2.840.10008.1.2.4.57": "python-gdcm",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "python-gdcm",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "python-gdcm",
    "1.2.840.10008.1.2.4.90": "pylibjpeg pylibjpeg-openjpeg",  # JPEG 2000, in colours of more than 8 bits
    "1.2.840.10008.1.2.4.91": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
}
logging.getLogger("pydicom").addHandler(logging.NullHandler())
logging.getLogger("pydicom").propagate = False  # it would quote values
warnings.filterwarnings("ignore", module=r"pydicom\.")


class DicomError(ValueError):
    """A file that cannot be used; `status` is one of `manifest.STATUS`."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Header:
    """What is known before a pixel is decoded. `start`: where in `data` the value of the pixels begins."""

    elements: "Dataset"
    data: bytes
    start: int
    syntax: "UID"
    options: dict[str, Any]  # as pydicom's decoders take them


def is_dicom(data: bytes) -> bool:
    """By its signature, which follows a preamble that may be anything, another format included."""
    return data.startswith(MAGIC, PREAMBLE)


def holds_dicom(path: Path) -> bool:
    """The same of a file on the disk, of which no more is read."""
    try:
        with path.open("rb") as handle:
            return is_dicom(handle.read(PREAMBLE + len(MAGIC)))
    except OSError:
        return False


def decode(data: bytes, *, montage: bool, max_pixels: int, max_frames: int) -> list[np.ndarray]:
    """The first frame, for a montage the middle and last one too, if they can be had: uint8 (H, W, 3). DicomError."""
    header = read_header(data, max_pixels, max_frames)
    frames = header.options["number_of_frames"]
    pictures = []
    for number in sorted({0, frames // 2, frames - 1}) if montage else [0]:
        try:
            pictures.append(_decode_frame(header, number))
        except DicomError:
            if number == 0:
                raise
            break
    return pictures


def read_frames(data: bytes, *, stored: bool, max_pixels: int, max_frames: int) -> Iterator[np.ndarray]:
    """Every frame, as `decode` shows it; with `stored`, the stored values of what has more than 8 bits."""
    header = read_header(data, max_pixels, max_frames)
    deep = stored and header.options.get("bits_stored", 8) > 8
    yield from (_decode_frame(header, number, stored=deep) for number in range(header.options["number_of_frames"]))


def read_patient(data: bytes) -> str | None:
    """The PatientID, in memory only; None where there is none, or no pydicom."""
    try:
        from pydicom.filereader import read_dataset

        file, syntax = _open(data, MAX_HEADER)
        elements = read_dataset(
            file,
            syntax.is_implicit_VR,
            syntax.is_little_endian,
            stop_when=lambda tag, vr, length: tag > PATIENT,
            specific_tags=[PATIENT],
        )
        return str(elements.get("PatientID") or "").strip(" \0") or None
    except Exception:  # of a damaged header as of no pydicom; `decode` says which
        return None


class _Header(io.BytesIO):
    """Raises once more than MAX_HEADER bytes were read; those that are passed over do not count."""

    left = MAX_HEADER

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size if size is not None and 0 <= size <= self.left else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise DicomError("too-large", f"its header has more than {MAX_HEADER:,} bytes")
        return data


def _open(data: bytes, limit: int) -> tuple[_Header, "UID"]:
    """The file after its meta information, inflated if need be, and its transfer syntax. Raises whatever pydicom may.

    limit: bytes that a deflated file may become; the rest is cut off.
    """
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID

    file = _Header(data)
    file.seek(PREAMBLE + len(MAGIC))
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = UID(str(meta.get("TransferSyntaxUID") or NATIVE))
    if syntax == DEFLATED:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(memoryview(data)[file.tell() :], limit)
        return _Header(inflated), UID(NATIVE)
    return file, syntax


def read_header(data: bytes, max_pixels: int, max_frames: int) -> Header:
    """Parse and check what stands before the pixels. Raises DicomError."""
    header = _parse(data, MAX_HEADER)
    options = header.options
    width, height, frames = options["columns"], options["rows"], options["number_of_frames"]
    if width * height > max_pixels:
        raise DicomError("too-large", f"{width}×{height} pixels, limit {max_pixels:,}")
    if frames > max_frames:
        raise DicomError("too-large", f"{frames:,} frames, limit {max_frames:,}")
    if not (width > 0 and height > 0 and frames > 0 and 1 <= options["samples_per_pixel"] <= 4):
        raise DicomError("unreadable", "its DICOM header describes no picture")
    if header.data is data:
        return header
    return _parse(data, header.start + min(_count_bytes(options, frames), 4 * max_pixels))  # inflates the pixels too


def _parse(data: bytes, limit: int) -> Header:
    """limit: bytes that a deflated file may become."""
    try:
        return _parse_elements(data, limit)
    except DicomError:
        raise
    except ModuleNotFoundError as error:
        raise DicomError("unsupported", EXTRA) from error
    except Exception as error:  # of untrusted bytes it raises nearly every exception there is
        if isinstance(error.__context__, DicomError):  # by `_Header`, below
            raise error.__context__ from None
        raise DicomError("unreadable", f"its DICOM header is damaged ({type(error).__name__})") from None


def _parse_elements(data: bytes, limit: int) -> Header:
    from pydicom.filereader import read_dataset
    from pydicom.pixels import as_pixel_options

    file, syntax = _open(data, limit)
    if not syntax.is_transfer_syntax:
        raise DicomError("unsupported", "an unknown transfer syntax: convert the file first")
    elements = read_dataset(
        file,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=lambda tag, vr, length: tag in PIXELS,
        specific_tags=_list_tags(),
    )
    data, start = file.getvalue(), file.tell()
    order = "<" if syntax.is_little_endian else ">"
    head = data[start : start + 12].ljust(12, b"\0")
    group, element = struct.unpack(f"{order}HH", head[:4])
    name = PIXELS.get(group << 16 | element)
    if name is None or "Rows" not in elements:
        if "Rows" in elements:
            raise DicomError("unreadable", "it ends before its pixels")
        raise DicomError("unsupported", f"no picture but {_name_class(elements)}")
    explicit = head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN")
    for empty in [element.tag for element in elements if element.value in (None, "")]:
        del elements[empty]
    kind = head[4:6].decode() if explicit else "OW"
    options = as_pixel_options(elements, pixel_keyword=name, pixel_vr=kind)
    numbers = ("rows", "columns", "samples_per_pixel", "bits_allocated", "number_of_frames")
    options |= {number: int(options[number]) for number in numbers}
    return Header(elements, data, start + (12 if explicit else 8), syntax, options)


@cache
def _list_tags() -> list[int]:
    from pydicom.datadict import tag_for_keyword

    return [tag for name in ELEMENTS if (tag := tag_for_keyword(name)) is not None]


def _name_class(elements: "Dataset") -> str:
    """What the file holds, if the standard knows it: an unknown identifier might say more than that."""
    identifier = elements.get("SOPClassUID")
    name = getattr(identifier, "name", "")
    return name if name and name != identifier else "other data"


def _decode_frame(header: Header, number: int, *, stored: bool = False) -> np.ndarray:
    """uint8 (H, W, 3), or the stored values. Raises DicomError."""
    from pydicom.pixels import get_decoder

    name, options = header.syntax.name, header.options
    try:
        decoder = get_decoder(header.syntax)
    except NotImplementedError:
        raise DicomError("unsupported", f"{name}: convert the file first") from None
    more = f"{name}: pip install {DECODERS.get(header.syntax, 'pydicom')}"
    if not decoder.is_available:
        raise DicomError("unsupported", more)
    file = io.BytesIO(header.data)
    file.seek(header.start)
    try:
        if decoder.is_encapsulated:
            _check_frame(header, file, number)
        else:
            _check_length(header, number)
        values, shown = decoder.as_array(file, index=number, raw=True, **options)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        return values if stored else _show(values, header.elements, shown)
    except DicomError:
        raise
    except Exception as error:
        deep = options.get("bits_stored", 8) > 8 and (options["samples_per_pixel"] > 1 or header.syntax == EXTENDED)
        if deep and decoder.available_plugins == ("pillow",):
            raise DicomError("unsupported", f"{more} (more than 8 bits)") from None
        raise DicomError("unreadable", f"its pixels cannot be decoded as {name} ({type(error).__name__})") from None


def _check_length(header: Header, number: int) -> None:
    """Raise DicomError where the file ends inside a frame that is not compressed."""
    needed, there = _count_bytes(header.options, number + 1), len(header.data) - header.start
    if there < needed:
        raise DicomError("unreadable", f"its pixels end early ({there:,} of {needed:,} bytes)")


def _count_bytes(options: dict[str, Any], frames: int) -> int:
    """Of frames that are not compressed."""
    bits = options["rows"] * options["columns"] * options["samples_per_pixel"] * options["bits_allocated"]
    if options.get("photometric_interpretation") == "YBR_FULL_422":
        bits = bits * 2 // 3
    return -(-bits * frames // 8)


def _check_frame(header: Header, file: io.BytesIO, number: int) -> None:
    """Raise DicomError where the compressed data would become more than the header says."""
    from pydicom.encaps import get_frame

    options = header.options
    offsets = options.get("extended_offsets")
    frame = get_frame(file, number, number_of_frames=options["number_of_frames"], extended_offsets=offsets)
    file.seek(header.start)
    if header.syntax == RLE:
        limit = min(MAX_RLE, 1_024 + 2 * _count_bytes(options, 1))
        if len(frame) > limit:
            raise DicomError("too-large", f"a frame has {len(frame):,} compressed bytes, limit {limit:,}")
    elif (size := measure_stream(frame)) != (options["columns"], options["rows"]):
        said = f"{size[0]}×{size[1]}" if size else "no"
        expected = f"{options['columns']}×{options['rows']}"
        raise DicomError("unreadable", f"{said} pixels are compressed in it, and its header says {expected}")


def measure_stream(frame: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG, JPEG-LS or JPEG 2000 stream begins with; None if it is none.

    ISO/IEC 10918-1, B.2.2 (SOF); 14495-1, C.2.2 (SOF55); 15444-1, A.5.1 (SIZ).
    """
    siz = frame.find(b"\xff\x4f\xff\x51")  # after other boxes, where there are any
    if not frame.startswith(b"\xff\xd8"):
        if siz < 0 or len(frame) < siz + 24:
            return None
        right, bottom, left, top = struct.unpack(">4I", frame[siz + 8 : siz + 24])
        return right - left, bottom - top
    place = 2
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack(">HH", frame[place + 5 : place + 9])
            return width, height
        length = int.from_bytes(frame[place + 2 : place + 4])
        place += 1 if marker == 0xFF else 2 + length  # before a marker may stand further bytes FF
    return None


def _show(values: np.ndarray, elements: "Dataset", shown: dict[str, Any]) -> np.ndarray:
    """Decoded values (H, W) or (H, W, 3) → uint8 (H, W, 3). shown: what pydicom says of them."""
    from pydicom.pixels import apply_color_lut

    kind = str(shown["photometric_interpretation"])
    bits = int(shown.get("bits_stored", 8))
    if kind.startswith("MONOCHROME") and values.ndim == 2:
        grey = to_grey(values, elements)
        return np.repeat((255 - grey if kind == "MONOCHROME1" else grey)[..., None], 3, axis=2)
    if kind == "PALETTE COLOR" and values.ndim == 2:
        if "RedPaletteColorLookupTableData" not in elements:
            raise DicomError("unsupported", "a palette in segments: convert the file first")
        values = apply_color_lut(values, elements)
        bits = int(elements.RedPaletteColorLookupTableDescriptor[2])
    elif kind in ("YBR_FULL", "YBR_FULL_422") and values.dtype == np.uint8:
        return np.asarray(Image.frombytes("YCbCr", values.shape[1::-1], values.tobytes()).convert("RGB"))
    elif kind != "RGB" or values.ndim != 3:
        raise DicomError("unsupported", "colours of an unusual kind: convert the file first")
    return np.ascontiguousarray((values >> max(0, bits - 8)).astype(np.uint8))
