"""Time and chance: what a guest's RDTSC and RDRAND show it of the world outside.

Packs find them per vCPU as ``cpu.services["clock"]`` and ``cpu.services["entropy"]``.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Protocol, TypeAlias

TSC_HZ = 2_000_000_000


class Clock(Protocol):
    """A time-stamp counter."""

    def tsc(self) -> int: ...


class HostClock:
    """Counts with the host's monotonic clock at ``hz``, from 0 at its making."""

    def __init__(self, hz: int = TSC_HZ) -> None:
        self.hz = hz
        self._start = time.monotonic_ns()

    def tsc(self) -> int:
        return (time.monotonic_ns() - self._start) * self.hz // 1_000_000_000


class CountingClock:
    """Goes on by ``step`` each time it is looked at: runs are reproducible."""

    def __init__(self, step: int = 1000) -> None:
        self.step = step
        self._now = 0

    def tsc(self) -> int:
        self._now += self.step
        return self._now


Entropy: TypeAlias = Callable[[int], bytes]
"""``entropy(size)`` gives ``size`` random bytes; fewer mean that none are left for now."""


def host_entropy(size: int) -> bytes:
    """The host's random numbers: good ones, different in each run."""
    return os.urandom(size)


def seeded_entropy(seed: int) -> Entropy:
    """The same numbers in every run with the same seed."""
    return random.Random(seed).randbytes
