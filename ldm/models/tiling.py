"""Pictures larger than memory allows: the autoencoder tile by tile, with the numbers it has without."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil, inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import Decoder, Encoder, Level, Middle
from ldm.nn.blocks import Downsample, PixelAttention, ResidualBlock, Upsample


def tile(autoencoder: Any, side: int = 512) -> None:
    """Have an AutoencoderKL or AutoencoderVQ encode and decode what is larger than side x side px in tiles of that.

    Layers whose maps are small run whole, attention among them. The others run on tiles that overlap by all that a
    convolution can see, so that no seam can arise from an edge. There remain the group norms, whose statistics are
    those of the whole picture: they are estimated once, from windows spread over the picture that together are as
    large as a tile and go through the layers at once, and are then the same for every tile. What is left of the
    difference to the untiled autoencoder is the error of that estimate, alike everywhere in the picture.

    For inference. Raises ValueError for a side that is no multiple of the autoencoder's factor.
    """
    if side < 1 or side % autoencoder.factor:
        raise ValueError(f"tiles must be a multiple of {autoencoder.factor} px, got {side}")
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    encoder.forward = partial(_encode, encoder, side=side)
    decoder.forward = partial(_decode, decoder, side=side // autoencoder.factor)


def untile(autoencoder: Any) -> None:
    """Take it back."""
    for part in (autoencoder.encoder, autoencoder.decoder):
        part.__dict__.pop("forward", None)


@dataclass(frozen=True)
class _Step:
    """One layer or block of a network that is a chain of them."""

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    unit: float  # side of a pixel of its output, in pixels of the chain's input
    channels: int  # of its output
    reach: float  # how far it sees beyond a pixel, in pixels of the chain's input; infinite for attention


def _decode(decoder: Decoder, z: Tensor, side: int) -> Tensor:
    """latents [B, C, h, w] -> images; tiles of side x side latents, pictures together that are no more than one."""
    each = max(1, side**2 // (z.shape[-2] * z.shape[-1]))
    if len(z) > each:
        return torch.cat([_decode(decoder, part, side) for part in z.split(each)])
    if max(z.shape[-2:]) <= side:
        return Decoder.forward(decoder, z)
    steps = _chain(decoder)
    small = _small(steps, z, side)
    first = max((k + 1 for k, step in enumerate(steps) if step.reach == inf), default=0)
    whole = next((k for k in range(first, len(steps)) if not small[k]), len(steps))
    for step in steps[:whole]:
        z = step.run(z)
    unit = steps[whole - 1].unit if whole else 1.0
    return _in_tiles(steps[whole:], z, round(side / unit), unit)


def _encode(encoder: Encoder, image: Tensor, side: int) -> Tensor:
    """images [B, 3, H, W] -> features; tiles of side x side px, pictures together that are no more than one."""
    each = max(1, side**2 // (image.shape[-2] * image.shape[-1]))
    if len(image) > each:
        return torch.cat([_encode(encoder, part, side) for part in image.split(each)])
    if max(image.shape[-2:]) <= side:
        return Encoder.forward(encoder, image)
    steps = _chain(encoder)
    small = _small(steps, image, side)
    attention = next((k for k, step in enumerate(steps) if step.reach == inf), len(steps))
    last = max((k for k, fits in enumerate(small) if not fits), default=-1)
    tiled = min(attention, last + 2)  # and the one that makes it small
    x = _in_tiles(steps[:tiled], image, side, 1.0)
    for step in steps[tiled:]:
        x = step.run(x)
    return x


def _small(steps: list[_Step], x: Tensor, side: int) -> list[bool]:
    """Whether each step's map of all x is no larger than the largest map of a tile."""
    largest = max(step.channels / step.unit**2 for step in steps) * side**2
    return [step.channels / step.unit**2 * x.shape[-2] * x.shape[-1] <= largest for step in steps]


def _chain(network: Encoder | Decoder) -> list[_Step]:
    steps: list[_Step] = []
    unit, channels = 1.0, network.conv_in.out_channels

    def add(module: nn.Module, reach: float, run: Callable[[Tensor], Tensor] | None = None) -> None:
        steps.append(_Step(run or module, module, unit, channels, reach))

    def add_middle(middle: Middle) -> None:
        for module in (middle.block1, middle.attention, middle.block2):
            add(module, inf if isinstance(module, PixelAttention) else 2 * unit)

    add(network.conv_in, unit)
    if isinstance(network, Decoder):
        add_middle(network.middle)
    for level in network.levels:
        assert isinstance(level, Level)
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            assert isinstance(block, ResidualBlock)
            channels = block.conv2.out_channels
            add(block, 2 * unit)
            if isinstance(attention, PixelAttention):
                add(attention, inf)
        if isinstance(level.resample, Upsample):
            unit /= 2
            add(level.resample, unit)
        elif isinstance(level.resample, Downsample):
            reach, unit = 2 * unit, unit * 2
            add(level.resample, reach)
    if isinstance(network, Encoder):
        add_middle(network.middle)
    out = nn.ModuleList([network.norm_out, network.conv_out])
    channels = network.conv_out.out_channels
    add(out, unit, lambda x: network.conv_out(F.silu(network.norm_out(x))))
    return steps


