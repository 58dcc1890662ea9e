"""Latents as small pictures, without the autoencoder: a linear projection, fitted to each model."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LatentPreview:
    """Latents [B, C, h, w] -> pictures [B, 3, h, w] in [-1, 1], on the CPU: what a pixel of a latent shows on average.

    weight [3, C], bias [3].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, latent: Tensor, decoded: Tensor) -> "LatentPreview":
        """By least squares, from latents [B, C, h, w] and what the autoencoder makes of them, [B, 3, h f, w f].

        A pixel of the latents is to show the mean of the pixels that it stands for. Its own pictures tell more of a
        model than any others would: a few estimates of a drawing under way are enough.
        """
        latent = latent.detach().float().cpu()
        wanted = F.adaptive_avg_pool2d(decoded.detach().float().cpu(), (latent.shape[-2], latent.shape[-1]))
        rows = latent.movedim(1, -1).flatten(0, -2)  # [N, C]
        rows = F.pad(rows, (0, 1), value=1.0).double()
        # by the normal equations, with a little ridge: estimates of plain colour leave channels that say nothing
        square = rows.T @ rows
        ridge = 1e-6 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
        found = torch.linalg.solve(square + ridge, rows.T @ wanted.movedim(1, -1).flatten(0, -2).double()).float()
        return cls(found[:-1].T.contiguous(), found[-1])

    def __call__(self, latent: Tensor) -> Tensor:
        shown = torch.einsum("bchw,kc->bkhw", latent.float().cpu(), self.weight) + self.bias[:, None, None]
        return shown.clamp(-1, 1)
