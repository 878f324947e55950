"""How good the images of each arm are: KID against images that no model was trained on.

In: runs, and the held-out images of their dataset. Out: RUN/utility.npz, and the part `utility` of verdict.json.
The margin that an arm may lose is fixed beforehand. Features are those of a named encoder, never called FID: numbers of
two extractors are not comparable. Knows nothing of attacks.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
from scipy import stats as scipy_stats

from dedup import embedding, images, manifest, sources
from eval.contrasts import CHECKPOINTS, LEVEL
from eval.generate import BATCH, derive_seed, digest_model, read_config
from eval.metrics import kid, kid_difference
from eval.recipe import Sampling, Utility
from eval.verdict import POWER

FEATURES = "utility.npz"
HELD_OUT = "held-out"  # folder of a planted dataset
FEWEST = 1_000  # held-out images without which nothing is claimed
LITTLE = 64  # pictures through the encoder at a time


def measure_utility(run: Path, utility: Utility, sampling: Sampling) -> None:
    """Draw one image for the caption of every held-out one; write the features of both to RUN/utility.npz.

    Nothing with `images = 0`, or when it is there. Raises EncoderError, OSError or ValueError.
    """
    if not utility.images:
        return
    config = read_config(run)
    settings = {"guidance_scale": sampling.guidance_scale, "steps": sampling.steps, "images": utility.images}
    meta = json.dumps([digest_model(run / "model", settings), utility.extractor])
    path = run / FEATURES
    if path.exists():
        with np.load(path, allow_pickle=False) as before:
            if str(before["meta"]) == meta:
                return
    side = config["config"]["resolution"]
    keys, captions, pictures = read_held_out(Path(config["out"]), utility.images, side, config["config"]["held_out"])
    drawn = draw(run, captions, [derive_seed(key, 0) for key in keys], sampling, config["config"])
    encoder = embedding.resolve(utility.extractor)
    found = {name: encode(encoder, pixels) for name, pixels in (("drawn", drawn), ("held_out", pictures))}
    manifest.write_atomic(path, lambda temporary: _save(temporary, found | {"meta": np.array(meta)}))


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_held_out(out: Path, n: int, side: int, share: float) -> tuple[list[str], list[str], np.ndarray]:
    """Keys, captions and pixels uint8 (N, side, side, 3) of at most n images that no arm trains on.

    Of a planted dataset its folder `held-out`; of any other the components that training holds out.
    """
    src = Path(manifest.read_run(out)["src"])
    if (src / HELD_OUT).is_dir():
        shards = sources.list_shards(src / HELD_OUT)
        found = [(r.key, r.caption or "", r.data or b"") for shard in shards for r in sources.read_shard(shard)]
    else:
        from defense.data import hold_out  # takes seconds to import

        rows = manifest.read(out).filter(pl.col("status") == "ok")
        chosen = rows.filter(hold_out(rows, share) if share else pl.lit(False)).filter("keep").sort("sha256").head(n)
        place = ("shard", "offset", "size", "key")
        found = [
            (row["sha256"], row["caption"] or "", sources.read_image(src, *(row[name] for name in place)))
            for row in chosen.iter_rows(named=True)
        ]
    pixels = [images.square(images.decode(data).pixels, side) for _, _, data in found[:n]]
    return (
        [key for key, _, _ in found[:n]],
        [caption for _, caption, _ in found[:n]],
        np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8),
    )


def draw(run: Path, prompts: list[str], seeds: list[int], sampling: Sampling, config: dict[str, Any]) -> np.ndarray:
    """uint8 (N, R, R, 3): an image for each prompt, by the model of RUN."""
    import torch

    from dedup.engine import available_cpus
    from defense.model import load_pipeline
    from defense.sampling import sample

    torch.set_num_threads(config["threads"] or available_cpus())
    pipeline = load_pipeline(run / "model", device=config.get("device", "auto"))
    scale = sampling.guidance_scale
    return sample(pipeline, prompts, seeds, steps=sampling.steps, guidance_scale=scale, batch_size=BATCH)


def encode(encoder: embedding.Encoder, pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, R, R, 3) → float32 (N, D) with rows of length √D, so that the kernel of KID is (cosine + 1)³."""
    side = (encoder.side, encoder.side)
    parts = [
        encoder.encode(np.stack([cv2.resize(p, side, interpolation=cv2.INTER_LINEAR) for p in pixels[i : i + LITTLE]]))
        for i in range(0, len(pixels), LITTLE)
    ]
    features = np.concatenate(parts) if parts else np.empty((0, encoder.dimension), np.float32)
    return features * math.sqrt(encoder.dimension)


