"""Into the guest and back, with as little of Python around it as there can be.

A trapped instruction costs the way out of Unicorn and back: what has to be done at each entry and
exit is therefore a few instructions of machine code around ``uc_emu_start``. They lend the upper
halves of YMM registers to lowered code, and tell whether there is more to see to than a trap. Where
no machine code can be made, the same is done in Python.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final

from sandbox.engine.machine_code import address_of, executable_page, function_address
from sandbox.engine.unicorn_library import UC_ERR_INSN_INVALID, library
from sandbox.engine.unicorn_state import UnicornBank

TRAPPED: Final = UC_ERR_INSN_INVALID
"""What :attr:`UnicornEntry.enter` returns at a trapped instruction, if nothing else is the case."""
ERRORS: Final = 0xFF
"""Bits of what it returns: UC_ERR_*."""
DUE, PATCHED, UNTRUSTED, CHANGED = 1 << 8, 1 << 9, 1 << 10, 1 << 11
"""More bits: the guest was not entered, since something is due; a patch is in place; page tables
may have changed; hflags, segments or control registers are not what they were."""
_DUE, _NOTICE, _SAVED = 0, 1, 2
"""Indices of words of 8 bytes; the last is where the saved control registers begin."""
_BLOCK: Final = 16
YMM_COUNT: Final = 16
_ZMM_BYTES: Final = 64


class UnicornEntry:
    """The door of one engine."""

    def __init__(self, handle: ctypes.c_void_p, bank: UnicornBank) -> None:
        self._bank = bank
        self._start = library().free.uc_emu_start
        self._arguments = (handle, bank.rip_argument, None, None, None)
        """Made once: to convert them would cost more than the call. The address to start at is RIP
        itself, passed from where Unicorn keeps it; no end, timeout or count: None is the 0 of 64
        bits that ctypes is quickest with."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._memory).cast("Q")
        at = 8 * _SAVED
        self.control = bank.control_view
        """hflags, segments and control registers as they are."""
        self.saved = memoryview(self._memory)[at : at + len(self.control)]
        """The same as they were when somebody last looked."""
        self._upper: tuple[Any, Any] | None = None
        self._code = executable_page()
        if self._code is None:
            self.enter: Callable[[], int] = self._make_enter()
        else:
            self._write_code(0, 0)
            self.enter = ctypes.CFUNCTYPE(ctypes.c_int)(address_of(self._code))

    def start(self) -> int:
        """The bare ``uc_emu_start``; returns its error."""
        return int(self._start(*self._arguments))

    @property
    def due(self) -> bool:
        """Whether there is something to do before the guest may be entered."""
        return self._words[_DUE] != 0

    @due.setter
    def due(self, value: bool) -> None:
        self._words[_DUE] = DUE if value else 0

    def note(self, bit: int, value: bool) -> None:
        """Set PATCHED or UNTRUSTED in what :attr:`enter` returns, or clear it."""
        self._words[_NOTICE] = self._words[_NOTICE] & ~bit | (bit if value else 0)

    def lend(self, upper: Any, lent: Any) -> None:
        """Have the upper halves of YMM0-15 copied at each entry from ``upper`` to ``lent``, at each
        exit back: arrays of 16 items of 16 bytes, 64 bytes apart in ``upper``, in one piece in
        ``lent``."""
        self._upper = upper, lent
        if self._code is not None:
            self._write_code(upper.ctypes.data, lent.ctypes.data)

    def _make_enter(self) -> Callable[[], int]:
        """What :meth:`_write_code` writes, in Python."""
        words, control, saved = self._words, self.control, self.saved

        def enter() -> int:
            if words[_DUE]:
                return words[_DUE]
            if self._upper is not None:
                upper, lent = self._upper
                lent[:] = upper
                error = self.start()
                upper[:] = lent
            else:
                error = self.start()
            changed = CHANGED if control.tobytes() != saved.tobytes() else 0
            return error | words[_NOTICE] | changed

        return enter

    def _write_code(self, upper: int, lent: int) -> None:
        assert self._code is not None
        words = address_of(self._memory)
        code = b"".join((
            b"\x53",  # push rbx
            b"\x48\xbb", _u64(words),
            b"\x8b\x03",  # mov eax, [rbx]
            b"\x85\xc0\x74\x02\x5b\xc3",  # test eax, eax; jz $+4; pop rbx; ret
            _copy(upper, _ZMM_BYTES, lent, _BLOCK) if upper else b"",
            b"\x48\xb8", _u64(ctypes.addressof(self._bank.rip_argument)),
            b"\x48\x8b\x30",  # mov rsi, [rax]
            b"\x48\xbf", _u64(self._arguments[0].value or 0),
            b"\x31\xd2\x31\xc9\x45\x31\xc0",  # xor edx, edx; xor ecx, ecx; xor r8d, r8d
            b"\x48\xb8", _u64(function_address(self._start)),
            b"\xff\xd0",  # call rax
            _copy(lent, _BLOCK, upper, _ZMM_BYTES) if upper else b"",
            self._compare(),
            b"\x0b\x43", bytes((8 * _NOTICE,)),  # or eax, [rbx + 8]
            b"\x5b\xc3",
        ))  # fmt: skip
        self._code[: len(code)] = code

    def _compare(self) -> bytes:
        """CHANGED into EAX if the control registers are not as saved."""
        size = len(self.saved)
        control = ctypes.addressof(ctypes.c_char.from_buffer(self.control))
        parts = [
            b"\x48\xb9", _u64(control),  # mov rcx
            b"\x48\x8d\x53", bytes((8 * _SAVED,)),  # lea rdx, [rbx + 16]
            b"\x66\x0f\x76\xc0",  # pcmpeqd xmm0, xmm0
        ]  # fmt: skip
        for at in [*range(0, size - _BLOCK, _BLOCK), size - _BLOCK]:
            parts += [
                b"\xf3\x0f\x6f\x89", _i32(at),  # movdqu xmm1, [rcx + at]
                b"\xf3\x0f\x6f\x92", _i32(at),  # movdqu xmm2, [rdx + at]
                b"\x66\x0f\x74\xca\x66\x0f\xdb\xc1",  # pcmpeqb xmm1, xmm2; pand xmm0, xmm1
            ]  # fmt: skip
        parts += [
            b"\x66\x0f\xd7\xc8",  # pmovmskb ecx, xmm0
            b"\x81\xf1\xff\xff\x00\x00\x74\x05",  # xor ecx, 0xffff; jz over the next
            b"\x0d", _i32(CHANGED),  # or eax, CHANGED
        ]  # fmt: skip
        return b"".join(parts)


def _copy(source: int, step: int, target: int, target_step: int) -> bytes:
    """YMM_COUNT times 16 bytes, so many bytes from one to the next; EAX stays."""
    parts = [b"\x48\xb9", _u64(source), b"\x48\xba", _u64(target)]  # mov rcx; mov rdx
    for n in range(YMM_COUNT):
        parts += [b"\x0f\x10\x81", _i32(n * step)]  # movups xmm0, [rcx + n * step]
        parts += [b"\x0f\x11\x82", _i32(n * target_step)]  # movups [rdx + n * target_step], xmm0
    return b"".join(parts)


def _i32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")
