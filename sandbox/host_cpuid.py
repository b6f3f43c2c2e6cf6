"""CPUID answers to feature names, as iced-x86's ``CpuidFeature`` calls them."""

from __future__ import annotations

from typing import TypeAlias

Leaves: TypeAlias = dict[tuple[int, int], tuple[int, int, int, int]]
"""(leaf, subleaf) to (EAX, EBX, ECX, EDX)."""

BASELINE = frozenset(
    """INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 X64 FPU FPU287 FPU387 CPUID CMOV MMX SSE SSE2
    CX8 FXSR TSC MSR MULTIBYTENOP PAUSE CLFSH SYSCALL""".split()
)
"""What every x86-64 CPU has."""

_EAX, _EBX, _ECX, _EDX = range(4)
BITS: dict[tuple[int, int, int], str] = {
    (1, 0, _ECX): """0 SSE3, 1 PCLMULQDQ, 3 MONITOR, 9 SSSE3, 12 FMA, 13 CMPXCHG16B, 19 SSE4_1,
        20 SSE4_2, 22 MOVBE, 23 POPCNT, 25 AES, 26 XSAVE, 28 AVX, 29 F16C, 30 RDRAND""",
    (7, 0, _EBX): """0 FSGSBASE, 3 BMI1, 5 AVX2, 8 BMI2, 10 INVPCID, 11 RTM, 16 AVX512F,
        17 AVX512DQ, 18 RDSEED, 19 ADX, 20 SMAP, 21 AVX512_IFMA, 23 CLFLUSHOPT, 24 CLWB,
        26 AVX512PF, 27 AVX512ER, 28 AVX512CD, 29 SHA, 30 AVX512BW, 31 AVX512VL""",
    (7, 0, _ECX): """1 AVX512_VBMI, 4 PKU, 5 WAITPKG, 6 AVX512_VBMI2, 7 CET_SS, 8 GFNI, 9 VAES,
        10 VPCLMULQDQ, 11 AVX512_VNNI, 12 AVX512_BITALG, 14 AVX512_VPOPCNTDQ, 22 RDPID, 23 KL,
        25 CLDEMOTE, 27 MOVDIRI, 28 MOVDIR64B, 29 ENQCMD""",
    (7, 0, _EDX): """2 AVX512_4VNNIW, 3 AVX512_4FMAPS, 5 UINTR, 8 AVX512_VP2INTERSECT,
        14 SERIALIZE, 16 TSXLDTRK, 20 CET_IBT, 22 AMX_BF16, 23 AVX512_FP16, 24 AMX_TILE,
        25 AMX_INT8""",
    (7, 1, _EAX): """0 SHA512, 1 SM3, 2 SM4, 3 RAO_INT, 4 AVX_VNNI, 5 AVX512_BF16, 7 CMPCCXADD,
        21 AMX_FP16, 22 HRESET, 23 AVX_IFMA""",
    (7, 1, _EDX): "4 AVX_VNNI_INT8, 5 AVX_NE_CONVERT, 8 AMX_COMPLEX, 10 AVX_VNNI_INT16",
    (0xD, 1, _EAX): "0 XSAVEOPT, 1 XSAVEC, 3 XSAVES",
    (0x14, 0, _EBX): "4 PTWRITE",
    (0x80000001, 0, _ECX): "5 LZCNT, 6 SSE4A, 8 PREFETCHW, 11 XOP, 15 LWP, 16 FMA4, 21 TBM, "
    "29 MONITORX",
    (0x80000001, 0, _EDX): "27 RDTSCP, 30 D3NOWEXT, 31 D3NOW",
    (0x80000008, 0, _EBX): "0 CLZERO, 4 RDPRU, 8 MCOMMIT, 9 WBNOINVD",
}
"""Bits by (leaf, subleaf, register) (SDM Vol. 2, CPUID; AMD APM Vol. 3, appendix E)."""

_NEEDS_YMM = frozenset("FMA F16C VAES VPCLMULQDQ FMA4 XOP".split())


def features(leaves: Leaves, xcr0: int) -> frozenset[str]:
    """The usable features: those that CPUID reports and whose registers XCR0 enables."""
    found = set(BASELINE)
    for (leaf, subleaf, register), text in BITS.items():
        value = leaves.get((leaf, subleaf), (0, 0, 0, 0))[register]
        for entry in text.split(","):
            bit, name = entry.split()
            if value >> int(bit) & 1:
                found.add(name)
    if xcr0 & 6 != 6:
        found = {n for n in found if n not in _NEEDS_YMM and not n.startswith("AVX")}
    if xcr0 & 0xE0 != 0xE0:
        found = {n for n in found if not n.startswith("AVX512")}
    return frozenset(found)
