"""SM3 and SM4 instructions: the standards' examples, computed with them."""

from __future__ import annotations

import struct

import pytest

from handlers import sm
from sandbox.encodings import encode, form
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(sm)
IV = (0x7380166F, 0x4914B2B9, 0x172442D7, 0xDA8A0600,
      0xA96F30BC, 0x163138AA, 0xE38DEE4D, 0xB0FB0E4E)  # fmt: skip


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=4)


def run(name: str, *operands: list[int], immediate: int = 0) -> list[int]:
    """One instruction on registers 1, 2, 3; operands and result are words, the lowest first."""
    packed = [struct.pack(f"<{len(words)}I", *words) for words in operands]
    cpu = small_cpu(**{f"v{n}": data for n, data in enumerate(packed, 1)})
    execute(HANDLERS, cpu, encode(form(name), (1, 2, 3), None, immediate).hex())
    size = len(packed[0])
    assert not any(cpu.vec.read(1)[size:])
    return list(struct.unpack(f"<{size // 4}I", cpu.vec.read(1, size)))


def left(x: int, count: int) -> int:
    return (x << count | x >> 32 - count) & 0xFFFFFFFF


def schedule(block: bytes) -> list[int]:
    w = list(struct.unpack(">16I", block))
    for n in range(16, 68, 4):
        first = run(
            "VEX_VSM3MSG1_XMM_XMM_XMMM128", w[n - 9 : n - 5], [*w[n - 3 :], 0], w[n - 16 : n - 12]
        )
        w += run("VEX_VSM3MSG2_XMM_XMM_XMMM128", first, w[n - 13 : n - 9], w[n - 6 : n - 2])
    return w


def sm3(message: bytes) -> str:
    data = message + b"\x80"
    data += bytes(-(len(data) + 8) % 64) + (8 * len(message)).to_bytes(8, "big")
    state = list(IV)
    for at in range(0, len(data), 64):
        w = schedule(data[at : at + 64])
        a, b, c, d, e, f, g, h = state
        abef, cdgh = [f, e, b, a], [left(h, 13), left(g, 13), left(d, 23), left(c, 23)]
        for n in range(0, 64, 2):
            words = [w[n], w[n + 1], w[n + 4], w[n + 5]]
            name = "VEX_VSM3RNDS2_XMM_XMM_XMMM128_IMM8"
            cdgh, abef = abef, run(name, cdgh, abef, words, immediate=n)
        f, e, b, a = abef
        h, g, d, c = cdgh
        new = (a, b, left(c, 9), left(d, 9), e, f, left(g, 19), left(h, 19))
        state = [x ^ y for x, y in zip(state, new, strict=True)]
    return struct.pack(">8I", *state).hex()


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        # GB/T 32905-2016, appendix A
        (b"abc", "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
        (b"abcd" * 16, "debe9ff92275b8a138604889c18e5a4d6fdb70e5387e5765293dcba39c0c5732"),
    ],
)
def test_sm3_of_the_standards_examples(message: bytes, digest: str) -> None:
    assert sm3(message) == digest


FK = [0xA3B1BAC6, 0x56AA3350, 0x677D9197, 0xB27022DC]
CK = [sum((4 * n + i) * 7 % 256 << 24 - 8 * i for i in range(4)) for n in range(32)]
KEY = [0x01234567, 0x89ABCDEF, 0xFEDCBA98, 0x76543210]


def round_keys() -> list[int]:
    state, keys = [k ^ f for k, f in zip(KEY, FK, strict=True)], []
    for n in range(0, 32, 4):
        state = run("VEX_VSM4KEY4_XMM_XMM_XMMM128", state, state, CK[n : n + 4])
        keys += state
    return keys


def crypt(blocks: list[int], keys: list[int]) -> list[int]:
    """All blocks of four words, one or two."""
    count = len(blocks) // 4
    letter = "X" if count == 1 else "Y"
    memory = 128 * count
    name = f"VEX_VSM4RNDS4_{letter}MM_{letter}MM_{letter}MMM{memory}"
    for n in range(0, 32, 4):
        blocks = run(name, blocks, blocks, keys[n : n + 4] * count)
    return [blocks[i ^ 3] for i in range(len(blocks))]


def test_sm4_of_the_standards_example() -> None:
    """GB/T 32907-2016, appendix A.1: the key is the plaintext."""
    keys = round_keys()
    assert keys[0] == 0xF12186F9 and keys[31] == 0x9124A012
    cipher = crypt(KEY, keys)
    assert cipher == [0x681EDF34, 0xD206965E, 0x86B3E94F, 0x536E4246]
    assert crypt(cipher, keys[::-1]) == KEY


def test_sm4_works_on_two_blocks() -> None:
    keys = round_keys()
    other = [7, 8, 9, 10]
    assert crypt(KEY + other, keys) == crypt(KEY, keys) + crypt(other, keys)


def test_the_substitution_is_a_permutation_with_the_standards_corners() -> None:
    assert sorted(sm.SBOX) == list(range(256))
    assert (sm.SBOX[0], sm.SBOX[0x0F], sm.SBOX[0xEF], sm.SBOX[0xFF]) == (0xD6, 0x05, 0x84, 0x48)
