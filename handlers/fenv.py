"""Floating-point computations under the guest's MXCSR, at the host's speed where it can be had.

On x86-64 with glibc the host's own SSE unit is lent to the guest for the length of one NumPy
ufunc: :func:`bracket` loads the guest's control bits with ``fesetenv``, runs the computation and
reads the flags back. All exceptions stay masked inside, and the host's environment is restored
whatever happens. There NumPy's lanes are the CPU's, bit for bit, with all six flags.

Elsewhere, and wherever an exception that the guest has not masked may matter, every lane is
computed by :mod:`handlers.softfloat`. :func:`bind_float` joins both ways.
"""

from __future__ import annotations

import contextvars
import ctypes
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from handlers.operands import Lanes, Step
from handlers.softfloat import (
    FLAGS,
    MASKS,
    UM,
    Format,
    Result,
    committed,
    unmasked,
)
from sandbox.cpu import UD, XM, Cpu, Fault

CONTROL = 0xFFC0
"""The bits of MXCSR that are not flags."""

OSXMMEXCPT = 1 << 10
"""CR4 bit: the OS handles #XM; else an unmasked exception is #UD (SDM Vol. 3, 2.5)."""

Exact: TypeAlias = Callable[[int], tuple[list[int], int]]
"""``exact(mxcsr)``: the lanes of the result as bit patterns, computed on integers, and the flags
that the operation leaves in MXCSR."""

Reference: TypeAlias = Callable[..., Result]
"""An operation of :mod:`handlers.softfloat`: ``(format, *bits, mxcsr)``."""

_quiet = contextvars.Context()
_quiet.run(np.seterr, all="ignore")  # NumPy must not look at flags, let alone warn, inside


class _FloatEnvironment:
    """glibc's view of the floating-point environment: ``fenv_t`` and ``femode_t`` as words."""

    def __init__(self) -> None:
        libm = ctypes.PyDLL("libm.so.6")  # PyDLL: no other thread runs in between
        self.libm = libm
        self.set, self.get = self._function("fesetenv"), self._function("fegetenv")
        self.set_mode, self.get_mode = self._function("fesetmode"), self._function("fegetmode")
        self.host_env = self.new_env()
        self.host_mode = (ctypes.c_uint32 * 2)()
        self.get_mode(ctypes.byref(self.host_mode))

    def _function(self, name: str) -> Any:
        function = getattr(self.libm, name)
        function.restype = None
        return function

    def new_env(self) -> ctypes.Array[ctypes.c_uint32]:
        """A ``fenv_t`` (x87 environment, then MXCSR as word 7) with the present contents."""
        env = (ctypes.c_uint32 * 8)()
        self.get(ctypes.byref(env))
        return env


def _open() -> _FloatEnvironment | None:
    """The host's environment, if it is one that :func:`bracket` can lend."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        return None
    try:
        return _FloatEnvironment()
    except (OSError, AttributeError):  # no glibc, or one older than 2.25
        return None


_host = _open()


def bind_mxcsr(cpu: Cpu) -> Callable[[], int]:
    """A function that reads the guest's MXCSR, the fastest way there is."""
    view = cpu.registers.mxcsr_view
    if view is None:
        return partial(cpu.registers.bank.read, "mxcsr")
    return partial(view.__getitem__, 0)


def is_available() -> bool:
    """Whether the host lends its floating-point environment."""
    return _host is not None


def bracket(*stages: Step) -> Callable[[int], int] | None:
    """``run(mxcsr)``: do the stages under the control bits of ``mxcsr``, return the flags raised.

    Each stage is a single call of a NumPy ufunc whose flags count: a ufunc clears those that an
    earlier one raised, so they are read after each stage. None if the host cannot do it.
    """
    if _host is None:
        return None
    env, mode = _host.new_env(), (ctypes.c_uint32 * 2)()
    enter, leave, look = _host.set, _host.set_mode, _host.get_mode
    env_at, mode_at, host_at = map(ctypes.byref, (env, mode, _host.host_mode))
    words, status = memoryview(env).cast("B").cast("I"), memoryview(mode).cast("B").cast("I")
    inside = _quiet.copy().run

    def run_all(mxcsr: int) -> int:
        flags = 0
        words[7] = mxcsr & CONTROL | MASKS
        try:
            enter(env_at)
            for stage in stages:
                inside(stage)
                look(mode_at)
                flags |= status[1]
        finally:
            leave(host_at)
        return flags & FLAGS

    if len(stages) != 1:
        return run_all
    (compute,) = stages
    usual = _host.host_mode[1] & CONTROL

    def run(mxcsr: int) -> int:
        words[7] = control = mxcsr & CONTROL | MASKS
        try:
            enter(env_at)
            inside(compute)
        finally:
            look(mode_at)
            if control != usual:  # else there is nothing to restore: flags are nobody's
                leave(host_at)
        return status[1] & FLAGS

    return run


