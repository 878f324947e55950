"""Tables whose rows name image files: every row is a row of the manifest, whatever the table is written in."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_dedup_parquet import run_and_measure
from typer.testing import CliRunner

from dedup import manifest, sources
from dedup.options import Options, OptionsError
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError, table
from eval.cli import app


def picture(seed: int) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Four pictures, two of them equal, in `pictures/`."""
    for name, seed in {"a.png": 0, "b.png": 1, "sub/c.png": 0, "sub/d.png": 3}.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    return tmp_path


def read_all(src: Path, **options: str) -> list[sources.Record]:
    return [record for shard in sources.list_shards(src, Layout(**options)) for record in sources.read_shard(shard)]


ROWS = [
    ("s1", "a.png", 'a 5" disk, "new"'),
    ("s2", "b.png", "two\nlines"),
    ("s3", "sub/c.png", None),
    ("s4", "x.png", ""),
]
WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.mark.parametrize("extension", WRITERS)
def test_what_pandas_writes_is_read(shop: Path, extension: str) -> None:
    """Rows in order, captions as written, and a file that is missing is a row; the bytes are found again."""
    path = shop / f"products.{extension}"
    WRITERS[extension](pd.DataFrame(ROWS, columns=["sku", "path", "title"]), path)
    layout = Layout(root=str(shop / "pictures"), image_column="path", caption_column="title", id_column="sku")
    run = deduplicate(path, shop / "out", Options(layout=layout), jobs=1)
    rows = manifest.read(shop / "out")
    assert rows.select("key", "caption", "status", "error", "source").rows() == [
        ("s1", 'a 5" disk, "new"', "ok", None, "products"),
        ("s2", "two\nlines", "ok", None, "products"),
        ("s3", None, "ok", None, "products"),
        ("s4", None, "missing", "No such file or directory", "products"),
    ]
    assert rows["kept_id"].to_list() == [None, None, 0, None]
    for row, (_, name, _) in zip(rows.head(3).iter_rows(named=True), ROWS, strict=False):
        data = sources.read_image(Path(run["src"]), row["shard"], row["offset"], row["size"], row["key"])
        assert data == (shop / "pictures" / name).read_bytes()
    assert run["options"]["id_column"] == "sku"
    assert [(layout["format"], layout["image_column"]) for layout in run["layouts"]] == [("table", "path")]


def test_columns_by_convention_and_keys_as_in_a_folder(shop: Path) -> None:
    """Without options: paths from the table's folder, columns by their usual names in any case; equal to the folder."""
    lines = "TEXT,Image_Path\n" + "".join(f"words {n},pictures/{n}.png\n" for n in ("a", "b", "sub/c", "sub/d"))
    (shop / "list.csv").write_text(lines)
    found = read_all(shop / "list.csv")
    assert [(r.key, r.caption, r.file) for r in found] == [
        (f"pictures/{n}.png", f"words {n}", None) for n in ("a", "b", "sub/c", "sub/d")
    ]
    beside = read_all(shop / "pictures")
    assert [r.data for r in found] == [r.data for r in beside]


def test_the_same_file_in_two_rows_is_two_rows(shop: Path) -> None:
    (shop / "list.csv").write_text("path,text\npictures/a.png,one\n./pictures/a.png,two\npictures/sub/../a.png,two\n")
    deduplicate(shop / "list.csv", shop / "out", Options(), jobs=1)
    rows = manifest.read(shop / "out")
    assert rows["key"].to_list() == ["pictures/a.png"] * 3
    assert rows["kept_id"].to_list() == [None, 0, 0]
    assert rows["captions"][0].to_list() == ["one", "two"]


