"""The verbs of the dedup stage: parse → call → print. `eval/cli.py` assembles them into the program `unmemorize`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from dedup import memory

app = typer.Typer()

SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="A folder of images, tar shards or parquet; a shard or pattern: '{00000..00399}.tar', here or at s3://… "
        "or https://…; a table of paths or addresses; a dataset that `datasets` saved, or hf://org/name.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
JobsOption = Annotated[int, typer.Option(min=0, help="Worker processes; 0 = one per processor.")]
EngineOption = Annotated[
    Literal["local", "ray"], typer.Option(help="Who does the work: processes of this machine, or a Ray cluster.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Of the Ray cluster, or auto; default: one of this machine alone."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Keep = Literal["keep", "drop"]
Format = Literal["folder", "webdataset", "table", "parquet", "huggingface", "urls"]
ExportFormat = Literal["same", "webdataset", "parquet", "huggingface", "imagefolder", "urls", "index"]
Encoder = Literal["auto", "local", "sscd-distilled", "sscd", "clip", "dinov2"]


NAMED = 3  # scopes, or pairs of them, that the summary names

KEPT, READ, FETCHED = "What is kept", "How SRC is read", "What is fetched from elsewhere"  # groups of options


def choose_address(engine: str, address: str | None) -> str | None:
    """Of the Ray cluster that does the work; None: this machine does it."""
    if engine == "local":
        if address is not None:
            raise typer.BadParameter("--address is of --engine ray")
        return None
    if find_spec("ray") is None:
        raise ModuleNotFoundError(name="ray")
    return address or "local"


class TooManyBad(Exception):
    """More unreadable inputs than `--max-bad` allows: the results stand, the exit code is 1."""


def _parse_size(text: str) -> int:
    try:
        return memory.parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def dedup(
    src: SourceArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Results; default: SRC's name + -dedup.")] = None,
    level: Annotated[Literal["auto", "exact", "hash", "copy"], typer.Option(help="auto: the best there is.")] = "auto",
    encoder: Annotated[Encoder, typer.Option(help="Of level copy; local needs no weights.")] = "auto",
    weights: Annotated[str | None, typer.Option(help="Weights of the encoder: a file, a folder or a hub id.")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Vectors that clip-retrieval made of SRC, instead of an encoder.")
    ] = None,
    weights_sha256: Annotated[str | None, typer.Option(help="What the digest of the weights must be.")] = None,
    jobs: JobsOption = 0,
    engine: EngineOption = "local",
    address: AddressOption = None,
    report: Annotated[bool, typer.Option(help="Write the HTML report.")] = True,
    max_false_pairs: Annotated[
        float | None, typer.Option(help="Unrelated pairs that may be compared; default: 3 an image.")
    ] = None,
    hash_decode: Annotated[Literal["fast", "exact"], typer.Option(help="fast: JPEGs at reduced scale.")] = "fast",
    flips: Annotated[Keep, typer.Option(help="Mirrored copies.", rich_help_panel=KEPT)] = "keep",
    rotations: Annotated[Keep, typer.Option(help="Turned copies.", rich_help_panel=KEPT)] = "keep",
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", help="Finished run over older rows: what it kept stays kept.", rich_help_panel=KEPT
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="OTHER",
            help="Test set or opt-out list, or an OUT: what is a copy of it goes. Repeatable.",
            rich_help_panel=KEPT,
        ),
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            help="Keep by resolution, quality, bytes, caption, source:NAME …, then as usual.", rich_help_panel=KEPT
        ),
    ] = "",
    per: Annotated[
        Literal["auto", "none", "source", "split"],
        typer.Option(help="Drop copies only inside each; auto: splits.", rich_help_panel=KEPT),
    ] = "auto",
    against_split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Drop what matches this split, and none of its own.", rich_help_panel=KEPT),
    ] = None,
    max_copies: Annotated[
        int, typer.Option(min=1, help="Copies of a picture that are kept.", rich_help_panel=KEPT)
    ] = 1,
    max_loss: Annotated[
        float,
        typer.Option(min=0, max=1, help="Alarm when a source or split loses more of its rows.", rich_help_panel=KEPT),
    ] = 0.5,
    max_pixels: Annotated[int, typer.Option(help="Larger images are not decoded.", rich_help_panel=READ)] = 100_000_000,
    max_frames: Annotated[int, typer.Option(help="Longer animations are not decoded.", rich_help_panel=READ)] = 1_000,
    format_: Annotated[
        Format | None, typer.Option("--format", help="Of SRC; default: what it looks like.", rich_help_panel=READ)
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that the paths of a table start in; default: its own.", rich_help_panel=READ),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of paths or bytes; default: by convention.", rich_help_panel=READ)
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Default: by convention, text, caption …", rich_help_panel=READ)
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Of the key of each row; default: its path or number.", rich_help_panel=READ)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a Hugging Face dataset; default: all of them.", rich_help_panel=READ)
    ] = None,
    subject_column: Annotated[
        str | None,
        typer.Option(help="Of the person shown, the unit of splits; hashed. DICOM: PatientID.", rich_help_panel=READ),
    ] = None,
    subject_key: Annotated[
        Path | None,
        typer.Option(help="File with the key of those hashes; default: a secret one of OUT.", rich_help_panel=READ),
    ] = None,
    i_understand: Annotated[
        bool,
        typer.Option("--i-understand", help="Read medical pictures and pictures of persons.", rich_help_panel=READ),
    ] = False,
    url_column: Annotated[
        str | None, typer.Option(help="Of addresses to download; default: by convention.", rich_help_panel=FETCHED)
    ] = None,
    download: Annotated[
        Path | None,
        typer.Option(help="Where images of addresses are kept; default: OUT/download.", rich_help_panel=FETCHED),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where remote shards and streams are kept; default: ~/.cache/unmemorize.", rich_help_panel=FETCHED
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a server may say nothing.", rich_help_panel=FETCHED)
    ] = 10.0,
    retries: Annotated[
        int, typer.Option(min=0, help="Of each address or shard, after the first time.", rich_help_panel=FETCHED)
    ] = 1,
    threads: Annotated[
        int, typer.Option(min=1, help="Addresses that are asked for at once.", rich_help_panel=FETCHED)
    ] = 64,
    private: Annotated[
        Literal["refuse", "allow"],
        typer.Option(help="Addresses of a list inside this network.", rich_help_panel=FETCHED),
    ] = "refuse",
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Of hf://…: only the split, one copy, batch by batch.", rich_help_panel=FETCHED
        ),
    ] = False,
    decisions: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="What you marked in the report; OUT remembers it.", rich_help_panel=KEPT),
    ] = None,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable inputs that is tolerated.")] = 0.01,
    memory_budget: Annotated[
        int | None,
        typer.Option(
            parser=_parse_size, metavar="SIZE", help="Memory of the search, e.g. 4GB; default: a quarter of all."
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Find duplicates in SRC and decide what to keep. Example: unmemorize dedup photos -o photos-dedup"""
    from dedup.options import Options, resolve_auto
    from dedup.pipeline import deduplicate
    from dedup.sources import Layout, Transfer, is_elsewhere, name_source
    from dedup.subjects import CAUTION

    out = out or Path(f"{name_source(src)}-dedup")
    chosen, by = resolve_auto(level, encoder, out, base)
    if embeddings is not None:
        if weights is not None or encoder != "auto" or chosen != "copy":
            raise typer.BadParameter("--embeddings takes the place of --encoder and --weights, at level copy")
        by, weights = "external", str(embeddings.resolve())
    begin = str(root.resolve()) if root else None
    layout = Layout(format_, begin, image_column, caption_column, id_column, split, subject_column, url_column)
    transfer = Transfer(download, cache, timeout, retries, threads, private == "allow", streaming)
    start = str(base.resolve()) if base else None
    others = tuple(str(other if is_elsewhere(other) else other.resolve()) for other in against or [])
    options = Options(
        chosen,
        by,
        weights,
        weights_sha256,
        max_false_pairs=max_false_pairs,
        hash_decode=hash_decode,
        max_pixels=max_pixels,
        max_frames=max_frames,
        flips=flips,
        rotations=rotations,
        prefer=prefer,
        per=per,
        against_split=against_split,
        max_copies=max_copies,
        max_loss=max_loss,
        layout=layout,
        base=start,
        against=others,
    )
    run = deduplicate(
        src,
        out,
        options,
        jobs=jobs,
        address=choose_address(engine, address),
        subject_key=subject_key,
        understood=i_understand,
        transfer=transfer,
        decisions=decisions,
        memory_budget=memory_budget,
    )
    if run["medical"]:
        typer.echo(f"Warning: {CAUTION}.", err=True)
    if report:
        from dedup import against_report
        from dedup.report import write_report

        write_report(out, jobs=jobs)
        against_report.write_report(out, jobs=jobs)
    counts = run["counts"]
    told = "".join(f"{line}\n" for line in dict.fromkeys(map(_describe_columns, run["layouts"])) if line)
    told += _describe_base(run["base"]) if base else ""
    typer.echo(json.dumps(counts) if json_ else told + _summary(run, out, report))
    if counts["unreadable"] > max_bad * counts["rows"]:
        raise TooManyBad(
            f"{counts['unreadable']} of {counts['rows']} inputs are unreadable, more than --max-bad {max_bad}: "
            f"see the rows with status in {out}/manifest"
        )


