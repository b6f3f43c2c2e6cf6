"""x87 code on the real machine: the handlers write the engine's own x87 state."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from guests.samples import build
from sandbox import abi
from sandbox.boot import Mode, boot_flat
from sandbox.cpuid import features
from sandbox.exits import GuestException, Hlt
from sandbox.native import DATA as NATIVE_DATA
from sandbox.native import NativeCpu, State
from sandbox.policy import Policy
from sandbox.registers import RDI
from sandbox.vcpu import Vcpu
from sandbox.vm import Vm
from tests.test_guests_c import native_levels, static_libc
from tests.x87_oracle import needs_host, random_value

CODE, DATA = 0x1000, 0x8000
QUARTER_PI = 0x3FFE_C90FDAA22168C235
SNIPPETS = """
    db6f00 db6f10 db6f20 d94730 dd4738 df4740 df6f48 d9e8 d9eb d9ee d9e9
    d8c1 dcc2 dec1 d8e1 dee9 d8c9 dec9 d8f1 def9 dcfb d9fa d9fc d9fd d9f4 d9f8 d9f5
    d9c9 d9cb d9c0 d9c3 d9e0 d9e1 d9f6 d9f7 ddc2 dbe2 d8d1 d9e4 d9e5 ddd3 dadb
    db7f50 dd5f60 d95f68 df7f70 df7778 db4f7c dd7f48 d97f40 d96f40
""".split()
"""Loads, constants, arithmetic, stack, comparisons, stores: operands at RDI."""


def run(policy: str, code: str, data: bytes = b"") -> tuple[Vcpu, Vm, object]:
    vm = Vm(Policy.load(policy), ["x87", "integer", "system"])
    vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
    machine = boot_flat(vm, bytes.fromhex(code) + b"\xf4", CODE)
    machine.vcpu.registers.gpr[RDI] = DATA
    vm.memory.load(DATA, data or bytes(256))
    return machine.vcpu, vm, machine.vcpu.run(timeout=20)


def by_host(code: list[str], data: bytes) -> State:
    state = State()
    state.gpr[RDI] = NATIVE_DATA
    state.store(NATIVE_DATA, data)
    for insn in code:
        result = NativeCpu.shared().run(bytes.fromhex(insn), state)
        assert result.fault is None
        state = result.state
    return state


def random_data(rng: random.Random) -> bytes:
    """Three registers' worth of numbers at 0, 16 and 32, and noise."""
    data = bytearray(rng.randbytes(256))
    for at in (0, 16, 32):
        data[at : at + 10] = random_value(rng).to_bytes(10, "little")
    data[0x40:0x42] = (0x7F | rng.choice((0, 2, 3)) << 8 | rng.randrange(4) << 10).to_bytes(
        2, "little"
    )
    return bytes(data)


@needs_host
@pytest.mark.parametrize("seed", range(8))
def test_random_programs_leave_what_they_leave_on_the_host_cpu(seed: int) -> None:
    rng = random.Random(seed)
    code = ["dbe3", "d96f40", *rng.choices(SNIPPETS, k=150)]
    data = random_data(rng)
    want = by_host(code, data)
    vcpu, vm, left = run("nothing", "".join(code), data)
    with vm:
        assert isinstance(left, Hlt)
        read = vcpu.registers.bank.read
        got = State(
            st=[read(f"st{n}") for n in range(8)],
            fpcw=read("fpcw"), fpsw=read("fpsw"), fptag=read("fptag"),
        )  # fmt: skip
        assert [hex(a) for a in got.st] == [hex(a) for a in want.st]
        assert (hex(got.fpsw), hex(got.fpcw)) == (hex(want.fpsw), hex(want.fpcw))
        assert got.fptag == want.fptag
        assert vm.memory.read(DATA, 256) == want.load(NATIVE_DATA, 256)


def test_both_tiers_work_on_one_stack() -> None:
    """What is left of pi after so many quarters of it, and 1: two of nine steps are handled."""
    vcpu, vm, left = run("baseline", "dbe3 d9e8 d9e8 d9f3 d9eb d9f8 d9e8 dec1 db3f")
    with vm:
        assert isinstance(left, Hlt)
        assert vcpu.stats.by_mnemonic == {"hlt": 1, "fpatan": 1, "fprem": 1}
        assert vm.memory.read(DATA, 10) == bytes.fromhex("0000000000000080ff3f")
        read = vcpu.registers.bank.read
        assert (read("fpsw") >> 11 & 7, read("fptag"), read("st0")) == (7, 0x3FFF, QUARTER_PI)


def test_a_pending_exception_reaches_the_guest() -> None:
    """FLDCW unmasks the division by zero; the division itself does not fault, FLDZ does."""
    code = "dbe3 c7077b030000 d92f d9e8 d9ee def9 d9ee".replace(" ", "")
    vcpu, vm, left = run("nothing", code)
    with vm:
        assert isinstance(left, GuestException) and left.exception == 16
        assert vcpu.registers.rip == CODE + len(bytes.fromhex(code)) - 2
        assert vcpu.registers.bank.read("fpsw") & 0x8084 == 0x8084
        assert vcpu.registers.bank.read("fip") == CODE + len(bytes.fromhex(code)) - 4


def test_sse3_is_complete_with_this_pack() -> None:
    vm = Vm(Policy.load("baseline"), ["x87"])
    with vm:
        assert "SSE3" in features(vm.runs_form)


@pytest.mark.parametrize(("mode", "store"), [("real", "db3e0080"), ("protected", "db3d00800000")])
def test_other_modes_run_x87_code(mode: Mode, store: str) -> None:
    """FLD1, FLD1, FPATAN, and FSTP to memory by a 16- and a 32-bit address."""
    with Vm(Policy.load("nothing"), ["x87", "integer", "system"]) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        code = bytes.fromhex("dbe3d9e8d9e8d9f3" + store + "f4")
        vcpu = boot_flat(vm, code, CODE, mode).vcpu
        assert isinstance(vcpu.run(timeout=20), Hlt)
        assert vm.memory.read(DATA, 10) == QUARTER_PI.to_bytes(10, "little")


@pytest.mark.parametrize(
    ("compiler", "policy"),
    [("gcc", "baseline"), ("musl-gcc", "baseline"), ("musl-gcc", "nothing")],
)
def test_long_double_mathematics_print_what_they_print_natively(
    compiler: str, policy: str, tmp_path: Path
) -> None:
    """glibc computes much of it in integers and doubles, musl by the transcendental functions."""
    if not static_libc(compiler) or not native_levels():
        pytest.skip(f"needs {compiler} with a static libc on x86-64")
    program = build("longdouble", "x86-64", "O2", tmp_path, compiler)
    command = [sys.executable, "-m", "sandbox", "run", "--policy", policy, str(program)]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[1], timeout=100)
    assert (done.stdout, done.stderr) == (subprocess.check_output([program]), b"")
