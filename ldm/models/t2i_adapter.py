"""T2I-Adapter (Mou et al. 2023): a small network that steers a frozen U-Net by a picture, whatever the noise."""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.types import Conditioning


@dataclass(frozen=True)
class T2IAdapterConfig:
    """The defaults fit Stable Diffusion 1 and 2."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of the U-Net's levels, from full size down
    blocks: int = 2  # residual blocks per level
    hint_channels: int = 3  # 1 for sketches and edges
    factor: int = 8  # pixels of the hint per pixel of x, along each side


class T2IAdapter(nn.Module):
    """x, t, cond with control = (hint [B, C, H f, W f] in [0, 1],) -> one map per level of a U-Net, largest first.

    The maps are added within the U-Net's encoder (sec. 3.3), to what each level hands down. They depend on the hint
    alone; x only says the type and the size.
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
        return self.config.factor

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        if len(cond.control) != 1:
            raise ValueError(f"a T2I-adapter is told one hint picture, got {len(cond.control)}")
        h = cond.control[0].to(x)
        expected = tuple(side * self.hint_factor for side in x.shape[-2:])
        if tuple(h.shape[-2:]) != expected:
            raise ValueError(f"the hint must be {expected[1]}x{expected[0]} px, got {h.shape[-1]}x{h.shape[-2]}")
        h = self.conv_in(F.pixel_unshuffle(h, self.config.factor))
        maps: list[Tensor] = []
        for level in self.levels:
            h = level(F.avg_pool2d(h, 2) if maps else h)
            maps.append(h)
        return tuple(maps)


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
