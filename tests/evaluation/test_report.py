"""Whole evaluations, with a pipeline that draws what it is told, or always the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from data_pipeline.build import BuildConfig, build
from data_pipeline.sources import Sample
from data_pipeline.sources.shapes import draw, parse
from ldm.cli.evaluate import app
from ldm.evaluation.report import Gallery, Sampling, evaluate_emoji, evaluate_shapes
from ldm.images import to_tensor
from ldm.pipeline import Request


class Identity(nn.Module):
    """An autoencoder that changes nothing but a little."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def encode(self, image: Tensor) -> Tensor:
        return image * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        return latent / self.scale * 0.99


class Artist:
    """Stands for a Pipeline: `paint` makes the picture of a prompt and seed."""

    def __init__(self, paint: Any, size: int = 32) -> None:
        self.paint, self.size, self.autoencoder = paint, size, Identity()
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Tensor:
        self.requests.append(request)
        pairs = zip(request.prompts, request.seeds, strict=True)
        return torch.stack([to_tensor(self.paint(prompt, seed)) for prompt, seed in pairs])


def good(prompt: str, seed: int) -> Image.Image:
    return draw(parse(prompt), 32, np.random.default_rng(seed))


def stubborn(prompt: str, seed: int) -> Image.Image:
    return good("a small red circle", seed)


def test_a_good_artist_scores_everything(tmp_path: Path) -> None:
    artist: Any = Artist(good)
    result = evaluate_shapes(artist, Sampling(seed=5, steps=7, guidance=2.0), 20, tmp_path / "new")
    for kind in ("heldout", "seen", "reconstructed", "real"):
        assert result[kind]["all"] == 1.0
    assert result["heldout"]["images"] == 20 and result["real"]["images"] == 40
    assert 30 < result["reconstructed"]["psnr"] < 60
    first, second = artist.requests
    assert (first.steps, first.guidance, first.sampler) == (7, 2.0, Request(("a",), (0,)).sampler)
    assert first.seeds == tuple(range(5, 25)) and set(first.prompts).isdisjoint(second.prompts)
    assert json.loads((tmp_path / "new" / "scores.json").read_text()) == result
    assert {path.stem for path in tmp_path.glob("new/*.png")} == {"heldout", "seen", "reconstructed", "real"}


def test_a_stubborn_artist_scores_next_to_nothing() -> None:
    artist: Any = Artist(stubborn)
    result = evaluate_shapes(artist, Sampling(), 40)
    assert result["heldout"]["all"] == 0 and result["seen"]["all"] <= 1 / 40
    assert result["heldout"]["relations"] == 0


def test_wrong_counts_and_sizes_are_refused() -> None:
    artist: Any = Artist(good)
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_shapes(artist, Sampling(), 0)
    artist.size = 40
    with pytest.raises(ValueError, match="multiple of 32"):
        evaluate_shapes(artist, Sampling(), 4)
    assert not artist.requests  # refused before the long part


def emoji(name: str, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(list(name.encode()))
    blocks = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))


class Pictures:
    """A source of one picture a name."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"p{index}", emoji(self.names[index]), (self.names[index],), {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shard folders of 30 faces, one of them twice, and of 10 hands."""
    seen, new = tmp_path_factory.mktemp("seen"), tmp_path_factory.mktemp("new")
    build(Pictures([f"face {i}" for i in range(30)] + ["face 0"]), BuildConfig(size=32), seen)
    build(Pictures([f"hand {i}" for i in range(10)]), BuildConfig(size=32), new)
    return seen, new


def test_emoji_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    artist: Any = Artist(lambda name, seed: emoji(name.replace("hand", "face")))
    result = evaluate_emoji(artist, Sampling(), *folders, 20, tmp_path)
    assert (result["train"]["images"], result["heldout"]["images"]) == (20, 10)
    assert result["train"]["top1"] == 1.0 and result["heldout"]["top1"] == 0.0
    assert result["heldout"]["reconstructed"] == {"top1": 1.0, "top5": 1.0}
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert (tmp_path / "heldout.png").exists() and (tmp_path / "train-real.png").exists()
    assert "heldout" not in evaluate_emoji(artist, Sampling(), folders[0], count=3)


def test_a_sample_of_a_gallery_has_different_names() -> None:
    gallery = Gallery(torch.arange(6.0).view(6, 1, 1, 1), ["a", "b", "a", "c", "b", "d"])
    chosen = gallery.sample(10, np.random.default_rng(0))
    assert chosen.names == ["a", "b", "c", "d"] and chosen.images.flatten().tolist() == [0, 1, 3, 5]
    assert len(gallery.sample(2, np.random.default_rng(0)).names) == 2


def test_commands_print_a_table(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.cli.evaluate.load", lambda model: Artist(good))
    told = CliRunner().invoke(app, ["shapes", "model", "--count", "6", "--steps", "3"])
    assert told.exit_code == 0, told.output
    assert [line.split()[0] for line in told.output.splitlines()[1:5]] == ["heldout", "seen", "reconstructed", "real"]
    assert "100.0" in told.output
    seen, new = folders
    monkeypatch.setattr("ldm.cli.evaluate.load", lambda model: Artist(emoji))
    told = CliRunner().invoke(app, ["emoji", "model", str(seen), "--heldout", str(new), "--count", "4"])
    assert told.exit_code == 0 and told.output.splitlines()[2].split()[:2] == ["heldout", "4"]


def test_an_unknown_sampler_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.cli.evaluate.load", lambda model: Artist(good))
    told = CliRunner().invoke(app, ["shapes", "model", "--count", "4", "--sampler", "dimm"])
    assert isinstance(told.exception, ValueError) and "ddim" in str(told.exception)
