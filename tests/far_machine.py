"""Run one instruction of the pack system on a machine with descriptor tables and stacks."""

from __future__ import annotations

from typing import Any

import pytest

from handlers.system import PACK
from sandbox.cpu import Fault
from sandbox.decode import decode
from sandbox.registers import RBX, RSP
from tests.machine import (
    ALWAYS,
    Machine,
    machine,
)

POINTER = 0x12000
"""Where RBX points."""
GATE = 0x60
"""Selector of a descriptor that is free for a call gate."""


def run(m: Machine, code: str) -> Any:
    insn = decode(bytes.fromhex(code), m.cpu.bitness)
    for handler in PACK.handlers:
        if insn.mnemonic in handler.mnemonics or insn.form in handler.forms:
            action = handler.bind(m.cpu, insn)
            assert action is not None
            return action()
    raise AssertionError(f"nobody takes {insn.text()}")


def fault(m: Machine, code: str) -> tuple[int, int | None]:
    def everything() -> Any:
        bank = m.bank
        return dict(bank.values), dict(bank.segments), m.cpu.gpr.tobytes(), bytes(m.memory.data)

    before = everything()
    with pytest.raises(Fault) as caught:
        run(m, code)
    assert everything() == before, "a fault changes nothing"
    return caught.value.vector, caught.value.error_code


def make(mode: int, cpl: int = 0, flags: int = ALWAYS) -> Machine:
    m = machine(mode, cpl, flags)
    m.bank.bitness = mode
    m.cpu.gpr[RBX] = POINTER
    return m


def selector_of(m: Machine, name: str) -> int:
    return m.bank.read_segment(name).selector


def push(m: Machine, size: int, *values: int) -> None:
    """Values on the stack, the first at the top."""
    m.cpu.gpr[RSP] -= size * len(values)
    data = b"".join(v.to_bytes(size, "little") for v in values)
    m.memory.write(m.cpu.gpr[RSP], data)
