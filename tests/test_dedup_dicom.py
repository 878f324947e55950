"""DICOM: what is shown equals pydicom's own arrays; hostile files end in one line and take little memory."""

import io
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from dedup import dicom, images

# Filtered by the program too, for these quote values.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NOISE = np.random.default_rng(0).integers(0, 4096, (24, 32), dtype=np.uint16)


def read(name: str) -> bytes:
    return Path(str(get_testdata_file(name, download=False))).read_bytes()


def write(pixels: np.ndarray | bytes, *, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A file with pixels (H, W), (H, W, 3), (frames, H, W) or bytes; elements replace what the pixels imply."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    implied: dict[str, Any] = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    if isinstance(pixels, np.ndarray):
        colour = pixels.shape[-1] == 3
        implied |= dict(zip(("Rows", "Columns"), pixels.shape[-3:-1] if colour else pixels.shape[-2:], strict=True))
        implied |= {"BitsAllocated": 8 * pixels.dtype.itemsize, "PixelRepresentation": int(pixels.dtype.kind == "i")}
        if colour:
            implied |= {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
        elif pixels.ndim == 3:
            implied["NumberOfFrames"] = len(pixels)
    implied |= elements
    implied.setdefault("BitsStored", implied["BitsAllocated"])
    implied["HighBit"] = implied["BitsStored"] - 1
    for name, value in implied.items():
        setattr(made, name, value)
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    made.PixelData = encapsulate([data]) if made.file_meta.TransferSyntaxUID.is_encapsulated else data
    made["PixelData"].VR = "OW" if implied["BitsAllocated"] > 8 else "OB"
    made["PixelData"].is_undefined_length = made.file_meta.TransferSyntaxUID.is_encapsulated
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def show(data: bytes, **options: Any) -> np.ndarray:
    decoded = images.decode(data, **options)
    assert decoded.format == "DICOM"
    return decoded.pixels


def grey(data: bytes) -> np.ndarray:
    pixels = show(data)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def refuse(data: bytes, **options: Any) -> tuple[str, str]:
    with pytest.raises(images.ImageError) as caught:
        images.decode(data, montage=True, **options)
    assert "\n" not in str(caught.value)
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "6154", "17106"])
def test_a_window_shows_what_pydicom_computes(name: str) -> None:
    path = next(Path(pydicom.__file__).parent.glob(f"data/test_files/**/{name}"))
    header = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(pixel_array(path), header), header)
    signed, bits = header.PixelRepresentation, header.BitsStored
    stored = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if signed else [0, (1 << bits) - 1])
    low, high = stored * float(header.get("RescaleSlope", 1)) + float(header.get("RescaleIntercept", 0))
    expected = np.rint((values - low) / (high - low) * 255)
    if header.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    assert (grey(path.read_bytes()) == expected).mean() > 0.999  # a half may be rounded either way
    assert np.abs(grey(path.read_bytes()) - expected).max() <= 1


@given(st.floats(-3000, 3000), st.floats(1.5, 5000), st.floats(0.1, 4) | st.floats(-4, -0.1), st.integers(-2000, 2000))
@settings(max_examples=30, deadline=None)
def test_a_linear_window_follows_the_standard(centre: float, width: float, slope: float, intercept: int) -> None:
    """PS3.3, C.11.2.1.2.1, value by value."""
    elements = {"WindowCenter": f"{centre:.4f}", "WindowWidth": f"{width:.4f}"}
    elements |= {"RescaleSlope": f"{slope:.4f}", "RescaleIntercept": str(intercept)}
    shown = grey(write(NOISE, BitsStored=12, **elements))
    c, w = round(centre, 4), round(width, 4)
    for row, column in ((0, 0), (5, 7), (23, 31)):
        x = NOISE[row, column] * round(slope, 4) + intercept
        y = ((x - c + 0.5) / (w - 1) + 0.5) * 255
        y = 0.0 if x <= c - 0.5 - (w - 1) / 2 else 255.0 if x > c - 0.5 + (w - 1) / 2 else y
        assert abs(shown[row, column] - y) <= 0.51


def test_monochrome1_is_monochrome2_inverted() -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    bright, dark = (grey(write(NOISE, PhotometricInterpretation=f"MONOCHROME{n}", **window)) for n in (2, 1))
    assert (bright == 255 - dark).all()
    assert np.ptp(bright) == 255


