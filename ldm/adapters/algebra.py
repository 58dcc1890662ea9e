"""Low-rank adapters computed with: taken from two models, cut to a smaller rank, added up.

A convolution's weight is the matrix [O, I k k]. Of all matrices of rank r, the truncated singular value decomposition
is the nearest; the squared error is the sum of the squared singular values that it leaves out (Eckart and Young 1936).
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.adapters import bundled
from ldm.adapters.adapter import COMPONENTS, Adapter, Factors, base_of, kind_of, scale_of, shape_of
from ldm.adapters.fused import sites
from ldm.checkpoints.model import config_of
from ldm.checkpoints.model import kind_of as kind_of_module

log = logging.getLogger(__name__)


@torch.no_grad()
def extract(tuned: Mapping[str, nn.Module], base: Mapping[str, nn.Module], rank: int) -> Adapter:
    """The nearest LoRA of at most `rank` to what `tuned` has over `base`, for every layer whose weight differs.

    What no LoRA can hold (biases, norms, embeddings) is left out, and the log says how many tensors that are.
    Raises ValueError if the two are of other shapes or do not differ.
    """
    _check_rank(rank)
    parts: dict[str, dict[str, Factors]] = {}
    shared = [name for name in COMPONENTS if name in tuned and name in base]
    for component in shared:
        mine, theirs = sites(tuned[component]), sites(base[component])
        if {n: w.shape for n, w in mine.items()} != {n: w.shape for n, w in theirs.items()}:
            raise ValueError(f"the {component} of the tuned model has other layers than the base's")
        changed = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        if changed:
            parts[component] = {name: _nearest(mine[name].float() - theirs[name].float(), rank) for name in changed}
        _tell(component, _others(tuned[component], base[component]))
    if not parts:
        raise ValueError(f"nothing to extract: the {' and the '.join(shared) or 'parts'} of both models are equal")
    networks = {name: (kind_of_module(base[name]), config_of(base[name])) for name in parts}
    return Adapter(parts, networks)


def _nearest(change: Tensor, rank: int) -> Factors:
    """The factors of the truncated decomposition of a weight's change [O, I] or [O, I, k, k]."""
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return _factors(u.cpu(), s.cpu(), vh.cpu(), rank, change.shape[1:])


def _factors(u: Tensor, s: Tensor, vh: Tensor, rank: int, inputs: Sequence[int]) -> Factors:
    """u [O, n], s [n] falling, vh [n, I k k], of which the first `rank` are kept; inputs: (I,) or (I, k, k)."""
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    ones = (1,) * (len(inputs) - 1)
    return {
        "up": up.float().reshape(*up.shape, *ones).contiguous(),
        "down": down.float().reshape(-1, *inputs).contiguous(),
        "alpha": torch.tensor(float(len(root))),
    }


def _others(tuned: nn.Module, base: nn.Module) -> int:
    """How many tensors differ that are no weights of layers."""
    mine, theirs = tuned.state_dict(), base.state_dict()
    layers = {w.untyped_storage().data_ptr() for w in sites(tuned).values()}
    return sum(
        tensor.untyped_storage().data_ptr() not in layers and not torch.equal(tensor, theirs[name])
        for name, tensor in mine.items()
        if name in theirs and tensor.shape == theirs[name].shape
    )


def _tell(component: str, others: int) -> None:
    if others:
        log.warning("%s: %d biases, norms and embeddings differ too, which a LoRA cannot hold", component, others)


def resize(adapter: Adapter, rank: int) -> Adapter:
    """The nearest LoRA of at most `rank`; layers of that rank or less, and words, stay as they are.

    up down = Q1 (R1 R2^T) Q2^T, so that only an r x r matrix is decomposed. Raises ValueError for other kinds than
    lora: a DoRA's magnitudes belong to its factors, and LoHa and LoKr have no such factors.
    """
    _check_rank(rank)
    _check_kind(adapter)
    parts = {
        component: {name: _cut(f, rank) if f["down"].shape[0] > rank else f for name, f in part.items()}
        for component, part in adapter.parts.items()
    }
    return Adapter(parts, adapter.networks, adapter.metadata, adapter.words)


def _cut(factors: Factors, rank: int) -> Factors:
    up, down = (factors[name].flatten(1).double() for name in ("up", "down"))
    q1, r1 = torch.linalg.qr(up)  # [O, n], [n, r]
    q2, r2 = torch.linalg.qr(down.T)  # [I k k, m], [m, r]
    u, s, vh = torch.linalg.svd(scale_of(factors) * r1 @ r2.T, full_matrices=False)
    return _factors(q1 @ u, s, vh @ q2.T, rank, factors["down"].shape[1:])


def combine(adapters: Sequence[tuple[Adapter, float]], rank: int | None = None) -> Adapter:
    """The sum of weighted LoRAs, exact, of the sum of their ranks; then the nearest of at most `rank`, if given.

    It brings the words of all, whatever their weights. Raises ValueError if there is none, one is no LoRA, they are
    for different bases, or bring one word with different vectors.
    """
    if not adapters:
        raise ValueError("there are no adapters to combine")
    for adapter, _ in adapters:
        _check_kind(adapter)
    bases = sorted({base for adapter, _ in adapters if (base := base_of(adapter))})
    if len(bases) > 1:
        raise ValueError(f"adapters for different bases cannot be combined: {' and '.join(bases)}")
    words = bundled.united(adapter.words for adapter, _ in adapters)
    parts: dict[str, dict[str, Factors]] = {}
    for adapter, weight in adapters:
        for component, part in adapter.parts.items():
            mine = parts.setdefault(component, {})
            for name, factors in part.items():
                scaled = {**factors, "up": factors["up"] * (weight * scale_of(factors))}
                mine[name] = _sum(f"{component}.{name}", mine[name], scaled) if name in mine else _plain(scaled)
    networks = {name: network for adapter, _ in reversed(adapters) for name, network in adapter.networks.items()}
    combined = Adapter(parts, networks, words=words)
    return combined if rank is None else resize(combined, rank)


def _plain(factors: Factors) -> Factors:
    return factors | {"alpha": torch.tensor(float(factors["down"].shape[0]))}


def _sum(name: str, first: Factors, second: Factors) -> Factors:
    if shape_of(first) != shape_of(second) or first["down"].ndim != second["down"].ndim:
        raise ValueError(f"the adapters are for different models: {name} is {shape_of(first)} and {shape_of(second)}")
    up, down = torch.cat([first["up"], second["up"]], dim=1), torch.cat([first["down"], second["down"]])
    return _plain({"up": up, "down": down})


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}")


def _check_kind(adapter: Adapter) -> None:
    kinds = {kind_of(f) for part in adapter.parts.values() for f in part.values()} - {"lora"}
    if kinds:
        raise ValueError(f"only a LoRA has factors to compute with, and this is a {', '.join(sorted(kinds))}")
