"""Filters at load time, and the verb."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import polars as pl
import pytest
import torch
import webdataset as wds
from made import CAPTIONS, DATA, KEPT, check, dedup, picture, read_rows, read_webdataset, write_tars
from typer.testing import CliRunner

from dedup.export import Options, export, keep
from dedup.exports import ExportError
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate
from eval.cli import app

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("copied", [False, True])
def test_filters_for_loaders(tmp_path: Path, copied: bool) -> None:
    """Of OUT itself, or of an index that was exported: webdataset `.select`, `datasets`, torch."""
    src, out = dedup(tmp_path, "tars")
    if copied:
        export(out, tmp_path / "index", Options("index"), jobs=1)
        out = tmp_path / "index"
        assert (out / "keys.txt").read_text() == "00000.tar:k/0000\n00000.tar:k/0001\n00001.tar:k/0004\n"
        assert pl.read_parquet(out / "index.parquet")["keep"].to_list() == [n in KEPT for n in range(6)]
    kept = keep(out)
    shards = sorted(str(path) for path in src.glob("*.tar"))
    found = wds.WebDataset(shards, shardshuffle=False).select(kept)
    assert [sample["png"] for sample in found] == [DATA[number] for number in KEPT]
    assert list(torch.utils.data.Subset(DATA, kept.indices())) == [DATA[number] for number in KEPT]
    assert kept.keys() == {"k/0000", "k/0001", "k/0004"}


def test_equal_keys_in_two_shards_are_told_apart(tmp_path: Path) -> None:
    shards = {"a.tar": {"k.png": picture(0)}, "b.tar": {"k.png": picture(0), "l.png": picture(1)}}
    src = write_tars(tmp_path, shards)
    deduplicate(src, tmp_path / "out", DedupOptions(), jobs=1)
    samples = wds.WebDataset(sorted(map(str, src.glob("*.tar"))), shardshuffle=False).select(keep(tmp_path / "out"))
    assert [(Path(one["__url__"]).name, one["__key__"]) for one in samples] == [("a.tar", "k"), ("b.tar", "l")]


def test_equal_names_of_shards_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    """And a shard that the run has not seen is no reason to drop all that is in it."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / "src" / name).mkdir(parents=True)
        with tarfile.open(tmp_path / "src" / name / "0.tar", "w") as archive:
            info = tarfile.TarInfo("k.png")
            info.size = len(picture(seed))
            archive.addfile(info, io.BytesIO(picture(seed)))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    kept = keep(tmp_path / "out")
    samples = wds.WebDataset(sorted(map(str, (tmp_path / "src").rglob("*.tar"))), shardshuffle=False).select(kept)
    assert [Path(one["__url__"]).parent.name for one in samples] == ["a", "c"]
    with pytest.raises(ExportError, match="none of the shards of this run"):
        kept({"__url__": "elsewhere/1.tar", "__key__": "k"})


def test_numbers_of_rows_for_datasets(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "datasets, splits")
    kept = keep(out)
    for split, numbers in (("train", [0, 1]), ("test", [4])):
        part = datasets.load_from_disk(src)[split].select(kept.indices(split))
        check(list(read_rows(part)), numbers, CAPTIONS)
    chosen = set(kept.indices("train"))
    undecoded = datasets.load_from_disk(src)["train"].cast_column(
        "image", datasets.Image(decode=False)
    )  # one is broken
    filtered = undecoded.filter(lambda _, n: n in chosen, with_indices=True)
    check(list(read_rows(filtered.cast_column("image", datasets.Image()))), [0, 1], CAPTIONS)
    with pytest.raises(ExportError, match="there are test, train"):
        kept.indices("validation")


def test_the_verb(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "tars")
    done = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "dest"), "--jobs", "1"])
    assert done.output == f"3 of 6 rows exported: {tmp_path / 'dest'}.\n"
    words = ["export", str(out), str(tmp_path / "all"), "--rows", "weighted", "--alpha", "0", "--jobs", "1", "--json"]
    assert json.loads(CliRunner().invoke(app, words).output) == {"rows": 6, "exported": 5, "exported_beside": 0}
    assert {sample["weight"] for sample in read_webdataset(tmp_path / "all")} == {1.0}