def test_without_a_window_one_hot_pixel_and_padding_do_not_darken_the_rest() -> None:
    values = (NOISE // 8).astype(np.int16)
    values[0, 0] = 30_000
    values[1:7] = -2000
    shown = grey(write(values, PixelPaddingValue=-2000))
    rest = shown[8:]
    assert rest.min() == 0
    assert rest.max() == 255
    assert rest.std() > 60
    assert not shown[1:7].any()
    assert len(np.unique(grey(write(np.full((8, 8), 700, np.uint16))))) == 1


def test_eight_bits_without_a_window_stand_as_they_are() -> None:
    values = (NOISE // 32).astype(np.uint8)
    assert (grey(write(values)) == values).all()
    assert (grey(write(values, RescaleSlope=2, RescaleIntercept=-7)) == values).all()


def test_a_window_that_cannot_be_used_is_as_none() -> None:
    for window in ({"WindowWidth": 0}, {"WindowWidth": ""}, {"WindowWidth": 9, "VOILUTFunction": "WAVY"}):
        assert (grey(write(NOISE, WindowCenter=100, **window)) == grey(write(NOISE))).all()


def test_lookup_tables_take_the_place_of_slope_and_window() -> None:
    def table(values: list[int], bits: int) -> Sequence:
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [len(values), 0, bits])
        item.add_new("LUTData", "US", values)
        return Sequence([item])

    values = np.arange(64, dtype=np.uint16).reshape(8, 8) % 4
    shown = grey(write(values, VOILUTSequence=table([0, 255, 51, 102], 8), WindowCenter=1, WindowWidth=2))
    assert (shown == np.array([0, 255, 51, 102])[values]).all()
    rescaled = grey(write(values, ModalityLUTSequence=table([40, 30, 20, 10], 16), WindowCenter="25.5", WindowWidth=31))
    assert (rescaled == np.array([255, 170, 85, 0])[values]).all()


def test_the_same_slice_is_the_same_in_every_encoding() -> None:
    expected = show(read("MR_small.dcm"))
    for kind in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "padded"):
        assert (show(read(f"MR_small_{kind}.dcm")) == expected).all(), kind


def test_colours() -> None:
    eight = show(read("SC_rgb_rle.dcm"))
    assert (eight == pixel_array(get_testdata_file("SC_rgb_rle.dcm"))).all()
    for name in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_gdcm_KY.dcm"):
        assert (show(read(name)) == eight).all(), name
    for name in ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "examples_ybr_color.dcm"):
        reference = pixel_array(get_testdata_file(name), index=0).astype(int)
        assert np.abs(show(read(name)) - reference).max() <= 2, name
    palette = pydicom.dcmread(str(get_testdata_file("examples_palette.dcm")))
    reference = apply_color_lut(palette.pixel_array, palette) >> 8
    assert (show(read("examples_palette.dcm")) == reference[..., :3]).all()


def test_frames_are_treated_as_those_of_an_animation() -> None:
    frames = np.stack([np.full((6, 8), 20 * n, np.uint8) for n in range(1, 8)])
    data = write(frames)
    assert (show(data)[..., 0] == 20).all()
    whole = images.decode(data, montage=True)
    assert (whole.width, whole.height) == (8, 6)
    assert (whole.pixels[..., 0] == np.repeat([20, 80, 140], 6)[:, None]).all()
    cut = images.decode(data[:-20], montage=True)
    assert (cut.pixels[..., 0] == np.repeat([20, 80], 6)[:, None]).all()
    two = images.decode(read("SC_rgb_rle_2frame.dcm"), montage=True)
    assert two.pixels.shape == (200, 100, 3)


def test_a_preamble_of_another_format_changes_nothing() -> None:
    data = write(NOISE)
    for preamble in (b"\xff\xd8\xff\xe0", b"II*\0"):
        dressed = preamble + data[4:]
        assert (show(dressed) == show(data)).all()
        assert (images.decode_luma(dressed, min_side=8).grey == images.decode_luma(data).grey).all()


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("MR_truncated.dcm", "unreadable", "its pixels end early (8,130 of 8,192 bytes)"),
        ("SC_rgb_jpeg_gdcm.dcm", "unsupported", "JPEG Lossless, Non-Hierarchical"),
        ("SC_rgb_jpeg_gdcm.dcm", "unsupported", "pip install python-gdcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "unsupported", "JPEG-LS Lossless Image Compression: pip install python-gdcm"),
        ("JPGExtended.dcm", "unsupported", "pip install pylibjpeg pylibjpeg-libjpeg"),
        ("reportsi.dcm", "unsupported", "no picture but Basic Text SR Storage"),
        ("badVR.dcm", "unreadable", "its DICOM header is damaged"),
        ("GDCMJ2K_TextGBR.dcm", "unreadable", "cannot be decoded as JPEG 2000"),
    ],
)
def test_what_cannot_be_decoded_says_why(name: str, status: str, words: str) -> None:
    found, message = refuse(read(name))
    assert found == status
    assert words in message


