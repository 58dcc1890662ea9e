"""What a finished fine-tuning run gives to other people: files that their programs read."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.adapters import files
from ldm.adapters.adapter import Adapter
from ldm.adapters.bundled import word_in
from ldm.adapters.facts import metadata
from ldm.adapters.tuned import ADAPTER
from ldm.checkpoints import textual_inversion
from ldm.checkpoints.convert import convert
from ldm.checkpoints.files import newest_valid, sha256
from ldm.checkpoints.load import base_of
from ldm.checkpoints.textual_inversion import TextualInversion
from ldm.training.state import best_checkpoint

log = logging.getLogger(__name__)


def chosen(out: Path) -> Path:
    """The checkpoint of the lowest held-out loss; without held-out pictures the newest. ValueError if there is none."""
    found = best_checkpoint(out) or newest_valid(out / "checkpoints")
    if found is None:
        raise ValueError(f"{out} has no checkpoint yet")
    return found


def share(out: Path, told: Mapping[str, Any]) -> list[Path]:
    """Write `out/shared` from the chosen checkpoint, anew; -> what was written: of a whole model only its word.

    An adapter for kohya's readers (AUTOMATIC1111, ComfyUI), with its word in it, and for diffusers; a word likewise, by
    itself; a ControlNet for diffusers. told: facts of the run by kohya's names, for the adapter's metadata; to them
    comes the hash of the base's file, which programs know it by, where it is one file.
    """
    checkpoint, shared = chosen(out), out / "shared"
    base = base_of(checkpoint)
    shutil.rmtree(shared, ignore_errors=True)
    name, written = out.resolve().name, []
    words = word_in(checkpoint)
    if base is not None and (checkpoint / ADAPTER).is_file():
        adapter = replace(files.read(checkpoint / ADAPTER), words=words)
        own = {"title": name, "output_name": name}
        if (model := Path(base["model"])).is_file():
            own["new_sd_model_hash"] = sha256(model)
        written += _share_adapter(adapter, shared, name, metadata(adapter, {**told, **own}))
    for word, vectors in words.items():
        written += _share_word(TextualInversion(word, vectors), shared)
    if written or base is None:
        return written
    target = shared / "diffusers"
    if base["settings"]["method"] != "controlnet":
        return []
    try:
        convert(checkpoint, target, "diffusers")
    except ValueError as error:
        log.warning("%s: other programs cannot read this ControlNet", error)
        return []
    return [target]


def _share_word(inversion: TextualInversion, shared: Path) -> list[Path]:
    """For AUTOMATIC1111 and ComfyUI, and for diffusers."""
    places = {"native": textual_inversion.place_of(inversion.word, shared)}
    places["diffusers"] = shared / "diffusers" / "learned_embeds.safetensors"
    for dialect, path in places.items():
        textual_inversion.write(inversion, path, dialect)
    return list(places.values())


def _share_adapter(adapter: Adapter, shared: Path, name: str, strings: Mapping[str, str]) -> list[Path]:
    """In every dialect that has words for it; where none has, in our own."""
    places = {"kohya": shared / f"{name}.safetensors"}
    if adapter.kind in ("lora", "dora"):  # diffusers has no names for the others
        places["diffusers"] = shared / "diffusers" / files.DIFFUSERS_FILE
    written = []
    for dialect, path in places.items():
        try:
            alone = dialect not in files.WITH_WORDS or any(
                "." in word for word in adapter.words
            )  # in names a dot parts
            files.write(replace(adapter, words={}) if alone else adapter, path, dialect, strings)
        except ValueError as error:  # layers, or a whole network, that other programs do not have
            log.warning("%s: programs that read %s cannot read this adapter", error, dialect)
        else:
            written.append(path)
    if not written:
        log.warning("other programs cannot read this adapter; it is written for our own")
        written = [shared / f"{name}.safetensors"]
        files.write(adapter, written[0], "native", strings)
    return written
