"""What a finished fine-tuning run gives to other people: files that their programs read."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.adapters import files
from ldm.adapters.facts import metadata
from ldm.adapters.tuned import ADAPTER, WORD
from ldm.checkpoints import textual_inversion
from ldm.checkpoints.convert import convert
from ldm.checkpoints.files import newest_valid
from ldm.checkpoints.load import base_of
from ldm.training.state import best_checkpoint

log = logging.getLogger(__name__)


def chosen(out: Path) -> Path:
    """The checkpoint of the lowest held-out loss; without held-out pictures the newest. ValueError if there is none."""
    found = best_checkpoint(out) or newest_valid(out / "checkpoints")
    if found is None:
        raise ValueError(f"{out} has no checkpoint yet")
    return found


def share(out: Path, told: Mapping[str, Any]) -> list[Path]:
    """Write `out/shared` from the chosen checkpoint, anew; -> what was written: nothing for a model of its own.

    An adapter for kohya's readers (AUTOMATIC1111, ComfyUI) and for diffusers, a word likewise, a ControlNet for
    diffusers. told: facts of the run by kohya's names, for the adapter's metadata.
    """
    checkpoint, shared = chosen(out), out / "shared"
    base = base_of(checkpoint)
    if base is None:
        return []
    name = out.resolve().name
    if (checkpoint / ADAPTER).is_file():
        adapter = files.read(checkpoint / ADAPTER)
        own = {"title": name, "output_name": name, "new_sd_model_hash": base["sha256"]["denoiser"]}
        strings = metadata(adapter, {**told, **own})
        places = {"kohya": shared / f"{name}.safetensors"}
        if adapter.kind in ("lora", "dora"):  # diffusers has no names for the others
            places["diffusers"] = shared / "diffusers" / files.DIFFUSERS_FILE
        try:
            for dialect, path in places.items():
                files.write(adapter, path, dialect, strings)
        except ValueError as error:  # layers, or a whole network, that other programs do not have
            log.warning("%s: other programs cannot read this adapter; it is written for our own", error)
            shutil.rmtree(shared, ignore_errors=True)
            places = {"native": shared / f"{name}.safetensors"}
            files.write(adapter, places["native"], "native", strings)
        return list(places.values())
    if (checkpoint / WORD).is_file():
        inversion = textual_inversion.read(checkpoint / WORD)
        name = inversion.word.replace("/", "-")
        written = [shared / f"{name}.safetensors", shared / "diffusers" / "learned_embeds.safetensors"]
        textual_inversion.write(inversion, written[0], "native")
        textual_inversion.write(inversion, written[1], "diffusers")
        return written
    target = shared / "diffusers"
    shutil.rmtree(target, ignore_errors=True)
    if base["settings"]["method"] != "controlnet":
        return []
    try:
        convert(checkpoint, target, "diffusers")
    except ValueError as error:
        log.warning("%s: other programs cannot read this ControlNet", error)
        return []
    return [target]
