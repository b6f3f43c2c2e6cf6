"""How the run of a program in one of the emulators ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """``status`` is the program's exit status, None if the emulator could not go on: ``refused``
    says why. ``traps`` counts instructions that went to handlers."""

    status: int | None = None
    refused: str = ""
    traps: int = 0
