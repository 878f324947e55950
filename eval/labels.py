"""What an attack found → a page on which a person labels it blind; labels → precision and recall of the attack.

In: RUN/scores-clique.parquet and its generations. Out: DIR/sample.json and the page DIR/index.html, as `review` makes
them for removals; the estimate. The page shows neither rank nor distance, nor which prompts are controls.
"""

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from dedup import gallery, manifest, marks, thumbnails
from dedup.options import list_versions
from eval.extraction import read_images
from eval.generate import read_config
from eval.precision import LEVEL, SampleError
from eval.reference import load_pixels
from eval.review import read_labels, write_page
from eval.stats import clopper_pearson

SCORES = "scores-clique.parquet"
SIDE = 384  # pixels that small pictures are enlarged to, each pixel a square
CUTS = (10, 25, 50, 100, 250, 500, 1000)


def rank_scores(scores: pl.DataFrame) -> pl.DataFrame:
    """Prompts with an image, the most suspicious first, as Carlini et al. 2023 rank them: by the mean distance within
    the clique; those without a clique behind, by the distance of the nearest generation to the target."""
    drawn = scores.filter(pl.col("best_file").is_not_null())
    tight = pl.when("clique_flag").then("clique_mean_distance")
    return drawn.sort(~pl.col("clique_flag"), tight, "best_distance", "target_id").with_row_index("rank", offset=1)


def write_labels(run: Path, folder: Path, *, n: int = 1_000, seed: int = 0) -> dict[str, Any]:
    """The page about the n highest prompts of RUN, in random order; returns sample.json.

    Raises SampleError when RUN was not attacked, TargetError or OSError.
    """
    run = run.resolve()
    config, scores, digest = _read_scores(run)
    top = rank_scores(scores).head(n)
    if top.is_empty():
        raise SampleError(f"{run} holds no generations that were scored: there is nothing to judge")
    top = top[np.random.default_rng(seed).permutation(len(top))]
    resolution = config["config"]["resolution"]
    originals = load_pixels(Path(config["out"]), top, resolution)
    made = (255 * read_images(run, top["best_file"], resolution)).round().astype(np.uint8)
    shown, pairs = [], []
    thumbs = folder / "thumbs"
    present = set(thumbs.glob("*/*.jpg"))
    used = set()
    for row, original, generation in zip(top.iter_rows(named=True), originals, made, strict=True):
        data = (run / row["best_file"]).read_bytes()
        ends = [
            {"sha256": row["sha256"], "shard": row["shard"], "key": row["key"]},
            {"sha256": hashlib.sha256(data).hexdigest(), "shard": None, "key": row["best_file"]},
        ]
        pairs.append({name: row[name] for name in ("target_id", "rank", "prompt_kind", "extracted", "direct")})
        pairs[-1] |= dict(zip("ab", ends, strict=True))
        sides = []
        for end, pixels, role in zip(ends, (original, generation), ("trained", "generated"), strict=True):
            path = _write_picture(thumbs, pixels)
            used.add(path)
            fields = dict.fromkeys(gallery.LISTED) | end | {"role": role, "caption": row["prompt"], "thumb": path.stem}
            fields |= {
                "width": resolution,
                "height": resolution,
                "size": row["size"] if role == "trained" else len(data),
            }
            sides.append([fields[name] for name in gallery.LISTED])
        shown.append(sides)
    for stale in present - used:
        stale.unlink()
    sample = {"version": marks.VERSION, "digest": digest, "review": {"n": n, "seed": seed}, "sample": pairs}
    told = {"run": run.name, "looked_at": len(top), "prompts": len(scores), "resolution": resolution}
    write_page(folder, "labels.html", sample, shown, None, told | {"versions": list_versions()})
    return sample


def _read_scores(run: Path) -> tuple[dict[str, Any], pl.DataFrame, str]:
    path = run / SCORES
    if not path.exists():
        raise SampleError(f"{run} was not attacked: run `unmemorize attack {run}` first")
    return read_config(run), pl.read_parquet(path), hashlib.sha256(path.read_bytes()).hexdigest()


