"""Adapters put into our own networks: no effect at first, trained alone, and the same as a change of the weights."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.adapters import files
from ldm.adapters.adapter import KINDS, Adapter, delta
from ldm.adapters.fused import fuse, sites, unfuse
from ldm.adapters.lora import (
    AdapterConfig,
    adapter_of,
    attach,
    attached,
    detach,
    eject,
    inject,
    merge,
    set_weights,
)
from ldm.models.dit import DiT, DiTConfig
from ldm.models.mmdit import MMDiT, MMDiTConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.transformers_text import TransformersText
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.cpu import OneDNNLinear, for_cpu
from ldm.training.onednn import TrainedOneDNNLinear, train_by_onednn
from ldm.types import Conditioning
from tests.checkpoints.families import make
from tests.parity.reference import randomised

UNET = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=16, heads=2)
DIT = DiTConfig(width=24, depth=2, heads=2, classes=0, context_dim=16, out_channels=4)
MMDIT = MMDiTConfig(
    width=24, depth=2, heads=2, context_dim=16, pooled_dim=8, in_channels=4, out_channels=4, dual=(0,), max_size=8,
    base_size=8, qk_norm=True,
)  # fmt: skip
CLIP = TextConfig(width=16, layers=2, heads=2, embed_dim=0)
Models = dict[str, nn.Module]


def models(network: str = "unet") -> Models:
    made = {"unet": lambda: UNet(UNET), "dit": lambda: DiT(DIT), "mmdit": lambda: MMDiT(MMDIT)}[network]()
    return {"denoiser": randomised(made), "text": randomised(TextEncoder(CLIP), 1)}


def say(models: Mapping[str, Any]) -> dict[str, Tensor]:
    parameter = next(models["denoiser"].parameters())
    generator = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 7, 16), (2, 8)))
    cond = Conditioning(context=context.to(parameter.dtype), pooled=pooled.to(parameter.dtype))
    said = {"denoiser": models["denoiser"](x.to(parameter.dtype), torch.tensor([10.0, 700.0]), cond)}
    return said | {"text": models["text"](["a cat", "two dogs"]).context}


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of any network, relative to its largest output."""
    return max(float(((a[name] - b[name]).abs().max() / b[name].abs().max()).detach()) for name in a)


def trainable(models: Models) -> list[nn.Parameter]:
    return [p for module in models.values() for p in module.parameters() if p.requires_grad]


def learned(models: Models, config: AdapterConfig) -> Adapter:
    """Inject and move every parameter, as if trained."""
    torch.manual_seed(0)
    inject(models, config)
    for parameter in trainable(models):
        parameter.data += 0.3 * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    return adapter_of(models)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["unet", "dit", "mmdit"])
