"""The verbs of the dedup stage: parse → call → print. `eval/cli.py` assembles them into the program `unmemorize`."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from dedup import memory, summary

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

# groups of options
_kept = partial(typer.Option, rich_help_panel="What is kept")
_read = partial(typer.Option, rich_help_panel="How SRC is read")
_fetched = partial(typer.Option, rich_help_panel="What is fetched from elsewhere")


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


def _check_bad(bad: int, inputs: int, max_bad: float, table: str) -> None:
    if bad > max_bad * inputs:
        told = f"{bad} of {inputs} inputs are unreadable, more than --max-bad {max_bad}"
        raise TooManyBad(f"{told}: see the rows with status in {table}")


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
    flips: Annotated[Keep, _kept(help="Mirrored copies.")] = "keep",
    rotations: Annotated[Keep, _kept(help="Turned copies.")] = "keep",
    base: Annotated[
        Path | None, _kept(metavar="OUT", help="Finished run over older rows: what it kept stays kept.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        _kept(metavar="OTHER", help="Test set or opt-out list, or an OUT: what is a copy of it goes. Repeatable."),
    ] = None,
    prefer: Annotated[
        str, _kept(help="Keep by resolution, quality, bytes, caption, source:NAME …, then as usual.")
    ] = "",
    per: Annotated[
        Literal["auto", "none", "source", "split"], _kept(help="Drop copies only inside each; auto: splits.")
    ] = "auto",
    against_split: Annotated[
        str | None, _kept(metavar="NAME", help="Drop what matches this split, and none of its own.")
    ] = None,
    max_copies: Annotated[int, _kept(min=1, help="Copies of a picture that are kept.")] = 1,
    max_loss: Annotated[float, _kept(min=0, max=1, help="Alarm when a source or split loses more of its rows.")] = 0.5,
    max_pixels: Annotated[int, _read(help="Larger images are not decoded.")] = 100_000_000,
    max_frames: Annotated[int, _read(help="Longer animations are not decoded.")] = 1_000,
    format_: Annotated[Format | None, _read("--format", help="Of SRC; default: what it looks like.")] = None,
    root: Annotated[Path | None, _read(help="Folder that the paths of a table start in; default: its own.")] = None,
    image_column: Annotated[str | None, _read(help="Of paths or bytes; default: by convention.")] = None,
    caption_column: Annotated[str | None, _read(help="Default: by convention, text, caption …")] = None,
    id_column: Annotated[str | None, _read(help="Of the key of each row; default: its path or number.")] = None,
    split: Annotated[str | None, _read(help="Of a Hugging Face dataset; default: all of them.")] = None,
    subject_column: Annotated[
        str | None, _read(help="Of the person shown, the unit of splits; hashed. DICOM: PatientID.")
    ] = None,
    subject_key: Annotated[
        Path | None, _read(help="File with the key of those hashes; default: a secret one of OUT.")
    ] = None,
    i_understand: Annotated[
        bool, _read("--i-understand", help="Read medical pictures and pictures of persons.")
    ] = False,
    url_column: Annotated[str | None, _fetched(help="Of addresses to download; default: by convention.")] = None,
    download: Annotated[
        Path | None, _fetched(help="Where images of addresses are kept; default: OUT/download.")
    ] = None,
    cache: Annotated[
        Path | None, _fetched(help="Where remote shards and streams are kept; default: ~/.cache/unmemorize.")
    ] = None,
    timeout: Annotated[float, _fetched(min=0.1, help="Seconds that a server may say nothing.")] = 10.0,
    retries: Annotated[int, _fetched(min=0, help="Of each address or shard, after the first time.")] = 1,
    threads: Annotated[int, _fetched(min=1, help="Addresses that are asked for at once.")] = 64,
    private: Annotated[
        Literal["refuse", "allow"], _fetched(help="Addresses of a list inside this network.")
    ] = "refuse",
    streaming: Annotated[
        bool, _fetched("--streaming", help="Of hf://…: only the split, one copy, batch by batch.")
    ] = False,
    decisions: Annotated[
        Path | None, _kept(metavar="JSON", help="What you marked in the report; OUT remembers it.")
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
    typer.echo(json.dumps(counts) if json_ else summary.describe_run(run, out, report=report))
    _check_bad(counts["unreadable"], counts["rows"], max_bad, f"{out}/manifest")


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
    typer.echo(json.dumps(counts) if json_ else summary.describe_matches(counts, out, page))
    _check_bad(counts["unreadable"], counts["pictures"], max_bad, f"{out}/queries.parquet")


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
    typer.echo(json.dumps(counts) if json_ else summary.describe_export(counts, dest, format_))


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
