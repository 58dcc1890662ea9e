"""Random masks: what each kind is, how much it hides, and that a seed says all."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from data_pipeline.masks import MIXTURE, random_mask

SIDE = 64
# Mean share of hidden pixels that the module states, and a bound on the standard deviation of one mask's share.
STATED = {"whole": (1.0, 0.0), "strokes": (0.25, 0.15), "boxes": (0.25, 0.14), "ellipses": (0.20, 0.12),
          "side": (0.50, 0.15)}  # fmt: skip


def draw(kind: str, count: int, seed: int = 0, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """[count, H, W]"""
    rng = np.random.default_rng(seed)
    return torch.cat([random_mask(height, width, rng, {kind: 1.0}) for _ in range(count)])


def test_form_and_determinism() -> None:
    for shape in ((40, 56), (1, 1), (3, 200)):
        masks = [random_mask(*shape, np.random.default_rng(seed)) for seed in range(50)]
        again = [random_mask(*shape, np.random.default_rng(seed)) for seed in range(50)]
        assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
        for mask in masks:
            assert mask.shape == (1, *shape) and mask.dtype == torch.float32
            assert set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any()


@pytest.mark.parametrize("kind", MIXTURE)
def test_hides_the_stated_share(kind: str) -> None:
    """1,000 masks: the mean is within 0.02 of the stated one; by chance outside with probability below 3e-5.

    (0.02 is 4.2 standard deviations of the mean, at most 0.15 / sqrt(1000); seeded, so it is the same every time.)
    """
    shares = draw(kind, 1000).mean((1, 2))
    mean, spread = STATED[kind]
    assert abs(shares.mean() - mean) < 0.02 and shares.std() <= spread + 1e-6


def test_kinds_come_with_their_chances() -> None:
    """Whole masks are told by the eye; of 4,000 their number is within 5 standard deviations (6e-7)."""
    rng = np.random.default_rng(3)
    masks = torch.cat([random_mask(SIDE, SIDE, rng) for _ in range(4000)])
    whole = int(masks.flatten(1).all(1).sum())
    assert abs(whole - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)
    assert abs(masks.mean() - sum(MIXTURE[k] * STATED[k][0] for k in MIXTURE)) < 5 * 0.35 / np.sqrt(4000)
    hidden = masks.mean(0)  # each place of the picture is hidden often, and known often
    assert hidden.min() > 0.25 and hidden.max() < 0.7
    assert np.isclose(sum(MIXTURE.values()), 1)


def test_whole_and_side() -> None:
    assert draw("whole", 3).all()
    for mask in draw("side", 200, height=20, width=30).bool():
        (box,) = ndimage.find_objects(mask.int().numpy())
        assert mask[box].all()  # one box ...
        full = [s.stop - s.start == n for s, n in zip(box, mask.shape, strict=True)]
        assert sum(full) == 1  # ... from border to border one way ...
        (other,) = (i for i in (0, 1) if not full[i])
        assert box[other].start == 0 or box[other].stop == mask.shape[other]  # ... that begins at a side
        assert 0.2 <= mask.float().mean() <= 0.8
    sides = {tuple(m[[0, -1], 15].tolist() + m[10, [0, -1]].tolist()) for m in draw("side", 200, 1, 20, 30)}
    assert len(sides) >= 4


def test_boxes_are_unions_of_boxes_inside() -> None:
    """Opening with a 3 x 3 square changes a union of boxes at least 6 px a side nowhere."""
    for mask in draw("boxes", 100).bool().numpy():
        assert np.array_equal(ndimage.binary_opening(mask, np.ones((3, 3))), mask)
        assert ndimage.label(mask)[1] <= 4


def test_strokes_are_wide() -> None:
    """Each is at least 0.1 of the side wide, so a disc of 5 px fits nearly everywhere in it."""
    for mask in draw("strokes", 100).bool().numpy():
        padded = np.pad(mask, 8, mode="edge")  # a stroke may leave the picture
        disc = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2.3
        kept = ndimage.binary_opening(padded, disc)[8:-8, 8:-8]
        assert kept.sum() >= 0.9 * mask.sum()


def test_mistakes() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        random_mask(0, 5, rng)
    for mixture in ({}, {"boxes": 0.0}, {"stars": 1.0}, {"boxes": float("nan")}):
        with pytest.raises(ValueError, match="weights above 0 for whole, strokes, boxes, ellipses, side"):
            random_mask(5, 5, rng, mixture)
