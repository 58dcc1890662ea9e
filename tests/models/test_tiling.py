"""Tiles: the untiled autoencoder's numbers, without seams."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.tiling import decode_alone, picture, seam
from ldm.models import tiling
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.tiling import tile, untile
from ldm.models.vq import AutoencoderVQ, VQConfig

CONFIGS = [
    AutoencoderConfig(channels=8, multipliers=(1, 2, 2), blocks=1, norm_groups=4),
    AutoencoderConfig(channels=4, multipliers=(1, 1, 2, 4), norm_groups=2, attention_levels=(3,)),
]


def both(model: nn.Module, image: torch.Tensor, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return model.encode(image), model.decode(latent)


def made(config: AutoencoderConfig) -> tuple[AutoencoderKL, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = AutoencoderKL(config).double().eval()
    image = torch.cat([picture(168), picture(168).flip(2)])[..., :136, :].double()
    return model, image, torch.randn(2, 4, 136 // model.factor, 168 // model.factor, dtype=torch.float64)


def without_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())


@pytest.mark.parametrize("config", CONFIGS)
def test_edges_of_tiles_change_nothing(config: AutoencoderConfig) -> None:
    """Where norms are local the tiles are exact to rounding, at every size of tile, divisible or not."""
    model, image, latent = made(config)
    without_norms(model)
    whole = both(model, image, latent)
    for side in (16, 48, 104):
        tile(model, side)
        for a, b in zip(both(model, image, latent), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.std().item())


def test_a_tile_needs_what_it_sees_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, latent = made(CONFIGS[0])
    without_norms(model)
    whole = both(model, image, latent)
    monkeypatch.setattr(tiling, "ceil", lambda reach: math.ceil(reach) - 2)
    tile(model, 48)
    for a, b in zip(both(model, image, latent), whole, strict=True):
        assert (a - b).abs().max() > 1e-8 * b.std()


@pytest.mark.parametrize("config", CONFIGS)
def test_norms_are_exact_where_the_windows_cover_the_picture(
    config: AutoencoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image, latent = made(config)
    whole = both(model, image, latent)

    def everything(x: torch.Tensor, frame: object) -> object:
        return x, [[tiling._Span(0, n) for n in x.shape[-2:]]]

    monkeypatch.setattr(tiling, "_windows", everything)
    tile(model, 48)
    for a, b in zip(both(model, image, latent), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.std().item())  # norms are summed in float32


def test_there_is_no_seam_and_less_difference_than_of_tiles_by_themselves() -> None:
    model, image, _ = made(CONFIGS[0])
    model = model.float()
    image = image.float()[:1, :, :128, :128]
    with torch.inference_mode():
        latent = model.encode(image)
        whole = model.decode(latent)
        alone = decode_alone(model, latent, 16) - whole
        tile(model, 64)
        ours = model.decode(latent) - whole
    assert 0 < seam(ours, 40) < 1.3 and seam(alone, 64) > 1.6  # 40: 64 less what is seen around


def test_windows_lie_in_the_picture_and_say_what_they_have_seen() -> None:
    x = torch.arange(60.0 * 44).view(1, 1, 60, 44)
    frame = tiling._Frame(side=20, halo=4, scale=1.0, coarsest=2)
    windows, inner = tiling._windows(x, frame)
    assert len(windows) == len(inner) > 1
    for window, (rows, columns) in zip(windows, inner, strict=True):
        top, left = divmod(int(window[0, 0, 0]), 44)
        assert torch.equal(window[0], x[0, 0, top : top + 16, left : left + 16])
        assert (rows.start == 0) == (top == 0) and (rows.stop == 16) == (top == 44)
        assert (columns.start == 0) == (left == 0) and (columns.stop == 16) == (left == 28)
        assert top % 2 == left % 2 == 0
    tops = sorted({int(w[0, 0, 0]) // 44 for w in windows})
    assert tops[0] == 0 and tops[-1] == 44 and len({b - a for a, b in pairwise(tops)}) <= 2


def test_small_pictures_and_untiled_models_are_as_before() -> None:
    model, image, latent = made(CONFIGS[0])
    whole = both(model, image, latent)
    names = set(model.state_dict())
    tile(model, 168)
    for now, before in zip(both(model, image, latent), whole, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=1e-4)  # one by one: together they are more than a tile
    tile(model, 48)
    assert not torch.equal(model.decode(latent), whole[1])
    assert set(model.state_dict()) == names
    untile(model)
    assert all(torch.equal(a, b) for a, b in zip(both(model, image, latent), whole, strict=True))
    with pytest.raises(ValueError, match="multiple of 4 px, got 50"):
        tile(model, 50)


def test_a_codebook_is_looked_up_before_the_tiles() -> None:
    torch.manual_seed(0)
    model = AutoencoderVQ(VQConfig(channels=8, multipliers=(1, 2, 2), blocks=1, norm_groups=4)).eval()
    latent = torch.randn(1, model.latent_channels, 32, 32)
    with torch.inference_mode():
        whole = model.decode(latent)
        tile(model, 64)
        assert model.decode(latent).shape == whole.shape
        assert (model.decode(latent) - whole).abs().mean() < whole.std()
