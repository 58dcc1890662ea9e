"""The text encoder's own stage: contrastive language-image training (Radford et al. 2021, Zhai et al. 2023)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.evaluation.retrieval import number, recall
from ldm.models.clip import CLIP, ImageConfig, ImageEncoder
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.text_record import text_record
from ldm.names import known
from ldm.nn.transfer import to_device
from ldm.training.gathering import gather, processes
from ldm.training.tasks import Metrics, Task, TaskConfig, bare


@dataclass(frozen=True)
class ContrastiveTaskConfig(TaskConfig):
    """Both towers, the loss, and how much of a batch they read at a time."""

    kind: str = "contrastive"
    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    loss: str = "clip"  # clip: which of the batch belong together | siglip: of each pair, whether it does
    micro_batch: int = 0  # samples that a process reads at a time; 0 = all. Saves memory, changes no loss or gradient

    def __post_init__(self) -> None:
        known("task.loss", self.loss, ("clip", "siglip"))
        if self.micro_batch < 0:
            raise ValueError(f"task.micro_batch must not be negative, not {self.micro_batch}")


class ContrastiveTask(Task):
    """Trains a CLIP: each sample's negatives are all others of the global batch, on whatever process they are."""

    trained = ("clip",)
    whole = True

    def __init__(self, config: ContrastiveTaskConfig, *, size: int, seed: int) -> None:
        super().__init__()
        if size != config.image.size:
            raise ValueError(f"task.image.size is {config.image.size}, but the pictures are {size} px")
        self.config, self.size, self.seed = config, size, seed
        text = TextEncoder(config.text)
        self.tokenize = text.tokenize
        self.clip = CLIP(text, ImageEncoder(config.image), sigmoid=config.loss == "siglip")

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        device = batch.image.device
        bare(self.clip).bound()
        ids = to_device(self.tokenize(batch.captions), device)
        image, text, scale = self.clip(batch.image, ids, self.config.micro_batch)
        # Every process has its own rows against all columns; DDP's mean of their gradients is that of the whole batch.
        loss = self._loss((image, text), (gather(image), gather(text)), scale, processes()[0] * len(batch))
        labels = to_device(torch.tensor(number(batch.captions)[1]), device)
        nearest = (image.detach() @ text.detach().T).argmax(dim=1)
        accuracy = (labels[nearest] == labels).float().mean()
        yield "clip", loss, {"loss": loss.detach(), "scale": scale.detach(), "accuracy": accuracy}

    def validate(self, batch: Batch) -> Metrics:
        """The loss, and recall, among the samples of the batch; so the names of the numbers say how many those are."""
        device = batch.image.device
        image, text, scale = self.clip(batch.image, self.tokenize(batch.captions).to(device), self.config.micro_batch)
        different, labels = number(batch.captions)
        first = torch.tensor([batch.captions.index(caption) for caption in different], device=device)
        label = torch.tensor(labels, device=device)
        found = {f"{name} of {len(batch)}": v for name, v in recall(image, text[first], label).items()}
        accuracy = (label[(image @ text.T).argmax(dim=1)] == label).float().mean()
        return {"loss": self._loss((image, text), (image, text), scale, 0), "accuracy": accuracy, **found}

    def preview(self, batch: Batch) -> None:
        return None

    def components(self) -> dict[str, nn.Module]:
        clip: CLIP = bare(self.clip)
        return {"text": clip.text, "image": clip.image}

    def settings(self) -> dict[str, object]:
        clip: CLIP = bare(self.clip)
        record = {"size": self.size, "loss": self.config.loss, "text": text_record(clip.text)}
        record |= {name: float(p.detach()) for name, p in clip.named_parameters(recurse=False)}  # temperature and bias
        return record

    def _loss(self, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scale: Tensor, start: int) -> Tensor:
        """Of (image, text) features [B, D] against all, [N, D] each, of which `start` is the first row's own column."""
        own = torch.arange(len(rows[0]), device=scale.device) + start
        to_text = scale * rows[0] @ columns[1].T  # [B, N]
        if self.config.loss == "siglip":
            return siglip_loss(to_text + bare(self.clip).logit_bias, own)
        return clip_loss(to_text, scale * rows[1] @ columns[0].T, own)


def clip_loss(to_text: Tensor, to_image: Tensor, own: Tensor) -> Tensor:
    """Cross-entropy of pictures among captions and of captions among pictures (Radford et al. 2021, fig. 3).

    Logits [B, N] of the pairs of B samples with all N; own [B]: which of the columns belongs to each row.
    """
    return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2


def siglip_loss(logits: Tensor, own: Tensor) -> Tensor:
    """-log sigmoid(z * logit), z = 1 for a pair and else -1, the sum over a row, the mean of rows (Zhai et al. 2023).

    Eq. 1 there. Logits [B, N], with their bias; own [B] as in `clip_loss`.
    """
    pair = own[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return -F.logsigmoid(torch.where(pair, logits, -logits)).sum(dim=1).mean()