def test_without_pydicom_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom.filereader", None)
    assert refuse(write(NOISE)) == ("unsupported", "DICOM needs pydicom: pip install 'unmemorize[medical]'")
    assert dicom.read_patient(read("MR_small.dcm")) is None


def test_limits_are_those_of_other_formats() -> None:
    assert refuse(write(NOISE), max_pixels=700) == ("too-large", "32×24 pixels, limit 700")
    assert refuse(write(NOISE, Rows=65_535, Columns=65_535))[0] == "too-large"
    assert refuse(write(NOISE, NumberOfFrames=2_000_000_000)) == ("too-large", "2,000,000,000 frames, limit 1,000")
    assert refuse(write(NOISE, NumberOfFrames=-1))[0] == "unreadable"
    assert refuse(write(NOISE, Rows=0))[0] == "unreadable"
    assert refuse(write(NOISE, SamplesPerPixel=60_000))[0] == "unreadable"
    assert refuse(write(NOISE, BitsAllocated=65_528, BitsStored=12))[0] == "unreadable"


def deflate(bomb: bytes) -> bytes:
    """A picture in a deflated file, and behind it whatever else."""
    data = write((NOISE // 16).astype(np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    start = data.index(b"\x02\x00\x00\x00UL") + 12  # the length of the meta information, and then as much of it
    start += struct.unpack("<L", data[start - 4 : start])[0]
    inside = zlib.decompressobj(-15).decompress(data[start:])
    packer = zlib.compressobj(9, wbits=-15)
    return data[:start] + packer.compress(inside + bomb) + packer.flush()


def compress_items() -> bytes:
    """A million empty items in a sequence that nobody asked for."""
    data = write(NOISE)
    place = data.index(b"\x28\x00\x02\x00US")
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 1_000_000
    sequence = struct.pack("<HH", 8, 0x1140) + b"SQ\0\0" + b"\xff" * 4 + items + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return data[:place] + sequence + data[place:]


def compress_jpeg() -> bytes:
    """A JPEG of 9 million pixels behind a header that says 8 × 8."""
    buffer = io.BytesIO()
    Image.new("L", (3000, 3000)).save(buffer, "JPEG")
    return write(buffer.getvalue(), syntax=JPEGBaseline8Bit, Rows=8, Columns=8, BitsAllocated=8, PixelRepresentation=0)


def compress_runs() -> bytes:
    """64 million zeros behind a header that says 8 × 8."""
    runs = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 500_000
    return write(runs, syntax=RLELossless, Rows=8, Columns=8, BitsAllocated=8, PixelRepresentation=0)


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (lambda: deflate(bytes(1 << 25)), "ok", ""),
        (compress_items, "too-large", "its header has more than"),
        (compress_jpeg, "unreadable", "3000×3000 pixels are compressed in it, and its header says 8×8"),
        (compress_runs, "too-large", "compressed bytes"),
    ],
)
def test_bombs_take_little_memory(
    make: Callable[[], bytes], status: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom._Header, "left", 1 << 16)  # the real limit takes seconds
    monkeypatch.setattr(dicom, "MAX_HEADER", 1 << 16)
    data = make()
    tracemalloc.start()
    try:
        if status == "ok":
            assert (grey(data) == NOISE // 16).all()
        else:
            found, message = refuse(data)
            assert found == status
            assert words in message
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_a_stream_is_measured_by_its_own_header() -> None:
    for kind, option in (("JPEG", "quality"), ("JPEG", "progressive"), ("JPEG2000", "mct"), ("JPEG2000", "no_jp2")):
        buffer = io.BytesIO()
        Image.new("RGB", (37, 21)).save(buffer, kind, **{option: 1})
        assert dicom.measure_stream(buffer.getvalue()) == (37, 21)
    assert dicom.measure_stream(b"\xff\xd8\xff\xd8") is None
    assert dicom.measure_stream(b"") is None


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damage_ends_in_one_line_that_quotes_nothing(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["MR_small_RLE.dcm", "SC_rgb_small_odd_jpeg.dcm", "rtdose_expb.dcm"]))
    damaged = bytearray(read(name).replace(b"4MR1", b"SENT").replace(b"id11111", b"SENT_11"))
    for _ in range(data.draw(st.integers(1, 12))):
        damaged[data.draw(st.integers(132, min(len(damaged) - 1, 3000)))] = data.draw(st.integers(0, 255))
    message = ""
    try:
        images.decode(bytes(damaged[: data.draw(st.integers(200, len(damaged)))]), montage=True, max_pixels=10**6)
    except images.ImageError as error:
        message = str(error)
    assert "\n" not in message
    assert "SENT" not in message
    dicom.read_patient(bytes(damaged))
