"""A cache says what it was made from, and nothing else is taken for it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import shards
from data_pipeline.assembly import assemble
from data_pipeline.ledger import Ledger, shard_name, write_ledger
from data_pipeline.loader import DataConfig, Loader
from data_pipeline.precompute import MOMENTS, Cache, CacheKey, cache_source, dump_array, load_array
from data_pipeline.reader import ShardReader


def make_cache(out: Path, data: ShardReader, text: str = "", fingerprint: str = "") -> Path:
    """One whose moments and embeddings say which sample, frame and caption they are of; 16 px, mirrored, 3 crops."""
    key = CacheKey(fingerprint or data.fingerprint, "a1", text, size=16, crops=3, flip=True)

    def entry(row: int) -> shards.Entry:
        moments = np.full((6, 4, 2, 2), row, np.float32) + np.arange(6)[:, None, None, None] / 16
        members = {MOMENTS: dump_array(moments)}
        if text:
            members["context.npy"] = dump_array(
                np.full((2, 3, 5), row, np.float32) + np.array([0.25, 0.5])[:, None, None]
            )
            members["mask.npy"] = dump_array(np.array([[True, True, False], [True, False, False]]))
        about = {"row": row, "size": [16, 16], "captions": 2, "words": 1, "content": ""}
        return shards.Entry(data.key(row), members, about)

    def run(numbers: list[int]) -> list[int]:
        for number in numbers:
            rows = range(data.ends[number] - data.info.shards[number].samples, data.ends[number])
            tar = shards.write_tar(out / f"{shard_name(number)}.tar", map(entry, rows))
            write_ledger(out, shard_name(number), Ledger(rows.start, rows.stop, tar.bytes, tar.sha256, tar.samples, []))
        return numbers

    plan = {"shards": len(data.info.shards), "samples": len(data), "size": 16, "image_format": MOMENTS}
    assemble(out, {**plan, "source": cache_source(key)}, run)
    return out


@pytest.fixture
def data(shard_folder: Path) -> ShardReader:
    return ShardReader(shard_folder)


def config_of(data: ShardReader, cache: Path, **changes: Any) -> DataConfig:
    words = {"cache": str(cache), "flip": True, "crops": 3, "caption": "random"}
    return DataConfig(data.path, **{**words, **changes})


def test_batches_hold_the_frame_and_the_caption_that_pixels_would_have(data: ShardReader, tmp_path: Path) -> None:
    """The same draws choose among what is stored."""
    config = config_of(data, make_cache(tmp_path / "cache", data, text="t1"), caption_dropout=0.2)
    pixels = iter(Loader(data, replace(config, cache=""), batch_size=6, seed=2))
    row_of = {data.key(i): i for i in range(len(data))}
    empty = 0
    for batch, _ in zip(Loader(data, config, batch_size=6, seed=2), range(12), strict=False):
        other = next(pixels)
        assert (batch.keys, batch.captions) == (other.keys, other.captions)
        assert torch.equal(batch.sizes, other.sizes) and torch.equal(batch.positions, other.positions)
        assert batch.image.shape == (6, 3, 0, 0) and batch.moments is not None
        for i, key in enumerate(batch.keys):
            moments, picture = batch.moments[i], other.image[i]
            assert moments.shape == (4, 2, 2) and (moments == moments[0, 0, 0]).all()
            frame = round((float(moments[0, 0, 0]) - row_of[key]) * 16)
            plain = (
                Loader(data, DataConfig(data.path), batch_size=1, seed=0)._samples[0, 0, row_of[key], (16, 16)].image[0]
            )
            assert torch.equal(picture, plain.flip(-1) if frame % 2 else plain)
            stored = data[row_of[key]].captions
            context, mask = batch.text["context"][i], batch.text["mask"][i]
            if not batch.captions[i]:
                empty += 1
                assert not context.any() and not mask.any()
                continue
            which = stored.index(batch.captions[i])
            assert (context == row_of[key] + (0.25, 0.5)[which]).all() and int(mask.sum()) == 2 - which
    assert 2 <= empty <= 30  # of 72 at 0.2: a false alarm in 10^5


def test_a_foreign_cache_is_refused_by_name(data: ShardReader, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", data)
    for change, said in (
        ({"size": 8}, r"\(the size: 16 there, 8 here\)"),
        ({"flip": False}, r"\(the mirroring: True there, False here\)"),
        ({"crops": 1}, "the number of crops: 3 there, 1 here"),
        ({"buckets": True, "bucket_step": 8}, "the step of the buckets: 0 there, 8 here"),
        ({"crops": 0}, "data.crops=0: a cache holds some crops"),
        ({"cache": [str(cache), str(cache)]}, "data.cache names 2 folders, data.path 1"),
        ({"cache": data.path}, "holds no cache of latents"),
    ):
        with pytest.raises(ValueError, match=said):
            Loader(data, replace(config_of(data, cache), **change), batch_size=4, seed=0)
    other = make_cache(tmp_path / "other", data, fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"other was made for another run \(the shards: 000000000000 there"):
        Loader(data, config_of(data, other), batch_size=4, seed=0)
    worded = make_cache(tmp_path / "worded", data, text="t1")
    for change in ({"shuffle_tags": True}, {"tag_dropout": 0.1}, {"templates": ("a {}",)}):
        with pytest.raises(ValueError, match="holds text as it is stored"):
            Loader(data, config_of(data, worded, **change), batch_size=4, seed=0)
        batch = next(iter(Loader(data, config_of(data, cache, **change), batch_size=4, seed=0)))
        assert not batch.text and batch.moments is not None  # its text is made in training
    both = {"path": [data.path, data.path], "cache": [str(cache), str(worded)]}
    with pytest.raises(ValueError, match="some folders hold text and others do not"):
        Loader([data, data], replace(config_of(data, cache), **both), batch_size=4, seed=0)


def test_every_part_of_a_key_is_checked() -> None:
    key = CacheKey("d", "a", "t", 16, 8, 2.0, 3, True)
    for name, value in asdict(CacheKey("D", "A", "", 32, 4, 3.0, 1, False)).items():
        key.check("here", {name: getattr(key, name)})
        with pytest.raises(ValueError, match=r"the cache here was made for another run \(the .*: .* there, "):
            key.check("here", {name: value})


def test_a_damaged_cache_is_not_read(data: ShardReader, tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "cache", data)
    cache = Cache(ShardReader(folder), data)
    tar = folder / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[512 + 150] ^= 1
    tar.write_bytes(content)
    assert cache.moments(1, 0).shape == (1, 4, 2, 2)
    with pytest.raises(RuntimeError, match=rf"00000\.tar is damaged at {data.key(0)}\.moments"):
        cache.moments(0, 0)


def test_arrays_are_plain_npy_in_half_precision() -> None:
    values = np.array([[1.0, -2.5], [65504.0, 1e-5]], np.float32)
    assert load_array(dump_array(values)).dtype == np.float16
    assert np.array_equal(load_array(dump_array(torch.from_numpy(values))), values.astype(np.float16))
    assert load_array(dump_array(np.array([True, False]))).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"values up to 7e\+04 do not fit in float16"):
        dump_array(np.array([7e4], np.float32))
