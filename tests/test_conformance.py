"""The differential harness finds what it must find, and nothing in what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from iced_x86 import Code

from sandbox.cases import Cases, float_type
from sandbox.conformance import check, defined_flags, not_comparable, sweep, table
from sandbox.cpu import Cpu
from sandbox.decode import Insn, decode
from sandbox.encodings import Evex, Memory, all_forms, encode, encodings, form, forms_of
from sandbox.handler import Handler, Verdict, handler
from sandbox.native import DATA, END, REGION, State
from sandbox.registers import AF, CF, OF, PF, SF, ZF
from tests.differential import HandlerSubject, native_reason, resolve

native = pytest.mark.skipif(bool(native_reason()), reason=native_reason())
VPADDD = decode(bytes.fromhex("c5edfe08"), 64)  # vpaddd ymm1, ymm2, [rax]


def vpaddd(mistake: str) -> Handler:
    """``vpaddd ymm1, ymm2, [rax]``, right but for one mistake."""

    @handler("vpaddd")
    def run(cpu: Cpu, insn: Insn) -> Verdict | None:
        if mistake == "clears first":
            cpu.vec.write(1, bytes(64))
        size = 16 if mistake == "reads too little" else 32
        b = cpu.read(cpu.address(insn), size).ljust(32, b"\0")
        total = np.frombuffer(cpu.vec.read(2, 32), "u4") + np.frombuffer(b, "u4")
        data = total.astype("u4").tobytes()
        cpu.vec.write(1, data if mistake == "keeps the upper lanes" else data.ljust(64, b"\0"))
        if mistake == "touches a flag":
            cpu.rflags ^= CF
        if mistake == "touches MXCSR":
            cpu.mxcsr ^= 1
        if mistake == "touches another register":
            cpu.gpr[7] ^= 1
        if mistake == "writes memory":
            cpu.write(DATA, b"mistake")
        return None

    run.restartable = True
    return run


def verdict_on(mistake: str) -> tuple[int, str]:
    subject = HandlerSubject(vpaddd(mistake))
    verdict = check(subject, VPADDD, Cases(VPADDD).take(200))
    return verdict.differences, verdict.first


@native
def test_a_right_handler_passes() -> None:
    assert verdict_on("none") == (0, "")


@native
@pytest.mark.parametrize(
    ("mistake", "what"),
    [
        ("keeps the upper lanes", "zmm1 byte"),
        ("reads too little", "zmm1 byte"),
        ("touches a flag", "CF:"),
        ("touches MXCSR", "mxcsr:"),
        ("touches another register", "rdi:"),
        ("writes memory", f"memory {DATA:#x}"),
    ],
)
def test_a_mistake_is_found_and_named(mistake: str, what: str) -> None:
    count, first = verdict_on(mistake)
    assert count > 100
    assert first.startswith(what)
    assert "vpaddd ymm1, ymm2, ymmword ptr [rax]" in first


@native
def test_a_write_before_a_fault_is_found() -> None:
    count, first = verdict_on("clears first")
    assert count > 0
    assert first.startswith("zmm1 byte")


@native
def test_a_missing_fault_and_a_needless_one_are_found() -> None:
    @handler("movaps")
    def careless(cpu: Cpu, insn: Insn) -> None:
        cpu.vec.write(1, cpu.read(cpu.address(insn), 16))

    insn = decode(bytes.fromhex("0f2808"), 64)  # movaps xmm1, [rax]
    state = State()
    state.gpr[0] = DATA + 8
    verdict = check(HandlerSubject(careless), insn, [state])
    assert "native Trap(vector=13" in verdict.first
    state.gpr[0] = DATA

    @handler("movaps")
    def strict(cpu: Cpu, insn: Insn) -> None:
        cpu.read(END, 1)

    verdict = check(HandlerSubject(strict), insn, [state])
    assert verdict.first.startswith("fault: native None")


@native
def test_an_error_in_the_handler_is_a_difference() -> None:
    @handler("vpaddd")
    def broken(cpu: Cpu, insn: Insn) -> None:
        raise KeyError("oops")

    verdict = check(HandlerSubject(broken), VPADDD, [State()])
    assert "KeyError" in verdict.first


@native
def test_a_sweep_tells_declined_and_unjudged_forms() -> None:
    subject = HandlerSubject(vpaddd("none"))
    verdicts = list(sweep(subject, [form("VEX_VPADDD_YMM_YMM_YMMM256"), form("RDTSC")], cases=1))
    assert (
        verdicts[0].differences == verdicts[0].cases - verdicts[0].cases + verdicts[0].differences
    )
    lines = list(table(verdicts))
    assert lines[0].startswith("VEX_VPADDD_YMM_YMM_YMMM256")
    assert "host's own" in lines[1]


def test_handlers_are_asked_form_first_then_mnemonic_then_pattern() -> None:
    def named(name: str, **how: str) -> Handler:
        @handler(*how.pop("mnemonics", "").split(), **how)
        def run(cpu: Cpu, insn: Insn) -> None: ...

        run.name = name
        return run

    handlers = [
        named("pattern", pattern="c5 ed fe 08"),
        named("mnemonic", mnemonics="vpaddd"),
        named("form", form="VEX_VPADDD_YMM_YMM_YMMM256"),
    ]
    cpu = HandlerSubject(handlers).cpu
    for expected in ("form", "mnemonic", "pattern"):
        found = resolve(handlers, cpu, VPADDD)
        assert found is not None and found[0].name == expected
        handlers.remove(found[0])
    assert resolve(handlers, cpu, VPADDD) is None


@pytest.mark.parametrize(
    ("name", "judged"),
    [
        ("VEX_VRCPPS_YMM_YMMM256", False),
        ("RSQRTSS_XMM_XMMM32", False),
        ("CPUID", False),
        ("VEX_VSQRTPS_YMM_YMMM256", True),
        ("EVEX_VRCP14PS_ZMM_K1Z_ZMMM512B32", True),
        ("ADD_RM32_R32", True),
    ],
)
def test_what_no_host_cpu_can_judge_is_left_out_with_a_reason(name: str, judged: bool) -> None:
    assert form(name)
    assert (not_comparable(name) is None) == judged


def test_undefined_flags_are_not_compared() -> None:
    assert not defined_flags(decode(bytes.fromhex("48d3e0"), 64)) & AF  # shl rax, cl
    assert defined_flags(decode(bytes.fromhex("4801d8"), 64)) & (CF | PF | AF | ZF | SF | OF) == (
        CF | PF | AF | ZF | SF | OF
    )


@pytest.mark.parametrize(
    ("code", "how", "expected"),
    [
        (Code.VEX_VPADDD_YMM_YMM_YMMM256, {}, "c5edfecb"),
        (Code.VEX_VPADDD_YMM_YMM_YMMM256, {"memory": Memory(0)}, "c5edfe08"),
        (Code.ADD_RM64_IMM8, {"registers": (0,), "immediate": 0xFF}, "4883c0ff"),
        (Code.VEX_VPSHUFD_XMM_XMMM128_IMM8, {"immediate": 0x1B}, "c5f970ca1b"),
        (Code.MOV_R64_IMM64, {"immediate": 0x0102030405060708}, "48b90807060504030201"),
        (
            Code.EVEX_VADDPS_ZMM_K1Z_ZMM_ZMMM512B32_ER,
            {"memory": Memory(0, displacement=0x40), "evex": Evex(1, True, True)},
            "62f16cd9584810",
        ),
        (
            Code.VEX_VGATHERDPS_XMM_VM32X_XMM,
            {"registers": (1, 3), "memory": Memory(0, 2, 4)},
            "c4e261920c90",
        ),
    ],
)
def test_encode_gives_the_manuals_bytes(code: int, how: dict[str, object], expected: str) -> None:
    assert encode(code, **how).hex() == expected  # type: ignore[arg-type]


def test_every_encoding_of_every_form_decodes_to_that_form() -> None:
    for code in all_forms()[::40]:
        try:
            found = list(encodings(code))
        except ValueError as error:  # branches
            assert "not supported" in str(error) or "OpKind" in str(error)
            continue
        assert all(insn.code == code for insn in found)


def test_encodings_alias_registers_and_use_every_immediate() -> None:
    found = {insn.text() for insn in encodings(form("VEX_VPADDD_XMM_XMM_XMMM128"))}
    assert {"vpaddd xmm1, xmm2, xmm3", "vpaddd xmm1, xmm1, xmm1"} <= found
    assert any("[" in text for text in found) and any("xmm15" in text for text in found)
    shuffles = encodings(form("VEX_VPSHUFD_XMM_XMMM128_IMM8"), immediates=range(256))
    assert {insn.iced.immediate8 for insn in shuffles} == set(range(256))


def test_a_misspelt_name_is_told() -> None:
    with pytest.raises(ValueError, match="no 64-bit form of vpaddx"):
        forms_of("vpaddd", "vpaddx")
    with pytest.raises(ValueError, match="no instruction form is called"):
        form("VPADDX")


def test_the_same_seed_gives_the_same_states() -> None:
    assert Cases(VPADDD, seed=3).take(5) == Cases(VPADDD, seed=3).take(5)
    assert Cases(VPADDD, seed=3).take(5) != Cases(VPADDD, seed=4).take(5)


def test_without_faults_operands_lie_in_writable_memory() -> None:
    for state in Cases(VPADDD, faults=False).take(300):
        assert DATA <= state.gpr[0] <= END - 32
    assert any(not REGION <= s.gpr[0] <= END - 32 for s in Cases(VPADDD).take(300))


@pytest.mark.parametrize(
    ("text", "lane"),
    [("c5ec58cb", "f4"), ("c5eb58cb", "f8"), ("c5edfecb", None), ("c4e2759800", "f4")],
)
def test_float_instructions_are_told_by_name(text: str, lane: str | None) -> None:
    assert float_type(decode(bytes.fromhex(text), 64)) == lane


def test_float_cases_hold_the_special_values() -> None:
    insn = decode(bytes.fromhex("c5ed58cb"), 64)  # vaddpd ymm1, ymm2, ymm3
    lanes = np.concatenate([np.frombuffer(s.vectors, "f8") for s in Cases(insn).take(50)])
    raw = lanes.view("u8")
    tests: list[Callable[[], Any]] = [
        lambda: np.isinf(lanes),
        lambda: raw == 1 << 63,
        lambda: raw == 0,
        lambda: (raw << np.uint64(1) >> np.uint64(53) == 0) & (raw << np.uint64(1) != 0),
        lambda: np.isnan(lanes) & (raw >> np.uint64(51) & np.uint64(1) == 0),
        lambda: np.isnan(lanes) & (raw >> np.uint64(51) & np.uint64(1) == 1),
    ]
    assert all(np.any(test()) for test in tests)
