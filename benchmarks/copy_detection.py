"""Recall and precision of copy detection against peers: light edits, hard ones, natural duplicates, look-alikes.

    python benchmarks/copy_detection.py --photos DIR --work DIR [--sets hard,unseen]
    python benchmarks/copy_detection.py --work DIR --natural DIR --distinct DIR

photos-T is made by dedup_speed.py, the others by hard_edits.py. A pair is found when both are in one group of the
tool: for ours, in one component of the pairs of class `copy`, as peers chain too; `in star` counts pairs of one
`cluster_id` only, and `false edges` the accepted pairs themselves that join two photographs. Two crops that share less
than a tenth of the smaller are neither true nor false. Tools take turns; seconds are medians; one that takes longer
than five minutes runs once. Accepted pairs that are false are listed in WORK/false/*.csv, to be looked at.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import dedup_speed
import further_edits
import hard_edits
import numpy as np
import polars as pl
import typer
import unseen_edits

from dedup import clustering

BASES = 150
SETS = {"photos-T": "photos-T", "hard": "hard", "further": "hard-unseen", "unseen": "unseen-2"}
MIN_OVERLAP = 0.1
SLOW = 300  # seconds
PEERS = {"immaculate-sscd": "immaculate[sscd]==0.3.0", "fastdup": "fastdup==2.54"}
FASTDUP = """
import contextlib, csv, json, pathlib, sys
import fastdup
work = pathlib.Path(sys.argv[2])
with contextlib.redirect_stdout(sys.stderr):
    fastdup.run(input_dir=sys.argv[1], work_dir=str(work), threshold=0.9, turi_param="ccthreshold=0.9")
names = {row["index"]: row["filename"] for row in csv.DictReader((work / "atrain_features.dat.csv").open())}
groups = {}
for row in csv.DictReader((work / "connected_components.csv").open()):
    groups.setdefault(row["component_id"], []).append(str(pathlib.Path(names[row["__id"]]).resolve()))
print(json.dumps([group for group in groups.values() if len(group) > 1]))
"""

Command = Callable[[Path, Path], list[str]]


class Found(NamedTuple):
    """What a tool says about a folder: rows (file, label, star, keep) and pairs (file, file_b, class, …)."""

    rows: pl.DataFrame
    pairs: pl.DataFrame


# Tools


def make_tools(work: Path, peers: bool) -> dict[str, Command]:
    """Name → the command for a folder and an empty folder for results. Ours first."""
    ours = [str(Path(sys.executable).parent / "unmemorize"), "dedup", "--no-report"]

    def at_level(*options: str) -> Command:
        return lambda folder, out: [*ours, str(folder), "-o", str(out), "--level", *options]

    tools = {"unmemorize hash": at_level("hash")}
    tools |= {f"unmemorize {name}": at_level("copy", "--encoder", name) for name in ("local", "sscd-distilled")}
    if not peers:
        return tools
    bins = {name: make_environment(work / "environments" / name, package) for name, package in PEERS.items()}
    immaculate, python = str(bins["immaculate-sscd"] / "immaculate"), str(bins["fastdup"] / "python")

    def with_method(method: str) -> Command:
        return lambda folder, out: [immaculate, "--method", method, "--json", str(folder)]

    tools |= {f"immaculate {method}": with_method(method) for method in ("pdq", "sscd_distilled", "sscd")}
    return tools | {"fastdup": lambda folder, out: [python, "-c", FASTDUP, str(folder), str(out)]}


def make_environment(folder: Path, package: str) -> Path:
    """Folder of its programs."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    # From its folder: in ours uv would hold the peer to our versions.
    subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), package], check=True, cwd=folder)
    return python.parent


