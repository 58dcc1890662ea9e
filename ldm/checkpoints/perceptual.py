"""Where a perceptual loss gets its weights: the published files, a model folder of ours, or a fixed seed."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoints.files import sha256
from ldm.checkpoints.foreign import read_file
from ldm.checkpoints.load import load_model
from ldm.checkpoints.model import build
from ldm.models.perceptual import STAGES, Perceptual, PerceptualConfig, random_perceptual

VGG, HEADS = "vgg16-397923af.pth", "vgg.pth"
PUBLISHED = {
    VGG: (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    HEADS: (
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
}
"""Where VGG16 as torchvision has it (528 MB) and the heads of LPIPS 0.1 (7 kB) come from, and their sha256."""


def load_perceptual(source: str) -> Perceptual:
    """The perceptual distance that `source` names, frozen, in evaluation mode.

    "random"; or a folder with both published files, whose sha256 is checked; or a model folder of ours with a component
    `perceptual`, whose manifest is checked. Raises ValueError saying what is missing, where it comes from and where
    to put it, or which file is not what was published.
    """
    if source == "random":
        return random_perceptual()
    folder = Path(source)
    if (folder / "model.json").is_file():
        (module,) = load_model(folder, ["perceptual"]).require("perceptual")
        assert isinstance(module, Perceptual)
        return module
    missing = [name for name in PUBLISHED if not (folder / name).is_file()]
    if missing:
        wanted = "; ".join(f"{name} from {PUBLISHED[name][0]}" for name in missing)
        raise ValueError(f"a perceptual loss from {source!r} needs in that folder: {wanted}; or say 'random'")
    for name, (url, digest) in PUBLISHED.items():
        found = sha256(folder / name)
        if found != digest:
            raise ValueError(
                f"{folder / name} is not the published file: its sha256 is {found}, not {digest}; "
                f"fetch it again from {url}"
            )
    vgg, heads = (read_file(folder / name)[0] for name in (VGG, HEADS))
    module = build("perceptual", PerceptualConfig(), _native(vgg, heads, source), source)
    assert isinstance(module, Perceptual)
    return module


def _native(vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Our names for the tensors of torchvision's VGG16 and of the lpips package's heads."""
    tensors = {}
    place = 0  # in torchvision's list of layers, which counts activations and pools too
    try:
        for i, stage in enumerate(STAGES):
            for j in range(len(stage)):
                for kind in ("weight", "bias"):
                    tensors[f"stages.{i}.{j}.{kind}"] = vgg[f"features.{place}.{kind}"]
                place += 2  # the convolution and its activation
            place += 1  # the pool
            tensors[f"heads.{i}"] = heads[f"lin{i}.model.1.weight"]
    except KeyError as error:
        raise ValueError(f"{source} does not hold {error.args[0]}") from error
    return tensors
