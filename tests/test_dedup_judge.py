"""What must never merge: found by people who tried to make it delete something."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from dedup import clustering, detail, images, judge, manifest
from dedup.options import Options
from dedup.pipeline import deduplicate


def kept(src: Path, out: Path, **options: str) -> set[str]:
    deduplicate(src, out, Options(**options))
    return set(manifest.read(out).filter("keep")["key"])


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def test_white_drawings_on_nothing_are_not_one_white_picture(src: Path, tmp_path: Path) -> None:
    for number in range(3):
        alpha = np.zeros((64, 64), np.uint8)
        alpha[10 * number : 10 * number + 20, 8:50] = 255
        white = np.full((64, 64, 4), 255, np.uint8)
        white[:, :, 3] = alpha
        Image.fromarray(white).save(src / f"{number}.png")
    assert len(kept(src, tmp_path / "out")) == 3


def test_pages_behind_the_same_cover(src: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cover, one, two = (
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((160, 160), Image.Resampling.BICUBIC)
        for _ in range(3)
    )
    cover.save(src / "cover.png")
    cover.save(src / "a.tiff", save_all=True, append_images=[one])
    cover.save(src / "b.tiff", save_all=True, append_images=[two])
    assert len(kept(src, tmp_path / "out")) == 3


def test_exact_means_bytes(src: Path, tmp_path: Path) -> None:
    white = Image.new("RGB", (64, 64), "white")
    white.save(src / "a.png")
    white.save(src / "b.png", compress_level=0)
    assert len(kept(src, tmp_path / "exact", level="exact")) == 2
    assert len(kept(src, tmp_path / "hash")) == 1


def test_an_icon_does_not_win_over_its_photograph() -> None:
    rows = pl.DataFrame({"id": [0, 1], "width": [4096, 16], "height": [4096, 16], "sha256": ["0", "1"]})
    pair = {"a": [0], "b": [1], "class": ["copy"]}
    assert detail.size_pairs(rows, pl.DataFrame(pair)).is_empty()


def test_a_strip_is_no_picture(src: Path) -> None:
    Image.new("1", (1, 70_000)).save(src / "strip.png")
    with pytest.raises(images.ImageError, match="limit of a side") as error:
        images.decode((src / "strip.png").read_bytes())
    assert error.value.status == "too-large"


def test_an_error_survives_the_way_back_from_a_worker() -> None:
    import copy

    again = copy.copy(images.ImageError("too-large", "why"))
    assert (again.status, str(again)) == ("too-large", "why")


def test_nothing_is_dropped_to_a_row_whose_equal_goes_elsewhere() -> None:
    """1 and 2 have equal bytes, and 1 goes to 0: so does 2, hence 3, which only 2 was compared with, stays."""
    found = [(0, 1, "copy"), (1, 2, "bytes"), (2, 3, "copy")]
    pairs = pl.DataFrame(found, schema=["a", "b", "signal"], orient="row").with_columns(
        orientation=pl.lit("r0"), score=1.0, transform=pl.lit(None, pl.List(pl.Float64)), **{"class": pl.lit("copy")}
    )
    rows = pl.DataFrame({"id": range(4), "scope": "", "width": 9, "height": 9})
    rank = rows["id"].cast(pl.Int64)
    decided = clustering.decide(pairs, rank)
    assert decided["kept_id"].to_list() == [None, 0, 0, None]
    _, shared = judge.share_fate(rows, pairs, decided, rank)
    assert shared["kept_id"].to_list() == [None, 0, 0, None]
    assert shared["keep"].to_list() == [True, False, False, True]
