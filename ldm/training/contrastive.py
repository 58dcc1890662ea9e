"""The text encoder's own stage: contrastive language-image training (Radford et al. 2021)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.models.clip import CLIP, ImageConfig, ImageEncoder
from ldm.models.text import TextConfig, TextEncoder
from ldm.training.tasks import Metrics, Task, TaskConfig, bare


@dataclass(frozen=True)
class ContrastiveTaskConfig(TaskConfig):
    """Both towers."""

    kind: str = "contrastive"
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)


class ContrastiveTask(Task):
    """Trains a CLIP with open_clip's loss, features gathered over all ranks."""

    trained = ("clip",)

    def __init__(self, config: ContrastiveTaskConfig, *, size: int, seed: int) -> None:
        super().__init__()
        if size != config.image.size:
            raise ValueError(f"task.image.size is {config.image.size}, but the pictures are {size} px")
        self.size, self.seed = size, seed
        text = TextEncoder(config.text)
        self.tokenize = text.tokenize
        self.clip = CLIP(text, ImageEncoder(config.image))

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        from open_clip.loss import ClipLoss

        image, text, scale = self.clip(batch.image, self._ids(batch))
        rank, world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # Every rank computes its own rows against all columns, with gradients through the gathered
        # features; DDP's averaging of the ranks' gradients then gives the loss of the whole batch.
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)(image, text, scale)
        accuracy = self._accuracy(image.detach(), text.detach(), batch.captions)
        yield "clip", loss, {"loss": loss.detach(), "scale": scale.detach(), "accuracy": accuracy}

    def validate(self, batch: Batch) -> Metrics:
        image, text, scale = self.clip(batch.image, self._ids(batch))
        logits = scale * image @ text.T
        labels = torch.arange(len(batch), device=logits.device)
        loss = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
        return {"loss": loss, "accuracy": self._accuracy(image, text, batch.captions)}

    def preview(self, batch: Batch) -> None:
        return None

    def components(self) -> dict[str, nn.Module]:
        clip: CLIP = bare(self.clip)
        return {"text": clip.text, "image": clip.image}

    def settings(self) -> dict[str, object]:
        return {"size": self.size}

    def _ids(self, batch: Batch) -> Tensor:
        return self.tokenize(batch.captions).to(batch.image.device)

    @staticmethod
    def _accuracy(image: Tensor, text: Tensor, captions: list[str]) -> Tensor:
        """Share of pictures whose nearest caption is their own (or one of the same words)."""
        nearest = (image @ text.T).argmax(dim=1).tolist()
        right = [captions[i] == captions[j] for i, j in enumerate(nearest)]
        return torch.tensor(sum(right) / len(right), device=image.device)
