"""The child process of :mod:`sandbox.native`: runs single instructions on the host CPU.

Standard library only, so that it starts fast and nothing else lives in a process whose memory an
instruction under test may spoil. Protocol: the shared memory file on descriptor ``argv[1]`` holds
:data:`SLOTS` slots; a 32-bit count on stdin runs that many slots from number :data:`FIRST`
onwards, and the count comes back on stdout. The first line on stdout is JSON: CPUID and XCR0.

A slot is a *frame* (registers, see the offsets below) followed by the test memory. It holds the
state to start from and afterwards the state that came out.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys

PAGE = 0x1000
REGION = 0x6000_0000
REGION_SIZE = 0x5000
"""Test memory: one read-only page, four writable ones; unmapped pages on both sides. Below 4 GB,
so that 32-bit addresses reach it."""
CODE = 0x7000_0000
"""Where the instruction stands, so that RIP-relative operands are the same everywhere."""

# Frame: XSAVE area (standard format) first, then these.
FRAME = 0x1000
XSAVE_LIMIT = 0xC00
GPR = 0xC00
RFLAGS = 0xC80
SIGNAL, SI_CODE, TRAP, ERROR, CR2, FAULT_RIP = (0xC88 + 8 * i for i in range(6))
GS_BASE = 0xCB8
INSN_LENGTH = 0xCC0
INSN = 0xCC1

SLOT = FRAME + REGION_SIZE
SLOTS = 64
PROGRESS = SLOTS * SLOT
"""Number of the slot being run: who is to blame when the process dies."""
FIRST = PROGRESS + 8
SHARED_SIZE = PROGRESS + PAGE

COMPONENTS = 0xE7
"""x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM: the XCR0 bits that a state carries."""

CPUID_LEAVES = ((1, 0), (7, 0), (7, 1), (0xD, 0), (0xD, 1), (0xD, 2), (0xD, 5), (0xD, 6), (0xD, 7),
                (0x14, 0), (0x19, 0), (0x1E, 1), (0x24, 0), (0x80000001, 0), (0x80000007, 0),
                (0x80000008, 0))  # fmt: skip

_IN, _OUT, _HOST, _HOST_RSP = PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE
_ARENA = 5 * PAGE
_ENTRY, _EXIT, _HANDLER = 0x40, 0x200, 0x400  # the instruction itself stands at 0
_RSP, _RDI = 4, 7
_CALLEE_SAVED = (3, 5, 12, 13, 14, 15)

# ucontext_t on x86-64 Linux: 8 flags, 8 link, 24 stack, then the general registers
_GREGS = 40
_GREG_RIP, _GREG_EFL, _GREG_ERR, _GREG_TRAP, _GREG_CR2 = (
    _GREGS + 8 * i for i in (16, 17, 19, 20, 22)
)

_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_SYS_ARCH_PRCTL, _ARCH_SET_GS = 158, 0x1001
_MAP_FIXED, _MAP_FIXED_NOREPLACE = 0x10, 0x100000


class _Assembler:
    """Machine code for address ``CODE + at``; operands are offsets into the arena, RIP-relative."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.out = bytearray()

    def raw(self, text: str) -> None:
        self.out += bytes.fromhex(text)

    def relative(self, opcode: bytes, target: int) -> None:
        """``opcode`` ending in a 32-bit displacement to ``target``."""
        end = self.at + len(self.out) + len(opcode) + 4
        self.out += opcode + struct.pack("<i", target - end)

    def load(self, register: int, target: int) -> None:
        """mov r64, [target]"""
        opcode = bytes((0x48 | (register >> 3) << 2, 0x8B, 0x05 | (register & 7) << 3))
        self.relative(opcode, target)

    def store(self, register: int, target: int) -> None:
        """mov [target], r64"""
        opcode = bytes((0x48 | (register >> 3) << 2, 0x89, 0x05 | (register & 7) << 3))
        self.relative(opcode, target)

    def push_pop(self, registers: tuple[int, ...], base: int) -> None:
        for register in registers:
            self.out += bytes([0x41] * (register >> 3) + [base + (register & 7)])

    def mask(self, components: int) -> None:
        """mov eax, components; xor edx, edx"""
        self.out += b"\xb8" + struct.pack("<I", components) + b"\x31\xd2"


def _entry(components: int) -> bytes:
    """Keep the host's registers, load all of ``_IN``, fall into the instruction."""
    asm = _Assembler(_ENTRY)
    asm.push_pop(_CALLEE_SAVED, 0x50)
    asm.store(_RSP, _HOST_RSP)
    asm.mask(components)
    asm.relative(b"\x48\x0f\xae\x25", _HOST)  # xsave64
    asm.relative(b"\x48\x0f\xae\x2d", _IN)  # xrstor64
    asm.relative(b"\xff\x35", _IN + RFLAGS)  # push
    asm.raw("9d")  # popfq
    for register in range(16):
        asm.load(register, _IN + GPR + 8 * register)
    asm.relative(b"\xe9", 0)
    return bytes(asm.out)


