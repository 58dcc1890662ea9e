"""What the network is told of the prompts, from step to step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.adapters.library import Wanted
from ldm.diffusion.noise import NoiseLevel
from ldm.nn.offload import at_work
from ldm.pipeline.request import Request
from ldm.prompts.encode import encode, same_length
from ldm.prompts.grammar import parse
from ldm.prompts.schedule import Scheduled, conditions
from ldm.types import Conditioning, Denoiser

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

Place = Callable[[Conditioning], Conditioning]
"""A conditioning to where, and to the type in which, the network computes."""
Sized = Callable[[Conditioning, bool], Conditioning]
"""A conditioning, whether it is the negative -> the same with the sizes that the network is told with it."""


@dataclass(frozen=True)
class Script:
    """Prompts that change from step to step or have several branches, and the negative.

    `told` has a row for each text. Outside the network a conditioning only says which prompt it stands for: an int64
    context [B, 1, 1], i for prompt i of the batch, and below 0 for the negative. So guidance of any kind can go around.
    """

    prompts: Scheduled
    negative: Scheduled | None
    told: Conditioning
    step_of: Callable[[Tensor], Tensor]  # t [B] -> the step of each, int64 [B]

    @classmethod
    def of(cls, prompts: Scheduled, negative: Scheduled | None, levels: NoiseLevel) -> "Script":
        parts = [prompts.told] if negative is None else [prompts.told, negative.told]
        return cls(prompts, negative, Conditioning.cat(same_length(parts)), levels.steps_of)

    def sized(self, change: Sized) -> "Script":
        """With sizes to each text."""
        count = len(_rows(self.prompts.told))
        parts = [change(self.told[:count], False)]
        if self.negative is not None:
            parts.append(change(self.told[count:], True))
        return replace(self, told=Conditioning.cat(parts))

    def conditionings(self, count: int) -> tuple[Conditioning, Conditioning]:
        """Of the `count` prompts, and of the negative; empty if there is none."""
        device = next(v.device for v in (self.told.context, self.told.pooled) if v is not None)
        cond = Conditioning(context=torch.arange(count, device=device)[:, None, None])
        if self.negative is None:
            return cond, Conditioning()
        return cond, Conditioning(context=torch.full((1, 1, 1), -1, device=device))

    def around(self, network: Denoiser) -> Denoiser:
        """The network told texts, for callers that say which prompt: negative + sum of weight * (branch - negative)."""

        def scripted(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            assert cond.context is not None
            numbers, steps = cond.context.flatten().tolist(), self.step_of(t).tolist()
            asked: list[tuple[int, int, float]] = []  # row of x, row of told, share in the result
            for row, (number, step) in enumerate(zip(numbers, steps, strict=True)):
                asked += [(row, text, share) for text, share in self._shares(number, step)]
            rows, texts, shares = zip(*asked, strict=True)
            if len(asked) == len(x):  # one text each
                return network(x, t, self._told(cond, texts))
            index = torch.tensor(rows, device=x.device)
            outputs = network(x[index], t[index], self._told(cond[index], texts))
            weights = torch.tensor(shares, device=x.device, dtype=outputs.dtype).view(-1, 1, 1, 1)
            channels = x.shape[1]
            mixed = x.new_zeros(x.shape).index_add_(0, index, (weights * outputs[:, :channels]).to(x))
            first = [rows.index(row) for row in range(len(x))]  # a learned variance is that of the first branch
            return torch.cat([mixed, outputs[first, channels:].to(x)], dim=1)

        return scripted

    def _shares(self, number: int, step: int) -> list[tuple[int, float]]:
        """(row of told, share in the result) of one image."""
        if number < 0:
            return [(self._negative(step), 1.0)]
        weights = [weights[number] for weights in self.prompts.weights]
        texts = [branch[number] for branch in self.prompts.rows[step]]
        shares = [(text, weight) for text, weight in zip(texts, weights, strict=True) if weight]
        rest = 1 - sum(weights)
        if rest and self.negative is not None:
            shares.append((self._negative(step), rest))
        return shares or [(texts[0], 1.0)]

    def _negative(self, step: int) -> int:
        assert self.negative is not None
        return len(_rows(self.prompts.told)) + self.negative.rows[step][0][0]

    def _told(self, cond: Conditioning, texts: Sequence[int]) -> Conditioning:
        told = self.told[list(texts)]
        return replace(cond, context=told.context, pooled=told.pooled, mask=told.mask, sizes=told.sizes)


@dataclass(frozen=True)
class Telling:
    """What the prompts of some rows of a request say in one pass."""

    cond: Conditioning
    uncond: Conditioning
    script: Script | None = None  # None: the two say it all, at every step

    def sized(self, change: Sized) -> "Telling":
        """With sizes to each text."""
        if self.script is not None:
            return replace(self, script=self.script.sized(change))
        return Telling(change(self.cond, False), change(self.uncond, True))


class Teller:
    """Reads the prompts of a request, each text once.

    place: where conditionings go. null_prompt: what stands for no negative prompt; None is a conditioning of zeros.
    negative: whether guidance needs one.
    """

    def __init__(
        self, text: nn.Module, request: Request, place: Place, null_prompt: str | None, *, negative: bool
    ) -> None:
        self.text, self.request, self.place, self.null_prompt = text, request, place, null_prompt
        self.needs_negative = negative
        self._known: dict[str, Conditioning] = {}

    def __call__(self, rows: slice, levels: NoiseLevel) -> Telling:
        """Of these rows, on these levels."""
        prompts, steps = self.request.prompts[rows], len(levels.t) - 1
        if self.request.plain:
            cond = self._encode(prompts)
            uncond = self._encode([self._negative_text()])[:1] if self.needs_negative else Conditioning()
            return Telling(cond, self._zeroed(uncond))
        told = conditions(self._encode, prompts, steps)
        several = len(told.weights) > 1 or any(weight != 1 for weight in told.weights[0])
        negative = None
        if self.needs_negative or several:
            negative = conditions(self._encode, [self._negative_text()], steps, negative=True)
            negative = replace(negative, told=self._zeroed(negative.told))
        if several or not told.constant or (negative is not None and not negative.constant):
            script = Script.of(told, negative, levels)
            return Telling(*script.conditionings(len(prompts)), script)
        cond = told.at(0)[0][1]
        if negative is None:
            return Telling(cond, Conditioning())
        cond, uncond = same_length([cond, negative.at(0)[0][1]])
        return Telling(cond, uncond)

    def _negative_text(self) -> str:
        return self.request.negative or self.null_prompt or ""

    def _zeroed(self, told: Conditioning) -> Conditioning:
        """Zeros, where that is what the model was trained to see as no prompt."""
        if self.request.negative or self.null_prompt is not None:
            return told
        return told.map(lambda v: torch.zeros_like(v) if v.is_floating_point() else v)

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        read = self.text if self.request.plain else partial(encode, self.text, skip=self.request.clip_skip)
        for start in range(0, len(new), self.request.batch):
            some = new[start : start + self.request.batch]
            with at_work(self.text):
                told = self.place(read(some))
            self._known |= {text: told[i : i + 1] for i, text in enumerate(some)}
        return Conditioning.cat(same_length([self._known[text] for text in texts]))


def sized(denoiser: Any, told: Conditioning, height: int, width: int, aesthetic: float) -> Conditioning:
    """With the sizes of a picture of height x width px, if the denoiser is told any; an empty conditioning stays so.

    As a picture that was never larger, nor cropped (SDXL), or the same with its score in the place of the target's
    size (SDXL's refiner).
    """
    config = getattr(denoiser, "config", None)
    if told.context is None or not getattr(config, "size_dim", 0):
        return told
    told = told.sized(height, width)
    if told.sizes is None or not getattr(config, "aesthetic", False):
        return told
    score = told.sizes.new_full((len(told.sizes), 1), aesthetic, dtype=torch.float32)
    return replace(told, sizes=torch.cat([told.sizes[:, :4], score], dim=1))


def scored(pipeline: "Pipeline") -> bool:
    """Whether the pipeline's denoiser or that of its refiner is told an aesthetic score."""
    refiner = pipeline.companions.refiner
    denoisers = [pipeline.denoiser] if refiner is None else [pipeline.denoiser, refiner.denoiser]
    return any(getattr(getattr(denoiser, "config", None), "aesthetic", False) for denoiser in denoisers)


def wanted_by(request: Request) -> list[Wanted]:
    """The adapters that each prompt of a request asks for."""
    if request.plain:
        return [()] * len(request.prompts)
    read = {prompt: parse(prompt).adapters for prompt in dict.fromkeys(request.prompts)}
    return [tuple((tag.name, tag.weight) for tag in read[prompt]) for prompt in request.prompts]


def _rows(told: Conditioning) -> Tensor:
    found = told.context if told.context is not None else told.pooled
    assert found is not None
    return found
