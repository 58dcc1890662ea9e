"""The numbers of a run: means, times of steps, rates, and the line that somebody reads."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.config import to_yaml
from ldm.training import engine, metrics
from ldm.training.metrics import (
    MEASURED,
    Means,
    Meter,
    MetricsFile,
    Times,
    clock,
    rates,
    read_metrics,
    readable,
    speed,
)
from ldm.training.optim import OptimizerConfig, ParameterGroup, build_optimizer
from ldm.training.peaks import PEAKS, peak_flops
from ldm.training.ranks import Ranks
from ldm.training.run import run
from tests.conftest import frozen, tiny_config
from tests.training.launch import two_processes

CPU = torch.device("cpu")


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def stream(self, waits: list[float]) -> Iterator[int]:
        """Items that take so long to come."""
        for i, wait in enumerate(waits):
            self.now += wait
            yield i


def test_means_are_weighted_and_start_anew() -> None:
    means = Means()
    means.add({"loss": torch.tensor(1.0)}, 3)
    means.add({"loss": torch.tensor(5.0), "other": torch.tensor(2.0)}, 1)
    assert {k: v.item() for k, v in means.pop().items()} == {"loss": 2.0, "other": 2.0}
    assert means.pop() == {}


def test_steps_and_waits_are_timed_and_what_lies_between_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Clock(monkeypatch)
    meter = Meter(CPU, batch_size=10)
    stream = time.stream([1.0, 0.0, 3.0, 0.0])
    for work in (1.0, 3.0, 5.0):  # steps of 2, 3 and 8 seconds, of which 4 went by waiting
        meter.next(stream)
        time.now += work
        meter.end()
        time.now += 9.0  # a validation
    found = meter.read(Ranks(), steps_left=7)
    assert found["step_seconds"] == 3.0 and found["step_seconds_max"] == 8.0
    assert found["samples_per_second"] == pytest.approx(30 / 13)
    assert found["data_wait"] == pytest.approx(4 / 13)
    assert found["samples_per_second_run"] == pytest.approx(30 / 40)  # the validations are part of the run
    assert found["eta_seconds"] == pytest.approx(7 * 40 / 3)
    assert "data_wait_rank" not in found and "mfu" not in found and "flop_per_second" not in found
    assert 10 < found["host_mb"] < 1e6 and "device_mb" not in found

    meter.next(stream)
    time.now += 4.0
    meter.end()
    again = meter.read(Ranks(), steps_left=6)
    assert (again["step_seconds"], again["step_seconds_max"], again["data_wait"]) == (4.0, 4.0, 0.0)
    assert again["samples_per_second_run"] == pytest.approx(40 / 44)
    assert "step_seconds" not in meter.read(Ranks(), steps_left=6)  # no step since


def test_the_slowest_process_is_what_shows() -> None:
    fast, slow = Times([1.0, 1.0, 1.0], 0.3, 500.0, 90.0), Times([1.0, 1.5, 2.5], 2.0, 700.0, 80.0)
    found = speed([fast, slow], batch_size=12, flop=100.0, peak=400.0)
    assert found == {
        "samples_per_second": pytest.approx(36 / 5),
        "step_seconds": 1.5,
        "step_seconds_max": 2.5,
        "data_wait": pytest.approx(0.4),
        "data_wait_rank": 1,
        "host_mb": 90.0,
        "device_mb": 700.0,
        "flop_per_second": pytest.approx(720.0),
        "mfu": pytest.approx(720 / 800),  # of two devices
    }
    assert "mfu" not in speed([fast], 12, 100.0, None) and speed([Times([], 0, 0, 0)], 12, 100.0, 1.0) == {}
    assert set(found) <= set(MEASURED)


def test_on_a_gpu_nothing_waits_until_the_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of a stream whose clock stands at 7 ms a record; the host may wait for them only in `read`."""
    waits: list[str] = []
    counter = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(counter)

        def elapsed_time(self, end: "Event") -> float:
            assert waits == ["all"]
            return 7.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("all"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    meter = Meter(torch.device("cuda"), batch_size=1)
    for i in range(3):
        meter.next(iter([i]))
        meter.end()
    assert waits == []
    found = meter.read(Ranks(), 1)
    assert found["step_seconds"] == found["step_seconds_max"] == pytest.approx(0.007)
    assert found["device_mb"] == 3.0


def test_a_parts_rate_is_that_of_its_own_groups() -> None:
    config = OptimizerConfig(lr=0.1, groups=[ParameterGroup(match="^b", lr_scale=0.25)])
    built = {part: build_optimizer(torch.nn.Linear(2, 2), config, part) for part in ("a", "b")}
    for optimizer in built.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group.get("lr_scale", 1.0)
    assert rates(built) == {"lr/a": pytest.approx(0.1), "lr/b": pytest.approx(0.025)}

    module = torch.nn.Linear(2, 2)
    prodigy = build_optimizer(module, OptimizerConfig(kind="prodigy", lr=1.0))
    module(torch.ones(1, 2)).sum().backward()
    prodigy.step()
    estimate = next(state["d"] for state in prodigy.state.values() if "d" in state)
    estimate.fill_(0.003)
    assert rates({"x": prodigy}) == {"lr/x": pytest.approx(0.003)}


@pytest.mark.parametrize(
    ("name", "half", "tensor_float", "single"),
    [
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA GH200 480GB", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("Tesla T4", 65, 8.1, 8.1),
    ],
)
def test_peaks_by_name(
    name: str, half: float, tensor_float: float, single: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda")
    assert peak_flops(gpu, "bf16", tf32=False) == half * 1e12 == peak_flops(gpu, "fp16", tf32=True)
    assert peak_flops(gpu, "no", tf32=True) == tensor_float * 1e12
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    assert peak_flops(gpu, "no", tf32=False) == tensor_float * 1e12
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert peak_flops(gpu, "no", tf32=False) == single * 1e12
    assert peak_flops(CPU, "bf16", tf32=False) is None


@pytest.mark.parametrize("name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "?"])
def test_a_device_that_is_not_known_has_no_peak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16", tf32=False) is None
    assert all(half >= tensor_float >= single for _, half, tensor_float, single in PEAKS)


def test_the_line_is_short() -> None:
    numbers = {"loss": 0.123456, "loss/0": 9.0, "gradient": 1.5, "lr": 1e-4, "lr/a": 1e-4, "samples_per_second": 351.4}
    numbers |= {"samples_per_second_run": 300.0, "step_seconds": 0.0912, "step_seconds_max": 3.0, "data_wait": 0.034}
    numbers |= {"flop_per_second": 1e12, "mfu": 0.412, "device_mb": 1.0, "host_mb": 2.0, "eta_seconds": 3723.0}
    line = "  ".join(readable(numbers))
    assert line == "loss 0.1235  gradient 1.5  351 samples/s  0.0912 s/step  data 3%  MFU 41%  ETA 1:02:03"
    assert "  ".join(readable(numbers, timed=False)) == "loss 0.1235  gradient 1.5  0.0912 s/step  data 3%  MFU 41%"
    assert [clock(s) for s in (0, 59.6, 3599.4)] == ["0:00", "1:00", "59:59"]


def test_lines_after_the_place_of_a_resume_and_halves_of_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "samples": 8 * i, "kind": "train", "loss": i}) for i in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "sam']))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, 16).write(step=3, samples=24, kind="train", loss=math.inf)
    assert [line["loss"] for line in read_metrics(path)] == [1, 2, math.inf]
    assert read_metrics(tmp_path / "none") == []


def test_a_run_writes_its_speed_and_nothing_between_its_log_points(
    shards: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, opened, watching, real = tmp_path / "out", [], [False], engine.update

    def hook(event: str, args: tuple) -> None:  # stays for the life of the process, and looks only here
        if event == "open" and watching[0] and str(args[0]).startswith(str(out)):
            opened.append(args[0])

    def update(state: object, *rest: object) -> object:
        watching[0] = 1 <= state.step < 3  # type: ignore[attr-defined]
        return real(state, *rest)  # type: ignore[arg-type]

    sys.addaudithook(hook)
    monkeypatch.setattr(engine, "update", update)
    extra = ["log_steps=4", "save_steps=100", "preview_steps=100", "validate_steps=100"]
    run(tiny_config("denoising", out, shards, *extra, *frozen(models["autoencoder"].parent)))
    assert opened == []
    trained, validated = read_metrics(out / "metrics.jsonl")
    assert {"samples_per_second", "samples_per_second_run", "step_seconds", "step_seconds_max"} <= trained.keys()
    assert 0 < trained["step_seconds"] <= trained["step_seconds_max"] < 60
    assert trained["flop_per_second"] > 0 and trained["eta_seconds"] == 0 and 0 <= trained["data_wait"] <= 1
    assert "mfu" not in trained and trained["lr/denoiser"] == trained["lr"]
    assert {"loss", *(f"loss/{k}" for k in range(5))} <= validated.keys()


STRAGGLER = """
import os, time
from data_pipeline.loader import Loader
real = Loader.__iter__
def slow(self):
    for batch in real(self):
        time.sleep(0.3 if os.environ["RANK"] == "1" else 0.0)
        yield batch
Loader.__iter__ = slow
from ldm.cli.main import main
main()
"""


@pytest.mark.slow
def test_a_process_that_waits_for_data_shows(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config("autoencoder", tmp_path / "out", shards)))
    (tmp_path / "straggler.py").write_text(STRAGGLER)
    ended = two_processes(str(tmp_path / "straggler.py"), "train", str(tmp_path / "c.yaml"))
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "train"][1:]
    assert [line["data_wait_rank"] for line in lines] == [1, 1, 1]
    assert all(line["step_seconds"] >= 0.3 and line["data_wait"] > 0.3 for line in lines)
