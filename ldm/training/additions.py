"""What a base model is given before it is fine-tuned: networks that steer it, channels, and vectors of a word."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.text import TextEncoder, TextPair
from ldm.models.unet import UNet

HINT_WIDTHS = (16, 32, 96, 256)
"""Of the network that a ControlNet reads its hint with (Zhang et al. 2023), one more than its halvings."""


def controlnet_for(unet: UNet, factor: int) -> ControlNet:
    """A ControlNet that is a copy of the U-Net's encoder, and says nothing yet; `factor`: of the autoencoder."""
    halvings = int(math.log2(factor))
    widths = (HINT_WIDTHS + HINT_WIDTHS[-1:] * halvings)[: halvings + 1]
    control = ControlNet(ControlNetConfig(unet=unet.config, hint_widths=widths))
    control.copy_encoder(unet)
    return control


def t2i_adapter_for(unet: UNet, factor: int) -> T2IAdapter:
    """A T2I-adapter with random weights, of the U-Net's widths."""
    channels = tuple(unet.config.channels * m for m in unet.config.multipliers)
    return T2IAdapter(T2IAdapterConfig(channels=channels, factor=factor))


def wider(unet: UNet, more: int) -> UNet:
    """A U-Net of the same weights with so many further channels, which say nothing yet: their weights are zero."""
    made = UNet(replace(unet.config, in_channels=unet.config.in_channels + more))
    tensors = unet.state_dict()
    tensors["conv_in.weight"] = F.pad(tensors["conv_in.weight"], (0, 0, 0, 0, 0, more))
    made.load_state_dict(tensors)
    return made.eval()


def begun(encoder: nn.Module, initial: str, count: int) -> list[nn.Parameter]:
    """`count` vectors for each of the encoder's towers, to learn: those of the words' tokens, again from the first.

    Of more tokens than vectors each vector is the mean of a share of them: one, of "square triangle", lies in the
    middle. Raises ValueError for an encoder that is not CLIP's, and for words of no token.
    """
    towers = [encoder.first, encoder.second] if isinstance(encoder, TextPair) else [encoder]
    return [_begun(tower, initial, count) for tower in towers]


def _begun(tower: nn.Module, initial: str, count: int) -> nn.Parameter:
    if not isinstance(tower, TextEncoder):
        raise ValueError("task.word is taught to CLIP's text encoders, which this model does not have")
    tokens = tower.tokenize.bpe.encode(initial)
    if not tokens:
        raise ValueError(f"task.initial={initial!r} has no words to start from")
    rows = [tokens[i % len(tokens)] for i in range(max(count, len(tokens)))]
    shares = tower.tower.token_embedding.weight.detach()[rows].tensor_split(count)
    return nn.Parameter(torch.stack([share.mean(0) for share in shares]))
