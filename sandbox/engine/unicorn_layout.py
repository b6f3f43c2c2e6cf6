"""Where Unicorn keeps the CPU state: found at run time, verified, never assumed.

An API call per register would dominate the cost of a handler, so handlers read and write
Unicorn's ``CPUX86State`` in place. Its layout is no public contract; it is discovered once per
process by writing random values through the API and looking for them, and each finding is
checked by a second, different write. A Unicorn whose layout cannot be established this way is
refused with a clear error.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from sandbox.engine.unicorn_library import (
    UC_HOOK_INTR,
    UC_PROT_ALL,
    InterruptCallback,
    Library,
    library,
    x86,
)
from sandbox.errors import EngineError
from sandbox.memory import PAGE_SIZE

GPR_IDS = tuple(
    getattr(x86, f"UC_X86_REG_{name}")
    for name in "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()
)

STATE_BYTES = 8192
_HANDLE_BYTES = 4096
_CPU_BYTES = 1 << 17
SEGMENT_BYTES = 24
_SEGMENT_COUNT = 10  # ES CS SS DS FS GS LDTR TR GDTR IDTR


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes: of the CPU in ``uc_struct``, of the state in the CPU, of what is in it."""

    cpu: int
    state: int
    gpr: int
    rip: int
    rflags: int
    hflags: int
    segments: int
    cr: int
    dr: int
    mxcsr: int
    vectors: int
    efer: int
    error_code: int
    old_exception: int
    cc_source: int
    cc_operation: int


class Prober:
    """A scratch engine and the reading of its memory without risk of a crash."""

    def __init__(self, lib: Library) -> None:
        self.lib = lib
        self.handle = lib.open()
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        self.state_at = 0

    def close(self) -> None:
        os.close(self._memory)
        self.lib.call.uc_close(self.handle)

    def peek(self, address: int, size: int) -> bytes:
        """Host memory at ``address``, or less of it, or nothing where nothing is mapped."""
        try:
            return os.pread(self._memory, size, address)
        except (OSError, OverflowError):
            return b""

    def state(self) -> bytes:
        return self.peek(self.state_at, STATE_BYTES)

    def write(self, register: int, data: bytes) -> None:
        error = self.lib.call.uc_reg_write(self.handle, register, data)
        self.lib.check(error, f"uc_reg_write({register})")

    def candidates(self) -> set[tuple[int, int]]:
        """Where the state may be: (offset of a pointer in uc_struct, offset behind it)."""
        pattern = b"".join(self._fill(register, 8) for register in GPR_IDS)
        block = self.peek(self.handle.value or 0, _HANDLE_BYTES)
        found = set()
        for at in range(0, len(block) - 7, 8):
            (pointer,) = struct.unpack_from("<Q", block, at)
            if 1 << 16 <= pointer < 1 << 47:
                behind = self.peek(pointer, _CPU_BYTES).find(pattern)
                if behind >= 0:
                    found.add((at, behind))
        return found

    def use(self, pointer: int, behind: int) -> None:
        """Take a candidate, if new register values show there as well."""
        address = (self.handle.value or 0) + pointer
        self.state_at = struct.unpack("<Q", self.peek(address, 8))[0] + behind
        expected = b"".join(self._fill(register, 8) for register in GPR_IDS)
        if not self.state().startswith(expected):
            raise _unsupported("the general purpose registers")

    def _fill(self, register: int, size: int) -> bytes:
        data = random.randbytes(size)
        self.write(register, data)
        return data

    def find(self, what: str, register: int, first: bytes, second: bytes) -> int:
        """Offset in the state at which ``register`` holds what the API writes into it."""
        self.write(register, first)
        once = self.state()
        self.write(register, second)
        twice = self.state()
        places = _places(once, first) & _places(twice, second)
        if len(places) != 1:
            raise _unsupported(what)
        return places.pop()


def _places(block: bytes, data: bytes) -> set[int]:
    found: set[int] = set()
    at = block.find(data)
    while at >= 0:
        found.add(at)
        at = block.find(data, at + 1)
    return found


def _unsupported(what: str) -> EngineError:
    version = ".".join(map(str, library().version))
    return EngineError(f"this build of Unicorn ({version}) keeps {what} in an unknown place")


def _quads(*values: int) -> tuple[bytes, ...]:
    return tuple(struct.pack("<Q", value) for value in values)


