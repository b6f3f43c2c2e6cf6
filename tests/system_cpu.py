"""A vCPU double on which the handlers of the system pack run, one instruction at a time."""

from __future__ import annotations

from typing import Any

import pytest

from handlers.system import PACK
from sandbox.cpu import Cpu, Fault
from sandbox.cpuid import CpuidModel
from sandbox.decode import decode
from sandbox.registers import (
    RBX,
)
from tests.doubles import DictBank, FlatMemory, make_cpu

DATA = 0x10000
FEATURES = "SSE3 XSAVE XSAVEC AVX AVX2 FSGSBASE RDTSCP RDPID".split()


def make(bitness: int = 64, cpl: int = 0, features: list[str] | None = None) -> Cpu:
    cpu = make_cpu(bitness, cpl)
    cpu.services["cpuid"] = CpuidModel(FEATURES if features is None else features).bind(cpu)
    cpu.gpr[RBX] = DATA
    if bitness != 64:
        bank_of(cpu).write("efer", 0)
    return cpu


def bank_of(cpu: Cpu) -> DictBank:
    bank = cpu.registers.bank
    assert isinstance(bank, DictBank)
    return bank


def memory_of(cpu: Cpu) -> FlatMemory:
    assert isinstance(cpu.memory, FlatMemory)
    return cpu.memory


def run(cpu: Cpu, code: str) -> Any:
    insn = decode(bytes.fromhex(code), cpu.bitness)
    asked = [h for h in PACK.handlers if insn.mnemonic in h.mnemonics or insn.form in h.forms]
    for handler in asked:
        action = handler.bind(cpu, insn)
        if action is not None:
            return action()
    raise AssertionError(f"nobody takes {insn.text()}")


def fault(cpu: Cpu, code: str) -> tuple[int, int | None]:
    """The fault of an instruction, which must leave registers and memory alone."""
    bank, memory = bank_of(cpu), memory_of(cpu)

    def everything() -> Any:
        state = dict(bank.values), dict(bank.segments), dict(bank.tables), bytes(memory.data)
        return state, cpu.gpr.tobytes(), cpu.registers.xcr0

    before = everything()
    with pytest.raises(Fault) as caught:
        run(cpu, code)
    assert everything() == before
    return caught.value.vector, caught.value.error_code
