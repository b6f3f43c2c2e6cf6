"""Floating-point arithmetic against the host CPU: values, MXCSR, traps, memory, aliasing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from handlers import fenv, float_arithmetic
from handlers.softfloat import DE, IE, PE, ZE
from sandbox.cpu import UD, XM, Cpu, Fault
from sandbox.decode import decode
from tests.differential import resolve, sweep
from tests.doubles import make_cpu
from tests.float_sweep import FEATURES, forms

VADDPS, VDIVPS = "c5ec58cb", "c5ec5ecb"  # ymm1, ymm2, ymm3


def prepared(mxcsr: int, a: Sequence[float], b: Sequence[float]) -> Cpu:
    cpu = make_cpu()
    cpu.registers.xcr0 = 7
    cpu.mxcsr = mxcsr
    cpu.vec.write(1, bytes(range(64)))
    cpu.vec.lanes(2, "f4", 32)[:] = a
    cpu.vec.lanes(3, "f4", 32)[:] = b
    return cpu


def run(cpu: Cpu, code: str) -> None:
    found = resolve(float_arithmetic, cpu, decode(bytes.fromhex(code), 64))
    assert found is not None
    found[1]()


def test_all_forms_equal_the_host() -> None:
    sweep(float_arithmetic, forms=forms(float_arithmetic), cases=10)


def test_all_forms_equal_the_host_without_its_floating_point_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fenv, "_host", None)
    sweep(float_arithmetic, forms=forms(float_arithmetic), cases=2, seed=1)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "sqrt"])
def test_scalars_equal_the_host_when_inexact_is_set_already(operation: str) -> None:
    names = [f"{v}{operation}{suffix}" for v in ("", "v") for suffix in ("ss", "sd")]
    sweep(float_arithmetic, *names, features=FEATURES, cases=30, mxcsr=[0x1FA0, 0x9FE0])


def test_unmasked_exception_leaves_the_destination_and_sets_its_flags() -> None:
    cpu = prepared(0x1F80 & ~(ZE << 7), [1, 3] + [1] * 6, [0, 1.1] + [1] * 6)
    before = cpu.vec.read(1)
    with pytest.raises(Fault) as fault:
        run(cpu, VDIVPS)
    assert fault.value.vector == XM
    assert cpu.vec.read(1) == before
    assert cpu.mxcsr == 0x1D80 | ZE  # the inexact quotient of lane 1 is not detected


def test_unmasked_exception_is_undefined_opcode_if_the_os_does_not_take_it() -> None:
    cpu = prepared(0x1F80 & ~(ZE << 7), [1] * 8, [0] * 8)
    cpu.registers.bank.write("cr4", 0x40200)
    with pytest.raises(Fault) as fault:
        run(cpu, VDIVPS)
    assert fault.value.vector == UD


def test_flags_are_sticky_and_collected_over_the_lanes() -> None:
    cpu = prepared(0x1F80 | IE, [1, 1, 1e-45, 1, 1, 1, 1, 1], [0, 3, 1, 1, 1, 1, 1, 1])
    run(cpu, VDIVPS)
    assert cpu.mxcsr == 0x1F80 | IE | ZE | PE | DE


def test_the_host_keeps_its_own_rounding_mode() -> None:
    cpu = prepared(0x5F80, [1] * 8, [2**-30] * 8)
    run(cpu, VADDPS)
    assert cpu.vec.lanes(1, "f4")[0] > 1
    assert np.float32(1) + np.float32(2**-30) == 1
