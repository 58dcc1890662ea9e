"""Adapters as data: factors of changes to weights, by component and native module name, and what they make."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.fused import sites

KINDS = ("lora", "dora", "loha", "lokr")
COMPONENTS = ("denoiser", "text")

Factors = dict[str, Tensor]
"""The change of one weight [O, I] or [O, I, k, k], under the field's names; alpha is a number, float32.

lora: down [r, I, ...], up [O, r, ...], alpha          Hu et al. 2021
dora: those and magnitude [O]                          Liu et al. 2024
loha: hada_w{1,2}_a [O, r], hada_w{1,2}_b [r, I k k], alpha             Hyeon-Woo et al. 2022 (FedPara)
lokr: lokr_w1 [a, c] or lokr_w1_{a,b}, lokr_w2 [b, d, ...] or lokr_w2_{a,b}, alpha; O = a b, I = c d    Yeh et al. 2024
"""

Words = Mapping[str, tuple[Tensor, ...]]
"""Learned words: for each text encoder, of which SDXL has two, the vectors [n, width] that stand for the word."""


@dataclass(frozen=True)
class Adapter:
    """A change to a model.

    parts: component -> native module name -> factors, on the CPU. A part of a fused projection has the name of the
    whole and .q, .k or .v. networks: component -> (kind, config) of the network that the names are of. metadata:
    what its file says of it. words: those that its file brings along, which are taught beside the change of weights.
    """

    parts: Mapping[str, Mapping[str, Factors]]
    networks: Mapping[str, tuple[str, Any]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    words: Words = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """lora | dora | loha | lokr; where it mixes them, joined by " + "."""
        return " + ".join(sorted({kind_of(f) for part in self.parts.values() for f in part.values()}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank in it, rising; 0 stands for factors that are whole matrices."""
        return tuple(sorted({rank_of(f) for part in self.parts.values() for f in part.values()}))


def kind_of(factors: Factors) -> str:
    """lora | dora | loha | lokr."""
    if "down" in factors:
        return "dora" if "magnitude" in factors else "lora"
    return "loha" if "hada_w1_a" in factors else "lokr"


def rank_of(factors: Factors) -> int:
    """The rank r of its factors; 0 for a LoKr whose two factors are whole."""
    names = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((factors[name].shape[0] for name in names if name in factors), 0)


def scale_of(factors: Factors) -> float:
    """alpha / r; 1 for a LoKr whose two factors are whole."""
    rank = rank_of(factors)
    return float(factors["alpha"]) / rank if rank else 1.0


def shape_of(factors: Factors) -> tuple[int, int]:
    """(O, I k k) of the weight that it changes."""
    kind = kind_of(factors)
    if kind in ("lora", "dora"):
        return factors["up"].shape[0], factors["down"][0].numel()
    if kind == "loha":
        return factors["hada_w1_a"].shape[0], factors["hada_w1_b"].shape[1]
    (a, c), (b, d) = ((kron_shape(factors, name)) for name in ("lokr_w1", "lokr_w2"))
    return a * b, c * d


def kron_shape(factors: Factors, name: str) -> tuple[int, int]:
    """Rows and columns of lokr_w1 or lokr_w2 as a matrix."""
    if name in factors:
        return factors[name].shape[0], factors[name][0].numel()
    return factors[f"{name}_a"].shape[0], factors[f"{name}_b"].shape[1]


def product(factors: Factors) -> Tensor:
    """What the factors multiply to, scaled: [O, I k k], before DoRA's magnitude."""
    if "down" in factors:
        return scale_of(factors) * (factors["up"].flatten(1) @ factors["down"].flatten(1))
    if "hada_w1_a" in factors:
        first, second = (factors[f"hada_w{i}_a"] @ factors[f"hada_w{i}_b"] for i in (1, 2))
        return scale_of(factors) * first * second
    return scale_of(factors) * torch.kron(kron_factor(factors, "lokr_w1"), kron_factor(factors, "lokr_w2"))


def kron_factor(factors: Factors, name: str) -> Tensor:
    """lokr_w1 or lokr_w2 as a matrix."""
    if name in factors:
        return factors[name].flatten(1)
    return factors[f"{name}_a"] @ factors[f"{name}_b"]


