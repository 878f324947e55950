"""Parquet with the bytes of images in it: as `datasets`, img2dataset, pandas and polars write it."""

import io
import os
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from dedup import manifest, sources
from dedup.canaries import read_pool
from dedup.options import Options
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, parquet
from eval.cli import app


def picture(seed: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def read_all(src: Path, **options: str) -> list[sources.Record]:
    return [record for shard in sources.list_shards(src, Layout(**options)) for record in sources.read_shard(shard)]


def read_again(src: Path, row: dict) -> bytes:
    return sources.read_image(src, row["shard"], row["offset"], row["size"], row["key"])


def write_rows(path: Path, count: int, group: int, **options: object) -> None:
    """`count` rows in row groups of `group`."""
    table = pa.table({"image": [picture(n) for n in range(count)], "text": [f"c{n}" for n in range(count)]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **options)


def test_what_datasets_writes(tmp_path: Path) -> None:
    """`to_parquet`: struct {bytes, path}, of a column whose type is Image; a broken image is a row."""
    data = [picture(0), b"no image", picture(0), None]
    cells = [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(data[:3])]
    features = datasets.Features(
        {"sound": datasets.Value("binary"), "photo": datasets.Image(), "caption": datasets.Value("string")}
    )
    rows = {"sound": [b"a"] * 4, "photo": [*cells, None], "caption": ["one", "two", None, "four"]}
    (tmp_path / "src" / "data").mkdir(parents=True)
    path = tmp_path / "src" / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    run = deduplicate(tmp_path / "src", tmp_path / "out", Options(), jobs=1)
    rows_ = manifest.read(tmp_path / "out")
    assert rows_.select("shard", "offset", "key", "caption", "status", "kept_id", "source").rows() == [
        ("data/train-00000-of-00001.parquet", n, str(n), caption, status, kept, "data")
        for n, (caption, status, kept) in enumerate(
            [("one", "ok", None), ("two", "unreadable", None), (None, "ok", 0), ("four", "missing", None)]
        )
    ]
    assert rows_["error"][3] == "no bytes in the column 'photo'"
    assert read_again(Path(run["src"]), rows_.row(2, named=True)) == data[2]


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """img2dataset itself, from a server of this machine: of six addresses two hold no picture."""
    web = tmp_path / "web"
    web.mkdir()
    for number in range(4):
        (web / f"{number}.png").write_bytes(picture(number))
    (web / "broken.png").write_bytes(b"no image")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(web)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    names = ["0.png", "gone.png", "1.png", "2.png", "broken.png", "3.png"]
    pl.DataFrame({"url": [f"{base}/{n}" for n in names], "caption": [f"of {n}" for n in names]}).write_parquet(
        tmp_path / "urls.parquet"
    )
    options = {"url_list": tmp_path / "urls.parquet", "output_folder": tmp_path / "laion", "input_format": "parquet"}
    options |= {"url_col": "url", "caption_col": "caption", "output_format": "parquet", "resize_mode": "no"}
    options |= {"processes_count": 1, "thread_count": 1, "number_sample_per_shard": 3, "retries": 0, "timeout": 20}
    options |= {"encode_format": "png", "encode_quality": 1, "enable_wandb": False}
    command = [sys.executable, "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    return tmp_path / "laion"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_failed_downloads_are_rows(tmp_path: Path) -> None:
    """As img2dataset 1.47 writes them with `--output_format parquet`."""
    rows = {
        "jpg": [picture(0), None, None],
        "caption": ["c0", "c1", None],
        "key": ["000000", "000001", "000002"],
        "status": ["success", "failed_to_download", "failed_to_resize"],
        "error_message": [None, "<urlopen error timed out>", "no picture"],
        "width": [96, None, None],
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    assert [(r.key, r.caption, r.data is None, r.error) for r in read_all(tmp_path)] == [
        ("000000", "c0", False, None),
        ("000001", "c1", True, "failed_to_download: <urlopen error timed out>"),
        ("000002", None, True, "failed_to_resize: no picture"),
    ]


@pytest.mark.slow
def test_what_img2dataset_writes(downloaded: Path, tmp_path: Path) -> None:
    run = deduplicate(downloaded, tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out").sort("key")
    assert rows["caption"].to_list() == [f"of {n}.png" for n in (0, "gone", 1, 2, "broken", 3)]
    assert rows["status"].to_list() == ["ok", "missing", "ok", "ok", "missing", "ok"]
    assert rows["error"][1].startswith("failed_to_download: HTTP Error 404")
    assert rows["error"][4].startswith("failed_to_resize: ")
    assert run["layouts"][0] | {"root": None} == {
        "format": "parquet",
        "root": None,
        "image_column": "png",
        "caption_column": "caption",
        "id_column": "key",
        "subject_column": None,
        "url_column": None,
        "split": None,
    }
    tables = pl.read_parquet(sorted(downloaded.glob("*.parquet"))).sort("key")
    assert rows["key"].to_list() == tables["key"].to_list()
    for row, data in zip(rows.iter_rows(named=True), tables["png"], strict=True):
        if row["status"] == "ok":
            assert read_again(Path(run["src"]), row) == data


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_kinds_of_binary(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"jpg": pa.array([picture(0), None], kind)}), tmp_path / "a.parquet")
    first, second = read_all(tmp_path / "a.parquet")
    assert (first.data, second.data, second.status) == (picture(0), None, "missing")
    assert sources.read_image(tmp_path / "a.parquet", first.file, 0, first.size, "0") == picture(0)


def test_pandas_and_polars(tmp_path: Path) -> None:
    pd.DataFrame({"img": [picture(0)], "TEXT": ["p"]}).to_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"img": [picture(1)], "caption": [["", "l"]]}).write_parquet(tmp_path / "b.parquet")
    assert [(r.data, r.caption) for r in read_all(tmp_path)] == [(picture(0), "p"), (picture(1), "l")]


def test_row_groups_are_shards_and_every_row_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with images in memory by the piece."""
    monkeypatch.setattr(parquet, "ROWS_PER_SHARD", 6)
    monkeypatch.setattr(parquet, "HELD", 3 * len(picture(0)))
    write_rows(tmp_path / "a.parquet", 25, 4)
    shards = sources.list_shards(tmp_path / "a.parquet")
    assert [shard.part for shard in shards] == [(0, 2, 0), (2, 4, 8), (4, 6, 16), (6, 7, 24)]
    records = [list(sources.read_shard(shard)) for shard in shards]
    assert [len(part) for part in records] == [8, 8, 8, 1]
    flat = [record for part in records for record in part]
    assert [(r.key, r.offset, r.data, r.caption) for r in flat] == [(str(n), n, picture(n), f"c{n}") for n in range(25)]
    for number in np.random.default_rng(0).permutation(np.repeat(np.arange(25), 3)).tolist():
        record = flat[number]
        data = sources.read_image(tmp_path, record.file, record.offset, record.size, record.key)
        assert data == picture(number)


def run_and_measure(code: str, *arguments: object) -> list[int]:
    """Numbers that the code prints, and by how many MB its process has grown since it set `before = peak()`.

    By VmHWM: unlike `ru_maxrss` it starts anew in a new program.
    """
    peak = "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
    command = [sys.executable, "-c", f"{peak}{code}\nprint(peak() - before)", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(word) for word in done.stdout.split()]


def test_a_row_group_larger_than_what_is_held(tmp_path: Path) -> None:
    """400 MB in one row group, and 1 MB that unfolds to as much, are read with a fraction of that."""
    noise = [np.random.default_rng(n).bytes(1 << 20) for n in range(4)]
    schema = pa.schema({"image": pa.binary()})
    table = pa.table({"image": noise * 100}, schema=schema)
    options = {"compression": "none", "row_group_size": 400, "write_batch_size": 4}
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, **options)
    same = pa.table({"image": [noise[0][: 1 << 19]] * 1_000}, schema=schema)
    pq.write_table(same, tmp_path / "b.parquet", compression="none")
    assert (tmp_path / "b.parquet").stat().st_size < 1 << 20
    del noise, table, same
    code = (
        "import sys; from pathlib import Path; from dedup import sources; import pyarrow.parquet\n"
        "src = Path(sys.argv[1]); shards = sources.list_shards(src); before = peak()\n"
        "print(len(shards), sum(record.size for shard in shards for record in sources.read_shard(shard)) >> 20)\n"
        "print(sum(len(sources.read_image(src, src.name, n, 0, '')) for n in (399, 0, 200, 100)) >> 10)"
    )
    *told, megabytes = run_and_measure(code, tmp_path / "a.parquet")
    assert told == [1, 400, 4_096]
    assert megabytes < 160
    *told, megabytes = run_and_measure(code, tmp_path / "b.parquet")
    assert told == [1, 500, 2_048]
    assert megabytes < 200


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    src = tmp_path / "src" / "a.parquet"
    write_rows(src, 12, 4, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(src.read_bytes())
    start = data.index(picture(5))
    data[start : start + 2_000] = bytes(2_000)
    place = pq.ParquetFile(src).metadata.row_group(1).column(0).data_page_offset
    data[place : place + 10] = b"\xff" * 10  # the header of its page
    src.write_bytes(bytes(data))
    deduplicate(src.parent, tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows.filter(pl.col("status") == "ok")["key"].to_list() == [str(n) for n in (0, 1, 2, 3, 8, 9, 10, 11)]
    (damaged,) = rows.filter(pl.col("status") != "ok").iter_rows(named=True)
    assert damaged["status"] == "unreadable"
    assert "a.parquet: cannot be read: rows 4 to 7 (" in damaged["error"]


def test_the_chosen_column_is_found_again(tmp_path: Path) -> None:
    """Pairs of pictures, as of datasets for editing: the manifest alone says which of the two it was."""
    before, after = [picture(n) for n in range(3)], [picture(n + 10) for n in range(3)]
    frame = pl.DataFrame({"image": before, "edited#1": after, "id": [7, 8, 9], "edit": ["x", "y", "z"]})
    frame.write_parquet(tmp_path / "a.parquet")
    for column, pictures in (("image", before), ("edited#1", after)):
        layout = Layout(image_column=column, caption_column="edit", id_column="id")
        out = tmp_path / f"out-{column}"
        run = deduplicate(tmp_path / "a.parquet", out, Options(layout=layout), jobs=1)
        rows = manifest.read(out)
        assert rows["key"].to_list() == ["7", "8", "9"]
        assert rows["caption"].to_list() == ["x", "y", "z"]
        assert [read_again(Path(run["src"]), row) for row in rows.iter_rows(named=True)] == pictures
    assert rows["shard"][0] == "a.parquet#edited#1"


def test_a_path_beside_instead_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "src" / "images").mkdir(parents=True)
    (tmp_path / "src" / "images" / "a.png").write_bytes(picture(0))
    (tmp_path / "secret.png").write_bytes(picture(1))
    cells = [{"bytes": None, "path": path} for path in ("images/a.png", "../secret.png", str(tmp_path / "secret.png"))]
    pl.DataFrame({"image": cells}, schema={"image": pl.Struct({"bytes": pl.Binary, "path": pl.String})}).write_parquet(
        tmp_path / "src" / "a.parquet"
    )
    run = deduplicate(tmp_path / "src" / "a.parquet", tmp_path / "out", Options(), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows["status"].to_list() == ["ok", "unsupported", "unsupported"]
    assert rows["shard"].to_list()[0] == "images/a.png"
    assert read_again(Path(run["src"]), rows.row(0, named=True)) == picture(0)


def test_keys_may_repeat_unless_they_were_asked_to_name_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pl.DataFrame({"jpg": [picture(0)], "key": ["000"]}).write_parquet(tmp_path / f"{name}.parquet")
    assert [(r.file, r.key) for r in read_all(tmp_path)] == [("a.parquet", "000"), ("b.parquet", "000")]
    with pytest.raises(SourceError, match=r"b.parquet: row 0: the --id-column 'key' '000' stands more than once"):
        read_all(tmp_path, id_column="key")


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    """One line: what, where, which columns there are."""
    path = tmp_path / "a.parquet"
    columns = {"left": [picture(0)], "right": [picture(1)], "note": [{"en": "x"}], "label": [1]}
    pl.DataFrame(columns).write_parquet(path)
    for options, message in (
        ({}, "more than one column may hold images: choose by --image-column; it has the columns left, right$"),
        ({"image_column": "middle"}, "'middle' is not there; it has the columns left, right, note, label$"),
        ({"image_column": "label", "format": "parquet"}, "'label' holds int64, no bytes of images$"),
        ({"image_column": "left", "caption_column": "note"}, "'note' holds struct<en: large_string>, no text$"),
        ({"image_column": "left", "id_column": "right"}, "'right' holds large_binary, no text$"),
        ({"image_column": "left", "split": "train"}, "--split is of datasets"),
    ):
        with pytest.raises(SourceError, match=message) as caught:
            sources.list_shards(path, Layout(**options))
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert [r.caption for r in read_all(path, image_column="left", caption_column="label")] == ["1"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """Not every writer checks what it calls text."""
    captions = [
        pa.Array.from_buffers(pa.string(), 1, pa.array([t], pa.binary()).buffers()) for t in (b"caf\xe9", b"fine")
    ]
    table = pa.table({"image": [picture(0), picture(1)], "text": pa.chunked_array(captions)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [r.caption for r in read_all(tmp_path)] == ["caf\ufffd", "fine"]


def test_mixed_schemas(tmp_path: Path) -> None:
    """Captions may stand in other columns, or in none; a file without images is an error that names it."""
    captions: dict[str, dict[str, list]] = {"a": {"text": ["t"]}, "b": {"caption": [3]}, "c": {}}
    for name, more in captions.items():
        pl.DataFrame({"image": [picture(0)], **more}).write_parquet(tmp_path / f"{name}.parquet")
    assert [r.caption for r in read_all(tmp_path)] == ["t", "3", None]
    with pytest.raises(
        SourceError, match=r"b.parquet: the --caption-column 'text' is not there; it has the columns ima"
    ):
        read_all(tmp_path, caption_column="text")
    pl.DataFrame({"url": ["x"]}).write_parquet(tmp_path / "d.parquet")
    with pytest.raises(SourceError, match=r"d.parquet: no column of images; it has the columns url$"):
        read_all(tmp_path)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(SourceError, match=r"d.parquet: cannot be read as parquet"):
        read_all(tmp_path)


@pytest.mark.parametrize("change", ["gone", "shorter", "another column"])
def test_a_file_that_is_another_when_it_is_read_again(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, 6, 2)
    *_, last = read_all(path)
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        write_rows(path, 3, 2)
    else:
        pl.DataFrame({"number": range(6)}).write_parquet(path)
    with pytest.raises(SourceError, match="has the source changed"):
        sources.read_image(path, last.file, last.offset, last.size, last.key)


def test_the_result_does_not_depend_on_workers_and_the_whole_line_reads_it(tmp_path: Path) -> None:
    """Copies in other bytes are read again, compared, shown; planting takes such a source too."""
    src = tmp_path / "src"
    write_rows(src / "a.parquet", 30, 7)
    again = []
    for number in range(10):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(number))).save(buffer, "PNG", compress_level=1)
        again.append(buffer.getvalue())
    pl.DataFrame({"image": again, "text": ["copy"] * 10}).write_parquet(src / "b.parquet")
    runs = [deduplicate(src, tmp_path / f"out{jobs}", Options(), jobs=jobs) for jobs in (1, 2)]
    assert runs[0] == runs[1]
    assert runs[0]["counts"]["dropped"] == 10
    name = Path("manifest") / "00000.parquet"
    assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    words = ["dedup", src, "-o", tmp_path / "out1", "--jobs", 1, "--level", "hash"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "Columns: images in image, captions in text; key of a row: the number of the row." in done.output
    assert len(list((tmp_path / "out1" / "report" / "thumbs").glob("*/*.jpg"))) == 20
    pool, _, counts = read_pool(src, 32, 100)
    assert (counts["images"], counts["identical"], len(pool)) == (40, 10, 30)
    assert {read_again(src, row) for row in pool.iter_rows(named=True)} <= {picture(n) for n in range(30)} | set(again)


def damage(path: Path, changes: list[tuple[float, int, bool]]) -> None:
    """Write what stands beside it as `.good` with some bytes changed, near its beginning or its end."""
    data = bytearray(path.with_suffix(".good").read_bytes())
    size = min(len(data), 1_500)
    for place, value, near_the_start in changes:
        start = 0 if near_the_start else len(data) - size
        data[start + int(place * (size - 1))] = value
    path.write_bytes(data)


def read_whatever(src: Path) -> None:
    """Records or SourceErrors, nothing else; and what was read is read again."""
    shards: list[sources.Shard] = []
    with suppress(SourceError):
        shards = sources.list_shards(src)
    for shard in shards:
        with suppress(SourceError):
            for record in sources.read_shard(shard):
                if record.data is not None:
                    again = sources.read_image(src, record.file, record.offset, record.size, record.key)
                    assert again == record.data


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), min_size=1, max_size=8))
def test_any_damage_is_a_row_or_one_line(tmp_path: Path, changes: list[tuple[float, int, bool]]) -> None:
    """Bytes that flip, most of them where the file describes itself: no crash, no other exception."""
    path = tmp_path / "a.parquet"
    if not path.exists():
        write_rows(path, 8, 4, compression="none")
        path.with_suffix(".good").write_bytes(path.read_bytes())
    damage(path, changes)
    read_whatever(path)