def run(command: Command, folder: Path, out: Path) -> tuple[float, float, Found]:
    """Wall seconds, peak MB, and what was found."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    out.mkdir(parents=True)
    seconds, memory, text = dedup_speed.measure(command(folder, out))
    return seconds, memory, read_ours(out) if (out / "manifest").exists() else read_groups(text, folder)


def read_ours(out: Path) -> Found:
    table = pl.read_parquet(out / "manifest" / "*.parquet", columns=["key", "cluster_id", "keep", "status"])
    pairs = pl.read_parquet(out / "pairs.parquet")
    label = clustering.components(pairs.filter(pl.col("class") == "copy"), len(table))
    keys = table["key"]
    rows = table.select(
        pl.col("key").alias("file"),
        pl.Series("label", label),
        pl.col("cluster_id").alias("star"),
        pl.col("keep") | (pl.col("status") != "ok"),
    )
    return Found(rows, pairs.select(keys[pairs["a"]].alias("file"), keys[pairs["b"]].alias("file_b"), pl.all()))


def read_groups(text: str, folder: Path) -> Found:
    """Groups of paths, as peers print them; their pairs are the first of a group with each other one."""
    printed = json.loads(text if text.startswith("{") else text.strip().splitlines()[-1])
    groups = printed["exact"] + printed["near"] if isinstance(printed, dict) else printed
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if any(path.is_symlink() for path in paths):
        raise ValueError(f"{folder}: holds links, which some peers skip silently; give a folder of files")
    number = {path.resolve(): k for k, path in enumerate(paths)}
    ids = [[number[Path(name).resolve()] for name in group] for group in groups]
    edges = [(group[0], other) for group in ids for other in group[1:]]
    pairs = pl.DataFrame(edges, schema={"a": pl.Int64, "b": pl.Int64}, orient="row")
    label = clustering.components(pairs, len(paths))
    files = pl.Series("file", [path.relative_to(folder).as_posix() for path in paths])
    columns = {"label": label, "star": label, "keep": label == np.arange(len(label))}
    found = pairs.select(files[pairs["a"]], files[pairs["b"]].alias("file_b"), pl.lit("copy").alias("class"))
    return Found(pl.DataFrame({"file": files, **columns}), found)


# Truth


def make_set(name: str, photos: Path, folder: Path) -> None:
    if (folder / "all").exists():
        return
    if name == "photos-T":
        (folder / "all").mkdir(parents=True)
        dedup_speed.make_transformed(photos, folder / "all")
        return
    pictures = hard_edits.read_distinct(photos)
    spare, rng = [picture for _, picture in pictures[BASES:]], np.random.default_rng(1)
    edits = {
        "hard": hard_edits.add_paste(hard_edits.make_backdrops(spare, rng)),
        "further": further_edits.FURTHER,
        "unseen": unseen_edits.add_partners(unseen_edits.make_partners(spare, rng)),
    }
    hard_edits.make_edited(pictures[:BASES], folder, edits[name])


def read_truth(folder: Path) -> pl.DataFrame:
    """file, group, edit and the rectangle shown; without groups.csv these come from the names, and all is shown."""
    if (folder / "groups.csv").exists():
        return pl.read_csv(folder / "groups.csv").with_columns(("all/" + pl.col("file")).alias("file"))
    files = pl.Series("file", [f"all/{path.name}" for path in sorted((folder / "all").iterdir())])
    names = files.str.strip_prefix("all/").str.strip_suffix(".jpg").str.split("@")
    shown = {name: pl.lit(edge) for name, edge in zip(("left", "top", "right", "bottom"), (0, 0, 1, 1), strict=True)}
    return pl.DataFrame({"file": files, "group": names.list[0], "edit": names.list[1]}).with_columns(**shown)


def pairs_within(rows: pl.DataFrame) -> pl.DataFrame:
    """All pairs of rows of one group, columns of the second with the ending _b."""
    numbered = rows.with_row_index("row")
    return numbered.join(numbered, on="group", suffix="_b").filter(pl.col("row") < pl.col("row_b"))


def are_true() -> pl.Expr:
    """Whether the rectangles shown share at least a tenth of the smaller."""
    width = pl.min_horizontal("right", "right_b") - pl.max_horizontal("left", "left_b")
    height = pl.min_horizontal("bottom", "bottom_b") - pl.max_horizontal("top", "top_b")
    sides = [(pl.col(f"right{s}") - pl.col(f"left{s}"), pl.col(f"bottom{s}") - pl.col(f"top{s}")) for s in ("", "_b")]
    areas = [wide * high for wide, high in sides]
    return width.clip(lower_bound=0) * height.clip(lower_bound=0) >= MIN_OVERLAP * pl.min_horizontal(areas)


# Scores


def score(rows: pl.DataFrame, label: str) -> tuple[int, float, float]:
    """Pairs found, precision, recall over all pairs of rows (with group and rectangle) that share the label."""
    same = pl.col(label) == pl.col(f"{label}_b")
    pairs = pairs_within(rows).with_columns(are_true().alias("true"), same.alias("same"))
    sizes = rows.group_by(label).len()["len"].to_numpy().astype(np.int64)
    decided = int((sizes * (sizes - 1) // 2).sum()) - len(pairs.filter(~pl.col("true"), pl.col("same")))
    hits = len(pairs.filter("true", "same"))
    return decided, hits / max(1, decided), hits / len(pairs.filter("true"))


def recall_by_edit(rows: pl.DataFrame) -> pl.DataFrame:
    """edit, base, any: share found of the pairs of the edit with the base, and with anything of its group."""
    pairs = pairs_within(rows).filter(are_true()).with_columns((pl.col("label") == pl.col("label_b")).alias("same"))
    ends = (("edit", "edit_b"), ("edit_b", "edit"))
    both = pl.concat([pairs.select(pl.col(a).alias("edit"), pl.col(b).alias("other"), "same") for a, b in ends])
    to_base = pl.col("same").filter(pl.col("other") == "base").mean().alias("base")
    return both.group_by("edit").agg(to_base, pl.col("same").mean().alias("any"))


def list_pairs(pairs: pl.DataFrame, path: Path) -> int:
    """Write them to be looked at; how many there are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs.select(~pl.selectors.nested()).write_csv(path)
    return len(pairs)


