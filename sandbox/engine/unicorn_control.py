"""Whose page tables the guest is under, and whether its segments or control registers changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sandbox.engine.unicorn_entry import UNTRUSTED, UnicornEntry
from sandbox.engine.unicorn_state import CR0_PG, CR0_WP, EFER_LMA, UnicornBank
from sandbox.paging import AddressSpace

_PAGED: Final = CR0_PG | CR0_WP
"""Page tables stand between the guest and each access, CPL 0's stores too."""


class Control:
    """hflags, segments and control registers of one engine, and what hangs on them.

    ``on_change`` is called when they are found to be others than before, and at each look while
    the guest may change its page tables without our knowing.
    """

    def __init__(
        self, bank: UnicornBank, entry: UnicornEntry, on_change: Callable[[], None]
    ) -> None:
        self._bank = bank
        self._entry = entry
        self._on_change = on_change
        self.view = entry.control
        """As they are."""
        self.known = b""
        """As they were at the last look."""
        self.untrusted = False
        """Whether the guest runs under page tables that it may change without our knowing."""
        self.space: AddressSpace | None = None
        """Page tables that only the machine changes."""
        self.sync = self._make_sync()

    def _make_sync(self) -> Callable[[], None]:
        now, saved = self.view.tobytes, self._entry.saved.tobytes

        def sync() -> None:
            """Look at them."""
            if self.untrusted or now() != saved():
                self._changed()

        return sync

    def _changed(self) -> None:
        self._entry.saved[:] = self.view
        self.known = self.view.tobytes()
        self.untrusted = self._cr(0) & CR0_PG != 0 and not self.is_trusted
        self._entry.note(UNTRUSTED, self.untrusted)
        self._on_change()

    def _cr(self, number: int) -> int:
        return self._bank.quads[self._bank.cr_index + number]

    @property
    def is_trusted(self) -> bool:
        """Whether CR3 leads to page tables that only the machine changes."""
        return self.space is not None and self._cr(3) == self.space.root

    @property
    def only_memory(self) -> bool:
        """Whether each access is to memory, or faults."""
        return (
            self.space is not None
            and self.space.only_memory
            and self.is_trusted
            and self._cr(0) & _PAGED == _PAGED
            and self._bank.read("efer") & EFER_LMA != 0
        )
