"""defense.data: locations → pixels → latents, captions, splits, order. And the dataset of the other tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dedup import images, manifest, sources
from dedup.hashing import digest
from defense import captions, data
from defense.conditions import embed_captions
from defense.tiny import build_tiny

COPIES = 3  # picture 0 stands so often in the dataset; the others once
PICTURES = 6
SPARES = 4


def picture(number: int, size: int = 40) -> bytes:
    """A PNG of smooth colours, another for every number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, bytes, str | None]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, image, caption in samples:
            for suffix, content in ((".png", image), (".txt", None if caption is None else caption.encode())):
                if content is not None:
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def make_dataset(folder: Path) -> Path:
    """A planted dataset and its finished dedup run, by hand. Returns OUT.

    Rows 0 … 2 are copies of one picture, rows 3 … 7 single ones; row 7 has no caption, row 8 is unreadable.
    """
    src, out = folder / "src", folder / "out"
    numbers = [0] * COPIES + list(range(1, PICTURES))
    captions = ["red thing", "red thing", "red object", *(f"picture {n}" for n in numbers[COPIES:-1]), None]
    samples = [(f"{i:04d}", picture(n), c) for i, (n, c) in enumerate(zip(numbers, captions, strict=True))]
    write_tar(src / "00000.tar", [*samples, ("0008", b"no image", "broken")])
    spare = [(f"s{i}", picture(100 + i), f"spare {i}") for i in range(SPARES)]
    write_tar(src / "spare" / "00000.tar", spare)
    found = [r for shard in sources.list_shards(src) for r in sources.read_shard(shard)]
    rows = len(found)
    keep = [i in (0, *range(COPIES, rows - 1)) for i in range(rows)]
    table = pl.DataFrame(
        {
            "id": range(rows),
            "source": "src",
            "shard": "00000.tar",
            "offset": [r.offset for r in found],
            "size": [r.size for r in found],
            "key": [r.key for r in found],
            "caption": [r.caption for r in found],
            "captions": [
                ["red thing", "red object"] if i == 0 else [captions[i]] if keep[i] and captions[i] else None
                for i in range(rows)
            ],
            "status": ["ok"] * (rows - 1) + ["unreadable"],
            "sha256": [digest(r.data or b"") for r in found],
            "cluster_id": [0] * COPIES + list(range(COPIES, rows)),
            "component_id": [0] * COPIES + list(range(COPIES, rows)),
            "keep": keep,
            "kept_id": [0 if 0 < i < COPIES else None for i in range(rows)],
            "represents": [COPIES if i == 0 else int(k) for i, k in enumerate(keep)],
        }
    )
    manifest.write(out, manifest.conform(table))
    manifest.write_json(out / "run.json", {"src": str(src)})
    plant = pl.DataFrame({"key": ["0000", "0001", "0002", None], "canary": ["a", "a", "a", "b"]})
    manifest.write_parquet(out / "plant.parquet", plant)
    return out


