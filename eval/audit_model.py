"""Does a model that somebody trained give back its training images? The whole job in order, without training anything.

Deduplicate SRC, adopt the model and its base as two runs, ask both for the same captions under the same seeds, set the
thresholds, attack, report. Every step is the library function of its own verb and resumes by itself. In: SRC, the
dataset that the model saw. Out: DIR/out (the dedup run), DIR/model and DIR/base (the runs), DIR/summary.json and
DIR/report/index.html.

    unmemorize audit-model MODEL --data SRC -o DIR
    unmemorize audit-model --base PATH --lora STYLE.safetensors --data SRC -o DIR
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dedup import manifest
from dedup.options import Options, resolve_auto
from dedup.pipeline import deduplicate
from dedup.report import write_report as write_dedup_report
from defense.adopt import adopt
from eval.budget import generate_within
from eval.controls import calibrate_runs
from eval.denoiser import DenoiserError
from eval.detectors import detect
from eval.extraction import attack, clique_threshold, read_generations
from eval.generate import generate, list_asked
from eval.labels import write_labels
from eval.reference import TargetError
from eval.stats import risk_difference
from eval.summary import count_by_caption, describe_scores, summarise_scores

CONTROLS = "controls"  # in DIR: the dedup run over pictures that the model never saw


class AuditModelError(ValueError):
    """What is to be audited is not said, or said twice."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is audited, and the one that it was made from."""

    model: str  # pipeline folder or name on the hub
    loras: tuple[Path, ...] = ()  # merged into `model`
    base: str | None = None  # asked the same as a control
    pickled: tuple[str, ...] = ()
    resolution: int | None = None


