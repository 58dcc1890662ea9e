"""Training on latents and embeddings that were computed before is training on the pictures and captions."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.batch import Batch
from data_pipeline.build import BuildConfig, build
from data_pipeline.config import DataConfig
from data_pipeline.loader import Loader, open_data
from data_pipeline.sources.folder import FolderConfig, FolderSource
from ldm.cli.data import app
from ldm.config import load_config
from ldm.training import latents
from ldm.training.denoising import DenoisingTask
from ldm.training.run import RunConfig
from ldm.training.run import build as build_run
from ldm.training.run import run as train_run
from tests.conftest import frozen, tiny_config

DATA = ["data.flip=true", "data.crops=3", "data.caption=random"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 smooth pictures of four shapes in five shards, two captions each."""
    root = tmp_path_factory.mktemp("cached")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(44):
        size = [(24, 16), (16, 24), (20, 20), (33, 17)][i % 4]
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(root / "pictures" / f"{i:02d}.png")
        (root / "pictures" / f"{i:02d}.txt").write_text(f"a red circle {i}\nsomething blue")
    build(FolderSource(FolderConfig(str(root / "pictures"))), BuildConfig(samples_per_shard=10), root / "shards")
    return root / "shards"


def config_of(models: dict[str, Path], pictures: Path, out: Path, *more: str) -> RunConfig:
    return tiny_config("denoising", out, pictures, *frozen(models["denoising"].parent), *DATA, *more)


def encode(config: RunConfig, task: DenoisingTask, out: Path, *, text: bool = True) -> DataConfig:
    """Makes the cache, and says how a run reads it."""
    latents.encode(config.data, task.autoencoder, task.text if text else None, str(out))
    return replace(config.data, cache=str(out))


def batches(config: DataConfig, count: int = 8) -> list[Batch]:
    return list(itertools.islice(Loader(open_data(config), config, batch_size=6, seed=0), count))


def loss(task: DenoisingTask, batch: Batch) -> float:
    ((_, value, _),) = task.losses(batch, 0)
    return value.item()


SHAPES = {"squares": [], "buckets": ["data.buckets=true", "data.bucket_step=4", "data.max_aspect=3.0"]}


