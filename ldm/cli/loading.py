"""What `ldm generate` loads, and what it finds out before it does."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.memory import check_weights
from ldm.cli.options import Drawing, Models
from ldm.cli.wishes import Batch, Wish, named, tagged, there

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


def chosen_device(device: str) -> str:
    """The device's name; "auto" is a GPU if there is one. Raises ValueError for a GPU that is not there."""
    import torch

    gpu = torch.cuda.is_available()
    if device.startswith("cuda") and not gpu:
        raise ValueError(f"--device {device}: there is no such GPU here; give cpu, or auto")
    return ("cuda" if gpu else "cpu") if device == "auto" else device


def adapters(models: Models) -> dict[str, Path]:
    """By the names that prompts call them, the adapters that were given.

    Raises ValueError for files and folders that are not there, and for two of one name.
    """
    from ldm.adapters.library import adapters_in

    for file in models.embeddings:
        there(Path(file), "textual inversion")
    found = adapters_in(models.loras) if models.loras else {}
    for name, (path, _) in named(models.lora).items():
        if name in found and found[name].resolve() != path.resolve():
            raise ValueError(f"{found[name]} and {path} are two adapters of one name")
        found[name] = path
    return found


def with_adapters(wanted: Sequence[Wish], models: Models) -> list[Wish]:
    """Every prompt asking for what --lora gives; but for plain ones, which ask for nothing."""
    found = list(wanted)
    for name, (_, weight) in named(models.lora).items():
        found = [w if w.drawing.plain else replace(w, prompt=tagged(w.prompt, name, weight)) for w in found]
    return found


def asked_for(batch: Batch, library: Mapping[str, Path]) -> list[Path]:
    """The adapters that the prompts of a batch ask for. Raises ValueError, with the nearest name, for unknown ones."""
    from ldm.names import known
    from ldm.prompts.grammar import parse

    if batch.drawing.plain:
        return []
    parse(batch.drawing.negative, negative=True)
    names = dict.fromkeys(tag.name for prompt in batch.prompts for tag in parse(prompt).adapters)
    if names and not library:
        raise ValueError(
            f"the prompt asks for the adapter {next(iter(names))!r}, and none was given: --loras FOLDER or --lora FILE"
        )
    return [library[known("adapter", name, library)] for name in names]


def load(models: Models, device: str, library: Mapping[str, Path], *, plain: bool) -> "Pipeline":
    """The pipeline with all that goes with it, once there is room for it. Raises ValueError for what does not fit."""
    from ldm.adapters.textual_inversion import load_embeddings
    from ldm.diffusion.prediction import PREDICTIONS
    from ldm.names import known
    from ldm.pipeline import Companions, Pipeline

    if models.prediction:
        known("prediction", models.prediction, PREDICTIONS)
    dtype = models.torch_dtype()
    check_weights(models, device)
    pipeline = Pipeline.load(
        models.model,
        device,
        prediction=models.prediction or None,
        ema=models.ema,
        dtype=dtype,
        low_memory=models.low_memory,
    )
    companions = Companions.load(
        models.weak, models.classifier, models.clip, device=device, diffusion=pipeline.diffusion
    )
    if models.refiner:
        refiner = Pipeline.load(models.refiner, device, dtype=dtype, low_memory=models.low_memory)
        companions = replace(companions, refiner=refiner)
    pipeline.companions = companions
    if library:
        pipeline.adapters = dict(library)
    for path, weight in named(models.lora).values() if plain else ():
        pipeline.attach(path, weight)
    for file in models.embeddings:
        load_embeddings(pipeline.text, file)
    return pipeline


def token_counts(pipeline: "Pipeline", batches: Sequence[Batch]) -> list[str]:
    """A line for each distinct prompt: how many tokens it has, of how many that its chunks can hold.

    Of one that changes from step to step the most at any step. Plain prompts are one chunk, of which the rest is cut.
    A word that the adapters of a batch bring is as many tokens as it has vectors; a negative counts as in the first
    batch that has it. Raises ValueError for adapters that do not fit.
    """
    from ldm.prompts.encode import token_count
    from ldm.prompts.grammar import parse

    def counted(prompt: str, negative: bool, drawing: Drawing) -> str:
        if drawing.plain:
            texts: tuple[str, ...] = (re.sub(r"([()\[\]\\])", r"\\\1", prompt).replace("BREAK", "break"),)
        else:
            texts = parse(prompt, negative=negative).texts(drawing.steps)
        used, capacity = max(token_count(pipeline.text, text) for text in texts)
        room = token_count(pipeline.text, "")[1]
        cut = f"; what comes after the first {room} is cut" if drawing.plain and used > room else ""
        return f"{used}/{room if cut else capacity} tokens{cut}: {prompt}" if capacity else ""

    lines: dict[tuple[str, bool], str] = {}
    for batch in batches:
        asked = () if batch.drawing.plain else parse(batch.prompts[0]).adapters  # which all of a batch share
        with pipeline.library.teaching(tuple((tag.name, tag.weight) for tag in asked)):
            for told in (*((prompt, False) for prompt in batch.prompts), (batch.drawing.negative, True)):
                if told[0] and told not in lines:
                    lines[told] = counted(*told, batch.drawing)
    return [line for line in lines.values() if line]
