"""All that `ldm generate` is to do, found out before any weights are read, and the doing of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ldm.cli import loading, replay, wishes
from ldm.cli.drawing import Album, Preview, drawn
from ldm.cli.memory import check_activations
from ldm.cli.options import Asked, Drawing, Models
from ldm.cli.pictures import Pictures
from ldm.cli.sheets import Axis, cells, sheets

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Request

SHOWN = 64
"""Pictures of a contact sheet: as many as one can look at; the rest are in their files."""


@dataclass(frozen=True)
class Plan:
    """What to load and what to draw with it.

    batches and requests: the same work, as options and as the pipeline is asked. library: adapters by name. files: for
    each batch the fingerprints of all that it is made from. wanted: images of a cell. again: the picture whose batch
    this is.
    """

    models: Models
    device: str
    batches: Sequence[wishes.Batch]
    requests: Sequence["Request"]
    library: Mapping[str, Path]
    files: Sequence[Mapping[str, str]]
    along: Sequence[Axis] = ()
    wanted: int = 0
    again: Path | None = None


def planned(
    models: Models, drawing: Drawing, pictures: Pictures, asked: Asked, along: Sequence[Axis], again: Path | None
) -> Plan:
    """The plan for these options; `again`: to draw that picture in its own batch, whatever else is asked.

    Raises ValueError for all that can be seen to be wrong without the model.
    """
    if not models.model:
        raise ValueError("say what to draw with: MODEL, a run or model folder, a folder of diffusers, or a file")
    device = loading.chosen_device(models.device)
    pictures.check_files()
    library = loading.adapters(models)
    batch = None if again is None else replay.recorded_batch(again, drawing, pictures)
    wanted = []
    if batch is None:
        wanted = loading.with_adapters(wishes.wishes(asked, drawing, pictures), models)
    batches = wishes.batches(cells(wanted, along)) if batch is None else [batch]
    adapters = [loading.asked_for(some, library) for some in batches]
    requests = wishes.requests(batches)
    models = replay.resolved(models)
    files = replay.fingerprints(
        [replay.files_of(models, b.pictures, own) for b, own in zip(batches, adapters, strict=True)]
    )
    return Plan(models, device, batches, requests, library, files, along, len(wanted), again if batch else None)


def carry_out(plan: Plan, out: Path, preview: int) -> Iterator[Path]:
    """Draw, and write into `out`: every picture, then sheets of several. -> the files, as they come to be.

    preview: show every so many steps in OUT/preview.png; 0 is never. Raises ValueError for what the model cannot do,
    before anything is drawn or written.
    """
    models, device, first = plan.models, plan.device, plan.batches[0]
    if plan.again is not None:
        replay.as_then(plan.again, plan.files[0], device)
    pipeline = loading.load(models, device, plan.library, plain=first.drawing.plain)
    for line in loading.token_counts(pipeline, plan.batches):
        typer.echo(line, err=True)
    networks = first.pictures.networks(device)
    requests = wishes.completed(plan.requests, plan.batches, pipeline, networks)
    for request in requests:
        check_activations(pipeline, request, device, low_memory=models.low_memory)
    look = Preview(pipeline, out / "preview.png", preview) if preview else None
    stream = drawn(pipeline, requests, look)  # checks the rest
    album, shown = Album(out), list["Image.Image"]()
    for batch, request, files, images in zip(plan.batches, requests, plan.files, stream, strict=True):
        for row in batch.kept:
            record = replay.record_of(models, batch, row, files, device)
            yield album.add(images[row], pipeline.settings(request, row), record)
            shown += [images[row]] if plan.along or len(shown) < SHOWN else []
    settings = pipeline.settings(requests[0], first.kept[0])
    for sheet in _sheets(plan, shown):
        yield album.add_sheet(sheet, settings | _script(plan.along))


def _sheets(plan: Plan, shown: Sequence["Image.Image"]) -> list["Image.Image"]:
    """Of a grid its sheets; else, of several pictures of one size, one sheet: images of a prompt in a row."""
    from ldm.images import grid

    if plan.along:
        return sheets(shown, plan.along, plan.wanted)
    if len(shown) < 2 or len({picture.size for picture in shown}) > 1:
        return []
    prompts = [prompt for batch in plan.batches for prompt in batch.prompts]
    count = next((k for k, prompt in enumerate(prompts) if prompt != prompts[0]), len(prompts))
    return [grid(shown, count if 1 < count <= 16 else math.ceil(math.sqrt(len(shown))))]


def _script(along: Sequence[Axis]) -> dict[str, Any]:
    """What AUTOMATIC1111 writes beside such a grid."""
    if not along:
        return {}
    words = {"Script": "X/Y/Z plot"}
    for side, axis in zip("XYZ", along, strict=False):
        words |= {f"{side} Type": axis.key, f"{side} Values": ", ".join(axis.values)}
    return words
