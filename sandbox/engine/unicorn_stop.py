"""Stops where the guest's state is whole: between blocks, and not behind a load or a store.

Unicorn has translated code look for a request to stop (``uc_emu_stop``, from another thread) at the
start of each block and again behind each access to memory. There RIP still points at the
instruction whose access was just done, so a guest that goes on from there does it a second time:
``add [mem], 1`` counts twice. Two ways around that:

- Where no access can be to anything but memory, blocks are translated without looking for requests
  behind accesses: faster by up to 40 %. ``uc_struct.no_exit_request`` says so; Unicorn itself sets
  it for some blocks of other architectures. No interface reaches it, so it is looked for by what it
  does.
- Elsewhere these looks are needed, since they also end the block at an access that is MMIO. There
  another thread leaves a note instead, and a hook at the start of each block reads it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from sandbox.engine.machine_code import address_of, executable_page, function_address
from sandbox.engine.unicorn_layout import Guest, Prober, layout
from sandbox.engine.unicorn_library import (
    UC_HOOK_BLOCK,
    UC_HOOK_MEM_WRITE,
    BlockCallback,
    MemoryCallback,
    library,
    x86,
)

_STRUCT_BYTES: Final = 4096
_WORD: Final = 8
_ASK_AT_A_STORE: Final = "31c9 880425001f0000 ffc1 eb00 f4"
"""XOR ECX, ECX; MOV [0x1F00], AL; INC ECX; JMP $+2; HLT."""
_READ_NOTE: Final = bytes.fromhex(
    "833900 7501 c3"  # cmp dword ptr [rcx], 0; jne $+3; ret
    "c70100000000 ff6108"  # mov dword ptr [rcx], 0; jmp [rcx + 8]
)
"""Code of the hook: RDI is the engine, RCX points to the note, behind which is what to call."""


class _Store:
    """A block whose store asks for a stop."""

    def __init__(self, probe: Prober) -> None:
        self._guest = Guest(probe, layout().old_exception)
        call = probe.lib.call
        self._ask = MemoryCallback(lambda *_: call.uc_emu_stop(probe.handle) == 0)
        hook, everywhere = ctypes.c_size_t(), (ctypes.c_uint64(1), ctypes.c_uint64(0))
        error = call.uc_hook_add(
            probe.handle, ctypes.byref(hook), UC_HOOK_MEM_WRITE, self._ask, None, *everywhere
        )
        probe.lib.check(error, "uc_hook_add")

    def runs_on(self) -> bool:
        """Whether the rest of the block is run."""
        return self._guest.run(_ASK_AT_A_STORE)[layout().gpr // 4 + 2] == 1


def _candidates(probe: Prober) -> Iterator[int]:
    """Offsets of a byte that is 0, before ``init_done``, which is 1, in a word of zeros else."""
    block = probe.peek(probe.handle.value or 0, _STRUCT_BYTES)
    for at in range(len(block) - 1):
        word = block[at & -_WORD : (at & -_WORD) + _WORD]
        if at % _WORD != _WORD - 1 and block[at + 1] == 1 and word.count(0) == _WORD - 1:
            yield at


def _discover() -> list[int]:
    probe = Prober(library())
    found = []
    try:
        probe.write(x86.UC_X86_REG_CR3, bytes(8))  # the state is there from the first write on
        probe.use(layout().cpu, layout().state)
        store = _Store(probe)
        for at in _candidates(probe):
            flag = ctypes.c_uint8.from_address((probe.handle.value or 0) + at)
            seen = [store.runs_on()]
            for value in (1, 0):
                flag.value = value
                seen.append(store.runs_on())
            if seen == [False, True, False]:
                found.append(at)
    finally:
        probe.close()
    return found


@lru_cache(maxsize=1)
def no_exit_request() -> int | None:
    """Offset of that byte in ``uc_struct``; None in a Unicorn that keeps it elsewhere."""
    found = _discover()
    return found[0] if len(found) == 1 else None


class Stopper:
    """Stops one engine. At first it does so by notes."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._handle = handle
        self._library = library()
        self._lock = threading.RLock()
        self._note = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._note).cast("Q")
        self._words[1] = function_address(self._library.call.uc_emu_stop)
        self._callback = self._make_callback()
        self._hook = ctypes.c_size_t()
        offset = no_exit_request()
        self._flag: ctypes.c_uint8 | None = None
        if offset is not None:
            self._flag = ctypes.c_uint8.from_address((handle.value or 0) + offset)
        self.whole_blocks = False
        """Whether blocks run as a whole."""
        self._add_hook()

    def _make_callback(self) -> Any:
        """What reads the note: a few bytes of the host's code, which cost a nanosecond a block."""
        self._code = executable_page(_READ_NOTE)
        if self._code is None:
            return BlockCallback(self._read_note)
        return ctypes.c_void_p(address_of(self._code))

    def _read_note(self, handle: int, *_block: int) -> None:
        if self._words[0]:
            self._words[0] = 0
            self._library.call.uc_emu_stop(ctypes.c_void_p(handle))

    def _add_hook(self) -> None:
        note = ctypes.c_void_p(address_of(self._note))
        everywhere = ctypes.c_uint64(1), ctypes.c_uint64(0)
        error = self._library.call.uc_hook_add(
            self._handle, ctypes.byref(self._hook), UC_HOOK_BLOCK, self._callback, note, *everywhere
        )
        self._library.check(error, "uc_hook_add")

    def run_whole_blocks(self, wanted: bool) -> bool:
        """Have blocks that are translated from now on run as a whole, or not; the engine must not
        be running. Whether that is a change: then the blocks that exist must be forgotten.

        Only right where each access is to memory, or faults.
        """
        wanted = wanted and self._flag is not None
        if wanted == self.whole_blocks:
            return False
        assert self._flag is not None
        with self._lock:
            self.whole_blocks = wanted
            self._flag.value = wanted
            if wanted:
                self._words[0] = 0
                self._library.check(
                    self._library.call.uc_hook_del(self._handle, self._hook), "uc_hook_del"
                )
            else:
                self._add_hook()
        return True

    def stop(self) -> None:
        """Make the engine come back at the start of a block; any thread may call this."""
        with self._lock:
            if self.whole_blocks:
                self._library.call.uc_emu_stop(self._handle)
            else:
                self._words[0] = 1
