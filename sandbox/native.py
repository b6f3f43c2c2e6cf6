"""The host CPU as an oracle: run ONE instruction natively on a prepared state, get the state back.

Linux on x86-64 with XSAVE; elsewhere :meth:`NativeCpu.available` gives the reason why not::

    cpu = NativeCpu.shared()                       # one worker process, restarted if it dies
    state = State()                                # all zero, architectural reset values
    state.gpr[RAX] = 1
    state.vectors = os.urandom(2048)               # ZMM0-31
    state.store(DATA, bytes(32))                   # memory operands live at DATA (4 pages)
    result = cpu.run(bytes.fromhex("c5f5fec2"), state)     # vpaddd ymm0,ymm1,ymm2
    result.state.vectors[:64]; result.fault        # None or Trap(vector, error_code, address, ..)
    cpu.run_batch([(insn, state), ...])            # ~30 thousand cases a second
    "AVX2" in host_features()                      # iced-x86 CpuidFeature names

Memory (fixed addresses, the same for handlers' doubles): ``REGION`` .. ``REGION + REGION_SIZE`` is
mapped; its first page is read-only (``READONLY``), ``DATA`` is the first of four writable pages;
the pages before ``REGION`` and at ``END`` are not accessible. The instruction stands at ``CODE``
(for RIP-relative operands). The CPU runs at CPL 3: #PF error codes have the U bit (4).

All 16 GPRs are loaded, RSP too (let it point into DATA for stack instructions), and the status
flags, DF, AC, NT and ID of RFLAGS; other RFLAGS bits come back as they went in. Refused with
ValueError: control transfers, interrupts, system calls, and what would change the worker's own
segments, FS/GS base or protection keys. Undecodable bytes do run: they are how to see #UD.
Registers that the host does not have come back as they went in.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import platform
import select
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from sandbox import native_worker as w
from sandbox.decode import DecodeError, Insn, decode
from sandbox.errors import SandboxError
from sandbox.host_cpuid import Leaves, features

REGION = w.REGION
REGION_SIZE = w.REGION_SIZE
READONLY = range(REGION, REGION + w.PAGE)
DATA = REGION + w.PAGE
END = REGION + REGION_SIZE
CODE = w.CODE

USER_FLAGS = 0x244CD5
"""RFLAGS that a state sets and that come back: CF PF AF ZF SF DF OF NT AC ID."""

TIMEOUT = 10.0
"""Seconds after which a case that does not end counts as crashed."""

_EMPTY_MEMORY = bytes(REGION_SIZE)
_EMPTY_VECTORS = bytes(2048)


class NativeUnavailable(SandboxError):
    """This host cannot run instructions natively; the message says why."""


@dataclass(slots=True)
class State:
    """What an instruction starts from and what it leaves."""

    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    """RAX RCX RDX RBX RSP RBP RSI RDI R8..R15."""
    rflags: int = 2
    mxcsr: int = 0x1F80
    vectors: bytes = _EMPTY_VECTORS
    """ZMM0-31, 64 bytes each."""
    opmask: list[int] = field(default_factory=lambda: [0] * 8)
    st: list[int] = field(default_factory=lambda: [0] * 8)
    """80-bit integers, ST(0) first: stack-relative."""
    fpcw: int = 0x37F
    fpsw: int = 0
    fptag: int = 0xFFFF
    """The full tag word, two bits for each physical register, 3 = empty."""
    gs_base: int = 0
    """Below 2**47."""
    memory: bytes = _EMPTY_MEMORY
    """``REGION_SIZE`` bytes at ``REGION``."""

    def copy(self) -> State:
        return replace(self, gpr=self.gpr[:], opmask=self.opmask[:], st=self.st[:])

    def store(self, address: int, data: bytes) -> None:
        """Put bytes into the test memory. ValueError if they do not lie in it."""
        at = address - REGION
        if at < 0 or at + len(data) > REGION_SIZE:
            raise ValueError(f"{address:#x}+{len(data)} is not in the test memory")
        self.memory = self.memory[:at] + data + self.memory[at + len(data) :]

    def load(self, address: int, size: int) -> bytes:
        """Read from the test memory. ValueError if it does not lie in it."""
        at = address - REGION
        if at < 0 or at + size > REGION_SIZE:
            raise ValueError(f"{address:#x}+{size} is not in the test memory")
        return self.memory[at : at + size]

    def vector(self, number: int, size: int = 64) -> bytes:
        """The low ``size`` bytes of ZMM ``number``."""
        return self.vectors[64 * number : 64 * number + size]

    def set_vector(self, number: int, data: bytes) -> None:
        """Set the low bytes of ZMM ``number``; the rest stays."""
        at = 64 * number
        self.vectors = self.vectors[:at] + data + self.vectors[at + len(data) :]


@dataclass(frozen=True, slots=True)
class Trap:
    """An exception that the CPU raised, as the kernel reported it."""

    vector: int
    """Exception vector: 0 #DE, 6 #UD, 13 #GP, 14 #PF, 16 #MF, 17 #AC, 19 #XM ..."""
    error_code: int
    """Of #PF (with the U bit, 4) and #GP; else 0."""
    address: int | None
    """CR2, for #PF only."""
    signal: int
    si_code: int


