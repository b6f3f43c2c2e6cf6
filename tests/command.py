"""The command ``sandbox``, run inside the test's process or as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox.cli import main

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "sandbox"]


@dataclass
class Ended:
    """How the command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr, without its prefix; AssertionError if it is not one."""
        assert self.err.count("\n") == 1 and self.err.startswith("sandbox: "), self.err
        return self.err[len("sandbox: ") : -1]


class Command:
    """Runs ``sandbox ARGUMENTS`` in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: object) -> Ended:
        self._capture.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leave:  # argparse
            status = int(leave.code or 0)
        out, err = self._capture.readouterr()
        return Ended(status, out, err)


def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    """``sandbox ARGUMENTS`` as a process, its output in pipes."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )
