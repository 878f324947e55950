"""Exports from one format to another: names, and what goes along."""

from pathlib import Path

import datasets
import polars as pl
import pytest
import webdataset as wds
from made import CAPTIONS, KEPT, dedup, picture, write_tars

from dedup.export import MARK, Options, export
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "keys", [("a", "a"), ("a", "A"), ("../../x", "b"), ("/tmp/x", "b"), ("a", "a/b"), ("a" * 250, "b"), ("a//b", "c")]
)
def test_keys_that_are_no_names_become_numbers(tmp_path: Path, keys: tuple[str, str]) -> None:
    """Equal keys in two shards, and names that would leave DEST."""
    shards = {f"{n}.tar": {f"{key}.png": picture(n)} for n, key in enumerate(keys)}
    deduplicate(write_tars(tmp_path, shards), tmp_path / "out", DedupOptions(), jobs=1)
    before = {path for path in tmp_path.rglob("*") if "dest" not in path.parts}
    export(tmp_path / "out", tmp_path / "dest", Options("imagefolder"), jobs=1)
    rows = pl.read_ndjson(tmp_path / "dest" / "metadata.jsonl")
    assert rows["file_name"].to_list() == ["000000000.png", "000000001.png"]
    assert rows["key"].to_list() == list(keys)
    assert {path for path in tmp_path.rglob("*") if path.name != "dest" and "dest" not in path.parts} == before
    assert sorted(p.name for p in (tmp_path / "dest").iterdir()) == [MARK, *rows["file_name"], "metadata.jsonl"]


def test_a_folder_becomes_a_webdataset_whose_keys_are_its_paths(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "folder")
    export(out, tmp_path / "dest", Options("webdataset"), jobs=1)
    samples = list(wds.WebDataset(str(tmp_path / "dest" / "00000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"sub/p{number}" for number in KEPT]
    assert samples[0]["json"]["key"] == "sub/p0.png"
    assert samples[0]["json"]["caption"] == samples[0]["txt"] == CAPTIONS[0]
    loaded = datasets.load_dataset("webdataset", data_files=str(tmp_path / "dest" / "*.tar"), split="train")
    assert loaded.column_names[:3] == ["png", "txt", "json"]
    assert len(loaded) == 3


@pytest.mark.parametrize("name", ["parquet", "imagefolder", "webdataset"])
def test_members_that_stay_behind_are_named(tmp_path: Path, name: str) -> None:
    """A mask and a class beside each image. From webdataset to webdataset they go along."""
    members = {
        f"{n}.{kind}": data for n in range(2) for kind, data in [("png", picture(n)), ("npy", b"x"), ("cls", b"1")]
    }
    src = write_tars(tmp_path, {"00000.tar": members})
    deduplicate(src, tmp_path / "out", DedupOptions(level="exact"), jobs=1)
    counts = export(tmp_path / "out", tmp_path / "dest", Options(name), jobs=1)
    assert counts["exported"] == 2
    assert counts.get("members_left") == (None if name == "webdataset" else [".cls", ".npy"])
    assert counts == export(tmp_path / "out", tmp_path / "dest", Options(name), jobs=1)
