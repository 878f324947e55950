"""Every source × every export, read by the libraries that people read them with: bytes, keys, captions, order."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from made import (
    CAPTIONS,
    KEPT,
    LISTS,
    LONGEST,
    MORE,
    READ,
    READ_SAME,
    READABLE,
    SOURCES,
    URLS,
    check,
    dedup,
    elsewhere,
    pack,
    picture,
)

from dedup import exports, manifest, sources
from dedup.export import MARK, Options, export
from dedup.exports import ExportError
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "addresses")) for name in SOURCES]
)
def run_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    src, layout = SOURCES[request.param](folder)
    options = DedupOptions(per="none", layout=layout)
    deduplicate(src, folder / "out", options, jobs=1, transfer=elsewhere(folder))
    assert manifest.read(folder / "out").filter("keep")["id"].to_list() == KEPT
    return request.param, src, folder / "out"


@pytest.fixture
def made(run_once: tuple[str, Path, Path], tmp_path: Path) -> tuple[str, Path, Path]:
    """Name of the source, SRC, OUT: for tests that change neither. The images of a table are at hand."""
    _, src, _ = run_once
    (tmp_path / "images").symlink_to(src.parent / "images")
    return run_once


@pytest.mark.parametrize("format_", ["same", *READ])
def test_bytes_captions_and_order(made: tuple[str, Path, Path], tmp_path: Path, format_: str) -> None:
    name, _, out = made
    counts = export(out, tmp_path / "dest", Options(format_), jobs=1)
    read = READ_SAME[name] if format_ == "same" else READ[format_]
    assert counts["exported"] == 3
    check(list(read(tmp_path / "dest")), KEPT, CAPTIONS)


@pytest.mark.parametrize("format_", ["same", *READ])
def test_policies(made: tuple[str, Path, Path], tmp_path: Path, format_: str) -> None:
    """All readable rows, each with its weight; the longest caption of each group; the list of all of them."""
    name, _, out = made
    read = READ_SAME[name] if format_ == "same" else READ[format_]
    export(out, tmp_path / "longest", Options(format_, "weighted", 0.5, "longest"), jobs=1)
    found = list(read(tmp_path / "longest"))
    group = {0: 0, 1: 1, 2: 0, 4: 4, 5: 0}
    check(found, READABLE, {number: LONGEST[group[number]] for number in READABLE})
    assert [one["weight"] for one in found] == pytest.approx([3**-0.5, 1, 3**-0.5, 1, 3**-0.5])
    export(out, tmp_path / "list", Options(format_, captions="list"), jobs=1)
    found = list(read(tmp_path / "list"))
    check(found, KEPT, CAPTIONS)
    assert [one["captions"] for one in found] == [LISTS[number] for number in KEPT]


@pytest.mark.parametrize("format_", READ)
def test_other_columns_go_along(made: tuple[str, Path, Path], tmp_path: Path, format_: str) -> None:
    """Under their names and types, or as text where SRC has none; the JSON of a sample as a column, or its fields."""
    name, _, out = made
    export(out, tmp_path / "dest", Options(format_), jobs=1)
    found = list(MORE[format_](tmp_path / "dest"))
    typed = name in ("table in parquet", "parquet", "datasets", "datasets, splits")
    with_json = ("folder", "tars", "gzipped tar", "img2dataset", "tars elsewhere", "addresses")
    if format_ != "webdataset" and name in with_json:
        found = [json.loads(row["json"]) for row in found]
        assert found[0].get("key", "0000")[-4:] == "0000"  # as it stood there: of the sample itself
    if name != "imagefolder":
        assert [row["url"] for row in found] == [URLS[number] for number in KEPT]
    if "tar" not in name and name not in ("img2dataset", "addresses"):
        stars = [number if typed or name == "folder" else str(number) for number in KEPT]
        assert [row["stars"] for row in found] == stars
    if format_ == "huggingface" and typed:
        saved = datasets.load_from_disk(tmp_path / "dest")
        kind = (saved["train"] if isinstance(saved, datasets.DatasetDict) else saved).features["stars"].dtype
        assert kind == ("int64" if "table" in name else "int8")


@pytest.mark.parametrize("format_", ["same", *READ, "index"])
def test_equal_exports_have_equal_bytes_and_read_as_sources(
    made: tuple[str, Path, Path], tmp_path: Path, format_: str
) -> None:
    """Whatever the number of workers; `unmemorize dedup` finds nothing more to drop in what comes out."""
    name, _, out = made
    for dest, jobs in (("one", 1), ("two", 2 if name in ("tars", "parquet") and format_ == "same" else 1)):
        export(out, tmp_path / dest, Options(format_, captions="list"), jobs=jobs)
    files = {
        path.relative_to(tmp_path / "one"): path.read_bytes()
        for path in (tmp_path / "one").rglob("*")
        if path.is_file()
    }
    assert len(files) > 1
    assert files == {
        path.relative_to(tmp_path / "two"): path.read_bytes()
        for path in (tmp_path / "two").rglob("*")
        if path.is_file()
    }
    if format_ != "index":
        again = next((tmp_path / "one").glob("shop.*"), tmp_path / "one")
        layout = Layout(root=str(tmp_path / "images"), id_column="sku") if again != tmp_path / "one" else Layout()
        run = deduplicate(again, tmp_path / "again", DedupOptions(per="none", layout=layout), jobs=1)
        assert (run["counts"]["rows"], run["counts"]["dropped"]) == (3, 0)
        if format_ == "same":
            before = manifest.read(out).filter("keep")
            rows = manifest.read(tmp_path / "again")
            assert rows["sha256"].to_list() == before["sha256"].to_list()
            if name not in ("parquet", "datasets", "datasets, splits"):  # whose keys are numbers of rows
                assert rows["key"].to_list() == before["key"].to_list()


def test_addresses(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    """img2dataset's input; an `imagefolder` that names none is told so."""
    name, _, out = made
    if name == "imagefolder":
        with pytest.raises(ExportError, match="no row has an address"):
            export(out, tmp_path / "dest", Options("urls"))
        return
    counts = export(out, tmp_path / "dest", Options("urls"), jobs=1)
    assert counts["without_url"] == 0
    table = pq.read_table(tmp_path / "dest" / "urls.parquet")
    assert table.column("url").to_pylist() == [URLS[number] for number in KEPT]
    assert table.column("caption").to_pylist() == [CAPTIONS[number] for number in KEPT]