def false_edges(found: Found, truth: pl.DataFrame) -> pl.DataFrame:
    """Accepted pairs between groups."""
    groups = truth.select("file", "group")
    copies = found.pairs.filter(pl.col("class") == "copy").join(groups, on="file")
    both = copies.join(groups.rename({"file": "file_b"}), on="file_b", suffix="_b")
    return both.filter(pl.col("group") != pl.col("group_b"))


# Tables


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(first: str, *others: str) -> None:
    print_row(first, *others)
    print_row("---", *["---:"] * len(others))


def print_set(name: str, tools: dict[str, Command], folder: Path, work: Path, runs: int) -> None:
    """One row a tool, then one row an edit."""
    truth = read_truth(folder)
    true = pairs_within(truth).select(are_true()).to_series().sum()
    print(f"\n{name}: {len(truth)} files, {true} true pairs\n")
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    last: dict[str, Found] = {}
    for _ in range(runs):
        for tool, command in tools.items():
            if not seconds[tool] or seconds[tool][0] < SLOW:
                passed, _, last[tool] = run(command, folder, work / "out")
                seconds[tool].append(passed)
                print(f"{tool}: {passed:.1f} s", file=sys.stderr, flush=True)
    print_header("tool", "seconds", "pairs", "precision", "recall", "in star: precision", "recall", "false edges")
    edits: dict[str, pl.DataFrame] = {}
    for tool, found in last.items():
        rows = truth.join(found.rows, on="file", how="left")
        if rows["label"].null_count():
            raise ValueError(f"{tool}: {rows['label'].null_count()} files of {folder} are not in what it wrote")
        pairs, precision, recall = score(rows, "label")
        _, *star = score(rows, "star")
        edges = list_pairs(false_edges(found, truth), work / "false" / f"{name} {tool}.csv")
        shares = [f"{share:.2%}" for share in (precision, recall, *star)]
        print_row(tool, f"{statistics.median(seconds[tool]):.1f}", pairs, *shares, edges)
        edits[tool] = recall_by_edit(rows)
    print("\nRecall by edit: pairs with the base, and with anything of the group\n")
    print_header("edit", *edits)
    for edit in truth["edit"].unique(maintain_order=True).to_list():
        if edit != "base":
            at = [table.filter(edit=edit).row(0, named=True) for table in edits.values()]
            print_row(edit, *[f"{row['base']:.0%}, {row['any']:.0%}" for row in at])


