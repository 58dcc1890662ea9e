"""Edges and regions against what is known of drawn pictures, and the folder of them that the command writes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from data_pipeline import conditions
from data_pipeline.build import BuildConfig, build
from data_pipeline.conditions import edges, segments, write_conditions
from data_pipeline.loader import DataConfig, fixed_batch
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.transforms import decode, to_tensor, to_unit
from ldm.cli.data import app

GROUND, RED, BLUE = (240, 240, 240), (200, 30, 40), (30, 60, 210)


def drawn(height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A red box and a blue disc on a light ground; -> pixels [H, W, 3] uint8 and labels [H, W]: 0, 1, 2."""
    y, x = np.mgrid[:height, :width]
    labels = np.where((x >= 6) & (x < 26) & (y >= 8) & (y < 40), 1, 0)
    labels[(x - 46) ** 2 + (y - 24) ** 2 <= 144] = 2
    return np.array([GROUND, RED, BLUE], np.uint8)[labels], labels


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return to_tensor(Image.fromarray(pixels))


def test_edges_follow_the_borders_and_close_around_shapes() -> None:
    pixels, labels = drawn()
    found = edges(tensor(pixels))
    assert found.shape == (3, 48, 64) and found.dtype == torch.float32 and set(found.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    lines = found[0].numpy() > 0
    border = ndimage.morphological_gradient(labels, size=3) > 0
    from_border = ndimage.distance_transform_edt(~border)
    assert from_border[lines].max() <= 1  # no line where nothing is
    assert ndimage.distance_transform_edt(~lines)[border].max() <= 2  # no border without a line
    inside, count = ndimage.label(~lines)  # 4-neighbours: a closed line parts the plane
    big = [i for i in range(1, count + 1) if (inside == i).sum() > 50]
    assert len(big) == 3 and {int(np.bincount(labels[inside == i]).argmax()) for i in big} == {0, 1, 2}


def test_edges_between_colours_of_equal_brightness() -> None:
    """Red and green of the same luminance: seen in the channels, not in their weighted sum."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = (200, 0, 0), (0, 59, 0)  # 0.2126 * 200 = 0.7152 * 59.45
    columns = edges(tensor(pixels))[0].numpy().any(0)
    assert set(np.flatnonzero(columns)) <= {14, 15, 16, 17} and columns.any()
    assert not edges(torch.zeros(3, 32, 32)).any()


@pytest.mark.parametrize(("contrast", "seen"), [(0.07, False), (0.09, True)])
def test_edges_begin_at_the_stated_contrast(contrast: float, seen: bool) -> None:
    """Of a step c, blurred by a Gaussian, Sobel gives 4 c (Phi(0.5) - Phi(-1.5)) = 2.5 c beside it: 0.2 at c = 0.08."""
    step = torch.zeros(3, 24, 32)
    step[:, :, 16:] = 2 * contrast  # of a range from -1 to 1
    assert edges(step).any() == seen


def test_segments_are_the_regions_in_their_colours() -> None:
    pixels, labels = drawn()
    found = segments(tensor(pixels))
    assert found.shape == (3, 48, 64) and found.dtype == torch.float32
    stored = (found * 255).numpy()
    assert np.abs(stored - stored.round()).max() < 1e-3  # a PNG of 8 bits loses nothing
    inner = ndimage.distance_transform_edt(ndimage.morphological_gradient(labels, size=3) == 0) > 2
    off = np.abs(stored.transpose(1, 2, 0) - np.array([GROUND, RED, BLUE])[labels])[inner]
    assert off.max() <= 6  # the blur at the borders is in the means
    assert len(np.unique(stored.round().reshape(3, -1), axis=1).T) <= 6


def test_segments_of_noise_are_larger_than_pixels() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 40, 40))).float()
    colours = np.unique(segments(noise).reshape(3, -1).numpy(), axis=1).shape[1]
    assert 2 <= colours <= 400


@pytest.mark.parametrize("make", [edges, segments])
def test_deterministic_and_of_one_picture(make: Any) -> None:
    noise = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (3, 33, 21))).float()
    before = noise.clone()
    assert torch.equal(make(noise), make(noise)) and torch.equal(noise, before)
    assert make(noise).min() >= 0 and make(noise).max() <= 1
    with pytest.raises(ValueError, match=r"one picture \[3, H, W\], not of \[1, 3, 33, 21\]"):
        make(noise[None])


def test_without_scikit_image_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(ValueError, match=r"need scikit-image; get it with: pip install 'ldm\[data\]'"):
        conditions.maker("edges")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(drawn()[0]).save(folder / "a.png")
    Image.fromarray(drawn(96, 130)[0]).save(folder / "deep" / "b.webp", lossless=True)
    for name in ("a", "deep/b"):
        (folder / f"{name}.txt").write_text(name)
    return folder


@pytest.mark.parametrize("kind", conditions.KINDS)
def test_written_ones_are_those_made_while_loading(pictures: Path, tmp_path: Path, kind: str) -> None:
    out = str(tmp_path / "made")
    assert write_conditions(str(pictures), out, kind) == {}
    config = FolderConfig(str(pictures), conditions=out)
    shards = tmp_path / "shards"
    build(FolderSource(config), BuildConfig(size=40), tmp_path / "square")
    build(FolderSource(config), BuildConfig(), shards)
    reader = ShardReader(shards)
    for i in range(2):
        members = reader.read(i, ("png", "condition.png"))
        image, stored = (decode(members[name]) for name in ("png", "condition.png"))
        assert torch.allclose(to_unit(stored), conditions.maker(kind)(to_tensor(image)), atol=1e-6)
    loaded = fixed_batch(ShardReader(tmp_path / "square"), DataConfig("", condition="stored"), 2)
    assert loaded.condition is not None and loaded.condition.shape == (2, 3, 40, 40)


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no")
    arguments = ["condition", str(pictures), "--kind", "edges", "--out", str(pictures / "edges"), "--size", "48"]
    for _ in range(2):  # what it wrote into the folder are not its pictures
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0 and "broken.png: unreadable image" in result.output
        written = sorted(p.relative_to(pictures / "edges").as_posix() for p in (pictures / "edges").rglob("*.*"))
        assert written == ["a.png", "deep/b.png"]
    assert Image.open(pictures / "edges" / "deep" / "b.png").size == (65, 48)
    assert Image.open(pictures / "edges" / "a.png").size == (64, 48)


def test_mistakes(pictures: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="condition='depth': made from the picture are edges, segments"):
        write_conditions(str(pictures), out, "depth")
    with pytest.raises(ValueError, match="size=0"):
        write_conditions(str(pictures), out, "edges", 0)
    with pytest.raises(ValueError, match="is not a folder"):
        write_conditions(str(tmp_path / "none"), out, "edges")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        write_conditions(str(tmp_path / "empty"), out, "edges")
    Image.new("RGB", (4, 4)).save(pictures / "a.bmp")
    with pytest.raises(ValueError, match=r"a\.bmp and a\.png would have the same condition"):
        write_conditions(str(pictures), out, "edges")
    assert not Path(out).exists()
