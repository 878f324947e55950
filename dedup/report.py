"""OUT → a page that a person can judge the run by: OUT/report/index.html, opened from disk.

In: OUT/manifest, OUT/pairs.parquet, OUT/run.json, and the source's images for thumbnails. Out: the page, and
through `gallery` what it shows of the groups. Knows nothing of how the decisions were made. Captions and keys
are untrusted: Jinja2 escapes them here, the scripts only ever make text nodes of them, and the policy of the
page runs no other script.
"""

import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl

from dedup import gallery, hashing, manifest, marks, policy, threshold
from dedup.gallery import ALIKE, ALLOWED, DUPLICATES, SCENE, TURNED
from dedup.thumbnails import write_thumbnails

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("pair.js", "marks.js", "report.js")
THUMBNAILS = 20_000  # about 60 MB and a minute on one core
SOURCES = 100  # rows of the table of sources
CAPTIONS = 3  # examples of repeated captions
UNREADABLE = 500  # rows of the table of unreadable files
MOSTLY = 0.5  # a source that loses more than this raises an alarm, unless the run says otherwise
SIZES = ((2, 2), (3, 4), (5, 9), (10, 19), (20, 49), (50, 99), (100, None))
HAMMING_STEP, HAMMING_BARS = 2, 16  # a PDQ hash has as many ones as zeros, so distances are nearly always even
RESIDUAL_STEP, RESIDUAL_BARS = 0.01, 20
LABELS = 6  # intervals between the labels of an axis, at most
SPOKEN = 5  # every so many points of a curve are read out
HIGHEST = 1.0  # no score is higher: a cosine, less what unrelated pictures have in common
SEARCH = {"encoder", "pictures", "floor", "candidates", "recall", "accepted", "null", "examples"}  # what is told of it
UNSEEN = (
    "phash",
    "dhash",
    "pdq",
    "pdq_d4",
    "pixel_digest",
    "captions",
    "weight",
    "effective_pixels",
)  # columns not read


def write_report(out: Path, *, jobs: int = 0, thumbnails: int = THUMBNAILS) -> Path:
    """Write OUT/report and return the path of its index.html.

    jobs: processes that make thumbnails, 0 = one per processor. thumbnails: how many different pictures get
    one at most. Raises ManifestError when OUT holds no finished run.
    """
    run = manifest.read_run(out)
    rows = manifest.read(out, [column for column in manifest.SCHEMA if column not in UNSEEN])
    pairs = pl.read_parquet(out / "pairs.parquet")
    report = out / "report"
    members = gallery.group_rows(rows, pairs)
    listed = members.filter(pl.col("place") < gallery.MEMBERS)
    search = run["counts"].get("copy_search", {})
    wanted = gallery.with_examples(listed, rows, search.get("examples", []))
    src = Path(run["src"])
    shown, made = write_thumbnails(src, report / "thumbs", wanted, limit=thumbnails, jobs=jobs)
    index = gallery.write_groups(src, report / "data", members, shown.filter(pl.col("number").is_not_null()))
    manifest.write_text(report / "data" / "marks.js", gallery.to_script("marks", describe_marks(out, run["src"])))
    write_scripts(report, *SCRIPTS)
    page = environment().get_template("dedup.html")
    text = page.render(
        **{name: run[name] for name in ("src", "counts", "options", "versions")},
        origin=run.get("origin", run["src"]),
        **_summarise(rows, pairs, members, run["options"].get("max_loss", MOSTLY)),
        search=describe_search(search, shown.filter(pl.col("number").is_null())),
        credit=read_credit(src),
        kinds=_count_kinds(index["kind"]),
        thumbnails=made | {"limit": thumbnails},
        member_limit=gallery.MEMBERS,
        source_limit=SOURCES,
    )
    manifest.write_text(report / "index.html", text)
    return report / "index.html"


def write_scripts(folder: Path, *scripts: str) -> None:
    """Scripts of a page beside it: the policy of the page runs none inside it."""
    for name in scripts:
        manifest.write_text(folder / name, (TEMPLATES / name).read_text(encoding="utf-8"))


