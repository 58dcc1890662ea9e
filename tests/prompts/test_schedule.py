"""Batches of prompts over the steps: what is said when, how much it counts, and how often it is encoded."""

from collections.abc import Sequence

import pytest
import torch

from ldm.diffusion.guidance import guided
from ldm.prompts.grammar import parse
from ldm.prompts.schedule import conditions
from ldm.types import Conditioning


class Recorder:
    """Rows that can be read back: the number of each text in the order in which it was first seen."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        self.calls.append(list(texts))
        return Conditioning(
            context=torch.arange(float(len(texts)))[:, None, None], mask=torch.ones(len(texts), 1).bool()
        )

    def said(self, cond: Conditioning) -> list[str]:
        assert cond.mask.shape == (len(cond.context), 1)
        return [self.calls[0][int(i)] for i in cond.context.flatten()]


PROMPTS = ["a [b:c:2]:1.5 AND d", "x", "x", "[e|f] AND g:-2 AND h"]


def test_what_each_prompt_says_at_each_step() -> None:
    encode = Recorder()
    found = conditions(encode, PROMPTS, 5)
    assert len(encode.calls) == 1 and len(set(encode.calls[0])) == len(encode.calls[0]) == 8
    assert not found.constant
    for step in range(5):
        told = found.at(step)
        for i, prompt in enumerate(PROMPTS):
            branches = parse(prompt).branches
            for j, (weight, cond) in enumerate(told):
                branch = branches[j] if j < len(branches) else None
                assert weight.shape == (4,) and weight.dtype == torch.float32
                assert weight[i] == (branch.weight if branch else 0)
                if branch:
                    assert encode.said(cond)[i] == branch.at(step, 5)


def test_what_never_changes_is_said_so() -> None:
    encode = Recorder()
    found = conditions(encode, ["a", "(b:1.2)", "a"], 3)
    assert found.constant and encode.calls == [["a", "(b:1.2)"]]
    ((weight, cond),) = found.at(2)
    assert weight.tolist() == [1, 1, 1] and encode.said(cond) == ["a", "(b:1.2)", "a"]
    assert conditions(Recorder(), ["a [b:c:9]"], 3).constant  # would change after the last step


def test_negative_prompts() -> None:
    encode = Recorder()
    found = conditions(encode, ["bad [b:1]:2"], 2, negative=True)
    ((weight, cond),) = found.at(1)
    assert weight.item() == 1 and encode.said(cond) == ["bad b:2"]  # a number at the end is text
    with pytest.raises(ValueError, match="negative prompt"):
        conditions(encode, ["a AND b"], 2, negative=True)


def test_the_sum_over_branches_is_guidance_for_one_branch() -> None:
    """uncond + sum_j weight_j scale (cond_j - uncond), with a network that gives back its context."""
    found = conditions(Recorder(), ["a", "b"], 1)
    uncond, x, t = torch.full((2, 1, 1, 1), 5.0), torch.zeros(2, 1, 1, 1), torch.zeros(2)

    def network(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return cond.context[..., None]

    negative = Conditioning(context=uncond[..., 0], mask=torch.ones(2, 1).bool())
    ((weight, cond),) = found.at(0)
    summed = uncond + weight.view(-1, 1, 1, 1) * 7.0 * (network(x, t, cond) - uncond)
    torch.testing.assert_close(summed, guided(network, negative, 7.0)(x, t, cond))
