"""What the processes of a run agree on without waiting for a device; and being alone for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed, tensor

from ldm.training.gathering import processes


class Ranks:
    """The processes of a run, talking from host to host (gloo), so that nothing on a GPU is waited for.

    Every process must ask the same things in the same order. RuntimeError if another is gone, or after `timeout`
    seconds of waiting for it.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self.rank, self.count = processes()
        self._group: Any = None
        if self.count > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def largest(self, value: int) -> int:
        """The largest of the values that the processes bring."""
        if self.count == 1:
            return int(value)
        found = tensor(int(value))
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._group)
        return int(found)

    def everyones(self, value: Any) -> list[Any]:
        """What each process brings, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value, group=self._group)
        return found


def part() -> None:
    """Leave the other processes for good: an interpreter that ends while they are still connected may abort."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block torch says that this process is by itself: nothing is gathered, and nobody waited for.

    Whatever gathers asks torch before, our tasks and torch's own layers alike; so the question is where it is told.
    """
    asked = distributed.is_initialized
    distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        distributed.is_initialized = asked