def describe_marks(out: Path, src: str) -> dict[str, Any]:
    """What the page must know to keep marks: of which run, under which name, and those that OUT remembers."""
    known = out / marks.NAME
    return {
        "store": f"unmemorize {hashing.digest(src.encode())[:16]} ",  # of all runs over SRC: marks speak of pictures
        "digest": hashing.digest((out / "run.json").read_bytes()),
        "decisions": marks.read_marks(known)["decisions"] if known.exists() else [],
    }


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of `folders`, then of this package. Undefined names are errors, everything is escaped."""
    loader = jinja2.FileSystemLoader([*folders, TEMPLATES])
    strict = jinja2.StrictUndefined
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": format_number, "percent": format_percent, "bytes": format_bytes}
    env.filters |= {"estimate": format_estimate, "score": format_score}
    return env


def read_credit(src: Path) -> str | None:
    """What the licence of the drawings wants said, when SRC is the demo dataset or was planted from it."""
    path = src / "demo.json"
    return manifest.read_json(path).get("licence") if path.is_file() else None


def format_number(value: float) -> str:
    """12345 → "12,345"."""
    return f"{value:,}"


def format_percent(share: float) -> str:
    """0.1611 → "16.1 %", with a no-break space."""
    return f"{100 * share:.1f}\u00a0%"


def format_bytes(size: float) -> str:
    """12345678 → "12.3 MB" (powers of 1,000), with a no-break space."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f}\u00a0{unit}" if unit == "bytes" or size >= 100 else f"{size:.1f}\u00a0{unit}"


def format_estimate(value: float) -> str:
    """12345.6 → "12,000", 0.0312 → "0.031": what is estimated has two digits."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def format_score(value: float, digits: int = 2) -> str:
    """-0.123 → "−0.12"."""
    return f"{value:.{digits}f}".replace("-", "−")


def _summarise(rows: pl.DataFrame, pairs: pl.DataFrame, members: pl.DataFrame, max_loss: float) -> dict[str, Any]:
    """What the page says above the groups."""
    sizes = members.filter(pl.col("kind") != ALIKE).group_by("group").len()["len"].to_numpy()
    unreadable = rows.filter(pl.col("status") != "ok").head(UNREADABLE)
    return {
        "groups_of_copies": len(sizes),
        "largest": int(sizes.max(initial=0)),
        "turned_kept": members.filter(pl.col("kind") == TURNED).height,
        "alike_kept": members.filter(pl.col("kind") == ALIKE).height,
        "scene_kept": members.filter(pl.col("kind") == SCENE).height,
        "captions": _describe_captions(rows),
        "charts": {"sizes": _size_bars(sizes)} | _distance_bars(pairs),
        "sources": count_sources(rows, max_loss),
        "max_loss": max_loss,
        "unreadable": unreadable.select("key", "status", "error", "size").to_dicts(),
    }


def _describe_captions(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """How pictures and captions repeat, each with its most frequent cases."""
    return {
        name: {"cases": len(table), "total": int(table["count"].sum()), "top": table.head(CAPTIONS).to_dicts()}
        for name, table in policy.repeated_captions(
            rows.with_columns(policy.hash_caption()), rows["caption"].gather
        ).items()
    }


def count_sources(rows: pl.DataFrame, max_loss: float = MOSTLY) -> list[dict[str, Any]]:
    """Rows, kept, removed, unreadable and the lost share of each source; those that lose most of it first."""
    readable = pl.col("status") == "ok"
    table = rows.group_by("source").agg(
        rows=pl.len().cast(pl.Int64),
        kept=pl.col("keep").sum(),
        removed=(readable & ~pl.col("keep")).sum(),
        unreadable=(~readable).sum(),
    )
    lost = 1 - pl.col("kept") / pl.col("rows")
    return (
        table.with_columns(lost=lost, alarm=lost > max_loss)
        .sort(~pl.col("alarm"), -pl.col("rows"), "source")
        .to_dicts()
    )


def _size_bars(sizes: np.ndarray) -> list[dict[str, Any]]:
    bars = []
    for low, high in SIZES:
        label = f"{low}+" if high is None else f"{low}" if low == high else f"{low}–{high}"
        bars.append({"label": label, "values": [int(((sizes >= low) & (sizes <= (high or np.inf))).sum())]})
    return bars


def _distance_bars(pairs: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Bars of the pairs that were found by hash: copies and look-alikes by differing bits and by colour."""
    found = pairs.filter(pl.col("hamming").is_not_null() & pl.col("residual").is_not_null())
    is_copy = found["class"].to_numpy() == "copy"
    columns = {
        "hamming": (HAMMING_STEP, HAMMING_BARS, "{:.0f}"),
        "residual": (RESIDUAL_STEP, RESIDUAL_BARS, "{:.2f}"),
    }
    bars = {}
    for column, (step, number, form) in columns.items():
        bar = np.minimum((found[column].to_numpy() / step).astype(int), number - 1)
        parts = [np.bincount(bar[chosen], minlength=number).tolist() for chosen in (is_copy, ~is_copy)]
        labels = [form.format(n * step) for n in range(number - 1)] + [form.format((number - 1) * step) + "+"]
        bars[column] = [{"label": label, "values": list(values)} for label, *values in zip(labels, *parts, strict=True)]
    return bars


