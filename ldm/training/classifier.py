"""The noisy classifier: told what a noised latent shows, for classifier guidance (Dhariwal and Nichol 2021)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import Batch
from ldm.checkpoints.load import load_model
from ldm.diffusion.noise import NoiseLevel
from ldm.diffusion.process import Diffusion, DiffusionConfig
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.classifier import NoisyClassifier, NoisyClassifierConfig, find_class
from ldm.models.vq import AutoencoderVQ
from ldm.training.randomness import SampleRandomness
from ldm.training.tasks import Metrics, Task, TaskConfig, bare, freeze

QUARTERS = 4
"""Equal parts of the schedule's time, from little noise to much, that are also validated each by itself."""


@dataclass(frozen=True)
class ClassifierTaskConfig(TaskConfig):
    """The classifier, the noise, and where the frozen autoencoder comes from."""

    kind: str = "classifier"
    autoencoder: str = "???"  # model or run folder that has one
    model: NoisyClassifierConfig = field(default_factory=NoisyClassifierConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)  # that of the denoiser it will guide


class ClassifierTask(Task):
    """Trains a classifier on noised latents, each labelled by the class that its caption names first.

    A sample whose caption names none is left out.
    """

    trained = ("classifier",)

    def __init__(self, config: ClassifierTaskConfig, *, size: int, seed: int) -> None:
        super().__init__()
        self.config, self.size, self.seed = config, size, seed
        self.classifier = NoisyClassifier(config.model)
        (autoencoder,) = load_model(config.autoencoder, ["autoencoder"], dtype=torch.float32).require("autoencoder")
        assert isinstance(autoencoder, AutoencoderKL | AutoencoderVQ)
        self.autoencoder = autoencoder
        freeze(autoencoder)
        multiple = autoencoder.factor * self.classifier.factor
        if size % multiple:
            raise ValueError(f"picture size {size} must be a multiple of {multiple}: of the latents, and of task.model")
        if config.model.in_channels != autoencoder.latent_channels:
            raise ValueError(
                f"task.model.in_channels is {config.model.in_channels}; "
                f"the frozen autoencoder needs {autoencoder.latent_channels}"
            )
        side = size // autoencoder.factor
        self.shape = (autoencoder.latent_channels, side, side)
        self.diffusion = Diffusion.from_config(config.diffusion).for_size(side, side)

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Metrics]]:
        """The cross-entropy, nothing for a sample without a class: a mean over all, so that any split adds up.

        Metrics: the share of samples with a class, and that of samples told rightly.
        """
        random = SampleRandomness(self.seed, batch.positions, batch.image.device)
        logits, labels = self._answers(batch, random, self.diffusion.levels(random.uniform("timestep")))
        loss = _cross_entropy(logits, labels).mean()
        metrics = {"labelled": (labels >= 0).float().mean(), "right": (logits.argmax(1) == labels).float().mean()}
        yield "classifier", loss, {"loss": loss.detach(), **metrics}

    def validate(self, batch: Batch) -> Metrics:
        """Cross-entropy and accuracy of the samples with a class, on fixed noise, however training draws its levels.

        Those run from clean to noise evenly in the schedule's time. A quarter without a sample is left away.
        """
        u = (torch.arange(len(batch), device=batch.image.device) + 0.5) / len(batch)
        random = SampleRandomness(self.seed, batch.positions, batch.image.device)
        logits, labels = self._answers(batch, random, self.diffusion.schedule.sample(u))
        loss, right, labelled = _cross_entropy(logits, labels), (logits.argmax(1) == labels).float(), labels >= 0
        groups = {"": labelled}
        groups |= {f"_quarter{i + 1}": labelled & ((u * QUARTERS).long() == i) for i in range(QUARTERS)}
        metrics = {"labelled": labelled.float().mean()}
        for name, group in groups.items():
            if group.any():
                metrics |= {f"loss{name}": loss[group].mean(), f"accuracy{name}": right[group].mean()}
        return metrics

    def preview(self, batch: Batch) -> None:
        return None

    def components(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder, "classifier": bare(self.classifier)}

    def settings(self) -> dict[str, object]:
        return {"size": self.size, "diffusion": asdict(self.config.diffusion)}

    def _answers(self, batch: Batch, random: SampleRandomness, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """The logits [B, classes] for the batch noised to `level` [B], and the labels [B], -1 for none."""
        with torch.no_grad():
            latent = self.autoencoder.encode(batch.image, random.normal("posterior", self.shape))
        x = self.diffusion.add_noise(latent, random.normal("noise", self.shape), level)
        found = [find_class(caption, self.config.model.classes) for caption in batch.captions]
        labels = torch.tensor([-1 if label is None else label for label in found], device=x.device)
        return self.classifier(x, level.t.to(x)), labels


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: -log p(label), 0 where the label is -1."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
