"""What `--against` found → a contact sheet: OUT/report/against.html, each picture from outside beside its best match.

In: OUT's tables, the pictures of SRC and of OTHER, where they were. Out: the page and OUT/report/against. Knows nothing
of how matches are found. Names and captions are untrusted: Jinja2 escapes them, and no script runs.
"""

import shutil
from pathlib import Path
from typing import Any

import polars as pl

from dedup import manifest, match, match_report
from dedup.report import environment

SHOWN = 500  # pictures of each class and OTHER
SECTIONS = (  # class, id, title, what it says
    ("copy", "copies", "Copies", "Dropped, each with its whole group."),
    ("same-scene", "scenes", "Same scene", "Kept: details agree in place, the pictures do not."),
    ("look-alike", "look-alikes", "Look-alikes", "Kept: near by hash or by place, other content or colour up close."),
)


def write_report(out: Path, *, jobs: int = 0, limit: int = SHOWN) -> Path | None:
    """Write OUT/report/against.html and return its path; None, and remove it, when nothing was compared.

    jobs: processes that make thumbnails, 0 = one per processor.
    """
    run = manifest.read_run(out)
    path, folder = out / "report" / "against.html", out / "report" / "against"
    if "against" not in run:
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    best = rank_pictures(pl.read_parquet(out / "against.parquet"))
    shown = best.with_columns(place=pl.int_range(pl.len()).over("against", "class")).filter(pl.col("place") < limit)
    columns = ["id", "shard", "offset", "size", "key", "sha256", "width", "height", "caption", "reason"]
    of_row = manifest.read(out, columns).rename(lambda name: f"of_{name}")
    shown = shown.join(of_row, left_on="id", right_on="of_id", how="left", maintain_order="left")
    names = [f"{number}" for number in range(len(run["against"]))]
    for stale in set(folder.glob("*")) - {folder / name for name in names}:
        shutil.rmtree(stale)
    rows: list[dict[str, Any]] = []
    for name, other in zip(names, run["against"], strict=True):
        some = shown.filter(pl.col("against") == other["against"])
        pictures = some.with_columns(status=pl.lit("ok"), folder=pl.lit(f"against/{name}")).rows(named=True)
        match_report.write_thumbnails(Path(other["src"]), Path(run["src"]), folder / name, pictures, jobs)
        rows += pictures
    total = dict(best["class"].value_counts().iter_rows())
    sections = [
        {"name": name, "title": title, "says": says, "total": total.get(kind, 0)}
        | {"rows": [row for row in rows if row["class"] == kind]}
        for kind, name, title, says in SECTIONS
    ]
    counts = {name: run["counts"][name] for name in ("against", "external")}
    page = environment().get_template("against.html")
    manifest.write_text(path, page.render(src=run["src"], versions=run["versions"], sections=sections, **counts))
    return path


def rank_pictures(found: pl.DataFrame) -> pl.DataFrame:
    """Every picture of OTHER once, with its best match and the number of `others`, edited copies first.

    Columns of the picture lose their `other_`.
    """
    strength = pl.col("class").replace_strict(match.STRENGTH)
    picture = ["against", "other_sha256"]
    ranked = found.drop("source", "shard", "key").sort(strength, -pl.col("score"), "id", maintain_order=True)
    others = ranked.group_by(picture).agg(others=pl.len().cast(pl.Int64) - 1)
    best = ranked.unique(picture, keep="first", maintain_order=True)
    best = best.join(others, on=picture, maintain_order="left").rename(lambda name: name.removeprefix("other_"))
    return best.sort("against", strength, pl.col("signal") != "copy", -pl.col("score"), "id", maintain_order=True)
