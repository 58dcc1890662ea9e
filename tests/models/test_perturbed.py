"""Weakened networks against the same networks rebuilt by hand, and nothing of the network changes."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.controlnet import Controlled, ControlNet, ControlNetConfig
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.perturbed import layers_of, perturbed, select
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.blocks import PixelAttention
from ldm.nn.cpu import for_cpu
from ldm.types import Conditioning

Inputs = tuple[Tensor, Tensor, Conditioning]
UNET = dict(channels=16, multipliers=(1, 2), blocks=1, depths=(1, 2), context_dim=8, heads=2, norm_groups=4)
DIT = dict(in_channels=4, out_channels=4, width=16, depth=3, heads=2, classes=0, context_dim=8)
MMDIT = dict(
    in_channels=4, out_channels=4, width=16, depth=3, heads=2, context_dim=8, pooled_dim=6, base_size=4, max_size=8,
    qk_norm=True, dual=(1,),
)  # fmt: skip


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():  # the zero-initialised layers would hide everything else
        nn.init.normal_(parameter, std=0.2)
    return network.double().eval().requires_grad_(False)


def unet(**changes: Any) -> UNet:
    return randomised(UNet(UNetConfig(**{**UNET, **changes})))  # type: ignore[arg-type, return-value]


def dit() -> DiT:
    return randomised(DiT(DiTConfig(**DIT)))  # type: ignore[arg-type, return-value]


def mmdit() -> MMDiT:
    return randomised(MMDiT(MMDiTConfig(**MMDIT)))  # type: ignore[arg-type, return-value]


def told() -> Inputs:
    torch.manual_seed(1)
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    context, pooled = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    t = torch.tensor([3.0, 700.0])
    return torch.randn(2, 4, 8, 8, dtype=torch.float64), t, Conditioning(context=context, mask=mask, pooled=pooled)


class OutOfV(nn.Module):
    """The attention of `Attention` where every token sees itself alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.v, self.out = attention.to_v, attention.to_out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.v(x))


class PixelOutOfV(nn.Module):
    """x + W_out (W_v norm(x)), the 1x1 convolutions written as matrices."""

    def __init__(self, attention: PixelAttention) -> None:
        super().__init__()
        self.a = attention

    def forward(self, x: Tensor) -> Tensor:
        a = self.a
        h = F.group_norm(x, a.norm.num_groups, a.norm.weight, a.norm.bias, a.norm.eps)
        v = torch.einsum("oc,bchw->bohw", a.to_v.weight[:, :, 0, 0], h) + a.to_v.bias[:, None, None]
        return x + torch.einsum("oc,bchw->bohw", a.to_out.weight[:, :, 0, 0], v) + a.to_out.bias[:, None, None]


class FusedOutOfV(nn.Module):
    """The last third of a fused projection, then `out`."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, *(p.chunk(3)[2] for p in (self.qkv.weight, self.qkv.bias))))


def self_attentions(layer: nn.Module) -> None:
    for block in layer.blocks:
        block.attn1 = OutOfV(block.attn1)


def weaken_middle(network: UNet) -> None:
    self_attentions(network.middle.attention)


def weaken_down(network: UNet) -> None:
    for level in network.down:
        self_attentions(level.layers[0].attention)


def weaken_first_up(network: UNet) -> None:
    self_attentions(network.up[0].layers[1].attention)


def weaken_dit(network: DiT) -> None:
    for index in (0, 2):
        network.blocks[index].attn = FusedOutOfV(network.blocks[index].attn)


def skip_middle_and_up(network: UNet) -> None:
    network.middle.attention = None
    for level in network.up:
        for layer in level.layers:
            layer.attention = None


def skip_first(network: DiT) -> None:
    network.blocks = network.blocks[1:]


def skip_last_two(network: MMDiT) -> None:
    network.blocks = network.blocks[:1]


CASES = [
    (unet, "mid", "identity", weaken_middle),
    (unet, "down", "identity", weaken_down),
    (unet, "up.0.1", "identity", weaken_first_up),
    (dit, "0, 2", "identity", weaken_dit),
    (unet, "mid,up", "skip", skip_middle_and_up),
    (dit, "0", "skip", skip_first),
    (mmdit, "1,2", "skip", skip_last_two),
]


@pytest.mark.parametrize(("make", "layers", "how", "by_hand"), CASES)
def test_weakened_is_the_network_rebuilt_by_hand(
    make: Callable[[], nn.Module], layers: str, how: str, by_hand: Callable[[Any], None]
) -> None:
    network, inputs = make(), told()
    rebuilt = copy.deepcopy(network)
    by_hand(rebuilt)
    weak, plain = perturbed(network, layers, how)(*inputs), network(*inputs)
    torch.testing.assert_close(weak, rebuilt(*inputs), rtol=1e-12, atol=1e-12)
    assert (weak - plain).abs().max() > 1e-4


def test_pixel_attention_without_a_text() -> None:
    network, (x, t, _) = unet(context_dim=0), told()
    rebuilt = copy.deepcopy(network)
    rebuilt.middle.attention = PixelOutOfV(rebuilt.middle.attention)
    weak = perturbed(network, "mid")(x, t, Conditioning())
    torch.testing.assert_close(weak, rebuilt(x, t, Conditioning()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
def test_joint_attention_by_a_full_mask(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's rows of the joint attention see themselves and the text, by an [L + S, L + S] mask."""
    network, (x, t, cond) = mmdit(), told()
    if not masked:
        cond = Conditioning(context=cond.context, pooled=cond.pooled)
    plain, weak = network(x, t, cond), perturbed(network, "0,1,2")(x, t, cond)
    image = 16  # tokens

    def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = q.shape[2]
        allowed = torch.ones(len(q), 1, tokens, tokens, dtype=torch.bool)
        allowed[:, :, :image, :image] = torch.eye(image, dtype=torch.bool)  # also where there are no others: attn2
        if mask is not None:
            allowed = allowed & mask[:, None, None, :]
        scores = torch.einsum("bhld,bhsd->bhls", q, k) / math.sqrt(q.shape[-1])
        weights = scores.exp() * allowed
        return weights / weights.sum(-1, keepdim=True) @ v

    monkeypatch.setattr("ldm.models.mmdit.attention", by_hand)  # joint
    monkeypatch.setattr("ldm.nn.transformer.attention", by_hand)  # dual
    torch.testing.assert_close(weak, network(x, t, cond), rtol=1e-10, atol=1e-10)
    assert (weak - plain).abs().max() > 1e-4