def _in_tiles(steps: list[_Step], x: Tensor, side: int, unit: float) -> Tensor:
    """The steps on tiles of x, side x side of its pixels with what they see around them; `unit`: side of x's pixel."""
    if not steps:
        return x
    coarsest = max(1, round(max(step.unit for step in steps) / unit))  # edges fall between pixels of every map
    halo = ceil(sum(step.reach for step in steps) / unit / coarsest) * coarsest
    inner = max(coarsest, (side - 2 * halo) // coarsest * coarsest)
    frame = _Frame(inner, halo, scale=unit / steps[-1].unit, coarsest=coarsest)
    return _one_in_tiles(steps, x, frame)


@dataclass(frozen=True)
class _Frame:
    side: int  # of what a tile gives, in pixels of the map that goes in
    halo: int  # of what it sees around that
    scale: float  # output pixels for one of them
    coarsest: int  # edges fall on multiples of it


def _one_in_tiles(steps: list[_Step], x: Tensor, frame: _Frame) -> Tensor:
    """x [1, C, H, W]."""
    height, width = x.shape[-2:]
    norms = [m for step in steps for m in step.module.modules() if isinstance(m, nn.GroupNorm)]
    out: Tensor | None = None
    with _whole_norms(norms) as pool:
        windows, pool.inner = _windows(x, frame)
        pool.width = windows.shape[-1]
        for step in steps:
            windows = step.run(windows)
        for top in range(0, height, frame.side):
            for left in range(0, width, frame.side):
                place = [_Span(a, min(a + frame.side, n)) for a, n in ((top, height), (left, width))]
                seen = [s.grown(frame.halo, n) for s, n in zip(place, (height, width), strict=True)]
                h = x[..., seen[0].slice(), seen[1].slice()]
                for step in steps:
                    h = step.run(h)
                if out is None:
                    out = h.new_empty(1, h.shape[1], *(round(n * frame.scale) for n in (height, width)))
                kept = [p.within(s).slice(frame.scale) for p, s in zip(place, seen, strict=True)]
                to = [p.slice(frame.scale) for p in place]
                out[..., to[0], to[1]] = h[..., kept[0], kept[1]]
    assert out is not None
    return out


@dataclass(frozen=True)
class _Span:
    start: int
    stop: int

    def grown(self, by: int, limit: int) -> "_Span":
        return _Span(max(self.start - by, 0), min(self.stop + by, limit))

    def within(self, other: "_Span") -> "_Span":
        return _Span(self.start - other.start, self.stop - other.start)

    def slice(self, scale: float = 1.0) -> slice:
        return slice(round(self.start * scale), round(self.stop * scale))


def _windows(x: Tensor, frame: _Frame) -> tuple[Tensor, list[list[_Span]]]:
    """Windows [M, C, h, w] spread evenly over x [1, C, H, W], together about as large as a tile with its halo.

    And of each the rows and columns that have seen all that the whole picture would have shown them.
    """
    window = max(4 * frame.halo, 2 * frame.coarsest)
    sizes = [min(window, n) for n in x.shape[-2:]]
    count = max(1, (frame.side + 2 * frame.halo) ** 2 // (sizes[0] * sizes[1]))
    down = max(1, round((count * x.shape[-2] / x.shape[-1]) ** 0.5))
    parts, inner = [], []
    rows, columns = (
        _starts(n, size, many, frame.coarsest)
        for n, size, many in zip(x.shape[-2:], sizes, (down, max(1, count // down)), strict=True)
    )
    for starts in product(rows, columns):
        parts.append(x[..., starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]])
        inner.append(
            [
                _Span(0 if a == 0 else frame.halo, size if a + size == n else size - frame.halo)
                for a, size, n in zip(starts, sizes, x.shape[-2:], strict=True)
            ]
        )
    return torch.cat(parts), inner


def _starts(length: int, size: int, count: int, multiple: int) -> list[int]:
    """Where `count` windows of a size begin, evenly spread over a length, each once."""
    last = length - size
    if count == 1 or last == 0:
        return [last // 2 // multiple * multiple]
    return sorted({round(last * k / (count - 1) / multiple) * multiple for k in range(count)})


class _WholeNorms:
    """Group norms by the statistics that they had where they were first called: on the windows."""

    def __init__(self) -> None:
        self.inner: list[list[_Span]] = []  # of each window, in pixels of what went in
        self.width = 0  # of a window, in the same
        self.known: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def norm(self, module: nn.GroupNorm, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same, normalised by the mean and variance of the picture's groups."""
        if module not in self.known:
            self.known[module] = self._learn(module, x)
        scale, shift = self.known[module]
        return torch.addcmul(shift, x, scale)

    def _learn(self, module: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a channel is multiplied by, and what is added, [C, 1, 1]."""
        size, total = x.shape[-1] / self.width, 0
        first = second = torch.zeros((), device=x.device)
        for window, (rows, columns) in zip(x, self.inner, strict=True):
            seen = window[:, rows.slice(size), columns.slice(size)].float()
            groups = seen.reshape(module.num_groups, -1)  # [G, N]
            var, mean = torch.var_mean(groups, dim=1, correction=0)
            n = groups.shape[1]
            first, second, total = first + n * mean, second + n * (var + mean.square()), total + n
        mean = first / total
        std = (second / total - mean.square()).clamp(min=0).add(module.eps).sqrt()
        mean, std = (v.repeat_interleave(x.shape[1] // module.num_groups) for v in (mean, std))
        scale = module.weight / std
        shift = module.bias - mean * scale
        return scale.to(x.dtype)[:, None, None], shift.to(x.dtype)[:, None, None]


@contextmanager
def _whole_norms(norms: list[nn.GroupNorm]) -> Iterator[_WholeNorms]:
    """Within the block these norms see one picture in parts."""
    whole = _WholeNorms()
    with ExitStack() as stack:
        for module in norms:
            module.forward = partial(whole.norm, module)  # type: ignore[method-assign]
            stack.callback(module.__dict__.pop, "forward")
        yield whole
