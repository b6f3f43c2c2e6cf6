"""Control and debug registers, CLTS, LMSW, SMSW, cache and TLB control, FS and GS base.

Sources: SDM Vol. 2, MOV to/from control and debug registers; Vol. 3, 2.5 (control registers),
17.2 (debug registers), 9.8.5 (entering long mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import RegisterExt

from handlers.integer import Operand, bind_operand
from sandbox.cpu import DB, GP, UD, Cpu, Fault, is_canonical
from sandbox.decode import Insn
from sandbox.handler import handler
from sandbox.registers import Segment

_LOW = 0xFFFF_FFFF
CR0_PE, CR0_TS, CR0_ET, CR0_NW, CR0_CD, CR0_PG = (
    1, 1 << 3, 1 << 4, 1 << 29, 1 << 30, 1 << 31,
)  # fmt: skip
_CR0_BITS: Final = 0xE005_003F
CR4_DE, CR4_PAE, CR4_UMIP, CR4_FSGSBASE = 1 << 3, 1 << 5, 1 << 11, 1 << 16
_CR4_PLAIN: Final = 0x07FF
"""CR4 bits 0 to 10: on every processor that long mode runs on."""
_CR4_FEATURES: Final = {
    11: (7, 2, 2), 16: (7, 1, 0), 17: (1, 2, 17), 18: (1, 2, 26), 20: (7, 1, 7), 21: (7, 1, 20),
    22: (7, 2, 3),
}  # fmt: skip
"""CR4 bit to the CPUID bit that allows it: leaf, register (1 EBX, 2 ECX), bit.

UMIP, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP, PKE.
"""
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
DR6_FIXED, DR7_FIXED, DR6_BD, DR7_GD = 0xFFFF_0FF0, 0x400, 1 << 13, 1 << 13


def require_cpl0(cpu: Cpu) -> None:
    """#GP(0) for a privileged instruction."""
    if cpu.cpl:
        raise Fault(GP, 0)


def check_umip(cpu: Cpu) -> None:
    """SGDT, SIDT, SLDT, SMSW and STR may be privileged."""
    if cpu.cpl and cpu.registers.bank.read("cr4") & CR4_UMIP:
        raise Fault(GP, 0)


def _refuse(condition: object) -> None:
    if condition:
        raise Fault(GP, 0)


# Control registers


def _gpr(insn: Insn, operand: int) -> int:
    return RegisterExt.number(insn.iced.op_register(operand))


@handler(form=("MOV_R32_CR", "MOV_R64_CR"))
def read_control(cpu: Cpu, insn: Insn) -> None:
    require_cpl0(cpu)
    value = cpu.registers.bank.read(f"cr{_gpr(insn, 1)}")
    cpu.gpr[_gpr(insn, 0)] = value if insn.bitness == 64 else value & _LOW


@handler(form=("MOV_CR_R32", "MOV_CR_R64"))
def write_control(cpu: Cpu, insn: Insn) -> None:
    require_cpl0(cpu)
    write = _CONTROL_WRITERS[_gpr(insn, 0)]
    value = cpu.gpr[_gpr(insn, 1)]
    write(cpu, value if insn.bitness == 64 else value & _LOW)


def write_cr0(cpu: Cpu, value: int) -> None:
    """The rules of SDM Vol. 2, MOV to CR0; turning paging on or off enters or leaves long mode."""
    bank = cpu.registers.bank
    old, cr4, efer = bank.read("cr0"), bank.read("cr4"), bank.read("efer")
    _refuse(value >> 32)
    value = value & _CR0_BITS | CR0_ET
    paging = value & CR0_PG
    _refuse(paging and not value & CR0_PE)
    _refuse(value & CR0_NW and not value & CR0_CD)
    if paging and not old & CR0_PG and efer & EFER_LME:
        cs: Segment = bank.read_segment("cs")
        _refuse(not cr4 & CR4_PAE or cs.l or not bank.read_segment("tr").type & 8)
        efer |= EFER_LMA
    elif not paging and old & CR0_PG:
        _refuse(cpu.bitness == 64)
        efer &= ~EFER_LMA
    bank.write("cr0", value)
    if bank.read("efer") != efer:
        bank.write("efer", efer)


def _write_cr2(cpu: Cpu, value: int) -> None:
    cpu.registers.bank.write("cr2", value)


def _write_cr3(cpu: Cpu, value: int) -> None:
    physical_bits = cpu.services["cpuid"](0x8000_0008, 0)[0] & 0xFF
    _refuse(value >> physical_bits)
    cpu.registers.bank.write("cr3", value)


def _write_cr4(cpu: Cpu, value: int) -> None:
    bank = cpu.registers.bank
    allowed, cpuid = _CR4_PLAIN, cpu.services["cpuid"]
    for bit, (leaf, register, feature) in _CR4_FEATURES.items():
        if cpuid(leaf, 0)[register] >> feature & 1:
            allowed |= 1 << bit
    _refuse(value & ~allowed)
    _refuse(bank.read("efer") & EFER_LMA and not value & CR4_PAE)
    bank.write("cr4", value)