def _describe_columns(layout: dict) -> str:
    """Which columns were read; nothing for images and tar shards."""
    if layout["image_column"] is None:
        return ""
    caption = layout["caption_column"] or "no column (--caption-column names one)"
    key = layout["id_column"] or ("the path" if layout["format"] == "table" else "the number of the row")
    return f"Columns: images in {layout['image_column']}, captions in {caption}; key of a row: {key}."


def _describe_base(base: dict) -> str:
    """What a run took over from its base, in a line or two."""
    again = " but hashed again, because library versions differ" if base["hashed_again"] else ""
    text = f"Base: {base['known']:,} images were known{again}, {base['published']:,} of them published: those stay.\n"
    if base["gone"]:
        text += f"{base['gone']:,} images of the base are gone from SRC, {base['kept_gone']:,} of them kept ones.\n"
    return text


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


def _summary(run: dict, out: Path, report: bool) -> str:
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
    return "\n".join(lines)


@app.command()
def match(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Whatever `dedup` takes as SRC, or one picture file.")
    ],
    against: Annotated[Path, typer.Option(metavar="OUT", help="A finished `unmemorize dedup … --level copy`.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Results; default: IMAGES' name + -matches.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Columns file (or key) and prompt: what each was drawn for.")
    ] = None,
    jobs: JobsOption = 0,
    engine: EngineOption = "local",
    address: AddressOption = None,
    report: Annotated[bool, typer.Option(help="Write the HTML report.")] = True,
    max_false_pairs: Annotated[
        float, typer.Option(min=0, help="Unrelated pictures that are compared with each, on average.")
    ] = 3.0,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable inputs that is tolerated.")] = 0.01,
    json_: JsonOption = False,
) -> None:
    """Find out which training pictures IMAGES are. Example: unmemorize match generations --against photos-dedup"""
    from dedup.match_files import match_files
    from dedup.match_report import write_report
    from dedup.sources import name_source

    out = out or Path(f"{images.stem if images.is_file() else name_source(images)}-matches")
    where = choose_address(engine, address)
    found = match_files(
        images, against, out, prompts=prompts, max_false_pairs=max_false_pairs, jobs=jobs, address=where
    )
    counts = found["counts"]
    page = write_report(out, jobs=jobs) if report else None
    typer.echo(json.dumps(counts) if json_ else _summarise_matches(counts, out, page))
    if counts["unreadable"] > max_bad * counts["pictures"]:
        raise TooManyBad(
            f"{counts['unreadable']} of {counts['pictures']} inputs are unreadable, more than --max-bad {max_bad}: "
            f"see the rows with status in {out}/queries.parquet"
        )


