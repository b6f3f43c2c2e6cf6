"""The page of all instructions says what the machine does."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.instructions import HANDLER, NONE, Row, page, rows, table

DOCS = Path(__file__).parent.parent / "docs"
PROMISED = set(
    """INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 X64 FPU FPU287 FPU387 CMOV CX8 CPUID MSR TSC
    SEP SYSCALL MMX FXSR SSE SSE2 SSE3 SSSE3 SSE4_1 SSE4_2 SSE4A POPCNT CMPXCHG16B MULTIBYTENOP
    AVX AVX2 FMA F16C AES PCLMULQDQ VAES VPCLMULQDQ GFNI SHA SHA512 SM3 SM4 AVX_VNNI AVX_VNNI_INT8
    AVX_VNNI_INT16 AVX_IFMA AVX_NE_CONVERT BMI1 BMI2 LZCNT TBM XOP FMA4 ADX D3NOW D3NOWEXT MOVBE
    MOVDIRI MOVDIR64B RDPID RDRAND RDSEED RDTSCP RDPMC CLFSH CLFLUSHOPT CLWB CLDEMOTE CLZERO
    PREFETCHW PREFETCHWT1 PREFETCHITI SERIALIZE CET_IBT CET_SS XSAVE XSAVEOPT XSAVEC XSAVES RTM
    HLE_OR_RTM PTWRITE WAITPKG MONITOR MONITORX RAO_INT CMPCCXADD PAUSE FSGSBASE""".split()
)
"""Every instruction of every generation up to AVX2's, and what came later without EVEX."""


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows())


def test_the_page_is_true(found: list[Row]) -> None:
    again = "python -m sandbox.instructions writes it again"
    assert (DOCS / "instructions.md").read_text() == page(found), again
    assert (DOCS / "instructions.csv").read_text() == table(found), again


def test_there_is_no_gap_in_what_is_promised(found: list[Row]) -> None:
    missing = [row.form for row in found if set(row.features) <= PROMISED and row.place == NONE]
    assert missing == []
    known = {feature for row in found for feature in row.features}
    assert known >= PROMISED - {"D3NOWEXT"}, "a feature that no form needs is spelled wrongly"


def test_vex_never_runs_on_the_fast_path_where_xcr0_matters(found: list[Row]) -> None:
    rows_of_avx = [row for row in found if row.features == ("AVX",)]
    assert len(rows_of_avx) >= 390
    assert {row.place for row in rows_of_avx} <= {HANDLER, "machine"}
