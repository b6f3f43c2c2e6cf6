"""The signal state of a process: dispositions, mask, what is pending and the alternate stack."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

STACK_T = struct.Struct("<QixxxxQ")
"""``stack_t``: sp, flags, size."""
SS_DISABLE = 2


@dataclass(slots=True)
class Signals:
    """What the program asked for, and the signals that wait for the mask."""

    actions: dict[int, bytes] = field(default_factory=dict)
    """Signal to its ``struct sigaction``."""
    mask: int = 0
    pending: int = 0
    stack: bytes = field(default_factory=lambda: STACK_T.pack(0, SS_DISABLE, 0))

    def disposition(self, signal: int) -> int:
        """SIG_DFL, SIG_IGN or the address of a handler."""
        return int.from_bytes(self.actions.get(signal, bytes(8))[:8], "little")