def _exit(components: int) -> bytes:
    """Store all registers to ``_OUT``, give the host its own back and return."""
    asm = _Assembler(_EXIT)
    for register in range(16):
        asm.store(register, _OUT + GPR + 8 * register)
    asm.load(_RSP, _HOST_RSP)
    asm.raw("9c")  # pushfq
    asm.relative(b"\x8f\x05", _OUT + RFLAGS)  # pop
    asm.raw("6a02 9d")  # push 2; popfq: DF and AC off
    asm.mask(components)
    asm.relative(b"\x48\x0f\xae\x25", _OUT)  # xsave64
    asm.relative(b"\x48\x0f\xae\x2d", _HOST)  # xrstor64
    asm.push_pop(_CALLEE_SAVED[::-1], 0x58)
    asm.raw("c3")
    return bytes(asm.out)


def _signal_handler() -> bytes:
    """``handler(rdi=signal, rsi=siginfo, rdx=ucontext)``: note the fault, return to ``_EXIT``.

    sigreturn gives back every register as it was at the fault, so ``_EXIT`` stores just that.
    A fault outside of the arena's code is a fault of this process: ud2 with all signals blocked
    ends it.
    """
    asm = _Assembler(_HANDLER)
    asm.store(_RDI, _OUT + SIGNAL)
    asm.raw("48634608")  # movsxd rax, dword [rsi+8]
    asm.store(0, _OUT + SI_CODE)
    for source, target in ((_GREG_TRAP, TRAP), (_GREG_ERR, ERROR), (_GREG_CR2, CR2)):
        asm.out += b"\x48\x8b\x82" + struct.pack("<I", source)  # mov rax, [rdx+source]
        asm.store(0, _OUT + target)
    asm.out += b"\x48\x8b\x82" + struct.pack("<I", _GREG_RIP)
    asm.store(0, _OUT + FAULT_RIP)
    asm.relative(b"\x48\x8d\x0d", 0)  # lea rcx, [CODE]
    asm.raw("4829c8 483d00100000 7202 0f0b")  # sub rax, rcx; cmp rax, 4096; jb +2; ud2
    asm.relative(b"\x48\x8d\x05", _EXIT)  # lea rax, [_EXIT]
    asm.out += b"\x48\x89\x82" + struct.pack("<I", _GREG_RIP)
    asm.out += b"\x81\xa2" + struct.pack("<II", _GREG_EFL, 0xFFFF_FEFF)  # TF off
    asm.raw("c3")
    return bytes(asm.out)


def _cpuid_code() -> bytes:
    """``f(rdi=leaf, rsi=subleaf, rdx=u32[4])``, and at +64 ``u64 xgetbv(0)``."""
    cpuid = bytes.fromhex("53 4989d0 89f8 89f1 0fa2 418900 41895804 41894808 4189500c 5b c3")
    return cpuid.ljust(64, b"\xcc") + bytes.fromhex("31c9 0f01d0 48c1e220 4809d0 c3")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    return libc


