"""How a system call ends when it does not return: an error, once more, or the process is over."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """The program ended: ``status`` as a shell shows it, 128 + ``signal`` if it was killed.

    ``reason`` is one line for people where the program did not just exit.
    """

    status: int
    signal: int | None = None
    reason: str = ""


class Again(Exception):
    """The call has to wait: the guest executes the instruction again.

    So no call blocks for long, and a timeout, a stop or Ctrl-C gets its turn in between.
    """


class Leave(Exception):
    """The process is over."""

    def __init__(self, exit: ProcessExit) -> None:
        super().__init__(exit)
        self.exit = exit


def error(number: int) -> OSError:
    """The exception by which a call fails with ``-number``."""
    return OSError(number, os.strerror(number))