def _summarise_matches(counts: dict, out: Path, page: Path | None) -> str:
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


@app.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A finished `unmemorize dedup`.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is empty or not there yet.")],
    format_: Annotated[
        ExportFormat, typer.Option("--format", help="same: as SRC came; index: copies nothing.")
    ] = "same",
    rows: Annotated[
        Literal["kept", "weighted", "all"], typer.Option(help="weighted: all readable rows, and a weight for each.")
    ] = "kept",
    alpha: Annotated[float, typer.Option(min=0, help="Of weighted: a group of m copies weighs 1/m^alpha a row.")] = 1.0,
    captions: Annotated[
        Literal["survivor", "longest", "list"], typer.Option(help="Of all copies; list adds them as `captions`.")
    ] = "survivor",
    jobs: JobsOption = 0,
    engine: EngineOption = "local",
    address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """Write what OUT keeps as a dataset, bytes untouched. Example: unmemorize export photos-dedup photos-clean"""
    from dedup.export import Options
    from dedup.export import export as export_rows

    where = choose_address(engine, address)
    counts = export_rows(out, dest, Options(format_, rows, alpha, captions), jobs=jobs, address=where)
    beside = f", {counts['exported_beside']:,} more in samples of theirs" if counts.get("exported_beside") else ""
    without = f" {counts['without_url']:,} have no address." if counts.get("without_url") else ""
    left = counts.get("columns_left")
    left_ = f" {format_} cannot hold the columns {', '.join(left)}: parquet can." if left else ""
    members = counts.get("members_left")
    left_ += f" Members {', '.join(members)} of samples stay behind: --format same keeps them." if members else ""
    text = f"{counts['exported']:,} of {counts['rows']:,} rows exported{beside}: {dest}.{without}{left_}"
    typer.echo(json.dumps(counts) if json_ else text)


@app.command()
def plant(
    src: SourceArgument,
    out: OutOption,
    canaries: Annotated[int, typer.Option(help="Planted images, a multiple of the number of levels.")] = 24,
    controls: Annotated[int, typer.Option(help="Images like the canaries that are never planted.")] = 48,
    fillers: Annotated[int, typer.Option(help="Other images of the dataset.")] = 250,
    held_out: Annotated[int, typer.Option(help="Images kept apart, to measure how good a model is.")] = 0,
    edited: Annotated[float, typer.Option(help="Share of canaries whose copies are edited.")] = 0.5,
    min_distance: Annotated[float, typer.Option(help="Normalised ℓ2 of a canary to every other image.")] = 0.25,
    resolution: Annotated[int, typer.Option(help="Side in pixels at which distances are measured.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws which canary stands how often.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Plant images at known multiplicities, 0 … 64, in a copy of SRC. Example: unmemorize plant photos -o planted"""
    from dedup.plant import plant as plant_images

    table = plant_images(
        src,
        out,
        canaries=canaries,
        controls=controls,
        fillers=fillers,
        held_out=held_out,
        edited=edited,
        min_distance=min_distance,
        resolution=resolution,
        seed=seed,
    )
    copies = table["key"].count()
    counts = {"copies": copies, "canaries": canaries, "controls": controls, "fillers": fillers}
    text = f"{copies} copies of {canaries} canaries planted among {fillers} other images: {out}"
    typer.echo(json.dumps(counts) if json_ else text)
