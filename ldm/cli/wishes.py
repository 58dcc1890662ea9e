"""From what was asked for to single images, and from those to batches that are drawn together."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import Asked, Drawing
from ldm.cli.pictures import Pictures, upscale_of

if TYPE_CHECKING:
    from ldm.checkpoints.model import LoadedModel
    from ldm.pipeline import Pipeline, Request
    from ldm.prompts.library import Line, Wildcards


@dataclass(frozen=True)
class Wish:
    """One image. variation: another seed and how far to go towards its noise. number: k of the k-th of a prompt."""

    drawing: Drawing
    pictures: Pictures
    prompt: str
    seed: int
    variation: tuple[int, float] | None = None
    number: int = 0


@dataclass(frozen=True)
class Batch:
    """Images that are drawn together: the k-th from prompts[k] and seeds[k].

    A picture is the same to the byte when its whole batch is drawn again; in another one torch may sum in another
    order. variation: the seeds of a `Variation`, and its strength. kept: the rows that are wanted.
    """

    drawing: Drawing
    pictures: Pictures
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    variation: tuple[tuple[int, ...], float] | None = None
    kept: tuple[int, ...] = ()


def wishes(asked: Asked, drawing: Drawing, pictures: Pictures) -> list[Wish]:
    """Every image that is asked for, prompt by prompt: of each `count`, the k-th by seed + k.

    With a variation all are by the same seed, and the k-th goes towards the variation's seed + k. Raises ValueError
    for files, styles and wildcards that are not there, and for numbers that cannot be.
    """
    from ldm.pipeline import pairs
    from ldm.prompts.library import Line, expand, read_prompts, read_styles, read_wildcards, styled

    if asked.style and asked.styles is None:
        raise ValueError("--style names one of the --styles of a file; give that as well")
    styles = {} if asked.styles is None else read_styles(asked.styles)
    wildcards = None if asked.wildcards is None else read_wildcards(asked.wildcards)
    lines = [Line(prompt) for prompt in asked.prompts]
    lines += [] if asked.prompts_file is None else read_prompts(asked.prompts_file)
    if not lines:
        raise ValueError("say what to draw: PROMPT..., or a file of prompts: --prompts FILE")
    towards = _towards(asked.variation)
    found = []
    for line in lines:
        said = _as_the_line_says(drawing, line)
        first = asked.seed if line.seed is None else line.seed
        for number, seed in enumerate(pairs([line.prompt], asked.count, first)[1]):
            own = seed if towards is None else first
            prompt, negative = styled(line.prompt, said.negative, asked.style, styles)
            prompt, negative = (_chosen(text, own, wildcards, expand) for text in (prompt, negative))
            variation = None if towards is None else (towards[0] + number, towards[1])
            found.append(Wish(replace(said, negative=negative), pictures, prompt, own, variation, number))
    return found


def batches(wanted: Sequence[Wish]) -> list[Batch]:
    """Neighbours that can be drawn together, in their order, as many at a time as is asked for."""
    found = []
    for _, group in groupby(wanted, _shared):
        alike = list(group)
        size = max(1, alike[0].drawing.batch)  # a batch of 0 is refused when it is requested
        for start in range(0, len(alike), size):
            some = alike[start : start + size]
            towards = [wish.variation for wish in some if wish.variation is not None]
            variation = (tuple(seed for seed, _ in towards), towards[0][1]) if towards else None
            prompts, seeds = tuple(w.prompt for w in some), tuple(w.seed for w in some)
            rows = tuple(range(len(some)))
            found.append(Batch(some[0].drawing, some[0].pictures, prompts, seeds, variation, rows))
    return found


def requests(asked: Iterable[Batch]) -> list["Request"]:
    """What a pipeline is asked for each, as far as it does not depend on the model. Raises ValueError, as it does."""
    from ldm.pipeline import Given

    known: dict[tuple[Pictures, str], Given | None] = {}  # many batches go by one picture
    found = []
    for batch in asked:
        key = batch.pictures, batch.drawing.size
        if key not in known:
            known[key] = batch.pictures.given(*batch.drawing.sides())
        found.append(_request(batch, known[key]))
    return found


def completed(
    wanted: Iterable["Request"], asked: Iterable[Batch], pipeline: "Pipeline", networks: Mapping[str, "LoadedModel"]
) -> list["Request"]:
    """The requests with what depends on the model: an outpainted canvas, a depth and controls, scaled."""
    known: dict[tuple[Pictures, str], dict[str, Any]] = {}
    found = []
    for request, batch in zip(wanted, asked, strict=True):
        key = batch.pictures, batch.drawing.size
        if key not in known:
            known[key] = batch.pictures.complete(request, pipeline, networks)
        found.append(replace(request, **known[key]))
    return found


def named(files: Iterable[str]) -> dict[str, tuple[Path, float]]:
    """--lora FILE[:WEIGHT] -> by the name that prompts call it: the file and its weight, 1 if none is said.

    Raises ValueError for a file that is not there, with the nearest name beside it, and for two of one name.
    """
    found: dict[str, tuple[Path, float]] = {}
    for text in files:
        match = re.fullmatch(r"(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?", text)
        path, weight = Path(match[1] if match else text), float((match and match[2]) or 1)
        there(path, "adapter")
        name = path.stem if path.is_file() else path.name
        if name in found or re.search("[:>]", name):
            raise ValueError(f"--lora {text}: {name!r} is the name of another, or cannot be one in a prompt")
        found[name] = path, weight
    return found


def tagged(prompt: str, name: str, weight: float) -> str:
    """The prompt with <lora:name:weight>, in the place of the tag of that name if it has one."""
    tag = f"<lora:{name}:{weight:g}>"
    whole, count = re.subn(rf"<lora:{re.escape(name)}(?::[^>]*)?>", lambda _: tag, prompt)
    return whole if count else f"{prompt} {tag}"


def there(path: Path, what: str) -> None:
    """Raise ValueError, with the nearest name beside it, unless a file or folder is there."""
    from difflib import get_close_matches

    if path.exists():
        return
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    hint = f", did you mean {str(path.parent / near[0])!r}?" if near else ""
    raise ValueError(f"no {what} at {str(path)!r}{hint}")


def _request(batch: Batch, given: Any) -> "Request":
    from ldm.config import load_config
    from ldm.pipeline import Request, Steering, Variation

    drawing, (width, height) = batch.drawing, batch.drawing.sides()
    if drawing.clip_skip < 0:
        raise ValueError(f"--clip-skip counts from 1, the last layer (0 is the model's own), got {drawing.clip_skip}")
    return Request(
        batch.prompts,
        batch.seeds,
        negative=drawing.negative,
        steps=drawing.steps,
        sampler=drawing.sampler,
        eta=drawing.eta,
        spacing=drawing.spacing or None,
        guidance=drawing.guidance,
        variance=drawing.variance or None,
        steering=load_config(Steering, [], list(drawing.steer)),
        given=given,
        variation=None if batch.variation is None else Variation(*batch.variation),
        upscale=upscale_of(drawing.upscale, drawing.upscale_by, drawing.upscale_strength, drawing.upscale_steps),
        switch=drawing.refiner_switch,
        aesthetic=drawing.scores(),
        width=width,
        height=height,
        batch=drawing.batch,
        clip_skip=drawing.clip_skip - 1 if drawing.clip_skip else None,
        plain=drawing.plain,
    )


def _shared(wish: Wish) -> tuple[Any, ...]:
    """What the images of a batch have in common."""
    from ldm.prompts.grammar import parse

    adapters = () if wish.drawing.plain else tuple(sorted((t.name, t.weight) for t in parse(wish.prompt).adapters))
    return wish.drawing, wish.pictures, adapters, wish.variation and wish.variation[1]


def _towards(text: str) -> tuple[int, float] | None:
    """SEED:STRENGTH; "" is None."""
    if not text:
        return None
    seed, _, strength = text.partition(":")
    try:
        return int(seed), float(strength)
    except ValueError as error:
        raise ValueError(f"--variation must be SEED:STRENGTH, such as 7:0.1, got {text!r}") from error


def _as_the_line_says(drawing: Drawing, line: "Line") -> Drawing:
    """A line of a prompt file goes before the options."""
    said: dict[str, Any] = {
        "negative": line.negative_prompt,
        "steps": line.steps,
        "guidance": line.cfg_scale,
        "sampler": line.sampler_name,
    }
    if line.width is not None or line.height is not None:
        width, height = drawing.sides()
        sides = line.width or width or line.height, line.height or height or line.width
        said["size"] = "{}x{}".format(*sides)
    return replace(drawing, **{name: value for name, value in said.items() if value is not None})


def _chosen(text: str, seed: int, wildcards: "Wildcards | None", expand: Any) -> str:
    return text if wildcards is None else str(expand(text, seed, wildcards))
