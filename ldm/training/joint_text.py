"""A text encoder that learns with the denoiser, from the denoiser's loss (Rombach et al. 2022, eq. 3)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.transfer import to_device
from ldm.types import Conditioning


@dataclass(frozen=True)
class Unread(Conditioning):
    """A conditioning whose prompts nobody has read yet: the network below will, in its own forward pass.

    untold: of each prompt, whether the denoiser is told zeros in its place; empty: of none.
    """

    prompts: tuple[str, ...] = ()
    untold: tuple[bool, ...] = ()

    def __getitem__(self, rows: Tensor) -> "Unread":
        """The rows of those indices [n], int64, on the host, of what may be on a device."""
        chosen, told = rows.tolist(), self.map(lambda t: t[to_device(rows, t.device)])
        untold = tuple(self.untold[row] for row in chosen) if self.untold else ()
        return replace(told, prompts=tuple(self.prompts[row] for row in chosen), untold=untold)


class JointDenoiser(nn.Module):
    """A text encoder and a denoiser as one network, with one optimizer, average and DDP wrapper."""

    def __init__(self, text: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.text, self.denoiser = text, denoiser
        config: Any = denoiser.config
        leave_unreached(text, pooled=config.pooled_dim > 0)

    def forward(self, x: Tensor, t: Tensor, cond: Unread) -> Tensor:
        """x [B, C, H, W], t [B], B prompts -> raw prediction [B, C, H, W]."""
        output: Tensor = self.denoiser(x, t, _read(self.text, cond))
        return output


class TaughtDenoiser(JointDenoiser):
    """The same, with the vectors of a word that the text encoder was taught, which learn."""

    def __init__(self, text: nn.Module, denoiser: nn.Module, vectors: Sequence[nn.Parameter]) -> None:
        super().__init__(text, denoiser)
        self.vectors = nn.ParameterList(vectors)

    def forward(self, x: Tensor, t: Tensor, cond: Unread) -> Tensor:
        """As it is; a pass whose prompts do not have the word reaches its vectors too, with no gradient."""
        return super().forward(x, t, cond) + 0.0 * torch.stack([v.sum() for v in self.vectors]).sum()


@torch.compiler.disable  # the words of a batch are no constants, for which the compiler would take them
def _read(text: nn.Module, cond: Unread) -> Conditioning:
    told: Conditioning = text(cond.prompts)
    if any(cond.untold):
        assert told.context is not None
        heard = to_device(~torch.tensor(cond.untold), told.context.device)
        pooled = None if told.pooled is None else told.pooled * heard[:, None]
        told = replace(told, context=told.context * heard[:, None, None], pooled=pooled)
    return replace(told, sizes=cond.sizes, label=cond.label, concat=cond.concat, control=cond.control)


def leave_unreached(text: nn.Module, *, pooled: bool) -> None:
    """Of the parameters that are to learn, freeze those that do not reach what a denoiser is told.

    Blocks beyond the context's layer, say, or a projection into a space that it does not use, stay as they are: they
    would never have a gradient, and DDP waits for all.
    """
    parameters = [p for p in text.parameters() if p.requires_grad]
    if not parameters:
        return
    cond = text([""])
    told = [cond.context.sum(), *([cond.pooled.sum()] if pooled else [])]
    gradients = torch.autograd.grad(sum(told), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