@dataclass(frozen=True, slots=True)
class Result:
    """The state after the instruction, or at the fault. ``crashed``: the worker process died or
    hung, and ``state`` is the state that went in."""

    state: State
    fault: Trap | None = None
    crashed: bool = False


_REFUSED_MNEMONICS = {
    getattr(Mnemonic, name)
    for name in """WRFSBASE WRGSBASE WRPKRU XRSTOR XRSTOR64 XRSTORS XRSTORS64 VMCALL VMMCALL VMGEXIT
    LFS LGS LSS SWAPGS ENCLU INT3 INT1 HLT""".split()
}
_SEGMENTS = (Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS)


@lru_cache(maxsize=8192)
def check(insn: bytes) -> None:
    """ValueError if these bytes are no single instruction or one that must not run natively."""
    if not 1 <= len(insn) <= 15:
        raise ValueError(f"{len(insn)} bytes are no instruction")
    try:
        decoded = decode(insn, 64)
    except DecodeError as error:
        if error.truncated:
            raise ValueError(str(error)) from None
        return
    if decoded.length != len(insn):
        raise ValueError(f"{insn.hex(' ')} is {decoded.iced} and more bytes")
    iced = decoded.iced
    writes_segment = (
        iced.op_count > 0
        and iced.op_kind(0) == OpKind.REGISTER
        and iced.op0_register in _SEGMENTS
        and iced.mnemonic in (Mnemonic.MOV, Mnemonic.POP)
    )
    harmless = iced.flow_control in (FlowControl.NEXT, FlowControl.EXCEPTION)
    if writes_segment or not harmless or iced.mnemonic in _REFUSED_MNEMONICS:
        raise ValueError(f"{iced} does not run natively: control, system or segment instruction")