def write_autoencoder(folder: Path) -> Path:
    """An untrained AutoencoderKL with f = 4: enough for everything but good pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            mid_block_add_attention=False,
            scaling_factor=1.5,
        )
    autoencoder.save_pretrained(folder)
    return folder


def build_small(folder: Path, seed: int = 0, **options: object):
    """A pipeline with an untrained autoencoder that takes milliseconds a step."""
    small = {"channels": (32, 32), "text_width": 32, "text_layers": 1, "caption_tokens": 8} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions, "MERGES", 3_000)  # enough for the words of the tests; the whole vocabulary opens slowly
        return build_tiny(seed, autoencoder=write_autoencoder(folder / "autoencoder"), **small)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory):
    return build_small(tmp_path_factory.mktemp("model"))


def source(out: Path) -> Path:
    return Path(json.loads((out / "run.json").read_text())["src"])


def readable(out: Path) -> pl.DataFrame:
    return manifest.read(out).filter(pl.col("status") == "ok")


def test_pixels_are_decoded_and_squared_in_row_order(out):
    pixels = data.load_pixels(readable(out), source(out), 32)
    expected = [images.square(images.decode(picture(n)).pixels, 32) for n in [0] * COPIES + [1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(pixels, np.stack(expected))


def test_a_changed_image_is_refused(out):
    rows = readable(out).with_columns(sha256=pl.lit("0" * 64))
    with pytest.raises(data.DataError, match=r"0000 in 00000\.tar has changed: run `unmemorize dedup` again"):
        data.load_pixels(rows, source(out), 32)


def test_an_image_that_cannot_be_decoded_is_named(out):
    rows = manifest.read(out).filter(pl.col("status") != "ok")
    with pytest.raises(data.DataError, match="0008 cannot be decoded"):
        data.load_pixels(rows, source(out), 32)


def test_latents_are_the_scaled_posterior_mean(pipeline):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    latents = data.encode_latents(pixels, pipeline)
    last = torch.from_numpy(pixels[-1:].transpose(0, 3, 1, 2) / 255.0).float() * 2 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(last).latent_dist.mean * 1.5
    assert latents.shape == (3, 4, 8, 8)
    torch.testing.assert_close(latents[-1:], mean, atol=1e-5, rtol=0)


def test_large_images_go_through_a_network_in_small_chunks(out, pipeline, monkeypatch):
    assert [data.fit_chunk(side) for side in (32, 128, 512, 1024, 2048)] == [64, 64, 4, 1, 1]
    rows = readable(out).with_columns(captions=pl.lit([], dtype=pl.List(pl.String)), weight=1.0)
    whole = data.build_examples(rows, source(out), pipeline, resolution=32).latents
    monkeypatch.setattr(data, "fit_chunk", lambda side: 3)
    chunks = data.build_examples(rows, source(out), pipeline, resolution=32).latents
    torch.testing.assert_close(chunks, whole)


def test_captions_are_drawn_evenly_and_missing_ones_are_empty(out, pipeline):
    rows = pl.DataFrame({"captions": [["one", "two"], [], ["three"]]}, schema={"captions": pl.List(pl.String)})
    rows = pl.concat([readable(out).select("shard", "offset", "size", "key", "sha256").head(3), rows], how="horizontal")
    examples = data.build_examples(rows.with_columns(weight=1.0), source(out), pipeline, resolution=32)
    uniform = torch.linspace(0, 1 - 1e-7, 1000)
    drawn = [examples.draw_captions(torch.full((1000,), row), uniform) for row in range(3)]
    texts = embed_captions(pipeline, ["one", "two", "three"]).tokens
    torch.testing.assert_close(examples.conditions.tokens, texts)
    assert torch.bincount(drawn[0]).tolist() == [0, 500, 500]
    assert drawn[1].unique().tolist() == [0]
    assert drawn[2].unique().tolist() == [3]


def test_spare_images_can_be_read_like_rows_of_the_manifest(out):
    spare = data.read_spare(source(out))
    assert spare["caption"].to_list() == [f"spare {i}" for i in range(SPARES)]
    pixels = data.load_pixels(spare.with_columns(sha256=pl.lit(None)), source(out), 40)
    np.testing.assert_array_equal(pixels[1], images.decode(picture(101)).pixels)


def test_a_dataset_without_spare_images(tmp_path):
    assert data.read_spare(tmp_path) is None
    assert data.read_canary_keys(tmp_path) == []


def random_components(n: int = 2000) -> pl.DataFrame:
    component = np.random.default_rng(0).integers(0, n // 2, n)
    return pl.DataFrame({"id": range(n), "component_id": component, "key": [f"k{i}" for i in range(n)]})


def test_held_out_rows_are_whole_components_in_any_order():
    rows = random_components()
    held = data.hold_out(rows, 0.3)
    by_component = rows.with_columns(held).group_by("component_id").agg(pl.col("held_out").n_unique())
    assert by_component["held_out"].max() == 1
    assert 0.25 < held.mean() < 0.35
    reverse = data.hold_out(rows.reverse(), 0.3).reverse()
    assert reverse.to_list() == held.to_list()
    assert not data.hold_out(rows, 0.0).any()


def test_a_component_with_a_canary_is_never_held_out():
    rows = random_components()
    held = rows.filter(data.hold_out(rows, 0.5))
    protected = held["key"].head(10).to_list()
    again = rows.with_columns(data.hold_out(rows, 0.5, protected))
    safe = again.filter(pl.col("key").is_in(protected))["component_id"].to_list()
    assert not again.filter(pl.col("component_id").is_in(safe))["held_out"].any()
    assert again["held_out"].sum() > 0.8 * len(held)


def test_a_row_without_component_is_its_own(out):
    rows = pl.DataFrame({"id": [0, 1], "component_id": [0, None], "key": ["a", "b"]})
    assert len(data.hold_out(rows, 0.5)) == 2


@given(n=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_every_row_comes_once_a_pass(n, batch_size, seed):
    steps = -(-3 * n // batch_size)
    drawn = np.concatenate([data.draw_rows(n, batch_size, seed, step) for step in range(steps)])
    for start in range(0, 3 * n, n):
        assert sorted(drawn[start : start + n]) == list(range(n))
    assert len(drawn) == steps * batch_size


def test_order_and_noise_depend_on_seed_and_step_only():
    first, again = (data.draw_noise(4, (2, 3), 7, 11) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (data.draw_noise(4, (2, 3), 7, 12), data.draw_noise(4, (2, 3), 8, 11)):
        assert not torch.equal(first[0], other[0])
    assert data.draw_rows(100, 5, 7, 11).tolist() == data.draw_rows(100, 5, 7, 11).tolist()
    assert data.draw_rows(100, 5, 7, 11).tolist() != data.draw_rows(100, 5, 8, 11).tolist()


def test_weights_expose_as_those_of_dcr_do():
    """Somepalli et al. 2023 weigh a twentieth of the images 5 times and draw as many as there are: 4.17 and 0.833."""
    weights = np.where(np.arange(400) < 20, 5.0, 1.0)
    packed = (weights * 400 / weights.sum()).tobytes()
    drawn = np.concatenate([data.draw_rows(400, 40, 3, step, packed) for step in range(2_000)])  # 200 passes
    seen = np.bincount(drawn, minlength=400) / 200
    assert seen[:20].mean() == pytest.approx(4.17, abs=0.02)
    assert seen[20:].mean() == pytest.approx(0.833, abs=0.002)


def test_exposures_add_up_and_list_what_was_left_out(out):
    rows = manifest.read(out).with_columns(held_out=pl.col("id") == 3)
    spare = data.read_spare(source(out)).with_columns(id=pl.lit(None, pl.Int64), cluster_id=pl.lit(None, pl.Int64))
    training = pl.concat([rows.filter(pl.col("id").is_in([0, 4])), spare.head(1)], how="diagonal")
    training = training.with_columns(weight=1.0)
    exposures = data.count_exposures(rows, training, steps=10, batch_size=2, seed=0)
    assert exposures.columns == ["id", "cluster_id", "key", "held_out", "exposures"]
    assert len(exposures) == len(rows) + 1
    assert exposures["exposures"].sum() == 20
    trained = exposures.filter(pl.col("exposures") > 0)
    assert trained["key"].to_list() == ["0000", "0004", "s0"]
    assert set(trained["exposures"]) <= {6, 7}
    assert exposures.filter("held_out")["key"].to_list() == ["0003"]
