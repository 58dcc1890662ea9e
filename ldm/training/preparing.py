"""What a fine-tuning run stands on besides its model, made before it begins: shards, drawn pictures, latents."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from data_pipeline import shards
from data_pipeline.config import DataConfig
from data_pipeline.loader import fixed_batch, open_data
from data_pipeline.precompute import CacheKey
from data_pipeline.prepare import PrepareConfig, prepare_folder
from data_pipeline.reader import ShardReader
from ldm.checkpoints.load import load_model
from ldm.checkpoints.textual_inversion import WORD
from ldm.models.autoencoder import AutoencoderKL
from ldm.pipeline.inputs import kind_of
from ldm.training.drawn import DrawnConfig, draw
from ldm.training.finetuning import PARTS
from ldm.training.latents import encode, key_of
from ldm.training.methods import FinetuningTaskConfig

log = logging.getLogger(__name__)

KEPT = 16
"""Pictures that the base model draws before the training, to tell afterwards what it has forgotten."""


@dataclass(frozen=True)
class Subject:
    """What is learned. pictures: a folder of them, or of shards; caption: of those that have none.

    conditions, masks, holdout: see PrepareConfig. class_prompts: what the subject is one of, and whatever else is not
    to be forgotten; class_pictures in all are drawn, or those of class_folder taken, and trained on as often as the
    subject (Ruiz et al. 2023, eq. 2). unrelated: prompts of what is watched for being forgotten.
    """

    pictures: str
    caption: str = ""
    conditions: str = ""
    masks: str = ""
    holdout: float | None = None
    class_prompts: tuple[str, ...] = ()
    class_pictures: int | None = None  # as many as prompts, and 100 at least
    class_folder: str = ""
    unrelated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        prompts, pictures = len(self.class_prompts), self.class_pictures
        if pictures is not None and (self.class_folder or not prompts):
            raise ValueError("class pictures are how many the model draws of class prompts: give those, and no folder")
        if pictures is not None and pictures < prompts:
            raise ValueError(f"{prompts} class prompts take {prompts} class pictures or more, not {pictures}")
        if self.class_folder and not Path(self.class_folder).is_dir():
            raise ValueError(f"the class folder {self.class_folder} is no folder")
        if self.class_folder and len(self.class_prompts) > 1:
            raise ValueError("of a class folder one class prompt is the caption of pictures without: give one at most")
        if self.has_class and (self.masks or self.conditions):
            raise ValueError("masks and conditions are of the subject alone: leave them out, or the class")

    @property
    def has_class(self) -> bool:
        """Whether pictures of its class are trained on beside it."""
        return bool(self.class_prompts or self.class_folder)


def prepare(subject: Subject, data: DataConfig, batch_size: int, out: Path) -> tuple[DataConfig, str]:
    """The subject's pictures as shards in `out/data` -> how a run reads them, and the shards held out, or "".

    Raises ValueError for a folder that cannot be trained on.
    """
    assert data.size is not None
    config = PrepareConfig(
        size=data.size,
        keep_shape=_keeps_shape(data),
        caption=subject.caption,
        conditions=subject.conditions,
        masks=subject.masks,
        holdout=subject.holdout,
        workers=data.workers,
    )
    prepared = prepare_folder(subject.pictures, out / "data", config)
    left_out = ", ".join(f"{count} {reason}" for reason, count in prepared.rejected.items())
    log.info("%d pictures to train on%s", sum(prepared.samples), f"; left out: {left_out}" if left_out else "")
    found = replace(data, path=list(prepared.folders), repeats=prepared.repeats_for(batch_size))
    if subject.conditions:
        found = replace(found, condition="stored")
    if subject.masks:
        found = replace(found, mask="stored")
    return found, prepared.validation


def with_class(subject: Subject, model: str, data: DataConfig, out: Path, guidance: float) -> DataConfig:
    """The data with as many samples of the subject's class in every even batch, given or drawn by the model itself."""
    if not subject.has_class:
        return data
    assert data.size is not None
    if subject.class_folder:
        caption = subject.class_prompts[0] if subject.class_prompts else ""
        holdout = None if Path(subject.class_folder, shards.INDEX).is_file() else 0  # of finished shards none is asked
        config = PrepareConfig(data.size, _keeps_shape(data), caption, holdout=holdout, workers=data.workers)
        try:
            found = prepare_folder(subject.class_folder, out / "class", config)
        except ValueError as error:
            raise ValueError(f"the class folder: {error}") from error
        paths, repeats = found.folders, found.repeats
    else:
        count = subject.class_pictures or max(100, len(subject.class_prompts))
        drawn = DrawnConfig(model, subject.class_prompts, count, data.size, guidance=guidance)
        log.info("drawing %d pictures of %s", drawn.count, _listed(drawn.prompts))
        paths, repeats = (draw(drawn, out / _named("class", drawn)),), (1.0,)
    often = _epoch(data.paths, data.repeats) / _epoch(paths, repeats)
    return replace(
        data,
        path=[*data.paths, *paths],
        repeats=(*data.repeats, *(float(Fraction(r) * often) for r in repeats)),
        prior=(False,) * len(data.paths) + (True,) * len(paths),
    )


