"""What a run is told that cannot be, in one line each, before any work."""

from typing import TYPE_CHECKING

from data_pipeline.loader import Loader
from data_pipeline.samples import STORED
from ldm.training.denoising import LatentTask
from ldm.training.finetuning import FinetuningTask
from ldm.training.latents import check_cache
from ldm.training.methods import PICTURE
from ldm.training.tasks import Task

if TYPE_CHECKING:
    from ldm.training.run import RunConfig


def check_finetuning(config: "RunConfig", task: Task) -> None:
    """Raise ValueError for settings of the run that do not go with a fine-tuning task."""
    kept = any(config.data.prior)
    if not isinstance(task, FinetuningTask):
        if kept:
            raise ValueError("data.prior marks what a model that is fine-tuned knows: it is for task.kind=finetuning")
        return
    if not kept and (task.config.prior, task.config.prior_weight) != (PICTURE, 1.0):
        raise ValueError("task.prior and task.prior_weight are of samples that data.prior marks, and there are none")
    held = task.config.held
    if config.init:
        raise ValueError("task.model is what a fine-tuning starts from: leave init= out")
    if held not in ("float32", config.precision):
        raise ValueError(f"task.held={held} needs precision={held}, which computes in that")
    if config.forgetting and task.paired and config.data.condition == STORED:
        raise ValueError("forgetting= holds drawn pictures, which have no others beside them as data.condition=stored")


def check_data(loader: Loader, task: Task) -> None:
    """Raise ValueError where the task cannot learn from such batches."""
    config = loader.config
    if not isinstance(task, LatentTask):
        if config.buckets or config.caches:
            raise ValueError("data.buckets and data.cache are for task.kind=denoising and finetuning")
        return
    multiple = task.autoencoder.factor * getattr(task.denoiser, "factor", 1)
    for width, height in loader.shapes:
        if width % multiple or height % multiple:
            raise ValueError(f"pictures of {width} x {height} px: the sides must be multiples of {multiple}")
    task.check_data(config)
    for cache in loader.caches:
        if task.reads and cache.key.text:
            raise ValueError(
                "task.train_text=true: data.cache holds what the text encoder said before it learned; "
                "make one without --text"
            )
        check_cache(cache, task.autoencoder, task.text)
