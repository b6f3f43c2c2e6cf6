"""GFNI against the host, published examples, and arithmetic done another way."""

from __future__ import annotations

from handlers import crypto, galois
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(galois)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=4)


def test_products_are_fips_197s() -> None:
    cpu = small_cpu(v1=bytes([0x57] * 3 + [0] * 13), v2=bytes([0x83, 0x13, 0x02, 9]).ljust(16))
    execute(HANDLERS, cpu, "660f38cfca")  # gf2p8mulb xmm1, xmm2
    assert cpu.vec.read(1, 4) == bytes([0xC1, 0xFE, 0xAE, 0])  # 4.2 and 4.2.1
    assert cpu.vec.read(1)[16:] == b"\xff" * 48


def test_inverse_then_affine_map_is_the_substitution_of_aes() -> None:
    """SubBytes of FIPS 197 as an affine map, against AESENCLAST with a zero key."""
    everything = bytes(range(256))
    matrix = bytes.fromhex("f1e3c78f1f3e7cf8")[::-1]
    for start in range(0, 256, 16):
        data = everything[start : start + 16]
        cpu = small_cpu(v1=data, v2=matrix * 2, v3=data, v4=bytes(16))
        execute(HANDLERS, cpu, "c4e3f1cfca63")  # vgf2p8affineinvqb xmm1, xmm1, xmm2, 63h
        execute(crypto.ROUNDS, cpu, "660f38dddc")  # aesenclast xmm3, xmm4: ShiftRows too
        rows = [cpu.vec.read(1, 16)[(5 * i) % 16] for i in range(16)]
        assert bytes(rows) == cpu.vec.read(3, 16)


def test_bit_reversal_and_identity() -> None:
    data = bytes(range(0, 128, 8))
    for matrix, want in (
        ("0102040810204080", [int(f"{x:08b}"[::-1], 2) for x in data]),
        ("8040201008040201", list(data)),
    ):
        cpu = small_cpu(v2=data * 2, v3=bytes.fromhex(matrix) * 4)
        execute(HANDLERS, cpu, "c4e3edcecb00")  # vgf2p8affineqb ymm1, ymm2, ymm3, 0
        assert list(cpu.vec.read(1, 32)) == want * 2
        assert cpu.vec.read(1)[32:] == bytes(32)
