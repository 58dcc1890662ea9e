"""How well a caption fits its picture, by a CLIP of ours: for the filter of a build."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from ldm.models.clip import CLIP


@dataclass(frozen=True)
class ClipSimilarity:
    """The cosine, -1..1, of a picture and the best of its captions. Travels to worker processes as a path."""

    path: str
    fingerprint: str  # of the weights: other weights, another build

    @classmethod
    def of(cls, path: str) -> "ClipSimilarity":
        """By the CLIP of a run of the contrastive task, or of its model folder. Raises ValueError."""
        from ldm.checkpoints.model import weights_sha256

        clip = _load(path)
        return cls(path, f"{weights_sha256(clip.text)[:16]} {weights_sha256(clip.image)[:16]}")

    def __call__(self, image: Image.Image, captions: tuple[str, ...]) -> float:
        import torch

        from ldm.images import to_tensor
        from ldm.models.clip_score import to_square

        clip = _load(self.path)
        with torch.inference_mode():
            seen = clip.image(to_square(to_tensor(image)[None], clip.image.config.size))
            told = clip.text.features(clip.text.tokenize(list(captions)))
            return float((told @ seen[0]).max())


@lru_cache(maxsize=1)
def _load(path: str) -> "CLIP":
    from ldm.pipeline import Companions

    clip: CLIP = Companions.load(clip=path).clip
    return clip
