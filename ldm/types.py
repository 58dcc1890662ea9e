"""The words every layer shares: what a denoiser is told, and what it is."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ldm.diffusion.noise import NoiseLevel


@dataclass(frozen=True)
class Conditioning:
    """All a denoiser is told besides `x` and `t`; every field is optional.

    context [B, L, D]: text tokens.          mask [B, L]: True where a token counts.
    pooled [B, P]: added to the time embedding.
    sizes [B, 6]: original height and width, crop top and left, target height and width, px (SDXL); its refiner's
        [B, 5] have an aesthetic score in the place of the target.
    label [B], whole: a class, or how noisy the low-resolution picture in `concat` is (x4 upscaler).
    concat [B, C', H, W]: joined to `x` by channel (inpainting, depth).
    control: what steers the picture's layout. Outside `controlled`, one hint picture for each network, [B, c, H f, W f]
        in [0, 1]; inside, of T2I-adapters one map per level (SDXL's: and one for the middle), then of ControlNets one
        per skip connection and one for the middle; either may be absent.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    label: Tensor | None = None
    concat: Tensor | None = None
    control: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same conditioning with `change` applied to every tensor in it."""

        def apply(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(change(v) for v in value)
            return None if value is None else change(value)

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(Conditioning)})

    def __getitem__(self, rows: Any) -> Self:
        """The rows of the batch that `rows` selects (slice, index tensor or boolean mask)."""
        return self.map(lambda t: t[rows])

    def sized(self, height: int, width: int) -> "Conditioning":
        """Told the sizes of a picture of height x width px that was never larger, nor cropped; needs a context."""
        assert self.context is not None
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.context.device)
        return replace(self, sizes=sizes.expand(len(self.context), -1))

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        """`Tensor.to` on every tensor."""
        return self.map(lambda t: t.to(*args, **kwargs))

    @staticmethod
    def cat(parts: "list[Conditioning]") -> "Conditioning":
        """Join along the batch; every part must have the same fields. Raises ValueError if not."""

        def join(values: list[Any]) -> Any:
            if any((v is None) != (values[0] is None) for v in values):
                raise ValueError("conditionings to join must have the same fields")
            if values[0] is None:
                return None
            if isinstance(values[0], tuple):
                return tuple(torch.cat(group) for group in zip(*values, strict=True))
            return torch.cat(values)

        return Conditioning(**{f.name: join([getattr(p, f.name) for p in parts]) for f in fields(Conditioning)})


class Denoiser(Protocol):
    """A network that predicts a mix of clean signal and noise: UNet, DiT, guided(...), wrapped or not."""

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x [B, C, H, W], t [B] -> raw prediction [B, C, H, W]."""
        ...


Denoise = Callable[[Tensor, "NoiseLevel"], Tensor]
"""(x_t [B, C, H, W], level) -> the estimate of x0, same shape. What a sampler calls."""
