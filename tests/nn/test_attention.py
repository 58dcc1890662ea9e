"""One function, three back-ends, one answer."""

import pytest
import torch

from ldm.nn import attention as module
from ldm.nn.attention import attention, set_backend


@pytest.fixture(autouse=True)
def default_again() -> object:
    yield
    set_backend("sdpa")


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_formula(backend: str, masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 4, 4))
    keep = torch.tensor([[True, False, True, True], [True, True, True, False]]) if masked else None
    scores = torch.einsum("bhld,bhsd->bhls", q, k) / 8**0.5
    weights = scores.exp() * (1.0 if keep is None else keep[:, None, None, :])
    expected = torch.einsum("bhls,bhsd->bhld", weights / weights.sum(-1, keepdim=True), v)
    set_backend(backend)
    torch.testing.assert_close(attention(q, k, v, keep), expected)


def test_xformers_is_probed_by_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("No operator found for memory_efficient_attention_forward")

    monkeypatch.setattr(module, "_xformers", broken)
    with pytest.raises(ValueError, match=r"'xformers' does not work on cpu here \(No operator found"):
        set_backend("xformers")
    assert module._backend == "sdpa"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed: sdpa, xformers, math"):
        set_backend("flash")
