"""Datasets that `datasets` saved or loads: the images as they lie in its arrow files, found again by their bytes."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dedup_parquet import damage, read_whatever
from typer.testing import CliRunner

from dedup import manifest, sources
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, parquet
from eval.cli import app


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return folder


def picture(seed: int, **options: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG", **options)
    return buffer.getvalue()


def make_dataset(images: Sequence[bytes | None], captions: list[object], **more: list) -> datasets.Dataset:
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    whole = datasets.Dataset.from_dict({"image": cells, "text": captions, **more})
    return whole.cast_column("image", datasets.Image(decode=False)).cast_column("image", datasets.Image())


def read_all(src: Path, **options: str) -> list[sources.Record]:
    return [record for shard in sources.list_shards(src, Layout(**options)) for record in sources.read_shard(shard)]


def check_bytes(run: dict, out: Path, expected: list[bytes]) -> None:
    """The readable rows of the manifest alone lead to the bytes."""
    rows = manifest.read(out).filter(status="ok")
    found = [
        sources.read_image(Path(run["src"]), row["shard"], row["offset"], row["size"], row["key"])
        for row in rows.iter_rows(named=True)
    ]
    assert found == expected


def test_a_saved_dataset(tmp_path: Path) -> None:
    """Equal to what `Image(decode=False)` gives; broken, empty and missing images are rows."""
    images = [picture(0), b"no image", picture(1), None, picture(0), b""]
    whole = make_dataset(images, ["a", None, " c ", "d", "e", "f"])
    whole.save_to_disk(tmp_path / "saved")
    run = deduplicate(tmp_path / "saved", tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows.select("key", "caption", "status", "kept_id", "source").rows() == [
        ("0", "a", "ok", None, "saved"),
        ("1", None, "unreadable", None, "saved"),
        ("2", "c", "ok", None, "saved"),
        ("3", "d", "missing", None, "saved"),
        ("4", "e", "ok", 0, "saved"),
        ("5", "f", "unreadable", None, "saved"),
    ]
    check_bytes(run, tmp_path / "out", [picture(0), picture(1), picture(0)])
    raw = datasets.load_from_disk(str(tmp_path / "saved")).cast_column("image", datasets.Image(decode=False))
    assert [record.data for record in read_all(tmp_path / "saved")] == [cell and cell["bytes"] for cell in raw["image"]]


def test_splits_are_sources(tmp_path: Path) -> None:
    """Rows are numbered within their split, across its files; `split` reads one of them."""
    splits = {
        "train": make_dataset([picture(n) for n in range(5)], [f"t{n}" for n in range(5)]),
        "test": make_dataset([picture(0), picture(9)], ["u0", "u1"]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    run = deduplicate(tmp_path / "saved", tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows.select("source", "shard", "key", "caption").rows() == [
        *(("train", f"train/data-0000{n > 2:d}-of-00002.arrow", str(n), f"t{n}") for n in range(5)),
        *(("test", "test/data-00000-of-00001.arrow", str(n), f"u{n}") for n in range(2)),
    ]
    assert rows["kept_id"].drop_nulls().is_empty()  # a copy in another split is leakage
    assert run["counts"]["leakage"] == [{"scopes": ["test", "train"], "pictures": 1, "rows": [1, 1]}]
    check_bytes(run, tmp_path / "out", [*(picture(n) for n in range(5)), picture(0), picture(9)])
    assert [r.caption for r in read_all(tmp_path / "saved", split="test")] == ["u0", "u1"]
    assert [r.caption for r in read_all(tmp_path / "saved" / "train")] == [f"t{n}" for n in range(5)]
    with pytest.raises(SourceError, match=r"has no --split dev; it has train, test$"):
        read_all(tmp_path / "saved", split="dev")


def test_batches_are_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS_PER_SHARD", 6)
    monkeypatch.setattr(datasets.config, "ARROW_RECORD_BATCH_SIZE_FOR_IMAGE_DATASETS", 4)
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 4)
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    make_dataset([picture(n) for n in range(17)], [str(n) for n in range(17)]).save_to_disk(tmp_path / "saved")
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    shards = sources.list_shards(tmp_path / "saved")
    assert [shard.part for shard in shards] == [(0, 2, 0), (2, 4, 8), (4, 5, 16)]
    records = [record for shard in shards for record in sources.read_shard(shard)]
    assert [(r.key, r.caption, r.data) for r in records] == [(str(n), str(n), picture(n)) for n in range(17)]
    for record in reversed(records):
        data = sources.read_image(tmp_path / "saved", record.file, record.offset, record.size, record.key)
        assert data == record.data


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_columns_by_type_and_by_option(tmp_path: Path, kind: pa.DataType) -> None:
    """An Image is taken, and no sound or other bytes; captions may be lists or numbers."""
    more: dict[str, list] = {"title": [["", "first", "second"], []], "code": [7, 8], "blob": [b"x", b"y"]}
    whole = make_dataset([picture(0), picture(1)], [1.5, None], **more)
    whole = whole.cast_column("blob", datasets.Value("large_binary" if kind == pa.large_binary() else "binary"))
    whole.rename_column("image", "photo").save_to_disk(tmp_path / "saved")
    assert [(r.key, r.caption, r.data) for r in read_all(tmp_path / "saved")] == [
        ("0", "1.5", picture(0)),
        ("1", None, picture(1)),
    ]
    named = {"caption_column": "title", "id_column": "code"}
    assert [(r.key, r.caption) for r in read_all(tmp_path / "saved", **named)] == [("7", "first"), ("8", None)]
    assert [r.data for r in read_all(tmp_path / "saved", image_column="blob")] == [b"x", b"y"]
    with pytest.raises(SourceError, match=r"'titel' is not there; it has the columns photo, text, title, code, blob$"):
        read_all(tmp_path / "saved", caption_column="titel")
    double = datasets.concatenate_datasets([whole, whole])
    double.save_to_disk(tmp_path / "double")
    with pytest.raises(SourceError, match="row 2: the --id-column 'code' '7' stands more than once"):
        read_all(tmp_path / "double", id_column="code")


def test_sounds_are_no_images(tmp_path: Path) -> None:
    """They lie in the same kind of struct; only the types that `datasets` notes tell them apart."""
    make_dataset([picture(0)], ["a"]).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    note = table.schema.metadata[b"huggingface"].replace(b'"Image"', b'"Audio"')
    table = table.replace_schema_metadata({b"huggingface": note})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(SourceError, match=r"no column of images; it has the columns image, text$"):
        sources.list_shards(tmp_path / "saved")


def test_rows_that_were_selected_and_moved(tmp_path: Path) -> None:
    """What `save_to_disk` writes of a filtered, shuffled view is the view."""
    whole = make_dataset([picture(n) for n in range(6)], [str(n) for n in range(6)])
    whole.select([4, 1, 3]).save_to_disk(tmp_path / "saved")
    assert [(r.key, r.caption, r.data) for r in read_all(tmp_path / "saved")] == [
        ("0", "4", picture(4)),
        ("1", "1", picture(1)),
        ("2", "3", picture(3)),
    ]


def make_folder(src: Path) -> Path:
    for split, seeds in (("train", (0, 1, 2)), ("test", (0, 9))):
        (src / split).mkdir(parents=True)
        lines = []
        for number, seed in enumerate(seeds):
            (src / split / f"{number}.png").write_bytes(picture(seed))
            lines.append(f'{{"file_name": "{number}.png", "text": "{split} {number}"}}\n')
        (src / split / "metadata.jsonl").write_text("".join(lines))
    return src


def test_what_load_dataset_loads(tmp_path: Path, cache: Path) -> None:
    """An imagefolder: the cache holds paths only, and the images are read from their files."""
    src = make_folder(tmp_path / "src")
    layout = Layout(format="huggingface")
    run = deduplicate(src, tmp_path / "out", Options(per="none", layout=layout), jobs=1)
    assert Path(run["src"]).is_relative_to(cache)
    rows = manifest.read(tmp_path / "out")
    expected = {("train", f"train {n}", "ok") for n in range(3)} | {("test", f"test {n}", "ok") for n in range(2)}
    assert set(rows.select("source", "caption", "status").rows()) == expected
    assert rows["kept_id"].drop_nulls().len() == 1
    loaded = datasets.load_dataset(str(src))
    cells = [
        cell for split in loaded for cell in loaded[split].cast_column("image", datasets.Image(decode=False))["image"]
    ]
    check_bytes(run, tmp_path / "out", [Path(cell["path"]).read_bytes() for cell in cells])
    again = deduplicate(src, tmp_path / "out", Options(per="none", layout=layout), jobs=1)
    assert again == run
    only = deduplicate(src, tmp_path / "only", Options(layout=Layout(format="huggingface", split="test")), jobs=1)
    assert only["counts"]["rows"] == 2


def test_names_on_the_hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf://org/name/config` asks for these; its images lie in the cache, embedded or beside, and nowhere else."""
    asked = []
    real = datasets.load_dataset_builder

    def stand_in(name: str, config: str | None) -> datasets.DatasetBuilder:
        asked.append((name, config))
        return real(str(tmp_path / folder))

    monkeypatch.setattr(datasets, "load_dataset_builder", stand_in)
    folder = make_folder(cache / "hub" / "snapshot").relative_to(tmp_path)
    run = deduplicate(Path("hf://org/name/large"), tmp_path / "out", Options(layout=Layout(split="train")), jobs=1)
    assert asked == [("org/name", "large")]
    assert run["counts"]["status"] == {"ok": 3}
    check_bytes(run, tmp_path / "out", [picture(n) for n in range(3)])
    folder = make_folder(tmp_path / "elsewhere").relative_to(tmp_path)
    run = deduplicate(Path("hf://org/other"), tmp_path / "out2", Options(), jobs=1)
    assert asked[1:] == [("org/other", None)]
    assert run["counts"]["status"] == {"unsupported": 5}


