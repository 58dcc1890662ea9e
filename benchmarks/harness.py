"""The one harness: subjects are checked against a baseline first, then timed in interleaved blocks.

Everything happens in one process, so that all subjects meet the same machine; ratios are taken within a round, so
that a slow minute hits both sides of a ratio alike.
"""

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.instruments import Instruments, instruments
from benchmarks.results import Block, Checked, Comparison, Measurement, Row, summarise, table, write

__all__ = ["Block", "Checked", "Comparison", "Row", "Schedule", "Subject", "compare", "difference", "table", "write"]

log = logging.getLogger(__name__)

GEMM = "gemm"
MAX_GEMM_BLOCK_S = 0.3
SCALE_FLOOR = 1e-3
Call = Callable[[], "Tensor | Sequence[Tensor]"]


@dataclass(frozen=True)
class Schedule:
    """How long and in what order. A block lasts `min_block_s` and `min_reps` calls, whichever takes longer."""

    blocks: int = 10  # of each subject: the rounds
    min_block_s: float = 2.0
    min_reps: int = 1
    warm_up: int = 3  # untimed calls before everything, the compiling one included
    seed: int = 0
    disturbed_above: float = 0.05  # cores that others may keep busy during a block

    def __post_init__(self) -> None:
        for name in ("blocks", "min_reps", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Subject:
    """A call to time, and what of its result is compared (untimed): for gradients, `outputs` puts them in order."""

    call: Call
    outputs: Callable[[Tensor | Sequence[Tensor]], Sequence[Tensor]] = lambda result: (
        (result,) if isinstance(result, Tensor) else result
    )

    def tensors(self) -> list[Tensor]:
        """The outputs of a fresh call."""
        return [t.detach() for t in self.outputs(self.call())]


def compare(
    subjects: Mapping[str, Call | Subject],
    *,
    baseline: str,
    tolerance: float,
    title: str = "comparison",
    schedule: Schedule | None = None,
    tools: Instruments | None = None,
) -> Comparison:
    """Warm up, check, then time `subjects` against the one named `baseline`.

    A subject that fails, or whose outputs differ from the baseline's by more than `tolerance` (see `difference`), is
    not timed: its row is void and says why. Raises ValueError if the baseline itself cannot be used.
    """
    if baseline not in subjects:
        raise ValueError(f"baseline {baseline!r} is not among the subjects: {', '.join(subjects)}")
    if GEMM in subjects:
        raise ValueError(f"{GEMM!r} is the reference's name; call the subject something else")
    schedule, tools = schedule or Schedule(), tools or instruments()
    # The baseline first: its outputs must be there when the others are checked.
    names = [baseline, *(name for name in subjects if name != baseline)]
    every = {name: s if isinstance(s, Subject) else Subject(s) for name, s in subjects.items()}
    warmed = {name: _warm_up(name, every[name], schedule.warm_up, tools) for name in names}
    if warmed[baseline].void is not None:
        raise ValueError(f"the baseline {baseline!r} does not run: {warmed[baseline].void}")
    checked = _check(every, warmed, baseline, tolerance)
    for name, state in checked.items():
        if state.void is not None:
            log.warning("%s: %s is void: %s", title, name, state.void)
        else:
            checked[name] = replace(state, peak_mb=tools.peak_mb(every[name].call))
    flop = tools.flop(every[baseline].call)
    calls: dict[str, Callable[[], object]] = {name: every[name].call for name in names if checked[name].void is None}
    blocks, gemm_flop = _rounds(calls, schedule, tools)
    return summarise(
        Measurement(
            title=title,
            device=tools.device,
            baseline=baseline,
            tolerance=tolerance,
            seed=schedule.seed,
            schedule=asdict(schedule),
            checked=tuple(checked[name] for name in subjects),
            blocks=tuple(b for b in blocks if b.subject != GEMM),
            gemm=tuple(b for b in blocks if b.subject == GEMM),
            flop=flop,
            gemm_flop=gemm_flop,
        )
    )


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest max |a - b| / max |b| over pairs of tensors.

    The scale of a tensor is at least 0.001 of the largest one's: a gradient that is zero but for rounding has no
    scale of its own. Raises ValueError for other shapes, values that are not finite, or nothing but zeros to match.
    """
    if len(outputs) != len(expected):
        raise ValueError(f"{len(outputs)} outputs instead of {len(expected)}")
    scales = [_largest(b) for b in expected]
    floor = SCALE_FLOOR * max(scales, default=0.0)
    if not floor > 0:
        raise ValueError("the baseline's outputs are all zero or not finite, so nothing would be compared")
    worst = 0.0
    for a, b, scale in zip(outputs, expected, scales, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"an output of shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        error = _largest(a.to("cpu", torch.float64) - b.to("cpu", torch.float64)) / max(scale, floor)
        if not math.isfinite(error):
            raise ValueError("outputs are not finite")
        worst = max(worst, error)
    return worst


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _warm_up(name: str, subject: Subject, calls: int, tools: Instruments) -> Checked:
    tools.synchronise()
    start, took = tools.clock(), []
    try:
        for _ in range(calls):
            subject.call()
            tools.synchronise()
            took.append(tools.clock() - start)
    except Exception as error:  # one subject that does not run must not cost the others
        log.debug("%s failed", name, exc_info=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Checked(name, void=f"failed: {type(error).__name__}: {lines[0] if lines else ''}".replace("|", "/"))
    log.info("%s: first call %.3g s, %d warm-up calls %.3g s", name, took[0], calls, took[-1])
    return Checked(name, first_call_s=took[0], warm_up_s=took[-1])


def _check(
    subjects: Mapping[str, Subject], warmed: Mapping[str, Checked], baseline: str, tolerance: float
) -> dict[str, Checked]:
    # Copies: a captured graph writes its next result over the last one.
    expected = [t.to("cpu", copy=True) for t in subjects[baseline].tensors()]
    difference(expected, expected)  # raises for outputs that could not be compared
    checked = dict(warmed)
    for name, state in warmed.items():
        if state.void is not None:
            continue
        try:
            error = difference(subjects[name].tensors(), expected)
        except ValueError as problem:
            checked[name] = replace(state, void=str(problem))
            continue
        void = None if error <= tolerance else f"differs by {error:.1e}, more than {tolerance:g}"
        checked[name] = replace(state, error=error, void=void)
    return checked


def _rounds(
    calls: Mapping[str, Callable[[], object]], schedule: Schedule, tools: Instruments
) -> tuple[list[Block], float]:
    order, blocks, gemm_flop = random.Random(schedule.seed), [], 0.0
    shortest = replace(schedule, min_block_s=min(schedule.min_block_s, MAX_GEMM_BLOCK_S), min_reps=1)
    if tools.gemm is not None:
        gemm_flop = tools.gemm()
        calls = {**calls, GEMM: tools.gemm}
    for i in range(schedule.blocks):
        names = list(calls)
        order.shuffle(names)
        for position, name in enumerate(names):
            timing = shortest if name == GEMM else schedule
            blocks.append(replace(_block(calls[name], timing, tools), subject=name, round=i, position=position))
        log.info("round %d of %d", i + 1, schedule.blocks)
    return blocks, gemm_flop


def _block(call: Callable[[], object], schedule: Schedule, tools: Instruments) -> Block:
    tools.synchronise()
    busy, start = tools.others(), tools.clock()
    calls, more, elapsed = 0, schedule.min_reps, 0.0
    while more:
        # Not one call at a time: on a GPU that would wait for the device after each.
        for _ in range(more):
            call()
        tools.synchronise()
        calls, elapsed = calls + more, tools.clock() - start
        short = schedule.min_block_s - elapsed
        more = math.ceil(short * calls / max(elapsed, 1e-9)) if short > 0 else 0
    others = max(0.0, tools.others() - busy) / max(elapsed, 1e-9)
    return Block("", 0, 0, calls, elapsed, others, tools.load(), others > schedule.disturbed_above)
