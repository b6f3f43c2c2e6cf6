"""The page of all instructions says what the machine does."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.instructions import HANDLER, NONE, Row, page, rows, table

DOCS = Path(__file__).parent.parent / "docs"
V3 = set(
    "SSE SSE2 SSE3 SSSE3 SSE4_1 SSE4_2 POPCNT CMPXCHG16B AVX AVX2 BMI1 BMI2 F16C FMA LZCNT MOVBE "
    "AES PCLMULQDQ VAES VPCLMULQDQ GFNI SHA SHA512 SM3 SM4 AVX_VNNI AVX_VNNI_INT8 AVX_VNNI_INT16 "
    "AVX_IFMA AVX_NE_CONVERT ADX SSE4A MMX FPU X64".split()
)


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows())


def test_the_page_is_true(found: list[Row]) -> None:
    again = "python -m sandbox.instructions writes it again"
    assert (DOCS / "instructions.md").read_text() == page(found), again
    assert (DOCS / "instructions.csv").read_text() == table(found), again


def test_there_is_no_gap_up_to_avx2_and_its_generation(found: list[Row]) -> None:
    missing = [row.form for row in found if set(row.features) <= V3 and row.place == NONE]
    assert missing == []


def test_vex_never_runs_on_the_fast_path_where_xcr0_matters(found: list[Row]) -> None:
    rows_of_avx = [row for row in found if row.features == ("AVX",)]
    assert len(rows_of_avx) >= 390
    assert {row.place for row in rows_of_avx} <= {HANDLER, "machine"}
