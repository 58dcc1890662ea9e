"""The whole way over S3: built there, started again, verified, taken out of, and trained from."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipeline import storage
from data_pipeline.build import BuildConfig, build
from data_pipeline.copying import merge, split
from data_pipeline.duplicates import DropList
from data_pipeline.loader import DataConfig, Loader, open_data
from data_pipeline.remove import find, take_out
from data_pipeline.shards import read_index
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.verify import verify

CONFIG = BuildConfig(size=16, samples_per_shard=8)


@pytest.mark.slow
def test_shards_on_s3_are_those_on_the_disk(bucket: str, pictures: Path, tmp_path: Path) -> None:
    source, far, near = FolderSource(FolderConfig(path=str(pictures))), f"{bucket}/built", tmp_path / "near"
    build(source, CONFIG, near)
    build(source, CONFIG, far)
    names = sorted(path.name for path in near.iterdir() if path.name != "report.json")  # which holds the seconds
    for name in names:
        assert storage.read(f"{far}/{name}") == (near / name).read_bytes(), name

    storage.remove(f"{far}/index.json")
    storage.remove(f"{far}/00001.tar")
    build(source, CONFIG, far)  # goes on where it was
    assert storage.read(f"{far}/00001.tar") == (near / "00001.tar").read_bytes()
    assert verify(far) == []

    def batches(path: str, **more: str) -> list[torch.Tensor]:
        config = DataConfig(path=path, **more)
        loader = Loader(open_data(config), config, batch_size=4, seed=3)
        return [batch.image for batch in islice(loader, 6)]

    local, remote = batches(str(near)), batches(far, copies=str(tmp_path / "copies"))
    assert all(map(torch.equal, local, remote))

    key = open_data(DataConfig(path=str(near)))[0][0].key
    removals, missing = find(far, DropList(keys=frozenset([key])))
    assert not missing and take_out(far, removals).rejected and verify(far) == []


@pytest.mark.slow
def test_folders_on_s3_are_joined_and_divided(bucket: str, pictures: Path, tmp_path: Path) -> None:
    """Both there and here; the pieces hold what the whole held."""
    source = FolderSource(FolderConfig(path=str(pictures)))
    build(source, CONFIG, tmp_path / "one")
    build(source, CONFIG, f"{bucket}/two")
    merge([str(tmp_path / "one"), f"{bucket}/two"], f"{bucket}/both", rename=True)
    split(f"{bucket}/both", (f"{bucket}/train", f"{bucket}/held-out"), count=7)
    merge([str(tmp_path / "one"), str(tmp_path / "one")], tmp_path / "both", rename=True)
    split(tmp_path / "both", (tmp_path / "train", tmp_path / "held-out"), count=7)
    for name in ("both", "train", "held-out"):
        assert verify(f"{bucket}/{name}") == []
        near = read_index(tmp_path / name)
        far = read_index(f"{bucket}/{name}")
        assert [s.sha256 for s in far.shards] == [s.sha256 for s in near.shards] and far.samples == near.samples
    assert far.samples == 7