def _find_segments(probe: Prober) -> int:
    """Offset of the segment caches, by the bases of FS and GS and the tables after them."""
    low, high = _quads(0x1122_3344_5566, 0x2233_4455_6677)
    fs = probe.find("FS.base", x86.UC_X86_REG_FS_BASE, low, high)
    gs = probe.find("GS.base", x86.UC_X86_REG_GS_BASE, high, low)
    gdt = struct.Struct("<HxxxxxxQIIxxxxxxxx")  # uc_x86_mmr
    probe.write(x86.UC_X86_REG_GDTR, gdt.pack(0, 0x3344_5566_7788, 0x1234, 0))
    block = probe.state()
    start = fs - 8 - 4 * SEGMENT_BYTES
    table = struct.unpack_from("<Q", block, start + 8 * SEGMENT_BYTES + 8)[0]
    if gs - fs != SEGMENT_BYTES or table != 0x3344_5566_7788:
        raise _unsupported("the segment registers")
    return start


def _find_vectors(probe: Prober) -> int:
    places = []
    for number in range(32):
        first, second = random.randbytes(64), random.randbytes(64)
        places.append(probe.find(f"ZMM{number}", x86.UC_X86_REG_ZMM0 + number, first, second))
    if places != [places[0] + 64 * number for number in range(32)]:
        raise _unsupported("the vector registers")
    return places[0]


def _find_efer(probe: Prober) -> int:
    """EFER is written by MSR number; SCE and NXE are the bits that may change."""

    def put(value: int) -> bytes:
        msr = struct.pack("<IxxxxQ", 0xC000_0080, value)
        probe.write(x86.UC_X86_REG_MSR, msr)
        return probe.state()

    long_mode = 0x500
    places = _places(put(long_mode | 1), _quads(long_mode | 1)[0])
    places &= _places(put(long_mode | 0x800), _quads(long_mode | 0x800)[0])
    if len(places) != 1:
        raise _unsupported("EFER")
    return places.pop()


