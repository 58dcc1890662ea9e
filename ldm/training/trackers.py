"""A run's numbers and previews in TensorBoard, W&B and the like: a thin layer over what accelerate knows of them."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

PROJECT = "ldm"


def start_trackers(accelerator: Any, out: Path, step: int, settings: Mapping[str, Any]) -> None:
    """Start the trackers that the accelerator was made with, at `step` of the run in `out`; every process calls it.

    TensorBoard's files go to `out/ldm`; what they hold of later steps, which a resumed run does again, is hidden. In
    W&B each start is a run of its own in the project "ldm", and all starts of a run form a group.
    settings: by dotted name. Raises ValueError for a tracker that does not start.
    """
    own = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": out.name, "group": out.name, "dir": str(out)},
    }
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=own)
    except Exception as error:  # of any kind: it comes from the tracker's package, or from its server
        raise ValueError(f"trackers: one does not start ({' '.join(str(error).split())}); leave it out") from error
    if not accelerator.is_main_process:
        return
    simple = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings.items()}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # whose hyper-parameters would be another run beside this one
            tracker.log({"config": "\n".join(f"    {k}: {v}" for k, v in simple.items())}, step=step)
        else:
            tracker.store_init_configuration(simple)


def track(accelerator: Any, kind: str, step: int, numbers: Mapping[str, Any]) -> None:
    """The numbers of a step, each as kind/name; for the main process, as the next one."""
    plain = {f"{kind}/{name}": value for name, value in numbers.items() if isinstance(value, int | float)}
    for tracker in accelerator.trackers:
        _bear(tracker, lambda: tracker.log(plain, step=step))  # noqa: B023 (called at once)


def track_picture(accelerator: Any, step: int, picture: Image.Image) -> None:
    """A preview, for TensorBoard and W&B."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(picture.convert("RGB"))[None]  # [1, H, W, 3]
            _bear(tracker, lambda: tracker.log_images({"preview": pixels}, step=step, dataformats="NHWC"))  # noqa: B023
        elif tracker.name == "wandb":
            _bear(tracker, lambda: tracker.log_images({"preview": [picture]}, step=step))  # noqa: B023


def stop_trackers(accelerator: Any) -> None:
    """Have every tracker write what it still holds."""
    for tracker in accelerator.trackers:
        _bear(tracker, tracker.finish)


def _bear(tracker: Any, call: Callable[[], object]) -> None:
    """Whatever goes wrong in a tracker, a server that is away or a disk that is full, does not end the training."""
    try:
        call()
    except Exception as error:
        log.warning("tracker %s: %s; going on", tracker.name, " ".join(str(error).split()) or type(error).__name__)
