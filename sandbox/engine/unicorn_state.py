"""The register bank over Unicorn's CPU state: what handlers reach by name."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import partial

from sandbox.engine.unicorn_layout import SEGMENT_BYTES, STATE_BYTES, layout, state_address
from sandbox.engine.unicorn_library import library, x86
from sandbox.engine.unicorn_x87 import x87_registers, x87_view
from sandbox.registers import (
    SEGMENT_NAMES,
    VECTOR_BYTES,
    VECTOR_COUNT,
    DescriptorTable,
    Registers,
    Segment,
    X87View,
)

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_WP, CR0_PG = (1 << bit for bit in (0, 1, 2, 3, 16, 31))
CR4_OSFXSR = 1 << 9
EFER_LMA = 1 << 10
_FLAG_VM = 1 << 17

# hflags of QEMU's CPUX86State: what of the state translated code depends on
HF_CPL, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
HF_MP, HF_LMA, HF_CS64, HF_OSFXSR = 1 << 9, 1 << 14, 1 << 15, 1 << 22
_HF_COMPUTED = HF_CPL | HF_CS32 | HF_SS32 | HF_ADDSEG | HF_PE | 7 * HF_MP | HF_LMA | HF_CS64
_HF_COMPUTED |= HF_OSFXSR

_SEGMENT = struct.Struct("<IxxxxQII")  # selector, base, limit, high dword of the descriptor
_DESC_L, _DESC_B = 1 << 21, 1 << 22
_TABLES = {"ldtr": 6, "tr": 7, "gdtr": 8, "idtr": 9}
_INDEX = {name: i for i, name in enumerate(SEGMENT_NAMES)} | _TABLES

_MSRS = {
    "efer": 0xC000_0080,
    "star": 0xC000_0081,
    "lstar": 0xC000_0082,
    "cstar": 0xC000_0083,
    "fmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
}

# name -> (Unicorn's register number, size in bytes)
_API: dict[str, tuple[int, int]] = {
    "mxcsr": (x86.UC_X86_REG_MXCSR, 4),
    "fpcw": (x86.UC_X86_REG_FPCW, 2),
    "fpsw": (x86.UC_X86_REG_FPSW, 2),
    "fptag": (x86.UC_X86_REG_FPTAG, 2),
    "fip": (x86.UC_X86_REG_FIP, 8),
    "fcs": (x86.UC_X86_REG_FCS, 2),
    "fdp": (x86.UC_X86_REG_FDP, 8),
    "fds": (x86.UC_X86_REG_FDS, 2),
    "fop": (x86.UC_X86_REG_FOP, 2),
    **{f"cr{n}": (getattr(x86, f"UC_X86_REG_CR{n}"), 8) for n in (0, 2, 3, 4)},
    **{f"dr{n}": (getattr(x86, f"UC_X86_REG_DR{n}"), 8) for n in range(8)},
    **{f"st{n}": (getattr(x86, f"UC_X86_REG_ST{n}"), 10) for n in range(8)},
    **{f"fp{n}": (getattr(x86, f"UC_X86_REG_FP{n}"), 10) for n in range(8)},
}


_MMX = {f"mm{n}": f"fp{n}" for n in range(8)}
"""MMX registers are the low 64 bits of the x87 registers by physical number."""
_MMX_UPPER = 0xFFFF << 64
_X87 = frozenset(("fpsw", "fptag", "fpcw", "fip", *(f"st{n}" for n in range(8))))

_CONTROL = frozenset({"cr0", "cr3", "cr4"})
_FLOAT_CONTROL = frozenset({"mxcsr", "fpcw"})


def _nothing() -> None: ...


def _ignore(_name: str, _value: int) -> None: ...


class UnicornBank:
    """A :class:`sandbox.registers.Bank` over one open engine that is not running."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        found = layout()
        base = state_address(handle)
        self._bytes = memoryview((ctypes.c_char * STATE_BYTES).from_address(base)).cast("B")
        self.quads = self._bytes.cast("Q")
        self.words = self._bytes.cast("I")
        self.hflags_index = found.hflags // 4
        self.error_code_index = found.error_code // 4
        self.old_exception_index = found.old_exception // 4
        self.cs_base_index = (found.segments + SEGMENT_BYTES + 8) // 8
        self.rip_argument = ctypes.c_uint64.from_address(base + found.rip)
        """RIP as an argument of a C function, in place."""
        self.control_view = self._bytes[found.hflags : found.cr + 5 * 8]
        """hflags, segment caches and control registers: what translations and modes hang on."""
        self._layout = found
        self.cr_index = found.cr // 8
        self._handle = handle
        self._buffer = (ctypes.c_uint8 * 16)()
        self._buffer_bytes = memoryview(self._buffer).cast("B")
        self._call = library().call
        self._ids = {name: ctypes.c_int(number) for name, (number, _size) in _API.items()}
        self._cr8 = 0
        self._kept: dict[str, int] | None = None
        """What only Unicorn's API can read, once the engine is gone."""
        self.on_control: Callable[[], None] = _nothing
        """Called after a write of CR0, CR3, CR4 or EFER, and if CPL, mode or CS base have changed:
        what was found at an address may no longer hold."""
        self.on_float_control: Callable[[str, int], None] = _ignore
        """Called after a write of ``mxcsr`` or ``fpcw``, with the name and the value."""
        self._direct = {f"cr{n}": self.cr_index + n for n in (0, 2, 3, 4)}
        self._direct["efer"] = found.efer // 8
        # Unicorn brings it up to date when it stops and takes it in when it starts. Its API would
        # mix in what it has computed lazily before, so it is never used for this register.
        self._rflags = self._direct["rflags"] = found.rflags // 8
        for name, index in (("fs_base", 4), ("gs_base", 5)):
            self._direct[name] = (found.segments + index * SEGMENT_BYTES + 8) // 8
        self._readers: dict[str, Callable[[], int]] = {}
        self._writers: dict[str, Callable[[int], None]] = {}
        """x87 registers in place, once one has been asked for."""
        self._looked_for_x87 = False
        self._x87: X87View | None = None
        self._bases = tuple(
            (found.segments + index * SEGMENT_BYTES + 8) // 8 for index in range(len(SEGMENT_NAMES))
        )

    def registers(self) -> Registers:
        """The register file: GPRs, RIP and vectors as views of Unicorn's own state."""
        registers = Registers(*self._views(), self)
        self._show(registers)
        return registers

    def _views(self) -> tuple[memoryview, memoryview, memoryview]:
        found = self._layout
        return (
            self.quads[found.gpr // 8 : found.gpr // 8 + 16],
            self.quads[found.rip // 8 : found.rip // 8 + 1],
            self._bytes[found.vectors : found.vectors + VECTOR_COUNT * VECTOR_BYTES],
        )

    def _show(self, registers: Registers) -> None:
        found = self._layout
        registers.controls = self.quads[self.cr_index : self.cr_index + 5]
        end = found.vectors + VECTOR_COUNT * VECTOR_BYTES
        registers.images = (self._bytes[:end], registers.opmask.cast("B"))
        registers.rflags_view = self.quads[self._rflags : self._rflags + 1]
        registers.mxcsr_view = self.words[found.mxcsr // 4 : found.mxcsr // 4 + 1]

    def detach(self, registers: Registers) -> None:
        """Keep the state in memory of our own: Unicorn is about to free its."""
        self._kept = {name: self.read(name) for name in (*_API, *_MSRS)}
        self._bytes = memoryview(bytearray(self._bytes))
        self.quads, self.words = self._bytes.cast("Q"), self._bytes.cast("I")
        self.control_view = memoryview(bytes(self.control_view))
        self.on_control, self.on_float_control = _nothing, _ignore
        self._readers, self._writers = {}, {}
        registers.gpr, registers.rip_view, vectors = self._views()
        registers.vec.move(vectors)
        self._show(registers)

    @property
    def handle(self) -> ctypes.c_void_p:
        return self._handle

    @property
    def cpl(self) -> int:
        return self.words[self.hflags_index] & HF_CPL

    @property
    def bitness(self) -> int:
        hflags = self.words[self.hflags_index]
        if hflags & HF_CS64:
            return 64
        return 32 if hflags & HF_CS32 else 16

    def segment_base(self, index: int) -> int:
        return self.quads[self._bases[index]]

    def read(self, name: str) -> int:
        direct = self._direct.get(name)
        if direct is not None:
            return self.quads[direct]
        reader = self._readers.get(name)
        if reader is not None:
            return reader()
        if name == "mxcsr":
            return self.words[self._layout.mxcsr // 4]
        if name in _MMX:
            return self.read(_MMX[name]) & 0xFFFF_FFFF_FFFF_FFFF
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        if name in _X87 and self._find_x87():
            return self.read(name)
        number = self._ids.get(name)
        if number is not None:
            self._call.uc_reg_read(self._handle, number, self._buffer)
            return int.from_bytes(self._buffer_bytes[: _API[name][1]], "little")
        if name in _MSRS:
            struct.pack_into("<IxxxxQ", self._buffer, 0, _MSRS[name], 0)
            self._call.uc_reg_read(self._handle, x86.UC_X86_REG_MSR, self._buffer)
            return int.from_bytes(self._buffer_bytes[8:16], "little")
        if name == "cr8":
            return self._cr8
        raise KeyError(name)

    def _find_x87(self) -> bool:
        """Whether the x87 registers are found now."""
        if self._looked_for_x87:
            return False
        self._looked_for_x87 = True
        self._x87 = x87_view(self._bytes)
        if self._x87 is not None:
            self._readers, self._writers = x87_registers(self._x87)
        return self._x87 is not None

    def x87_view(self) -> X87View | None:
        """The x87 unit while the engine is open."""
        self._find_x87()
        return self._x87

    def reader(self, name: str) -> Callable[[], int]:
        """What reads a register while the engine is open: in place, if it can be."""
        self.read(name)
        return self._readers.get(name) or partial(self.read, name)

    def writer(self, name: str) -> Callable[[int], None]:
        """What writes one, the same."""
        self.read(name)
        return self._writers.get(name) or partial(self.write, name)

    def write(self, name: str, value: int) -> None:
        writer = self._writers.get(name)
        if writer is not None:
            writer(value)
        elif name == "rflags":
            self.quads[self._rflags] = value & 0xFFFF_FFFF | 2
        elif self._kept is not None and name in self._kept:
            self._keep(name, value)
        elif name in _API:
            number, size = _API[name]
            self._buffer_bytes[:size] = value.to_bytes(size, "little")
            self._call.uc_reg_write(self._handle, number, self._buffer)
            if name in _CONTROL:
                self.on_control()
            elif name in _FLOAT_CONTROL:
                self.on_float_control(name, value)
        elif name in ("fs_base", "gs_base"):
            self.quads[self._direct[name]] = value
        elif name in _MMX:
            self.write(_MMX[name], _MMX_UPPER | value)
        elif name in _MSRS:
            struct.pack_into("<IxxxxQ", self._buffer, 0, _MSRS[name], value)
            self._call.uc_reg_write(self._handle, x86.UC_X86_REG_MSR, self._buffer)
            if name == "efer":
                self.on_control()
        elif name == "cr8":
            self._cr8 = value
        else:
            raise KeyError(name)

    def _keep(self, name: str, value: int) -> None:
        """:meth:`write` without an engine."""
        if name in self._direct:
            self.quads[self._direct[name]] = value
        elif name == "mxcsr":
            self.words[self._layout.mxcsr // 4] = value
        elif self._kept is not None:
            self._kept[name] = value

    def flush_tlb(self) -> None:
        """Make Unicorn forget its translations, as a write of CR3 does."""
        if self._kept is not None:
            return
        cr3 = self.quads[self.cr_index + 3]
        self._buffer_bytes[:8] = cr3.to_bytes(8, "little")
        self._call.uc_reg_write(self._handle, self._ids["cr3"], self._buffer)

    def read_segment(self, name: str) -> Segment:
        at = self._layout.segments + _INDEX[name] * SEGMENT_BYTES
        selector, base, limit, flags = _SEGMENT.unpack_from(self._bytes, at)
        return Segment(
            selector=selector & 0xFFFF,
            base=base,
            limit=limit,
            type=flags >> 8 & 15,
            s=flags >> 12 & 1,
            dpl=flags >> 13 & 3,
            present=flags >> 15 & 1,
            avl=flags >> 20 & 1,
            l=flags >> 21 & 1,
            db=flags >> 22 & 1,
            g=flags >> 23 & 1,
        )

    def write_segment(self, name: str, value: Segment) -> None:
        """Set a segment register with its cache; CPL follows the DPL of SS, as in VMX and SVM."""
        s = value
        flags = s.type << 8 | s.s << 12 | s.dpl << 13 | s.present << 15
        flags |= s.avl << 20 | s.l << 21 | s.db << 22 | s.g << 23
        at = self._layout.segments + _INDEX[name] * SEGMENT_BYTES
        before = self.words[self.hflags_index], self.quads[self.cs_base_index]
        _SEGMENT.pack_into(self._bytes, at, s.selector, s.base, s.limit, flags)
        self.update_hflags()
        if before != (self.words[self.hflags_index], self.quads[self.cs_base_index]):
            self.on_control()

    def read_table(self, name: str) -> DescriptorTable:
        at = self._layout.segments + _TABLES[name] * SEGMENT_BYTES
        _selector, base, limit, _flags = _SEGMENT.unpack_from(self._bytes, at)
        return DescriptorTable(base, limit)

    def write_table(self, name: str, value: DescriptorTable) -> None:
        at = self._layout.segments + _TABLES[name] * SEGMENT_BYTES
        _SEGMENT.pack_into(self._bytes, at, 0, value.base, value.limit, 0)

    def leave_long_mode(self) -> None:
        """Clear EFER, LMA too: for a guest that starts in real or protected mode."""
        self.quads[self._direct["efer"]] = 0
        self.update_hflags()

    def update_hflags(self) -> None:
        """Recompute what Unicorn derives from segments and control registers."""
        read = self.quads
        cr0, cr4, efer = read[self.cr_index], read[self.cr_index + 4], read[self._direct["efer"]]
        caches = self._layout.segments
        code, stack = (
            _SEGMENT.unpack_from(self._bytes, caches + n * SEGMENT_BYTES)[3] for n in (1, 2)
        )
        hflags = stack >> 13 & HF_CPL
        hflags |= HF_PE if cr0 & CR0_PE else 0
        hflags |= (cr0 >> 1 & 7) * HF_MP  # MP, EM, TS in a row
        hflags |= HF_OSFXSR if cr4 & CR4_OSFXSR else 0
        hflags |= HF_LMA if efer & EFER_LMA else 0
        if efer & EFER_LMA and code & _DESC_L:
            hflags |= HF_CS32 | HF_SS32 | HF_CS64
        else:
            hflags |= HF_CS32 if code & _DESC_B else 0
            hflags |= HF_SS32 if stack & _DESC_B else 0
            virtual_8086 = self.read("rflags") & _FLAG_VM
            flat = not any(read[self._bases[n]] for n in (0, 2, 3))
            if not cr0 & CR0_PE or virtual_8086 or not hflags & HF_CS32 or not flat:
                hflags |= HF_ADDSEG
        at = self.hflags_index
        self.words[at] = (self.words[at] & ~_HF_COMPUTED & 0xFFFF_FFFF) | hflags
