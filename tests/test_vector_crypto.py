"""AES and carry-less multiplication."""

from __future__ import annotations

import pytest

from handlers import crypto
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(crypto)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


STATE = bytes.fromhex("7b5b54657374566563746f725d53475d")[::-1]
KEY = bytes.fromhex("48692853686179295b477565726f6e5d")[::-1]


@pytest.mark.parametrize(
    ("code", "want"),
    [
        # the examples of Intel's AES-NI and PCLMULQDQ white papers
        ("660f38dcca", "a8311c2f9fdba3c58b104b58ded7e595"),  # aesenc xmm1, xmm2
        ("660f38ddca", "c7fb881e938c5964177ec42553fdc611"),  # aesenclast
        ("660f38deca", "138ac342faea2787b58eb95eb730392a"),  # aesdec
        ("660f38dfca", "c5a391ef6b317f95d410637b72a593d0"),  # aesdeclast
        ("660f3a44ca00", "1d4d84c85c3440c0929633d5d36f0451"),  # pclmulqdq xmm1, xmm2
        ("660f3a44ca10", "1bd17c8d556ab5a17fa540ac2a281315"),
        ("660f3a44ca01", "1a2bf6db3a30862fbabf262df4b7d5c9"),
        ("660f3a44ca11", "1d1e1f2c592e7c45d66ee03e410fd4ed"),
    ],
)
def test_published_examples(code: str, want: str) -> None:
    cpu = small_cpu(v1=STATE, v2=KEY)
    execute(HANDLERS, cpu, code)
    assert cpu.vec.read(1, 16)[::-1].hex() == want
    assert cpu.vec.read(1)[16:] == b"\xff" * 48


def test_inverse_mix_columns_undoes_the_mixing_of_a_round() -> None:
    cpu = small_cpu(v1=STATE, v3=bytes(16))
    execute(HANDLERS, cpu, "660f38dccb")  # aesenc xmm1, xmm3
    execute(HANDLERS, cpu, "660f38dbc9")  # aesimc xmm1, xmm1
    execute(HANDLERS, cpu, "660f38dfcb")  # aesdeclast xmm1, xmm3
    assert cpu.vec.read(1, 16) == STATE


def test_key_expansion_of_fips_197() -> None:
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")  # appendix A.1
    cpu = small_cpu(v2=key)
    execute(HANDLERS, cpu, "c4e379dfca01")  # vaeskeygenassist xmm1, xmm2, 1
    assert cpu.vec.read(1)[12:16].hex() == "8b84eb01"  # SubWord(RotWord(temp)) with Rcon
    assert cpu.vec.read(1)[16:] == bytes(48)


def test_vaes_works_on_each_block() -> None:
    cpu = small_cpu(v2=STATE + KEY, v3=KEY + STATE)
    execute(HANDLERS, cpu, "c4e26ddccb")  # vaesenc ymm1, ymm2, ymm3
    assert cpu.vec.read(1, 16)[::-1].hex() == "a8311c2f9fdba3c58b104b58ded7e595"
    assert cpu.vec.read(1)[32:] == bytes(32)
