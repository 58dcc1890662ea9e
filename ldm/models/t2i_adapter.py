"""T2I-Adapter (Mou et al. 2023): a small network that steers a frozen U-Net by a picture, whatever the noise."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.types import Conditioning


@dataclass(frozen=True)
class T2IAdapterConfig:
    """The defaults fit Stable Diffusion 1 and 2; (320, 640, 1280, 1280) with factor 16 and `xl` is for SDXL."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of the U-Net's levels, from full size down
    blocks: int = 2  # residual blocks per level
    hint_channels: int = 3  # 1 for sketches and edges
    factor: int = 8  # pixels of the hint per pixel of the first map, along each side
    xl: bool = False  # maps of 1/2, 1/2, 1/4 and 1/4 of the size of x: for three levels and the middle

    def __post_init__(self) -> None:
        if self.xl and (len(self.channels) != 4 or self.channels[2] != self.channels[3] or self.factor % 2):
            raise ValueError(
                "t2i_adapter: xl has 4 channels, the last twice, and an even factor; "
                f"got {self.channels} and {self.factor}"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Channels of the levels of the U-Net that it is for."""
        return self.channels[:3] if self.xl else self.channels


class T2IAdapter(nn.Module):
    """x, t, cond with control = (hint [B, C, H f, W f] in [0, 1],) -> one map per level of a U-Net, largest first.

    The maps are added within the U-Net's encoder (sec. 3.3), to what each level hands down; SDXL's first to what its
    first level becomes when halved, and its fourth to the middle. They depend on the hint alone; x only says the type
    and the size.
    """

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        first, *_ = config.channels
        self.conv_in = nn.Conv2d(config.hint_channels * config.factor**2, first, 3, padding=1)
        widths = [(first, first), *pairwise(config.channels)]
        self.levels = nn.ModuleList(AdapterLevel(a, b, config.blocks) for a, b in widths)

    @property
    def hint_factor(self) -> int:
        """Pixels of the hint per pixel of x, along each side."""
        return self.config.factor // 2 if self.config.xl else self.config.factor

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        if len(cond.control) != 1:
            raise ValueError(f"a T2I-adapter is told one hint picture, got {len(cond.control)}")
        h = cond.control[0].to(x)
        expected = tuple(side * self.hint_factor for side in x.shape[-2:])
        if tuple(h.shape[-2:]) != expected:
            raise ValueError(f"the hint must be {expected[1]}x{expected[0]} px, got {h.shape[-1]}x{h.shape[-2]}")
        h = self.conv_in(F.pixel_unshuffle(h, self.config.factor))
        maps: list[Tensor] = []
        for i, level in enumerate(self.levels):
            halve = i == 2 if self.config.xl else i > 0
            h = level(F.avg_pool2d(h, 2) if halve else h)
            maps.append(h)
        return tuple(maps)


def once(adapter: T2IAdapter) -> Callable[[Tensor, Tensor, Conditioning], tuple[Tensor, ...]]:
    """The adapter that keeps the maps of the last hint for calls with an equal one; with gradients it is as it is."""
    seen: tuple[Tensor, torch.Size, tuple[Tensor, ...]] | None = None  # hint, shape of x, maps

    def maps(x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        nonlocal seen
        hint = cond.control[0]
        if torch.is_grad_enabled():
            return adapter(x, t, cond)
        if seen is None or (seen[0].dtype, seen[1]) != (hint.dtype, x.shape) or not torch.equal(seen[0], hint):
            seen = hint, x.shape, adapter(x, t, cond)
        return seen[2]

    return maps


class AdapterLevel(nn.Module):
    """The residual blocks of one resolution, after a change of width where there is one."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.blocks = nn.ModuleList(AdapterBlock(out_channels) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        if self.project is not None:
            x = self.project(x)
        for block in self.blocks:
            x = block(x)
        return x


class AdapterBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(x))), without norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return out
