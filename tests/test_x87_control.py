"""x87 control instructions against the host CPU; what is pending, and when it is reported."""

from __future__ import annotations

import pytest

from handlers import x87_control, x87_pack
from sandbox.cpu import MF, NM, UD
from sandbox.decode import decode
from sandbox.native import DATA, State
from sandbox.registers import RDI
from tests.differential import HandlerSubject
from tests.x87_oracle import NEGATIVE, ONE, assert_same, needs_host

FORMS = {
    "fninit": "dbe3", "fnclex": "dbe2", "fnstcw": "d97f10", "fldcw": "d96f10",
    "fnstsw ax": "dfe0", "fnstsw m16": "dd7f10", "fnop": "d9d0", "fneni": "dbe0",
    "fndisi": "dbe1", "fnsetpm": "dbe4", "wait": "9b", "emms": "0f77",
}  # fmt: skip
IMAGES = {
    "fnstenv": "d97710", "fnstenv m14": "66d97710", "fnsave": "dd7710", "fnsave m94": "66dd7710",
    "fldenv": "d96710", "fldenv m14": "66d96710", "frstor": "dd6710", "frstor m94": "66dd6710",
}  # fmt: skip


@needs_host
@pytest.mark.parametrize("code", FORMS.values(), ids=FORMS)
def test_control_instructions_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, x87_control.HANDLERS, 200)


@needs_host
@pytest.mark.parametrize("code", IMAGES.values(), ids=IMAGES)
def test_images_are_those_of_the_host_cpu(code: str) -> None:
    """The pointers are zero on both sides, so all bytes can be compared."""
    assert_same(code, x87_control.HANDLERS, 200)


def subject_with(**registers: int) -> HandlerSubject:
    subject = HandlerSubject(x87_pack.PACK)
    subject.bank.values.update(registers)
    return subject


def vector(subject: HandlerSubject, code: str, state: State | None = None) -> int | None:
    fault = subject.run(decode(bytes.fromhex(code), 64), state or State()).fault
    return None if fault is None else fault.vector


@pytest.mark.parametrize(
    ("cr0", "code", "expected"),
    [
        (0x80000035, "d9e8", NM),  # EM
        (0x80000039, "d9e8", NM),  # TS
        (0x80000039, "dbe3", NM),
        (0x80000039, "9b", None),  # WAIT minds TS only with MP
        (0x8000003B, "9b", NM),
        (0x80000035, "9b", None),
        (0x80000035, "0f77", UD),
        (0x80000039, "0f77", NM),
    ],
)
def test_a_unit_that_is_off(cr0: int, code: str, expected: int | None) -> None:
    assert vector(subject_with(cr0=cr0), code) == expected


def test_a_pending_exception_is_reported_by_the_next_waiting_instruction() -> None:
    subject, root = subject_with(), decode(bytes.fromhex("d9fa"), 64)
    state = State(fptag=0xFFFC, fpcw=0x37E, fpsw=0)
    state.st[0] = ONE | NEGATIVE
    after = subject.run(root, state)
    assert after.fault is None
    assert (after.state.fpsw, after.state.st[0]) == (0x8081, ONE | NEGATIVE)
    for code in ("9b", "d9fa", "d9e8", "d9d0", "d93f"):
        after.state.gpr[RDI] = DATA
        assert vector(subject, code, after.state) == (None if code == "d93f" else MF)
    values = subject.bank.values
    assert (values["fop"], values["fip"]) == (0x1FA, subject.cpu.rip)


def test_data_instructions_leave_their_address_for_fnstenv() -> None:
    subject = subject_with(fip=1, fdp=2)
    state = State()
    state.gpr[RDI] = DATA
    subject.run(decode(bytes.fromhex("d94708"), 64), state)
    values = subject.bank.values
    assert (values["fip"], values["fdp"]) == (subject.cpu.rip, DATA + 8)
    for code in ("d9d0", "d93f", "d92f", "9b"):
        values.update(fip=1, fdp=2)
        subject.run(decode(bytes.fromhex(code), 64), state)
        assert (values["fip"], values["fdp"]) == (1, 2)


def test_without_numeric_errors_a_pending_exception_is_ignored() -> None:
    state = State(fpcw=0x37E, fpsw=0x8081)
    assert vector(subject_with(cr0=0x80000013), "d9e8", state) is None


def environment(code: str, cr0: int) -> str:
    subject = subject_with(cr0=cr0, fip=0x12345678, fdp=0x9ABCDEF0, fop=0x123)
    state = State()
    state.gpr[RDI] = DATA
    after = subject.run(decode(bytes.fromhex(code), 64), state).state
    return after.load(DATA, 28).hex(" ", 4 if code == "d937" else 2)


def test_pointers_in_the_four_images() -> None:
    """SDM Vol. 1, figures 8-9 to 8-12."""
    assert environment("d937", 0x33).split()[3:] == "78563412 00002301 f0debc9a 0000ffff".split()
    assert environment("d937", 0x32).split()[3:] == "7856ffff 23412301 f0deffff 00c0ab09".split()
    assert environment("66d937", 0x33).split()[3:7] == "7856 0000 f0de 0000".split()
    assert environment("66d937", 0x32).split()[3:7] == "7856 2341 f0de 00c0".split()


@pytest.mark.parametrize("cr0", [0x32, 0x33], ids=["real", "protected"])
def test_the_pointers_come_back(cr0: int) -> None:
    subject = subject_with(cr0=cr0, fip=0x12345678, fdp=0x9ABCDEF0, fop=0x123)
    state = State(fpcw=0x27F, fpsw=0x3800, fptag=0x1234)
    state.gpr[RDI] = DATA
    stored = subject.run(decode(bytes.fromhex("d937"), 64), state).state
    reset = subject.run(decode(bytes.fromhex("dbe3"), 64), stored).state
    assert subject.bank.values["fip"] == 0
    loaded = subject.run(decode(bytes.fromhex("d927"), 64), reset).state
    values = subject.bank.values
    assert (values["fip"], values["fdp"], values["fop"]) == (0x12345678, 0x9ABCDEF0, 0x123)
    assert (loaded.fpcw, loaded.fpsw) == (0x27F, 0x3800)
