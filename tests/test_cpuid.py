"""CPUID: the derived feature rule, and answers that are consistent and as the SDM lays them out."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from iced_x86 import Code, Instruction, OpCodeInfo

from sandbox.cpuid import (
    CANDIDATES,
    EXEMPT_FORMS,
    FEATURE_BITS,
    CpuidModel,
    features,
    missing,
)
from sandbox.decode import FEATURE_NAMES
from sandbox.host_cpuid import BASELINE
from sandbox.native import NativeCpu
from tests.doubles import make_cpu

V3 = """SSE3 SSSE3 SSE4_1 SSE4_2 POPCNT CMPXCHG16B MOVBE LZCNT BMI1 BMI2 XSAVE XSAVEC AVX AVX2 FMA
    F16C""".split()
EVERYTHING = features(lambda _code: True)

# Linux's name for each bit, from SDM table 3-10 and on, by way of the kernel's documentation.
LINUX_FLAGS = {
    "SSE3": "pni", "PCLMULQDQ": "pclmulqdq", "SSSE3": "ssse3", "FMA": "fma", "CMPXCHG16B": "cx16",
    "SSE4_1": "sse4_1", "SSE4_2": "sse4_2", "MOVBE": "movbe", "POPCNT": "popcnt", "AES": "aes",
    "XSAVE": "xsave", "AVX": "avx", "F16C": "f16c", "RDRAND": "rdrand", "FSGSBASE": "fsgsbase",
    "BMI1": "bmi1", "AVX2": "avx2", "BMI2": "bmi2", "AVX512F": "avx512f", "AVX512DQ": "avx512dq",
    "RDSEED": "rdseed", "ADX": "adx", "AVX512_IFMA": "avx512ifma", "CLFLUSHOPT": "clflushopt",
    "CLWB": "clwb", "AVX512CD": "avx512cd", "SHA": "sha_ni", "AVX512BW": "avx512bw",
    "AVX512VL": "avx512vl", "AVX512_VBMI": "avx512vbmi", "AVX512_VBMI2": "avx512_vbmi2",
    "GFNI": "gfni", "VAES": "vaes", "VPCLMULQDQ": "vpclmulqdq", "AVX512_VNNI": "avx512_vnni",
    "AVX512_BITALG": "avx512_bitalg", "AVX512_VPOPCNTDQ": "avx512_vpopcntdq", "PKU": "pku",
    "AVX512_BF16": "avx512_bf16", "AVX_VNNI": "avx_vnni", "XSAVEOPT": "xsaveopt",
    "XSAVEC": "xsavec", "LZCNT": "abm", "SSE4A": "sse4a", "PREFETCHW": "3dnowprefetch",
    "RDTSCP": "rdtscp", "RDPID": "rdpid", "SYSCALL": "syscall", "FXSR": "fxsr", "CX8": "cx8",
    "CLFSH": "clflush", "MMX": "mmx", "SEP": "sep", "CMOV": "cmov", "TSC": "tsc", "FPU": "fpu",
    "CLZERO": "clzero", "SERIALIZE": "serialize", "MOVDIRI": "movdiri", "MOVDIR64B": "movdir64b",
    "WAITPKG": "waitpkg", "AVX512_FP16": "avx512_fp16", "XOP": "xop", "FMA4": "fma4", "TBM": "tbm",
}  # fmt: skip


def forms_of(needed: frozenset[str]) -> list[int]:
    """Codes valid in 64-bit mode that need nothing but ``needed``, from the decoder alone."""
    found = []
    instruction = Instruction()
    codes: dict[str, Any] = {n: v for n, v in vars(Code).items() if isinstance(v, int)}
    for name, code in codes.items():
        if name not in EXEMPT_FORMS and OpCodeInfo(code).mode64:
            instruction.code = code
            wants = {FEATURE_NAMES[f] for f in instruction.cpuid_features()}
            if wants <= needed and wants & set(CANDIDATES):
                found.append(code)
    return found


# The rule


def test_everything_handled_lights_all_candidates() -> None:
    assert frozenset(CANDIDATES) | BASELINE == EVERYTHING


def test_nothing_handled_leaves_the_baseline() -> None:
    assert features(lambda _code: False) == BASELINE


def without(*names: str) -> frozenset[str]:
    codes = {getattr(Code, name) for name in names}
    return features(lambda code: code not in codes)


def test_one_missing_form_darkens_its_feature_and_what_builds_on_it() -> None:
    lit = without("VEX_VPADDD_YMM_YMM_YMMM256")
    assert {"AVX", "FMA", "BMI2"} <= lit
    assert not lit & {"AVX2", "AVX_VNNI", "AVX512F", "AVX512VL"}


def test_a_form_that_needs_two_features_counts_against_the_later() -> None:
    lit = without("VEX_VPCLMULQDQ_XMM_XMM_XMMM128_IMM8")
    assert "PCLMULQDQ" in lit and "AVX" not in lit
    lit = without("EVEX_VPADDD_YMM_K1Z_YMM_YMMM256B32")
    assert "AVX512F" in lit and "AVX512VL" not in lit


def test_forms_of_dark_features_do_not_count() -> None:
    avx512 = {code for name, code in vars(Code).items() if name.startswith("EVEX")}
    assert {"VAES", "VPCLMULQDQ", "GFNI"} <= features(lambda code: code not in avx512)


@pytest.mark.parametrize(
    "name", ["EVEX_VAESENC_YMM_YMM_YMMM256", "EVEX_VGF2P8MULB_ZMM_K1Z_ZMM_ZMMM512"]
)
def test_evex_forms_of_older_features_count_against_avx512(name: str) -> None:
    lit = without(name)
    assert {"VAES", "GFNI"} <= lit
    assert not {"AVX512F", "AVX512VL"} <= lit


def test_exempt_forms_do_not_count() -> None:
    assert without(*EXEMPT_FORMS) == EVERYTHING


def test_missing_names_the_forms() -> None:
    assert missing(lambda _code: True, "BMI2") == []
    names = missing(lambda code: code != Code.VEX_MULX_R32_R32_RM32, "BMI2")
    assert names == ["VEX_MULX_R32_R32_RM32"]


@pytest.mark.parametrize("seed", range(4))
def test_no_lit_feature_has_a_form_that_does_not_run(seed: int) -> None:
    source = random.Random(seed)
    everything = forms_of(EVERYTHING)
    broken = set(source.sample(everything, source.choice([1, 3, 10, 40])))
    lit = features(lambda code: code not in broken)
    assert not broken & set(forms_of(lit))


# The answers


def test_bits_are_where_the_host_has_them() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if NativeCpu.available() is not None or not cpuinfo.exists():
        pytest.skip(f"no x86-64 Linux host to compare with: {NativeCpu.available()}")
    flags = next(t for t in cpuinfo.read_text().splitlines() if t.startswith("flags")).split()
    leaves = NativeCpu.shared().cpuid
    for name, flag in LINUX_FLAGS.items():
        leaf, subleaf, register, bit = FEATURE_BITS[name]
        if flag in flags and (leaf, subleaf) in leaves:
            assert leaves[leaf, subleaf][register] >> bit & 1, name


def test_no_two_features_share_a_bit() -> None:
    assert len(set(FEATURE_BITS.values())) == len(FEATURE_BITS)
    assert set(CANDIDATES) <= FEATURE_BITS.keys()


def test_a_v3_model_has_the_v3_bits_and_no_others() -> None:
    model = CpuidModel(V3)
    assert model(1)[2] == sum(1 << b for b in (0, 9, 12, 13, 19, 20, 22, 23, 26, 28, 29, 31))
    ebx = model(7)[1]
    assert ebx & ~(1 << 9 | 1 << 13) == 1 << 3 | 1 << 5 | 1 << 8
    assert model(0x80000001)[2] == 1 | 1 << 5
    assert model(7, 1) == (0, 0, 0, 0) and model(7)[0] == 0
    assert not model(1)[2] >> 27 & 1, "OSXSAVE is the guest's doing"


def test_identity() -> None:
    model = CpuidModel(V3)
    max_leaf, *letters = model(0)
    ebx, ecx, edx = letters
    assert struct.pack("<III", ebx, edx, ecx) == b"GenuineIntel" and max_leaf >= 0xD
    brand = b"".join(struct.pack("<4I", *model(0x80000002 + n)) for n in range(3))
    assert brand.rstrip(b"\0").startswith(b"unicorn-fallback") and brand.endswith(b"\0")
    assert model(0x80000000)[0] == 0x80000008
    eax = model(1)[0]
    assert (eax >> 8 & 0xF, (eax >> 4 & 0xF) | (eax >> 16 & 0xF) << 4) == (6, 0x5E)


def test_cache_sizes_as_glibc_reads_them() -> None:
    model = CpuidModel(V3)
    assert 0xFF in struct.pack("<I", model(2)[0])[1:], "leaf 2 sends to leaf 4"
    sizes = {}
    for index in range(8):
        eax, ebx, ecx, _edx = model(4, index)
        if not eax & 0x1F:
            break
        ways, partitions, line = (ebx >> 22) + 1, (ebx >> 12 & 0x3FF) + 1, (ebx & 0xFFF) + 1
        sizes[eax >> 5 & 7, eax & 0x1F] = ways * partitions * line * (ecx + 1)
        assert not eax >> 14, "nothing is shared"
    assert sizes == {(1, 1): 32768, (1, 2): 32768, (2, 3): 262144, (3, 3): 8 << 20}
    assert model(0x80000006)[2] >> 16 == 256


def test_topology_is_one_thread() -> None:
    model = CpuidModel(V3)
    assert [model(0xB, n)[1:3] for n in (0, 1)] == [(1, 0x100), (1, 0x201)]
    assert model(0xB, 2)[:3] == (0, 0, 2)
    assert model(1)[1] >> 16 == 1


def test_address_sizes_and_clock() -> None:
    model = CpuidModel(V3, physical_bits=46, tsc_hz=3_000_000_000)
    assert model(0x80000008)[0] == 0x302E
    denominator, numerator, crystal, _ = model(0x15)
    assert crystal * numerator // denominator == 3_000_000_000
    assert model(0x16)[0] == 3000


def test_beyond_the_last_leaf_intel_answers_with_the_last_basic_one() -> None:
    model = CpuidModel(V3)
    assert model(0x17) == model(0x80000009) == model(0x16)
    assert model(0x40000001) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("lit", "mask", "size"),
    [
        (["XSAVE"], 3, 576),
        (V3, 7, 832),
        ([*V3, "AVX512F"], 0xE7, 2688),
        ([*V3, "PKU"], 0x207, 2696),
    ],
)
def test_xsave_leaf_follows_the_features(lit: list[str], mask: int, size: int) -> None:
    model = CpuidModel(lit)
    assert model.xcr0_mask == mask
    assert model(0xD)[:4] == (mask, 576, size, 0)
    for number in range(2, 32):
        component_size, offset, flags, _ = model(0xD, number)
        assert bool(component_size) == bool(mask >> number & 1) and flags == 0
        assert offset + component_size <= size


def test_without_xsave_leaf_d_is_empty() -> None:
    model = CpuidModel(["SSE3"])
    assert model(0xD) == model(0xD, 1) == (0, 0, 0, 0)


def test_a_bound_model_follows_the_vcpu() -> None:
    cpu = make_cpu()
    cpuid = CpuidModel([*V3, "PKU"]).bind(cpu)
    cpu.registers.bank.write("cr4", 0)
    assert not cpuid(1, 0)[2] >> 27 & 1 and not cpuid(7, 0)[2] >> 4 & 1
    cpu.registers.bank.write("cr4", 1 << 18 | 1 << 22)
    assert cpuid(1, 0)[2] >> 27 & 1 and cpuid(7, 0)[2] >> 4 & 1
    cpu.registers.xcr0 = 7
    assert cpuid(0xD, 0)[1] == 832 and cpuid(0xD, 1)[1] == 832
    assert not CpuidModel(["SSE3"]).bind(cpu)(1, 0)[2] >> 27 & 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"features": ["AVX3"]},
        {"features": [], "vendor": "me"},
        {"features": [], "physical_bits": 60},
    ],
)
def test_bad_models_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        CpuidModel(**arguments)  # type: ignore[arg-type]