def test_where_an_export_may_not_be_written(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "folder")
    for dest, why in ((src / "new", "lies inside the source"), (src, "inside the source"), (out / "x", "results of")):
        with pytest.raises(ExportError, match=why):
            export(out, dest)
        assert not (dest / MARK).exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ExportError, match="is not empty"):
        export(out, tmp_path / "full")
    with pytest.raises(ExportError, match="alpha"):
        export(out, tmp_path / "dest", Options(alpha=float("nan")))
    with pytest.raises(manifest.ManifestError, match="holds no finished dedup run"):
        export(tmp_path / "nothing", tmp_path / "dest")


def test_two_exports_into_one_folder_and_a_refusal_that_leaves_nothing(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "imagefolder")
    dest = tmp_path / "dest"
    dest.mkdir()
    with sources.hold(dest, "it"), pytest.raises(SourceError, match="in use by another run"):
        export(out, dest)
    with pytest.raises(ExportError, match="no row has an address"):
        export(out, dest, Options("urls"))
    assert export(out, dest, Options("index"))["exported"] == 3


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "tars")
    (src / "00002.tar").write_bytes(pack([1]))
    with pytest.raises(SourceError, match="has changed since"):
        export(out, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


# Compressed bytes do not lie as they are; images of a table are copied by conversions only.
@pytest.mark.parametrize("format_", ["same", *READ])
@pytest.mark.parametrize("make", ["folder", "imagefolder", "tars", "csv", "parquet", "datasets"])
def test_other_bytes_under_the_same_stamp_are_seen(tmp_path: Path, make: str, format_: str) -> None:
    """Size and time are as they were: only the digest tells. What is complete in DEST is right."""
    src, out = dedup(tmp_path, make)
    if (make, format_) == ("csv", "same"):
        return
    folder = tmp_path / "images" if (tmp_path / "images").exists() else src
    for path in (path for path in folder.rglob("*") if path.is_file()):
        data, stat = path.read_bytes(), path.stat()
        if (at := data.find(picture(1))) >= 0:
            path.write_bytes(data[: at + 60] + bytes([data[at + 60] ^ 1]) + data[at + 61 :])
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceError, match="holds other bytes than when") as caught:
        export(out, tmp_path / "dest", Options(format_), jobs=1)
    assert "\n" not in str(caught.value)
    assert "disk" not in str(caught.value)


@pytest.mark.parametrize("format_", ["same", *READ])
def test_the_same_command_goes_on_where_it_was_stopped(
    made: tuple[str, Path, Path], tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends in the bytes of an export that nobody stopped; other options are refused."""
    _, _, out = made
    export(out, tmp_path / "whole", Options(format_), jobs=1)
    check_bytes = exports.check_bytes
    seen = 0

    def stop(*arguments: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt
        check_bytes(*arguments)

    for module in (exports, exports.tars, exports.folders, exports.parquets, exports.saved):
        monkeypatch.setattr(module, "check_bytes", stop)
    try:
        export(out, tmp_path / "dest", Options(format_), jobs=1)
    except KeyboardInterrupt:
        with pytest.raises(ExportError, match="with other options"):
            export(out, tmp_path / "dest", Options(format_, "all"), jobs=1)
    counts = export(out, tmp_path / "dest", Options(format_), jobs=1)
    files = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    found = {path.relative_to(tmp_path / "dest"): path for path in (tmp_path / "dest").rglob("*") if path.is_file()}
    assert found.keys() == files.keys()
    assert all(found[name].read_bytes() == files[name].read_bytes() for name in files)
    seen = -1_000
    assert export(out, tmp_path / "dest", Options(format_), jobs=1) == counts  # done already
    assert seen == -1_000
