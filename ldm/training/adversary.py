"""The adversarial half of an autoencoder's training (Esser et al. 2021)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.models.discriminator import LOSSES, DiscriminatorConfig, PatchDiscriminator, gradient_penalty, lecam
from ldm.names import known
from ldm.training.gathering import over_ranks
from ldm.training.tasks import Metrics, bare

ANCHOR_DECAY = 0.99  # of the running means of logits (Tseng et al. 2021, app. A)


@dataclass(frozen=True)
class AdversaryConfig:
    """The discriminator, and how much it counts; weight 0: there is none.

    adaptive: the generator's loss is weighed so that at the decoder's last layer its gradient is `weight` times as
    long as the reconstruction's. Until optimizer step `start_step` neither side is trained on the other.
    """

    weight: float = 0.0
    adaptive: bool = True
    start_step: int = 0
    loss: str = "hinge"  # hinge | nonsaturating
    r1: float = 0.0  # gamma of the penalty on gradients at real pictures
    lecam: float = 0.0  # weight of the pull of logits to their running means
    model: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        known("adversary loss", self.loss, LOSSES)
        for name in ("weight", "start_step", "r1", "lecam"):
            if getattr(self, name) < 0:
                raise ValueError(f"adversary.{name} must be at least 0, not {getattr(self, name)}")


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + 1e-4) at the weights `last`, at most 1e4.

    Esser et al. 2021, eq. 7. The gradients are those of the micro-batch over all ranks, so that every rank gets one
    weight. DDP's own reduction is not set off: it waits for gradients that are accumulated, and these are returned.
    """
    losses = (reconstruction, adversarial)
    gradients = torch.stack([torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in losses])
    wanted, given = over_ranks(gradients.float(), "mean").flatten(1).norm(dim=1)
    return (wanted / (given + 1e-4)).clamp(0, 1e4)


def judge(discriminator: nn.Module, config: AdversaryConfig, image: Tensor, made: Tensor) -> tuple[Tensor, Metrics]:
    """The discriminator's loss and metrics, for pictures and their detached reconstructions [B, 3, H, W]."""
    if config.r1:
        image = image.detach().requires_grad_().clone()  # no leaf: torch's FLOP counter hooks those that modules get
    real, fake = discriminator(image, made)  # one call, as DDP prepares one backward pass a call
    loss = LOSSES[config.loss][0](real, fake)
    metrics = {"discriminator": loss.detach(), "real": real.detach().mean(), "fake": fake.detach().mean()}
    if config.r1:
        penalty = gradient_penalty(real, image)
        loss = loss + config.r1 / 2 * penalty
        metrics["r1"] = penalty.detach()
    if config.lecam:
        anchors: Tensor = _anchors(bare(discriminator))
        pull = lecam(real, fake, anchors.clone())
        loss = loss + config.lecam * pull
        metrics["lecam"] = pull.detach()
        with torch.no_grad():
            now = over_ranks(torch.stack([metrics["real"], metrics["fake"]]).float(), "mean")
            anchors.lerp_(now, 1 - ANCHOR_DECAY)
    return loss, metrics


def _anchors(discriminator: PatchDiscriminator) -> Tensor:
    return discriminator.anchors
