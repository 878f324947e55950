"""RUN + prompts → images to look at: DIR with PNG files, a table of them and, by `sheet`, a page.

In: a RUN, trained or adopted, and prompts of anybody's. Out: in DIR

* `images/<digest>/*.png`, the digest naming model and settings, so that nothing is drawn twice;
* `samples.parquet`, `samples.csv`: SAMPLES, one row an image of the last command, those without a file too;
* `guards.parquet`: what a guard compared them with; `sample.json`: settings, counts and versions, written last.

The noise of an image comes from seed, prompt and number alone. The same command goes on after a kill. Knows nothing of
attacks.

    unmemorize sample RUN --prompt "a red fox" -n 4 --guard copy
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image
from tqdm import tqdm

from dedup import manifest
from dedup.engine import available_cpus
from dedup.options import lock

GUIDANCE = 7.5  # diffusers' default for Stable Diffusion
BATCH = 64  # images through the model at a time; part of the digest, because it may change the last bit
TABLES = {".csv": ",", ".tsv": "\t"}
NAMES = ("prompt", "caption", "text")  # columns of a table that may hold the prompts, the first one of these
ENDS = (".parquet", "-guards.parquet")  # of the two tables of a prompt
UNPROMPTED = ("DDPMPipeline",)  # takes no prompts

SAMPLES: dict[str, pl.DataType | type[pl.DataType]] = {
    "prompt": pl.String,
    "number": pl.Int64,  # 0 … n - 1
    "seed": pl.Int64,
    "guard": pl.String,  # of `guards.name_guards`; "none"
    "status": pl.String,  # "ok"; without a file: "nan" (the model gave no finite numbers), "refused" (by a guard)
    "attempts": pl.Int64,  # times the image was drawn, 1 without a copy guard
    "file": pl.String,  # relative to DIR
}


class SampleError(ValueError):
    """A run that cannot be sampled, or no prompts for it."""


def sample_run(
    run: Path,
    prompts: Iterable[str],
    folder: Path,
    *,
    n: int = 4,
    seed: int = 0,
    guidance_scale: float = 1.0,
    steps: int = 15,
    guards: Sequence[str] = (),
) -> pl.DataFrame:
    """n images for each distinct prompt; returns samples.parquet. A model without captions takes no prompts.

    Raises SampleError, GuardError, ModelError, ValueError or OSError.
    """
    from defense.guards import name_guards

    run, folder = run.resolve(), folder.resolve()
    config = read_config(run)
    asked = check_prompts(list(dict.fromkeys(prompts)), config)
    if n < 1 or steps < 1:
        raise SampleError(f"n = {n} images in steps = {steps}: both must be at least 1")
    decisive: dict[str, Any] = {
        "n": n,
        "seed": seed,
        "guidance_scale": float(guidance_scale),
        "steps": steps,
        "batch": BATCH,
    }
    decisive |= {"guard": name_guards(guards)}
    digest = digest_model(run / "model", decisive | {"out": config["out_sha256"] if guards else None})
    place = folder / "images" / digest
    names = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in asked]
    todo = [
        (name, prompt) for name, prompt in zip(names, asked, strict=True) if not (place / f"{name}.parquet").exists()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        if todo:
            draw_prompts(run, place, todo, decisive, guards, config)
        table, log = (pl.concat([pl.read_parquet(place / f"{name}{end}") for name in names]) for end in ENDS)
        manifest.write_parquet(folder / "samples.parquet", table)
        manifest.write_atomic(folder / "samples.csv", table.write_csv)
        manifest.write_parquet(folder / "guards.parquet", log)
        told = {"run": str(run), "out": config["out"], "arm": config["arm"], "training_seed": config["seed"]}
        told |= {"pipeline": config.get("pipeline", "StableDiffusionPipeline"), "digest": digest}
        versions = {name: version(name) for name in ("unmemorize", "torch", "diffusers")}
        described = {"options": decisive, "counts": count(table), "model": told, "versions": versions}
        manifest.write_json(folder / "sample.json", described)
    return table


def sample_trained(out: Path, run: Path, n: int) -> None:
    """RUN/samples: images for n captions of OUT, a look at what training has made; guided if the model had a base."""
    config = read_config(run)
    prompted = config.get("pipeline") not in UNPROMPTED
    scale = GUIDANCE if prompted and config["config"].get("base") else 1.0
    sample_run(run, choose_prompts(out, n) if prompted else [], run / "samples", guidance_scale=scale)


def count(table: pl.DataFrame) -> dict[str, int]:
    """What became of the images."""
    counts = {"images": len(table), "prompts": table["prompt"].n_unique()}
    counts |= {status: len(table.filter(status=status)) for status in ("ok", "refused", "nan")}
    return counts | {"redrawn": len(table.filter(pl.col("attempts") > 1))}


def draw_prompts(
    run: Path,
    place: Path,
    todo: Sequence[tuple[str, str]],
    settings: dict[str, Any],
    guards: Sequence[str],
    config: dict[str, Any],
) -> None:
    """(name, prompt) → the images and the two tables of each prompt in `place`, the first one last."""
    import torch

    from defense.guards import Setting, build_sampler, derive_seed
    from defense.model import load_pipeline

    options = config["config"]
    torch.set_num_threads(options["threads"] or available_cpus())
    pipeline = load_pipeline(run / "model", device=options.get("device", "auto"))
    side, out, n = options["resolution"], Path(config["out"]), settings["n"]
    setting = Setting(pipeline, settings["steps"], settings["guidance_scale"], BATCH, side, out)
    sampler = build_sampler(guards, setting)
    with tqdm(desc=f"sample {run.name}", unit=" images", total=len(todo) * n, file=sys.stderr, disable=None) as bar:
        for name, prompt in todo:
            seeds = [derive_seed("sample", settings["seed"], prompt, number) for number in range(n)]
            drawn = sampler([prompt] * n, seeds)
            files = [place / f"{name}-{j:03d}.png" if drawn.status[j] == "ok" else None for j in range(n)]
            for path, image in zip(files, drawn.pixels, strict=True):
                if path is not None:
                    manifest.write_atomic(path, partial(Image.fromarray(image).save, format="PNG"))
            tries = np.ones(n, np.int64)
            np.maximum.at(tries, drawn.log["place"].to_numpy(), drawn.log["attempt"].to_numpy() + 1)
            columns = {
                "number": range(n),
                "seed": seeds,
                "status": drawn.status,
                "attempts": tries,
                "file": [path and path.relative_to(place.parent.parent).as_posix() for path in files],
            }
            table = pl.DataFrame(columns, schema_overrides={"file": pl.String})
            table = table.with_columns(prompt=pl.lit(prompt), guard=pl.lit(settings["guard"]))
            log = drawn.log.select(pl.lit(prompt).alias("prompt"), pl.all())
            manifest.write_parquet(place / f"{name}{ENDS[1]}", log)
            table = table.select(pl.col(column).cast(kind) for column, kind in SAMPLES.items())
            manifest.write_parquet(place / f"{name}{ENDS[0]}", table)
            bar.update(n)


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Raises SampleError when RUN is no run."""
    path = run / "config.json"
    if not path.exists():
        raise SampleError(f"{run} is no run (no config.json): run `unmemorize train` or `unmemorize adopt` first")
    return manifest.read_json(path)