def _count_kinds(kinds: list[int]) -> list[tuple[int, str, int]]:
    """(bits, label, groups) of the choices above the groups."""
    labels = {DUPLICATES: "Copies removed", TURNED: "Mirrored or turned, kept"}
    if any(kind & ALLOWED for kind in kinds):
        labels[ALLOWED] = "Copies kept by policy"
    labels |= {SCENE: "Same scene, kept", ALIKE: "Look-alikes, kept"}
    labels[DUPLICATES | TURNED | ALIKE | SCENE | ALLOWED] = "All"
    return [(bits, label, sum(1 for kind in kinds if kind & bits)) for bits, label in labels.items()]


def describe_search(search: dict[str, Any], pictures: pl.DataFrame) -> dict[str, Any] | None:
    """`search` with a curve to draw (None: no null model) and with the pictures of its example pairs.

    search: counts["copy_search"] of the run. pictures: the rows of the examples, with their thumbnails. None when
    nothing was searched, or by a version that recorded less.
    """
    if not (search.keys() >= SEARCH and search["null"]):
        return None
    null = search["null"]
    picture = {row["id"]: row for row in pictures.select("id", "key", "caption", "thumb").iter_rows(named=True)}
    examples = [example | {end: picture[example[end]] for end in ("a", "b")} for example in search["examples"]]
    curve = None if "error" in null else _draw_curve(null, search["floor"])
    return search | {"examples": examples, "curve": curve, "level": threshold.LEVEL}


def _draw_curve(null: dict[str, Any], floor: float) -> dict[str, Any]:
    """Expected unrelated pairs by score, as positions (x, y) in a frame from 0 to 1; y counts powers of ten."""
    curve = [point for point in null["curve"] if point["threshold"] <= HIGHEST]
    at_floor = (floor, null["expected_at_floor"])
    scores = [floor, *(point["threshold"] for point in curve)]
    counts = [at_floor[1], *(point[end] for point in curve for end in ("low", "high"))]
    left, width = min(scores), max(scores) - min(scores) or 1.0
    bottom, top = math.floor(math.log10(min(counts))), math.ceil(math.log10(max(counts)))
    height = max(1, top - bottom)

    def place(score: float, count: float) -> tuple[float, float]:
        return (score - left) / width, (math.log10(count) - bottom) / height

    line = sorted([at_floor, *((point["threshold"], point["expected"]) for point in curve)])
    low, high = ([place(point["threshold"], point[end]) for point in curve] for end in ("low", "high"))
    step = next(s for s in (m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5)) if width <= LABELS * s)
    digits = max(0, -math.floor(math.log10(step)))
    ticks = np.arange(math.ceil(left / step - 1e-9), (left + width) / step + 1e-9) * step
    powers = [power for power in range(bottom, top + 1) if power % math.ceil(height / LABELS) == 0]
    return {
        "line": [place(*point) for point in line],
        "band": low + high[::-1],
        "mark": place(*at_floor),
        "limit": place(left, null["fewest"])[1] if null["strictest"] <= HIGHEST else None,
        "x_ticks": [((tick - left) / width, format_score(tick, digits)) for tick in ticks.tolist()],
        "y_ticks": [((power - bottom) / height, _label_power(power)) for power in powers],
        "spoken": curve[::SPOKEN],
        "last": curve[-1],
    }


def _label_power(power: int) -> str:
    """3 → "1,000", 7 → "10⁷"."""
    if abs(power) > 3:
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return format_number(10**power)
