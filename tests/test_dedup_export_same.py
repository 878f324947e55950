"""Exports in the format that a source came in, format by format."""

import io
import os
import tarfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import (
    CAPTIONS,
    KEPT,
    check,
    dedup,
    make_imagefolder,
    pack,
    picture,
    read_folder,
    read_parquet,
    read_saved,
    read_tar,
    read_webdataset,
)

from dedup.export import MARK, Options, export
from dedup.options import Options as DedupOptions
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_of_which_all_is_kept_is_the_same_file(tmp_path: Path, kind: int) -> None:
    """Long names, folders, global headers and all."""
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "x.tar"
    with tarfile.open(path, "w", format=kind, pax_headers={"comment": "of all"}) as archive:
        folder = tarfile.TarInfo("d" * 90)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, seed in enumerate([0, 1, 2]):
            for suffix, data in (("png", picture(seed)), ("txt", b"c"), ("cls", b"7")):
                info = tarfile.TarInfo(f"{'d' * 90}/{'k' * 60}{number}.{suffix}")
                info.size, info.mtime, info.uname = len(data), 1_600_000_000, "me"
                archive.addfile(info, io.BytesIO(data))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert (tmp_path / "dest" / "x.tar").read_bytes() == path.read_bytes()


def test_members_of_kept_samples_are_copied_as_they_are(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "tars")
    export(out, tmp_path / "dest", jobs=1)
    for name, gone in (("00000.tar", {"k/0002"}), ("00001.tar", {"k/0003", "k/0005"})):
        expected = [member for member in read_tar(src / name) if member[0].partition(".")[0] not in gone]
        assert read_tar(tmp_path / "dest" / name) == expected
        assert len(expected) in (8, 3)


def test_a_gzipped_shard_stays_one(tmp_path: Path) -> None:
    _, out = dedup(tmp_path, "gzipped tar")
    export(out, tmp_path / "dest", jobs=1)
    data = (tmp_path / "dest" / "00000.tar.gz").read_bytes()
    assert data[:2] == b"\x1f\x8b"
    assert data[4:8] == bytes(4)  # no time


def test_the_list_of_img2dataset_goes_along(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "img2dataset")
    export(out, tmp_path / "dest", jobs=1)
    before = pl.read_parquet(src / "00000.parquet")
    assert pl.read_parquet(tmp_path / "dest" / "00000.parquet").equals(before[KEPT])


def test_a_sample_with_several_images_stays_whole_while_one_is_kept(tmp_path: Path) -> None:
    """And says how many go along; hidden members belong to no sample."""
    members = {"._a.png": b"of macOS", "a.png": picture(0), "a.mask.png": picture(9), "b.png": picture(1)}
    members |= {"b.mask.png": picture(9), "c.png": picture(1), "c.mask.png": picture(9)}
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "x.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    counts = export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert [name for name, *_ in read_tar(tmp_path / "dest" / "x.tar")] == list(members)[:5]
    assert (counts["exported"], counts["exported_beside"]) == (3, 1)