@dataclass(frozen=True, slots=True)
class Asking:
    """How both models are asked."""

    n: int = 16
    guidance_scale: float = 7.5
    steps: int = 50
    limit: int = 200
    captions: str = "all"
    order: str = "stratified"

    @property
    def evaluations(self) -> int:
        """Of the denoiser, an image."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)


def name_subject(
    model: str | None,
    base: str | None,
    loras: Sequence[Path],
    pickled: Sequence[str] = (),
    resolution: int | None = None,
) -> Subject:
    """MODEL, or a base with LoRAs, which is its own control without them. Raises AuditModelError."""
    if model is None and (base is None or not loras):
        raise AuditModelError("name the model: MODEL, or --base PATH with --lora FILE")
    if model is None:
        assert base is not None
        return Subject(base, tuple(loras), base, tuple(pickled), resolution)
    return Subject(model, tuple(loras), base, tuple(pickled), resolution)


def prepare(
    subject: Subject, src: Path, directory: Path, controls: Path | None = None, jobs: int = 0
) -> tuple[Path, dict[str, Path]]:
    """Deduplicate SRC (or take SRC, if it is a dedup run) and adopt the models: OUT, and the run of each."""
    with _stage("deduplicate"):
        out = _deduplicate(src, directory / "out", jobs)
        if controls is not None:
            _deduplicate(controls, directory / CONTROLS, jobs)
    with _stage("adopt"):
        options: dict[str, Any] = {"pickled": subject.pickled, "resolution": subject.resolution}
        runs = {"model": directory / "model"}
        adopt(subject.model, out, runs["model"], loras=subject.loras, **options)
        if subject.base is not None:
            runs["base"] = directory / "base"
            adopt(subject.base, out, runs["base"], **options)
    return out, runs


def _deduplicate(src: Path, out: Path, jobs: int) -> Path:
    if (src / "run.json").exists() and (src / "manifest").is_dir():
        return src.resolve()
    level, encoder = resolve_auto("auto", "auto", out)
    deduplicate(src, out, Options(level=level, encoder=encoder), jobs=jobs)
    write_dedup_report(out, jobs=jobs)
    return out


def find_controls(directory: Path, controls: Path | None) -> Path | None:
    if controls is None:
        return None
    return controls if (controls / "run.json").exists() else directory / CONTROLS


def plan(runs: dict[str, Path], asking: Asking, controls: Path | None) -> dict[str, Any]:
    """What will be drawn, before anything is."""
    asked, _ = list_asked(runs["model"], controls=controls, prompts=None, **asdict(asking))
    targets = asked.unique("target_id", maintain_order=True)
    images = int(asked["numbers"].list.len().sum())
    kinds = dict(targets["prompt_kind"].value_counts().iter_rows())
    return {
        "targets": len(targets),
        "members": kinds.get("member", 0),
        "controls": kinds.get("control", 0),
        "captions": len(asked),
        "most_duplicated": max(targets["multiplicity"].to_list()),
        "models": len(runs),
        "images": images * len(runs),
        "evaluations": images * len(runs) * asking.evaluations,
        "asking": asdict(asking),
    }


def describe_plan(planned: dict[str, Any]) -> str:
    """For a terminal."""
    without = (
        ""
        if planned["controls"]
        else "\nNo controls: how often a match is false stays unknown. --controls SRC brings pictures it never saw."
    )
    return (
        f"{planned['members']:,} training images (the most frequent stands {planned['most_duplicated']:,} times) and "
        f"{planned['controls']:,} controls, {planned['captions']:,} captions, {planned['models']} "
        f"{'models' if planned['models'] > 1 else 'model'}: {planned['images']:,} images at most, "
        f"{planned['evaluations']:,} evaluations of the denoiser{without}"
    )


def audit_model(
    subject: Subject,
    src: Path,
    directory: Path,
    asking: Asking = Asking(),
    *,
    controls: Path | None = None,
    budget: bool = False,
    jobs: int = 0,
) -> dict[str, Any]:
    """Run the job; returns summary.json.

    src: the dataset, or a dedup run of it. controls: pictures with captions that the model never saw, or a dedup run of
    them. budget: draw by `budget.generate_within`. Raises what the steps raise, each in one line.
    """
    from eval.model_report import write_model_report

    clique_threshold(asking.n)  # refuses an n that no attack can use
    directory = directory.resolve()
    out, runs = prepare(subject, src, directory, controls, jobs)
    unseen = find_controls(directory, controls)
    planned = plan(runs, asking, unseen)
    manifest.write_json(directory / "plan.json", planned)
    print(describe_plan(planned), file=sys.stderr)
    detected: dict[str, Any] = {}
    with _stage("detect"):
        for name, run in runs.items():
            try:
                detected[name] = detect(run)
            except (DenoiserError, TargetError) as error:  # a detector that does not apply is no reason to stop
                detected[name] = {"reason": str(error)}
    with _stage("generate"):
        options = asdict(asking) | {"controls": unseen}
        spent = None
        if budget:
            pooled = bool(planned["controls"])
            spent = generate_within(list(runs.values()), pooled=pooled, **options)
        else:
            for run in runs.values():
                generate(run, **options)
    scores: dict[str, pl.DataFrame] = {}
    calibration = None
    if planned["controls"]:
        with _stage("calibrate"):
            calibration = _calibrate(list(runs.values()))
    with _stage("attack"):
        for name, run in runs.items():
            scores[name] = attack(run)
    summary: dict[str, Any] = {
        "subject": _plain(asdict(subject)),
        "out": str(out),
        "runs": {name: str(run) for name, run in runs.items()},
        "plan": planned,
        "budget": spent,
        "models": {
            name: summarise_scores(table, count_by_caption(read_generations(runs[name]), table))
            for name, table in scores.items()
        },
        "over_base": compare_with_base(scores) if "base" in scores else None,
        "to_label": len(scores["model"]["best_file"].drop_nulls()),
        "detectors": detected,
        "false_matches": calibration,
    }
    if summary["to_label"]:
        write_labels(runs["model"], runs["model"] / "review")
    manifest.write_json(directory / "summary.json", summary)
    with _stage("report"):
        write_model_report(directory)
    return summary


def _calibrate(runs: list[Path]) -> dict[str, Any] | None:
    """False matches by the controls; kept from an earlier run of the command, when the scores are there already."""
    path = runs[0] / "calibration.json"
    if path.exists() and (known := manifest.read_json(path).get("controls")) is not None:
        return known
    return calibrate_runs(runs).controls


def compare_with_base(scores: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """Training images that the model gives back and the base does not, over the same prompts and seeds."""
    members = {name: table.filter(prompt_kind="member") for name, table in scores.items()}
    both = members["model"].select("target_id", model="extracted").join(
        members["base"].select("target_id", base="extracted"), on="target_id"
    )  # fmt: skip
    only_model, only_base = len(both.filter("model", ~pl.col("base"))), len(both.filter("base", ~pl.col("model")))
    return asdict(risk_difference(only_model, only_base, len(both))) | {
        "only_model": only_model,
        "only_base": only_base,
        "both": len(both.filter("model", "base")),
    }


def describe(summary: dict[str, Any]) -> str:
    """summary.json for a terminal."""
    lines = []
    for name, found in summary["models"].items():
        table = describe_scores(found, "the model" if name == "model" else "its base").split("\n")
        lines += table if name == list(summary["models"])[-1] else table[:-1]
    if (gap := summary["over_base"]) is not None:
        lines.append(
            f"Over its base, same prompts and seeds: {gap['estimate']:+.1%} ({gap['low']:+.1%} … {gap['high']:+.1%}), "
            f"{gap['only_model']:,} from the model alone, {gap['only_base']:,} from the base alone"
        )
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def _stage(name: str) -> Iterator[None]:
    print(f"── {name}", file=sys.stderr)
    yield
