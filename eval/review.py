"""OUT → a sample of its removals that a person can judge quickly, and from the labels how many removals are right.

In: OUT's tables and the pictures of its source; then the labels that the page lets its reader download. Out:
DIR/sample.json, the page DIR/index.html with its pictures, the estimate. The page does not say how alike a pair is to
the program: who knows does not judge. Keys and captions are untrusted, as in the report.
"""

from pathlib import Path
from typing import Any

import polars as pl

from dedup import gallery, hashing, manifest, marks, thumbnails
from dedup.report import environment, write_scripts
from eval import precision
from eval.precision import SampleError

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 640  # of the pictures: 100 pairs are about 10 MB
NAME = "sample.json"
COLUMNS = [name for name in manifest.SCHEMA if name not in ("pdq_d4", "pdq", "phash", "dhash", "captions")]


def write_review(out: Path, folder: Path, *, n: int = 100, seed: int = 0, jobs: int = 0) -> dict[str, Any]:
    """Draw n removals of OUT, write the page about them into `folder` and return the content of its sample.json.

    Raises ManifestError when OUT holds no finished run, SampleError when it removed too little for a sample.
    """
    run = manifest.read_run(out)
    rows = manifest.read(out, COLUMNS)
    removed = rows.filter(pl.col("kept_id").is_not_null())
    signal = pl.coalesce("signal", "reason", pl.lit("unknown"))
    placed, strata = precision.stratify(removed.select("id", "score", signal=signal))
    drawn = precision.draw(placed, strata, n, seed)
    if drawn.is_empty():
        raise SampleError(f"{out} removed nothing but equal bytes ({len(removed):,}): there is nothing to judge")
    pairs = describe_pairs(rows, pl.read_parquet(out / "pairs.parquet"), drawn["id"])
    both = pl.DataFrame([row for pair in pairs for row in pair], infer_schema_length=None)
    chosen = both.with_columns(side=pl.lit(SIDE)).unique("thumb", keep="first", maintain_order=True)
    src = Path(run["src"])
    failed = thumbnails.write_pictures(src, folder / "thumbs", chosen, jobs)
    ends = [[{name: row[name] for name in ("sha256", "shard", "key")} for row in pair] for pair in pairs]
    sample: dict[str, Any] = {
        "version": marks.VERSION,
        "digest": hashing.digest((out / "run.json").read_bytes()),
        "review": {"n": n, "seed": seed},
        "strata": strata.to_dicts(),
        "sample": [
            {"stratum": stratum, "a": a, "b": b} for stratum, (a, b) in zip(drawn["stratum"], ends, strict=True)
        ],
    }
    shown = [[_show(row, failed) for row in pair] for pair in pairs]
    told = {"src": run["src"], "out": str(out.resolve()), "removed": len(removed), "looked_at": len(drawn)}
    certain = int((placed["signal"] == precision.CERTAIN).sum())
    listed = [
        name_stratum(row) | row | {"drawn": drawn.filter(stratum=n).height} for n, row in enumerate(sample["strata"])
    ]
    told |= {"certain": certain, "strata": listed, "failed": len(failed), "versions": run["versions"]}
    write_page(folder, "review.html", sample, shown, gallery.find_base(src), told)
    return sample


def write_page(
    folder: Path,
    template: str,
    sample: dict[str, Any],
    shown: list[list[list[Any]]],
    base: str | None,
    told: dict[str, Any],
) -> None:
    """sample.json, and a page on which its pairs are labelled one after the other.

    shown: for each pair of the sample two rows with the fields `gallery.LISTED`. base: where images are that are files.
    told: what the template says beside.
    """
    name = repr((sample["digest"], *sample["review"].values())).encode()
    about = {
        "store": f"unmemorize review {hashing.digest(name)[:16]} ",
        "digest": sample["digest"],
        "review": sample["review"],
        "decisions": [],
    }
    manifest.write_json(folder / NAME, sample)
    manifest.write_text(folder / "data" / "marks.js", gallery.to_script("marks", about))
    content = {"base": base, "fields": gallery.LISTED, "pairs": shown}
    manifest.write_text(folder / "data" / "sample.js", gallery.to_script("sample", content))
    write_scripts(folder, "pair.js", "marks.js")
    manifest.write_text(folder / "review.js", (TEMPLATES / "review.js").read_text(encoding="utf-8"))
    text = environment(TEMPLATES).get_template(template).render(**told)
    manifest.write_text(folder / "index.html", text)


def describe_pairs(rows: pl.DataFrame, pairs: pl.DataFrame, ids: pl.Series) -> list[list[dict[str, Any]]]:
    """(kept row, removed row) of these removed rows, in their order: what the page is told of each (`gallery.LISTED`).

    Its pictures are named by content, in `thumb`; `transform` of the removed row carries the kept row onto it.
    """
    wanted = pl.DataFrame({"id": ids}).join(rows.select("id", "kept_id"), on="id", maintain_order="left")
    low, high = pl.min_horizontal("id", "kept_id"), pl.max_horizontal("id", "kept_id")
    deciding = pairs.join(wanted.select(a=low, b=high), on=["a", "b"], how="semi", maintain_order="left")
    members = gallery.group_rows(rows, deciding).filter(pl.col("role") != "look-alike")
    thumb = pl.col("sha256").str.head(thumbnails.LARGE_NAME)
    known = {row["id"]: row for row in members.with_columns(thumb=thumb).iter_rows(named=True)}
    return [[known[kept], known[row]] for row, kept in wanted.iter_rows()]