@pytest.mark.parametrize("text", [True, False], ids=["text", "latents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_that_of_pixels(
    shape: str, text: bool, models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the rounding of float16, with crops, mirroring, caption choice, both dropouts and the sizes told."""
    words = [*SHAPES[shape], "task.dropout=0.3", "data.caption_dropout=0.2"]
    words += ["task.unet.pooled_dim=8", "task.unet.pooled_layers=2", "task.unet.size_dim=4"]
    config = config_of(models, pictures, tmp_path / "run", *words)
    _, task = build_run(config)
    assert isinstance(task, DenoisingTask)
    for parameter in task.denoiser.parameters():  # a fresh one is silent, whatever it is told
        torch.nn.init.normal_(parameter, std=0.3)
    cached = encode(config, task, tmp_path / "cache", text=text)
    from_pixels = [loss(task, batch) for batch in batches(config.data)]
    monkeypatch.setattr(task.autoencoder, "posterior", None)  # may not be asked any more
    calls: list[list[str]] = []
    embed = task.text.forward
    monkeypatch.setattr(task.text, "forward", lambda prompts: calls.append(list(prompts)) or embed(prompts))
    from_cache = [loss(task, batch) for batch in batches(cached)]
    assert from_cache == pytest.approx(from_pixels, rel=2e-5)
    differs: list[Callable[[Batch], Batch]] = [
        lambda b: replace(b, moments=b.moments.flip(-1)),
        lambda b: replace(b, sizes=b.sizes.flip(1)),
        lambda b: replace(b, captions=b.captions[::-1], text={k: v.flip(0) for k, v in b.text.items()}),
    ]
    for change in differs:
        other = [loss(task, change(batch)) for batch in batches(cached)]
        assert max(abs(b / a - 1) for a, b in zip(from_pixels, other, strict=True)) > 4e-4
    if text:
        assert calls == [[""]]  # the null prompt, once for all
    else:
        assert len(calls) == 8 * 4


def test_a_run_from_a_cache(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """And refused when the cache was made by other models."""
    cache = tmp_path / "cache"
    config = config_of(models, pictures, tmp_path / "pixels")
    _, task = build_run(config)
    assert isinstance(task, DenoisingTask)
    encode(config, task, cache)

    def losses(name: str, *more: str) -> list[float]:
        train_run(config_of(models, pictures, tmp_path / name, *more))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if entry["kind"] == "train"]

    assert losses("cached", f"data.cache={cache}") == pytest.approx(losses("pixels"), rel=3e-3)

    torch.nn.init.zeros_(task.autoencoder.encoder.conv_out.bias)
    torch.nn.init.normal_(task.autoencoder.encoder.conv_out.bias)
    other = encode(config, task, tmp_path / "other").cache
    with pytest.raises(ValueError, match=r"other was made for another run \(the autoencoder's weights: "):
        losses("refused", f"data.cache={other}")
    with pytest.raises(ValueError, match=r"data.buckets and data.cache are for task.kind=denoising"):
        train_run(tiny_config("autoencoder", tmp_path / "auto", pictures, f"data.cache={cache}", *DATA))
    with pytest.raises(ValueError, match=r"the sides must be multiples of 4"):
        losses("odd", "data.buckets=true", "data.bucket_step=1")


def test_crops_go_to_the_device_in_parts(
    models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pictures of six frames each are never moved at once."""
    config = config_of(models, pictures, tmp_path / "run")
    _, task = build_run(config)
    assert isinstance(task, DenoisingTask)
    moved: list[int] = []
    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dim() == 4:
            moved.append(len(tensor))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    encode(config, task, tmp_path / "cache", text=False)
    assert max(moved) == latents.CHUNK and sum(moved) >= 44 * 6


def test_encoding_goes_on_where_it_was(
    models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(models, pictures, tmp_path / "run")
    _, task = build_run(config)
    assert isinstance(task, DenoisingTask)
    encode(config, task, tmp_path / "whole")
    made: list[int] = []
    make = latents._ShardJob.__call__

    def stop_at_the_third(self: Any, number: int) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        make(self, number)

    monkeypatch.setattr(latents._ShardJob, "__call__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(config, task, tmp_path / "cut")
    with pytest.raises(ValueError, match="cut has no index"):
        batches(replace(config.data, cache=str(tmp_path / "cut")))
    with pytest.raises(ValueError, match=r"cut was made for another run \(the mirroring: True there"):
        encode(replace(config, data=replace(config.data, flip=False)), task, tmp_path / "cut")
    monkeypatch.setattr(latents._ShardJob, "__call__", lambda self, n: (made.append(n), make(self, n)))
    encode(config, task, tmp_path / "cut")
    assert made == [0, 1, 2, 3, 4]
    names = sorted(f.name for f in (tmp_path / "whole").iterdir() if f.name != "report.json")
    assert names == sorted(f.name for f in (tmp_path / "cut").iterdir() if f.name != "report.json")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_the_command(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    where = [str(pictures), str(models["autoencoder"]), str(tmp_path / "cache")]
    words = ["encode", *where, "size=16", "flip=true", "crops=3", "--text", str(models["contrastive"])]
    for part in ("2/2", "1/2"):
        result = CliRunner().invoke(app, [*words, "--part", part], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert "44 samples" in result.output
    data = load_config(
        DataConfig, [], [f"path={pictures}", "size=16", "flip=true", "crops=3", f"cache={tmp_path}/cache"]
    )
    (batch,) = batches(data, 1)
    assert batch.moments is not None and batch.moments.shape == (6, 4, 8, 8) and batch.text["context"].shape[0] == 6


def test_samples_of_weight_nothing_teach_nothing(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    config = config_of(models, pictures, tmp_path / "run")
    _, task = build_run(config)
    assert isinstance(task, DenoisingTask)
    batch = batches(config.data, 1)[0]
    single = [loss(task, part) for part in batch.split(6)]
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5, 1.0])
    expected = sum(w * value for w, value in zip(weights.tolist(), single, strict=True)) / 6
    assert loss(task, replace(batch, weights=weights)) == pytest.approx(expected, rel=1e-5)
