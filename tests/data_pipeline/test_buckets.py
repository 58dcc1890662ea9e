"""Buckets hold what they should, and a cut shows what its coordinates say."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import Shape, assign, bucket_shapes
from data_pipeline.resize import resize_crop
from data_pipeline.transforms import Frame, Framing, cut, largest_box, told_sizes


@pytest.mark.parametrize(("size", "step", "aspect"), [(512, 64, 2.0), (1024, 64, 4.0), (96, 8, 3.0), (64, 64, 2.0)])
def test_shapes_are_all_those_that_fit(size: int, step: int, aspect: float) -> None:
    shapes = bucket_shapes(size, step, aspect)
    sides = range(step, 17 * size, step)
    fitting = {(w, h) for w in sides for h in sides if w * h <= size**2 and max(w, h) <= aspect * min(w, h)}
    whole = {s for s in fitting if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in fitting)}
    assert set(shapes) == whole and (size, size) in shapes
    assert {(h, w) for w, h in shapes} == set(shapes)
    assert shapes == sorted(shapes, key=lambda s: Fraction(*s))
    assert all(w * h > 0.7 * size**2 for w, h in shapes if min(w, h) >= 4 * step)


def test_the_buckets_of_sdxl() -> None:
    """Those of Podell et al. 2023, appendix I, between 1:2 and 2:1 which fill most of 1024^2 px."""
    published = [(832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (704, 1408), (768, 1344)]
    assert set(published) <= set(bucket_shapes(1024, 64, 2.0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((500, 64, 2.0), "multiple of bucket_step=64"),
        ((512, 0, 2.0), "bucket_step=0"),
        ((512, 64, 0.5), "max_aspect=0.5"),
    ],
)
def test_refusals(arguments: tuple[int, int, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bucket_shapes(*arguments)


def test_the_nearest_shape_by_exact_arithmetic() -> None:
    shapes = bucket_shapes(512, 64, 2.0)
    sizes = np.random.default_rng(0).integers(1, 5000, (500, 2), dtype=np.int32)

    def off(size: list[int], shape: Shape) -> Fraction:
        ratio = Fraction(size[0] * shape[1], size[1] * shape[0])
        return max(ratio, 1 / ratio)

    chosen = assign(sizes, shapes)
    for size, i in zip(sizes.tolist(), chosen, strict=True):
        assert off(size, shapes[i]) == min(off(size, shape) for shape in shapes)


def ramp(width: int, height: int) -> Image.Image:
    """Red says how far right a pixel is, green how far down, as shares of the picture."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, 0 * x], -1) * 255).round().astype(np.uint8))


CASES = [
    ((300, 200), (64, 64)),
    ((200, 300), (48, 80)),
    ((311, 97), (80, 48)),
    ((64, 64), (64, 64)),
    ((90, 90), (96, 32)),
]


@pytest.mark.parametrize(("stored", "target"), CASES)
@pytest.mark.parametrize("crops", [0, 1, 4])
def test_coordinates_say_what_is_shown(stored: Shape, target: Shape, crops: int) -> None:
    """SDXL's own way, the whole picture resized and then cropped at the told corner, shows the same."""
    rng = np.random.default_rng(1)
    image = ramp(*stored)
    for _ in range(12):
        frame = Framing(crops, flip=True).draw(stored, target, rng)
        seen = np.asarray(cut(image, frame, target)).astype(float)
        assert seen.shape[:2] == target[::-1]
        height, width, top, left, *shape = told_sizes(frame, stored, stored, target)
        assert (width, height) == stored and shape == list(target[::-1])
        scale = max(target[0] / width, target[1] / height)
        whole = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if frame.mirrored else image
        whole = whole.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        expected = np.asarray(whole.crop((left, top, left + target[0], top + target[1]))).astype(float)
        inner = (slice(2, -2), slice(2, -2))
        assert np.abs(seen - expected)[inner].max() <= 255 * 1.5 / min(whole.size) + 2


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("original", [(400, 250), (250, 400), (128, 128)])
def test_coordinates_of_pictures_that_were_stored_as_squares(original: Shape, mirrored: bool) -> None:
    """The build's own centre crop counts: the corner is that of the whole original."""
    stored = resize_crop(ramp(*original), 64)
    frame = Frame(0, 0, 64, 64, mirrored)
    height, width, top, left, *shape = told_sizes(frame, (64, 64), original, (32, 32))
    assert (width, height) == original and shape == [32, 32]
    seen = np.asarray(cut(stored, frame, (32, 32))).astype(float)
    column, row = seen[16, 0, 0] / 255, seen[0, 16, 1] / 255  # where the corner lies, as shares of the original
    column = 1 - column if mirrored else column
    scale = 32 / min(original)
    assert column * original[0] * scale == pytest.approx(left + 0.5, abs=0.7)
    assert row * original[1] * scale == pytest.approx(top + 0.5, abs=0.7)


@pytest.mark.parametrize(("mirrored", "left"), [(False, 18), (True, 19)])
def test_of_an_odd_margin_the_mirrored_picture_has_the_longer_side_first(mirrored: bool, left: int) -> None:
    """101 px hold 64 after 18, so before 19."""
    frame = Frame(0, 0, 64, 64, mirrored)
    assert told_sizes(frame, (64, 64), (101, 64), (64, 64)) == [64, 101, 0, left, 64, 64]


def test_centred_squares_are_cut_as_builds_cut_them() -> None:
    rng = np.random.default_rng(0)
    for width, height in rng.integers(20, 90, (30, 2)).tolist():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        frame = Framing().draw(image.size, (16, 16), rng)
        assert cut(image, frame, (16, 16)).tobytes() == resize_crop(image, 16).tobytes()


def test_crops_reach_both_ends_and_random_ones_all_places() -> None:
    stored, target = (100, 40), (40, 40)
    fixed = Framing(crops=4, flip=True).variants(stored, target)
    assert [f.left for f in fixed] == [0, 0, 20, 20, 40, 40, 60, 60]
    assert [f.variant for f in fixed] == list(range(8)) and [f.mirrored for f in fixed] == [False, True] * 4
    rng = np.random.default_rng(0)
    drawn = [Framing(crops=0).draw(stored, target, rng).left for _ in range(1500)]
    assert set(drawn) == set(range(61))  # one place misses with a chance of 61 (60 / 61)^1500, 1e-9
    assert {Framing(4, flip=True).draw(stored, target, rng).variant for _ in range(400)} == set(range(8))
    with pytest.raises(ValueError, match="crops=65: allowed are 1"):
        Framing(65)


def test_boxes_are_the_largest_of_their_shape() -> None:
    rng = np.random.default_rng(2)
    for width, height, w, h in rng.integers(1, 400, (300, 4)).tolist():
        box = largest_box((width, height), (w, h))
        assert box[0] in range(1, width + 1) and box[1] in range(1, height + 1)
        assert box[0] == width or box[1] == height
        exact = (min(Fraction(width), Fraction(height * w, h)), min(Fraction(height), Fraction(width * h, w)))
        assert all(abs(side - wanted) <= Fraction(1, 2) or side == 1 for side, wanted in zip(box, exact, strict=True))
