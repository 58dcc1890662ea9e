"""The diffusion transformers against published sizes, the paper's start and their own promises."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.nn.embeddings import timestep_embedding
from ldm.nn.positions import grid, sincos_2d
from ldm.nn.transformer import RMSNorm, check_size, unpatchify
from ldm.types import Conditioning

DIT = DiTConfig(in_channels=4, out_channels=4, width=24, depth=2, heads=2, classes=5, context_dim=7, pooled_dim=3)
MMDIT = MMDiTConfig(4, 4, width=24, depth=3, heads=2, context_dim=7, pooled_dim=3, base_size=4, max_size=12)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter drawn anew: what starts at zero would hide everything else."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def told(batch: int = 2, length: int = 6) -> Conditioning:
    torch.manual_seed(1)
    return Conditioning(
        context=torch.randn(batch, length, 7), pooled=torch.randn(batch, 3), label=torch.arange(batch) % 6
    )


def latent(batch: int = 2, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(batch, 4, height, width), torch.tensor([17.0, 991.5] * batch)[:batch]


MODELS = [
    (DiT, DIT),
    (DiT, replace(DIT, base_size=4)),
    (MMDiT, MMDIT),
    (MMDiT, replace(MMDIT, qk_norm=True, dual=(1,))),
]


@pytest.mark.parametrize(
    ("model", "config", "parameters"),
    [
        (DiT, DiTConfig(), 675_129_632 - 256 * 1152),  # the authors count the 256 fixed positions as well
        (DiT, DiTConfig(patch=4, width=384, depth=12, heads=6), 32_920_448),  # S/4: the paper says 33 M
        (MMDiT, MMDiTConfig(), 2_028_328_000),
        (MMDiT, MMDiTConfig(depth=38, width=2432, heads=38, qk_norm=True), 8_056_627_520),  # 3.5 large: "8.1 B"
        (MMDiT, MMDiTConfig(qk_norm=True, dual=tuple(range(13)), max_size=384), 2_243_171_520),  # 3.5 medium: "2.2 B"
    ],
)
def test_sizes_are_the_published_ones(model: type, config: object, parameters: int) -> None:
    with torch.device("meta"):
        module = model(config)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == parameters


@torch.no_grad()
@pytest.mark.parametrize(("model", "config"), MODELS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (2, 2), (10, 6)])
def test_shapes(model: type, config: DiTConfig, height: int, width: int) -> None:
    x, t = latent(2, height, width)
    network = randomised(model(config))
    assert network.factor == 2
    out = network(x, t, told())
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("model", "config"), MODELS)
def test_starts_as_zero_and_its_blocks_as_nothing(model: type, config: DiTConfig) -> None:
    torch.manual_seed(0)
    network = model(config).eval()
    x, t = latent()
    assert not network(x, t, told()).any()
    torch.nn.init.eye_(network.out.weight)
    deep = network(x, t, told())
    network.blocks = network.blocks[:0]
    assert deep.any() and torch.equal(deep, network(x, t, told()))
    weight = network.patches.weight.flatten(1)
    bound = math.sqrt(6 / sum(weight.shape))  # Glorot, of the projection as the linear layer that it is
    assert 0.8 * bound < weight.abs().max() <= bound
    assert 0.015 < network.time[2].weight.std() < 0.025


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_every_parameter_is_used(model: type, config: DiTConfig) -> None:
    network = randomised(model(config))
    network(*latent(), told()).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    idle = [name for name, p in network.named_parameters() if not p.grad.any()]
    # In the last block nobody asks on behalf of the text; the published files have this weight all the same.
    assert idle == (["blocks.2.text.attn.norm_q.weight"] if getattr(config, "qk_norm", False) else [])


@torch.no_grad()
@pytest.mark.parametrize(("model", "config"), MODELS)
def test_each_image_of_a_batch_is_by_itself(model: type, config: DiTConfig) -> None:
    network, (x, t), cond = randomised(model(config)), latent(), told()
    together = network(x, t, cond)
    for i in range(2):
        torch.testing.assert_close(network(x[i : i + 1], t[i : i + 1], cond[i : i + 1]), together[i : i + 1])


@torch.no_grad()
@pytest.mark.parametrize(("model", "config"), MODELS)
@pytest.mark.parametrize("name", ["context", "pooled", "label", "t"])
def test_all_that_it_is_told_matters(model: type, config: DiTConfig, name: str) -> None:
    network, (x, t), cond = randomised(model(config)), latent(), told()
    if name == "t":
        other = network(x, t + 100, cond)
    elif name == "label":
        other = network(x, t, replace(cond, label=cond.label + 1))
    else:
        other = network(x, t, replace(cond, **{name: getattr(cond, name) + 1}))
    same = torch.equal(other, network(x, t, cond))
    assert same == (name == "label" and model is MMDiT)


@torch.no_grad()
@pytest.mark.parametrize(("model", "config"), MODELS)
def test_masked_tokens_do_not_count(model: type, config: DiTConfig) -> None:
    network, (x, t), cond = randomised(model(config)), latent(), told()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    masked = network(x, t, replace(cond, mask=mask))
    torch.testing.assert_close(masked, network(x, t, replace(cond, context=cond.context[:, :4])))
    assert not torch.allclose(masked, network(x, t, cond))


@torch.no_grad()
def test_a_class_alone_and_its_absence() -> None:
    network, (x, t) = randomised(DiT(replace(DIT, context_dim=0, pooled_dim=0))), latent()
    one, none = (network(x, t, Conditioning(label=torch.full((2,), i))) for i in (1, 5))
    assert not torch.allclose(one, none)
    with pytest.raises(IndexError):
        network(x, t, Conditioning(label=torch.full((2,), 6)))


@torch.no_grad()
def test_a_text_alone_and_nothing_at_all() -> None:
    x, t = latent()
    cond = told()
    network = randomised(DiT(replace(DIT, classes=0, pooled_dim=0)))
    assert network(x, t, Conditioning(context=cond.context)).shape == x.shape
    network = randomised(DiT(replace(DIT, classes=0, pooled_dim=0, context_dim=0)))
    assert network(x, t, Conditioning()).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize(("model", "config"), [(DiT, DIT), (MMDiT, MMDIT)])
def test_concat_joins_by_channel(model: type, config: DiTConfig) -> None:
    network, (x, t), cond = randomised(model(replace(config, in_channels=6))), latent(), told()
    extra = torch.randn(2, 2, 8, 8)
    expected = network(torch.cat([x, extra], dim=1), t, cond)
    assert torch.equal(network(x, t, replace(cond, concat=extra)), expected)


@pytest.mark.parametrize(
    ("model", "config", "size", "changes", "message"),
    [
        (DiT, DIT, (7, 8), {}, "dit: height and width of x must be multiples of 2, not 7 x 8"),
        (DiT, DIT, (8, 8), {"label": None}, "dit: the conditioning has no label"),
        (DiT, DIT, (8, 8), {"context": None}, "dit: the conditioning has no context"),
        (DiT, DIT, (8, 8), {"pooled": None}, "dit: the conditioning has no pooled"),
        (DiT, DIT, (8, 8), {"control": (torch.zeros(1),)}, "dit: control maps"),
        (MMDiT, MMDIT, (8, 9), {}, "mmdit: height and width of x must be multiples of 2, not 8 x 9"),
        (MMDiT, MMDIT, (8, 26), {}, "mmdit: x of 4 x 13 patches is larger than the 12 x 12 that have a position"),
        (MMDiT, MMDIT, (8, 8), {"context": None}, "mmdit: the conditioning has no context"),
        (MMDiT, MMDIT, (8, 8), {"pooled": None}, "mmdit: the conditioning has no pooled"),
        (MMDiT, MMDIT, (8, 8), {"control": (torch.zeros(1),)}, "mmdit: control maps"),
    ],
)
def test_bad_input(model: type, config: object, size: tuple[int, int], changes: dict, message: str) -> None:
    x, t = latent(2, *size)
    with pytest.raises(ValueError, match=message) as error:
        model(config)(x, t, replace(told(), **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTConfig(width=100, heads=3), "dit: width 100 must be a multiple of 4 and of its 3 heads"),
        (lambda: MMDiTConfig(width=30, heads=2), "mmdit: width 30 must be a multiple of 4"),
        (lambda: MMDiTConfig(dual=(24,)), r"dual \(24,\) must name blocks in 0..23"),
        (lambda: sincos_2d(grid(2), grid(2), 6), "multiple of 4 channels, not 6"),
    ],
)
def test_bad_configs(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_positions_by_their_formula() -> None:
    rows, columns, width = 3, 5, 12
    found = sincos_2d(grid(rows), grid(columns), width).view(rows, columns, width)
    for row in range(rows):
        for column in range(columns):
            axes = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / 3) for i in range(3)]
                axes += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert torch.equal(found[row, column], torch.tensor(axes, dtype=torch.float64).float())
    torch.testing.assert_close(grid(8, 4), torch.arange(8) / 2)
    assert torch.equal(grid(16, 16), grid(16))


def test_time_features_by_their_formula() -> None:
    t = torch.tensor([0.0, 1.5, 999.0], dtype=torch.float64)
    for shift in (0, 1):
        rates = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / (128 - shift))
        expected = torch.cat([(t[:, None] * rates).cos(), (t[:, None] * rates).sin()], dim=1)
        torch.testing.assert_close(timestep_embedding(t, 256, shift), expected.float(), atol=1e-4, rtol=0)


def test_patches_go_back_where_they_came_from() -> None:
    x = torch.randn(2, 3, 6, 8)
    rows, columns = check_size("x", x, 2)
    tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # [B, L, C 2 2], channels first in a patch
    tokens = tokens.unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(tokens, rows, columns, 2), x)


def test_rms_norm_against_torch() -> None:
    norm, x = RMSNorm(8), torch.randn(2, 3, 8)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, eps=1e-6))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
