"""What a batch of prompts says at each step of a trajectory, every distinct text encoded once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.prompts.grammar import Branch, parse
from ldm.types import Conditioning

Encode = Callable[[Sequence[str]], Conditioning]
"""N texts with attention weights -> N rows, as `ldm.prompts.encode.encode` of an encoder."""


@dataclass(frozen=True)
class Scheduled:
    """What B prompts say at each step.

    told: a row for each distinct text. rows: by step, by branch (what AND joins), by prompt: the row of its text.
    weights: by branch, by prompt; 0 where a prompt has fewer branches.
    """

    told: Conditioning
    rows: tuple[tuple[tuple[int, ...], ...], ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def constant(self) -> bool:
        """Whether every step says the same."""
        return all(rows == self.rows[0] for rows in self.rows)

    def at(self, step: int) -> tuple[tuple[Tensor, Conditioning], ...]:
        """At `step` in 0..steps-1, of each branch: how much it counts, float32 [B], and its conditioning of B rows.

        Guidance adds them up: uncond + sum of weight * scale * (cond - uncond) (Liu et al. 2022, eq. 11).
        """
        weights = (torch.tensor(weight, device=self._device()) for weight in self.weights)
        return tuple((weight, self.told[list(rows)]) for weight, rows in zip(weights, self.rows[step], strict=True))

    def _device(self) -> torch.device:
        found = self.told.context if self.told.context is not None else self.told.pooled
        return torch.device("cpu") if found is None else found.device


def conditions(encode: Encode, prompts: Sequence[str], steps: int, *, negative: bool = False) -> Scheduled:
    """Read B prompts in AUTOMATIC1111's grammar for `steps` steps; `encode` is called once, with all distinct texts.

    Adapters that they ask for are not looked at: `parse(prompt).adapters`. negative: negative prompts, without AND
    and adapters. Raises ValueError as `parse` and `encode` do.
    """
    read = [parse(prompt, negative=negative).branches for prompt in prompts]
    most = max(map(len, read))
    branches = [[of[i] if i < len(of) else Branch(0.0, of[0].tree) for of in read] for i in range(most)]
    texts = [[[b.at(step, steps) for b in branch] for branch in branches] for step in range(steps)]
    distinct = list(dict.fromkeys(text for step in texts for branch in step for text in branch))
    number = {text: i for i, text in enumerate(distinct)}
    rows = tuple(tuple(tuple(number[text] for text in branch) for branch in step) for step in texts)
    return Scheduled(encode(distinct), rows, tuple(tuple(b.weight for b in branch) for branch in branches))
