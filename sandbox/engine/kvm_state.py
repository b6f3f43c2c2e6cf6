"""The register bank over a vCPU of Linux KVM: pulled after each exit, pushed where changed.

General registers and the system state lie in ``kvm_run`` itself where the kernel shares them
(KVM_CAP_SYNC_REGS), in buffers of ours where not. Vectors, x87 and opmasks are an XSAVE area, never
``struct kvm_fpu``: KVM_SET_FPU leaves XSTATE_BV alone, so that the processor may drop what was set.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Callable
from typing import Final

import numpy as np

from sandbox import abi
from sandbox.engine import kvm_abi
from sandbox.engine.kvm_device import KvmFile, SupportedCpuid
from sandbox.exits import RunPage
from sandbox.registers import (
    SEGMENT_NAMES,
    VECTOR_BYTES,
    VECTOR_COUNT,
    VM,
    DescriptorTable,
    Registers,
    Segment,
)
from sandbox.xsave import AVX, HI16_ZMM, LEGACY_SIZE, OPMASK, SSE, X87, ZMM_HI256, full_tags

_REGS_BYTES, _SREGS_BYTES = 144, 312
_SYNCED = abi.KVM_SYNC_X86_REGS | abi.KVM_SYNC_X86_SREGS
_RIP, _RFLAGS = 16, 17
_XMM = 160
"""Where the XMM registers stand in the XSAVE area."""
_XSTATE_BV = LEGACY_SIZE

_SEGMENT_AT: Final = {
    name: getattr(abi.kvm_sregs, field).offset
    for name, field in (
        *((n, n) for n in SEGMENT_NAMES), ("tr", "tr"), ("ldtr", "ldt"),
    )
}  # fmt: skip
_TABLE_AT: Final = {"gdtr": abi.kvm_sregs.gdt.offset, "idtr": abi.kvm_sregs.idt.offset}
_BASE_AT: Final = tuple(_SEGMENT_AT[name] // 8 for name in SEGMENT_NAMES)
_CONTROL_AT: Final = {
    name: getattr(abi.kvm_sregs, name).offset // 8
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
} | {"fs_base": _SEGMENT_AT["fs"] // 8, "gs_base": _SEGMENT_AT["gs"] // 8}
_CR0, _CR2, _CR3, _CR4, _EFER = (_CONTROL_AT[n] for n in ("cr0", "cr2", "cr3", "cr4", "efer"))
_CS_DB, _CS_L = (_SEGMENT_AT["cs"] + at for at in (17, 19))
_SS_DPL = _SEGMENT_AT["ss"] + 16
_TRANSLATION = frozenset({"cr0", "cr3", "cr4", "efer"})
EFER_LMA = 1 << 10
CR4_OSXSAVE: Final = 1 << 18

_CR4_FEATURES: Final = {
    11: (7, 0, 2, 2), 16: (7, 0, 1, 0), 17: (1, 0, 2, 17), 18: (1, 0, 2, 26), 20: (7, 0, 1, 7),
    21: (7, 0, 1, 20), 22: (7, 0, 2, 3),
}  # fmt: skip
"""CR4 bits that the kernel refuses unless CPUID shows the feature: UMIP, FSGSBASE, PCIDE, OSXSAVE,
SMEP, SMAP, PKE."""

_MSRS: Final = {
    "star": 0xC000_0081, "lstar": 0xC000_0082, "cstar": 0xC000_0083, "fmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102, "sysenter_cs": 0x174, "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
}  # fmt: skip
_LEGACY: Final = {"fpcw": (0, 2), "fop": (6, 2), "fip": (8, 8), "fdp": (16, 8), "mxcsr": (24, 4)}
"""In the legacy region: offset and size."""
_STACK: Final = {f"st{n}": n for n in range(8)}
_MMX: Final = {f"mm{n}": n for n in range(8)}
_DEBUG: Final = {"dr0": 0, "dr1": 1, "dr2": 2, "dr3": 3, "dr4": 4, "dr5": 5, "dr6": 4, "dr7": 5}


def _nothing() -> None: ...


class KvmBank:
    """A :class:`sandbox.registers.Bank` over one vCPU that is not running."""

    def __init__(self, vcpu: KvmFile, page: RunPage, sync: bool, cpuid: SupportedCpuid) -> None:
        self._vcpu = vcpu
        self._sync = sync
        self._cpuid = cpuid
        self.on_control: Callable[[], None] = _nothing
        """Called after a write of CR0, CR3, CR4, EFER, CS or SS: what was found at an address may
        no longer hold."""
        self._own = memoryview(bytearray(_REGS_BYTES))
        self.general = self._quads = self._own.cast("Q")
        """The 16 general registers, RIP, RFLAGS."""
        self._share(page)
        self._xsave = bytearray(kvm_abi.XSAVE_BYTES)
        self._legacy = memoryview(self._xsave)[:_XMM]
        self._vectors = memoryview(bytearray(VECTOR_COUNT * VECTOR_BYTES))
        self._components = cpuid.leaves.get((0xD, 0), (0, 0, 0, 0))[0] | 1 << X87 | 1 << SSE
        self._link_components()
        self.registers = self._make_registers()
        self._pushed_xcr0 = 1
        self._selectors = {"fcs": 0, "fds": 0}
        self._hidden_cr4 = 0
        """CR4 bits that the hardware of this guest lacks and only the handler tier goes by."""
        self.cr4_allowed = ~0
        self.xcr0_allowed = 1 << X87 | 1 << SSE
        self._stale = False
        """Whether the guest has run since vectors, x87 and opmasks were pulled."""
        self.shown_idt: DescriptorTable | None = None
        """What IDTR reads as where the machine has put an IDT of its own there."""
        self._pulled = self._pulled_sregs = self._pulled_extended = b""

    def _share(self, page: RunPage) -> None:
        self._run = page.run
        at = abi.kvm_run.s.offset
        if self._sync:
            page.run.kvm_valid_regs = _SYNCED
            shared = page.bytes[at : at + _REGS_BYTES + _SREGS_BYTES]
        else:
            shared = memoryview(bytearray(_REGS_BYTES + _SREGS_BYTES))
        self._regs_bytes = shared[:_REGS_BYTES]
        self._regs = self._regs_bytes.cast("Q")
        self._sregs = shared[_REGS_BYTES:]
        self._system = self._sregs.cast("Q")

    def _link_components(self) -> None:
        """Pair each vector component's place in the XSAVE area with its place in the registers."""
        zmm = np.frombuffer(self._vectors, "u1").reshape(VECTOR_COUNT, VECTOR_BYTES)
        area = np.frombuffer(self._xsave, "u1")
        places = {SSE: zmm[:16, :16], AVX: zmm[:16, 16:32], ZMM_HI256: zmm[:16, 32:]}
        places[HI16_ZMM] = zmm[16:, :]
        self._linked = []
        for number, inside in places.items():
            at = _XMM if number == SSE else self._cpuid.leaves.get((0xD, number), (0, 0))[1]
            if self._components >> number & 1 and at:
                outside = area[at : at + inside.size].reshape(inside.shape)
                self._linked.append((inside, outside))
        at = self._cpuid.leaves.get((0xD, OPMASK), (0, 0))[1]
        has_opmask = self._components >> OPMASK & 1 and at
        self._opmask_area = memoryview(self._xsave)[at : at + 64] if has_opmask else None

    def _make_registers(self) -> Registers:
        rip = self._quads[_RIP : _RIP + 1]
        registers = Registers(self._quads[:16], rip, self._vectors, self)
        self._opmask = registers.opmask.cast("B")
        registers.images = (self._own, self._vectors, self._opmask, self._legacy)
        registers.rflags_view = self._quads[_RFLAGS : _RFLAGS + 1]
        registers.mxcsr_view = self._legacy.cast("I")[6:7]
        return registers

    # -- between the kernel and us ------------------------------------------------------------

    def pull(self) -> None:
        """Take over the registers after an exit."""
        if not self._sync:
            fcntl.ioctl(self._vcpu.descriptor, abi.KVM_GET_REGS, self._regs_bytes, True)
            fcntl.ioctl(self._vcpu.descriptor, abi.KVM_GET_SREGS, self._sregs, True)
        ours, theirs = self._quads, self._regs
        ours[0] = theirs[0]  # the kernel has RAX RBX RCX RDX RSI RDI RSP RBP
        ours[1:3] = theirs[2:4]
        ours[3] = theirs[1]
        ours[4:6] = theirs[6:8]
        ours[6:8] = theirs[4:6]
        ours[8:18] = theirs[8:18]
        self._pulled = bytes(self._own)
        self._pulled_sregs = bytes(self._sregs)
        self._stale = True

    def pull_extended(self) -> None:
        """Take over vectors, x87 and opmasks, unless that was done since the last exit."""
        if not self._stale:
            return
        self._stale = False
        fcntl.ioctl(self._vcpu.descriptor, kvm_abi.KVM_GET_XSAVE, self._xsave, True)
        for inside, outside in self._linked:
            inside[:] = outside
        if self._opmask_area is not None:
            self._opmask[:] = self._opmask_area
        self._pulled_extended = self._extended()

    def start(self) -> None:
        """Fetch everything once from a vCPU that has never run."""
        sync, self._sync = self._sync, False
        self.pull()
        self.pull_extended()
        self._sync = sync

    def push(self) -> None:
        """Hand over what was changed since the last exit."""
        if not self._stale and self._extended() != self._pulled_extended:
            self._push_extended()
        dirty = 0
        if bytes(self._own) != self._pulled:
            self._fill()
            dirty = abi.KVM_SYNC_X86_REGS
        if bytes(self._sregs) != self._pulled_sregs:
            dirty |= abi.KVM_SYNC_X86_SREGS
        if self._sync:
            self._run.kvm_dirty_regs = dirty
            return
        if dirty & abi.KVM_SYNC_X86_SREGS:
            self._vcpu.exchange("KVM_SET_SREGS", abi.KVM_SET_SREGS, self._sregs)
        if dirty & abi.KVM_SYNC_X86_REGS:
            self._vcpu.exchange("KVM_SET_REGS", abi.KVM_SET_REGS, self._regs_bytes)

    def _fill(self) -> None:
        ours, theirs = self._quads, self._regs
        theirs[0] = ours[0]
        theirs[2:4] = ours[1:3]
        theirs[1] = ours[3]
        theirs[6:8] = ours[4:6]
        theirs[4:6] = ours[6:8]
        theirs[8:18] = ours[8:18]

    def _extended(self) -> bytes:
        return b"".join((self._legacy, self._vectors, self._opmask))

    def _push_extended(self) -> None:
        for inside, outside in self._linked:
            outside[:] = inside
        if self._opmask_area is not None:
            self._opmask_area[:] = self._opmask
        held = self._components & (1 << X87 | 1 << SSE | 1 << AVX | 7 << OPMASK)
        before = struct.unpack_from("<Q", self._xsave, _XSTATE_BV)[0]
        struct.pack_into("<Q", self._xsave, _XSTATE_BV, before | held)
        self._vcpu.exchange("KVM_SET_XSAVE", kvm_abi.KVM_SET_XSAVE, self._xsave)

    def push_xcr0(self) -> None:
        """XCR0 as far as this guest's processor has it."""
        wanted = self.registers.xcr0 & self.xcr0_allowed
        if wanted != self._pushed_xcr0 and self.cr4_allowed & CR4_OSXSAVE:
            self._pushed_xcr0 = wanted
            buffer = bytearray(kvm_abi.XCRS.pack(1, 0, 0, 0, wanted))
            self._vcpu.exchange("KVM_SET_XCRS", kvm_abi.KVM_SET_XCRS, buffer)

    def allow_cr4(self, shown: Callable[[int, int, int, int], bool]) -> None:
        """Take note of what CPUID shows: the kernel refuses CR4 bits without their feature."""
        value = self.read("cr4")
        self.cr4_allowed = ~sum(1 << b for b, at in _CR4_FEATURES.items() if not shown(*at))
        self.write("cr4", value)

    def changes(self) -> dict[int, int]:
        """General registers, RIP and RFLAGS that were written since the last exit, by index."""
        before = memoryview(self._pulled).cast("Q")
        return {n: v for n, v in enumerate(self._quads) if v != before[n]}

    def apply(self, changes: dict[int, int]) -> None:
        """Write what :meth:`changes` gave."""
        for index, value in changes.items():
            self._quads[index] = value

    def control_state(self) -> bytes:
        """Segments, tables and control registers (not CR2): what translations hang on."""
        state = self._sregs
        return bytes(state[: _CR2 * 8]) + bytes(state[_CR3 * 8 : _EFER * 8 + 8])

    # -- Bank -----------------------------------------------------------------------------------

    @property
    def cpl(self) -> int:
        if not self._system[_CR0] & 1:
            return 0
        return 3 if self._quads[_RFLAGS] & VM else self._sregs[_SS_DPL]

    @property
    def bitness(self) -> int:
        if self._system[_EFER] & EFER_LMA and self._sregs[_CS_L]:
            return 64
        return 32 if self._sregs[_CS_DB] else 16

    def segment_base(self, index: int) -> int:
        return int(self._system[_BASE_AT[index]])

    def read(self, name: str) -> int:
        if name == "rflags":
            return int(self._quads[_RFLAGS])
        if name == "cr4":
            return int(self._system[_CR4] | self._hidden_cr4)
        if name in _CONTROL_AT:
            return int(self._system[_CONTROL_AT[name]])
        if name in _MSRS:
            buffer = bytearray(kvm_abi.MSRS.pack(1, 0, _MSRS[name], 0))
            self._vcpu.exchange(f"KVM_GET_MSRS ({name})", kvm_abi.KVM_GET_MSRS, buffer)
            return int(kvm_abi.MSRS.unpack(buffer)[3])
        if name in _DEBUG:
            return int(struct.unpack_from("<Q", self._debug_registers(), _DEBUG[name] * 8)[0])
        if name in self._selectors:
            return self._selectors[name]
        return self._read_float(name)

    def write(self, name: str, value: int) -> None:
        if name == "rflags":
            self._quads[_RFLAGS] = value & 0xFFFF_FFFF | 2
        elif name in _CONTROL_AT:
            if name == "cr4":
                self._hidden_cr4 = value & ~self.cr4_allowed
                value &= self.cr4_allowed
            self._system[_CONTROL_AT[name]] = value
            if name in _TRANSLATION:
                self.on_control()
        elif name in _MSRS:
            buffer = bytearray(kvm_abi.MSRS.pack(1, 0, _MSRS[name], value))
            self._vcpu.exchange(f"KVM_SET_MSRS ({name})", kvm_abi.KVM_SET_MSRS, buffer)
        elif name in _DEBUG:
            buffer = self._debug_registers()
            struct.pack_into("<Q", buffer, _DEBUG[name] * 8, value)
            self._vcpu.exchange("KVM_SET_DEBUGREGS", kvm_abi.KVM_SET_DEBUGREGS, buffer)
        elif name in self._selectors:
            self._selectors[name] = value
        else:
            self._write_float(name, value)

    def _debug_registers(self) -> bytearray:
        buffer = bytearray(kvm_abi.DEBUGREGS_BYTES)
        self._vcpu.exchange("KVM_GET_DEBUGREGS", kvm_abi.KVM_GET_DEBUGREGS, buffer)
        return buffer

    def leave_long_mode(self) -> None:
        """Clear EFER, LMA too: for a guest that starts in real or protected mode."""
        self.write("efer", 0)

    def read_segment(self, name: str) -> Segment:
        fields = kvm_abi.SEGMENT.unpack_from(self._sregs, _SEGMENT_AT[name])
        base, limit, selector, kind, present, dpl, db, s, long, g, avl, unusable, _pad = fields
        usable = int(present and not unusable)
        return Segment(selector, base, limit, kind, s, dpl, usable, avl, long, db, g)

    def write_segment(self, name: str, value: Segment) -> None:
        v = value
        fields = (v.type, v.present, v.dpl, v.db, v.s, v.l, v.g, v.avl, int(not v.present), 0)
        at = _SEGMENT_AT[name]
        kvm_abi.SEGMENT.pack_into(self._sregs, at, v.base, v.limit, v.selector, *fields)
        if name in ("cs", "ss"):
            self.on_control()

    def read_table(self, name: str) -> DescriptorTable:
        if name == "idtr" and self.shown_idt is not None:
            return self.shown_idt
        return DescriptorTable(*kvm_abi.TABLE.unpack_from(self._sregs, _TABLE_AT[name]))

    def write_table(self, name: str, value: DescriptorTable) -> None:
        kvm_abi.TABLE.pack_into(self._sregs, _TABLE_AT[name], value.base, value.limit)

    # -- x87, as FXSAVE lays it out (SDM Vol. 1, 10.5.1): ST(i) stack-relative, tags abridged ------

    def _word(self, at: int, size: int) -> int:
        return int.from_bytes(self._legacy[at : at + size], "little")

    def _put(self, at: int, size: int, value: int) -> None:
        self._legacy[at : at + size] = value.to_bytes(size, "little")

    @property
    def _top(self) -> int:
        return self._word(2, 2) >> 11 & 7

    def _read_float(self, name: str) -> int:
        self.pull_extended()
        if name in _LEGACY:
            return self._word(*_LEGACY[name])
        if name == "fpsw":
            return self._word(2, 2)
        if name == "fptag":
            stack = [self._word(32 + 16 * n, 10) for n in range(8)]
            return full_tags(self._legacy[4], self._top, stack)
        if name in _MMX:
            return self._word(32 + 16 * (_MMX[name] - self._top & 7), 8)
        return self._word(32 + 16 * _STACK[name], 10)

    def _write_float(self, name: str, value: int) -> None:
        self.pull_extended()
        if name in _LEGACY:
            self._put(*_LEGACY[name], value)
        elif name == "fpsw":
            self._rotate((value >> 11 & 7) - self._top)
            self._put(2, 2, value)
        elif name == "fptag":
            self._legacy[4] = sum(1 << n for n in range(8) if value >> 2 * n & 3 != 3)
        elif name in _MMX:
            self._put(32 + 16 * (_MMX[name] - self._top & 7), 8, value)
        else:
            self._put(32 + 16 * _STACK[name], 10, value)

    def _rotate(self, steps: int) -> None:
        """TOP moves by ``steps``: the registers stay, so their stack-relative places change."""
        at = 16 * (steps & 7)
        stack = bytes(self._legacy[32:_XMM])
        self._legacy[32:_XMM] = stack[at:] + stack[:at]
