"""Who makes the shards: this process, several processes, or a Ray cluster. What is made is the same."""

import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

EXECUTORS = ("serial", "processes", "ray")
Job = Callable[[int], Any]


def run(job: Job, numbers: list[int], executor: str, workers: int) -> Iterator[int]:
    """Do `job(number)` for each number, in any order; yields each number when it is done.

    serial: here. processes: `workers` new ones. ray: on the cluster that RAY_ADDRESS names, or a local one of
    `workers` CPUs (0: all). A worker that dies is replaced and its number tried once more; then the others go on,
    and at the end RuntimeError names those that are not done. What `job` raises ends the run. Raises ValueError
    for an unknown executor, or ray where it is not installed.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r}: allowed are {', '.join(EXECUTORS)}")
    if executor == "serial":
        return _here(job, numbers)
    if executor == "processes":
        return _in_processes(job, numbers, max(workers, 1))
    return _on_ray(job, numbers, workers)


def _here(job: Job, numbers: list[int]) -> Iterator[int]:
    for number in numbers:
        job(number)
        yield number


def _report_lost(lost: list[int]) -> None:
    if lost:
        raise RuntimeError(
            f"worker processes died twice (out of memory?) making shards {', '.join(map(str, sorted(lost)))}; "
            "all others are kept: run the same command again, with fewer workers"
        )


def _in_processes(job: Job, numbers: list[int], workers: int) -> Iterator[int]:
    crew = _Crew(job)
    todo, deaths = deque(numbers), Counter[int]()
    try:
        while todo or crew.busy:
            while todo and len(crew.busy) < workers:
                crew.give(todo.popleft())
            for number, done in crew.finished():
                if done:
                    yield number
                    continue
                deaths[number] += 1
                if deaths[number] == 1:
                    todo.append(number)
    finally:
        crew.dismiss()
    _report_lost([number for number, count in deaths.items() if count > 1])


class _Crew:
    """Worker processes at the end of pipes. A pipe that closes is how a death is noticed."""

    def __init__(self, job: Job) -> None:
        # spawn: this process may have threads (torch, a progress bar), and a fork would copy their locks
        self._context = multiprocessing.get_context("spawn")
        self._job = job
        self._processes: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        self.busy: dict[Connection, int] = {}

    def give(self, number: int) -> None:
        """Have someone do it."""
        pipe = self._idle.pop() if self._idle else self._hire()
        self.busy[pipe] = number
        with suppress(OSError):  # it died while idle: `finished` will see that
            pipe.send(number)

    def finished(self) -> Iterator[tuple[int, bool]]:
        """(number, True when done, False when the worker died), as soon as there is at least one.

        Raises what the job raised.
        """
        for ready in wait(list(self.busy)):
            pipe: Any = ready
            number = self.busy.pop(pipe)
            try:
                error = pipe.recv()
            except (EOFError, OSError):
                self._processes.pop(pipe).join()
                pipe.close()
                yield number, False
                continue
            if error is not None:
                raise error
            self._idle.append(pipe)
            yield number, True

    def dismiss(self) -> None:
        """Let those who are idle go, and stop the others."""
        for pipe, process in self._processes.items():
            pipe.close()
            if pipe in self.busy:
                process.terminate()
            process.join()
            process.close()

    def _hire(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._job, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours


def _work(job: Job, pipe: Connection) -> None:
    """A worker's life: numbers in, None or an exception out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends us
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number = pipe.recv()
            try:
                job(number)
                error: Exception | None = None
            except Exception as raised:
                raised.add_note(traceback.format_exc())  # the stack itself does not travel
                error = _that_travels(raised)
            pipe.send(error)


def _that_travels(error: Exception) -> Exception:
    """The same exception, or one that says the same where its own class cannot be sent or rebuilt at the other end."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _on_ray(job: Job, numbers: list[int], workers: int) -> Iterator[int]:
    try:
        import ray
    except ImportError as error:
        raise ValueError("executor='ray' needs the package ray: pip install 'ldm[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        local: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers or None, "include_dashboard": False}
        )
        ray.init(log_to_driver=False, configure_logging=False, **local)
    try:
        # max_retries counts deaths of the process or its machine, not what the job raises
        call = ray.remote(num_cpus=1, max_retries=1)(_call)
        shared = ray.put(job)  # travels once a machine, not once a shard
        todo, lost = deque(numbers), list[int]()
        busy: dict[Any, int] = {}
        at_once = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        while todo or busy:
            while todo and len(busy) < at_once:
                number = todo.popleft()
                busy[call.remote(shared, number)] = number
            for ready in ray.wait(list(busy), num_returns=1)[0]:
                number = busy.pop(ready)
                try:
                    ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError:
                    lost.append(number)
                    continue
                yield number
        _report_lost(lost)
    finally:
        if ours:
            ray.shutdown()


def _call(job: Job, number: int) -> None:
    job(number)
