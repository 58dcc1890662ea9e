"""Resizing against its formula in real numbers, and the same bytes whatever the CPU can do."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_pipeline.resize import resize, resize_crop

Matrix = npt.NDArray[np.float64]
SHAPES = [((33, 57), (32, 32)), ((57, 33), (32, 32)), ((640, 480), (256, 256)), ((60, 40), (128, 96)), ((3, 2), (8, 8))]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def lanczos(old: int, new: int) -> Matrix:
    """[new, old] weights: sinc(x) sinc(x / 3) around each new pixel's centre, as wide as the reduction, sum 1."""
    ratio = old / new
    scale = max(ratio, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * ratio
        first, last = max(0, int(centre - 3 * scale + 0.5)), min(old, int(centre + 3 * scale + 0.5))
        x = (np.arange(first, last) - centre + 0.5) / scale
        row = np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)
        weights[i, first:last] = row / row.sum()
    return weights


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_is_the_formula(old: tuple[int, int], new: tuple[int, int]) -> None:
    """White noise, the hardest of pictures: every row and column overshoots."""
    image = noise(*old)
    rows = np.einsum("hwc,vw->hvc", np.asarray(image).astype(float), lanczos(old[0], new[0])).clip(0, 255).round()
    expected = np.einsum("uh,hvc->uvc", lanczos(old[1], new[1]), rows).clip(0, 255).round()
    found = np.asarray(resize(image, new)).astype(float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2 and np.abs(found - expected).mean() < 0.05


def digest() -> str:
    return hashlib.sha256(b"".join(resize(noise(*old), new).tobytes() for old, new in SHAPES)).hexdigest()


@pytest.mark.slow
def test_every_cpu_gives_the_same_bytes() -> None:
    """torch's kernels without any vector instructions, in a process of their own, against this machine's best."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = (
        "import torch, tests.data_pipeline.test_resize as t; print(torch.backends.cpu.get_cpu_capability(), t.digest())"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["DEFAULT", digest()], done.stderr


def test_a_box_is_a_crop_first() -> None:
    image = noise(50, 40)
    assert resize(image, (16, 8), (5, 7, 45, 31)).tobytes() == resize(image.crop((5, 7, 45, 31)), (16, 8)).tobytes()


def test_resize_crop_takes_the_centre() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert np.asarray(resize_crop(image, 10)).tolist() == [[[0, 0, 255]] * 10] * 10
    tall = image.transpose(Image.Transpose.ROTATE_90)
    assert resize_crop(tall, 5).tobytes() == resize(tall, (5, 5), (0, 10, 10, 20)).tobytes()
    square = noise(8, 8)
    assert resize_crop(square, 8).tobytes() == square.tobytes()


def test_resize_is_antialiased() -> None:
    checkers = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    inner = np.asarray(resize_crop(checkers, 8))[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127).max() <= 2


def test_extreme_shapes_cost_little() -> None:
    assert resize_crop(Image.new("RGB", (1, 20000)), 64).size == (64, 64)
    with pytest.raises(ValueError, match="size=0"):
        resize_crop(noise(8, 8), 0)
