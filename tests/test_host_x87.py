"""x87 instructions that Unicorn has wrong, on the host's own unit: nobody can tell."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sandbox.boot import Machine
from sandbox.engine.host_operands import host_features
from sandbox.engine.unicorn_x87 import x87_layout
from sandbox.native import DATA as NATIVE_DATA
from sandbox.native import State
from sandbox.policy import Policy
from sandbox.registers import CF, PF, RDI, ZF
from tests.guest import BASE, machine, run_to_hlt
from tests.test_x87_machine import SNIPPETS, by_host, random_data
from tests.x87_oracle import needs_host

pytestmark = pytest.mark.skipif(
    not host_features() >= {"avx", "avx2"}, reason="the host's CPU has no AVX2"
)
PACKS = ("x87", "avx2", "integer", "system")
DATA = 0x8000
ON_HOST = "ddd9 ddda dfd1 dfd9 ddd1 d9fd d9f4 d9f8 d9f5 d9eb d9ec db4f7c dd4f70 df4f68".split()
PROGRAM = [insn for insn in SNIPPETS if insn not in ("d9f6", "d9f7")] + 3 * ON_HOST
"""Without FDECSTP and FINCSTP, which leave condition codes undefined."""
PREPARE = "dbe3 d9e8 d9eb"
"""FNINIT, FLD1, FLDPI."""
MASKED, UNMASKED = "c7077f030000 d92f", "c7077b030000 d92f"
"""FLDCW with all exceptions masked, and but for division by zero."""


@contextmanager
def guest(code: str, data: bytes = b"", extra: str = "") -> Iterator[Machine]:
    """A guest with DATA in RDI, which has run; ``code`` in hex, ``extra``: of the policy."""
    policy = Policy.parse(f'extends = "verified"\n{extra}')
    raw = bytes.fromhex(code) + b"\xf4"
    with machine(raw, policy=policy, handlers=PACKS) as found:
        found.vcpu.registers.gpr[RDI] = DATA
        found.vm.memory.load(DATA, data or bytes(256))
        run_to_hlt(found)
        yield found


def lowered(found: Machine) -> set[str]:
    """Mnemonics of what the host does now."""
    return set(found.vm.engine.lowered()[0])


def handled(found: Machine) -> set[str]:
    return set(found.vcpu.stats.by_mnemonic) - {"hlt"}


def state(found: Machine) -> State:
    read = found.vcpu.registers.bank.read
    return State(
        st=[read(f"st{n}") for n in range(8)],
        fpcw=read("fpcw"), fpsw=read("fpsw"), fptag=read("fptag"),
    )  # fmt: skip


def test_unicorns_x87_unit_is_where_it_is_looked_for() -> None:
    assert x87_layout() is not None


@needs_host
@pytest.mark.parametrize("seed", range(12))
def test_random_programs_leave_what_they_leave_on_the_host_cpu(seed: int) -> None:
    """Empty registers, full stacks and numbers of all kinds among them."""
    rng = random.Random(seed)
    code = ["dbe3", "d96f40", *rng.choices(PROGRAM, k=150)]
    data = random_data(rng)
    want = by_host(code, data)
    with guest("".join(code), data, 'float_flags = "exact"') as found:
        got = state(found)
        assert [hex(a) for a in got.st] == [hex(a) for a in want.st]
        assert (hex(got.fpsw), hex(got.fpcw)) == (hex(want.fpsw), hex(want.fpcw))
        assert got.fptag == want.fptag
        assert found.vm.memory.read(DATA, 256) == want.load(NATIVE_DATA, 256)
        assert lowered(found) >= {"fldcw", "fstp"}


@pytest.mark.parametrize("insn", [*ON_HOST, "dbf1", "dff1", "dbe9", "dfe9", "d92f"])
def test_what_can_be_done_needs_no_handler(insn: str) -> None:
    touch = "89bf80000000"  # mov [rdi + 128], edi: the page is known then
    with guest(MASKED + PREPARE + "d9ee d9e8 d9eb" + touch + insn) as found:
        assert lowered(found) and not handled(found)


@pytest.mark.parametrize("insn", ["ddd9", "dff1", "d9fd", "d9f8", "dd4f70"])
def test_an_empty_register_is_for_the_handler(insn: str) -> None:
    with guest("dbe3" + insn) as found:
        assert len(handled(found)) == 1
        assert found.vcpu.registers.bank.read("fpsw") & 0x41 == 0x41


def test_a_full_stack_is_for_the_handler() -> None:
    with guest("dbe3" + "d9eb" * 9) as found:
        assert found.vcpu.stats.by_mnemonic == {"hlt": 1, "fldpi": 1}
        assert found.vcpu.registers.bank.read("fpsw") == 7 << 11 | 0x241


def test_a_control_word_that_unmasks_something_is_for_the_handler() -> None:
    with guest(PREPARE + UNMASKED + "ddd9" + MASKED + "ddd8") as found:
        assert found.vcpu.stats.by_mnemonic["fldcw"] == 2
        assert found.vcpu.stats.by_mnemonic["fstp"] == 1
        assert found.vcpu.registers.bank.read("fptag") == 0xFFFF


@pytest.mark.parametrize("control", [0x037F, 0x007F, 0x027F, 0x0C7F, 0x067F])
def test_the_fast_path_computes_under_a_control_word_that_the_host_loaded(control: int) -> None:
    """FLD1, FLDPI, FDIVP: to single and double precision, and rounded down and up."""
    load = "c707" + control.to_bytes(4, "little").hex() + "d92f"
    code = "dbe3" + load + "d9e8 d9eb def9"
    want = by_host(["dbe3", "d92f", "d9e8", "d9eb", "def9"], control.to_bytes(4, "little"))
    with guest(code) as found:
        assert found.vcpu.registers.bank.read("st0") == want.st[0]
        assert "fldcw" in lowered(found) and not handled(found)


@pytest.mark.parametrize(
    ("numbers", "flags"),
    [("d9e8 d9eb", 0), ("d9eb d9e8", CF), ("d9e8 d9e8", ZF), ("d9ee d9ee dcf9", ZF | PF | CF)],
)
@pytest.mark.parametrize("insn", ["dbf1", "dff1", "dbe9", "dfe9"])
def test_a_comparison_sets_three_flags_and_clears_three(
    insn: str, numbers: str, flags: int
) -> None:
    """MOV EAX, 80000000h; SUB EAX, 1: OF and AF; with SF by NEG before."""
    with guest("dbe3" + numbers + "b800000080 83e801" + insn) as found:
        assert found.vcpu.registers.rflags & 0x8D5 == flags
        assert lowered(found) and not handled(found)


@pytest.mark.parametrize("jump", ["7702", "7202", "7402", "7a02", "7802", "7002"])
def test_a_jump_behind_a_comparison_goes_where_the_handlers_send_it(jump: str) -> None:
    code = PREPARE + "dff1" + jump + "ffc0 ffc0"
    with guest(code) as found, guest(code, extra="lowering = false") as other:
        assert "fcomip" in handled(other) and not handled(found)
        assert found.vcpu.registers.gpr[0] == other.vcpu.registers.gpr[0]


def test_the_pointers_are_those_of_the_guest() -> None:
    """FIP is the instruction's address and FDP its operand's; FLDCW leaves both."""
    with guest(PREPARE + "89bf80000000 dd4f70" + MASKED) as found:
        read = found.vcpu.registers.bank.read
        assert "fisttp" in lowered(found)
        assert (read("fip"), read("fdp")) == (BASE + 12, DATA + 0x70)
        assert found.vm.memory.read(DATA + 0x70, 8) == (3).to_bytes(8, "little")


def test_the_policy_key_host_switches_it_off() -> None:
    with guest(PREPARE + "ddd9", extra="host = false") as found:
        assert handled(found) == {"fldpi", "fstp"}
