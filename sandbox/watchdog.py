"""A thread that interrupts running guests: deadlines, Ctrl-C, handlers that never return.

While a vCPU is inside the engine, Python cannot run signal handlers; so the thread makes every
running engine come back a few times a second, which costs next to nothing, and past the deadline
for good. A handler that is still running well after the deadline gets :class:`HandlerTimeout`
raised inside it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from contextlib import suppress
from typing import Protocol

from sandbox.fallback import HandlerTimeout

TICK_SECONDS = 0.05
GRACE_SECONDS = 0.25
_EMULATING = frozenset({"trapped", "_step"})
"""Functions of the vCPU that call handlers."""


class Watched(Protocol):
    """A running vCPU. ``thread`` is the identifier of the thread that runs it."""

    thread: int
    deadline: float | None

    def interrupt(self) -> None:
        """Make the engine come back; the vCPU looks at its deadline itself."""
        ...


class Watchdog:
    """One thread for all vCPUs of the process; it sleeps while none is running."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._running: list[Watched] = []
        self._late: set[Watched] = set()
        """Those in which a HandlerTimeout was raised, and may not have come yet."""
        self._thread: threading.Thread | None = None

    def add(self, vcpu: Watched) -> None:
        with self._wake:
            self._running.append(vcpu)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)
                self._thread.start()
            self._wake.notify()

    def remove(self, vcpu: Watched) -> None:
        """No :class:`HandlerTimeout` comes after this returns; the vCPU's own thread calls it."""
        with self._wake:
            self._running.remove(vcpu)
            late = vcpu in self._late
            self._late.discard(vcpu)
        if late:
            _take_pending()

    def _loop(self) -> None:
        while True:
            with self._wake:
                if not self._running:
                    self._wake.wait()
                now = time.monotonic()
                for vcpu in self._running:
                    vcpu.interrupt()
                    late = vcpu.deadline is not None and now > vcpu.deadline + GRACE_SECONDS
                    if late and _in_handler_tier(vcpu.thread):
                        self._late.add(vcpu)
                        _raise_in(vcpu.thread, HandlerTimeout)
            time.sleep(TICK_SECONDS)


def _in_handler_tier(thread: int) -> bool:
    """Whether a thread is emulating an instruction, and not in the engine or on its way out.

    An exception inside the engine's callbacks would be lost, and with it the check of a block. From
    the handler tier there is no way into the engine that Python does not raise it before.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("sandbox.engine."):
            return False
        if name == "sandbox.vcpu" and frame.f_code.co_name in _EMULATING:
            return True
        frame = frame.f_back
    return False


def _raise_in(thread: int, error: type[BaseException]) -> None:
    """Raise ``error`` in a thread at one of its next bytecodes."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _take_pending() -> None:
    """Let an exception come that :func:`_raise_in` may have left pending in this thread.

    Taking it back with a NULL would leave the interpreter looking for it at every bytecode.
    """
    with suppress(HandlerTimeout):
        for _ in range(1000):
            pass


WATCHDOG = Watchdog()
