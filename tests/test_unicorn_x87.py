"""x87 registers in Unicorn's CPU state: what is read and written there is what its API has."""

from __future__ import annotations

import ctypes
import random

import pytest

from sandbox.engine.unicorn_library import library, x86
from sandbox.engine.unicorn_state import UnicornBank
from sandbox.vm import Vm
from tests.guest import machine

SIZES = {"fpsw": 2, "fptag": 2, "fpcw": 2, "fip": 8, "fdp": 8, **{f"st{n}": 10 for n in range(8)}}
NUMBERS = [0, 1, 1 << 79, 1 << 63, 5 << 64, 0x3FFF << 64 | 1 << 63, 0x7FFF << 64 | 1 << 63]


def bank_of(vm: Vm) -> UnicornBank:
    bank = vm.engine.bank
    assert isinstance(bank, UnicornBank)
    return bank


def api_read(bank: UnicornBank, name: str) -> int:
    buffer = (ctypes.c_uint8 * 16)()
    number = ctypes.c_int(getattr(x86, f"UC_X86_REG_{name.upper()}"))
    library().call.uc_reg_read(bank.handle, number, buffer)
    return int.from_bytes(bytes(buffer)[: SIZES[name]], "little")


def api_write(bank: UnicornBank, name: str, value: int) -> None:
    buffer = (ctypes.c_uint8 * 16)(*value.to_bytes(16, "little"))
    number = ctypes.c_int(getattr(x86, f"UC_X86_REG_{name.upper()}"))
    library().call.uc_reg_write(bank.handle, number, buffer)


@pytest.mark.parametrize("seed", range(3))
def test_every_register_reads_as_the_api_has_it_whoever_wrote_it(seed: int) -> None:
    rng = random.Random(seed)
    with machine(b"\xf4") as found:
        bank = bank_of(found.vm)
        for _ in range(300):
            name = rng.choice(list(SIZES))
            value = rng.getrandbits(8 * SIZES[name])
            if name.startswith("st"):
                value = rng.choice((value, *NUMBERS))
            if rng.getrandbits(1):
                bank.write(name, value)
            else:
                api_write(bank, name, value)
            for other in SIZES:
                assert bank.read(other) == api_read(bank, other), (name, hex(value), other)


def test_a_closed_machine_keeps_them() -> None:
    with machine(b"\xf4") as found:
        bank, values = bank_of(found.vm), {n: random.getrandbits(62) | 1 << 63 for n in range(8)}
        bank.write("fptag", 0)
        for n, value in values.items():
            bank.write(f"st{n}", value)
        before = {name: bank.read(name) for name in SIZES}
    assert {name: bank.read(name) for name in SIZES} == before
    bank.write("st3", 77)
    assert bank.read("st3") == 77
