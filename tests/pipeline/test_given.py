"""Pictures and masks before and after drawing, against closed forms and Pillow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.pipeline import Given, outpaint
from ldm.pipeline.canvas import (
    boxes_around,
    cells_of,
    cut,
    extended,
    filled,
    interpolated,
    open_depth,
    pasted,
    resized,
    softened,
)

PICTURE = torch.rand(2, 3, 24, 36, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rectangle(left, top, right, bottom, size=(36, 24)):
    mask = torch.zeros(1, 1, size[1], size[0])
    mask[..., top:bottom, left:right] = 1
    return mask


def test_resized_is_lanczos_of_pillow():
    picture = 128 + 20 * PICTURE[:1]  # far from where 8 bits cut off what overshoots
    whole = picture.round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(whole).resize((54, 48), Image.Resampling.LANCZOS)).astype(float)
    ours = resized(picture.round(), 54, 48)[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(ours - theirs).max() < 1.2  # theirs rounds to whole numbers after either direction
    assert resized(PICTURE, 36, 24) is PICTURE
    assert resized(torch.full((2, 1, 5, 7), 0.3), 14, 3).sub(0.3).abs().max() < 1e-6


def test_a_depth_keeps_its_units_and_all_of_16_bits(tmp_path):
    values = np.arange(12, dtype="uint16").reshape(3, 4) * 5000
    Image.fromarray(values).save(tmp_path / "depth.png")
    assert np.array_equal(open_depth(tmp_path / "depth.png")[0, 0].numpy(), values.astype("float32"))
    Image.fromarray(values.astype("uint8")).save(tmp_path / "grey.png")
    assert np.array_equal(open_depth(tmp_path / "grey.png")[0, 0].numpy(), values.astype("uint8"))
    assert open_depth(tmp_path / "depth.png", (8, 6)).shape == (1, 1, 6, 8)


def test_interpolated_repeats_or_keeps_a_constant():
    assert torch.equal(
        interpolated(PICTURE, (48, 72), "nearest"), PICTURE.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    for how in ("bilinear", "bicubic"):
        assert interpolated(torch.full((1, 4, 5, 7), 0.3), (10, 9), how).sub(0.3).abs().max() < 1e-6


def test_a_latent_is_drawn_anew_if_any_of_its_pixels_is():
    assert cells_of(rectangle(7, 0, 9, 1), torch.zeros(1, 4, 6, 9))[0, 0].nonzero().tolist() == [[0, 1], [0, 2]]


def test_the_filling_agrees_with_what_is_known():
    mask = rectangle(10, 5, 30, 20)
    found = filled(PICTURE, mask)
    assert torch.allclose(found[(mask == 0).expand_as(found)], PICTURE[(mask == 0).expand_as(found)])
    assert found.min() >= PICTURE.min() and found.max() <= PICTURE.max()
    assert filled(torch.full((1, 3, 24, 36), 0.4), mask).sub(0.4).abs().max() < 1e-6
    assert torch.equal(filled(PICTURE, torch.ones(1, 1, 24, 36)), torch.zeros_like(PICTURE))


def test_the_filling_is_of_the_nearest_surroundings():
    """A picture of two colours with a hole in each: every hole takes on its own."""
    sides = torch.ones(1, 3, 32, 64)
    sides[..., 32:] = -1
    mask = rectangle(8, 10, 16, 20, (64, 32)) + rectangle(48, 10, 56, 20, (64, 32))
    found = filled(sides * (1 - mask), mask)
    assert (found - sides).abs().max() < 0.2 and (found - sides).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("mask", "padding", "size", "box"),
    [
        (rectangle(10, 8, 14, 12), 0, (8, 8), (10, 8, 14, 12)),
        (rectangle(10, 8, 14, 12), 3, (8, 8), (7, 5, 17, 15)),
        (rectangle(10, 8, 14, 10), 0, (8, 8), (10, 7, 14, 11)),  # made square about its middle
        (rectangle(10, 8, 14, 12), 0, (16, 8), (8, 8, 16, 12)),  # and twice as wide as high
        (rectangle(0, 0, 4, 2), 5, (8, 8), (0, 0, 9, 9)),  # at the edge
        (rectangle(30, 20, 36, 24), 2, (8, 8), (28, 16, 36, 24)),
        (rectangle(0, 0, 36, 24), 9, (8, 8), (0, 0, 36, 24)),  # no square fits
    ],
)
def test_the_box_around_a_mask(mask, padding, size, box):
    assert boxes_around(mask, padding, *size) == [box]


def test_cutting_and_pasting_undo_each_other():
    boxes = [(3, 2, 15, 14), (20, 8, 32, 20)]
    parts = cut(PICTURE, boxes, 12, 12)
    assert torch.equal(parts[1], PICTURE[1, :, 8:20, 20:32])
    assert torch.equal(pasted(PICTURE, boxes, parts), PICTURE)
    changed = pasted(PICTURE, boxes, -parts)
    assert torch.equal(changed[0, :, 2:14, 3:15], -PICTURE[0, :, 2:14, 3:15])
    assert torch.equal(changed[0, :, :, 15:], PICTURE[0, :, :, 15:])


def test_a_canvas_goes_on_from_its_edges_and_keeps_what_it_has():
    canvas, mask = extended(PICTURE, (8, 0, 0, 4), overlap=3)
    assert canvas.shape == (2, 3, 28, 44) and torch.equal(canvas[..., :24, 8:], PICTURE)
    assert torch.equal(canvas[..., :24, 0], PICTURE[..., 0]) and torch.equal(canvas[..., 27, 8:], PICTURE[..., 23, :])
    assert torch.allclose(mask[0, 0, 5, :13], torch.tensor([1.0] * 8 + [0.75, 0.5, 0.25, 0.0, 0.0]))
    assert torch.allclose(mask[0, 0, 19:, 30], torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75] + [1.0] * 4))
    assert (mask[0, 0, :20, 11:] == 0).all()
    for sides, overlap in (((0, 0, 0, 0), 1), ((1, -1, 0, 0), 1), ((1, 1, 1), 1)):
        with pytest.raises(ValueError, match="outpainting adds 0 px or more at 4 sides"):
            extended(PICTURE, sides, overlap)
    with pytest.raises(ValueError, match="overlap of 40 px leaves nothing of a picture of 36x24 px"):
        extended(PICTURE, (8, 8, 0, 0), 40)


def test_outpainting_rounds_the_canvas_up():
    given = outpaint(PICTURE, (5, 0, 0, 0), multiple=16, overlap=2)
    assert given.image.shape == (2, 3, 32, 48) and given.mask.shape == (1, 1, 32, 48) and given.strength is None
    assert torch.equal(given.image[..., :24, 5:41], PICTURE) and (given.mask[..., 24:, :] == 1).all()
    with pytest.raises(ValueError, match="at 4 sides"):
        outpaint(PICTURE, (0, 0, 0, 0), multiple=16)


def test_known_pixels_are_put_back_to_the_byte_outside_the_blurred_mask():
    given = Given(PICTURE, mask=rectangle(12, 8, 20, 16), mask_blur=1.5)
    drawn = -PICTURE
    found, soft = given.put_back(drawn, slice(0, 2)), softened(given.mask, 1.5)
    kept = (soft == 0).expand_as(found)
    assert torch.equal(found[kept], PICTURE[kept]) and 0 < kept.float().mean() < 1
    torch.testing.assert_close(found, (1 - soft) * PICTURE + soft * drawn)
    assert torch.equal(given.put_back(drawn[1:], slice(1, 2)), found[1:])


def test_a_region_is_drawn_at_full_size_and_put_back_into_its_place():
    masks = torch.cat([rectangle(4, 4, 10, 10), rectangle(20, 10, 28, 18)])
    given = Given(PICTURE, mask=masks, padding=2)
    drawn_into = given.at(32, 32)
    assert drawn_into.image.shape == (2, 3, 32, 32) and drawn_into.mask.shape == (2, 1, 32, 32)
    assert drawn_into.padding is None and drawn_into.mask[:, :, 16, 16].min() > 0.9
    found = given.put_back(torch.full((2, 3, 32, 32), 0.5), slice(0, 2))
    kept = (masks == 0).expand_as(found)
    assert found.shape == PICTURE.shape and torch.equal(found[kept], PICTURE[kept])
    assert found[~kept].sub(0.5).abs().max() < 1e-6
    assert torch.equal(given.put_back(torch.full((1, 3, 32, 32), 0.5), slice(1, 2)), found[1:])


def test_one_mask_may_be_for_several_pictures_and_one_picture_for_several_masks():
    for image, mask in (
        (PICTURE, rectangle(4, 4, 10, 10)),
        (PICTURE[:1], torch.cat([rectangle(4, 4, 10, 10), rectangle(20, 10, 28, 18)])),
    ):
        given = Given(image, mask=mask, padding=2)
        assert given.at(16, 16).image.shape == (2, 3, 16, 16)
        found = given.put_back(torch.zeros(2, 3, 16, 16), slice(0, 2))
        kept = (mask == 0).expand_as(found)
        assert torch.equal(found[kept], image.expand_as(found)[kept])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.01}, "strength must be above 0 and at most 1, got 1.01"),
        ({"strength_steps": "some"}, "unknown strength_steps 'some'"),
        ({"mask_blur": 3.0}, "mask_blur=3.0 goes with a mask"),
        ({"padding": 3}, "padding=3 goes with a mask"),
        ({"fill": "noise", "strength": 0.5}, "fill=noise goes with a mask"),
        ({"fill": "noise", "mask": rectangle(1, 1, 2, 2)}, "give a strength as well"),
        ({"fill": "nois", "mask": rectangle(1, 1, 2, 2)}, "did you mean 'noise'"),
        ({"mask": rectangle(1, 1, 2, 2), "mask_blur": -1.0}, "mask_blur and padding must be 0 px or more"),
        ({"mask": rectangle(1, 1, 2, 2), "padding": -1}, "mask_blur and padding must be 0 px or more"),
        ({"shows": "a cat", "strength": 0.5}, "strength goes with a plain picture or a mask"),
        ({"measure": "blur:2", "strength": 0.5}, "strength goes with a plain picture or a mask"),
        ({"noise_level": -1}, "noise_level 0 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Given(PICTURE, **change)


def test_an_empty_mask_has_no_region():
    with pytest.raises(ValueError, match="the mask is empty"):
        replace(Given(PICTURE, mask=torch.zeros(1, 1, 24, 36)), padding=4).at(16, 16)