@pytest.mark.parametrize("make", [unet, dit, mmdit])
@pytest.mark.parametrize("how", ["identity", "skip"])
def test_nothing_of_the_network_changes(make: Callable[[], nn.Module], how: str) -> None:
    network, inputs = make(), told()
    words = "mid,down.0" if make is unet else "1,2"
    before, state = network(*inputs), copy.deepcopy(network.state_dict())
    weak = perturbed(network, words, how)
    attributes = [set(vars(m)) for m in network.modules()]
    first = weak(*inputs)
    assert torch.equal(network(*inputs), before)
    assert torch.equal(weak(*inputs), first) and torch.equal(network(*inputs), before)
    assert [set(vars(m)) for m in network.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_an_error_inside_leaves_nothing_behind() -> None:
    network, inputs = unet(), told()
    before = network(*inputs)
    kept = network.middle.attention.blocks[0].attn1
    own = kept.forward
    kept.__dict__["forward"] = lambda x: own(x)  # something else has put its own there, and gets it back

    def fail(*_: Any) -> None:
        assert sum("forward" in vars(m) for m in network.modules()) > 5  # the weakening is on
        raise RuntimeError("out of memory")

    hook = network.up[1].layers[1].residual.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        perturbed(network, "down,mid,up")(*inputs)
    hook.remove()
    assert [m for m in network.modules() if "forward" in vars(m)] == [kept]
    assert torch.equal(network(*inputs), before)


def test_layers_by_name() -> None:
    network = unet()
    names = ["down.0.0", "down.1.0", "mid", "up.0.0", "up.0.1", "up.1.0", "up.1.1"]
    assert list(layers_of(network)) == names
    assert select(network, "down") == [network.down[0].layers[0].attention, network.down[1].layers[0].attention]
    assert select(network, "up.1.0, mid,mid") == [network.middle.attention, network.up[1].layers[0].attention]
    assert list(layers_of(mmdit())) == ["0", "1", "2"]
    alike = unet(cross_only=(0,))  # its first attentions of full size read the text alone
    assert list(layers_of(alike)) == ["down.1.0", "mid", "up.0.0", "up.0.1"]
    assert list(layers_of(alike, "skip")) == names
    deep = randomised(DiT(DiTConfig(**{**DIT, "depth": 12})))  # type: ignore[arg-type]
    assert select(deep, "1") == [deep.blocks[1]]  # and not 10 and 11


@pytest.mark.parametrize(
    ("make", "layers", "how", "message"),
    [
        (unet, "middle", "identity", "unknown layer 'middle'.*mid"),
        (unet, "down.2", "identity", "unknown layer 'down.2', did you mean 'down.1'"),
        (unet, "down,", "identity", "unknown layer ''"),
        (dit, "3", "skip", "unknown layer '3'.*known: 0, 1, 2"),
        (dit, "1", "identical", "unknown way to weaken a network 'identical', did you mean 'identity'"),
        (lambda: unet(depths=(0, 0), middle_depth=0), "mid", "identity", "this UNet has no layers"),
        (lambda: nn.Linear(1, 1), "mid", "identity", "this Linear has no layers"),
    ],
)
def test_what_is_not_known_is_one_line(make: Callable[[], nn.Module], layers: str, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        perturbed(make(), layers, how)
    assert "\n" not in str(error.value)


def test_a_controlled_network_is_weakened_inside() -> None:
    network, (x, t, cond) = unet(), told()
    config = ControlNetConfig(unet=network.config, hint_widths=(4,))
    controlled = Controlled(network, randomised(ControlNet(config)))  # type: ignore[arg-type]
    hint = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    cond = Conditioning(context=cond.context, control=(hint,))
    rebuilt = copy.deepcopy(controlled)
    weaken_middle(rebuilt.denoiser)  # type: ignore[arg-type]
    torch.testing.assert_close(perturbed(controlled, "mid")(x, t, cond), rebuilt(x, t, cond), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_also_with_the_linear_layers_of_a_cpu() -> None:
    network, (x, t, cond) = unet().float(), told()
    x, t, cond = x.float(), t, cond.map(lambda v: v.float() if v.is_floating_point() else v)
    expected = perturbed(network, "mid,up")(x, t, cond)
    fast = for_cpu(copy.deepcopy(network))
    torch.testing.assert_close(perturbed(fast, "mid,up")(x, t, cond), expected, rtol=1e-4, atol=1e-4)