def quietly(compute: Step) -> Step:
    """``compute`` under the host's own environment, without NumPy's warnings."""
    return partial(_quiet.copy().run, compute)


def bind_float(
    cpu: Cpu, stages: Sequence[Step], exact: Exact, out: Lanes, finish: Step | None = None
) -> Step:
    """A step for ``stages`` (see :func:`bracket`), which raise flags as the CPU would.

    The last of them, or ``finish`` after them, writes ``out``. ``exact`` gives the same on
    integers. Raises #XM, or #UD without CR4.OSXMMEXCPT, with the flags set in MXCSR and ``out``
    unwritten.
    """
    careful = bind_exact(cpu, exact, out)
    run = bracket(*stages)
    read, write = bind_mxcsr(cpu), cpu.registers.bank.write
    if run is None:
        return lambda: careful(read())
    buffer: Any = out
    raw = memoryview(buffer).cast("B")

    def unless_trapped(mxcsr: int) -> None:
        """With exceptions that are not masked: try, and take it back if one was raised."""
        if not mxcsr & UM:  # then even an exact result underflows
            careful(mxcsr)
            return
        saved = bytes(raw)
        flags = run(mxcsr)
        if unmasked(flags, mxcsr):
            raw[:] = saved
            careful(mxcsr)
            return
        if finish is not None:
            finish()
        if flags & ~mxcsr:
            write("mxcsr", mxcsr | flags)

    def step() -> None:
        mxcsr = read()
        if mxcsr & MASKS != MASKS:
            unless_trapped(mxcsr)
            return
        flags = run(mxcsr)
        if finish is not None:
            finish()
        if flags & ~mxcsr:
            write("mxcsr", mxcsr | flags)

    return step


def bind_exact(cpu: Cpu, exact: Exact, out: Lanes) -> Callable[[int], None]:
    """A function of MXCSR that does an operation by ``exact`` alone, traps included."""
    bits = out.view(f"u{out.itemsize}")

    def careful(mxcsr: int) -> None:
        lanes, flags = exact(mxcsr)
        raise_flags(cpu, mxcsr, flags)
        bits[:] = lanes

    return careful


def raise_flags(cpu: Cpu, mxcsr: int, flags: int) -> None:
    """Set ``flags`` in MXCSR; raise #XM, or #UD, if one of them is not masked."""
    if flags & ~mxcsr:
        cpu.mxcsr = mxcsr | flags
    if unmasked(flags, mxcsr):
        raise Fault(XM if cpu.registers.bank.read("cr4") & OSXMMEXCPT else UD)


def each_lane(reference: Reference, f: Format, *sources: Lanes) -> Exact:
    """``exact`` for an operation on corresponding lanes."""
    views = [bits_of(source) for source in sources]

    def exact(mxcsr: int) -> tuple[list[int], int]:
        lanes = zip(*(view.tolist() for view in views), strict=True)
        return collect((reference(f, *operands, mxcsr) for operands in lanes), mxcsr)

    return exact


def collect(results: Iterable[Result], mxcsr: int) -> tuple[list[int], int]:
    """The lanes computed in one step, and the flags that the step leaves in MXCSR."""
    lanes, flags = [], 0
    for bits, raised in results:
        lanes.append(bits)
        flags |= raised
    return lanes, committed(flags, mxcsr)


def bits_of(lanes: Lanes) -> Lanes:
    """The same lanes as unsigned integers."""
    return lanes.view(f"u{lanes.itemsize}")