class Guest:
    """Runs scraps of code that end in an exception."""

    ADDRESS = 0x1000

    def __init__(self, probe: Prober, old_exception: int = -1) -> None:
        self._probe = probe
        self.old_exception = old_exception
        """Its offset in the state, once known."""
        self._page = ctypes.create_string_buffer(2 * PAGE_SIZE)
        self._at = (ctypes.addressof(self._page) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        call, check, handle = probe.lib.call, probe.lib.check, probe.handle
        where = ctypes.c_uint64(self.ADDRESS), ctypes.c_size_t(PAGE_SIZE)
        error = call.uc_mem_map_ptr(handle, *where, UC_PROT_ALL, ctypes.c_void_p(self._at))
        check(error, "uc_mem_map_ptr")
        self._stop = InterruptCallback(lambda *_: call.uc_emu_stop(handle))
        everywhere = ctypes.c_uint64(1), ctypes.c_uint64(0)
        hook = ctypes.c_size_t()
        error = call.uc_hook_add(
            handle, ctypes.byref(hook), UC_HOOK_INTR, self._stop, None, *everywhere
        )
        check(error, "uc_hook_add")

    def settle(self) -> None:
        """Have no exception in flight any more."""
        ctypes.c_int32.from_address(self._probe.state_at + self.old_exception).value = -1

    def run(self, code: str) -> tuple[int, ...]:
        """The state after ``code`` (hex), as signed 32-bit words."""
        probe = self._probe
        data = bytes.fromhex(code)
        ctypes.memmove(self._at, data, len(data))
        probe.lib.remove_cache(probe.handle, self.ADDRESS, self.ADDRESS + 16)
        zero = ctypes.c_uint64(0)
        error = probe.lib.free.uc_emu_start(
            probe.handle, ctypes.c_uint64(self.ADDRESS), zero, zero, ctypes.c_size_t(0)
        )
        probe.lib.check(error, "uc_emu_start")
        return struct.unpack(f"<{STATE_BYTES // 4}i", probe.state())


def _find_rflags(probe: Prober, guest: Guest, at: int, old_exception: int) -> int:
    """RFLAGS: right when the guest has stopped, and taken in when it starts again.

    It is expected at offset ``at``; what three guests leave there shows that it is.
    """

    def after(code: str) -> int:
        ctypes.c_int32.from_address(probe.state_at + old_exception).value = -1
        return guest.run(code)[at // 4]

    zero = after("31c9 f7f1")  # xor ecx, ecx; div ecx
    carry = after("31c9 f9 fd f7f1")  # xor ecx, ecx; stc; std; div ecx
    ctypes.c_uint64.from_address(probe.state_at + at).value = 0x403
    kept = after("b900000000 f7f1")  # mov ecx, 0; div ecx: flags as they were written
    if (zero, carry, kept) != (0x46, 0x447, 0x403):
        raise _unsupported("RFLAGS")
    return at


def _find_lazy_flags(probe: Prober, guest: Guest, rflags: int) -> tuple[int, int]:
    """Offsets of ``cc_src`` and ``cc_op``: where the status flags are while the guest runs.

    They are expected behind RFLAGS. A guest that leaves the flags alone leaves them as RFLAGS was.
    """
    source, operation = rflags + 16, rflags + 32
    for flags in (0x8D5, 0x044):
        guest.settle()
        ctypes.c_uint64.from_address(probe.state_at + rflags).value = flags | 2
        words = guest.run("b900000000 f7f1")  # mov ecx, 0; div ecx
        if (words[source // 4], words[operation // 4]) != (flags, 1):
            raise _unsupported("the status flags")
    return source, operation


def _find_exception(probe: Prober, guest: Guest) -> tuple[int, int]:
    """Offsets of ``error_code`` and ``old_exception``, by guests that fault in known ways.

    A selector beyond the GDT's limit is a #GP with the selector as its error code.
    """
    probe.write(x86.UC_X86_REG_GDTR, struct.pack("<HxxxxxxQIIxxxxxxxx", 0, 0, 7, 0))

    def bad_selector(selector: int) -> tuple[int, ...]:
        return guest.run(f"66b8{selector.to_bytes(2, 'little').hex()}8ed8")  # mov ax; mov ds, ax

    divide = guest.run("31c9 f7f1")
    double = bad_selector(0x1250)  # #GP while #DE is still in flight: #DF
    pairs = enumerate(zip(divide, double, strict=True))
    in_flight = [i for i, pair in pairs if pair == (0, 8)]
    if len(in_flight) != 1:
        raise _unsupported("the exception in flight")
    old = 4 * in_flight[0]
    codes = set(range(8, STATE_BYTES // 4))  # RAX holds the selector as well
    for selector in (0x1250, 0x2340):
        ctypes.c_int32.from_address(probe.state_at + old).value = -1
        codes &= {i for i, value in enumerate(bad_selector(selector)) if value == selector}
    if len(codes) != 1:
        raise _unsupported("the error code")
    return 4 * codes.pop(), old


def _find_state(probe: Prober) -> tuple[int, int]:
    """The pointer that leads to the state in every engine, not by chance of the heap in one."""
    other = Prober(probe.lib)
    try:
        places = probe.candidates() & other.candidates()
    finally:
        other.close()
    if not places:
        raise _unsupported("the general purpose registers")
    pointer, behind = min(places, key=lambda place: place[1])
    probe.use(pointer, behind)
    return pointer, behind


def _discover() -> Layout:
    probe = Prober(library())
    try:
        cpu, state = _find_state(probe)
        low, high = _quads(0x1122_3344_5566, 0x2233_4455_6677)
        rip = probe.find("RIP", x86.UC_X86_REG_RIP, low, high)
        segments = _find_segments(probe)
        pages = _quads(0x1122_3344_5000, 0x2233_4455_6000)
        cr3 = probe.find("CR3", x86.UC_X86_REG_CR3, *pages)
        cr2 = probe.find("CR2", x86.UC_X86_REG_CR2, low, high)
        dr0 = probe.find("DR0", x86.UC_X86_REG_DR0, low, high)
        if cr3 - cr2 != 8 or cr2 - 16 != segments + _SEGMENT_COUNT * SEGMENT_BYTES:
            raise _unsupported("the control registers")
        masks = struct.pack("<I", 0x3FA0), struct.pack("<I", 0x5F95)
        mxcsr = probe.find("MXCSR", x86.UC_X86_REG_MXCSR, *masks)
        vectors = _find_vectors(probe)
        efer = _find_efer(probe)
        probe.write(x86.UC_X86_REG_CR3, bytes(8))
        guest = Guest(probe)
        error_code, old_exception = _find_exception(probe, guest)
        rflags = _find_rflags(probe, guest, rip + 8, old_exception)
        guest.old_exception = old_exception
        lazy_flags = _find_lazy_flags(probe, guest, rflags)
    finally:
        probe.close()
    return Layout(
        cpu, state, 0, rip, rflags, segments - 8, segments, cr2 - 16, dr0, mxcsr, vectors, efer,
        error_code, old_exception, *lazy_flags,
    )  # fmt: skip


@lru_cache(maxsize=1)
def layout() -> Layout:
    """The layout of the installed Unicorn, discovered at the first call (a few ms).

    A random value may by chance stand in two places; that does not happen twice.
    """
    for _attempt in range(2):
        with suppress(EngineError):
            return _discover()
    return _discover()


def state_address(handle: ctypes.c_void_p) -> int:
    """Host address of the CPU state of an open engine."""
    found = layout()
    pointer = ctypes.c_uint64.from_address((handle.value or 0) + found.cpu).value
    return pointer + found.state