class _Slots:
    """The slots in the shared memory: states in, states out."""

    def __init__(self, shared: mmap.mmap, layout: dict[int, int], mask: int) -> None:
        self.shared = shared
        self.mask = mask
        frames = np.frombuffer(shared, "u1", w.SLOTS * w.SLOT).reshape(w.SLOTS, w.SLOT)
        self._present = frames[:, 512:513]  # the components that XSAVE found in use
        self._vectors = np.empty((w.SLOTS, 32, 64), "u1")
        places = [(1, 160, (slice(16), slice(16)))]
        if mask >> 2 & 1:
            places.append((2, layout[2], (slice(16), slice(16, 32))))
        if mask >> 6 & 1:
            places.append((6, layout[6], (slice(16), slice(32, 64))))
            places.append((7, layout[7], (slice(16, 32), slice(64))))
        self._parts = []
        """Number of the component, where it lies in the frames, where in the vectors."""
        for number, at, where in places:
            part = self._vectors[:, *where]
            area = frames[:, at : at + part[0].size].reshape(part.shape)
            assert area.base is not None, "a copy would not reach the worker"
            self._parts.append((number, area, part))
        self._opmask_at = layout[5] if mask >> 5 & 1 else None

    def put(self, cases: Sequence[tuple[bytes, State]]) -> None:
        """Fill the first slots."""
        count = len(cases)
        vectors = np.frombuffer(b"".join([state.vectors for _insn, state in cases]), "u1")
        self._vectors[:count] = vectors.reshape(count, 32, 64)
        for _number, area, part in self._parts:
            area[:count] = part[:count]
        for number, (insn, state) in enumerate(cases):
            self._put(number * w.SLOT, insn, state)

    def _put(self, at: int, insn: bytes, state: State) -> None:
        shared = self.shared
        if self._opmask_at is not None:
            struct.pack_into("<8Q", shared, at + self._opmask_at, *state.opmask)
        tags = sum([1 << i for i in range(8) if state.fptag >> 2 * i & 3 != 3])
        struct.pack_into(
            "<HHBBHQQI", shared, at, state.fpcw, state.fpsw, tags, 0, 0, 0, 0, state.mxcsr & 0xFFFF
        )
        shared[at + 32 : at + 160] = b"".join([v.to_bytes(16, "little") for v in state.st])
        struct.pack_into("<8Q", shared, at + 512, self.mask, *[0] * 7)
        flags = state.rflags & USER_FLAGS | 2
        struct.pack_into("<17Q", shared, at + w.GPR, *state.gpr, flags)
        struct.pack_into("<Q", shared, at + w.GS_BASE, state.gs_base)
        start = at + w.FRAME
        shared[at + w.INSN_LENGTH : at + w.INSN + len(insn)] = bytes([len(insn)]) + insn
        shared[start : start + REGION_SIZE] = state.memory

    def get(self, before: Sequence[State]) -> Iterator[Result]:
        """What came out of the first slots."""
        count = len(before)
        for number, area, part in self._parts:
            # a component in its initial state may be left out of the area
            used = self._present[:count] >> number & 1
            np.multiply(area[:count], used[..., None], out=part[:count])
        vectors = self._vectors[:count].tobytes()
        for number, state in enumerate(before):
            known = vectors[2048 * number : 2048 * number + 2048]
            yield self._get(number * w.SLOT, state, self._with_unknown(known, state.vectors))

    def _with_unknown(self, known: bytes, before: bytes) -> bytes:
        """The vectors with the parts that the host does not have as they were."""
        if self.mask & 0xC4 == 0xC4:
            return known
        rows = np.frombuffer(before, "u1").reshape(32, 64).copy()
        size = 32 if self.mask >> 2 & 1 else 16
        rows[:16, :size] = np.frombuffer(known, "u1").reshape(32, 64)[:16, :size]
        return rows.tobytes()

    def _get(self, at: int, before: State, vectors: bytes) -> Result:
        shared = self.shared
        (used,) = struct.unpack_from("<Q", shared, at + 512)
        opmask = before.opmask[:]
        if self._opmask_at is not None:
            opmask = list(struct.unpack_from("<8Q", shared, at + self._opmask_at))
            opmask = opmask if used >> 5 & 1 else [0] * 8
        fpcw, fpsw, tags = struct.unpack_from("<HHB", shared, at)
        st = [v | e << 64 for v, e in struct.iter_unpack("<QH6x", shared[at + 32 : at + 160])]
        if not used & 1:
            fpcw, fpsw, tags, st = 0x37F, 0, 0, [0] * 8
        (mxcsr,) = struct.unpack_from("<I", shared, at + 24)
        *gpr, rflags = struct.unpack_from("<17Q", shared, at + w.GPR)
        start = at + w.FRAME
        memory = shared[start : start + REGION_SIZE]
        if memory == before.memory:
            memory = before.memory  # one object for thousands of results, not 20 KB each
        state = State(
            gpr=gpr,
            rflags=rflags & USER_FLAGS | before.rflags & ~USER_FLAGS,
            mxcsr=mxcsr,
            vectors=vectors,
            opmask=opmask,
            st=st,
            fpcw=fpcw,
            fpsw=fpsw,
            fptag=_full_tags(tags, fpsw, st),
            gs_base=before.gs_base,
            memory=memory,
        )
        number, code, vector, error, cr2, rip = struct.unpack_from("<QqQQQQ", shared, at + w.SIGNAL)
        if not number:
            return Result(state)
        if rip != CODE and vector != 1:  # it ran on beyond its bytes
            return Result(before, crashed=True)
        address = cr2 if vector == 14 else None
        return Result(
            state, Trap(vector, error if vector in (13, 14) else 0, address, number, code)
        )


def _full_tags(used: int, fpsw: int, st: Sequence[int]) -> int:
    """The tag word from the abridged one (SDM Vol. 1, 10.5.1.1)."""
    if not used:
        return 0xFFFF
    full = 0
    top = fpsw >> 11 & 7
    for physical in range(8):
        tag = 3
        if used >> physical & 1:
            value = st[physical - top & 7]
            exponent, integer_bit = value >> 64 & 0x7FFF, value >> 63 & 1
            if value & (1 << 79) - 1 == 0:
                tag = 1
            else:
                tag = 0 if integer_bit and exponent not in (0, 0x7FFF) else 2
        full |= tag << 2 * physical
    return full


