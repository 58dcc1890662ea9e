"""LoRAs computed with, against the singular values and against the sums they stand for."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter, Factors, base_of, delta, product
from ldm.adapters.algebra import combine, extract, resize
from ldm.adapters.fused import sites
from ldm.adapters.lora import attach, merge
from tests.checkpoints.families import make

NETWORKS = {"denoiser": ("unet", None)}


def lora(seed: int, rank: int, out: int = 12, inputs: tuple[int, ...] = (5, 3, 3), alpha: float = 3.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(inputs) - 1)
    return {
        "down": torch.randn(rank, *inputs, generator=generator),
        "up": torch.randn(out, rank, *ones, generator=generator),
        "alpha": torch.tensor(alpha),
    }


def one(factors: Factors) -> Adapter:
    return Adapter({"denoiser": {"layer": factors}}, NETWORKS)


def values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("inputs", [(20,), (5, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_resize_leaves_out_the_tail_of_the_singular_values(inputs: tuple[int, ...], rank: int) -> None:
    """Eckart and Young: the Frobenius error is the root of the sum of the squares left out, the spectral the first."""
    factors = lora(0, 8, inputs=inputs)
    small = resize(one(factors), rank).parts["denoiser"]["layer"]
    assert small["down"].shape == (rank, *inputs) and small["up"].shape[1] == rank == int(small["alpha"])
    full = product(factors).double()
    error, s = full - product(small).double(), values(full)
    assert torch.isclose(error.norm(), s[rank:].square().sum().sqrt(), rtol=1e-5)
    assert torch.isclose(values(error)[0], s[rank], rtol=1e-5)


def test_resize_keeps_smaller_ranks() -> None:
    factors = lora(1, 4)
    assert resize(one(factors), 4).parts["denoiser"]["layer"] is factors


def test_combined_is_the_weighted_sum() -> None:
    a, b, c = lora(0, 3), lora(1, 5, alpha=2.0), lora(2, 2)
    made = combine([(one(a), 0.7), (one(b), -0.5), (one(c), 1.0)]).parts["denoiser"]["layer"]
    assert made["down"].shape[0] == 10
    expected = 0.7 * product(a) - 0.5 * product(b) + product(c)
    assert torch.allclose(product(made), expected, atol=1e-5)
    cut = combine([(one(a), 0.7), (one(b), -0.5), (one(c), 1.0)], rank=4).parts["denoiser"]["layer"]
    error = (expected - product(cut)).double().norm()
    assert torch.isclose(error, values(expected)[4:].square().sum().sqrt(), rtol=1e-4)


def test_layers_of_only_one_adapter_keep_its_change() -> None:
    a, b = one(lora(0, 3)), Adapter({"denoiser": {"other": lora(1, 2)}}, NETWORKS)
    made = combine([(a, 0.5), (b, 2.0)]).parts["denoiser"]
    assert torch.allclose(product(made["layer"]), 0.5 * product(lora(0, 3)), atol=1e-6)
    assert torch.allclose(product(made["other"]), 2 * product(lora(1, 2)), atol=1e-6)


@pytest.fixture(scope="module")
def models() -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """A base, and one with a random change of rank 3 in a few layers of each sort, and another norm."""
    base = {name: make("sd1").components[name] for name in ("denoiser", "text")}
    tuned: dict[str, Any] = copy.deepcopy(base)
    for component, ends in (("denoiser", ("attn2.to_k", "conv1", "proj_in")), ("text", ("in_proj.v", "c_fc"))):
        for i, (name, weight) in enumerate(sites(tuned[component]).items()):
            if name.endswith(ends):
                weight += delta(lora(i, 3, weight.shape[0], tuple(weight.shape[1:])), weight)
    tuned["denoiser"].norm_out.weight.data += 1
    return base, tuned


def test_extract_finds_what_was_put_in(models: Any, caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = models
    with caplog.at_level(logging.WARNING):
        adapter = extract(tuned, base, 3)
    assert "denoiser: 1 biases, norms and embeddings differ" in caplog.text and "text:" not in caplog.text
    assert base_of(adapter) == "a model with text of width 16"
    made = copy.deepcopy(base)
    attach(made, adapter)
    for component in made:
        theirs = sites(tuned[component])
        for name, weight in sites(made[component]).items():
            assert torch.allclose(weight, theirs[name], atol=1e-4), name
            changed = name in adapter.parts[component]
            assert changed == (not torch.equal(theirs[name], sites(base[component])[name])), name


def test_extract_is_the_nearest_of_its_rank(models: Any) -> None:
    base, tuned = models
    adapter = extract(tuned, base, 2)
    for name, factors in adapter.parts["denoiser"].items():
        change = (sites(tuned["denoiser"])[name] - sites(base["denoiser"])[name]).flatten(1)
        error = (change - product(factors)).double().norm()
        assert torch.isclose(error, values(change)[2:].square().sum().sqrt(), rtol=1e-3), name


def test_what_was_merged_is_extracted(models: Any) -> None:
    base, tuned = models
    adapter = extract(tuned, base, 3)
    merged = copy.deepcopy(base)
    merge(merged, adapter, 0.5)
    again = extract(merged, base, 3)
    for name, factors in adapter.parts["text"].items():
        assert torch.allclose(product(again.parts["text"][name]), 0.5 * product(factors), atol=1e-4)


def test_what_cannot_be_computed_is_refused(models: Any) -> None:
    base, tuned = models
    dora = one(lora(0, 3) | {"magnitude": torch.ones(12)})
    for call, said in (
        (lambda: resize(dora, 2), "only a LoRA has factors to compute with, and this is a dora"),
        (lambda: combine([(dora, 1.0)]), "only a LoRA"),
        (lambda: combine([]), "no adapters"),
        (lambda: resize(one(lora(0, 3)), 0), "rank must be 1 or more, not 0"),
        (lambda: extract(base, base, 3), "nothing to extract: the denoiser and the text of both models are equal"),
        (lambda: extract(tuned, make("sdxl").components, 3), "other layers than the base"),
        (lambda: combine([(one(lora(0, 3)), 1.0), (one(lora(0, 3, inputs=(20,))), 1.0)]), "denoiser.layer is (12, 45)"),
        (lambda: combine([(text(768), 1.0), (text(2048), 1.0)]), "Stable Diffusion 1 (text of width 768) and Stable"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()


def text(width: int) -> Adapter:
    return Adapter({"denoiser": {"attn2.to_k": lora(0, 2, inputs=(width,))}}, NETWORKS)
