"""The pack for x86-64-v3 has a handler for every form of its features; gaps are listed by name."""

from __future__ import annotations

from handlers.avx2 import GENERAL, PACK
from sandbox.encodings import features_of
from tests.vector_forms import unhandled, vex_forms

FEATURES = """AVX AVX2 AES PCLMULQDQ VAES VPCLMULQDQ FMA F16C BMI1 BMI2 GFNI SHA512 SM3 SM4 AVX_VNNI
    AVX_VNNI_INT8 AVX_VNNI_INT16 AVX_IFMA AVX_NE_CONVERT""".split()


def test_no_vex_form_of_the_features_is_without_a_handler() -> None:
    forms = [code for code in vex_forms(*FEATURES) if features_of(code) <= set(FEATURES)]
    assert len(forms) > 600
    assert unhandled(PACK.handlers, forms) == []


def test_general_register_handlers_are_those_of_the_generation() -> None:
    names = {name for handler in GENERAL for name in handler.mnemonics}
    assert {"andn", "lzcnt", "tzcnt", "movbe", "mulx", "pdep", "shlx"} <= names
    assert not names & {"add", "mov", "popcnt"}
