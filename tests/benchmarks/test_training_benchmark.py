"""The comparison of training steps compares the same step, and sees when it is another."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.harness import Schedule, Subject, compare
from benchmarks.instruments import Instruments
from benchmarks.training import (
    OPTIMIZER,
    SIZES,
    TOLERANCE,
    Bench,
    Ours,
    Theirs,
    cached_batch,
    make_bench,
    speeds,
)
from ldm.training.memory import SpeedConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench") / "model", SIZES["tiny"], torch.device("cpu"))


@pytest.fixture(scope="module")
def theirs(bench: Bench) -> Subject:
    return Theirs(bench).subject()


def run(subjects: dict[str, Subject]):
    passing = iter(range(10**9))
    tools = Instruments(
        lambda: next(passing), lambda: 0.0, lambda: 0.0, lambda: None, None, lambda _: 0.0, lambda _: 1.0
    )
    schedule = Schedule(blocks=1, min_block_s=0.0, warm_up=1)
    return compare(
        {"diffusers": subjects.pop("diffusers"), **subjects},
        baseline="diffusers",
        tolerance=TOLERANCE["no"],
        schedule=schedule,
        tools=tools,
    )


def test_ours_is_the_same_step(bench: Bench, theirs: Subject) -> None:
    ours = Ours(bench)
    fast = Ours(bench, SpeedConfig(channels_last=True))
    again = Theirs(bench, foreach=True, channels_last=True, cached=True)
    result = run(
        {
            "diffusers": theirs,
            "foreach, cached": again.subject(),
            "ours": ours.subject(bench.batch),
            "cached": ours.subject(cached_batch(bench, ours)),
            "fast": fast.subject(bench.batch),
        }
    )
    assert [row.subject.void for row in result.rows] == [None] * 5
    assert all(row.subject.error is not None and row.subject.error < TOLERANCE["no"] for row in result.rows)
    assert "| ours |" in "\n".join(speeds(result, 2, 1e9))


@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": replace(OPTIMIZER, lr=1.05 * OPTIMIZER.lr)},
        {"optimizer": replace(OPTIMIZER, clip=0.01)},
        {"ema": 0.15},
        {"seed": 1},
    ],
    ids=["rate", "clipping", "average", "noise"],
)
def test_a_planted_difference_makes_the_row_void(bench: Bench, theirs: Subject, changed: dict) -> None:
    result = run({"diffusers": theirs, "ours": Ours(bench, **changed).subject(bench.batch)})
    assert "differs by" in str(result.row("ours").subject.void)


def test_another_weight_makes_the_row_void(bench: Bench, theirs: Subject) -> None:
    ours = Ours(bench)
    ours.start["conv_in.bias"] += 0.05
    assert "differs by" in str(run({"diffusers": theirs, "ours": ours.subject(bench.batch)}).row("ours").subject.void)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_program_runs_at_the_smallest_size(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = "--size tiny --blocks 1 --min-block-s 0.001 --pictures 8 --out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *words.split(), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps, read, saved = json.loads(out.read_text())["comparisons"]
    for comparison in (steps, read, saved):
        assert [row["subject"]["void"] for row in comparison["rows"]] == [None] * len(comparison["rows"])
    assert "of the steps' time" in done.stdout and "throughput with pictures from shards" in done.stdout