def _write_cr8(cpu: Cpu, value: int) -> None:
    _refuse(value >> 4)
    cpu.registers.bank.write("cr8", value)
    changed = cpu.services.get("task_priority_changed")
    if changed is not None:
        changed()


_CONTROL_WRITERS: Final[dict[int, Callable[[Cpu, int], None]]] = {
    0: write_cr0, 2: _write_cr2, 3: _write_cr3, 4: _write_cr4, 8: _write_cr8,
}  # fmt: skip
"""All that there are: the decoder refuses the other numbers."""


@handler("clts")
def clts(cpu: Cpu, insn: Insn) -> None:
    require_cpl0(cpu)
    bank = cpu.registers.bank
    bank.write("cr0", bank.read("cr0") & ~CR0_TS)


@handler("lmsw")
def lmsw(cpu: Cpu, insn: Insn) -> None:
    """The low four bits of CR0; PE can be set but not cleared."""
    require_cpl0(cpu)
    bank = cpu.registers.bank
    old = bank.read("cr0")
    bank.write("cr0", old & ~0xE | word_operand(cpu, insn).read() & 0xF)


@handler("smsw")
def smsw(cpu: Cpu, insn: Insn) -> None:
    check_umip(cpu)
    store_word(cpu, insn, cpu.registers.bank.read("cr0"))


def word_operand(cpu: Cpu, insn: Insn, number: int = 0) -> Operand:
    """A register or ``m16`` operand; only the low 16 bits of a wider register count."""
    operand = bind_operand(cpu, insn, number)
    if operand is None:
        raise Fault(UD)
    return operand


def store_word(cpu: Cpu, insn: Insn, value: int) -> None:
    """Store to a register of any size, or 16 bits to memory."""
    word_operand(cpu, insn).write(value)


# Debug registers


def _debug_name(cpu: Cpu, number: int) -> str:
    """The register's name; DR4 and DR5 stand for DR6 and DR7 unless CR4.DE forbids it."""
    if number in (4, 5):
        if cpu.registers.bank.read("cr4") & CR4_DE:
            raise Fault(UD)
        number += 2
    return f"dr{number}"


def _check_debug_access(cpu: Cpu) -> None:
    require_cpl0(cpu)
    bank = cpu.registers.bank
    if bank.read("dr7") & DR7_GD:
        bank.write("dr6", bank.read("dr6") | DR6_BD)
        bank.write("dr7", bank.read("dr7") & ~DR7_GD)
        raise Fault(DB)


@handler(form=("MOV_R32_DR", "MOV_R64_DR"))
def read_debug(cpu: Cpu, insn: Insn) -> None:
    name = _debug_name(cpu, _gpr(insn, 1))
    _check_debug_access(cpu)
    value = cpu.registers.bank.read(name)
    if name == "dr6":
        value |= DR6_FIXED
    elif name == "dr7":
        value |= DR7_FIXED
    cpu.gpr[_gpr(insn, 0)] = value if insn.bitness == 64 else value & _LOW


@handler(form=("MOV_DR_R32", "MOV_DR_R64"))
def write_debug(cpu: Cpu, insn: Insn) -> None:
    name = _debug_name(cpu, _gpr(insn, 0))
    _check_debug_access(cpu)
    value = cpu.gpr[_gpr(insn, 1)]
    if insn.bitness != 64:
        value &= _LOW
    if name == "dr6":
        _refuse(value >> 32)
        value = value & 0x1_E00F | DR6_FIXED
    elif name == "dr7":
        _refuse(value >> 32)
        value = value & 0xFFFF_2BFF | DR7_FIXED
    cpu.registers.bank.write(name, value)


# Caches, TLB, FS and GS


@handler("invlpg")
def invlpg(cpu: Cpu, insn: Insn) -> None:
    """Forget translations: all of them, which the manual allows."""
    require_cpl0(cpu)
    bank = cpu.registers.bank
    bank.write("cr3", bank.read("cr3"))


@handler("invd", "wbinvd", "wbnoinvd")
def write_back_caches(cpu: Cpu, insn: Insn) -> None:
    """No caches to write back, but privileged."""
    require_cpl0(cpu)


@handler("rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase")
def segment_base(cpu: Cpu, insn: Insn) -> None:
    bank = cpu.registers.bank
    if cpu.bitness != 64 or not bank.read("cr4") & CR4_FSGSBASE:
        raise Fault(UD)
    operand = word_operand(cpu, insn)
    name = f"{insn.mnemonic[2:4]}_base"
    if insn.mnemonic.startswith("rd"):
        operand.write(bank.read(name))
        return
    value = operand.read()
    _refuse(not is_canonical(value))
    bank.write(name, value)
