"""What does each training defence buy on a small model, and what does it cost? One model a method and seed.

    python benchmarks/defences.py DIR [--seeds 3] [--only none --only cap] [--steps 500]

Planted drawings for every seed: canaries at multiplicities 0, 8 and 32 among single images, the copies of a canary
under twenty phrasings of its caption. All methods train the arm raw with equal seeds and steps, so that what differs is
the method alone; `deduplicate` trains the arm dedup, as a yardstick, and fewer steps are the simplest defence of all.
Every model draws 16 images for the original caption of every canary and control (attack: clique). Its quality is the
loss on images that stand once, and on images that nobody trained on. Every result is a file in DIR/results, and the
same command goes on after a kill. Prints the table of docs/benchmarks.md of the results there are.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from diffusers import DDPMScheduler

from dedup import manifest
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.plant import plant
from dedup.sources.demo import render_demo
from defense.batches import draw_batch
from defense.config import TrainConfig
from defense.data import build_examples, read_spare
from defense.loop import choose_layout, pose, predict
from defense.model import load_pipeline
from defense.processes import CPU
from defense.train import train
from eval.extraction import attack
from eval.generate import generate

LEVELS = (0, 8, 32)
HELD_OUT = 64  # images that the quality is measured on, each at as many timesteps
# As people rephrase captions; the first is the caption itself.
PHRASES = (
    *("{}", "a drawing of {}", "{}, flat colours", "an icon: {}", "picture of {}", "{}, vector art", "emoji of {}"),
    *("{} on white", "simple {}", "sticker, {}", "{}, line art", "a small {}", "cartoon {}", "pictogram of {}"),
    *("{} symbol", "clip art of {}", "{}, outlined", "sign showing {}", "{}, clean design", "one {}"),
)
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "several captions (MC)": {"captions": "all"},
    "cap 4": {"weight_cap": 4},
    "weight 1/√m": {"weight_power": 0.5},
    "random tokens (RT)": {"caption_perturbation": "random-tokens", "perturbation_share": 0.4},
    "repeated words (CWR)": {"caption_perturbation": "repeat-words", "perturbation_share": 0.4},
    "random numbers (RNA)": {"caption_perturbation": "random-numbers", "perturbation_share": 0.4},
    "random caption (RC)": {"caption_perturbation": "random-caption", "perturbation_share": 0.4},
    "Gaussian noise (GN)": {"embedding_noise": 0.1},
    "noise threshold (Wen)": {"magnitude_percentile": 90.0, "magnitude_steps": 50},
    "DP-SGD, ε = 10": {"dp_epsilon": 10.0},
    "half the steps": {},
    "a quarter of the steps": {},
    "deduplicate": {},
}
FEWER = {"half the steps": 2, "a quarter of the steps": 4}  # so many times


def make_dataset(directory: Path, seed: int) -> Path:
    """A dedup run over planted drawings, whose copies are then said in other words."""
    out, planted = directory / f"dedup-{seed}", directory / f"planted-{seed}"
    if (out / "rephrased").exists():
        return out
    render_demo(directory / "drawings")
    plant(
        *(directory / "drawings", planted),
        canaries=12,
        controls=12,
        multiplicities=LEVELS,
        fillers=100,
        spare=HELD_OUT,
        edited=0.0,
        seed=seed,
    )
    deduplicate(planted, out, Options(level="hash"), jobs=1)
    rows = manifest.read(out)
    copies = pl.read_parquet(out / "plant.parquet").drop_nulls("key").select("key", "canary")
    rows = rows.join(copies, on="key", how="left", maintain_order="left").with_columns(
        number=pl.int_range(pl.len()).over("canary") % len(PHRASES)
    )
    captions = [
        row["caption"] if row["canary"] is None else PHRASES[row["number"]].format(row["caption"])
        for row in rows.select("caption", "canary", "number").iter_rows(named=True)
    ]
    manifest.write(out, rows.with_columns(caption=pl.Series(captions)).drop("canary", "number"))
    (out / "rephrased").touch()
    return out


@torch.no_grad()
def measure_quality(run: Path, out: Path) -> dict[str, float]:
    """Mean loss on single images of the training data, and on images that no model was trained on, with their captions.

    Equal noise for all models.
    """
    pipeline, src = load_pipeline(run / "model"), Path(manifest.read_run(out)["src"])
    copies = pl.read_parquet(out / "plant.parquet").drop_nulls("key").select("key")
    single = manifest.read(out).join(copies, on="key", how="anti", maintain_order="left").head(HELD_OUT)
    spare = read_spare(src)
    assert spare is not None
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    found = {}
    for name, rows in {"single": single, "unseen": spare}.items():
        rows = rows.with_columns(captions=pl.concat_list("caption"), weight=1.0, sha256=pl.lit(None, pl.String))
        examples = build_examples(rows, src, pipeline, resolution=32)
        config, places = TrainConfig(batch_size=len(rows), null_caption=0.0), torch.arange(len(rows))
        losses = []
        for step in range(4):
            batch = draw_batch(examples, config, 0, step, schedule.config.num_train_timesteps)
            noisy, target = pose(schedule, examples, batch, places, CPU, choose_layout(config))
            prediction = predict(pipeline.unet, noisy, batch.timesteps, batch.told.select(places, CPU), "float32")
            losses.append((prediction - target).square().mean().item())
        found[name] = float(np.mean(losses))
    return found


def measure(directory: Path, method: str, seed: int, config: TrainConfig) -> dict[str, Any]:
    """What one model gives back, and what it is worth; nothing is done twice."""
    name = "".join(letter if letter.isalnum() else "-" for letter in method)
    path, run = directory / "results" / f"{name}-{seed}.json", directory / f"run-{name}-{seed}"
    if path.exists():
        return manifest.read_json(path)
    out = make_dataset(directory, seed)
    arm = "dedup" if method == "deduplicate" else "raw"
    chosen = replace(config, steps=config.steps // FEWER.get(method, 1), **{"captions": "one"} | METHODS[method])
    train(out, arm, chosen, run, seed)
    seconds = manifest.read_json(run / "timings.json")["processor"]  # of the training, whoever ran it
    generate(run)
    scores = attack(run)
    levels = {
        str(m): [int(rows["extracted"].sum()), len(rows), float(rows["best_distance"].mean())]
        for m in LEVELS
        if len(rows := scores.filter(multiplicity=m))
    }
    result = {"method": method, "seed": seed, "levels": levels, "seconds": seconds, "loss": measure_quality(run, out)}
    path.parent.mkdir(exist_ok=True)
    manifest.write_json(path, result)
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    print("| method | planted 32 times | 8 times | never | distance (32) | loss, single | loss, unseen | processor s |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        mine = sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"])
        if not mine:
            continue
        cells = []
        for level in ("32", "8", "0"):
            found, n = ([r["levels"][level][i] for r in mine] for i in range(2))
            cells.append(f"{sum(found)} of {sum(n)} ({', '.join(map(str, found))})")
        cells.append(f"{np.mean([r['levels']['32'][2] for r in mine]):.3f}")
        cells += [f"{np.mean([r['loss'][kind] for r in mine]):.3f}" for kind in ("single", "unseen")]
        cells.append(f"{np.mean([r['seconds'] for r in mine]):.0f}")
        print(f"| {method} | {' | '.join(cells)} |")


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Working folder.")],
    seeds: Annotated[int, typer.Option(help="Training seeds, each with its own planting.")] = 3,
    steps: Annotated[int, typer.Option(help="Of training.")] = 500,
    width: Annotated[int, typer.Option(help="Channels of the first level of the U-Net; the tiny model has 64.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="Methods that start so; may be repeated.")] = None,
) -> None:
    directory = directory.resolve()
    config = TrainConfig(steps=steps, channels=(width, 2 * width), checkpoint_every=200)
    for seed in range(seeds):
        for method in METHODS:
            if only is None or any(method.startswith(start) for start in only):
                measure(directory, method, seed, config)
    print_table([manifest.read_json(path) for path in sorted((directory / "results").glob("*.json"))])


if __name__ == "__main__":
    typer.run(main)