def forgetting(subject: Subject, model: str, size: int, out: Path, guidance: float) -> str:
    """Shards of what the base model draws of unrelated prompts."""
    log.info("drawing %d pictures of unrelated prompts", KEPT)
    drawn = DrawnConfig(model, subject.unrelated, KEPT, size, guidance=guidance)
    return draw(drawn, out / _named("kept", drawn))


def kind_of_base(model: str) -> str:
    """What the model is shown besides latents: see `kind_of`. Raises ValueError for one that cannot be tuned."""
    found = load_model(model, PARTS)
    autoencoder, _, denoiser = found.require(*PARTS)
    if (found.folder / WORD).is_file():
        log.warning("%s was taught a word, which is text like any other in this training", found.folder)
    return kind_of(denoiser, autoencoder)


def forgets(task: FinetuningTaskConfig, kind: str) -> bool:
    """Whether the method changes what the base, of that kind, draws of a prompt, and can be asked for that."""
    return task.method in ("full", "adapter") and kind in ("plain", "inpainting")


def captions(data: DataConfig, count: int) -> tuple[str, ...]:
    """The first captions of the data that differ, `count` at most."""
    readers = open_data(data)
    batch = fixed_batch(readers, replace(data, condition="", mask=""), min(64, sum(map(len, readers))))
    return tuple(dict.fromkeys(batch.captions))[:count]


def cached(task: FinetuningTaskConfig, data: DataConfig, out: Path) -> DataConfig:
    """The data with its latents, and what a frozen text encoder says, computed before where that can be.

    It can where a picture is cut in one of few ways, and is seen whole. How long the run is does not matter: it may be
    made longer.
    """
    if not data.crops or data.caches or task.method == "inpainting":
        return data
    autoencoder, text, denoiser = load_model(task.model, PARTS, dtype=torch.float32).require(*PARTS)
    channels = getattr(denoiser.config, "in_channels", 0)
    if not isinstance(autoencoder, AutoencoderKL) or channels > 2 * autoencoder.latent_channels:  # it sees holes
        return data
    varied = bool(data.templates or data.shuffle_tags or data.tag_dropout)
    reads = task.train_text or task.adapter.text or task.word
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = None if varied or reads else text.to(device)
    log.info("encoding the pictures, once%s", "" if encoder is None else ", and their captions")
    caches = []
    for path, reader in zip(data.paths, open_data(data), strict=True):
        alone = replace(data, path=path, repeats=(), weights=(), prior=(), condition="", mask="")
        caches.append(str(out / _named("latents", key_of(reader, alone, autoencoder, encoder))))
        encode(alone, autoencoder.to(device), encoder, caches[-1])
    return replace(data, cache=caches)


def _keeps_shape(data: DataConfig) -> bool:
    """Whether pictures are stored whole: cut into squares they would not do for what the data asks."""
    return data.buckets or data.crops != 1


def _epoch(paths: Sequence[str], repeats: Sequence[float]) -> Fraction:
    """The samples in an epoch of these folders."""
    return sum((Fraction(r) * len(ShardReader(p)) for p, r in zip(paths, repeats, strict=True)), Fraction())


def _listed(prompts: Sequence[str]) -> str:
    shown = ", ".join(map(repr, prompts[:3]))
    return f"{shown} and {len(prompts) - 3} more" if len(prompts) > 3 else shown


def _named(what: str, decisive: DrawnConfig | CacheKey) -> str:
    """The name of a folder, another for other settings: what was made for them does not stand in the way."""
    return f"{what}-{shards.sha256(shards.to_json(asdict(decisive)))[:16]}"
