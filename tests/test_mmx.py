"""MMX registers: every form against the host, with what it does to the x87 state."""

from __future__ import annotations

import pytest

from handlers import mmx
from sandbox.cpu import MF, NM, UD, Cpu, Fault
from sandbox.decode import decode
from sandbox.encodings import all_forms, features_of, kinds_of, mnemonic_of
from sandbox.registers import RCX, RDI, RDX, RSI, RSP
from tests.differential import X87Bank, sweep
from tests.doubles import make_cpu
from tests.guest import machine, run_to_hlt
from tests.vector_forms import handlers_of

HANDLERS = handlers_of(mmx)


def mmx_forms() -> list[int]:
    """All forms with an MMX register, and EMMS, that are not 3DNow!."""
    return [
        code
        for code in all_forms()
        if (any(kind.startswith("MM_") for kind in kinds_of(code)) or mnemonic_of(code) == "emms")
        and not any(feature.startswith("D3NOW") for feature in features_of(code))
    ]


def test_all_forms_do_what_the_host_cpu_does() -> None:
    forms = mmx_forms()
    assert len(forms) > 100
    sweep(HANDLERS, forms=forms, cases=3)


def run(code: str, *, cr0: int = 0x80000033, **registers: int) -> Cpu:
    """One instruction with TOP = 5 and all x87 registers empty."""
    cpu = make_cpu()
    cpu.registers.bank = bank = X87Bank()
    bank.values |= {"cr0": cr0, "fpsw": 5 << 11, **registers}
    for number in range(8):
        bank.physical[number] = 0x1234 << 64 | 0x0706050403020100 + 0x1010101010101010 * number
    insn = decode(bytes.fromhex(code), 64)
    action = next(a for h in HANDLERS if insn.mnemonic in h.mnemonics if (a := h.bind(cpu, insn)))
    action()
    return cpu


def test_a_result_fills_the_x87_register_and_all_of_them_become_valid() -> None:
    cpu = run("0ffcd1")  # paddb mm2, mm1
    bank = cpu.registers.bank
    assert isinstance(bank, X87Bank)
    assert bank.physical[2] == 0xFFFF << 64 | 0x3E3C3A3836343230
    assert bank.physical[1] == 0x1234 << 64 | 0x1716151413121110
    assert bank.read("fptag") == 0 and bank.read("fpsw") == 0


def test_emms_empties_the_registers() -> None:
    bank = run("0f77").registers.bank
    assert (bank.read("fptag"), bank.read("fpsw")) == (0xFFFF, 0)


@pytest.mark.parametrize("code", ["0ffcd1", "0f77", "0f6f10", "0fe710", "0ff7d1", "660f2cca"])
def test_faults_of_the_x87_unit_come_first(code: str) -> None:
    """Also before those of the memory operand: RAX and RDI are 0."""
    for cr0, fpsw, vector in (
        (0x80000037, 0, UD), (0x8000003B, 0, NM), (0x80000033, 0x8081, MF), (0x8000003F, 0, UD),
    ):  # fmt: skip
        with pytest.raises(Fault) as caught:
            run(code, cr0=cr0, fpsw=fpsw)
        assert caught.value.vector == vector


def test_forms_without_a_vector_register_do_not_ask_for_sse() -> None:
    assert run("0ffcd1", cr4=0)
    with pytest.raises(Fault) as caught:
        run("660f2cca", cr4=0)  # cvttpd2pi mm1, xmm2
    assert caught.value.vector == UD


ALIASES = """
    fldpi                       # TOP = 7
    movabs rbx, 0x8090a0b0c0d0e0f0
    movq mm0, rbx               # the fast path's
    movabs rbx, 0x0001020304050607
    movq mm1, rbx
    pshufb mm0, mm1             # the handlers'
    movq rcx, mm0
    pabsb mm2, mm0
    paddb mm2, mm1
    movq rdx, mm2
    fnstenv [rsp-64]
    movzx esi, word ptr [rsp-56]
    fnstsw ax
    movzx edi, ax
    emms
    fld1
    fnstsw ax
    movzx r8d, ax
    hlt
"""


def test_handlers_and_fast_path_share_the_registers() -> None:
    with machine(ALIASES, handlers=["mmx"]) as found:
        found.vcpu.cpu.gpr[RSP] = 0x8000
        run_to_hlt(found)
        gpr = found.vcpu.cpu.gpr
        reverse = 0xF0E0D0C0B0A09080
        assert gpr[RCX] == reverse
        absolute = [abs(b - 256) for b in reverse.to_bytes(8, "little")]
        added = [(a + 7 - i) & 0xFF for i, a in enumerate(absolute)]
        assert gpr[RDX].to_bytes(8, "little") == bytes(added)
        assert gpr[RDI] >> 11 & 7 == 0
        assert all(gpr[RSI] >> 2 * n & 3 != 3 for n in range(8)), "no register is empty"
        assert gpr[8] >> 11 & 7 == 7 and gpr[8] & 0x41 == 0, "pushed without a stack fault"
