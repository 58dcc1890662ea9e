"""How different two pictures look: LPIPS (Zhang et al. 2018) on VGG16's features, or on random ones."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # widths of VGG16's convolutions, in units of the first's
MEAN = (-0.030, -0.088, -0.188)  # of ImageNet's pictures in [-1, 1]
STD = (0.458, 0.448, 0.450)
RANDOM_WIDTH = 16


@dataclass(frozen=True)
class PerceptualConfig:
    """width: channels of the first convolution; VGG16 has 64 (14,714,688 parameters and 1,472 of the heads)."""

    width: int = 64


class Perceptual(nn.Module):
    """LPIPS 0.1: the distance between VGG16's features of unit length, weighed by channel (Zhang et al. 2018, eq. 1).

    heads: one weight a channel, [1, C, 1, 1] for each of the five stages.
    """

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList()
        width = 3
        for units in STAGES:
            stage = nn.ModuleList()
            for unit in units:
                stage.append(nn.Conv2d(width, unit * config.width, 3, padding=1))
                width = unit * config.width
            self.stages.append(stage)
        self.heads = nn.ParameterList(torch.ones(1, units[-1] * config.width, 1, 1) for units in STAGES)

    def features(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] in [-1, 1] -> each stage's last activation [B, C, H / 2^i, W / 2^i].

        Raises ValueError for pictures below 16 px, which have no pixel at the last stage.
        """
        if min(image.shape[2:]) < 16:
            raise ValueError(f"a perceptual loss needs pictures of at least 16 px, got {tuple(image.shape[2:])}")
        x = (image - image.new_tensor(MEAN).view(3, 1, 1)) / image.new_tensor(STD).view(3, 1, 1)
        found = []
        for i, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if i else x
            assert isinstance(stage, nn.ModuleList)
            for convolution in stage:
                x = F.relu(convolution(x))
            found.append(x)
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], each with its pair -> distances [B], 0 for equal ones."""
        total = a.new_zeros(len(a))
        for head, x, y in zip(self.heads, self.features(a), self.features(b), strict=True):
            difference = (_unit(x) - _unit(y)).square()
            total = total + (head * difference).sum(1).flatten(1).mean(1)
        return total

    def pooled(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> the mean of every stage's channels over the picture [B, 23 * width]."""
        return torch.cat([x.mean((2, 3)) for x in self.features(image)], dim=1)


def _unit(x: Tensor) -> Tensor:
    """Unit length over channels; all zeros stay zeros, with a gradient of zero rather than NaN."""
    return x / (x.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10)


def random_perceptual() -> Perceptual:
    """Features of random kernels, always the same, a quarter as wide as VGG16: a loss of texture at five scales.

    Kernels from N(0, 2 / fan-in) (He et al. 2015), biases 0, heads 1. Random features already say much of what trained
    ones do of likeness (Zhang et al. 2018, fig. 4); distances are not comparable with those of trained ones.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # the global generator does not notice
        module = Perceptual(PerceptualConfig(RANDOM_WIDTH))
    tensors = {}
    for name, p in module.state_dict().items():
        if name.startswith("heads"):
            tensors[name] = torch.ones(p.shape)
        elif p.ndim == 1:
            tensors[name] = torch.zeros(p.shape)
        else:
            tensors[name] = torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)
