"""The same network twice: as diffusers or transformers build it, and ours on the very same weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.layouts import autoencoder as autoencoder_layout
from ldm.checkpoints.layouts import text as text_layout
from ldm.checkpoints.layouts import unet as unet_layout
from ldm.checkpoints.layouts.table import Entry, to_foreign, to_native
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.text import VOCABULARY, TextConfig, TextEncoder, import_open_clip
from ldm.models.unet import UNet, UNetConfig

ZERO_STD = 0.02
LATENT_SCALE = ("latent_mean", "latent_std")


@dataclass(frozen=True)
class Sizes:
    """One size of every network, and of what goes in."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    text: TextConfig
    latent_px: int
    image_px: int
    batch: int = 2  # of the U-Net and the text encoder; one picture for the autoencoder


SIZES = {
    "tiny": Sizes(
        UNetConfig(channels=32, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=32, heads=2, norm_groups=8),
        AutoencoderConfig(channels=16, multipliers=(1, 2), blocks=1, norm_groups=8),
        TextConfig(width=32, layers=2, heads=2, embed_dim=0, activation="quick_gelu"),
        latent_px=8,
        image_px=32,
    ),
    "sd15": Sizes(
        UNetConfig(),
        AutoencoderConfig(),
        TextConfig(embed_dim=0, activation="quick_gelu", pad_id=49_407),
        latent_px=32,
        image_px=256,
    ),
}


@dataclass(frozen=True)
class Pair:
    """Both builds of a network, sharing their weights, and the names of one in the other."""

    peer: nn.Module
    ours: nn.Module
    table: tuple[Entry, ...]

    def gradients(self, of: nn.Module, values: Sequence[Tensor]) -> list[Tensor]:
        """Gradients in the order of `of`'s parameters -> in one order for both builds."""
        named = dict(zip((name for name, _ in of.named_parameters()), values, strict=True))
        if of is not self.peer:
            named = to_foreign([entry for entry in self.table if entry.native in named], named)
        return [named[name] for name in sorted(named)]


def unet_peer(config: UNetConfig) -> nn.Module:
    """diffusers' U-Net of that size, with its own initialisation."""
    import_open_clip()  # declares what diffusers' imports need beside a CPU build of torch
    from diffusers import UNet2DConditionModel

    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths))
    peer: Any = UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.blocks,
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.heads,  # its name for the number of heads
        norm_num_groups=config.norm_groups,
    )
    return peer


def autoencoder_peer(config: AutoencoderConfig) -> nn.Module:
    """diffusers' KL autoencoder of that size, with its own initialisation."""
    import_open_clip()
    from diffusers import AutoencoderKL as Peer

    levels = len(config.multipliers)
    peer: Any = Peer(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=1.0,
    )
    return peer


def text_peer(config: TextConfig) -> nn.Module:
    """transformers' CLIP text model of that size, with its own initialisation."""
    import_open_clip()
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            hidden_act=config.activation,
        )
    )


PEERS: dict[str, Callable[[Sizes], nn.Module]] = {
    "unet": lambda sizes: unet_peer(sizes.unet),
    "autoencoder": lambda sizes: autoencoder_peer(sizes.autoencoder),
    "text": lambda sizes: text_peer(sizes.text),
}


def build(kind: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Pair:
    """unet, autoencoder or text, in evaluation mode, with seeded random weights none of which is all zero."""
    torch.manual_seed(0)
    peer = PEERS[kind](sizes)
    with torch.no_grad():
        for parameter in peer.parameters():
            if not parameter.any():  # a zero-initialised layer would hide whatever comes before it
                parameter.normal_(std=ZERO_STD)
    return pair(kind, sizes, peer.to(device, dtype).eval())


def pair(kind: str, sizes: Sizes, peer: nn.Module) -> Pair:
    """Ours built on the peer's own tensors: not copies, so both read the same memory in the same layout."""
    with torch.device("meta"):
        ours = _ours(kind, sizes)
    keys = [key for key in ours.state_dict() if key not in LATENT_SCALE]
    table = _table(kind, sizes, keys)
    theirs = {_with_prefix(kind, name): tensor for name, tensor in peer.state_dict().items()}
    weights = to_native(table, theirs, type(peer).__name__)
    if kind == "autoencoder":  # the raw latents: the stock encoder and decoder do not scale theirs either
        like, channels = next(peer.parameters()), sizes.autoencoder.latent_channels
        scale = {"latent_mean": torch.zeros, "latent_std": torch.ones}
        weights |= {key: make(channels, 1, 1, device=like.device, dtype=like.dtype) for key, make in scale.items()}
    ours.load_state_dict(weights, assign=True)
    ours = ours.to(next(peer.parameters()).device).eval()  # buffers that are in no state dict
    if sum(p.numel() for p in ours.parameters()) != sum(p.numel() for p in peer.parameters()):
        raise ValueError(f"{kind}: ours and {type(peer).__name__} have different numbers of parameters")
    return Pair(peer, ours, tuple(table))


def _with_prefix(kind: str, name: str) -> str:
    wrapper = text_layout.WRAPPER  # in every stored file, but no longer in transformers' own model
    return wrapper + name if kind == "text" and not name.startswith(wrapper) else name


def _ours(kind: str, sizes: Sizes) -> nn.Module:
    if kind == "unet":
        return UNet(sizes.unet)
    if kind == "autoencoder":
        return AutoencoderKL(sizes.autoencoder)
    encoder: Any = TextEncoder(sizes.text)
    encoder.tokenize = lambda ids: ids  # both sides are given ids: turning words into them is not the network
    text: nn.Module = encoder
    return text


def _table(kind: str, sizes: Sizes, keys: list[str]) -> list[Entry]:
    if kind == "unet":
        return unet_layout.diffusers(sizes.unet, keys)
    if kind == "autoencoder":
        return autoencoder_layout.diffusers(sizes.autoencoder, keys)
    return text_layout.transformers(sizes.text, keys)
