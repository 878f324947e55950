"""Verbs of `defense`: parse → call → print. torch and polars are imported only when a command runs."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

ARMS = "raw, refill, dedup, dedup-exposure, random-drop, reweighted, oracle or hash"
OURS = ("dedup", "defense", "eval")
GuardOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=NUMBER]", help="Defence at sampling (docs/training.md), such as copy; may be repeated."
    ),
]


class MissingExtraError(ValueError):
    """A command needs packages of an extra that is not installed."""


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turn a failed import in the body into one line that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in OURS:
            raise
        what = f"{error.name} is not installed: pip install 'unmemorize[{extra}]'"
        raise MissingExtraError(what) from error


@app.callback()
def main() -> None:
    """Train small diffusion models on what `unmemorize dedup` found."""


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Folder made by `unmemorize dedup`.")],
    arm: Annotated[str, typer.Option(help=f"What to train on: {ARMS}.")],
    config: Annotated[Path, typer.Option(help="TOML file, such as configs/tiny.toml.")],
    run: Annotated[Path, typer.Option("--run", "-o", help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides initial weights, order and noise.")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="Captions drawn at the end, for RUN/samples/index.html.")] = 8,
) -> None:
    """Train a small text-to-image model on one arm of a deduplicated dataset.

    The same command goes on where an interrupted run stopped, and does nothing when it is finished.

        unmemorize train OUT --arm raw --config configs/tiny.toml -o runs/raw-0
    """
    with require_extra("train"):
        from defense import train as training
        from defense.config import load_config

        training.train(out, arm, load_config(config), run, seed)
        if samples and os.environ.get("RANK", "0") == "0":  # of several processes the first one
            from defense.sample import sample_trained
            from defense.sheet import write_sheet

            sample_trained(out, run, samples)
            write_sheet(run / "samples")
    typer.echo(run / "model")


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder made by `unmemorize train` or `adopt`.")],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line, or a table with a column prompt.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images a prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Decides the noise.")] = 0,
    guard: GuardOption = None,
    guidance_scale: Annotated[float, typer.Option(help="1 = no classifier-free guidance.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 15,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Default: RUN/samples.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw images from a model, if you like behind a guard: PNG files, a table, and a page to look at.

    unmemorize sample RUN --prompt "a red fox" --guard copy
    """
    with require_extra("train"):
        from defense.sample import count, read_prompts, sample_run
        from defense.sheet import write_sheet

        asked = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        folder, guards = out or run / "samples", guard or ()
        table = sample_run(
            run, asked, folder, n=n, seed=seed, guidance_scale=guidance_scale, steps=steps, guards=guards
        )
        page = write_sheet(folder)
    counts = count(table)
    text = f"{counts['images']} images for {counts['prompts']} prompts: {counts['refused']} refused as copies, "
    text += f"{counts['redrawn']} drawn again, {counts['nan']} not finite.\nSheet: {page}"
    typer.echo(json.dumps(counts) if json_ else text)


@app.command()
def adopt(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Pipeline folder, or its name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder made by `unmemorize dedup`.")],
    run: Annotated[Path, typer.Option("--run", "-o", help="Folder to write.")],
    lora: Annotated[list[Path] | None, typer.Option(help="LoRA to merge into it; may be repeated.")] = None,
    pickled: Annotated[list[str] | None, typer.Option(help="Pickled weights to trust, by name.")] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Of its images, if it does not say.")] = None,
) -> None:
    """Take a model that somebody else trained as a RUN: to draw from it, and attack it.

    unmemorize adopt stable-diffusion-v1-5/stable-diffusion-v1-5 OUT -o runs/base
    """
    with require_extra("train"):
        from defense.adopt import adopt as adopt_model

        adopt_model(model, out, run, loras=lora or (), pickled=pickled or (), resolution=resolution)
    typer.echo(run / "model")


@app.command()
def extrapolate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder made by `train` or `adopt`.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="Another run, pipeline folder or name on the hub.")],
    new: Annotated[Path, typer.Option("--run", "-o", help="Folder to write.")],
    weight: Annotated[float, typer.Option(help="How far from BASE: 0 is BASE, 1 is RUN.")] = 3.0,
) -> None:
    """Go from one model through another and beyond, as a RUN: what the second learned comes out more.

    RUN fine-tuned from BASE gives back what it was fine-tuned on; raw and refilled, what duplication added.

        unmemorize extrapolate runs/raw-0 runs/refill-0 -o runs/line-0
    """
    with require_extra("train"):
        from defense.adopt import extrapolate as extrapolate_runs

        extrapolate_runs(run, base, new, weight)
    typer.echo(new / "model")
