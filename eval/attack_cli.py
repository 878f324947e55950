"""The verbs that attack a run of `defense`, and those that prepare it: parse → call → print.

Whole jobs, comparisons and the program itself are in `cli`.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import dedup.cli
import defense.cli

app = typer.Typer()

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder made by `unmemorize train`.")]


@app.command()
def generate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Runs of `train` or `adopt`, to be asked alike.")],
    n: Annotated[int, typer.Option("-n", help="Images a training image.")] = 16,
    guidance_scale: Annotated[float, typer.Option(help="1 = no classifier-free guidance.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 15,
    prompts: Annotated[Path | None, typer.Option(help="CSV with target_id and prompt, to attack with.")] = None,
    captions: Annotated[str, typer.Option(help="Of each cluster: all, survivor, dropped or null.")] = "all",
    limit: Annotated[int, typer.Option(help="Targets of a dataset without canaries, and controls.")] = 200,
    order: Annotated[str, typer.Option(help="Which of them: stratified or most-duplicated.")] = "stratified",
    controls: Annotated[
        Path | None, typer.Option(metavar="OUT", help="A dedup run over pictures that no model was trained on.")
    ] = None,
    guard: defense.cli.GuardOption = None,
    null: Annotated[int, typer.Option(min=0, help="Images for the empty caption, compared with all targets.")] = 0,
    budget: Annotated[bool, typer.Option("--budget", help="Only as many images as the verdict needs.")] = False,
    detector: Annotated[str, typer.Option(help="With --budget: what chooses prompts, or none.")] = "draft",
    until: Annotated[str, typer.Option(help="With --budget: extracted or direct settles a prompt.")] = "extracted",
    pooled: Annotated[
        bool, typer.Option("--calibrate", help="With --budget: all images of controls first, thresholds by them.")
    ] = False,
    engine: dedup.cli.EngineOption = "local",
    address: dedup.cli.AddressOption = None,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Draw images for the captions of all targets, with the same noise in every model.

    unmemorize generate RUN_A RUN_B --budget -n 128
    """
    where = dedup.cli.choose_address(engine, address)
    if budget and where:
        raise typer.BadParameter("--budget decides after each round what all runs draw next: --engine local does that")
    with defense.cli.require_extra("train"):
        options: dict[str, Any] = {"n": n, "guidance_scale": guidance_scale, "steps": steps, "prompts": prompts}
        options |= {"captions": captions, "limit": limit, "order": order, "controls": controls, "guards": guard or ()}
        unasked: Callable[[Path], Any] | None = None
        if null:
            from eval.unprompted import draw_unprompted

            unasked = partial(draw_unprompted, n=null, guidance_scale=guidance_scale, steps=steps, guards=guard or ())
        if budget:
            from eval.budget import describe, generate_within
            from eval.rule import Rule

            if unasked:
                for run in runs:
                    unasked(run)
            rule = Rule(detector=None if detector == "none" else detector, until=until)
            about = generate_within(runs, rule, pooled=pooled, **options)
            typer.echo(json.dumps(about) if json_ else describe(about))
            return
        from eval.generate import generate_runs

        for run, counts in zip(runs, generate_runs(runs, where, unasked, **options), strict=True):
            text = f"{counts['images']} images for {counts['prompts']} training images: {run / 'generations.parquet'}"
            if counts["refused"]:
                text += f"\n{counts['refused']} were refused as copies of training images: {run / 'guards.parquet'}"
            typer.echo(json.dumps(counts) if json_ else text)


@app.command()
def detect(
    run: RunArgument,
    detector: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Which ones; all by default.")] = None,
    n: Annotated[int, typer.Option("-n", help="Noises a prompt.")] = 4,
    at_least: Annotated[int, typer.Option(help="How often a memorised image stands.")] = 2,
    limit: Annotated[int, typer.Option(help="Prompts of either kind.")] = 1_000,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Which prompts are memorised, by the noise predicted for them: no image is drawn.

    Says how well each detector tells captions of images that stand often in the data from others.

        unmemorize detect RUN --detector noise-magnitude
    """
    with defense.cli.require_extra("train"):
        from eval.detectors import DETECTORS, describe
        from eval.detectors import detect as run_detectors

        summary = run_detectors(run, detector or list(DETECTORS), n=n, at_least=at_least, limit=limit)
    typer.echo(json.dumps(summary) if json_ else describe(summary, run))


@app.command()
def calibrate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Runs with generations that are to be compared.")],
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Set the thresholds by prompts that no model was trained on, before `attack`: how often is a match false?

    unmemorize calibrate RUN_A RUN_B
    """
    from dataclasses import asdict

    from eval.controls import calibrate_runs, describe_calibration

    calibration = calibrate_runs(runs)
    typer.echo(json.dumps(asdict(calibration)) if json_ else describe_calibration(calibration))


@app.command()
def attack(
    run: RunArgument,
    attack: Annotated[str, typer.Option(metavar="NAME", help="clique, adaptive, template or replication.")] = "clique",
    encoder: Annotated[str, typer.Option(help="Of replication: sscd-distilled or sscd.")] = "sscd-distilled",
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Score the generated images: which training images came back, and how often that happens by chance."""
    with defense.cli.require_extra("eval"):
        from dedup import manifest
        from eval.extraction import attack as run_attack
        from eval.summary import describe_scores
        from eval.unprompted import score_unprompted

        run_attack(run, attack, encoder=encoder)
        if attack == "clique":
            score_unprompted(run)
        summary = manifest.read_json(run / f"attack-{attack}.json")
    where = f"details: {run}/attack-{attack}.json, scores: {run}/scores-{attack}.parquet"
    typer.echo(json.dumps(summary) if json_ else f"{describe_scores(summary, attack)}\n{where}")


@app.command()
def probe(
    run: RunArgument,
    start: Annotated[str, typer.Option(help="Where the search begins: caption or random.")] = "caption",
    n: Annotated[int, typer.Option("-n", help="Images a target.")] = 4,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 15,
    limit: Annotated[int, typer.Option(min=1, help="Training images, the most duplicated; as many controls.")] = 20,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Hidden or gone? Search for what the model must be told to give each training image back.

    Such a search can make a model draw what it never saw: what counts is the difference from the controls.

        unmemorize probe RUN --start random
    """
    with defense.cli.require_extra("train"):
        from dedup import manifest
        from eval.probe import probe as probe_model
        from eval.summary import describe_scores

        probe_model(run, start=start, n=n, steps=steps, limit=limit)
        summary = manifest.read_json(run / "attack-probe.json")
    where = f"details: {run}/attack-probe.json, scores: {run}/scores-probe.parquet"
    typer.echo(json.dumps(summary) if json_ else f"{describe_scores(summary, 'probe')}\n{where}")


@app.command()
def membership(
    run: RunArgument,
    n: Annotated[int, typer.Option("-n", min=1, help="Noises a picture.")] = 4,
    limit: Annotated[int, typer.Option(min=1, help="Pictures of either kind, if none were planted.")] = 1_000,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Can the model tell pictures that it was trained on from others of the same kind? No image is drawn.

    Members against canaries that were never planted, or what training held out. A sensitive sign of what changed
    between two models; no proof of copying.

        unmemorize membership RUN
    """
    with defense.cli.require_extra("train"):
        from eval.membership import describe
        from eval.membership import infer_membership as infer

        summary = infer(run, n=n, limit=limit)
    typer.echo(json.dumps(summary) if json_ else describe(summary, run))