def test_a_cut_shard_gives_what_the_manifest_knows(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    whole = pack([0, 1, 4])
    (tmp_path / "src" / "x.tar").write_bytes(whole[: whole.rindex(picture(2)) + 100])
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    for format_ in ("same", "parquet"):
        export(tmp_path / "out", tmp_path / format_, Options(format_), jobs=1)
    assert {name.partition(".")[0] for name, *_ in read_tar(tmp_path / "same" / "x.tar")} == {"k/0000", "k/0001"}
    check(list(read_parquet(tmp_path / "parquet")), [0, 1], CAPTIONS)


def test_files_are_linked_and_what_lies_beside_them_too(tmp_path: Path) -> None:
    src, out = dedup(tmp_path, "folder")
    export(out, tmp_path / "dest", jobs=1)
    names = sorted(path.relative_to(tmp_path / "dest").as_posix() for path in (tmp_path / "dest").rglob("*.*"))
    assert names == [
        MARK,
        *(f"sub/p{n}.{s}" for n in (0, 1) for s in ("json", "png", "txt")),
        "sub/p4.json",
        "sub/p4.png",
    ]
    assert all((tmp_path / "dest" / name).samefile(src / name) for name in names[1:])


def test_files_are_copied_where_links_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = dedup(tmp_path, "folder")

    def refuse(_: object, target: Path) -> None:
        assert target.parent.is_dir()
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    export(out, tmp_path / "dest", jobs=1)
    assert not (tmp_path / "dest/sub/p0.png").samefile(src / "sub/p0.png")
    check(list(read_folder(tmp_path / "dest")), KEPT, CAPTIONS)


@pytest.mark.parametrize(("make", "name"), [("csv", "shop.csv"), ("tsv", "shop.tsv"), ("jsonl", "shop.jsonl")])
def test_rows_of_a_table_keep_their_text(tmp_path: Path, make: str, name: str) -> None:
    """Each row of what is kept stands in the source letter for letter."""
    src, out = dedup(tmp_path, make)
    export(out, tmp_path / "dest", jobs=1)
    whole, found = src.read_bytes(), (tmp_path / "dest" / name).read_bytes()
    rows = [f"s{number}".encode() for number in KEPT]
    assert [row in found for row in rows] == [True] * 3
    assert len(found.splitlines()) == 3 + (make != "jsonl")
    assert all(line in whole.splitlines() for line in found.splitlines())
    assert (b"\r\n" in found) == (make == "csv")


def test_parquet_keeps_types_groups_and_compression(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "x.parquet"
    table = pa.table(
        {
            "image": [picture(n % 4) for n in range(6)],
            "text": pa.array(["a"] * 6).dictionary_encode(),
            "box": [[n, n + 1] for n in range(6)],
            "when": pa.array(range(6), pa.timestamp("us", "UTC")),
        }
    ).replace_schema_metadata({"made": "here"})
    pq.write_table(table, path, row_group_size=3, compression={"image": "NONE", "text": "ZSTD", "when": "GZIP"})
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    export(tmp_path / "out", tmp_path / "dest", jobs=1)
    found = pq.ParquetFile(tmp_path / "dest" / "x.parquet")
    assert found.read().equals(pq.read_table(path)[:4], check_metadata=True)
    assert [found.metadata.row_group(n).num_rows for n in range(2)] == [3, 1]
    codecs = [found.metadata.row_group(0).column(n).compression for n in (0, 1, 3)]
    assert codecs == ["UNCOMPRESSED", "ZSTD", "GZIP"]


def test_a_damaged_parquet_file_is_refused_and_converted(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "x.parquet"
    table = pa.table({"image": [picture(n) for n in (0, 1, 3, 2)], "text": ["a cat, ö", "a dog", "x", None]})
    pq.write_table(table, path, row_group_size=2, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    with pytest.raises(SourceError, match="is damaged, so it cannot be copied: export to another format"):
        export(tmp_path / "out", tmp_path / "dest", jobs=1)
    export(tmp_path / "out", tmp_path / "tars", Options("webdataset"), jobs=1)
    check(list(read_webdataset(tmp_path / "tars")), [0, 1], CAPTIONS)


def test_images_and_a_shard_of_one_name(tmp_path: Path) -> None:
    """A folder of both: each is exported in its way, and the shard does not count as lying beside the image."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.png").write_bytes(picture(7))
    (tmp_path / "src" / "x.tar").write_bytes(pack([0, 1, 2]))
    deduplicate(tmp_path / "src", tmp_path / "out", DedupOptions(), jobs=1)
    export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert (tmp_path / "dest" / "x.png").samefile(tmp_path / "src" / "x.png")
    assert {name.partition(".")[0] for name, *_ in read_tar(tmp_path / "dest" / "x.tar")} == {"k/0000", "k/0001"}


def test_a_dataset_that_was_loaded_is_given_back_with_its_images(tmp_path: Path) -> None:
    """What `datasets` makes of a folder: the cache holds paths only, the export the images themselves."""
    src, _ = make_imagefolder(tmp_path)
    (src / "p3.png").unlink()
    text = (src / "metadata.csv").read_text()
    (src / "metadata.csv").write_text("".join(row for row in text.splitlines(keepends=True) if "p3.png" not in row))
    deduplicate(src, tmp_path / "out", DedupOptions(layout=Layout("huggingface")), jobs=1)
    counts = export(tmp_path / "out", tmp_path / "dest", jobs=1)
    assert counts["exported"] == 3
    check(list(read_saved(tmp_path / "dest")), KEPT, CAPTIONS)
