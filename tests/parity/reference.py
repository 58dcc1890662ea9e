"""What the parity tests share: references with random weights, and how far ours is from them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ldm.checkpoints.layouts.table import Entry, to_foreign, to_native

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, so that none that starts at zero or one hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module.eval().requires_grad_(False)


def converted(ours: nn.Module, reference: nn.Module, table: Callable[[Iterable[str]], list[Entry]]) -> nn.Module:
    """Ours with the reference's weights through the table, after a round trip that must give them back bit by bit."""
    theirs = {k: v for k, v in reference.state_dict().items() if not k.endswith("position_ids")}
    entries = table(ours.state_dict())
    native = to_native(entries, theirs, "reference")
    back = to_foreign(entries, native)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], theirs[k]) for k in theirs)
    missing, unexpected = ours.load_state_dict(native, strict=False)
    assert not unexpected and set(missing) <= {"latent_mean", "latent_std"}
    return ours.to(next(reference.parameters()).dtype).eval()


def error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest value."""
    assert ours.shape == reference.shape and reference.std() > 0
    return float((ours - reference).abs().max() / reference.abs().max())
