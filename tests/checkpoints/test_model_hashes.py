"""What the hash of a model depends on."""

from dataclasses import asdict, dataclass, replace

import torch

from ldm.checkpoints.model import weights_sha256
from ldm.models.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Later(UNetConfig):
    """The configuration of a later version."""

    added: int = 0


def test_a_setting_that_is_not_used_changes_no_hash() -> None:
    unet = UNet(UNetConfig(channels=8, multipliers=(1, 2), depths=(0, 1), norm_groups=4, heads=2))
    before = weights_sha256(unet)
    unet.config = Later(**asdict(unet.config))
    assert weights_sha256(unet) == before
    unet.config = replace(unet.config, added=1)
    used = weights_sha256(unet)
    unet.config = replace(unet.config, added=0, heads=4)
    other = weights_sha256(unet)
    with torch.no_grad():
        unet.conv_in.bias[0] += 1
    assert len({before, used, other, weights_sha256(unet)}) == 4
