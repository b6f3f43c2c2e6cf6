"""Sign and zero extension, saturating packs."""

from __future__ import annotations

from handlers import extend
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(extend)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


def test_packs_saturate_by_the_signs_of_both_types() -> None:
    lanes = (0x7FFF, 0x8000, 0x00FF, 0x0100, 0xFFFF, 0x0000, 0x007F, 0xFF80)
    source = b"".join(v.to_bytes(2, "little") for v in lanes)
    cpu = small_cpu(v2=source * 2, v3=bytes(32))
    execute(HANDLERS, cpu, "c5ed67cb")  # vpackuswb ymm1, ymm2, ymm3
    low = bytes((0xFF, 0, 0xFF, 0xFF, 0, 0, 0x7F, 0)) + bytes(8)
    assert cpu.vec.read(1) == low * 2 + bytes(32)
    execute(HANDLERS, cpu, "c5ed63cb")  # vpacksswb ymm1, ymm2, ymm3
    low = bytes((0x7F, 0x80, 0x7F, 0x7F, 0xFF, 0, 0x7F, 0x80)) + bytes(8)
    assert cpu.vec.read(1) == low * 2 + bytes(32)


def test_extension_in_place() -> None:
    cpu = small_cpu(v3=bytes(range(0x7C, 0x84)))
    execute(HANDLERS, cpu, "c4e27d21db")  # vpmovsxbd ymm3, xmm3
    want = b"".join((v - 256 * (v > 127)).to_bytes(4, "little", signed=True)
                    for v in range(0x7C, 0x84))  # fmt: skip
    assert cpu.vec.read(3) == want + bytes(32)
