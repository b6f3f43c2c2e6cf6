"""What the processor tells of itself: CPUID, XCR0, clocks, random numbers. And the system pack.

``cpu.services`` that are used: ``cpuid`` (leaf, subleaf) -> (eax, ebx, ecx, edx), required;
``clock`` and ``entropy`` (see :mod:`sandbox.sources`), the host's own by default.
"""

from __future__ import annotations

from handlers import control, far, far_return, float_control, msr, segments, tables, xstate
from handlers.integer import bind_operand
from handlers.msr import TSC, TSC_AUX, msr_values
from sandbox.cpu import GP, UD, Cpu, Fault
from sandbox.decode import Insn
from sandbox.handler import Action, Handler, Pack, handler
from sandbox.registers import AF, CF, OF, PF, RAX, RBX, RCX, RDX, SF, ZF
from sandbox.sources import Entropy, host_entropy
from sandbox.xsave import AVX, AVX512_MASK, SSE, in_use

_LOW = 0xFFFF_FFFF
CR4_TSD, CR4_OSXSAVE = 1 << 2, 1 << 18
_STATUS = CF | PF | AF | ZF | SF | OF


def _set_pair(cpu: Cpu, value: int) -> None:
    """EDX:EAX, both zero-extended."""
    cpu.gpr[RAX], cpu.gpr[RDX] = value & _LOW, value >> 32 & _LOW


@handler("cpuid")
def cpuid(cpu: Cpu, insn: Insn) -> None:
    gpr = cpu.gpr
    answer = cpu.services["cpuid"](gpr[RAX] & _LOW, gpr[RCX] & _LOW)
    gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX] = answer


# XCR0


def _supported_xcr0(cpu: Cpu) -> int:
    eax, _ebx, _ecx, edx = cpu.services["cpuid"](0xD, 0)
    return int(eax | edx << 32)


def _check_osxsave(cpu: Cpu) -> None:
    if not cpu.registers.bank.read("cr4") & CR4_OSXSAVE:
        raise Fault(UD)


@handler("xgetbv")
def xgetbv(cpu: Cpu, insn: Insn) -> None:
    """XCR0 for ECX = 0, XCR0 & XINUSE for ECX = 1."""
    _check_osxsave(cpu)
    xcr0, index = cpu.registers.xcr0, cpu.gpr[RCX] & _LOW
    if index > 1 or (index == 1 and not cpu.services["cpuid"](0xD, 1)[0] & 4):
        raise Fault(GP, 0)
    _set_pair(cpu, in_use(cpu, xcr0) if index else xcr0)


@handler("xsetbv")
def xsetbv(cpu: Cpu, insn: Insn) -> None:
    """The rules on combinations of bits are SDM Vol. 1, 13.3."""
    _check_osxsave(cpu)
    value = cpu.gpr[RAX] & _LOW | (cpu.gpr[RDX] & _LOW) << 32
    avx512 = value & AVX512_MASK
    if (
        cpu.cpl
        or cpu.gpr[RCX] & _LOW
        or not value & 1
        or value & ~_supported_xcr0(cpu)
        or (value >> AVX & 1 and not value >> SSE & 1)
        or (avx512 and (avx512 != AVX512_MASK or not value >> AVX & 1))
    ):
        raise Fault(GP, 0)
    cpu.registers.xcr0 = value


# Time


def _tsc(cpu: Cpu) -> int:
    """The counter of the clock, moved by what the guest wrote to the TSC MSR."""
    return (msr.clock_of(cpu).tsc() + msr_values(cpu)[TSC]) & 0xFFFF_FFFF_FFFF_FFFF


def _check_tsd(cpu: Cpu) -> None:
    if cpu.cpl and cpu.registers.bank.read("cr4") & CR4_TSD:
        raise Fault(GP, 0)


@handler("rdtsc")
def rdtsc(cpu: Cpu, insn: Insn) -> None:
    _check_tsd(cpu)
    _set_pair(cpu, _tsc(cpu))


@handler("rdtscp")
def rdtscp(cpu: Cpu, insn: Insn) -> None:
    _check_tsd(cpu)
    _set_pair(cpu, _tsc(cpu))
    cpu.gpr[RCX] = msr_values(cpu)[TSC_AUX]


@handler("rdpmc")
def rdpmc(cpu: Cpu, insn: Insn) -> None:
    """There are no counters (CPUID leaf 0xA is empty), so none can be read at any level."""
    raise Fault(GP, 0)


@handler("rdpid")
def rdpid(cpu: Cpu, insn: Insn) -> None:
    operand = bind_operand(cpu, insn, 0)
    assert operand is not None
    operand.write(msr_values(cpu)[TSC_AUX])


# Chance


class Random(Handler):
    """RDRAND, RDSEED: CF = 1 and a number, or CF = 0 and 0; the other status flags are 0."""

    name = f"{__name__}.random"
    mnemonics = ("rdrand", "rdseed")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        operand = bind_operand(cpu, insn, 0)
        if operand is None:
            return None
        size = operand.bits // 8

        def action() -> None:
            source: Entropy = cpu.services.get("entropy", host_entropy)
            data = source(size)
            found = len(data) == size
            operand.write(int.from_bytes(data, "little") if found else 0)
            cpu.rflags = cpu.rflags & ~_STATUS | (CF if found else 0)

        return action


PACK = Pack.of(
    "system",
    [cpuid, xgetbv, xsetbv, rdtsc, rdtscp, rdpmc, rdpid, Random()],
    [float_control, xstate, msr, control, tables, segments, far, far_return],
)
