"""QEMU's firmware configuration device: what a kernel asks about the machine.

Source: QEMU's docs/specs/fw_cfg.rst. Only the port interface; no DMA, no files.
"""

from __future__ import annotations

from typing import Final

FW_CFG_PORT: Final = 0x510
FW_CFG_COUNT: Final = 2

SIGNATURE, INTERFACE, RAM_SIZE, CPUS, MAX_CPUS, FILES = 0, 1, 3, 5, 0xF, 0x19


class FwCfg:
    """A selector of 16 bits at the first port, and the item's bytes, one by one, at the second."""

    def __init__(self, ram: int) -> None:
        one = (1).to_bytes(2, "little")
        self._items = {
            SIGNATURE: b"QEMU",
            INTERFACE: (1).to_bytes(4, "little"),
            RAM_SIZE: ram.to_bytes(8, "little"),
            CPUS: one,
            MAX_CPUS: one,
            FILES: bytes(4),
        }
        self._selected = b""
        self._at = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the item; 0 behind its end."""
        if not offset:
            return 0
        data = self._selected[self._at : self._at + 1]
        self._at += 1
        return data[0] if data else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if not offset and size == 2:
            self._selected, self._at = self._items.get(value, b""), 0
