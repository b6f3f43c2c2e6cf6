"""FXSAVE, FXRSTOR and the XSAVE family over the whole state (SDM Vol. 1, chapter 13; Vol. 2).

All of them read and check everything first, then write: a fault leaves memory and state alone.
"""

from __future__ import annotations

from handlers.control import require_cpl0
from sandbox.cpu import GP, NM, UD, Cpu, Fault
from sandbox.decode import Insn
from sandbox.handler import handler
from sandbox.registers import RAX, RDX
from sandbox.xsave import (
    COMPACTED,
    COMPONENTS,
    LEGACY_SIZE,
    MXCSR_MASK,
    MXCSR_RESET,
    SSE,
    X87,
    compacted_offsets,
    in_use,
    read_component,
    read_x87,
    reset_x87,
    standard_offsets,
    write_component,
    write_x87,
)

CR0_EM, CR0_TS = 4, 8
CR4_OSFXSR, CR4_OSXSAVE = 1 << 9, 1 << 18
MXCSR_AT, ST_AT, XMM_AT, HEADER_AT = 24, 32, 160, LEGACY_SIZE
_AVX_BIT = 4


class _Writes:
    """Writes that happen together: all checked before the first."""

    def __init__(self, cpu: Cpu, base: int) -> None:
        self.cpu = cpu
        self.base = base
        self.parts: list[tuple[int, bytes]] = []

    def add(self, offset: int, data: bytes) -> None:
        if data:
            self.parts.append((self.base + offset & 0xFFFF_FFFF_FFFF_FFFF, data))

    def commit(self) -> None:
        for address, data in self.parts:
            self.cpu.check_write(address, len(data))
        for address, data in self.parts:
            self.cpu.write(address, data)


def _aligned(cpu: Cpu, insn: Insn, alignment: int) -> int:
    address = cpu.address(insn)
    if address % alignment:
        raise Fault(GP, 0)
    return address


def _wide(insn: Insn) -> bool:
    return insn.mnemonic.endswith("64")


def _add_x87(writes: _Writes, cpu: Cpu, insn: Insn) -> None:
    shown = cpu.services.get("x87_shown")
    if shown is not None:
        shown(insn)
    head, registers = read_x87(cpu, _wide(insn))
    writes.add(0, head)
    writes.add(ST_AT, registers)


def _add_mxcsr(writes: _Writes, cpu: Cpu) -> None:
    writes.add(MXCSR_AT, cpu.mxcsr.to_bytes(4, "little") + MXCSR_MASK.to_bytes(4, "little"))
    shown = cpu.services.get("mxcsr_shown")
    if shown is not None:
        shown()


def _checked_mxcsr(legacy: bytes) -> int:
    mxcsr = int.from_bytes(legacy[MXCSR_AT : MXCSR_AT + 4], "little")
    if mxcsr & ~MXCSR_MASK:
        raise Fault(GP, 0)
    return mxcsr


# FXSAVE, FXRSTOR


def _check_fx(cpu: Cpu) -> bool:
    """#NM as the manual has it; whether the SSE part takes part (CR4.OSFXSR)."""
    bank = cpu.registers.bank
    if bank.read("cr0") & (CR0_EM | CR0_TS):
        raise Fault(NM)
    return bool(bank.read("cr4") & CR4_OSFXSR)


@handler("fxsave", "fxsave64")
def fxsave(cpu: Cpu, insn: Insn) -> None:
    with_sse = _check_fx(cpu)
    writes = _Writes(cpu, _aligned(cpu, insn, 16))
    _add_x87(writes, cpu, insn)
    _add_mxcsr(writes, cpu)
    if with_sse:
        writes.add(XMM_AT, read_component(cpu, SSE))
    writes.commit()


@handler("fxrstor", "fxrstor64")
def fxrstor(cpu: Cpu, insn: Insn) -> None:
    with_sse = _check_fx(cpu)
    legacy = cpu.read(_aligned(cpu, insn, 16), LEGACY_SIZE)
    mxcsr = _checked_mxcsr(legacy) if with_sse else cpu.mxcsr
    write_x87(cpu, legacy[:24], legacy[ST_AT:XMM_AT], _wide(insn))
    cpu.mxcsr = mxcsr
    if with_sse:
        write_component(cpu, SSE, legacy[XMM_AT : XMM_AT + 256])


# XSAVE, XSAVEOPT, XSAVEC


def _check_x(cpu: Cpu) -> None:
    bank = cpu.registers.bank
    if not bank.read("cr4") & CR4_OSXSAVE:
        raise Fault(UD)
    if bank.read("cr0") & CR0_TS:
        raise Fault(NM)


def _requested(cpu: Cpu) -> int:
    """RFBM: the components that EDX:EAX asks for and XCR0 enables."""
    asked = cpu.gpr[RAX] & 0xFFFF_FFFF | (cpu.gpr[RDX] & 0xFFFF_FFFF) << 32
    return asked & cpu.registers.xcr0


def _add_components(
    writes: _Writes, cpu: Cpu, insn: Insn, saved: int, offsets: dict[int, int]
) -> None:
    if saved >> X87 & 1:
        _add_x87(writes, cpu, insn)
    if saved >> SSE & 1:
        writes.add(XMM_AT, read_component(cpu, SSE))
    for number, offset in offsets.items():
        if saved >> number & 1:
            writes.add(offset, read_component(cpu, number))


