"""PSNR of pictures in [-1, 1]."""

import pytest
import torch

from ldm.evaluation.metrics import psnr


def test_psnr_of_known_errors() -> None:
    a = torch.zeros(3, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), value) for value in (0.2, 2.0, 0.0)])
    # 10 log10(2^2 / 0.2^2) = 20 dB
    assert psnr(a, b).tolist() == pytest.approx([20.0, 0.0, float("inf")], abs=1e-5)


def test_psnr_agrees_with_eight_bits() -> None:
    a, b = torch.randint(0, 256, (2, 4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).double()
    mse = (a - b).square().flatten(1).mean(1)
    assert torch.allclose(psnr(a / 127.5 - 1, b / 127.5 - 1), 10 * (255**2 / mse).log10())


def test_psnr_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
