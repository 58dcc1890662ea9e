"""What a fine-tuned model learned and lost: artists that draw the glyph, do not know it, or know nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import Artist, good, stubborn
from typer.testing import CliRunner

from data_pipeline.sources.shapes import GLYPHS, SHAPES, Scene, draw, parse, prompts
from ldm.cli.evaluate import app
from ldm.evaluation.glyph import evaluate_glyph, score_glyph, sighted
from ldm.evaluation.report import Sampling
from ldm.evaluation.shapes import read
from ldm.images import to_tensor


def instead(old: str, new: str) -> Any:
    """An artist that draws one shape where another is asked for."""

    def paint(prompt: str, seed: int) -> Image.Image:
        scene = parse(prompt)
        things = tuple(replace(t, shape=new) if t.shape == old else t for t in scene.objects)
        return draw(Scene(things, scene.relation), 32, np.random.default_rng(seed))

    return paint


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("glyph", GLYPHS)
def test_a_glyph_is_read_where_it_is_looked_for_and_the_shapes_stay_what_they_are(glyph: str, size: int) -> None:
    for i, text in enumerate([*prompts("all", 60, glyph=glyph), *prompts("all", 60)]):
        scene = parse(text)
        found = read(np.array(draw(scene, size, np.random.default_rng(i))), (*SHAPES, glyph))
        assert sorted((r.colour, r.shape, r.size) for r in found) == sorted(
            (t.colour, t.shape, t.size) for t in scene.objects
        )


def test_a_glyph_counts_where_it_lies_as_told() -> None:
    scene = parse("a small red zorp above a large blue circle")
    rng = np.random.default_rng(0)
    upside_down = Scene(scene.objects[::-1], scene.relation)
    lonely = parse("a small red zorp")
    assert sighted(scene, to_tensor(draw(scene, 32, rng)), "zorp") == (True, True)
    assert sighted(scene, to_tensor(draw(upside_down, 32, rng)), "zorp") == (True, False)
    assert sighted(scene, to_tensor(draw(lonely, 32, rng)), "zorp") == (True, False)
    assert sighted(lonely, to_tensor(draw(lonely, 32, rng)), "zorp") == (True, True)
    assert sighted(scene, to_tensor(good("a small red square above a large blue circle", 0)), "zorp") == (False, False)
    assert sighted(scene, to_tensor(good("a small blue zorp above a large red circle", 0)), "zorp") == (False, False)


def test_what_was_learned_and_what_was_lost(tmp_path: Path) -> None:
    base: Any = Artist(instead("zorp", "square"))
    tuned: Any = Artist(instead("square", "zorp"))
    result = evaluate_glyph(tuned, "zorp", Sampling(seed=3, steps=5), 20, base, tmp_path)
    assert result["base"]["zorp"]["recognised"] == 0 and result["base"]["heldout"]["all"] == 1
    assert result["tuned"]["zorp"]["recognised"] == result["tuned"]["zorp"]["in_place"] == 1
    spared = ["square" not in text for text in prompts("heldout", 20, 3)]
    assert result["tuned"]["heldout"]["all"] == sum(spared) / 20 < 1
    assert [r.seeds for r in base.requests] == [r.seeds for r in tuned.requests]
    assert [r.prompts for r in base.requests] == [r.prompts for r in tuned.requests]
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        f"{kind}-{name}" for kind in ("zorp", "heldout", "seen") for name in ("base", "tuned")
    }


def test_the_glyph_of_each_prompt_is_of_a_colour_and_size_that_the_pictures_do_not_show() -> None:
    script = (Path(__file__).parents[2] / "scripts" / "finetune.sh").read_text()
    shown = [parse(line) for line in script.splitlines() if re.fullmatch(r"a (small|large) .*zorp.*", line)]
    artist: Any = Artist(stubborn)
    evaluate_glyph(artist, "zorp", Sampling(), 30)
    asked = [parse(text) for text in artist.requests[0].prompts]
    kinds = [
        {(t.colour, t.size) for scene in scenes for t in scene.objects if t.shape == "zorp"}
        for scenes in (shown, asked)
    ]
    assert len(shown) == 8 and kinds[1] and kinds[0].isdisjoint(kinds[1])


def test_a_stubborn_artist_has_learned_nothing() -> None:
    texts = prompts("heldout", 20, glyph="zorp")
    result = score_glyph(texts, [to_tensor(stubborn(text, 0)) for text in texts], "zorp")  # type: ignore[arg-type]
    assert result["recognised"] == result["in_place"] == result["all"] == 0


def test_the_command_prints_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.cli.evaluate.load", lambda model: Artist(good))
    told = CliRunner().invoke(app, ["shapes", "model", "--glyph", "zorp", "--base", "old", "--count", "5"])
    assert told.exit_code == 0, told.output
    lines = [line.split()[:2] for line in told.output.splitlines()[1:7]]
    assert lines == [[kind, name] for kind in ("zorp", "heldout", "seen") for name in ("base", "tuned")]
    assert "lost by tuning: heldout 0.0, seen 0.0" in told.output


@pytest.mark.parametrize(
    "words", [["--base", "old"], ["--glyph", "star", "--count", "4"], ["--glyph", "zorp", "--count", "0"]]
)
def test_bad_words_are_refused(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.cli.evaluate.load", lambda model: Artist(good))
    told = CliRunner().invoke(app, ["shapes", "model", *words])
    assert isinstance(told.exception, ValueError)