def test_paths_out_of_the_dataset_are_refused(tmp_path: Path) -> None:
    """A downloaded dataset must not reach for files of this machine."""
    (tmp_path / "private.png").write_bytes(picture(1))
    cells = [{"bytes": None, "path": path} for path in (str(tmp_path / "private.png"), "../private.png", "a.png")]
    whole = datasets.Dataset.from_dict({"image": cells})
    whole = whole.cast(
        datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    )
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "a.png").write_bytes(picture(0))
    found = read_all(tmp_path / "saved")
    assert [r.status for r in found[:2]] == ["unsupported"] * 2
    assert all("leads out of" in (r.error or "") for r in found[:2])
    assert found[2].data == picture(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda saved: (saved / "data-00000-of-00001.arrow").unlink(),
            "1 of 1 files are missing, the first is data-000",
        ),
        (lambda saved: os.truncate(saved / "data-00000-of-00001.arrow", 20_000), "ends early or is damaged"),
        (lambda saved: (saved / "data-00000-of-00001.arrow").write_bytes(b"no arrow at all"), "is no arrow stream"),
        (lambda saved: (saved / "state.json").write_text("{"), "state.json: cannot be read"),
        (lambda saved: (saved / "state.json").write_text('{"_split": null}'), "state.json: cannot be read"),
    ],
)
def test_a_damaged_dataset_is_one_line_before_anything_starts(tmp_path: Path, damage: object, message: str) -> None:
    saved = tmp_path / "saved"
    make_dataset([picture(n) for n in range(3)], ["a", "b", "c"]).save_to_disk(saved)
    damage(saved)  # type: ignore[operator]
    with pytest.raises(SourceError, match=message) as caught:
        deduplicate(saved, tmp_path / "out", Options(), jobs=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_are_named_by_their_name_only(tmp_path: Path) -> None:
    """A state.json that points elsewhere finds nothing there."""
    make_dataset([picture(0)], ["a"]).save_to_disk(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "other.arrow")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}], "_split": null}')
    with pytest.raises(SourceError, match=r"the first is other\.arrow"):
        sources.list_shards(tmp_path / "saved")


