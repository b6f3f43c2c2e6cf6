"""Waits that end at once, transactions that never start, and stores of whole cache lines."""

from __future__ import annotations

import pytest

from handlers import integer_direct
from sandbox.cases import Cases
from sandbox.cpu import GP, PF_, UD, Fault
from sandbox.decode import decode
from sandbox.handler import Resume
from sandbox.native import DATA, READONLY
from sandbox.registers import (
    AF,
    CF,
    DF,
    OF,
    PF,
    RAX,
    RBX,
    RCX,
    RDX,
    SF,
    ZF,
    Segment,
)
from tests.differential import compare
from tests.doubles import DictBank, make_cpu
from tests.integer_cases import bind

STATUS = CF | PF | AF | ZF | SF | OF
UMWAIT, TPAUSE, UMONITOR = "f20faef0", "660faef0", "f30faef0"  # all of (r)ax
MONITOR, MONITORX, MWAIT, MWAITX = "0f01c8", "0f01fa", "0f01c9", "0f01fb"


def fault_of(code: str, cpl: int = 0, cr4: int = 0x40600, **gpr: int) -> Fault | None:
    cpu = make_cpu(64, cpl)
    cpu.registers.bank.write("cr4", cr4)
    for name, value in gpr.items():
        cpu.gpr["rax rcx rdx rbx".split().index(name)] = value
    try:
        assert bind(cpu, decode(bytes.fromhex(code), 64))() is None
    except Fault as fault:
        return fault
    return None


@pytest.mark.parametrize("code", [UMWAIT, TPAUSE])
def test_user_waits_end_at_once_and_clear_the_flags(code: str) -> None:
    cpu = make_cpu(64, 3)
    cpu.rflags = 0x202 | STATUS | DF
    cpu.gpr[RAX], cpu.gpr[RDX] = 0xFFFF_FFFF_0000_0001, 5
    assert bind(cpu, decode(bytes.fromhex(code), 64))() is None
    assert cpu.rflags == 0x202 | DF
    for reserved in (2, 1 << 31):
        fault = fault_of(code, rax=reserved)
        assert fault is not None and fault.vector == GP
    fault = fault_of(code, 3, 0x40604)
    assert fault is not None and (fault.vector, fault.error_code) == (GP, 0)
    assert fault_of(code, 0, 0x40604) is None


@pytest.mark.parametrize("code", [UMONITOR, MONITOR, MONITORX])
def test_monitors_fault_as_loads_do(code: str) -> None:
    assert fault_of(code, rax=0x10000) is None
    fault = fault_of(code, rax=0x8000)
    assert fault is not None and (fault.vector, fault.address) == (PF_, 0x8000)
    assert fault_of("67" + code, rax=0x5_0001_0000) is None


def test_umonitor_takes_any_register() -> None:
    cpu = make_cpu()
    cpu.gpr[9] = 0x10000
    assert bind(cpu, decode(bytes.fromhex("f3410faef1"), 64))() is None


@pytest.mark.parametrize(
    ("code", "extension"), [(MONITOR, 0), (MWAIT, 1), (MONITORX, 0), (MWAITX, 3)]
)
def test_extensions_that_do_not_exist_are_gp(code: str, extension: int) -> None:
    assert fault_of(code, rax=0x10000, rcx=extension) is None
    fault = fault_of(code, rax=0x10000, rcx=4)
    assert fault is not None and fault.vector == GP


@pytest.mark.parametrize("code", [MONITOR, MWAIT])
def test_only_the_kernel_may_monitor(code: str) -> None:
    fault = fault_of(code, 3, rax=0x10000)
    assert fault is not None and fault.vector == UD
    assert fault_of(code.replace("c8", "fa").replace("c9", "fb"), 3, rax=0x10000) is None


def test_a_transaction_aborts_as_it_starts() -> None:
    cpu = make_cpu()
    cpu.gpr[RAX] = -1 & (1 << 64) - 1
    cpu.rflags = 0x202 | STATUS
    verdict = bind(cpu, decode(bytes.fromhex("c7f810000000"), 64))()
    assert verdict == Resume(0x10016)
    assert cpu.gpr[RAX] == 0 and cpu.rflags == 0x202 | STATUS
    bind(cpu, decode(bytes.fromhex("0f01d6"), 64))()  # xtest
    assert cpu.rflags == 0x202 | ZF
    assert bind(cpu, decode(bytes.fromhex("c6f805"), 64))() is None  # xabort
    fault = fault_of("0f01d5")  # xend
    assert fault is not None and (fault.vector, fault.error_code) == (GP, 0)


def test_ptwrite_reads_its_operand() -> None:
    assert fault_of("f30fae20", rax=0x10000) is None
    fault = fault_of("f3480fae20", rax=0x8000)
    assert fault is not None and fault.vector == PF_
    assert fault_of("f30faee0") is None


def test_clzero_does_what_the_host_cpu_does() -> None:
    insn = decode(bytes.fromhex("0f01fc"), 64)
    states = Cases(insn, 1, False).take(60)
    for number, state in enumerate(states):
        state.gpr[RAX] = (READONLY.start if number % 5 == 0 else DATA) + 37 * number
    compare(insn, integer_direct.HANDLERS, states=states)


def test_movdir64b_copies_a_line() -> None:
    cpu = make_cpu()
    line = bytes(range(64))
    cpu.write(0x10003, line)
    cpu.gpr[RAX], cpu.gpr[RCX] = 0x10100, 0x10003
    bind(cpu, decode(bytes.fromhex("660f38f801"), 64))()  # movdir64b rax, [rcx]
    assert cpu.read(0x10100, 64) == line and cpu.read(0x10140, 1) == b"\0"
    fault = fault_of("660f38f801", rax=0x10120, rcx=0x10000)
    assert fault is not None and (fault.vector, fault.error_code) == (GP, 0)
    fault = fault_of("660f38f801", rax=0x10100, rcx=0x13FD0)
    assert fault is not None and fault.vector == PF_
    fault = fault_of("660f38f801", rax=0x20000, rcx=0x10000)
    assert fault is not None and (fault.vector, fault.error_code) == (PF_, 2)


def test_movdir64b_stores_to_es() -> None:
    cpu = make_cpu(32)
    assert isinstance(cpu.registers.bank, DictBank)
    cpu.registers.bank.segments["es"] = Segment(base=0x10000)
    cpu.registers.bank.segments["ds"] = Segment(base=0x11000)
    cpu.write(0x11008, b"x" * 64)
    cpu.gpr[RAX], cpu.gpr[RBX], cpu.gpr[RCX] = 0x80, 0, 8
    bind(cpu, decode(bytes.fromhex("660f38f801"), 32))()
    assert cpu.read(0x10080, 64) == b"x" * 64
