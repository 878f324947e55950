"""What does our training loop cost over a bare one? And what does a run of each arm need?

    python benchmarks/train_speed.py overhead [--rounds 12]
    python benchmarks/train_speed.py arms OUT [--config configs/tiny-base.toml] [--steps 200]

overhead: steps of `training_loop` with the log of a run, and of ten lines that draw noise and rows, go through the same
U-Net and step AdamW, in turn, in processor time of one thread; medians. The bare loop has no captions that change and
no reproducible order; once it clips the gradient and averages the weights as the recipe wants, once not even that. A
checkpoint is timed alone and shared out.
arms: `unmemorize train` for some steps of every arm of OUT, one process after the other: images a second of processor
time while it trains, seconds before that (imports, decoding, encoding), peak memory.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import DDPMScheduler
from torch.nn import functional as F

from dedup import manifest
from defense.arms import ARMS
from defense.checkpoint import save_checkpoint
from defense.conditions import embed_captions
from defense.config import TrainConfig, load_config
from defense.data import Examples
from defense.loop import training_loop
from defense.train import build_pipeline

app = typer.Typer(no_args_is_help=True)
BLOCK = 20  # steps of the one, then of the other
ROWS = 600


def make_examples(pipeline: Any) -> Examples:
    """Noise as latents, with one caption each."""
    unet = pipeline.unet.config
    conditions = embed_captions(pipeline, [f"drawing number {row}" for row in range(ROWS)])
    latents = torch.randn(ROWS, unet.in_channels, unet.sample_size, unet.sample_size)
    rows = torch.arange(ROWS)
    return Examples(latents, conditions, caption_ids=rows + 1, first=rows, count=torch.ones_like(rows))


def train_ours(pipeline: Any, examples: Examples, config: TrainConfig, log: Path) -> Iterator[None]:
    """As `defense.train.fit`, with its log; at the end the seconds of a checkpoint are in `log` + `.seconds`."""
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    weights = dict(unet.named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), config.learning_rate, fused=True)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    with log.open("w") as lines:
        for done in training_loop(unet, weights, average, optimizer, schedule, examples, config, 0):
            lines.write(json.dumps({"step": done.step, "loss": done.loss}) + "\n")
            yield
            if done.step == config.steps - 1:
                start = time.process_time()
                save_checkpoint(log.with_suffix(".safetensors"), done.step, weights, average, optimizer, {})
                log.with_suffix(".seconds").write_text(str(time.process_time() - start))


def train_bare(pipeline: Any, examples: Examples, config: TrainConfig, same: bool) -> Iterator[None]:
    """same: with the clipped gradient and the average of the weights."""
    unet = pipeline.unet.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(unet.parameters(), config.learning_rate, fused=True)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents, tokens = examples.latents, examples.conditions.tokens
    weights = [weight.detach() for weight in unet.parameters()]
    average = [weight.clone() for weight in weights]
    for _ in range(config.steps):
        rows = torch.randint(ROWS, (config.batch_size,))
        x, timesteps = latents[rows], torch.randint(1000, (config.batch_size,))
        noise = torch.randn_like(x)
        noisy = schedule.add_noise(x, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, timesteps, encoder_hidden_states=tokens[rows], return_dict=False)[0]
        F.mse_loss(prediction, schedule.get_velocity(x, noise, timesteps)).backward()
        if same:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if same:
            torch._foreach_lerp_(average, weights, 1 - config.ema_decay)
        yield


def measure(loop: Iterator[None]) -> float:
    """Processor seconds of one step."""
    start = time.process_time()
    for _ in range(BLOCK):
        next(loop)
    return (time.process_time() - start) / BLOCK


@app.command()
def overhead(
    config: Annotated[Path, typer.Option(help="What is trained, and how.")] = Path("configs/tiny.toml"),
    rounds: Annotated[int, typer.Option(help=f"Of {BLOCK} steps each.")] = 12,
) -> None:
    """Our loop against a bare one."""
    torch.set_num_threads(1)
    chosen = replace(load_config(config), steps=BLOCK * (rounds + 1) + 1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "train.jsonl"
        pipelines = [build_pipeline(chosen, 0)[0] for _ in range(3)]
        examples = make_examples(pipelines[0])
        ours = train_ours(pipelines[0], examples, chosen, log)
        others = [train_bare(pipelines[1 + same], examples, chosen, same=bool(same)) for same in range(2)]
        for loop in (ours, *others):
            measure(loop)  # the first steps make room for what the others use
        rows = [[measure(loop) for loop in (ours, *others)] for _ in range(rounds)]
        next(ours, None)
        shared = float(log.with_suffix(".seconds").read_text()) / chosen.checkpoint_every
    for name, column in (("bare", 1), ("bare, clipped and averaged", 2)):
        ratios = [(row[0] + shared) / row[column] - 1 for row in rows]
        mine, other = (median(row[place] for row in rows) for place in (0, column))
        print(
            f"a step of {chosen.batch_size}: ours {mine * 1e3:.1f} ms + {shared * 1e3:.2f} of checkpoints, {name} ",
            end="",
        )
        print(f"{other * 1e3:.1f} ms; overhead {median(ratios):.1%} ({min(ratios):.1%} … {max(ratios):.1%})")


@app.command()
def arms(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A planted dataset, deduplicated.")],
    config: Annotated[Path, typer.Option(help="What is trained, and how.")] = Path("configs/tiny-base.toml"),
    steps: Annotated[int, typer.Option(help="Of each arm.")] = 200,
) -> None:
    """Time and memory of each arm."""
    chosen = load_config(config)
    print("| arm | steps of a whole run | images/s | ms a step | before the first step, s | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "config.toml"
        lines = config.read_text().splitlines()
        kept = [line for line in lines if line.split("=")[0].strip() not in ("steps", "checkpoint_every")]
        short.write_text("\n".join([*kept, f"steps = {steps}", "checkpoint_every = 1000000"]))
        for arm in ARMS:
            run = Path(folder) / arm
            program = str(Path(sys.executable).parent / "unmemorize")
            command = [program, "train", str(out), "--arm", arm, "--config", str(short), "-o", str(run)]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                sys.exit(f"{' '.join(command)} failed")
            timings, record = manifest.read_json(run / "timings.json"), manifest.read_json(run / "config.json")
            whole = round(record["steps_of_arm"] / steps * chosen.steps)
            busy, done = timings["processor"], timings["steps"]
            before = usage.ru_utime + usage.ru_stime - busy
            cells = [whole, f"{done * chosen.batch_size / busy:.1f}", f"{busy / done * 1e3:.1f}", f"{before:.1f}"]
            print(f"| {arm} | {' | '.join(map(str, cells))} | {usage.ru_maxrss // 1024} |", flush=True)


if __name__ == "__main__":
    app()
