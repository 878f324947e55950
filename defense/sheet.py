"""Samples → a contact sheet: DIR/index.html, opened from disk, a row a prompt.

In: what `sample` left in DIR. Out: the page; its pictures are those of DIR. Prompts are untrusted: Jinja2 escapes them,
and no script runs.
"""

from pathlib import Path

import polars as pl

from dedup import manifest
from dedup.report import environment

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 2_000  # images on the page


def write_sheet(folder: Path) -> Path:
    """Write DIR/index.html and return its path."""
    described = manifest.read_json(folder / "sample.json")
    table = pl.read_parquet(folder / "samples.parquet")
    looks = pl.read_parquet(folder / "guards.parquet").sort("attempt", maintain_order=True)
    last = looks.unique(["prompt", "place"], keep="last").drop("seed").rename({"place": "number"})
    shown = table.head(SHOWN).join(last, on=["prompt", "number"], how="left", maintain_order="left")
    groups = shown.partition_by("prompt", maintain_order=True)
    rows = [{"prompt": group["prompt"][0], "images": group.rows(named=True)} for group in groups]
    page = environment(TEMPLATES).get_template("sheet.html")
    manifest.write_text(folder / "index.html", page.render(**described, prompts=rows, shown=len(shown)))
    return folder / "index.html"