def _write_picture(folder: Path, pixels: np.ndarray) -> Path:
    """A small picture is enlarged, so that JPEG and the browser leave its pixels as they are."""
    factor = max(1, SIDE // max(pixels.shape[:2]))
    large = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    name = hashlib.sha256(pixels.tobytes()).hexdigest()[: thumbnails.LARGE_NAME]
    path = folder / name[:2] / f"{name}.jpg"
    if not path.exists():
        manifest.write_atomic(path, partial(Path.write_bytes, data=thumbnails.encode_jpeg(large, max(large.shape[:2]))))
    return path


def judge_labels(run: Path, folder: Path, labels: Path) -> dict[str, Any]:
    """Precision and recall of the attack by the labels of the sample in `folder`.

    Recall is of the copies that the labeller saw: what lies below the n highest prompts counts nowhere. Unsure labels
    are left out of estimates; lower limits of precision take them as wrong, upper limits as right. Raises SampleError
    when there is no sample, or the labels or scores are of another one; MarksError.
    """
    sample, verdicts = read_labels(folder, labels, f"unmemorize review {run}")
    if _read_scores(run.resolve())[2] != sample["digest"]:
        raise SampleError(f"{run} has been attacked again since {folder} was made: label what it holds now")
    rows = pl.DataFrame([pair | {"label": verdicts.get(marks.pair_of(pair))} for pair in sample["sample"]])
    told = rows.filter(pl.col("label").is_not_null()).sort("rank")
    if told.is_empty():
        raise SampleError(f"{labels} labels nothing")
    copies = int((told["label"] == "copy").sum())
    found: dict[str, Any] = {"level": LEVEL, "shown": len(rows), "labelled": len(told), "copies": copies}
    found["near"] = len(told.filter(label="copy", extracted=False))
    found["false"] = len(told.filter(label="not-a-copy", extracted=True))
    found["controls"] = _count(told.filter(prompt_kind="control"), None)
    found["verdicts"] = {name: _count(told.filter(name), copies) for name in ("direct", "extracted")}
    cuts = [cut for cut in CUTS if cut < len(rows)] + [len(rows)]
    found["ranking"] = [{"top": cut} | _count(told.filter(pl.col("rank") <= cut), copies) for cut in cuts]
    wrong = told.filter(pl.col("label") != "copy")["rank"].min()
    sure = told if wrong is None else told.filter(pl.col("rank") < wrong)
    return found | {"copies_before_the_first_error": len(sure)}


def _count(rows: pl.DataFrame, copies: int | None) -> dict[str, Any]:
    """Labels of these rows; precision, and recall among so many copies, with Clopper and Pearson's intervals."""
    same, different, unsure = (int((rows["label"] == name).sum()) for name in ("copy", "not-a-copy", "undecided"))
    found: dict[str, Any] = {"labelled": len(rows), "same": same, "different": different, "undecided": unsure}
    low, high = clopper_pearson(same, len(rows), LEVEL).low, clopper_pearson(same + unsure, len(rows), LEVEL).high
    decided = same + different
    found["precision"] = {"estimate": same / decided if decided else None, "low": low, "high": high}
    if copies is not None:
        recall = clopper_pearson(same, copies, LEVEL)
        estimate = recall.estimate if copies and math.isfinite(recall.estimate) else None
        found["recall"] = {"estimate": estimate, "low": recall.low, "high": recall.high}
    return found


def describe_labels(found: dict[str, Any]) -> str:
    """For the terminal."""
    controls, first = found["controls"], found["copies_before_the_first_error"]
    lines = [
        f"{found['labelled']:,} of {found['shown']:,} labelled: {found['copies']:,} copies, {found['near']:,} of them "
        f"outside δ (near); {found['false']:,} called extracted are none",
        f"{controls['same']:,} of {controls['labelled']:,} controls look like copies",
        f"{'':<22} labelled  copies  {'precision':<26} recall among the copies seen",
    ]
    rows = [(f"verdict {name}", row) for name, row in found["verdicts"].items()]
    rows += [(f"top {row['top']:,}", row) for row in found["ranking"]]
    for name, row in rows:
        counts = f"{row['labelled']:>8,}  {row['same']:>6,}"
        lines.append(f"{name:<22} {counts}  {_say(row['precision']):<26} {_say(row['recall'])}")
    lines.append(
        f"In order of rank, {first:,} copies come before the first that is none. Intervals: {found['level']:.0%}."
    )
    return "\n".join(lines)


def describe_sample(sample: dict[str, Any], folder: Path) -> str:
    """For the terminal: what was drawn, and what to do with it."""
    return (
        f"{len(sample['sample']):,} prompts to label: {folder / 'index.html'}\n"
        "Then: unmemorize review RUN --labels labels.json"
    )


def _say(rate: dict[str, Any]) -> str:
    known = "?" if rate["estimate"] is None else f"{rate['estimate']:.1%}"
    return f"{known} ({rate['low']:.1%} … {rate['high']:.1%})"