def judge_utility(runs: Sequence[Path], utility: Utility) -> dict[str, Any]:
    """KID of every run, and whether each arm loses less than the margin against raw. "not measured" where it is not."""
    if without := [run.name for run in runs if not (run / FEATURES).exists()]:
        reason = f"no {FEATURES} in {', '.join(without)}: set images = 1000 in [utility] of an audit's config"
        return {"measured": False, "reason": reason}
    found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for run in runs:
        config = read_config(run)
        with np.load(run / FEATURES, allow_pickle=False) as file:
            found[config["arm"], config["seed"]] = {name: file[name] for name in ("drawn", "held_out")}
    n = min(len(features["held_out"]) for features in found.values())
    extractor = f"{utility.extractor}, rows of unit length, pictures of the model's size enlarged"
    kinds = dict.fromkeys(arm for arm, _ in found)
    if n < 3:
        return {"measured": False, "reason": f"{n} held-out images with a caption", "extractor": extractor}
    each = []
    for (arm, seed), features in found.items():
        value = kid(features["drawn"], features["held_out"], extractor)
        each.append({"arm": arm, "seed": seed, "kid": value.estimate, "interval": [value.low, value.high]})
    return {
        "measured": True,
        "extractor": extractor,
        "n": n,
        "margin": utility.margin,
        "each": each,
        "against_raw": [judge_arm(arm, found, n, utility.margin) for arm in kinds if arm != "raw"],
        "scope": CHECKPOINTS,
    }


def judge_arm(arm: str, found: dict[tuple[str, int], dict[str, np.ndarray]], n: int, margin: float) -> dict[str, Any]:
    """Non-inferiority of one arm to raw: claimed when the interval of every seed ends below the margin."""
    seeds = [seed for name, seed in found if name == arm and ("raw", seed) in found]
    per_seed: list[dict[str, Any]] = []
    power: list[float] = []
    for seed in seeds:
        raw, mine = found["raw", seed], found[arm, seed]
        effect = kid_difference(raw["drawn"], mine["drawn"], raw["held_out"], LEVEL)
        z = scipy_stats.norm.ppf((1 + LEVEL) / 2)
        error = (effect.high - effect.estimate) / z
        power.append(float(scipy_stats.norm.cdf(margin / error - z)) if error > 0 else 1.0)
        per_seed.append({"seed": seed, "difference": effect.estimate, "interval": [effect.low, effect.high]})
    if n < FEWEST:
        claim, reason = "not measured", f"{n} held-out images; a claim needs {FEWEST:,}"
    elif per_seed and all(seed["interval"][0] > margin for seed in per_seed):
        claim, reason = "worse", f"loses more than {margin:g} of KID with every seed"
    elif not power or min(power) < POWER:
        claim, reason = "not measured", f"no power for a margin of {margin:g}"
    elif all(seed["interval"][1] < margin for seed in per_seed):
        claim, reason = "not worse", f"loses less than {margin:g} of KID with every seed"
    else:
        claim, reason = "not shown", f"may lose {margin:g} of KID or more"
    return {"arm": arm, "claim": claim, "reason": reason, "power": min(power, default=None), "per_seed": per_seed}
