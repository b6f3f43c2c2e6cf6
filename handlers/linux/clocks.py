"""Time: clocks and sleeping. A sleep waits in short steps, so that a run can always be stopped."""

from __future__ import annotations

import struct
import time
from errno import EINVAL

from handlers.linux.outcome import Again, error
from handlers.linux.process import Process
from handlers.linux.syscalls import syscall

_TIMESPEC = struct.Struct("<qq")
SECOND = 1_000_000_000
CLOCKS = {
    0: time.CLOCK_REALTIME,
    1: time.CLOCK_MONOTONIC,
    2: time.CLOCK_PROCESS_CPUTIME_ID,
    3: time.CLOCK_THREAD_CPUTIME_ID,
    4: time.CLOCK_MONOTONIC,  # CLOCK_MONOTONIC_RAW
    5: time.CLOCK_REALTIME,  # CLOCK_REALTIME_COARSE
    6: time.CLOCK_MONOTONIC,  # CLOCK_MONOTONIC_COARSE
    7: time.CLOCK_MONOTONIC,  # CLOCK_BOOTTIME
    11: time.CLOCK_REALTIME,  # CLOCK_TAI
}
"""The kernel's clock numbers to the host clock that stands for each."""
_SLEEPABLE = frozenset({0, 1, 2, 7, 11})
TIMER_ABSTIME = 1
SLEEP_STEP = 0.05
"""Seconds slept before the guest executes the call again."""


def now(process: Process, clock: int) -> int:
    """Nanoseconds of a clock by its kernel number; EINVAL if there is none."""
    if clock not in CLOCKS:
        raise error(EINVAL)
    return process.clock(CLOCKS[clock])


def read_timespec(process: Process, address: int) -> int:
    """A ``struct timespec`` in nanoseconds; EINVAL if it is negative or malformed."""
    seconds, nanoseconds = _TIMESPEC.unpack(process.cpu.read(address, _TIMESPEC.size))
    if seconds < 0 or not 0 <= nanoseconds < SECOND:
        raise error(EINVAL)
    return int(seconds * SECOND + nanoseconds)


def wait_until(process: Process, clock: int, end: int) -> None:
    """Sleep a step towards ``end`` and raise Again, or return because it has passed."""
    left = (end - now(process, clock)) / SECOND
    if left <= 0:
        return
    process.sleep(min(left, SLEEP_STEP))
    if left > SLEEP_STEP:
        raise Again


def sleep_for(process: Process, clock: int, duration: int) -> None:
    """Sleep ``duration`` nanoseconds from when the call was first made."""
    if process.waiting is None:
        process.waiting = now(process, clock) + duration
    wait_until(process, clock, process.waiting)


@syscall(35, "nanosleep", "address address")
def nanosleep(process: Process, wanted: int, left: int) -> int:
    sleep_for(process, 1, read_timespec(process, wanted))
    return 0


@syscall(230, "clock_nanosleep", "int int address address")
def clock_nanosleep(process: Process, clock: int, flags: int, wanted: int, left: int) -> int:
    if clock not in _SLEEPABLE or flags & ~TIMER_ABSTIME:
        raise error(EINVAL)
    time_ = read_timespec(process, wanted)
    if flags & TIMER_ABSTIME:
        wait_until(process, clock, time_)
    else:
        sleep_for(process, clock, time_)
    return 0


@syscall(228, "clock_gettime", "int address")
def clock_gettime(process: Process, clock: int, where: int) -> int:
    process.cpu.write(where, _TIMESPEC.pack(*divmod(now(process, clock), SECOND)))
    return 0


@syscall(229, "clock_getres", "int address")
def clock_getres(process: Process, clock: int, where: int) -> int:
    if clock not in CLOCKS:
        raise error(EINVAL)
    if where:
        process.cpu.write(where, _TIMESPEC.pack(0, 1))
    return 0


@syscall(96, "gettimeofday", "address address")
def gettimeofday(process: Process, where: int, timezone: int) -> int:
    if where:
        seconds, nanoseconds = divmod(now(process, 0), SECOND)
        process.cpu.write(where, _TIMESPEC.pack(seconds, nanoseconds // 1000))
    if timezone:
        process.cpu.write(timezone, bytes(8))
    return 0


@syscall(201, "time", "address")
def time_seconds(process: Process, where: int) -> int:
    seconds = now(process, 0) // SECOND
    if where:
        process.write_int(where, seconds, 8)
    return seconds


@syscall(100, "times", "address")
def times(process: Process, where: int) -> int:
    """Clock ticks (USER_HZ, 100 a second): all of the time is the user's."""
    if where:
        used = now(process, 2) * 100 // SECOND
        process.cpu.write(where, struct.pack("<4q", used, 0, 0, 0))
    return now(process, 1) * 100 // SECOND


@syscall(98, "getrusage", "int address")
def getrusage(process: Process, who: int, where: int) -> int:
    if who not in (0, -1, 1):
        raise error(EINVAL)
    used = 0 if who == -1 else now(process, 2)
    process.cpu.write(where, struct.pack("<2q128x", used // SECOND, used % SECOND // 1000))
    return 0