def test_paths_that_leave_the_root_are_refused(shop: Path) -> None:
    """Absolute paths inside of it are not."""
    root = shop / "pictures" / "sub"
    named = ["d.png", str(root / "c.png"), "../a.png", str(shop / "pictures" / "a.png"), f"{root}x/c.png", "c\0.png"]
    named += ["https://example.org/a.png", "", "/etc/passwd", "c.png/../../b.png", "."]
    (shop / "list.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in named))
    run = deduplicate(shop / "list.jsonl", shop / "out", Options(layout=Layout(root=str(root))), jobs=1)
    rows = manifest.read(shop / "out")
    assert rows["key"].to_list()[:4] == ["d.png", "c.png", "../a.png", str(shop / "pictures" / "a.png")]
    refused = ["unsupported"] * 5 + ["missing"] + ["unsupported"] * 3
    assert rows["status"].to_list() == ["ok", "ok", *refused]
    assert [row.partition(": ")[2].partition(" ")[0] for row in rows["error"][2:7]] == ["leads"] * 3 + ["no", "an"]
    assert rows["error"][7] == "no path in the column 'path'"
    row = rows.row(1, named=True)
    data = sources.read_image(Path(run["src"]), row["shard"], row["offset"], row["size"], row["key"])
    assert data == (root / "c.png").read_bytes()


def test_a_root_elsewhere_and_names_that_need_an_escape(tmp_path: Path) -> None:
    """The root lies beside the table; names hold %41, a line break, and a letter that is not ASCII."""
    names = ["%41.png", "new\nline.png", "ä.png", "b ut.png", "back\\slash.png"]
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "far" / "deep" / name).write_bytes(picture(number))
    src = tmp_path / "tables" / "t.csv"
    pl.DataFrame({"path": names}).write_csv(src)
    run = deduplicate(src, tmp_path / "out", Options(layout=Layout(root=str(tmp_path / "far" / "deep"))), jobs=1)
    rows = manifest.read(tmp_path / "out")
    assert rows["key"].to_list() == ["%2541.png", "new%0Aline.png", *names[2:]]
    for number, row in enumerate(rows.iter_rows(named=True)):
        assert row["shard"] == f"../far/deep/{row['key']}"
        data = sources.read_image(Path(run["src"]), row["shard"], row["offset"], row["size"], row["key"])
        assert data == picture(number)


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("  text ", "text"),
        ("", None),
        (7, "7"),
        (1.5, "1.5"),
        (True, "true"),
        (None, None),
        (["", " first", "second"], "first"),
        ([[3]], "3"),
        ([], None),
        ({"en": "text"}, None),
        ("\ud800", "?"),
    ],
)
def test_the_text_rule(shop: Path, value: object, caption: str | None) -> None:
    rows = [{"path": "pictures/a.png", "caption": value}, {"path": "pictures/b.png", "other": 1}]
    (shop / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [record.caption for record in read_all(shop / "list.jsonl")] == [caption, None]


def test_ids_may_be_numbers_and_an_older_mac_writes_other_line_ends(shop: Path) -> None:
    (shop / "list.csv").write_bytes(b"\xef\xbb\xbfid,path\r\n007,pictures/a.png\r\n\r\n7,pictures/b.png\r\n")
    assert [r.key for r in read_all(shop / "list.csv", id_column="id")] == ["007", "7"]
    (shop / "list.jsonl").write_text('{"id": 7, "path": "pictures/a.png"}\n')
    assert [r.key for r in read_all(shop / "list.jsonl", id_column="id")] == ["7"]


BAD: list[tuple[str, bytes | str, Layout, str]] = [
    ("t.csv", "name,title\na.png,x\n", Layout(), "no column of paths .* it has the columns name, title"),
    (
        "t.csv",
        "path,title\na.png,x\n",
        Layout(caption_column="titel"),
        "'titel' is not there; it has the columns path, ti",
    ),
    ("t.csv", "path,title\na.png,x\n", Layout(image_column="url"), "--image-column 'url' is not there"),
    ("t.csv", "path,path\na.png,x\n", Layout(), "'path' stands there more than once"),
    (
        "t.csv",
        "path,sku\na,1\nb,1\n",
        Layout(id_column="sku"),
        "row 1: the --id-column 'sku' '1' stands more than once",
    ),
    ("t.csv", "path,sku\na,1\nb\n", Layout(id_column="sku"), "row 1: the --id-column 'sku' is missing"),
    ("t.csv", 'path,text\na,"b\nc,d\n', Layout(), r"line 3: .* \(a field with quotation marks must stand in such"),
    ("t.csv", 'path,text\na,"b" c\n', Layout(), "line 2: "),
    ("t.csv", "path,text\na,b\nc,d,e\n", Layout(), "line 3: 3 fields, but 2 columns"),
    ("t.csv", "", Layout(), "it has no columns"),
    ("t.csv", "path,text\n", Layout(), "no images found .looked for rows"),
    ("t.csv", "path,text\na,b\n".encode("utf-16"), Layout(), "no text in UTF-8"),
    ("t.csv", b"PAR1\0\0", Layout(), "no text in UTF-8"),
    ("t.jsonl", '{"path": "a"}\n\n{"path": \n', Layout(), "line 3 is no JSON"),
    ("t.jsonl", "[" * 100_000, Layout(), "line 1 is no JSON"),
    ("t.jsonl", '["a"]\n', Layout(), "line 1 is no JSON object"),
    ("t.parquet", "path,text\na,b\n", Layout(), "cannot be read as parquet"),
    ("t.parquet", "path,text\na,b\n", Layout(format="table"), "cannot be read"),
    ("t.csv", "path\na\n", Layout(split="train"), "--split is of Hugging Face"),
    ("t.csv", "path\na\n", Layout(root="/no/where"), "--root /no/where: no such folder"),
    ("t.xlsx", b"PK", Layout(format="table"), "a table is one file that ends in .csv, .tsv, .jsonl, .parquet"),
    ("t.xlsx", b"PK", Layout(), "a folder, a table, or shards"),
]


@pytest.mark.parametrize(("name", "content", "layout", "message"), BAD)
def test_a_table_that_cannot_be_read_is_one_line_before_anything_starts(
    tmp_path: Path, name: str, content: bytes | str, layout: Layout, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=message) as caught:
        deduplicate(path, tmp_path / "out", Options(layout=layout), jobs=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gone.csv", "gone.parquet", "{0..9}.parquet", "folder.csv/gone.jsonl"])
def test_a_table_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(SourceError, match=r"no such file$") as caught:
        sources.list_shards(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    (tmp_path / "folder.csv" / "a.png").write_bytes(picture(0))
    assert [record.key for record in read_all(tmp_path / "folder.csv")] == ["a.png"]


def test_a_quotation_mark_that_is_never_closed_is_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_FIELD", 1_000)
    (tmp_path / "t.csv").write_text('path,text\na,"b\n' + "c,d\n" * 10_000)
    with pytest.raises(SourceError, match="field larger than field limit"):
        sources.list_shards(tmp_path / "t.csv")


def test_options_of_tables_are_refused_for_folders(shop: Path) -> None:
    for layout in (Layout(caption_column="text"), Layout(root=str(shop)), Layout(split="train")):
        with pytest.raises(SourceError, match="is of tables, parquet and Hugging Face datasets"):
            sources.list_shards(shop / "pictures", layout)
    assert len(sources.list_shards(shop / "pictures", Layout(format="folder"))) == 1
    with pytest.raises(SourceError, match="no images found"):
        sources.list_shards(shop / "pictures", Layout(format="webdataset"))


field = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(field, field), min_size=1, max_size=8), st.sampled_from([",", "\t"]))
def test_every_row_that_the_csv_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    """None lost, none shifted, whatever stands in the fields."""
    path = tmp_path_factory.mktemp("csv") / ("t.csv" if delimiter == "," else "t.tsv")
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter=delimiter).writerows([("path", "text"), *rows])
    shards = sources.list_shards(path)
    assert [member for shard in shards for member in shard.members] == [name for name, _ in rows]
    assert [text for shard in shards for text in shard.captions] == [text.strip() or None for _, text in rows]
    records = [record for shard in shards for record in sources.read_shard(shard)]
    assert [record.caption for record in records] == [text.strip() or None for _, text in rows]
    assert all(record.data is None and record.error for record in records)


