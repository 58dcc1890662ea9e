"""Low-rank adapters on a finished model: trained by peft's layers, used by changing the weights themselves.

In training, peft's layers stand around frozen ones: `inject`, and `adapter_of` for what was learned. To generate,
the change is added to the weights, so that no step costs more and every kind of adapter means the same:
`attach`, `set_weights` and `detach` keep the weights that were there, `merge` does not. A weight of w makes W into
W + w (W' - W), where W' is what the adapter was trained to be, DoRA's too.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.adapter import COMPONENTS, KINDS, Adapter, Factors, check_fit, delta, kind_of, scale_of
from ldm.adapters.fused import fuse, sites, unfuse
from ldm.checkpoints import model
from ldm.names import known

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out"),  # U-Net
    *("qkv.q", "qkv.k", "qkv.v", "attn.out", "attn2.out"),  # DiT, MMDiT
    *("in_proj.q", "in_proj.k", "in_proj.v", "out_proj"),  # CLIP
    *("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),  # T5
)
FEEDFORWARD = ("ff.proj", "ff.out", "mlp.fc1", "mlp.fc2", "mlp.c_fc", "mlp.c_proj", "wi", "wi_0", "wi_1", "wo")
GROUPS = ("attention", "feedforward", "conv", "all")
NAME = "default"  # peft's, of the one adapter in training


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter to train; the change that it learns is scaled by alpha / rank."""

    kind: str = "lora"  # lora | dora | loha | lokr
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0  # of the inputs (lora, dora) or of rows of the change (loha, lokr), while training
    targets: tuple[str, ...] = ("attention",)  # attention, feedforward, conv, all, or ends of native module names
    text: bool = False  # the text encoder too: its attention, and its feed-forward layers where targets name them

    def __post_init__(self) -> None:
        known("kind of adapter", self.kind, KINDS)
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "adapter: rank must be 1 or more, alpha above 0 and dropout in [0, 1);"
                f" they are {self.rank}, {self.alpha} and {self.dropout}"
            )
        if not self.targets:
            raise ValueError(f"adapter: targets is empty; it takes {', '.join(GROUPS)} or ends of module names")


def inject(components: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, nn.Module]:
    """Freeze the denoiser and the text encoder and put a new adapter into them; returns those that have one.

    The adapter's parameters are the only ones with a gradient: float32 whatever the base is, drawn by torch's
    generator, and of no effect yet. Dropout is peft's, on in `.train()` and off in `.eval()`, which the caller
    says; the networks themselves know no difference between the two. State dicts have peft's names until `eject`.
    Raises ValueError if a component is missing, has an adapter in training or has no layer that `targets` names.
    """
    chosen = COMPONENTS if config.text else COMPONENTS[:1]
    absent = [name for name in chosen if name not in components]
    if absent:
        raise ValueError(f"an adapter needs the {absent[0]}, and there is only {', '.join(components)}")
    names = {name: _targeted(components[name], config, text=name == "text") for name in chosen}
    for name in COMPONENTS:
        if name in components:
            components[name].requires_grad_(False)
    for name, modules in names.items():
        component = components[name]
        unfuse(component)
        _peft().inject_adapter_in_model(_peft_config(config, modules), component, NAME)
        for parameter in component.parameters():
            if parameter.requires_grad:  # peft makes them in the type of the base
                parameter.data = parameter.data.float()
        component.train(component.training)  # its new layers too, which are made in training
    return {name: components[name] for name in chosen}


def _targeted(component: nn.Module, config: AdapterConfig, *, text: bool) -> list[str]:
    """The native names of the modules that get an adapter."""
    weights = sites(component)
    targets = set(config.targets)
    if text:  # not the projection behind it, nor what ends of the denoiser's names happen to mean here
        targets = {"attention", "feedforward"} if targets & {"feedforward", "all"} else {"attention"}
    ends = {t for t in targets if t not in GROUPS}
    ends |= set(ATTENTION if "attention" in targets else ()) | set(FEEDFORWARD if "feedforward" in targets else ())

    def wanted(name: str, weight: Tensor) -> bool:
        if "all" in targets or ("conv" in targets and weight.ndim == 4):
            return True
        return any(name == end or name.endswith(f".{end}") for end in ends)

    found = [name for name, weight in weights.items() if wanted(name, weight)]
    if not found:
        raise ValueError(
            f"adapter: targets {', '.join(config.targets)} name no layer of this model;"
            f" known are {', '.join(GROUPS)} and ends of names such as {next(iter(weights))}"
        )
    return found


def _peft() -> Any:
    """peft, which imports torchvision by way of transformers."""
    from ldm.models.text import import_open_clip

    import_open_clip()
    # which imports bitsandbytes, which on some CPUs warns that kernels could be downloaded, for what is not done here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import peft

    return peft


def _peft_config(config: AdapterConfig, names: list[str]) -> Any:
    peft, exactly = _peft(), "|".join(map(re.escape, names))
    if config.kind in ("lora", "dora"):
        return peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=exactly,
            use_dora=config.kind == "dora",
        )
    made = peft.LoHaConfig if config.kind == "loha" else peft.LoKrConfig
    return made(r=config.rank, alpha=config.alpha, rank_dropout=config.dropout, target_modules=exactly)