class NativeCpu:
    """One worker process. Not for use by several threads at once.

    Raises :class:`NativeUnavailable` if the host cannot do it.
    """

    def __init__(self) -> None:
        _require_host()
        self._process: subprocess.Popen[bytes] | None = None
        self.cpuid: Leaves = {}
        """(leaf, subleaf) to (EAX, EBX, ECX, EDX)."""
        self.xcr0 = 0
        try:
            self._fd = os.memfd_create("native-slots")
            os.truncate(self._fd, w.SHARED_SIZE)
            self._shared = mmap.mmap(self._fd, w.SHARED_SIZE)
            self._start()
        except OSError as error:
            raise NativeUnavailable(f"no native execution here: {error}") from error
        layout = {n: self.cpuid.get((0xD, n), (0, 0, 0, 0))[1] for n in (2, 5, 6, 7)}
        mask = w.COMPONENTS & self.xcr0
        self._slots = _Slots(self._shared, layout, mask)

    @staticmethod
    @lru_cache(maxsize=1)
    def available() -> str | None:
        """None, or the reason why this host cannot run instructions natively."""
        try:
            NativeCpu.shared()
        except NativeUnavailable as error:
            return str(error)
        return None

    @staticmethod
    @lru_cache(maxsize=1)
    def shared() -> NativeCpu:
        """The one of this process, started at first use."""
        cpu = NativeCpu()
        atexit.register(cpu.close)
        return cpu

    def _start(self) -> None:
        os.set_inheritable(self._fd, True)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", w.__file__, str(self._fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(self._fd,),
        )
        line = self._answer(None)
        hello: dict[str, Any] = (
            json.loads(line) if line else {"error": "the worker process died at its start"}
        )
        if "error" in hello:
            self.close()
            raise NativeUnavailable(f"no native execution here: {hello['error']}")
        for key, values in hello["cpuid"].items():
            leaf, subleaf = map(int, key.split("."))
            eax, ebx, ecx, edx = values
            self.cpuid[leaf, subleaf] = eax, ebx, ecx, edx
        self.xcr0 = hello["xcr0"]

    def _answer(self, size: int | None) -> bytes:
        """``size`` bytes, or a line, from the worker; empty if it died or hangs."""
        assert self._process is not None and self._process.stdout is not None
        out = self._process.stdout
        if not select.select([out], [], [], TIMEOUT)[0]:
            return b""
        return out.readline() if size is None else out.read(size) or b""

    def close(self) -> None:
        """End the worker process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def run(self, insn: bytes, state: State) -> Result:
        """Run one instruction. ValueError if it must not run (see the module's text)."""
        return self.run_batch([(insn, state)])[0]

    def run_batch(self, cases: Iterable[tuple[bytes, State]]) -> list[Result]:
        """Run many (instruction, state) pairs, each on its own state."""
        todo = list(cases)
        for insn, _state in todo:
            check(insn)
        results: list[Result] = []
        for start in range(0, len(todo), w.SLOTS):
            chunk = todo[start : start + w.SLOTS]
            self._slots.put(chunk)
            crashed = self._run_slots(len(chunk))
            results += self._slots.get([state for _insn, state in chunk])
            for number in crashed:
                results[start + number] = Result(chunk[number][1], crashed=True)
        return results

    def _run_slots(self, count: int) -> set[int]:
        """Have the worker run the first ``count`` slots; the numbers of those that killed it."""
        crashed: set[int] = set()
        first = 0
        while first < count:
            if self._process is None:
                self._start()
            assert self._process is not None and self._process.stdin is not None
            struct.pack_into("<QQ", self._shared, w.PROGRESS, first, first)
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(struct.pack("<I", count - first))
            if self._answer(4):
                break
            self.close()
            (guilty,) = struct.unpack_from("<Q", self._shared, w.PROGRESS)
            crashed.add(guilty)
            first = guilty + 1
        return crashed


def _require_host() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        where = f"{sys.platform} on {platform.machine()}"
        raise NativeUnavailable(f"no native execution here: needs Linux on x86-64, this is {where}")
    if sys.maxsize < 1 << 32:
        raise NativeUnavailable("no native execution here: needs a 64-bit Python")


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """What the host CPU and its kernel offer, as iced-x86 ``CpuidFeature`` names.

    Raises :class:`NativeUnavailable`.
    """
    cpu = NativeCpu.shared()
    return features(cpu.cpuid, cpu.xcr0)


def missing_features(insn: Insn) -> tuple[str, ...]:
    """The features that ``insn`` needs and the host lacks: empty if it runs here."""
    return tuple(f for f in insn.features if f not in host_features())
