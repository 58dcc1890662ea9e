"""`accelerate launch` on two processes: every stage, one upon the other, then a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.checkpoints.files import newest_valid
from tests.conftest import LOOP, TINY, frozen

LAUNCH = ["launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
          "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ldm", "train"]  # fmt: skip
GAN = ["task.adversary.weight=0.5", "task.adversary.model={channels: 8, layers: 1, norm_groups: 4}"]


@pytest.mark.slow
def test_every_stage_on_two_processes(shards: Path, tmp_path: Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "empty.yaml").write_text("log_steps: 1\n")
    for kind in TINY:
        out = tmp_path / kind
        words = [*TINY[kind], *LOOP, f"out={out}", f"data.path={shards}", "data.size=16", f"validation={shards}"]
        words += {"autoencoder": GAN, "denoising": frozen(tmp_path)}.get(kind, [])
        command = [sys.executable, "-m", "tests.training.accelerated", *LAUNCH, str(tmp_path / "empty.yaml"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert newest_valid(out / "checkpoints") == out / "checkpoints" / "step-00000004"
    drawn = [sys.executable, "-m", "ldm", "generate", str(tmp_path / "denoising"), "a red circle", "--steps", "2"]
    subprocess.run([*drawn, "--out", str(tmp_path / "pictures")], env=environment, check=True, timeout=300)
    assert Image.open(next((tmp_path / "pictures").glob("*.png"))).size == (16, 16)