def _show(row: dict[str, Any], failed: set[str]) -> list[Any]:
    return [None if name == "thumb" and row[name] in failed else row[name] for name in gallery.LISTED]


def name_stratum(stratum: dict[str, Any]) -> dict[str, str]:
    """What it is called: "copy, score below 0.80"."""
    low, high = stratum["low"], stratum["high"]
    if low is None and high is None:
        return {"name": {"bytes": "equal bytes", "pixels": "equal pixels"}.get(stratum["signal"], stratum["signal"])}
    if low is None:
        return {"name": f"{stratum['signal']}, score below {high:.2f}"}
    return {"name": f"{stratum['signal']}, score {low:.2f} " + ("or more" if high is None else f"to {high:.2f}")}


def judge(out: Path, folder: Path, labels: Path) -> dict[str, Any]:
    """Labels of the sample in `folder` → `precision.estimate`, `decided_again`: whether OUT holds another run by now.

    Raises SampleError when there is no sample, or the labels are those of another one; MarksError.
    """
    sample, verdicts = read_labels(folder, labels, f"unmemorize review {out}")
    drawn = [(pair["stratum"], marks.pair_of(pair)) for pair in sample["sample"]]
    strata = [name_stratum(stratum) | stratum for stratum in sample["strata"]]
    found = precision.estimate(strata, [(stratum, verdicts.get(pair)) for stratum, pair in drawn])
    now = hashing.digest((out / "run.json").read_bytes()) if (out / "run.json").exists() else None
    return found | {"decided_again": now != sample["digest"]}


def read_labels(folder: Path, labels: Path, command: str) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The sample in `folder`, and the verdict on each of its pairs that has one.

    command: what makes such a sample. Raises SampleError when there is none, or the labels are of another; MarksError.
    """
    path = folder / NAME
    if not path.exists():
        raise SampleError(f"{folder} holds no sample: run `{command}` first, or name its folder with -o")
    sample, told = manifest.read_json(path), marks.read_marks(labels)
    if told.get("review") is None:
        raise SampleError(f"{labels} is no sample (marks of the report are those that caught an eye): label {folder}")
    if (told.get("digest"), told["review"]) != (sample["digest"], sample["review"]):
        raise SampleError(f"{labels} labels another sample than the one in {folder}: another run, -n or --seed")
    verdicts = {marks.pair_of(mark): mark["verdict"] for mark in told["decisions"]}
    foreign = len(verdicts.keys() - {marks.pair_of(pair) for pair in sample["sample"]})
    if foreign:
        raise SampleError(f"{labels}: {foreign} of its pairs are not in the sample in {folder}")
    return sample, verdicts


def describe_sample(sample: dict[str, Any], folder: Path) -> str:
    """For the terminal: what was drawn, and what to do with it."""
    sizes = [stratum["removals"] for stratum in sample["strata"]]
    certain = sum(s["removals"] for s in sample["strata"] if s["signal"] == precision.CERTAIN)
    equal = (
        f" ({certain:,} more {'has' if certain == 1 else 'have'} equal bytes: nobody needs to look)" if certain else ""
    )
    return (
        f"{len(sample['sample']):,} of {sum(sizes) - certain:,} removals to label{equal}: {folder / 'index.html'}\n"
        "Then: unmemorize review OUT --labels labels.json"
    )


def describe_verdict(found: dict[str, Any]) -> str:
    """For the terminal: precision of all removals, of those that are not equal bytes, and of each stratum."""
    lines = [_describe("All", found["overall"])]
    if found["overall"]["removals"] != found["without_equal_bytes"]["removals"]:
        lines.append(_describe("Without equal bytes", found["without_equal_bytes"]))
    width = max(len(row["name"]) for row in found["strata"])
    lines.append(f"{'stratum':{width}}  removals  labelled  wrong  unsure  right")
    for row in found["strata"]:
        counts = f"{row['removals']:>8,}  {row['labelled']:>8,}  {row['different']:>5,}  {row['undecided']:>6,}"
        lines.append(f"{row['name']:{width}}  {counts}  {_percent(row)}")
    lines.append(
        f"Intervals: {found['level']:.0%}; of a stratum Clopper and Pearson's, of all a bound that holds for any mix."
    )
    if found["skipped"]:
        lines.append(f"{found['skipped']:,} pairs were left out before the last label: they count as unsure.")
    if found["left"]:
        lines.append(
            f"{found['left']:,} pairs at the end of the sample have no label yet: more make the interval smaller."
        )
    if found["decided_again"]:
        lines.append("OUT has been decided again since the sample was drawn: this speaks of what it held then.")
    return "\n".join(lines)


def _describe(name: str, row: dict[str, Any]) -> str:
    wrong = row["wrong_per_million"]
    known = "?" if wrong["estimate"] is None else f"{wrong['estimate']:,.0f}"
    limits = f"{wrong['low']:,.0f} … {wrong['high']:,.0f}"
    return f"{name}: {_percent(row)} of {row['removals']:,} removals are right; wrong per million: {known} ({limits})."


def _percent(row: dict[str, Any]) -> str:
    known = "?" if row["precision"] is None else f"{row['precision']:.1%}"
    return f"{known} ({row['low']:.1%} … {row['high']:.1%})"
