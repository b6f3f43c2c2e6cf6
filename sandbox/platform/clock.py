"""The time that a machine's timers go by, in nanoseconds."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """``now`` never goes back; ``sleep`` lets time pass while the guest is halted."""

    def now(self) -> int: ...
    def sleep(self, duration: int) -> None: ...


class RealClock:
    """The host's monotonic clock."""

    def now(self) -> int:
        return time.monotonic_ns()

    def sleep(self, duration: int) -> None:
        time.sleep(duration / 1e9)


class ManualClock:
    """Stands still while the guest runs, and jumps to the next event while it is halted."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        return self.time

    def sleep(self, duration: int) -> None:
        self.time += duration