def test_compressed_streams_say_so(tmp_path: Path) -> None:
    make_dataset([bytes(10_000)], ["a"]).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(SourceError, match="its columns are compressed"):
        read_all(tmp_path / "saved")


def test_without_a_hub_there_is_one_clear_line(tmp_path: Path) -> None:
    """The program itself: hf://org/name reaches `datasets`, and what that says is said in one line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    root = Path(__file__).parent.parent
    code = "from eval.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "dedup",
        "hf://nobody/nothing",
        "--split",
        "train",
        "-o",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("unmemorize: hf://nobody/nothing: `datasets` cannot load it (")
    assert "nobody/nothing" in done.stderr.partition("cannot load it")[2]
    assert not (tmp_path / "o").exists()


def test_names_of_results() -> None:
    assert sources.name_source(Path("hf://org/name-1.5")) == "name-1.5"
    assert sources.name_source(Path("some/products.v2.csv")) == "products.v2"


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in other bytes are read again by their place in the arrow file, and shown; workers do not matter."""
    images = [*(picture(n) for n in range(8)), *(picture(n, compress_level=1) for n in range(4))]
    make_dataset(images, [f"c{n}" for n in range(12)]).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["dedup", "saved", "--level", "hash", "--jobs", "2"])
    assert done.exit_code == 0, done.output
    assert "Columns: images in image, captions in text; key of a row: the number of the row." in done.output
    assert "12 images: 8 kept, 4 duplicates dropped" in done.output
    assert len(list((tmp_path / "saved-dedup" / "report" / "thumbs").glob("*/*.jpg"))) == 8
    deduplicate(tmp_path / "saved", tmp_path / "one", Options(level="hash"), jobs=1)
    name = Path("manifest") / "00000.parquet"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "saved-dedup" / name).read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), min_size=1, max_size=8))
def test_any_damage_is_a_row_or_one_line(tmp_path: Path, changes: list[tuple[float, int, bool]]) -> None:
    """Bytes that flip, most of them where the file describes itself: no crash, no other exception."""
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    if not path.exists():
        make_dataset([picture(n) for n in range(8)], [f"c{n}" for n in range(8)]).save_to_disk(tmp_path / "saved")
        path.with_suffix(".good").write_bytes(path.read_bytes())
    damage(path, changes)
    read_whatever(path.parent)
