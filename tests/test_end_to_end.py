"""The demo from nothing to a score, as a user runs it, only shorter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def demo(out: Path) -> str:
    ldm = Path(sys.executable).parent / "ldm"
    environment = os.environ | {"SMOKE": "1", "OUT": str(out), "LDM": str(ldm)}
    done = subprocess.run(
        ["bash", "scripts/demo.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_smoke_demo(tmp_path: Path) -> None:
    said = demo(tmp_path)
    assert said.count("not meant to look like anything") == 2
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 24
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["real"]["all"] == 1.0 and scores["heldout"]["images"] == 8
    assert Image.open(tmp_path / "scores" / "heldout.png").size[0] > 32
    assert {p.name for p in tmp_path.iterdir()} == {"shards", "autoencoder", "clip", "denoiser", "pictures", "scores"}
    for stage in ("autoencoder", "clip", "denoiser"):
        assert len(list((tmp_path / stage / "checkpoints").iterdir())) == 1  # nothing half-written is left

    models = {stage: (tmp_path / stage / "metrics.jsonl").read_text() for stage in ("autoencoder", "clip", "denoiser")}
    again = demo(tmp_path)  # goes on where it was: nothing is built or trained twice
    assert "data build" not in again and again.count("resuming") >= 3
    assert all((tmp_path / stage / "metrics.jsonl").read_text() == text for stage, text in models.items())