def test_rows_are_read_in_shards_and_only_what_changed_is_hashed_again(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROWS_PER_SHARD", 2)
    src, out = shop / "list.csv", shop / "out"
    src.write_text("path,text\n" + "".join(f"{n},{n}\n" for n in (shop / "pictures/a.png", "pictures/b.png", "c.png")))
    deduplicate(src, out, Options(), jobs=1)
    files = [out / ".work" / "signatures" / f"0000{n}.parquet" for n in (0, 1)]
    before = [path.stat().st_mtime_ns for path in files]
    with src.open("a") as handle:
        handle.write("pictures/sub/d.png,d\n")
    deduplicate(src, out, Options(), jobs=1)
    assert [path.stat().st_mtime_ns == stamp for path, stamp in zip(files, before, strict=True)] == [True, False]
    (shop / "pictures" / "a.png").write_bytes(picture(9))
    run = deduplicate(src, out, Options(), jobs=1)
    assert files[0].stat().st_mtime_ns != before[0]
    assert run["counts"]["dropped"] == 0
    fresh = deduplicate(src, shop / "fresh", Options(), jobs=2)
    assert fresh == run
    name = Path("manifest") / "00000.parquet"
    assert (out / name).read_bytes() == (shop / "fresh" / name).read_bytes()
    with pytest.raises(OptionsError, match="caption_column was None"):
        deduplicate(src, out, Options(layout=Layout(caption_column="text")), jobs=1)


def test_the_command_says_which_columns_it_took(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)
    (shop / "products.csv").write_text("sku,path,title\n1,a.png,one\n2,b.png,two\n3,sub/c.png,three\n")
    words = "dedup products.csv --root pictures --id-column sku --level hash --jobs 1"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    assert "Columns: images in path, captions in title; key of a row: sku." in done.output
    assert "3 images: 2 kept" in done.output
    assert (shop / "products-dedup" / "report" / "index.html").exists()
    dropped = pl.read_csv(shop / "products-dedup" / "dropped.csv", infer_schema=False).row(0, named=True)
    assert (dropped["dropped"], dropped["kept"]) == ("pictures/sub/c.png:3", "pictures/a.png:1")


def test_memory_does_not_grow_with_the_columns_that_are_not_read(tmp_path: Path) -> None:
    """200 MB of a table are read with a fraction of that: no column but the wanted ones is held."""
    src = tmp_path / "wide.csv"
    with src.open("w") as handle:
        handle.write("path,text,html\n")
        for number in range(20_000):
            handle.write(f"{number}.png,caption,{'x' * 10_000}\n")
    code = (
        "import sys; from pathlib import Path; from dedup import sources\n"
        "from dedup.sources import folder, huggingface, parquet, table, webdataset; import pyarrow.parquet\n"
        "before = peak(); print(sum(len(shard.members) for shard in sources.list_shards(Path(sys.argv[1]))))"
    )
    rows, megabytes = run_and_measure(code, src)
    assert rows == 20_000
    assert megabytes < 60
