"""Drawing a picture again from what its file says."""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ldm.cli.options import Drawing, Models, recorded
from ldm.cli.pictures import Pictures
from ldm.cli.wishes import Batch, named

log = logging.getLogger(__name__)

WHOLE_BYTES = 2**26
"""Files up to this size are hashed whole; of larger ones so many bytes, in BLOCKS blocks spread over the file."""
BLOCKS = 64
DECIDE = ("prompts", "prompts_file", "seed", "count", "variation", "wildcards", "style", "lora", "batch", "grid")
"""Options that ask for other images than those of the recorded batch."""

PLAIN_KEYS = {
    "Negative prompt": "negative",
    "Steps": "steps",
    "Sampler": "sampler",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Size": "size",
    "Clip skip": "clip_skip",
    "Spacing": "spacing",
    "Hires upscale": "upscale",
    "Hires steps": "upscale_steps",
}
"""Keys of AUTOMATIC1111's parameters and of ours -> the option that says the same."""


def record_of(models: Models, batch: Batch, row: int, files: Mapping[str, str], device: str) -> dict[str, Any]:
    """All that is needed to draw a batch again and take this row of it; as JSON has it."""
    import torch

    return {
        "options": recorded(models, batch.drawing, batch.pictures) | {"device": device},
        "prompts": list(batch.prompts),
        "seeds": list(batch.seeds),
        "variation": None if batch.variation is None else [list(batch.variation[0]), batch.variation[1]],
        "row": row,
        "files": dict(files),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def defaults(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a picture's file says of the options of `ldm generate`, by name, and which of its keys say nothing here.

    Of our pictures all of it, of AUTOMATIC1111's and Forge's what has the same meaning. Raises ValueError for a file
    that is no PNG, and for one that says nothing.
    """
    from ldm.images import read_record, read_settings

    record = read_record(path)
    if record is None:
        settings = read_settings(path)
        if len(settings) < 2:
            raise ValueError(f"{path} does not say how it was drawn: it carries no settings of ours or AUTOMATIC1111's")
        return _meant(settings)
    _check(path, record)
    row = record["row"]
    found = record["options"] | {"prompts": [record["prompts"][row]], "seed": record["seeds"][row], "count": 1}
    if record["variation"] is not None:
        seeds, strength = record["variation"]
        found["variation"] = f"{seeds[row]}:{strength}"
    return {name: value for name, value in found.items() if value not in (None, [])}, []


def recorded_batch(path: Path, drawing: Drawing, pictures: Pictures) -> Batch | None:
    """The batch in which a picture of ours was drawn, to be drawn by these options; None for pictures of others."""
    from ldm.images import read_record

    record = read_record(path)
    if record is None:
        return None
    variation = None if record["variation"] is None else (tuple(record["variation"][0]), record["variation"][1])
    prompts, seeds = tuple(record["prompts"]), tuple(record["seeds"])
    return Batch(drawing, pictures, prompts, seeds, variation, (record["row"],))


def as_then(path: Path, files: Mapping[str, str], device: str) -> None:
    """Compute on as many threads as the picture was drawn by, and warn of what has changed since then."""
    import torch

    from ldm.images import read_record

    record = read_record(path)
    if record is None:
        return
    if device == "cpu":
        torch.set_num_threads(record["threads"])  # sums are split among threads, and so rounded
    changed = [name for name, digest in record["files"].items() if files.get(name, digest) != digest]
    changed += [f"torch ({record['torch']})"] if record["torch"] != torch.__version__ else []
    changed += [f"the device ({record['options']['device']})"] if record["options"]["device"] != device else []
    if changed:
        log.warning("%s will not come out the same: %s changed since it was drawn", path, ", ".join(changed))


def files_of(models: Models, pictures: Pictures, adapters: Iterable[Path]) -> list[Path]:
    """Every file and folder that pictures are made from."""
    words = (models.model, models.weak, models.classifier, models.clip, models.refiner, *models.embeddings)
    own = (path for path, _ in named(models.lora).values())
    return [*(Path(word) for word in words if word), *own, *adapters, *pictures.files()]


def fingerprints(files: Sequence[Sequence[Path]]) -> list[dict[str, str]]:
    """For each list of files their fingerprints by name, each file read once; without what is not there."""
    known = {path: fingerprint(path) for path in dict.fromkeys(path for own in files for path in own)}
    return [{str(path): known[path] for path in own if known[path]} for own in files]


def fingerprint(path: Path) -> str:
    """What changes if the file or folder does: the sha256 of its bytes, of a large file of a sample of them.

    Of a checkpoint of ours that of its manifest, which holds those of all its files; of a run that of its newest one.
    "" if nothing is there.
    """
    from ldm.checkpoints.files import MANIFEST, sha256, steps

    if path.is_file():
        return sha256(path) if path.stat().st_size <= WHOLE_BYTES else _sampled(path)
    if (path / MANIFEST).is_file():
        return sha256(path / MANIFEST)
    if (path / "checkpoints").is_dir() and (newest := steps(path / "checkpoints")):
        return fingerprint(newest[-1])
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path)} {fingerprint(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def _sampled(path: Path) -> str:
    """Its size and blocks at equal distances, the first bytes and the last among them: any training moves all."""
    size, block = path.stat().st_size, WHOLE_BYTES // BLOCKS
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek((size - block) * number // (BLOCKS - 1))
            digest.update(file.read(block))
    return f"sampled {digest.hexdigest()}"


def _check(path: Path, record: Mapping[str, Any]) -> None:
    """Raise ValueError for a record that another version wrote, or that was altered."""
    options = {field.name for part in (Models, Drawing, Pictures) for field in fields(part)}
    keys = {"options", "prompts", "seeds", "variation", "row", "files", "torch", "threads"}
    sound = keys <= record.keys() and isinstance(record["options"], dict) and isinstance(record["files"], dict)
    sound = sound and isinstance(record["prompts"], list) and isinstance(record["seeds"], list)
    sound = sound and isinstance(record["row"], int) and 0 <= record["row"] < len(record["prompts"])
    varied = record.get("variation")
    sound = sound and (varied is None or (len(varied) == 2 and len(varied[0]) == len(record["seeds"])))
    sound = sound and len(record["prompts"]) == len(record["seeds"]) and isinstance(record["threads"], int)
    if not sound or record["options"].keys() - options or record["threads"] < 1:
        raise ValueError(f"{path} has a record of how it was drawn that this version cannot read")


def _meant(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options that parameters stand for, and the keys that stand for none."""
    from ldm.diffusion.samplers.names import SPACING_NAMES, canonical
    from ldm.pipeline.request import UPSCALERS

    rest = dict(settings)
    found: dict[str, Any] = {"prompts": [rest.pop("Prompt", "")]}
    found |= {option: rest.pop(key) for key, option in PLAIN_KEYS.items() if key in rest}
    if "Eta" in rest and canonical(str(found.get("sampler", "ddim")))[0] == "ddim":  # of others it means something else
        found["eta"] = rest.pop("Eta")
    schedule = "".join(filter(str.isalnum, str(rest.get("Schedule type", "")).lower()))
    if schedule in SPACING_NAMES:
        found["spacing"] = SPACING_NAMES[schedule] or ""
        del rest["Schedule type"]
    if {"Variation seed", "Variation seed strength"} <= rest.keys():
        found["variation"] = f"{rest.pop('Variation seed')}:{rest.pop('Variation seed strength')}"
    second = "upscale_strength" if "upscale" in found and "Hires denoising strength" not in rest else "strength"
    for key, option in (("Denoising strength", second), ("Hires denoising strength", "upscale_strength")):
        if key in rest:
            found[option] = rest.pop(key)
    ways = {theirs: ours for ours, theirs in UPSCALERS.items()}
    if rest.get("Hires upscaler") in ways:
        found["upscale_by"] = ways[rest.pop("Hires upscaler")]
    return found, list(rest)


def check_place(models: Models, path: Path) -> None:
    """Raise ValueError, saying which it was, unless the model of a picture that is to be drawn again is there."""
    from ldm.images import read_settings

    if models.model and Path(models.model).exists():
        return
    name = models.model or f"the model {read_settings(path).get('Model', '(which it does not name)')}"
    raise ValueError(f"{path} was drawn with {name}; say where that is: ldm generate MODEL --from {path}")


def resolved(models: Models) -> Models:
    """With the checkpoint itself in the place of a run, whose newest one changes as the run goes on."""
    from ldm.checkpoints.load import find_model

    if not (Path(models.model) / "checkpoints").is_dir():
        return models
    return replace(models, model=str(find_model(models.model)))
