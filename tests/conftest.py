"""Small real data and small real configs that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest
import torch
from accelerate.state import AcceleratorState

from data_pipeline.build import BuildConfig, build
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from ldm.config import load_config
from ldm.training.run import RunConfig, run

TINY_UNET = "{channels: 16, multipliers: [1, 2], blocks: 1, depths: [1, 0], context_dim: 16, heads: 2, norm_groups: 4}"
TINY = {
    "autoencoder": [
        "task.kind=autoencoder",
        "task.model={channels: 8, multipliers: [1, 2], blocks: 1, norm_groups: 4, latent_channels: 2}",
    ],
    "contrastive": [
        "task.kind=contrastive",
        "task.text={width: 16, layers: 2, heads: 2, embed_dim: 8, context_length: 28}",
        "task.image={size: 16, patch: 8, width: 16, layers: 1, heads: 2, embed_dim: 8}",
    ],
    "denoising": [
        "task.kind=denoising",
        f"task.unet={TINY_UNET}",
        "task.unet.in_channels=2",
        "task.unet.out_channels=2",
        "task.previews=[a small red circle, a large blue square]",
        "task.preview_steps=2",
    ],
}
LOOP = ["batch_size=8", "samples=32", "log_steps=1", "save_steps=2", "validate_steps=2", "preview_steps=2"]


def tiny_config(kind: str, out: Path, shards: Path, *more: str) -> RunConfig:
    """A run of four steps that takes a second."""
    where = [f"out={out}", f"data.path={shards}", "data.size=16", f"validation={shards}", "validation_samples=8"]
    return load_config(RunConfig, [], [*TINY[kind], *LOOP, *where, *more])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share the machine's two cores with each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the life of a process; each test chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawn scenes at 32 px."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    build(ShapesSource(ShapesConfig(count=48, seed=3)), BuildConfig(size=32), out)
    return out


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    """Run folders of the three stages, barely trained: autoencoder, contrastive, denoising."""
    root = tmp_path_factory.mktemp("runs")
    for kind in ("autoencoder", "contrastive"):
        run(tiny_config(kind, root / kind, shards))
    run(tiny_config("denoising", root / "denoising", shards, *frozen(root)))
    AcceleratorState._reset_state(reset_partial_state=True)  # the first test may ask for another precision
    return {kind: root / kind for kind in TINY}


def frozen(root: Path) -> list[str]:
    """Where the denoiser finds its frozen models."""
    return [f"task.autoencoder={root / 'autoencoder'}", f"task.text={root / 'contrastive'}"]
