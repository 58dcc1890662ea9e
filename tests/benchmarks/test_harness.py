"""The harness against subjects and a clock whose every second is known; speed itself is never asserted."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Schedule, Subject, compare, difference, table, write
from benchmarks.instruments import Instruments, count_flop, instruments
from benchmarks.results import bootstrap, summarise

ROOT = Path(__file__).parents[2]
OUT = torch.tensor([1.0, -2.0])
FLOP, GEMM_FLOP, GEMM_S = 100.0, 1000.0, 0.5
SCHEDULE = Schedule(blocks=12, min_block_s=1.0, warm_up=2, seed=3)


@dataclass
class World:
    """A machine on which time passes only when a call says so; `log` names every call."""

    now: float = 0.0
    others: float = 0.0
    speed: float = 1.0
    log: list[str] = field(default_factory=list)

    def call(self, name: str, seconds: float, output: Tensor = OUT, noise: random.Random | None = None) -> Callable:
        def run() -> Tensor:
            self.log.append(name)
            self.now += seconds * self.speed * (noise.uniform(0.9, 1.1) if noise else 1.0)
            return output

        return run

    def tools(self) -> Instruments:
        def gemm() -> float:
            self.log.append("gemm")
            self.now += GEMM_S * self.speed
            return GEMM_FLOP

        return Instruments(
            clock=lambda: self.now,
            others=lambda: self.others,
            load=lambda: 0.0,
            synchronise=lambda: None,
            gemm=gemm,
            peak_mb=lambda call: 7.0,
            flop=lambda call: FLOP,
        )


def run(world: World, subjects: dict, tolerance: float = 1e-3, schedule: Schedule = SCHEDULE) -> Comparison:
    return compare(subjects, baseline="stock", tolerance=tolerance, schedule=schedule, tools=world.tools())


def test_different_outputs_void_the_row_before_any_timing() -> None:
    world = World()
    result = run(
        world,
        {
            "stock": world.call("stock", 0.4),
            "close": world.call("close", 0.4, OUT * 1.0005),
            "wrong": world.call("wrong", 0.1, OUT * 1.01),
            "other shape": world.call("other shape", 0.1, OUT[:1]),
            "nan": world.call("nan", 0.1, OUT * float("nan")),
        },
    )
    assert result.row("close").subject.error == pytest.approx(5e-4, rel=1e-3)
    assert result.row("close").n == SCHEDULE.blocks
    assert "differs by 1.0e-02" in str(result.row("wrong").subject.void)
    for name in ("wrong", "other shape", "nan"):
        assert result.row(name).subject.void and result.row(name).median_s is None
        assert world.log.count(name) == SCHEDULE.warm_up + 1  # warm-up and check, never timed
    assert {b.subject for b in result.measurement.blocks} == {"stock", "close"}
    assert "void: differs" in table(result)


def test_a_subject_that_fails_voids_only_its_row() -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such\nkernel")

    world = World()
    result = run(world, {"stock": world.call("stock", 0.4), "broken": broken})
    assert result.row("broken").subject.void == "failed: RuntimeError: no such"
    assert result.row("stock").n == SCHEDULE.blocks
    with pytest.raises(ValueError, match="the baseline 'stock' does not run"):
        run(world, {"stock": broken})


@pytest.mark.parametrize("output", [torch.zeros(2), torch.full((2,), float("nan"))])
def test_a_baseline_without_a_scale_is_refused(output: Tensor) -> None:
    world = World()
    with pytest.raises(ValueError, match=r"all zero or not finite|not finite"):
        run(world, {"stock": world.call("stock", 0.4, output)})
    with pytest.raises(ValueError, match="not among the subjects"):
        run(world, {"other": world.call("other", 0.4)})


def test_difference_scales_each_tensor_by_its_own_size() -> None:
    big, small = torch.tensor([1000.0]), torch.tensor([2.0])
    assert difference([big, small * 1.1], [big, small]) == pytest.approx(0.1)
    assert difference([big, small + 0.1], [big, small * 0]) == pytest.approx(2.1)  # at least 0.001 of the largest


def test_the_interval_covers_a_known_ratio_on_a_machine_that_slows_down() -> None:
    world, noise = World(), random.Random(5)

    def slowing(name: str, seconds: float) -> Callable:
        inner = world.call(name, seconds, noise=noise)

        def call() -> Tensor:
            world.speed *= 1.001  # the last round is several times slower than the first
            return inner()

        return call

    subjects = {"stock": slowing("stock", 0.05), "fast": slowing("fast", 0.02)}
    row = run(world, subjects, schedule=replace(SCHEDULE, blocks=30)).row("fast")
    assert row.low is not None and row.high is not None
    assert row.low < 2.5 < row.high
    assert row.high - row.low < 0.4


def test_exact_clocks_give_exact_numbers() -> None:
    world = World()
    result = run(world, {"stock": world.call("stock", 0.4), "fast": world.call("fast", 0.1)})
    row = result.row("fast")
    assert (row.median_s, row.p10_s, row.p90_s) == pytest.approx((0.1, 0.1, 0.1))
    assert (row.speedup, row.low, row.high) == pytest.approx((4, 4, 4))
    assert row.rate == pytest.approx(FLOP / 0.1)
    assert row.of_gemm == pytest.approx((FLOP / 0.1) / (GEMM_FLOP / GEMM_S))
    assert (row.subject.first_call_s, row.subject.warm_up_s) == pytest.approx((0.1, 0.2))
    assert row.subject.peak_mb == 7.0
    assert all(b.elapsed_s >= 1.0 - 1e-9 for b in result.measurement.blocks)
    assert {b.calls for b in result.measurement.blocks if b.subject == "stock"} == {3}


def test_rounds_are_interleaved_in_a_seeded_random_order() -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        world = World()
        subjects = {name: world.call(name, 0.4) for name in ("stock", "a", "b")}
        m = run(world, subjects, schedule=replace(SCHEDULE, seed=seed)).measurement
        rounds = [sorted((x.position, x.subject) for x in (*m.blocks, *m.gemm) if x.round == i) for i in range(12)]
        return [tuple(name for _, name in each) for each in rounds]

    first = order(0)
    assert all(sorted(each) == ["a", "b", "gemm", "stock"] for each in first)
    assert len(set(first)) > 1
    assert first == order(0) != order(1)


@pytest.mark.parametrize(("disturbed", "basis", "median"), [(4, "undisturbed", 0.4), (8, "all", 0.8)])
def test_disturbed_blocks_are_kept_and_left_out_while_half_are_quiet(disturbed: int, basis: str, median: float) -> None:
    world = World()

    def stock() -> Tensor:
        # Before the timing: warm-up, then once to be the expected output and once to be checked against it.
        timed = world.log.count("stock") - SCHEDULE.warm_up - 2
        noisy = 0 <= timed < disturbed
        world.log.append("stock")
        world.now += 0.8 if noisy else 0.4
        world.others += 0.06 * 0.8 if noisy else 0.04 * 0.4
        return OUT

    row = run(world, {"stock": stock}, schedule=replace(SCHEDULE, min_block_s=0.0)).row("stock")
    assert (row.disturbed, row.basis, row.median_s) == (disturbed, basis, pytest.approx(median))
    assert row.n == (SCHEDULE.blocks if basis == "all" else SCHEDULE.blocks - disturbed)


def test_bootstrap_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1.0, 1.1, 1.3, 0.9, 1.05]
    low, high = bootstrap(values, 0)
    assert min(values) <= low < 1.05 < high <= max(values)
    monkeypatch.setattr("benchmarks.results.RESAMPLES", 20)  # few enough that another seed shows
    many = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert bootstrap(many, 0) == bootstrap(many, 0) != bootstrap(many, 1)


def test_json_has_every_raw_block_and_the_machine(tmp_path: Path) -> None:
    world = World()
    result = run(world, {"stock": world.call("stock", 0.4), "wrong": world.call("wrong", 0.1, -OUT)})
    write(result, tmp_path / "deep" / "out.json")
    document = json.loads((tmp_path / "deep" / "out.json").read_text())
    (comparison,) = document["comparisons"]
    assert len(comparison["blocks"]) == len(comparison["gemm"]) == SCHEDULE.blocks
    assert {"round", "position", "calls", "elapsed_s", "seconds", "others", "load", "disturbed"} <= set(
        comparison["blocks"][0]
    )
    assert comparison["rows"][1]["subject"]["void"]
    assert {"cpu", "threads", "versions", "commit", "environment", "date"} <= set(document["machine"])
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert summarise(result.measurement) == result  # the rows follow from the raw numbers alone


def test_real_instruments_on_two_real_functions() -> None:
    x = torch.randn(64, 64)
    result = compare(
        {"stock": lambda: x @ x, "same": Subject(lambda: (x @ x, x), lambda result: [result[0]])},
        baseline="stock",
        tolerance=0.0,
        schedule=Schedule(blocks=2, min_block_s=0.001),
        tools=instruments("cpu", 64),
    )
    assert result.measurement.flop == 2 * 64**3
    assert result.row("same").speedup is not None
    assert "| same |" in table(result)


def test_attention_counts_as_flop_on_the_cpu() -> None:
    q = torch.randn(2, 4, 32, 16, requires_grad=True)

    def forward() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    products = 2 * 4 * 32 * 32 * 16 * 2
    assert count_flop(forward) == 2 * products
    assert count_flop(lambda: forward().sum().backward()) == pytest.approx(7 * products, rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_models_run_at_the_smallest_size(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    out = tmp_path / "out.json"
    words = "--size tiny --no-compiled --blocks 1 --min-block-s 0.001 --device cpu --out"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.models", *words.split(), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    comparisons = json.loads(out.read_text())["comparisons"]
    assert len(comparisons) == 5
    for comparison in comparisons:
        assert [row["subject"]["void"] for row in comparison["rows"]] == [None] * len(comparison["rows"])
        assert comparison["flop"] > 0
    assert done.stdout.count("| subject |") == 5