CORES = {
    "mid": ("up", "down"),
    "hada_t1": ("hada_w1_a", "hada_w1_b"),
    "hada_t2": ("hada_w2_a", "hada_w2_b"),
    "lokr_t2": ("lokr_w2_a", "lokr_w2_b"),
}
"""Tucker's core [r, r, k, k] of a convolution's change, and the factors on its two sides."""


def without_core(factors: Factors) -> Factors:
    """The same product of as many ranks, in the plain form: Tucker's core goes into the factor on its inner side.

    W[o, i, x, y] = sum_rs outer[o, r] core[r, s, x, y] inner[s, i] (Tucker 1966; Yeh et al. 2024, sec. 3) is outer
    times a matrix [r, I k k]. outer is [O, r, 1, 1] of a lora, and stored as [r, O] of the others; inner is [r, I] or
    [r, I, 1, 1]. Raises ValueError for a core that does not fit between its factors.
    """
    made = dict(factors)
    for core, (outer, inner) in CORES.items():
        if core not in made or outer not in made or inner not in made:
            continue
        left, middle, right = made[outer].flatten(1), made.pop(core), made[inner].flatten(1)
        left = left if core == "mid" else left.T.contiguous()
        if middle.ndim != 4 or not left.shape[1] == middle.shape[0] == middle.shape[1] == right.shape[0]:
            shapes = f"{list(left.shape)}, {list(middle.shape)} and {list(right.shape)}"
            raise ValueError(f"a core of Tucker's is [r, r, k, k] between [O, r] and [r, I]; these are {shapes}")
        kernel = torch.einsum("rsxy,si->rixy", middle, right)
        made |= {inner: kernel} if core == "mid" else {outer: left, inner: kernel.flatten(1)}
    return made


def folded(factors: Factors) -> Factors:
    """The same change with the scale in the factors: alpha is the rank, or 1 where there is none."""
    first = next(name for name in ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if name in factors)
    alpha = torch.tensor(float(rank_of(factors) or 1))
    return factors | {first: factors[first] * scale_of(factors), "alpha": alpha}


def delta(factors: Factors, weight: Tensor) -> Tensor:
    """What the adapter adds to `weight` [O, I] or [O, I, k, k], in its shape, in float32 or wider.

    DoRA's new weight is magnitude * V / |V| with V = weight + product and the norm over all but O (eq. 5).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    factors = {name: t.to(weight.device, dtype) for name, t in factors.items()}
    change = product(factors).reshape(weight.shape)
    if "magnitude" not in factors:
        return change
    weight = weight.to(dtype)
    direction = weight + change
    scale = factors["magnitude"].flatten() / direction.flatten(1).norm(dim=1)
    return direction * scale.view(-1, *(1,) * (weight.ndim - 1)) - weight


BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""By the width of the text that the U-Net reads."""


def base_of(adapter: Adapter) -> str:
    """The family of models it was made for, told by the width of the text, or "" where nothing in it says."""
    for name, factors in adapter.parts.get("denoiser", {}).items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            return _family(shape_of(factors)[1])
    widths = {
        name.partition(".")[0]: shape_of(factors)[1]  # of a text encoder, or of the first and the second
        for name, factors in adapter.parts.get("text", {}).items()
        if ".in_proj." in name
    }
    whole = widths and widths.keys() not in ({"first"}, {"second"})
    return _family(sum(widths.values())) if whole else ""


def _family(width: int) -> str:
    name = BASES.get(width)
    return f"{name} (text of width {width})" if name else f"a model with text of width {width}"


def check_fit(adapter: Adapter, components: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, saying for which base it was made, unless every change has its weight in `components`."""
    absent = [name for name in adapter.parts if name not in components]
    if absent:
        raise ValueError(f"the adapter changes the {absent[0]}, and this model has only {', '.join(components)}")
    made_for, width = base_of(adapter), getattr(getattr(components.get("denoiser"), "config", None), "context_dim", 0)
    if made_for and width and made_for != _family(width):
        raise ValueError(f"the adapter was made for {made_for}; this model is {_family(width)}")
    for component, part in adapter.parts.items():
        weights = sites(components[component])
        unknown = [name for name in part if name not in weights]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"the adapter was made for another model: this {component} has no {unknown[0]}{more}")
        for name, factors in part.items():
            rows, columns = shape_of(factors)
            weight = weights[name]
            if (rows, columns) != (weight.shape[0], weight[0].numel()):
                raise ValueError(
                    f"the adapter was made for another model: {component}.{name} is"
                    f" {tuple(weight.shape)} here and {rows} x {columns} there"
                )
