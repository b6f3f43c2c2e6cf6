"""The fast path and the handlers on a real machine, as the conformance command compares them."""

from __future__ import annotations

import pytest

from sandbox.cases import Cases
from sandbox.conformance import check
from sandbox.cpu import GP, PF_, SS_
from sandbox.decode import decode
from sandbox.gaps import reconcile
from sandbox.golden import make_record, read_record, reduced
from sandbox.native import DATA, END, NativeCpu, State
from sandbox.registers import RBP, RSI, RSP
from sandbox.subjects import FastPath, HandlerTier, Stage
from tests.differential import native_reason

native = pytest.mark.skipif(bool(native_reason()), reason=native_reason())
LAZY = (0x1F80, 0x3F80, 0x5F80, 0x7F80)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(("integer", "avx2", "mmx", "x87"))


@native
@pytest.mark.parametrize("code", ["0106", "660ffe06", "0f580e", "480fafca", "f30f7e06", "f20f5106"])
def test_the_fast_path_does_what_hardware_does_but_for_the_gaps(stage: Stage, code: str) -> None:
    insn = decode(bytes.fromhex(code), 64)
    verdict = check(FastPath(stage), insn, Cases(insn, mxcsr=LAZY).take(200), reconcile=reconcile)
    assert (verdict.cases, verdict.differences, verdict.first) == (200, 0, "")


@native
@pytest.mark.parametrize("code", ["0106", "c5f5fe06", "c5f45806", "480fafca", "0ffeca", "d8c1"])
def test_handlers_do_what_hardware_does_on_the_real_register_file(stage: Stage, code: str) -> None:
    insn = decode(bytes.fromhex(code), 64)
    verdict = check(HandlerTier(stage), insn, Cases(insn).take(200))
    assert (verdict.cases, verdict.differences, verdict.first) == (200, 0, "")


@native
def test_a_form_that_unicorn_breaks_is_found(stage: Stage) -> None:
    insn = decode(bytes.fromhex("660f3800ca"), 64)  # pshufb xmm1, xmm2: bits above 128 are spoilt
    assert check(FastPath(stage), insn, Cases(insn).take(40), reconcile=reconcile).differences


def test_a_form_that_is_not_allowed_does_not_run(stage: Stage) -> None:
    fast = FastPath(stage)
    fast.run(decode(b"\x90", 64), State())
    outcome = fast.run(decode(bytes.fromhex("c5e9feca"), 64), State())  # to Unicorn it is paddd
    assert outcome.fault is None  # the form itself is what is allowed
    traps = bytes([1]) * len(stage.vm.settings.intercepted)
    stage.engine.set_traps(traps)
    assert fast.run(decode(bytes.fromhex("c5e9feca"), 64), State()).fault is not None


def test_a_read_modify_write_that_faults_is_a_write(stage: Stage) -> None:
    state = State()
    state.gpr[RSI] = END
    fault = FastPath(stage).run(decode(bytes.fromhex("0106"), 64), state).fault
    assert fault is not None and (fault.vector, fault.error_code, fault.address) == (PF_, 6, END)
    fault = FastPath(stage).run(decode(bytes.fromhex("0306"), 64), state).fault
    assert fault is not None and (fault.vector, fault.error_code) == (PF_, 4)


@pytest.mark.parametrize(
    ("code", "top", "vector"),
    [
        pytest.param("50", 1 << 62, SS_, id="push"),
        pytest.param("58", 1 << 62, SS_, id="pop"),
        pytest.param("c9", DATA + 0x800, SS_, id="leave"),
        pytest.param("8b0424", 1 << 62, SS_, id="mov eax,[rsp]"),
        pytest.param("8b06", 1 << 62, GP, id="mov eax,[rsi]"),
        pytest.param("ff36", DATA + 0x800, GP, id="push [rsi]"),
        pytest.param("ff36", 1 << 62, GP, id="push [rsi], both beyond: reads first"),
        pytest.param("8f06", 1 << 62, SS_, id="pop [rsi], both beyond"),
    ],
)
def test_beyond_canonical_addresses_the_stack_has_its_own_fault(
    stage: Stage, code: str, top: int, vector: int
) -> None:
    state = State()
    state.gpr[RSI] = state.gpr[RBP] = 1 << 62
    state.gpr[RSP] = top
    insn = decode(bytes.fromhex(code), 64)
    fault = FastPath(stage).run(insn, state).fault
    assert fault is not None and (fault.vector, fault.error_code) == (vector, 0)
    if native_reason() is None:
        trap = NativeCpu.shared().run(insn.raw, state).fault
        assert trap is not None and trap.vector == vector


@native
@pytest.mark.parametrize("code", ["0106", "660ffe0e", "d9c2", "c4e27d1806", "8b06"])
def test_a_golden_record_holds_all_that_an_instruction_sees_and_does(code: str) -> None:
    insn = decode(bytes.fromhex(code), 64)
    cpu = NativeCpu.shared()
    for state in Cases(insn).take(30):
        before = reduced(insn, state)
        result = cpu.run(insn.raw, before)
        again, start, answer = read_record(make_record(insn, before, result))
        assert again.raw == insn.raw
        assert start == before
        assert answer.state == result.state
        if result.fault:
            assert answer.fault is not None
            assert answer.fault.vector == result.fault.vector