def print_natural(tools: dict[str, Command], folder: Path, work: Path) -> None:
    """Per tool one row a kind: what becomes of the pairs of a group, and which rows go.

    A pair in one component of copies is a copy, otherwise it is what the pairs table says of it.
    """
    truth = pl.read_csv(folder / "groups.tsv", separator="\t", quote_char=None).select("group", "kind", "file")
    for tool, command in tools.items():
        passed, _, found = run(command, folder / "images", work / "out")
        wrong = false_edges(found, truth)
        list_pairs(wrong, work / "false" / f"natural {tool}.csv")
        print(f"\nNatural duplicates, {tool}: {passed:.1f} s, {len(wrong)} accepted pairs between groups\n")
        rows = truth.join(found.rows, on="file", how="left")
        sides = (("file", "file_b"), ("file_b", "file"))
        said = pl.concat(
            [found.pairs.select(pl.col(a).alias("file"), pl.col(b).alias("file_b"), "class") for a, b in sides]
        )
        pairs = pairs_within(rows).join(said.unique(["file", "file_b"]), on=["file", "file_b"], how="left")
        chained = pl.col("label") == pl.col("label_b")
        pairs = pairs.with_columns(pl.when(chained).then(pl.lit("copy")).otherwise("class").alias("class"))
        columns = ("copy", "same-scene", "look-alike")
        print_header("kind", "files", "dropped", "pairs", *columns, "not found", "copies of another group")
        for kind in truth["kind"].unique(maintain_order=True).to_list():
            own, of_kind = rows.filter(kind=kind), pairs.filter(kind=kind)
            counts = [(of_kind["class"] == name).sum() for name in columns]
            outside = wrong.filter(pl.any_horizontal(pl.col("file", "file_b").is_in(own["file"].implode()))).height
            print_row(kind, len(own), (~own["keep"]).sum(), len(of_kind), *counts, len(of_kind) - sum(counts), outside)


def print_distinct(tools: dict[str, Command], folders: list[Path], work: Path) -> None:
    """Folders in which everything is distinct: each row dropped is an error."""
    print("\nNothing here is a copy\n")
    print_header("folder, tool", "seconds", "files", "dropped", "copy pairs", "same scene", "look-alike")
    for folder in folders:
        for tool, command in tools.items():
            passed, _, found = run(command, folder, work / "out")
            counts = [(found.pairs["class"] == name).sum() for name in ("copy", "same-scene", "look-alike")]
            list_pairs(found.pairs.filter(pl.col("class") == "copy"), work / "false" / f"{folder.name} {tool}.csv")
            dropped = (~found.rows["keep"]).sum()
            print_row(f"{folder.name}, {tool}", f"{passed:.1f}", len(found.rows), dropped, *counts)


def main(
    work: Annotated[Path, typer.Option(help="Sets, environments and results are made here.")],
    photos: Annotated[Path | None, typer.Option(help="Photographs; without them no set is made or scored.")] = None,
    sets: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SETS),
    natural: Annotated[Path | None, typer.Option(help="Folder with groups.tsv and images/.")] = None,
    distinct: Annotated[list[Path] | None, typer.Option(help="Folder of distinct images; may be repeated.")] = None,
    runs: Annotated[int, typer.Option(help="Times that each tool runs on a set; 0 only makes sets.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Only this tool; may be repeated.")] = None,
    skip_peers: Annotated[bool, typer.Option("--skip-peers", help="Only ours.")] = False,
) -> None:
    """Print the tables."""
    tools = make_tools(work, peers=not skip_peers)
    if unknown := set(only or []) - set(tools):
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: not among {', '.join(tools)}")
    tools = {name: command for name, command in tools.items() if not only or name in only}
    if photos:
        for name in filter(None, sets.split(",")):
            make_set(name, photos, work / SETS[name])
            if runs:
                print_set(name, tools, work / SETS[name], work, runs)
    if natural:
        print_natural(tools, natural, work)
    if distinct:
        print_distinct(tools, distinct, work)


if __name__ == "__main__":
    typer.run(main)
