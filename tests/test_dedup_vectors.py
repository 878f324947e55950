"""Embeddings on disk: written and read, and in clip-retrieval's layout, good and bad."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dedup import manifest, vectors
from dedup.vectors import EmbeddingError

META = {"encoder": "sscd", "weights_sha256": "ab", "preprocessing": "none", "dimension": 8}
NAMES = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/100%25.jpg", "c.jpg"]
KEYS = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/100%2525.jpg", "c.jpg"]  # as the manifest writes them


def unit(rows: int, dimension: int = 8, seed: int = 0) -> np.ndarray:
    return vectors.normalise(np.random.default_rng(seed).normal(size=(rows, dimension)))


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(len(KEYS), 8)).astype(np.float32)


def write_external(
    folder: Path, table: np.ndarray, names: list[str], *, column: str = "image_path", split: int = 2
) -> Path:
    """As clip-retrieval's writer does: parts of different sizes, numbered from 0."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, part in enumerate((slice(0, split), slice(split, None))):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", table[part])
        frame = pl.DataFrame({column: names[part], "caption": ["x"] * len(names[part])})
        frame.write_parquet(folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.mark.parametrize("rows", [0, 1, 25])
def test_what_is_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(manifest, "ROWS_PER_FILE", 10)
    table, ids = unit(rows), np.arange(rows) * 3
    described = pl.DataFrame({"id": ids, "background": ids / 7, "strict": ids % 2 == 0})
    vectors.write_embeddings(tmp_path, META, pl.DataFrame({"id": range(40)}), unit(40, seed=9))
    vectors.write_embeddings(tmp_path, META, described, table)  # fewer parts: none of the others stays
    meta, rows_read, read = vectors.read_embeddings(tmp_path, "sscd")
    assert meta == META | {"rows": rows}
    assert rows_read.equals(described.cast(vectors.ROWS))
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, table.astype(np.float16))


def test_half_precision_moves_no_cosine_by_more_than_it_says() -> None:
    table = unit(500, 512)
    half = table.astype(np.float16).astype(np.float64)
    exact = table.astype(np.float64)
    assert np.abs(half @ half.T - exact @ exact.T).max() < 5e-4


def test_unfinished_embeddings_are_none(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match="holds no embeddings of sscd"):
        vectors.read_embeddings(tmp_path, "sscd")
    vectors.write_embeddings(tmp_path, META, pl.DataFrame({"id": range(3)}), unit(3))
    (tmp_path / "embeddings/sscd/00000.npy").unlink()
    with pytest.raises(EmbeddingError, match=r"is not what its meta.json says"):
        vectors.read_embeddings(tmp_path, "sscd")


@pytest.mark.parametrize("key", ["encoder", "weights_sha256", "preprocessing", "dimension"])
def test_embeddings_of_another_encoder_are_refused(tmp_path: Path, key: str) -> None:
    vectors.check_same(tmp_path, META)
    vectors.write_embeddings(tmp_path, META, pl.DataFrame({"id": range(3)}), unit(3))
    vectors.check_same(tmp_path, META)
    with pytest.raises(EmbeddingError, match=f"another {key}"):
        vectors.check_same(tmp_path, META | {key: "other"})