def check_prompts(prompts: list[str], config: dict[str, Any]) -> list[str]:
    """The prompts, or the empty one for a model that takes none. Raises SampleError."""
    if config.get("pipeline") in UNPROMPTED:
        if prompts:
            raise SampleError(f"a {config['pipeline']} takes no prompts: leave them out")
        return [""]
    if not prompts:
        raise SampleError("there is no prompt: give --prompt TEXT, or --prompts FILE")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """A line each; or the column prompt, caption or text of a .csv, .tsv, .jsonl or .parquet. Raises SampleError."""
    try:
        if path.suffix in TABLES:
            table = pl.read_csv(path, separator=TABLES[path.suffix], infer_schema=False)
        elif path.suffix == ".jsonl":
            table = pl.read_ndjson(path)
        elif path.suffix == ".parquet":
            table = pl.read_parquet(path)
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            table = pl.DataFrame({"prompt": lines}, schema={"prompt": pl.String})
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise SampleError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    name = next((name for name in NAMES if name in table.columns), None)
    if name is None or table.schema[name] != pl.String:
        raise SampleError(f"{path} needs a column {', '.join(NAMES[:-1])} or {NAMES[-1]} with texts")
    found = [text for text in table[name].drop_nulls() if text.strip()]
    if not found:
        raise SampleError(f"{path} holds no prompt")
    return found


def choose_prompts(out: Path, n: int) -> list[str]:
    """Captions of n kept rows of OUT: half of those that stand for most rows, half of rows that stand for one alone."""
    kept = manifest.read(out, ["caption", "sha256", "keep", "represents"]).filter("keep")
    named = kept.filter(pl.col("caption").fill_null("").str.strip_chars() != "").sort("sha256")
    often = named.sort(-pl.col("represents"), maintain_order=True)["caption"].unique(maintain_order=True)
    once = named.filter(represents=1)["caption"].unique(maintain_order=True)
    first = often.head(n - n // 2).to_list()
    return list(dict.fromkeys(first + [caption for caption in once if caption not in first]))[:n]


def digest_model(model: Path, settings: dict[str, Any]) -> str:
    """16 hex digits over every file of the model folder and the settings."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        state.update(f"\n{path.relative_to(model).as_posix()} {content}".encode())
    return state.hexdigest()[:16]
