"""A small folder of pictures with captions, and shards made from it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import storage
from data_pipeline.build import BuildConfig, build
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderConfig, FolderSource


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 noise pictures of different sizes with two captions each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(37):
        pixels = rng.integers(0, 256, (20 + i % 7, 20 + i % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"Picture {i}.png")
        (folder / f"Picture {i}.txt").write_text(f"picture number {i}\nné {i}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def source(pictures: Path) -> FolderSource:
    return FolderSource(FolderConfig(str(pictures)))


@pytest.fixture(scope="session")
def shard_folder(source: FolderSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 10, 10, 10 and 7 samples, 16 pixels a side."""
    out = tmp_path_factory.mktemp("shards") / "out"
    build(source, BuildConfig(size=16, samples_per_shard=10), out)
    return out


@pytest.fixture
def dataset(shard_folder: Path) -> ShardReader:
    return ShardReader(shard_folder)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 bucket served on a port of this machine; one server, for fsspec keeps its connections."""
    from moto.server import ThreadedMotoServer  # here, for it takes seconds to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        storage._filesystem("s3://x")[0].mkdir("pictures")
        yield "s3://pictures"
    server.stop()
