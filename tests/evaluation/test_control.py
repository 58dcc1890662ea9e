"""Edges and holes: artists that go by them, that do not, and that go by them wrongly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_report import Artist, good, stubborn
from torch import Tensor, nn
from typer.testing import CliRunner

from data_pipeline.conditions import edges
from data_pipeline.sources.shapes import GRID, SIZES, Object, Scene, caption, compose, draw, paint, parse
from ldm.cli.evaluate import app
from ldm.evaluation import control
from ldm.evaluation.control import (
    Hole,
    dig,
    evaluate_edges,
    evaluate_inpainting,
    followed,
    score_edges,
    score_holes,
)
from ldm.evaluation.report import Sampling
from ldm.evaluation.shapes import Reading, read
from ldm.images import to_tensor
from ldm.pipeline import Request


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, (True, True, True, True)),
        ({"x": 11.9}, (True, True, True, True)),
        ({"x": 12.1}, (False, False, False, False)),
        ({"x": 11.5, "y": 11.5}, (False, False, False, False)),
        ({"shape": "circle"}, (True, False, False, False)),
        ({"size": "small"}, (True, True, False, True)),
        ({"colour": "red"}, (True, True, True, False)),
    ],
)
def test_an_object_follows_its_edges(change: dict[str, Any], right: tuple[bool, ...]) -> None:
    true = Reading("blue", "square", "large", 10.0, 10.0, 9.0, 0.9)
    far = replace(true, x=25.0)
    told = followed(true, [far, replace(true, **change)])
    assert (told.place, told.shape, told.size, told.colour) == right


def test_scores_of_edges_by_hand() -> None:
    def picture(*things: tuple[str, int, int]) -> Tensor:
        objects = tuple(Object(colour, "square", "large") for colour, _, _ in things)
        return to_tensor(paint(objects, [(x, y) for _, x, y in things], GRID))

    real = torch.stack([picture(("red", 1, 9), ("blue", 17, 9)), picture(("green", 9, 9))])
    drawn = torch.stack([picture(("red", 1, 9), ("black", 18, 10)), picture(("green", 13, 9), ("red", 13, 20))])
    assert score_edges(real, real) == {
        "images": 2, "objects": 3, "place": 1.0, "shape": 1.0, "size": 1.0, "colour": 1.0, "count": 1.0,
    }  # fmt: skip
    found = score_edges(real, drawn)
    assert (found["place"], found["shape"], found["colour"], found["count"]) == (2 / 3, 2 / 3, 1 / 3, 1 / 2)


class Obedient(Artist):
    """Draws what the edges are of, if they are given, and else anything of that kind."""

    def __init__(self, real: list[Tensor]) -> None:
        super().__init__(stubborn)
        self.real = real

    def __call__(self, request: Request) -> Tensor:
        self.requests.append(request)
        if not request.controls:
            return torch.stack([to_tensor(stubborn("", 0)) for _ in request.prompts])
        (given,) = request.controls
        known = torch.stack([edges(image) for image in self.real])
        rows = [int((known - hint).abs().flatten(1).sum(1).argmin()) for hint in given.image]
        return torch.stack([self.real[row] for row in rows])


def test_an_obedient_artist_follows_all_edges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real: list[Tensor] = []

    def recorded(scene: Scene, size: int, rng: np.random.Generator) -> Any:
        picture = draw(scene, size, rng)
        real.append(to_tensor(picture))
        return picture

    monkeypatch.setattr(control, "draw", recorded)
    artist: Any = Obedient(real)
    result = evaluate_edges(artist, nn.Identity(), Sampling(seed=2, steps=4), 12, tmp_path)
    for kind in ("heldout", "seen"):
        assert result[kind]["shape"] == result[kind]["count"] == 1.0  # two scenes may differ in their colours alone
        assert result[kind]["chance"]["shape"] < 0.3
    with_edges, without = artist.requests[:2]
    assert with_edges.prompts == without.prompts and with_edges.seeds == without.seeds == tuple(range(2, 14))
    assert json.loads((tmp_path / "scores.json").read_text()) == result


def in_hole(image: Tensor, mask: Tensor, prompt: str, spill: int = 0) -> Tensor:
    """The picture with the object of the prompt that it lacks in the middle of the hole; spill: bytes off elsewhere."""
    present = {reading.colour for reading in read(image * (1 - mask) + mask * 0.9)}
    new = next(thing for thing in parse(prompt).objects if thing.colour not in present)
    rows, columns = (mask[0].amax(dim).nonzero() for dim in (1, 0))
    middle = [float(side[0] + side[-1] + 1) / 2 for side in (columns, rows)]
    half = SIZES[new.size] / 2
    alone = to_tensor(paint((new,), [(middle[0] - half, middle[1] - half)], GRID))  # type: ignore[list-item]
    drawn = torch.where(mask > 0, alone, image)
    drawn[:, 0, 0] -= torch.sign(drawn[:, 0, 0]) * spill / 127.5
    return drawn


def holes(count: int) -> list[Hole]:
    rng = np.random.default_rng(4)
    return [dig(compose(1 + i % 3, "all", rng), GRID, rng) for i in range(count)]


def test_a_hole_hides_one_object_and_nothing_of_the_others() -> None:
    for hole in holes(90):
        left = to_tensor(paint((), [], GRID))
        seen = read(torch.where(hole.mask > 0, left, hole.image))
        others = [thing for thing in hole.scene.objects if thing != hole.new]
        assert sorted((r.colour, r.shape, r.size) for r in seen) == sorted((t.colour, t.shape, t.size) for t in others)
        before = {(r.colour, r.shape) for r in read(hole.image)}
        assert (hole.new.colour, hole.new.shape) not in before and len(before) == len(hole.scene.objects)


def test_scores_of_holes() -> None:
    some = holes(30)
    right = torch.stack([in_hole(h.image, h.mask, caption(h.scene)) for h in some])
    assert set(score_holes(some, right).values()) == {30, 1.0}
    untouched = score_holes(some, torch.stack([h.image for h in some]))
    assert (untouched["one"], untouched["known"], untouched["colour"], untouched["all"]) == (1.0, 1.0, 0.0, 0.0)
    spilled = torch.stack([in_hole(h.image, h.mask, caption(h.scene), spill=1) for h in some])
    assert (score_holes(some, spilled)["known"], score_holes(some, spilled)["all"]) == (0.0, 1.0)


class Filler(Artist):
    """Draws into the hole, or not."""

    def __init__(self, fills: bool) -> None:
        super().__init__(good)
        self.fills = fills

    def __call__(self, request: Request) -> Tensor:
        assert request.given is not None and request.given.mask is not None
        given = zip(request.given.image, request.given.mask, request.prompts, strict=True)
        return torch.stack([in_hole(image, mask, text) if self.fills else image for image, mask, text in given])


def test_inpainting_beside_its_base(tmp_path: Path) -> None:
    tuned: Any = Filler(True)
    base: Any = Filler(False)
    result = evaluate_inpainting(tuned, Sampling(), 12, base, tmp_path)
    assert (result["tuned"]["all"], result["base"]["all"], result["base"]["known"]) == (1.0, 0.0, 1.0)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_inpainting(tuned, Sampling(), 0)


def test_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ldm.cli.evaluate.load", lambda model: Filler(True))
    told = CliRunner().invoke(app, ["inpainting", "model", "--base", "old", "--count", "4"])
    assert told.exit_code == 0, told.output
    assert [line.split()[:2] for line in told.output.splitlines()[1:3]] == [["base", "4"], ["tuned", "4"]]
    told = CliRunner().invoke(app, ["edges", "model", str(tmp_path), "--count", "4"])
    assert isinstance(told.exception, ValueError)
