"""What makes a model faster leaves its answers alone."""

import pytest
import torch
from torch import nn

from ldm.models.unet import UNet, UNetConfig
from ldm.nn.cpu import OneDNNLinear, for_cpu
from ldm.types import Conditioning

CONFIG = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, depths=(1, 1), context_dim=12, heads=2, norm_groups=4)


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_linear_against_its_formula(bias: bool) -> None:
    layer = nn.Linear(12, 20, bias=bias)
    x = torch.randn(2, 5, 12)
    expected = layer(x)
    fast = for_cpu(nn.Sequential(layer))
    assert type(layer) is OneDNNLinear
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast(x.transpose(0, 1)), expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_network_says_the_same_and_saves_the_same() -> None:
    network = UNet(CONFIG).eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), Conditioning(context=torch.randn(2, 5, 12))
    expected = network(x, t, cond)
    torch.testing.assert_close(for_cpu(network)(x, t, cond), expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(m, OneDNNLinear) for m in network.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_other_types_are_left_alone() -> None:
    layers = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    assert type(for_cpu(layers)[0]) is nn.Linear  # type: ignore[index]
