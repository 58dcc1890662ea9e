"""A discriminator of patches, and the losses between it and a generator."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.names import known


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes; the defaults judge patches of 70 x 70 px with 2,765,633 parameters (Isola et al. 2017, app. 6.1.2).

    norm: what stands between the convolutions. "batch" is the original's, over the pictures that one process holds at
    a time, so that results depend on how a batch is spread over processes and micro-batches; with "group" (Wu & He
    2018) and "none" they do not.
    """

    channels: int = 64
    layers: int = 3  # convolutions that halve the size
    norm: str = "group"  # group | batch | none
    norm_groups: int = 32

    def __post_init__(self) -> None:
        known("discriminator norm", self.norm, ("group", "batch", "none"))
        if self.channels < 1 or self.layers < 1:
            raise ValueError(f"a discriminator needs channels and layers, got {self.channels} and {self.layers}")
        if self.norm == "group" and self.channels % self.norm_groups:
            raise ValueError(
                f"discriminator channels={self.channels} must be a multiple of its norm_groups={self.norm_groups}"
            )


class PatchDiscriminator(nn.Module):
    """PatchGAN: pictures [B, C, H, W] -> a logit a patch [B, 1, h, w], high for real ones (Isola et al. 2017).

    `anchors`: running means of its logits on real and on made pictures, for `lecam`.
    """

    anchors: Tensor

    def __init__(self, config: DiscriminatorConfig, image_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            stride = 2 if i < config.layers else 1
            bias = config.norm == "none"  # a norm has its own
            parts.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=bias))
            parts += [_norm(config, widths[i]), nn.LeakyReLU(0.2)]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.stack = nn.Sequential(*parts)
        self.stack.apply(_initialise)
        self.register_buffer("anchors", torch.zeros(2))

    @property
    def smallest_px(self) -> int:
        """The smallest side of a picture that has a patch."""
        return 3 * 2**self.config.layers

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """The logits of each of `images`, in one call, which is what DDP needs; batch norm keeps them apart."""
        return tuple(self.stack(image) for image in images)


def _norm(config: DiscriminatorConfig, channels: int) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(config.norm_groups, channels)
    return nn.BatchNorm2d(channels) if config.norm == "batch" else nn.Identity()


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), those of norms from N(1, 0.02) (Isola et al. 2017, app. 6.2)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def logits_for_generator(discriminator: nn.Module, image: Tensor) -> Tensor:
    """What the discriminator says of `image`, with gradients for the picture and none for the discriminator."""
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    (logits,) = functional_call(discriminator, fixed, (image,))
    return logits


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits, halved as in VQGAN (Lim & Ye 2017; Esser et al. 2021)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """The generator's loss against `hinge`."""
    return -fake.mean()


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's cross-entropy, halved (Goodfellow et al. 2014, eq. 1)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def nonsaturating_generator(fake: Tensor) -> Tensor:
    """The generator's loss against `logistic`: -log D(fake) (Goodfellow et al. 2014, sec. 3)."""
    return F.softplus(-fake).mean()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge, hinge_generator),
    "nonsaturating": (logistic, nonsaturating_generator),
}
"""The discriminator's loss and the generator's, by name."""


def gradient_penalty(logits: Tensor, image: Tensor) -> Tensor:
    """R1 without its factor gamma / 2: the mean over pictures of |grad D(x)|^2 (Mescheder et al. 2018, eq. 9).

    D(x) is the mean of a picture's patches; `image` must require gradients and `logits` come from it.
    """
    verdict = logits.flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(verdict, image, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def lecam(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """The distance of logits on real pictures to the running mean of made ones, and the other way round.

    anchors [2]: running means on real and on made pictures (Tseng et al. 2021, eq. 3).
    """
    real_anchor, fake_anchor = anchors
    return (real - fake_anchor).square().mean() + (fake - real_anchor).square().mean()
