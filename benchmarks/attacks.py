"""What do the attacks that ask more of a model find? On the models of benchmarks/detectors.py, without training any.

    python benchmarks/attacks.py DIR [--seeds 3]

DIR holds raw-S, refill-S and base-S as benchmarks/detectors.py leaves them. For every seed: extrapolation from refill
through raw, the other way round, and from the base through raw; the residual probe, replication, membership. Prints the
tables of docs/benchmarks.md; whatever is there is not made again. Means over the seeds come with Student's t.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from dedup import manifest
from defense.adopt import extrapolate
from defense.model import load_pipeline
from eval import metrics, stats
from eval.extraction import attack, read_images
from eval.generate import generate
from eval.membership import SCORES, infer_membership, score_pictures
from eval.probe import STARTS, probe

ARMS = ("raw", "refill", "base")
WEIGHTS = (2.0, 3.0)
PROBED = 12  # most duplicated canaries, and controls


def find_runs(directory: Path, seeds: int) -> dict[str, list[Path]]:
    runs = {arm: [directory / f"{arm}-{seed}" for seed in range(seeds)] for arm in ARMS}
    return {arm: [run for run in mine if (run / "model").exists()] for arm, mine in runs.items()}


def score(run: Path, name: str) -> pl.DataFrame:
    """Scores of an attack on the plain generations of a run; nothing is done twice."""
    path = run / f"scores-{name}.parquet"
    if not (run / "generations.parquet").exists():
        generate(run)
    return pl.read_parquet(path) if path.exists() else attack(run, name)


def print_extrapolation(directory: Path, runs: dict[str, list[Path]]) -> None:
    print("\n### Extrapolation\n")
    print("| model | images planted twice or more | planted once | never planted | generations that match | per seed |")
    print("|---|---|---|---|---|---|")
    for arm in (arm for arm in ARMS[:2] if runs[arm]):
        print_extracted(arm, [score(run, "clique") for run in runs[arm]])
    pairs = list(zip(runs["raw"], runs["refill"], strict=False))
    for name, ends in {
        "refill → raw": pairs,
        "raw → refill": [(refill, raw) for raw, refill in pairs],
        "base → raw": [(raw, base) for raw, base in zip(runs["raw"], runs["base"], strict=False)],
    }.items():
        for weight in WEIGHTS if name == "refill → raw" else WEIGHTS[-1:]:
            tables = []
            for tuned, base in ends:
                new = directory / f"line-{tuned.name}-{base.name}-{weight:g}"
                if not (new / "model").exists():
                    extrapolate(tuned, str(base), new, weight)
                tables.append(score(new, "clique"))
            print_extracted(f"{name}, weight {weight:g}", tables)


def print_extracted(name: str, tables: list[pl.DataFrame]) -> None:
    rows = pl.concat(tables)
    cells = [count(rows.filter(some)) for some in (pl.col("multiplicity") >= 2, pl.col("multiplicity") == 1)]
    cells.append(count(rows.filter(multiplicity=0)))
    twice = rows.filter(pl.col("multiplicity") >= 2)
    made = int((twice["n_generations"] - twice["n_nan"]).sum())
    cells.append(f"{twice['matches'].sum()} of {made:,}")
    cells.append(", ".join(str(int(t.filter(pl.col("multiplicity") >= 2)["extracted"].sum())) for t in tables))
    print(f"| {name} | {' | '.join(cells)} |")


def count(rows: pl.DataFrame) -> str:
    if rows.is_empty():
        return "-"
    found = metrics.rate(int(rows["extracted"].sum()), len(rows))
    return f"{found.count} of {found.n} ({found.low:.0%} … {found.high:.0%})"


def print_probe(directory: Path, runs: dict[str, list[Path]]) -> None:
    print(f"\n### Residual probe: the {PROBED} most duplicated canaries and as many controls, 4 images each\n")
    print("| model, start | planted 8 to 64 times | never planted | generations that match: difference |")
    print("|---|---|---|---|")
    for start in STARTS:
        for arm in ARMS:
            tables = [probe_once(run, start) for run in runs[arm]]
            if tables:
                rows = pl.concat(tables)
                parts = (pl.col("multiplicity") > 0, pl.col("multiplicity") == 0)
                gaps = [share(table.filter(parts[0])) - share(table.filter(parts[1])) for table in tables]
                cells = " | ".join(count(rows.filter(some)) for some in parts)
                print(f"| {arm}, {start} | {cells} | {describe_mean(gaps)} |", flush=True)


def probe_once(run: Path, start: str) -> pl.DataFrame:
    kept = run / f"scores-probe-{start}.parquet"
    if not kept.exists():
        manifest.write_parquet(kept, probe(run, start=start, limit=PROBED))
    return pl.read_parquet(kept)


def share(rows: pl.DataFrame) -> float:
    """Of generations that match."""
    return float(rows["matches"].sum() / rows["n_generations"].sum())


def describe_mean(values: list[float]) -> str:
    each = ", ".join(f"{value:.3f}" for value in values)
    if len(values) < 2:
        return each
    mean = stats.t_interval(values)
    return f"{mean.estimate:.3f} ({mean.low:.3f} … {mean.high:.3f}; {each})"


def print_replication(directory: Path, runs: dict[str, list[Path]]) -> None:
    print("\n### Replication\n")
    summaries: dict[str, list[dict[str, Any]]] = {}
    for arm in (arm for arm in ARMS[:2] if runs[arm]):
        tables = [score(run, "replication") for run in runs[arm]]
        summaries[arm] = [manifest.read_json(run / "attack-replication.json")["similarity"] for run in runs[arm]]
        if arm == "raw":
            cuts = ", ".join(f"{table['similarity_cut'][0]:.3f}" for table in tables)
            print(f"Encoder: {tables[0]['encoder'][0]}; cut {cuts}\n")
            print("| model | extracted, planted twice or more | never planted | generations of another picture |")
            print("|---|---|---|---|")
        rows = pl.concat(tables)
        made = int((rows["n_generations"] - rows["n_nan"]).sum())
        cells = [count(rows.filter(pl.col("multiplicity") >= 2)), count(rows.filter(multiplicity=0))]
        print(f"| {arm} | {' | '.join(cells)} | {rows['wrong_matches'].sum()} of {made:,} |")
    figures = list(summaries["raw"][0]["training"])
    print(f"\n| similarity | {' | '.join(figures)} |\n|---|{'---|' * len(figures)}")
    for arm, mine in summaries.items():
        for group in ("members", "controls"):
            print(f"| {arm}, {group} | {' | '.join(describe_mean([s[group][f] for s in mine]) for f in figures)} |")
    mine = summaries["raw"]
    print(f"| training among itself | {' | '.join(describe_mean([s['training'][f] for s in mine]) for f in figures)} |")


def print_membership(directory: Path, runs: dict[str, list[Path]]) -> None:
    print("\n### Membership\n")
    found = {arm: [infer_once(run) for run in mine] for arm, mine in runs.items()}
    first = found["raw"][0]
    print(f"{first['members']} members, {first['others']} others a seed. AUC:\n")
    print("| score | raw | refill | base | raw, planted once | beats blind |\n|---|---|---|---|---|---|")
    for name in (*SCORES, "dataset", "jpeg-bytes"):
        areas = {arm: [s["scores"][name]["auc"]["estimate"] for s in mine] for arm, mine in found.items()}
        cells = [describe_mean(areas[arm]) for arm in ARMS]
        cells.append(describe_mean([s["scores"][name]["auc_by_multiplicity"]["1"] for s in found["raw"]]))
        beats = [
            f"{sum(s['scores'][name]['beats_blind'] for s in found[arm])} of {len(found[arm])}" for arm in ARMS[:2]
        ]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(beats) if name != 'jpeg-bytes' else ''} |")
    for arm, mine in found.items():
        print(f"\nDataset inference, {arm}: p = {', '.join(f'{s["dataset"]["p_value"]:.2g}' for s in mine)}")
    changes: dict[str, list[float]] = {"planted twice or more": [], "planted once": [], "never planted": []}
    for raw, refill in zip(runs["raw"], runs["refill"], strict=False):
        a, b = (pl.read_parquet(run / "membership.parquet") for run in (raw, refill))
        gap, m = (a["loss"] - b["loss"]).to_numpy(), a["multiplicity"].to_numpy()
        for group, some in zip(changes, (m >= 2, m == 1, m == 0), strict=True):
            changes[group].append(float(np.mean(gap[some])))
    print(
        "\nLoss of refill less that of raw, same noise: "
        + "; ".join(f"{g} {describe_mean(v)}" for g, v in changes.items())
    )


def infer_once(run: Path) -> dict[str, Any]:
    path = run / "membership.json"
    return manifest.read_json(path) if path.exists() else infer_membership(run)


def print_spikiness(directory: Path, runs: dict[str, list[Path]]) -> None:
    """Of generations, as in the paper: which prompts are memorised, by the mean over their generations."""
    areas = []
    for run in runs["raw"]:
        table, scores = pl.read_parquet(run / "generations.parquet").filter(status="ok"), score(run, "clique")
        pixels = (read_images(run, table["file"], 32) * 255).round().astype(np.uint8)
        captions = table["prompt"].to_list()
        noises = [[seed, seed + 1] for seed in table["seed"]]
        pipeline = load_pipeline(run / "model")
        found = score_pictures(pipeline, pixels, captions, noises, {"spikiness": SCORES["spikiness"]})["spikiness"]
        mean = table.select("prompt_id", found=found).group_by("prompt_id").mean()
        joined = scores.join(mean, left_on="target_id", right_on="prompt_id")
        areas.append(metrics.auc(joined["found"].to_numpy(), joined["extracted"].to_numpy()).estimate)
    print(f"\nSpikiness of generations, AUC of prompts that were extracted (raw): {describe_mean(areas)}")


PARTS = {
    "membership": print_membership,
    "extrapolation": print_extrapolation,
    "replication": print_replication,
    "spikiness": print_spikiness,
    "probe": print_probe,
}


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of benchmarks/detectors.py.")],
    seeds: Annotated[int, typer.Option(help="How many of its seeds.")] = 3,
    part: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Of {', '.join(PARTS)}; all by default.")
    ] = None,
) -> None:
    directory = directory.resolve()
    for name in part or PARTS:
        PARTS[name](directory, find_runs(directory, seeds))


if __name__ == "__main__":
    typer.run(main)
