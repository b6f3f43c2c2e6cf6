"""Ctrl-C while a guest runs: KeyboardInterrupt at once, but never inside the engine's callbacks.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a callback of the engine
it would be lost, and with it the check of the block that was about to run; there, the vCPU is
asked to stop instead, and the exception follows when it has.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from sandbox.errors import HandlerTimeoutError
from sandbox.vcpu import Vcpu


def run_interruptibly(vcpu: Vcpu, timeout: float | None) -> Any:
    """As :meth:`Vcpu.run`; KeyboardInterrupt on Ctrl-C, from the main thread."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("sandbox.engine."):
                asked.append(number)
                vcpu.deadline = time.monotonic()  # for a handler that never ends, met just now
                vcpu.request_stop()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return vcpu.run(timeout)
    before = signal.signal(signal.SIGINT, handle)
    left = None
    try:
        left = vcpu.run(timeout)
    except HandlerTimeoutError:
        if not asked:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
    return left
