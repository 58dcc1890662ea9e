"""Batches: a function of (seed, position) only, whatever the workers, ranks and resumes."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.batch import Batch, sample_rng
from data_pipeline.build import BuildConfig, build
from data_pipeline.loader import DataConfig, Loader, epoch_order, fixed_batch
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderSource
from data_pipeline.transforms import decode, to_tensor

CONFIG = DataConfig(path="", flip=True, caption="random")


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.image, b.image)
        and torch.equal(a.positions, b.positions)
        and (a.captions, a.keys) == (b.captions, b.keys)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture
def reference(dataset: ShardReader) -> list[Batch]:
    """12 batches of 8: 96 positions, so two epoch boundaries of 37 are crossed inside a batch."""
    return take(Loader(dataset, CONFIG, batch_size=8, seed=3), 12)


def test_follows_the_stated_order(dataset: ShardReader, reference: list[Batch]) -> None:
    positions = torch.cat([b.positions for b in reference]).tolist()
    assert positions == list(range(96))
    keys = [k for b in reference for k in b.keys]
    orders = [epoch_order(37, 3, epoch) for epoch in range(3)]
    assert keys == [dataset[int(orders[p // 37][p % 37])].key for p in positions]
    assert len(set(keys[:37])) == len(set(keys[37:74])) == 37
    assert keys[:37] != keys[37:74]
    assert reference[0].image.shape == (8, 3, 16, 16) and reference[0].image.dtype == torch.float32


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(dataset: ShardReader, reference: list[Batch], workers: int) -> None:
    config = replace(CONFIG, workers=workers)
    assert same(take(Loader(dataset, config, batch_size=8, seed=3), 12), reference)
    assert same(take(Loader(dataset, config, batch_size=8, seed=3, start=40), 7), reference[5:])


@pytest.mark.parametrize("start", [1, 36, 37, 50])
def test_resumes_anywhere(dataset: ShardReader, reference: list[Batch], start: int) -> None:
    """Also with another batch size than before, and twice from one object."""
    whole = Batch(
        torch.cat([b.image for b in reference]),
        [c for b in reference for c in b.captions],
        torch.arange(96),
        [k for b in reference for k in b.keys],
    )
    loader = Loader(dataset, CONFIG, batch_size=6, seed=3, start=start)
    rows = [slice(start + 6 * i, start + 6 * (i + 1)) for i in range(7)]
    expected = [Batch(whole.image[r], whole.captions[r], whole.positions[r], whole.keys[r]) for r in rows]
    assert same(take(loader, 7), expected)
    assert same(take(loader, 7), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_global_batch(dataset: ShardReader, reference: list[Batch], world: int) -> None:
    ranks = [take(Loader(dataset, CONFIG, batch_size=8, seed=3, rank=rank, world=world), 12) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        assert same(batches, [b.split(world)[rank] for b in reference])


def test_another_seed_is_another_order(dataset: ShardReader, reference: list[Batch]) -> None:
    assert take(Loader(dataset, CONFIG, batch_size=8, seed=4), 1)[0].keys != reference[0].keys


def test_leaves_the_global_random_state_alone(dataset: ShardReader) -> None:
    before = torch.get_rng_state()
    take(Loader(dataset, replace(CONFIG, workers=1), batch_size=8, seed=3), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_and_caption_are_drawn_for_about_half(dataset: ShardReader) -> None:
    loader = Loader(dataset, CONFIG, batch_size=37, seed=0)
    index = {dataset[i].key: i for i in range(37)}
    flipped, second, total = 0, 0, 0
    for batch in take(loader, 6):
        for image, caption, key in zip(batch.image, batch.captions, batch.keys, strict=True):
            sample = dataset[index[key]]
            plain = to_tensor(decode(sample.image_bytes))
            mirrored = torch.equal(image, plain.flip(-1))
            assert mirrored or torch.equal(image, plain)
            flipped += mirrored
            second += caption == sample.captions[1]
            total += 1
    assert total == 222 and 85 < flipped < 137 and 85 < second < 137


def test_plain_batches_hold_stored_pixels_and_first_captions(dataset: ShardReader) -> None:
    batch = fixed_batch(dataset, CONFIG, 5)
    assert batch.keys == [dataset[i].key for i in range(5)]
    assert batch.captions == [dataset[i].captions[0] for i in range(5)]
    pixels = ((batch.image + 1) * 127.5).round().to(torch.uint8)
    for i in range(5):
        stored = np.asarray(Image.open(io.BytesIO(dataset[i].image_bytes)))  # [16, 16, 3]
        assert np.array_equal(pixels[i].permute(1, 2, 0).numpy(), stored)
    assert batch.image.min() >= -1 and batch.image.max() <= 1
    drawing = replace(CONFIG, templates=("a drawing: {}", "a photo: {}"))
    assert fixed_batch(dataset, drawing, 5).captions == [f"a drawing: {caption}" for caption in batch.captions]
    with pytest.raises(ValueError, match=r"count=38: .* has 37 samples"):
        fixed_batch(dataset, CONFIG, 38)


def test_pixels_map_to_the_whole_range() -> None:
    image = Image.fromarray(np.array([[[0, 51, 255]]], dtype=np.uint8))
    assert to_tensor(image).flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])


def test_other_sizes(source: FolderSource, dataset: ShardReader, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = DataConfig("", size=8)
    assert take(Loader(dataset, config, batch_size=4, seed=0), 1)[0].image.shape == (4, 3, 8, 8)
    out = tmp_path_factory.mktemp("kept") / "out"
    build(source, BuildConfig(), out)
    kept = ShardReader(out)
    assert fixed_batch(kept, config, 3).image.shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="differ in size; set size=N"):
        Loader(kept, DataConfig(""), batch_size=4, seed=0)


def test_refusals(dataset: ShardReader) -> None:
    with pytest.raises(ValueError, match=r"has 37 samples, fewer than one batch of 38; set batch_size to 37 or"):
        Loader(dataset, CONFIG, batch_size=38, seed=0)
    with pytest.raises(ValueError, match="batch_size=8 must be a positive multiple of the 3 processes"):
        Loader(dataset, CONFIG, batch_size=8, seed=0, world=3)
    with pytest.raises(ValueError, match="rank=2 of world=2"):
        Loader(dataset, CONFIG, batch_size=8, seed=0, rank=2, world=2)
    with pytest.raises(ValueError, match="caption='last': allowed are first, random"):
        Loader(dataset, replace(CONFIG, caption="last"), batch_size=8, seed=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_split(reference: list[Batch], parts: int) -> None:
    pieces = reference[0].split(parts)
    assert len(pieces) == parts and max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert torch.equal(torch.cat([p.image for p in pieces]), reference[0].image)
    assert [c for p in pieces for c in p.captions] == reference[0].captions
    with pytest.raises(ValueError, match="batch of 8 into 9 parts"):
        reference[0].split(9)


def test_to_moves_tensors_only(reference: list[Batch]) -> None:
    moved = reference[0].to("meta")
    assert moved.image.device.type == "meta" and moved.positions.device.type == "cpu"  # seeds are made of them there
    assert moved.captions == reference[0].captions


def test_sample_random_numbers_never_change() -> None:
    """These values are part of every saved run: if they change, resumed runs change."""
    assert sample_rng(1, 2, "noise").bit_generator.random_raw(2).tolist() == [
        16594139297167284344,
        8686549678370671280,
    ]
    assert epoch_order(8, 5, 1).tolist() == [6, 3, 5, 7, 2, 0, 1, 4]
    draws = {float(sample_rng(s, p, w).random()) for s in (0, 1) for p in (0, 1) for w in ("a", "b")}
    assert len(draws) == 8


def test_epoch_order_is_a_permutation() -> None:
    for epoch in range(5):
        assert sorted(epoch_order(1000, 0, epoch)) == list(range(1000))
    firsts = [int(epoch_order(10, 0, epoch)[0]) for epoch in range(2000)]
    assert np.bincount(firsts, minlength=10).min() > 140
