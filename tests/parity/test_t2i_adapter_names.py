"""T2I-adapters under the names of TencentARC's files; those of diffusers are held to in tests/parity."""

import pytest
import torch

from ldm.checkpoints.layouts import t2i_adapter
from ldm.checkpoints.layouts.table import to_foreign, to_native
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.types import Conditioning
from tests.parity.reference import randomised


def test_the_row_of_blocks_and_back():
    config = T2IAdapterConfig((8, 16, 24, 24), 2, 1, 8)
    state = randomised(T2IAdapter(config)).state_dict()
    table = t2i_adapter.original(config, state)
    theirs = to_foreign(table, state)
    assert {name for name in theirs if "in_conv" in name} == {
        f"body.{i}.in_conv.{w}" for i in (2, 4) for w in ("weight", "bias")
    }
    assert torch.equal(theirs["body.5.block1.weight"], state["levels.2.blocks.1.conv1.weight"])
    assert len({name.split(".")[1] for name in theirs if name.startswith("body")}) == 8
    assert t2i_adapter.infer({name: tuple(tensor.shape) for name, tensor in theirs.items()}) == config
    back = to_native(table, theirs, "here")
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_adapters_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="a T2I-adapter of another kind"):
        t2i_adapter.infer({"body.0.block1.weight": (8, 8, 3, 3), "conv_in.weight": (8, 64, 3, 3)})
    words = t2i_adapter.to_diffusers(T2IAdapterConfig()) | {"adapter_type": "light_adapter"}
    with pytest.raises(ValueError, match="adapter_type 'light_adapter' is not supported"):
        t2i_adapter.from_diffusers(words, "here")


def test_a_hint_must_fit():
    network, x = T2IAdapter(T2IAdapterConfig((8, 16), 1, 3, 4)), torch.zeros(1, 4, 4, 6)
    assert [tuple(m.shape) for m in network(x, torch.zeros(1), Conditioning(control=(torch.rand(1, 3, 16, 24),)))] == [
        (1, 8, 4, 6),
        (1, 16, 2, 3),
    ]
    with pytest.raises(ValueError, match="the hint must be 24x16 px, got 16x24"):
        network(x, torch.zeros(1), Conditioning(control=(torch.rand(1, 3, 24, 16),)))
    with pytest.raises(ValueError, match="told one hint picture, got 0"):
        network(x, torch.zeros(1), Conditioning())
