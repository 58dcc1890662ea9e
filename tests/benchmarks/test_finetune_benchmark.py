"""The comparison of LoRA steps compares the same step, sees when it is another, and measures memory that is there."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.finetune import (
    OPTIMIZER,
    OURS,
    SIZES,
    THEIRS,
    TOLERANCE,
    Bench,
    Gauge,
    Memory,
    Ours,
    Theirs,
    restart,
    summary,
)
from benchmarks.harness import Schedule, Subject, compare
from benchmarks.instruments import Instruments
from benchmarks.training import make_bench
from ldm.adapters.lora import AdapterConfig, inject
from ldm.models.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench") / "model"
    return Bench(make_bench(folder, SIZES["tiny"], CPU).folder, SIZES["tiny"], CPU)


@pytest.fixture
def theirs(bench: Bench) -> Theirs:
    return Theirs(bench)


def run(theirs: Theirs, ours: Subject):
    passing = iter(range(10**9))
    tools = Instruments(
        lambda: next(passing), lambda: 0.0, lambda: 0.0, lambda: None, None, lambda _: 0.0, lambda _: 1.0
    )
    return compare(
        {THEIRS: theirs.subject(), OURS: ours},
        baseline=THEIRS,
        tolerance=TOLERANCE["no"],
        schedule=Schedule(blocks=1, min_block_s=0.0, warm_up=1),
        tools=tools,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ours_is_the_same_step(bench: Bench, theirs: Theirs, checkpointing: bool) -> None:
    ours = Ours(replace(bench, checkpointing=checkpointing, channels_last=checkpointing))
    assert {n: p.shape for n, p in ours.parameters.items()} == {n: p.shape for n, p in theirs.parameters.items()}
    result = run(theirs, ours.subject(theirs.start))
    found = result.row(OURS).subject
    assert found.void is None and found.error is not None and found.error < TOLERANCE["no"]
    memory = {THEIRS: Memory(1.0, 100.0, 200.0, 10), OURS: Memory(1.0, 100.0, 160.0, 10)}
    text = "\n".join(summary(result, memory, {"weights": 100.0, "activations": 44.0}))
    assert "| most in steps, MB | 200 | 160 | 1.250 |" in text and "144 MB, -10.0% of" in text


@pytest.mark.parametrize("part", ["gradient", "adapter"])
def test_what_is_compared_depends_on_every_matrix(theirs: Theirs, part: str) -> None:
    compared = theirs.proof()
    assert len(compared) == 2 + len(theirs.parameters)
    values = compared[2:] if part == "gradient" else [compared[1]]
    assert all(bool((value != 0).any() if part == "gradient" else (value != 0).all()) for value in values)


PLANTED = {
    "rate": {"optimizer": replace(OPTIMIZER, lr=1.05 * OPTIMIZER.lr)},
    "clipping": {"optimizer": replace(OPTIMIZER, clip=0.001)},
    "noise": {},
    "adapter": {},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_difference_makes_the_row_void(bench: Bench, theirs: Theirs, planted: str) -> None:
    ours = Ours(bench, **PLANTED[planted])
    ours.task.seed = int(planted == "noise")
    start = {name: value * (1.01 if planted == "adapter" else 1.0) for name, value in theirs.start.items()}
    assert "differs by" in str(run(theirs, ours.subject(start)).row(OURS).subject.void)


def test_another_adapter_is_refused(theirs: Theirs) -> None:
    fewer = dict(list(theirs.start.items())[1:])
    with pytest.raises(ValueError, match="the adapters differ: 64 matrices against 63"):
        restart(theirs.parameters, fewer, theirs.optimizer)


def test_stable_diffusion_15_learns_797184_numbers() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        inject({"denoiser": unet}, AdapterConfig(rank=4, alpha=4.0))
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 797_184


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted by Linux")
def test_the_gauge_sees_a_peak_that_has_passed() -> None:
    gauge, size = Gauge(CPU), 200 * 10**6
    gauge.reset()
    before = gauge.now()
    block = torch.zeros(size, dtype=torch.uint8) + 1  # two such blocks at a time, touched
    assert gauge.now() - before == pytest.approx(200, rel=0.1)
    del block
    assert gauge.now() - before < 20
    assert 190 < gauge.peak() - before < 420
    gauge.reset()
    assert gauge.peak() - before < 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_program_runs_at_the_smallest_size(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = "--size tiny --checkpointing --blocks 1 --min-block-s 0.001 --out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.finetune", *words.split(), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(out.read_text())
    (steps,) = document["comparisons"]
    assert [row["subject"]["void"] for row in steps["rows"]] == [None, None]
    assert document["memory_mb"][OURS]["trained"] == document["memory_mb"][THEIRS]["trained"] > 0
    assert all(memory["step"] > 0 for memory in document["memory_mb"].values())
    assert "Estimate of a dry run" in done.stdout
