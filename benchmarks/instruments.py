"""What a benchmark reads besides its own code: clock, other processes, memory, FLOP, GEMM rate, the machine."""

import ctypes
import gc
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_TF32", "LD_PRELOAD", "MALLOC_")
"""Beginnings of the environment variables that can change a speed."""
PLACES = ("_DIR", "_PATH", "_ROOT", "_HOME")
"""Ends of those that only say where files are, on a machine of its own."""
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "triton", "numpy")
RSS_INTERVAL_S = 0.002
MB = 1e6


@dataclass(frozen=True)
class Instruments:
    """The outside world as the harness sees it; a test brings its own.

    clock: s, monotonic. others: CPU-seconds that anything but this process has used so far, on the cores it may run
    on. synchronise: waits for the device. gemm: one GEMM, returning its FLOP, or None for no reference. peak_mb: runs
    a call and returns how far memory rose above what was resident, MB. flop: counts the FLOP of a call.
    """

    clock: Callable[[], float]
    others: Callable[[], float]
    load: Callable[[], float]
    synchronise: Callable[[], None]
    gemm: Callable[[], float] | None
    peak_mb: Callable[[Callable[[], object]], float]
    flop: Callable[[Callable[[], object]], float]
    device: str = "cpu"


def instruments(device: torch.device | str = "cpu", gemm_size: int = 2048) -> Instruments:
    """The real ones: GEMM in fp32 on the CPU and in bf16 on a GPU, square of `gemm_size`."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return Instruments(
        clock=time.perf_counter,
        others=_others,
        load=lambda: os.getloadavg()[0],
        synchronise=torch.cuda.synchronize if cuda else lambda: None,
        gemm=_gemm(device, gemm_size),
        peak_mb=_peak_cuda_mb if cuda else _peak_rss_mb,
        flop=count_flop,
        device=str(device),
    )


def _others() -> float:
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    times = [t for i, t in enumerate(psutil.cpu_times(percpu=True)) if i in cores]
    # Stolen time is another machine's work on our core; guest time is already part of user time.
    fields = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(t, field, 0.0) for t in times for field in fields)
    return busy - time.process_time()


def _gemm(device: torch.device, size: int) -> Callable[[], float]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))

    def gemm() -> float:
        with torch.inference_mode():
            torch.mm(a, b, out=out)
        return 2.0 * size**3

    return gemm


def count_flop(call: Callable[[], object]) -> float:
    """Model FLOP of a call: a multiply-add is 2; convolutions, linear layers, attention products; nothing else.

    torch's counter does not know the CPU's fused attention, so it is told.
    """
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    return float(counter.get_total_flops())


def _attention_flop(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward_flop(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


def _peak_cuda_mb(call: Callable[[], object]) -> float:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - resting) / MB


def _peak_rss_mb(call: Callable[[], object]) -> float:
    process = psutil.Process()
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc only: pages that earlier calls freed would hide this one's
        ctypes.CDLL(None).malloc_trim(0)
    resting = process.memory_info().rss
    with _sampled(lambda: process.memory_info().rss) as samples:
        call()
    return max(0, max(samples) - resting) / MB


@contextmanager
def _sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    samples, stop = [read()], threading.Event()

    def sample() -> None:
        while not stop.wait(RSS_INTERVAL_S):
            samples.append(read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
        samples.append(read())


def machine() -> dict[str, Any]:
    """Everything about the machine and the software that a reader needs to judge a number."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "commit": _commit(),
        "environment": {
            k: os.environ[k] for k in sorted(os.environ) if k.startswith(VARIABLES) and not k.endswith(PLACES)
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