@pytest.mark.parametrize("before", ["", "/data/laion/", "pictures/"])
@pytest.mark.parametrize("column", ["image_path", "key"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_external_rows_are_found_by_key(
    tmp_path: Path, table: np.ndarray, before: str, column: str, dtype: type
) -> None:
    write_external(tmp_path / "e", table.astype(dtype), [before + name for name in NAMES], column=column)
    wanted = [4, 0, 3, 2]
    found = vectors.read_external(tmp_path / "e", [KEYS[row] for row in wanted])
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, vectors.normalise(table[wanted]), atol=2e-3)


def test_no_rows_ask_for_no_vectors(tmp_path: Path, table: np.ndarray) -> None:
    write_external(tmp_path / "e", table, NAMES)
    assert vectors.read_external(tmp_path / "e", []).shape == (0, 8)


def spoil(folder: Path, how: str) -> None:
    """Make one thing wrong with a good folder."""
    array, parquet = folder / "img_emb/img_emb_1.npy", folder / "metadata/metadata_1.parquet"
    table, names = np.load(array), pl.read_parquet(parquet)
    if how in ("nan", "inf", "zero"):
        table[2] = {"nan": np.nan, "inf": np.inf, "zero": 0}[how]
    changed = {
        "short": table[:-1],
        "narrow": table[:, :-1],
        "flat": table.ravel(),
        "scalar": np.float32(1),
        "integers": np.ones((3, 8), np.int32),
        "objects": table.astype(object),
    }
    np.save(array, changed.get(how, table), allow_pickle=True)
    if how == "truncated":
        array.write_bytes(array.read_bytes()[:-8])
    elif how == "not numpy":
        array.write_bytes(b"<html>Not found</html>")
    elif how == "no table":
        parquet.unlink()
    elif how == "broken table":
        parquet.write_bytes(parquet.read_bytes()[:-50])
    elif how == "no names":
        names.select("caption").write_parquet(parquet)
    elif how == "a gap":
        names.with_columns(image_path=pl.Series(["b/0.jpg", None, "c.jpg"])).write_parquet(parquet)
    elif how == "twice":
        names.with_columns(image_path=pl.Series(["b/0.jpg", "a/0.jpg", "c.jpg"])).write_parquet(parquet)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"img_emb_1.npy: row 2 \(c.jpg\) is NaN or infinity"),
        ("inf", r"img_emb_1.npy: row 2 \(c.jpg\) is NaN or infinity"),
        ("zero", r"img_emb_1.npy: row 2 \(c.jpg\) is only zeros"),
        ("short", r"img_emb_1.npy holds 2 rows, but metadata_1.parquet names 3"),
        ("narrow", r"img_emb_1.npy holds float32 \(3, 7\), img_emb_0.npy \(2, 8\)"),
        ("flat", r"img_emb_1.npy holds float32 \(24,\)"),
        ("scalar", r"img_emb_1.npy holds float32 \(\)"),
        ("integers", r"img_emb_1.npy holds int32"),
        ("objects", r"img_emb_1.npy is no numpy file that can be read"),
        ("truncated", r"img_emb_1.npy is no numpy file that can be read"),
        ("not numpy", r"img_emb_1.npy is no numpy file that can be read"),
        ("no table", r"metadata_1.parquet, which names the rows of img_emb_1.npy, cannot be read"),
        ("broken table", r"metadata_1.parquet, which names the rows of img_emb_1.npy, cannot be read"),
        ("no names", r"metadata_1.parquet names no pictures"),
        ("a gap", r"metadata_1.parquet names no pictures"),
        ("twice", r"has two rows for a/0.jpg"),
    ],
)
def test_bad_external_embeddings_are_one_clear_line(tmp_path: Path, table: np.ndarray, how: str, message: str) -> None:
    folder = write_external(tmp_path / "e", table, NAMES)
    wanted = KEYS[:3]  # a broken row is reported even when nobody asks for it
    vectors.read_external(folder, wanted)
    spoil(folder, how)
    with pytest.raises(EmbeddingError, match=message) as caught:
        vectors.read_external(folder, wanted)
    assert "\n" not in str(caught.value)


def test_rows_that_are_missing_are_named(tmp_path: Path, table: np.ndarray) -> None:
    folder = write_external(tmp_path / "e", table, [f"/data/{name}" for name in NAMES])
    with pytest.raises(EmbeddingError, match=r"has no row for b/9.jpg and 1 more pictures"):
        vectors.read_external(folder, [*KEYS, "b/9.jpg", "8.jpg"])
    with pytest.raises(EmbeddingError, match=r"has no row for x.jpg and 0 more"):
        vectors.read_external(folder, ["x.jpg"])
    with pytest.raises(EmbeddingError, match="clip-retrieval's layout is expected"):
        vectors.read_external(tmp_path, KEYS)


def test_keys_that_do_not_tell_rows_apart_are_refused(tmp_path: Path, table: np.ndarray) -> None:
    folder = write_external(tmp_path / "e", table, ["x/0.jpg", "x/1.jpg", "y/0.jpg", "y/1.jpg", "z.jpg"])
    with pytest.raises(EmbeddingError, match=r"below x/ and y/"):
        vectors.read_external(folder, ["0.jpg", "1.jpg"])
    with pytest.raises(EmbeddingError, match=r"z.jpg names two pictures"):
        vectors.read_external(folder, ["z.jpg", "z.jpg"])


def test_a_row_named_as_the_key_is_better_than_one_below_a_folder(tmp_path: Path, table: np.ndarray) -> None:
    folder = write_external(tmp_path / "e", table, ["x/0.jpg", "0.jpg", "x/1.jpg", "1.jpg", "z.jpg"])
    found = vectors.read_external(folder, ["0.jpg", "1.jpg"])
    np.testing.assert_allclose(found, vectors.normalise(table[[1, 3]]), atol=2e-3)
