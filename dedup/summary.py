"""What a finished command says in the terminal.

In: what was recorded of a run, of a look-up or of an export. Out: lines of text. Knows nothing of options, and reads no
file.
"""

from pathlib import Path

NAMED = 3  # scopes, or pairs of them, that are named


def describe_run(run: dict, out: Path, *, report: bool) -> str:
    """The record of `unmemorize dedup` in lines: what was read, what is kept, and what to be wary of."""
    lines = [line for line in dict.fromkeys(map(_describe_columns, run["layouts"])) if line]
    if "base" in run:
        lines += _describe_base(run["base"])
    return "\n".join([*lines, *_describe_counts(run, out, report)])


def _describe_columns(layout: dict) -> str:
    """Which columns were read; nothing for images and tar shards."""
    if layout["image_column"] is None:
        return ""
    caption = layout["caption_column"] or "no column (--caption-column names one)"
    key = layout["id_column"] or ("the path" if layout["format"] == "table" else "the number of the row")
    return f"Columns: images in {layout['image_column']}, captions in {caption}; key of a row: {key}."


def _describe_base(base: dict) -> list[str]:
    """What a run took over from its base, in a line or two."""
    again = " but hashed again, because library versions differ" if base["hashed_again"] else ""
    lines = [f"Base: {base['known']:,} images were known{again}, {base['published']:,} of them published: those stay."]
    if base["gone"]:
        lines.append(f"{base['gone']:,} images of the base are gone from SRC, {base['kept_gone']:,} of them kept ones.")
    return lines


def _describe_external(counts: dict) -> list[str]:
    """What was dropped for pictures outside of the dataset."""
    gone = counts["external"]
    went = f"{gone['rows']:,} images were dropped for pictures outside, {gone['matched']:,} as copies of them"
    went += f", {gone['rows'] - gone['matched']:,} with their group"
    lines = [went + (f"; {gone['published']:,} of them were published before." if gone["published"] else ".")]
    for other in counts["against"]:
        splits = [f"{source} {n['copies']:,} of {n['pictures']:,}" for source, n in other["splits"].items()]
        lines.append(
            f"  {other['against']}: {other['copies']:,} of {other['pictures']:,} pictures stand in SRC"
            + (f" ({', '.join(splits)})" if len(splits) > 1 else "")
            + f"; {other['same_scene']:,} same scene, {other['look_alike']:,} look-alike: nothing dropped for those."
        )
    return lines


def _describe_leak(scopes: list[str], pictures: int, rows: list[int]) -> str:
    a, b = (f"{count:,} of {scope}" for count, scope in zip(rows, scopes, strict=True))
    are = "picture is" if pictures == 1 else "pictures are"
    return f"{pictures:,} {are} kept in {scopes[0]} and in {scopes[1]} ({a}, {b})"


def _describe_counts(run: dict, out: Path, report: bool) -> list[str]:
    counts, level = run["counts"], run["options"]["level"]
    what = f"duplicate{'' if counts['dropped'] == 1 else 's'} dropped"
    what = "dropped" if "external" in counts else what
    share = counts["dropped"] / max(1, counts["rows"])
    saved = counts["bytes_dropped"] / 1e6
    look_alikes = counts["pairs"].get("look-alike", 0)
    captions = {name: f"{count['cases']:,}" for name, count in counts["captions"].items()}
    scenes = counts["pairs"].get("same-scene", 0)
    lines = [
        f"{counts['rows']:,} images: {counts['kept']:,} kept, {counts['dropped']:,} {what} "
        f"({share:.1%}, {saved:,.1f} MB), {counts['unreadable']:,} unreadable. Level: {level}.",
        f"{look_alikes:,} look-alike and {scenes:,} same-scene pairs were kept; "
        f"{counts['without_caption']:,} images have no caption.",
        f"Captions: {captions['same_image_same_caption']} repeat with the same image (the strongest risk), "
        f"{captions['same_image_other_captions']} images have several, "
        f"{captions['same_caption_other_images']} captions stand with several images.",
        f"Kept rows: {out / 'deduplicated.parquet'}",
    ]
    if told := counts.get("decisions"):
        absent = f" {told['absent']:,} more name pictures that are not there." if told["absent"] else ""
        lines.append(f"Marked by hand: {told['copy']:,} copies, {told['not_a_copy']:,} that are none.{absent}")
    if counts["rows_at_limit"]:
        lines.append(f"{counts['rows_at_limit']:,} images are near 64 others or more: compared with the first 64 only.")
    if subjects := counts.get("subjects"):
        most = subjects["rows_per_subject"]["most"]
        lines.append(
            f"{subjects['subjects']:,} persons on {subjects['rows']:,} images, at most {most:,} of one"
            f"{' (is that a placeholder?)' if 2 * most > counts['rows'] else ''}; "
            f"{subjects['copies_across']:,} copies stand with two persons."
        )
    if series := counts.get("copy_search", {}).get("series"):
        lines.append(f"{series:,} images resemble many others (a series): only what agrees everywhere is a copy there.")
    if "external" in counts:
        lines += _describe_external(counts)
    if losses := counts["losses"]:
        named = ", ".join(f"{loss['scope']} ({1 - loss['kept'] / loss['rows']:.0%})" for loss in losses[:NAMED])
        more = f" and {len(losses) - NAMED:,} more" if len(losses) > NAMED else ""
        lines.append(f"Alarm: {named}{more} lost more than {run['options']['max_loss']:.0%} (--max-loss).")
    if leakage := counts["leakage"]:
        named = "; ".join(_describe_leak(**leak) for leak in leakage[:NAMED])
        word = "Leakage" if run["options"]["per"] == "split" else "Kept in several"
        lines.append(f"{word}: {named}. Listed in {out / 'leakage.csv'}")
    if report:
        lines.append(f"Report:    {out / 'report' / 'index.html'}")
    return lines


def describe_matches(counts: dict, out: Path, page: Path | None) -> str:
    """What `unmemorize match` counted; page: its report, if one was written."""
    lines = [
        f"Looked up: {counts['pictures']:,}; copy: {counts['copies']:,} (of {counts['matched']:,} in OUT), same scene: "
        f"{counts['same_scene']:,}, look-alike: {counts['look_alike']:,}, none: {counts['none']:,}, unreadable: "
        f"{counts['unreadable']:,}.",
        f"Matches: {out / 'matches.parquet'}, {out / 'matches.csv'}",
    ]
    if counts["unknown_prompts"]:
        lines.append(
            f"{counts['unknown_prompts']:,} of {counts['prompts']:,} prompts name pictures that are not there."
        )
    if page is not None:
        lines.append(f"Report:  {page}")
    return "\n".join(lines)


def describe_export(counts: dict, dest: Path, format_: str) -> str:
    """What `unmemorize export` wrote, and what the format could not take along."""
    beside = f", {counts['exported_beside']:,} more in samples of theirs" if counts.get("exported_beside") else ""
    without = f" {counts['without_url']:,} have no address." if counts.get("without_url") else ""
    columns, members = counts.get("columns_left"), counts.get("members_left")
    left = f" {format_} cannot hold the columns {', '.join(columns)}: parquet can." if columns else ""
    left += f" Members {', '.join(members)} of samples stay behind: --format same keeps them." if members else ""
    return f"{counts['exported']:,} of {counts['rows']:,} rows exported{beside}: {dest}.{without}{left}"
