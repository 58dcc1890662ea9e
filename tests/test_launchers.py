"""The scripts that start training elsewhere: SLURM's really run, on two processes, by stand-ins for its commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ldm.checkpoints.files import newest_valid, read_json
from ldm.config import to_yaml
from tests.conftest import tiny_config

SCRIPTS = Path(__file__).parents[1] / "scripts"

SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
echo $$ > "$NOTES/srun"
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    while ((status == 128 + 10)); do wait "$pid"; status=$?; done  # that was the signal
    ((status > worst)) && worst=$status
done
exit $worst
"""

SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo 127.0.0.1; echo another-machine ;;
    requeue) echo "$2" > "$NOTES/requeued" ;;
esac
"""


def started(config: Path, notes: Path, *settings: str) -> "subprocess.Popen[str]":
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (notes / "bin").mkdir(exist_ok=True)
        (notes / "bin" / name).write_text(text)
        (notes / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    environment = os.environ | slurm | {
        "SLURM_NTASKS_PER_NODE": "2", "ACCELERATE_USE_CPU": "1", "LDM": f"{sys.executable} -m ldm",
        "NOTES": str(notes), "PATH": f"{notes / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["bash", str(SCRIPTS / "slurm" / "train.sbatch"), str(config), *settings]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_slurm_job_stops_in_time_and_goes_on(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config("autoencoder", out, shards, "samples=8000000")))
    job = started(tmp_path / "c.yaml", tmp_path)
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(int((tmp_path / "srun").read_text()), signal.SIGUSR1)  # what --signal=USR1@600 sends
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 75, said
    assert (tmp_path / "requeued").read_text().strip() == str(os.getpid())
    folder = newest_valid(out / "checkpoints")
    assert folder is not None
    reached = read_json(folder / "train" / "progress.json")["samples"]

    (tmp_path / "requeued").unlink()
    job = started(tmp_path / "c.yaml", tmp_path, f"samples={reached + 16}")
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and not (tmp_path / "requeued").exists(), said
    assert f"resuming {out} at step {reached // 8}" in said
    assert newest_valid(out / "checkpoints") == out / "checkpoints" / f"step-{reached // 8 + 2:08d}"


def test_slurm_job_wants_a_config() -> None:
    done = subprocess.run(["bash", SCRIPTS / "slurm" / "train.sbatch"], capture_output=True, text=True)
    assert done.returncode and "usage: sbatch train.sbatch CONFIG..." in done.stderr


def test_skypilot_starts_one_process_a_gpu_on_every_machine(tmp_path: Path) -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot" / "train.yaml").read_text())
    (tmp_path / "accelerate").write_text('#!/usr/bin/env bash\necho "$*"\n')
    (tmp_path / "accelerate").chmod(0o755)
    cluster = {"NUM_NODES": "2", "NODE_RANK": "1", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment = {f"SKYPILOT_{name}": value for name, value in cluster.items()} | task["envs"]
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, check=True)
    for words in ("--num_machines 2 --machine_rank 1", "--num_processes 16", "--main_process_ip 10.0.0.1 ",
                  "-m ldm train configs/stable-diffusion/v1.yaml", "out=/runs/v1 data.path="):  # fmt: skip
        assert words in done.stdout