def _layers(component: nn.Module) -> Iterator[tuple[str, Any]]:
    """(native name, layer) of all that peft put in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from ((name, m) for name, m in component.named_modules() if isinstance(m, BaseTunerLayer))


def adapter_of(components: Mapping[str, nn.Module]) -> Adapter:
    """What `inject` put in, as it is now: copies, on the CPU. Raises ValueError if there is nothing."""
    _peft()
    parts, networks = {}, {}
    for component in COMPONENTS:
        if component in components:
            module = components[component]
            learned = {name: _factors(layer) for name, layer in _layers(module)}
            if learned:
                parts[component] = learned
                networks[component] = (model.kind_of(module), model.config_of(module))
    if not parts:
        raise ValueError("there is no adapter in training in this model")
    return Adapter(parts, networks)


def _factors(layer: Any) -> Factors:
    found: dict[str, Tensor] = {}
    if hasattr(layer, "lora_A"):
        found = {"down": layer.lora_A[NAME].weight, "up": layer.lora_B[NAME].weight}
        found["alpha"] = torch.tensor(float(layer.lora_alpha[NAME]))
        if NAME in layer.lora_magnitude_vector:
            found["magnitude"] = layer.lora_magnitude_vector[NAME].weight.flatten()
    else:
        found = {name: getattr(layer, name)[NAME] for name in layer.adapter_layer_names if NAME in getattr(layer, name)}
        found["alpha"] = torch.tensor(float(layer.alpha[NAME]))
    factors = {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}
    if kind_of(factors) == "lokr" and scale_of(factors) != layer.scaling[NAME]:
        # Where both factors are whole there is no rank in the tensors, and their scale is 1 to everybody but peft.
        factors["lokr_w1"] *= layer.scaling[NAME]
    return factors


@contextmanager
def bypassed(component: nn.Module) -> Iterator[None]:
    """Within the block the component works as before `inject`; gradients and their hooks are left as they are."""
    _peft()
    layers = [layer for _, layer in _layers(component)]
    try:
        for layer in layers:
            layer._disable_adapters = True  # its public switch would freeze the adapter too
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def eject(components: Mapping[str, nn.Module]) -> None:
    """Take out what `inject` put in; the base is as it was, with its own names, and frozen."""
    _peft()
    for component in components.values():
        for name, layer in list(_layers(component)):
            parent, _, leaf = name.rpartition(".")
            setattr(component.get_submodule(parent), leaf, layer.get_base_layer())
        fuse(component)
        component.__dict__.pop("peft_config", None)


# --- without training ------------------------------------------------------------------------------------------


@dataclass
class _Attached:
    """What is attached to a component: adapters with their weights by name, and the weights that were there."""

    adapters: dict[str, tuple[Mapping[str, Factors], float]] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)


def attach(components: Mapping[str, nn.Module], adapter: Adapter, weight: float = 1.0, name: str = "default") -> None:
    """Change the model by an adapter, at a weight, beside those that are attached already; `detach` undoes it exactly.

    The sum is made in float32 or wider from the weights that were there, which stay in the CPU's memory, and rounded
    once. Raises ValueError, and changes nothing, if the adapter does not fit or the name is taken.
    """
    if name in attached(components):
        raise ValueError(f"an adapter named {name!r} is attached already; detach it first")
    check_fit(adapter, components)
    for component, part in adapter.parts.items():
        book = components[component].__dict__.setdefault("_attached_adapters", _Attached())
        book.adapters[name] = (part, weight)
        _refresh(components[component], book, part)


def attached(components: Mapping[str, nn.Module]) -> dict[str, float]:
    """The adapters attached to a model and their weights, in the order they came."""
    books = [c.__dict__.get("_attached_adapters", _Attached()) for c in components.values()]
    return {name: weight for book in books for name, (_, weight) in book.adapters.items()}


def set_weights(components: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
    """Give attached adapters other weights; those not named keep theirs. Raises ValueError for an unknown name."""
    current = attached(components)
    for name in weights:
        known("attached adapter", name, current)
    for component in components.values():
        book = component.__dict__.get("_attached_adapters", _Attached())
        changed = [n for n in book.adapters if n in weights and weights[n] != book.adapters[n][1]]
        for name in changed:
            book.adapters[name] = (book.adapters[name][0], weights[name])
        _refresh(component, book, {module: None for name in changed for module in book.adapters[name][0]})


def detach(components: Mapping[str, nn.Module], name: str) -> None:
    """Take an attached adapter away; the last one leaves the very weights that were there."""
    known("attached adapter", name, attached(components))
    for component in components.values():
        book = component.__dict__.get("_attached_adapters", _Attached())
        if name in book.adapters:
            part, _ = book.adapters.pop(name)
            _refresh(component, book, part)


@torch.no_grad()
def _refresh(component: nn.Module, book: _Attached, modules: Mapping[str, Any]) -> None:
    """Write the weights of these modules anew: what was there and the sum of all that is attached."""
    weights = sites(component) if modules else {}
    for module in modules:
        site = weights[module]
        original = book.originals.setdefault(module, site.to("cpu", copy=True)).to(site.device)
        changes = [w * delta(part[module], original) for part, w in book.adapters.values() if module in part]
        site.copy_(sum(changes, original))
        if not any(module in part for part, _ in book.adapters.values()):
            del book.originals[module]


@torch.no_grad()
def merge(components: Mapping[str, nn.Module], adapter: Adapter, weight: float = 1.0) -> None:
    """Change the model by an adapter, at a weight, for good.

    Raises ValueError, and changes nothing, if it does not fit, or others are attached, whose end would undo it.
    """
    if attached(components):
        raise ValueError(f"detach {', '.join(attached(components))} before anything is merged")
    check_fit(adapter, components)
    for component, part in adapter.parts.items():
        weights = sites(components[component])
        for module, factors in part.items():
            weights[module].copy_(weights[module] + weight * delta(factors, weights[module]))