_LIBC = _libc()


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int = 0) -> int:
    """mmap(2); OSError if it fails or lands elsewhere than a fixed ``address``."""
    where: int | None = _LIBC.mmap(address or None, size, protection, flags, fd, offset)
    if where is None or where == 2**64 - 1 or (address and where != address):
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map {size:#x} bytes at {address:#x}: {os.strerror(error)}")
    return where


def _map_file(address: int, size: int, protections: list[tuple[int, int]]) -> int:
    """Map a new memory file at ``address`` piece by piece ((size, protection) each), between two
    inaccessible pages; return the address of a second, writable mapping of the same bytes."""
    fd = os.memfd_create("native")
    os.truncate(fd, size)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    _map(address - PAGE, size + 2 * PAGE, 0, private, -1)
    offset = 0
    for length, protection in protections:
        _map(address + offset, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)
        offset += length
    alias = _map(0, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
    os.close(fd)
    return alias


class _SigAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _SigStack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def _install_handler(address: int) -> None:
    size = 64 * PAGE
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    stack = _map(0, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    if _LIBC.sigaltstack(ctypes.byref(_SigStack(stack, 0, size)), None):
        raise OSError(ctypes.get_errno(), "sigaltstack failed")
    action = _SigAction(handler=address, flags=_SA_SIGINFO | _SA_ONSTACK)
    action.mask[:] = [0xFF] * 128
    for number in _SIGNALS:
        if _LIBC.sigaction(int(number), ctypes.byref(action), None):
            raise OSError(ctypes.get_errno(), f"sigaction({number}) failed")


class Worker:
    """The arena: the trampoline, its frames, and the test memory."""

    def __init__(self) -> None:
        rw = mmap.PROT_READ | mmap.PROT_WRITE
        rx = mmap.PROT_READ | mmap.PROT_EXEC
        self.arena = _map_file(CODE, _ARENA, [(PAGE, rx), (_ARENA - PAGE, rw)])
        self.memory = _map_file(
            REGION, REGION_SIZE, [(PAGE, mmap.PROT_READ), (REGION_SIZE - PAGE, rw)]
        )
        ctypes.string_at(REGION, 1)  # present from the start: a write there is a protection fault
        self._put(_ENTRY, _cpuid_code())  # needed once, before the trampoline takes its place
        self.cpuid = self._read_cpuid()
        one = self.cpuid["1.0"]
        if not one[2] >> 27 & 1:
            raise OSError("the CPU or the kernel has no XSAVE")
        self.xcr0: int = ctypes.PYFUNCTYPE(ctypes.c_uint64)(CODE + _ENTRY + 64)()
        components = COMPONENTS & self.xcr0
        areas = [self.cpuid[f"13.{n}"][:2] for n in (2, 5, 6, 7) if components >> n & 1]
        if any(size + offset > XSAVE_LIMIT for size, offset in areas):
            raise OSError("the CPU's XSAVE area is larger than expected")
        self._put(_ENTRY, _entry(components).ljust(_EXIT - _ENTRY, b"\xcc"))
        self._put(_EXIT, _exit(components).ljust(_HANDLER - _EXIT, b"\xcc"))
        self._put(_HANDLER, _signal_handler())
        _install_handler(CODE + _HANDLER)
        self.run = ctypes.PYFUNCTYPE(None)(CODE + _ENTRY)

    def _put(self, offset: int, code: bytes) -> None:
        ctypes.memmove(self.arena + offset, code, len(code))

    def _read_cpuid(self) -> dict[str, list[int]]:
        code = CODE + _ENTRY
        words = ctypes.c_uint32 * 4
        read = ctypes.PYFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(code)
        out = words()
        answers: dict[str, list[int]] = {}
        limits = {}
        for base in (0, 0x80000000):
            read(base, 0, out)
            limits[base] = out[0]
        for leaf, subleaf in CPUID_LEAVES:
            if leaf <= limits[leaf & 0x80000000]:
                read(leaf, subleaf, out)
                answers[f"{leaf}.{subleaf}"] = list(out)
        return answers

    def set_insn(self, data: bytes) -> None:
        """Put the instruction at :data:`CODE`, a jump to the exit path and breakpoints after it."""
        jump = b"\xe9" + struct.pack("<i", _EXIT - len(data) - 5)
        self._put(0, (data + jump).ljust(_ENTRY, b"\xcc"))

    def set_gs_base(self, base: int) -> None:
        """Set the base of GS, for which user space has no other use."""
        if _LIBC.syscall(_SYS_ARCH_PRCTL, _ARCH_SET_GS, ctypes.c_uint64(base)):
            raise OSError(ctypes.get_errno(), f"cannot set the GS base to {base:#x}")


def serve(fd: int) -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shared = mmap.mmap(fd, SHARED_SIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    try:
        worker = Worker()
    except OSError as error:
        os.write(1, json.dumps({"error": str(error)}).encode() + b"\n")
        return
    hello = {"cpuid": worker.cpuid, "xcr0": worker.xcr0}
    os.write(1, json.dumps(hello).encode() + b"\n")
    move, memory, run = ctypes.memmove, worker.memory, worker.run
    frame_in, frame_out = worker.arena + _IN, worker.arena + _OUT
    zero, current, gs_base = bytes(8), b"", 0
    while len(request := os.read(0, 4)) == 4:
        (count,) = struct.unpack("<I", request)
        (first,) = struct.unpack_from("<Q", shared, FIRST)
        for number in range(first, first + count):
            struct.pack_into("<Q", shared, PROGRESS, number)
            at = number * SLOT
            length = shared[at + INSN_LENGTH]
            insn = shared[at + INSN : at + INSN + length]
            if insn != current:
                worker.set_insn(insn)
                current = insn
            (wanted,) = struct.unpack_from("<Q", shared, at + GS_BASE)
            if wanted != gs_base:
                worker.set_gs_base(wanted)
                gs_base = wanted
            slot = base + at
            move(frame_in, slot, FRAME)
            move(memory, slot + FRAME, REGION_SIZE)
            move(frame_out + SIGNAL, zero, 8)
            run()
            move(slot, frame_out, INSN_LENGTH)
            move(slot + FRAME, memory, REGION_SIZE)
        os.write(1, request)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
