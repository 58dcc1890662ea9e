"""The filter by a CLIP: the same number in every process, and another build for other weights."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.reader import ShardReader
from ldm.cli.data import app
from ldm.cli.data.similarity import ClipSimilarity
from ldm.images import to_tensor
from ldm.pipeline import Companions


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} square\na circle")
    return folder


def test_it_is_the_best_cosine(models: dict[str, Path]) -> None:
    similarity = ClipSimilarity.of(str(models["contrastive"]))
    clip, image = Companions.load(clip=models["contrastive"]).clip, Image.new("RGB", (16, 16), "red")
    seen = clip.image(to_tensor(image)[None])
    each = [(clip.text.features(clip.text.tokenize([word])) @ seen[0]).item() for word in ("a red square", "fog")]
    assert similarity(image, ("a red square", "fog")) == pytest.approx(max(each), abs=1e-6)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_build_turns_away_what_fits_badly(workers: str, models: dict[str, Path], tmp_path: Path) -> None:
    run, source = str(models["contrastive"]), pictures(tmp_path / "pictures")
    similarity = ClipSimilarity.of(run)
    values = {
        name: similarity(Image.open(source / f"{name}.png"), (f"a {colour} square", "a circle"))
        for name, colour in (("a", "red"), ("b", "blue"), ("c", "green"))
    }
    low, _, high = sorted(values.values())
    assert low < high
    words = [str(source), str(tmp_path / "out"), f"filters.min_similarity={(low + high) / 2}", "--workers", workers]
    result = CliRunner().invoke(app, ["build", *words, "--clip", run])
    assert result.exit_code == 0, result.output
    kept = {key.partition("-")[0] for key in (s.key for s in map(ShardReader(tmp_path / "out").__getitem__, range(1)))}
    assert kept <= {name for name, value in values.items() if value >= (low + high) / 2} and kept
    with torch.no_grad():
        again = CliRunner().invoke(app, ["build", *words])
    assert "different build (similarity" in str(again.exception)