def _xsave_standard(cpu: Cpu, insn: Insn, optimised: bool) -> None:
    """XSAVE writes all that is asked for, XSAVEOPT leaves out what is in its initial state."""
    _check_x(cpu)
    base = _aligned(cpu, insn, 64)
    rfbm = _requested(cpu)
    used = in_use(cpu, rfbm)
    old_bv = cpu.read_int(base + HEADER_AT, 8)
    writes = _Writes(cpu, base)
    saved = used if optimised else rfbm
    _add_components(writes, cpu, insn, saved, standard_offsets(rfbm))
    if rfbm & (1 << SSE | _AVX_BIT):
        _add_mxcsr(writes, cpu)
    writes.add(HEADER_AT, (old_bv & ~rfbm | used).to_bytes(8, "little"))
    writes.commit()


@handler("xsave", "xsave64")
def xsave(cpu: Cpu, insn: Insn) -> None:
    _xsave_standard(cpu, insn, optimised=False)


@handler("xsaveopt", "xsaveopt64")
def xsaveopt(cpu: Cpu, insn: Insn) -> None:
    _xsave_standard(cpu, insn, optimised=True)


@handler("xsavec", "xsavec64")
def xsavec(cpu: Cpu, insn: Insn) -> None:
    _check_x(cpu)
    _xsave_compacted(cpu, insn)


@handler("xsaves", "xsaves64")
def xsaves(cpu: Cpu, insn: Insn) -> None:
    """There are no supervisor components: IA32_XSS is 0. So it does what XSAVEC does."""
    _check_x(cpu)
    require_cpl0(cpu)
    _xsave_compacted(cpu, insn)


def _xsave_compacted(cpu: Cpu, insn: Insn) -> None:
    base = _aligned(cpu, insn, 64)
    rfbm = _requested(cpu)
    used = in_use(cpu, rfbm)
    if rfbm >> SSE & 1 and cpu.mxcsr != MXCSR_RESET:
        used |= 1 << SSE
    writes = _Writes(cpu, base)
    _add_components(writes, cpu, insn, used, compacted_offsets(rfbm))
    if used >> SSE & 1:
        _add_mxcsr(writes, cpu)
    writes.add(HEADER_AT, used.to_bytes(8, "little") + (rfbm | COMPACTED).to_bytes(8, "little"))
    writes.commit()


# XRSTOR, XRSTORS


@handler("xrstor", "xrstor64")
def xrstor(cpu: Cpu, insn: Insn) -> None:
    _check_x(cpu)
    _restore(cpu, insn, supervisor=False)


@handler("xrstors", "xrstors64")
def xrstors(cpu: Cpu, insn: Insn) -> None:
    """As XRSTOR, but from the compacted form only."""
    _check_x(cpu)
    require_cpl0(cpu)
    _restore(cpu, insn, supervisor=True)


def _restore(cpu: Cpu, insn: Insn, *, supervisor: bool) -> None:
    base = _aligned(cpu, insn, 64)
    rfbm = _requested(cpu)
    header = cpu.read(base + HEADER_AT, 64)
    xstate_bv, xcomp_bv = (int.from_bytes(header[at : at + 8], "little") for at in (0, 8))
    compacted = bool(xcomp_bv & COMPACTED)
    if supervisor and not compacted:
        raise Fault(GP, 0)
    _check_header(cpu, header, xstate_bv, xcomp_bv)

    legacy = cpu.read(base, LEGACY_SIZE)
    offsets = compacted_offsets(xcomp_bv) if compacted else standard_offsets(rfbm)
    wanted = rfbm & xstate_bv
    data = {n: cpu.read(base + offsets[n], COMPONENTS[n].size) for n in offsets if wanted >> n & 1}
    mxcsr = _new_mxcsr(cpu, legacy, rfbm, xstate_bv, compacted)

    if wanted >> X87 & 1:
        write_x87(cpu, legacy[:24], legacy[ST_AT:XMM_AT], _wide(insn))
    elif rfbm >> X87 & 1:
        reset_x87(cpu)
    if rfbm >> SSE & 1:
        from_area = legacy[XMM_AT : XMM_AT + 256] if wanted >> SSE & 1 else None
        write_component(cpu, SSE, from_area)
    for number in COMPONENTS:
        if rfbm >> number & 1:
            write_component(cpu, number, data.get(number))
    cpu.mxcsr = mxcsr


def _check_header(cpu: Cpu, header: bytes, xstate_bv: int, xcomp_bv: int) -> None:
    xcr0 = cpu.registers.xcr0
    if xcomp_bv & COMPACTED:
        components = xcomp_bv & ~COMPACTED
        bad = components & ~xcr0 or xstate_bv & ~components or any(header[16:])
    else:
        bad = xstate_bv & ~xcr0 or any(header[8:24])
    if bad:
        raise Fault(GP, 0)


def _new_mxcsr(cpu: Cpu, legacy: bytes, rfbm: int, xstate_bv: int, compacted: bool) -> int:
    """The standard form takes MXCSR for SSE or AVX, the compacted one as a part of SSE."""
    if compacted:
        if not rfbm >> SSE & 1:
            return cpu.mxcsr
        return _checked_mxcsr(legacy) if xstate_bv >> SSE & 1 else MXCSR_RESET
    return _checked_mxcsr(legacy) if rfbm & (1 << SSE | _AVX_BIT) else cpu.mxcsr