@torch.no_grad()
def test_life_of_an_adapter(network: str, kind: str) -> None:
    """No effect when new; learned, attached and merged it says the same; ejected and detached it is gone."""
    base = models(network)
    before, state = say(base), {name: dict(m.state_dict()) for name, m in base.items()}
    one = copy.deepcopy(base)
    config = AdapterConfig(kind=kind, rank=4, alpha=3.0, targets=("all",), text=True)
    torch.manual_seed(0)
    inject(one, config)
    assert apart(say(one), before) < 1e-6
    eject(one)
    for name, module in one.items():
        now = module.state_dict()
        assert now.keys() == state[name].keys() and all(torch.equal(now[k], state[name][k]) for k in now)

    one = copy.deepcopy(base)
    adapter = learned(one, config)
    expected = say(one)
    assert apart(expected, before) > 1e-2
    assert adapter.kind == kind
    for put in (attach, merge):
        other = copy.deepcopy(base)
        put(other, adapter, 1.0)
        assert apart(say(other), expected) < 3e-6, put
    other = copy.deepcopy(base)
    attach(other, adapter, 0.7)
    detach(other, "default")
    for name, module in other.items():
        assert all(torch.equal(tensor, state[name][k]) for k, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_is_attached_is_injected_in_float64(kind: str) -> None:
    base = {name: module.double() for name, module in models().items()}
    one = copy.deepcopy(base)
    adapter = learned(one, AdapterConfig(kind=kind, rank=4, alpha=2.0, text=True, targets=("attention", "conv")))
    for module in one.values():
        module.double()
    expected = say(one)
    for put in (attach, merge):
        other = copy.deepcopy(base)
        put(other, adapter, 1.0)
        assert apart(say(other), expected) < 1e-12


@torch.no_grad()
def test_attention_taken_apart_is_equal() -> None:
    text = {"text": models()["text"].double()}
    say_text = lambda: text["text"](["a cat", "two dogs", ""]).context  # noqa: E731
    before, keys = say_text(), list(text["text"].state_dict())
    unfuse(text["text"])
    assert not any(isinstance(m, nn.MultiheadAttention) for m in text["text"].modules())
    assert (say_text() - before).abs().max() < 1e-12
    fuse(text["text"])
    assert list(text["text"].state_dict()) == keys and (say_text() - before).abs().max() < 1e-12


def test_only_the_adapter_learns() -> None:
    one = models("dit")
    adapted = inject(one, AdapterConfig(rank=2, text=True))
    assert adapted == one
    say_all = say(one)
    (say_all["denoiser"].sum() + say_all["text"].sum()).backward()
    for module in one.values():
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert (parameter.grad is not None) == parameter.requires_grad
            if "lora_B" in name:
                assert not parameter.any() and parameter.grad is not None and parameter.grad.any()
    # 2 blocks: q, k, v, out of self-attention and of cross-attention; 2 layers: q, k, v, out
    assert len(trainable(one)) == 2 * (2 * 8 + 2 * 4)


def test_the_denoiser_alone_leaves_the_text_frozen() -> None:
    one = models()
    for module in one.values():
        module.requires_grad_(True)
    assert list(inject(one, AdapterConfig(rank=2))) == ["denoiser"]
    assert not any(p.requires_grad for p in one["text"].parameters())
    assert list(adapter_of(one).parts) == ["denoiser"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_depends_on_the_seed_alone(kind: str) -> None:
    def start(seed: int) -> list[Tensor]:
        one = models()
        torch.manual_seed(seed)
        inject(one, AdapterConfig(kind=kind, rank=3, text=True))
        return [p.detach() for p in trainable(one)]

    first, again, other = start(1), start(1), start(2)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_half_precision_base_are_float32(kind: str) -> None:
    one = {name: module.to(torch.bfloat16) for name, module in models().items()}
    inject(one, AdapterConfig(kind=kind, rank=2, text=True))
    assert {p.dtype for p in trainable(one)} == {torch.float32}
    said = say(one)
    assert said["denoiser"].dtype == torch.bfloat16
    said["denoiser"].float().sum().backward()
    assert all(p.grad is not None for p in one["denoiser"].parameters() if p.requires_grad)


def test_half_precision_is_rounded_once() -> None:
    base = {name: module.half() for name, module in models().items()}
    adapter = learned(models(), AdapterConfig(rank=2))
    weights = {name: w.clone() for name, w in sites(base["denoiser"]).items()}
    attach(base, adapter, 0.3, "a")
    attach(base, adapter, -0.7, "b")
    for name, factors in adapter.parts["denoiser"].items():
        exact = weights[name].double() + -0.4 * delta(factors, weights[name].double())
        assert (sites(base["denoiser"])[name].double() - exact).abs().max() <= exact.abs().max() * 2**-11


def test_gradients_through_checkpointing_are_the_same() -> None:
    one = models("dit")
    learned(one, AdapterConfig(rank=2, dropout=0.5))
    one["denoiser"].train()

    def gradients(recompute: bool) -> list[Tensor]:
        for parameter in trainable(one):
            parameter.grad = None
        torch.manual_seed(3)
        h = torch.randn(2, 5, 24)
        emb, context = torch.randn(2, 24), torch.randn(2, 7, 24)
        for block in one["denoiser"].blocks:  # type: ignore[union-attr]
            h = checkpoint(block, h, emb, context, use_reentrant=False) if recompute else block(h, emb, context)
        h.square().sum().backward()
        return [p.grad for p in trainable(one) if p.grad is not None]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_dropout_is_of_training_alone() -> None:
    one = models()
    learned(one, AdapterConfig(rank=2, dropout=0.5))
    evaluated = [say(one)["denoiser"] for _ in range(2)]
    assert torch.equal(*evaluated)
    one["denoiser"].train()
    assert not torch.equal(say(one)["denoiser"], say(one)["denoiser"])
    one["denoiser"].eval()
    assert torch.equal(say(one)["denoiser"], evaluated[0])


@pytest.mark.parametrize("swap", ["inference", "training"])
def test_layers_with_a_kernel_of_their_own_keep_it(swap: str) -> None:
    plain, one = models("dit"), models("dit")
    if swap == "inference":
        for_cpu(one["denoiser"])
    elif not train_by_onednn(one["denoiser"]):
        pytest.skip("this torch has no such kernel")
    kernel = OneDNNLinear if swap == "inference" else TrainedOneDNNLinear
    if not any(type(m) is kernel for m in one["denoiser"].modules()):
        pytest.skip("this torch has no such kernel")
    config = AdapterConfig(rank=2, targets=("all",))
    learned(plain, config)
    learned(one, config)
    layers = [
        m.base_layer for n, m in one["denoiser"].named_modules() if hasattr(m, "base_layer") and "patches" not in n
    ]
    assert layers and all(type(layer) is kernel for layer in layers)
    with torch.no_grad():
        assert apart(say(one), say(plain)) < 1e-5
    eject(one)
    assert type(one["denoiser"].blocks[0].attn.qkv) is kernel  # type: ignore[union-attr,index]


@torch.no_grad()
def test_several_at_once_and_their_weights() -> None:
    base = models()
    lora = learned(copy.deepcopy(base), AdapterConfig(rank=2, text=True))
    dora = learned(copy.deepcopy(base), AdapterConfig(kind="dora", rank=3, targets=("attention", "conv")))
    attach(base, lora, 0.5, "a")
    attach(base, dora, 1.0, "b")
    assert attached(base) == {"a": 0.5, "b": 1.0}
    set_weights(base, {"b": -0.25})
    fresh = models()
    expected = {name: w.clone() for name, w in sites(fresh["denoiser"]).items()}
    for name, weight in sites(models()["denoiser"]).items():
        for adapter, w in ((lora, 0.5), (dora, -0.25)):
            if name in adapter.parts["denoiser"]:
                expected[name] += w * delta(adapter.parts["denoiser"][name], weight)
    for name, weight in sites(base["denoiser"]).items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
    detach(base, "a")
    set_weights(base, {"b": 0.0})
    assert apart(say(base), say(fresh)) < 1e-6
    detach(base, "b")
    assert attached(base) == {}
    assert apart(say(base), say(fresh)) == 0


def test_targets() -> None:
    def names(targets: tuple[str, ...], network: str = "unet", text: bool = False) -> set[str]:
        one = models(network)
        inject(one, AdapterConfig(rank=1, targets=targets, text=text))
        return {name for part in adapter_of(one).parts.values() for name in part}

    attention = names(("attention",))
    assert all(name.rpartition(".")[2] in ("to_q", "to_k", "to_v", "to_out") for name in attention)
    assert len(attention) == 8 * 4  # 1 down, 1 middle, 2 up
    assert names(("to_q", "attn2.to_k")) == {n for n in attention if n.endswith(("to_q", "attn2.to_k"))}
    feed = names(("feedforward",))
    assert len(feed) == 2 * 4 and not feed & attention
    conv = {n for n, w in sites(models()["denoiser"]).items() if w.ndim == 4}
    assert names(("conv",)) == conv
    assert names(("all",)) == set(sites(models()["denoiser"]))
    in_text = {n for n in names(("conv",), text=True) if n.startswith("tower")}
    assert {n.split("attn.")[1] for n in in_text} == {"in_proj.q", "in_proj.k", "in_proj.v", "out_proj"}
    assert any("mlp.c_fc" in n for n in names(("feedforward",), text=True))
    assert {n.rpartition("attn")[2] for n in names(("attention",), "mmdit")} >= {".qkv.q", ".out", "2.qkv.v"}


def test_size_for_stable_diffusion_1() -> None:
    """As diffusers' training script counts for the same layers: 797,184 at rank 4."""
    with torch.device("meta"):
        one: Models = {"denoiser": UNet(UNetConfig())}
        inject(one, AdapterConfig(rank=4))
    assert sum(p.numel() for p in trainable(one)) == 797_184


def test_bad_input_is_one_clear_line() -> None:
    one, injected = models(), models()
    inject(injected, AdapterConfig(rank=1))
    lora = adapter_of(injected)
    attach(one, lora, 1.0, "mine")
    for call, said in (
        (lambda: AdapterConfig(kind="lorra"), "unknown kind of adapter 'lorra', did you mean 'lora'?"),
        (lambda: AdapterConfig(rank=0), "rank must be 1 or more"),
        (lambda: AdapterConfig(dropout=1.0), "dropout in [0, 1)"),
        (lambda: AdapterConfig(targets=()), "targets is empty"),
        (lambda: inject(models(), AdapterConfig(targets=("atention",))), "targets atention name no layer"),
        (lambda: inject({"denoiser": one["denoiser"]}, AdapterConfig(text=True)), "an adapter needs the text"),
        (lambda: inject(injected, AdapterConfig()), "adapters in training"),
        (lambda: adapter_of(models()), "no adapter in training"),
        (lambda: attach(one, lora, 1.0, "mine"), "'mine' is attached already"),
        (lambda: merge(one, lora), "detach mine before"),
        (lambda: detach(one, "mime"), "unknown attached adapter 'mime', did you mean 'mine'?"),
        (lambda: set_weights(one, {"other": 1.0}), "unknown attached adapter 'other'"),
        (lambda: attach(models("dit"), lora), "this denoiser has no "),
        (lambda: attach({"text": one["text"]}, lora), "changes the denoiser, and this model has only text"),
        (lambda: attach(wider(), lora), "is (64, 64) here and 32 x 32 there"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert said in str(error.value)
    assert attached(one) == {"mine": 1.0}


def wider() -> Models:
    return {"denoiser": UNet(replace(UNET, channels=64))}


def test_a_lora_for_another_base_is_named() -> None:
    """By the width of the text that the U-Net reads."""

    def made(width: int) -> Models:
        return {"denoiser": UNet(replace(UNET, context_dim=width))}

    def lora(width: int) -> Adapter:
        one = made(width)
        inject(one, AdapterConfig(rank=1))
        return adapter_of(one)

    for have, want, said in (
        (768, 2048, "made for Stable Diffusion XL (text of width 2048); this model is Stable Diffusion 1 (text of wid"),
        (1024, 768, "made for Stable Diffusion 1 (text of width 768); this model is Stable Diffusion 2"),
        (768, 40, "made for a model with text of width 40; this model is Stable Diffusion 1"),
    ):
        with pytest.raises(ValueError) as error:
            attach(made(have), lora(want))
        assert said in str(error.value)


def test_under_ddp() -> None:
    """One process of gloo: every parameter with a gradient takes part, as DDP demands."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        one = models()
        inject(one, AdapterConfig(rank=2))
        wrapped = nn.parallel.DistributedDataParallel(one["denoiser"])
        say({"denoiser": wrapped, "text": one["text"]})["denoiser"].square().sum().backward()
        assert all(p.grad is not None for p in trainable(one))
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_both_text_encoders_of_sdxl() -> None:
    components = make("sdxl").components
    one = {"denoiser": components["denoiser"], "text": components["text"]}
    base = copy.deepcopy(one)
    torch.manual_seed(0)
    adapter = learned(one, AdapterConfig(rank=2, text=True))
    assert {name.partition(".")[0] for name in adapter.parts["text"]} == {"first", "second"}
    expected = one["text"](["a cat"])
    attach(base, adapter)
    said = base["text"](["a cat"])
    assert (said.context - expected.context).abs().max() < 1e-5
    assert (said.pooled - expected.pooled).abs().max() < 1e-5


@torch.no_grad()
def test_another_text_encoder(tmp_path: Path) -> None:
    """T5's attention and feed-forward layers, with files of our own alone."""
    vocabulary = {"<pad>": 0, "a": 1, "cat": 2, "[UNK]": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    architecture = {
        "model_type": "t5", "vocab_size": 4, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    config = TransformersText.config_of(architecture, tokenizer.to_str(), 4)
    base: Models = {"denoiser": models()["denoiser"], "text": randomised(TransformersText(config))}
    one = copy.deepcopy(base)
    adapter = learned(one, AdapterConfig(rank=2, text=True, targets=("feedforward",)))
    assert len(adapter.parts["text"]) == 2 * (4 + 3)
    with pytest.raises(ValueError, match="no names for an adapter of a transformers_text"):
        files.write(adapter, tmp_path / "a.safetensors", "kohya")
    files.write(adapter, tmp_path / "a.safetensors", "native")
    before, expected = base["text"](["a cat"]).context, one["text"](["a cat"]).context
    attach(base, files.read(tmp_path / "a.safetensors"))
    assert (base["text"](["a cat"]).context - expected).abs().max() < 1e-4 * (expected - before).abs().max()
