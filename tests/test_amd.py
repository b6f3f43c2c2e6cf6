"""SSE4a against the host; FMA4 against the FMA3 handlers, TBM against bit strings."""

from __future__ import annotations

import random

import pytest

from handlers import float_fma, sse4a
from sandbox.cases import Cases
from sandbox.decode import FORM_NAMES, decode
from sandbox.encodings import Memory, all_forms, encode, features_of, form
from sandbox.registers import CF, OF, SF, ZF
from tests.amd_forms import HANDLERS
from tests.differential import sweep
from tests.vector_forms import DATA, execute, forms_of_handlers, handlers_of, small_cpu, unhandled


def test_sse4a_does_what_the_host_cpu_does() -> None:
    handlers = handlers_of(sse4a)
    sweep(handlers, forms=forms_of_handlers(handlers), cases=8)


def test_every_form_is_handled() -> None:
    wanted = {"XOP", "FMA4", "TBM", "SSE4A", "D3NOW", "D3NOWEXT"}
    forms = [c for c in all_forms() if features_of(c) & wanted and FORM_NAMES[c] != "FEMMS"]
    bextr = {form("XOP_BEXTR_R32_RM32_IMM32"), form("XOP_BEXTR_R64_RM64_IMM32")}
    assert len(forms) > 190
    assert unhandled(HANDLERS, [c for c in forms if c not in bextr]) == []


# FMA4


@pytest.mark.parametrize("suffix", ["PS", "PD", "SS", "SD"])
def test_fma4_is_fma3_with_a_destination_of_its_own(suffix: str) -> None:
    """``d = a * b + c`` is VFMADD132 of a, c, b, NaNs and exceptions alike."""
    names = ["VFMADD", "VFMSUB", "VFNMADD", "VFNMSUB"]
    names += ["VFMADDSUB", "VFMSUBADD"] if suffix[0] == "P" else []
    element = {"S": 32, "D": 64}[suffix[1]]
    memory = 256 if suffix[0] == "P" else element
    y = "Y" if suffix[0] == "P" else "X"
    written = memory // 8
    handlers = handlers_of(float_fma)
    for name in names:
        three = form(f"VEX_{name}132{suffix}_{y}MM_{y}MM_{y}MMM{memory}")
        states = Cases(decode(encode(three, (1, 2, 3)), 64), 3, True).take(25)
        for state in states:
            vectors = {f"v{n}": state.vector(n)[:32] for n in (1, 2, 3)}
            older = small_cpu(**vectors)
            a, c, b = (1, 2, 3)
            newer = small_cpu(**vectors)
            for cpu in (older, newer):
                cpu.mxcsr = state.mxcsr | 0x1F80
            execute(handlers, older, encode(three, (a, c, b)).hex())
            for order in ("XMM_XMM_XMMM_XMM", "XMM_XMM_XMM_XMMM"):
                four = order.replace("XMMM", f"{y}MMM{memory}").replace("XMM", f"{y}MM")
                code = encode(form(f"VEX_{name}{suffix}_{four}"), (5, a, b, c))
                execute(HANDLERS, newer, code.hex())
                got = newer.vec.read(5)
                assert got[:written] == older.vec.read(1)[:written]
                assert not any(got[written:])
                assert newer.mxcsr == older.mxcsr


# TBM


def trailing(bits: str, digit: str) -> tuple[str, str, str]:
    """What stands above the first other digit, that digit, and the run of ``digit`` at the end."""
    kept = bits.rstrip(digit)
    return kept[:-1], kept[-1:], bits[len(kept) :]


def tbm(name: str, bits: str) -> tuple[str, bool]:
    """The manual's words on a string of binary digits; and whether CF is set."""
    ones, zeros = trailing(bits, "1"), trailing(bits, "0")
    width, n, z = len(bits), len(ones[2]), len(zeros[2])
    all_ones, all_zeros = "0" not in bits, "1" not in bits
    match name:
        case "BLCFILL":
            return bits[: width - n] + "0" * n, all_ones
        case "BLCS":
            return ones[0] + "1" * (n + (not all_ones)), all_ones
        case "BLCIC":
            return "0" * len(ones[0]) + ("" if all_ones else "1") + "0" * n, all_ones
        case "BLCI":
            return "1" * len(ones[0]) + ("" if all_ones else "0") + "1" * n, all_ones
        case "BLCMSK":
            return "0" * len(ones[0]) + "1" * (n + (not all_ones)), all_ones
        case "T1MSKC":
            return "1" * (width - n) + "0" * n, all_ones
        case "BLSFILL":
            return bits[: width - z] + "1" * z, all_zeros
        case "BLSIC":
            return "1" * len(zeros[0]) + ("" if all_zeros else "0") + "1" * z, all_zeros
        case _:  # TZMSK
            return "0" * (width - z) + "1" * z, all_zeros


TBM = ["BLCFILL", "BLCS", "BLCIC", "BLCI", "BLCMSK", "T1MSKC", "BLSFILL", "BLSIC", "TZMSK"]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", TBM)
def test_tbm(name: str, bits: int) -> None:
    source, mask = random.Random(name), (1 << bits) - 1
    values = [0, 1, mask, mask >> 1, 1 << bits - 1, mask - 1, 0x17, 0x58]
    values += [source.getrandbits(bits) | (1 << source.randrange(bits)) - 1 for _ in range(20)]
    values += [source.getrandbits(bits) << source.randrange(bits) & mask for _ in range(20)]
    code = encode(form(f"XOP_{name}_R{bits}_RM{bits}"), (1, 2))
    loading = encode(form(f"XOP_{name}_R{bits}_RM{bits}"), (1,), Memory(0))
    for value in values:
        text, carry = tbm(name, f"{value:0{bits}b}")
        want = int(text, 2)
        for raw in (code, loading):
            cpu = small_cpu()
            cpu.gpr[1], cpu.gpr[2] = -1 & (1 << 64) - 1, value
            cpu.write_int(DATA, value, bits // 8)
            cpu.rflags = 0x202 | OF
            execute(HANDLERS, cpu, raw.hex())
            assert cpu.gpr[1] == want, (name, hex(value))
            flags = (CF if carry else 0) | (0 if want else ZF)
            flags |= SF if want >> bits - 1 else 0
            assert cpu.rflags == 0x202 | flags
