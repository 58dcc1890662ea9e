"""Networks that work elsewhere than they rest. There is no second device here but torch's `meta`, which only counts."""

import pytest
import torch

from ldm.models.unet import UNet, UNetConfig
from ldm.nn.offload import at_work, offload, works_on
from ldm.types import Conditioning

CONFIG = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=16, heads=2, norm_groups=4)


def places(module: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]}


def pointers(module: torch.nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in module.state_dict().values()]


def told() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    return torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), Conditioning(context=torch.randn(2, 3, 16))


@pytest.mark.parametrize("inference", [False, True])
def test_a_whole_module_is_brought_for_the_block(inference: bool) -> None:
    module = UNet(CONFIG).eval().requires_grad_(False)
    before = pointers(module)
    offload(module, "meta")
    assert works_on(module) == torch.device("meta") and places(module) == {"cpu"}
    with torch.inference_mode(inference), at_work(module):
        assert places(module) == {"meta"}
    assert places(module) == {"cpu"} and pointers(module) == before
    with pytest.raises(KeyError), at_work(module):
        raise KeyError
    assert pointers(module) == before


@pytest.mark.parametrize("inference", [False, True])
def test_by_layer_only_one_layer_is_there_at_a_time(inference: bool) -> None:
    module = UNet(CONFIG).eval().requires_grad_(False)
    before, there = pointers(module), []
    offload(module, "meta", by_layer=True)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm):
            layer.register_forward_pre_hook(
                lambda *_: there.append(sum(w.device.type == "meta" for w in module.parameters()))
            )
    with torch.inference_mode(inference):
        out = module(*told())
    assert out.device.type == "meta" and out.shape == (2, 4, 8, 8)
    assert places(module) == {"cpu"} and pointers(module) == before
    assert max(there) <= 2  # a weight and its bias


def test_what_is_not_offloaded_stays_and_gives_the_same() -> None:
    module = UNet(CONFIG).eval().requires_grad_(False)
    args = told()
    plain = module(*args)
    with at_work(module):
        assert torch.equal(module(*args), plain)
    for by_layer in (False, True):
        offload(module, "cpu", by_layer=by_layer)
        with at_work(module):
            assert torch.equal(module(*args), plain)
    with pytest.raises(ValueError, match="must be on the CPU first"):
        offload(module.to("meta"), "cpu")


def test_blocks_that_lie_in_one_another_or_overlap() -> None:
    """As of two generators, of which the first to begin ends first: it is there until both have ended."""
    module = UNet(CONFIG).eval().requires_grad_(False)
    before = pointers(module)
    offload(module, "meta")
    first, second = at_work(module), at_work(module)
    first.__enter__()
    there = list(module.parameters())
    second.__enter__()
    assert all(a is b for a, b in zip(there, module.parameters(), strict=True))
    first.__exit__(None, None, None)
    assert places(module) == {"meta"}
    second.__exit__(None, None, None)
    assert places(module) == {"cpu"} and pointers(module) == before
    with at_work(module), at_work(module):
        assert places(module) == {"meta"}
    assert pointers(module) == before
