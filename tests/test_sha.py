"""SHA extensions against the host, and whole hashes computed with them against hashlib."""

from __future__ import annotations

import hashlib
import struct

import pytest

from handlers import sha
from sandbox.encodings import encode, form
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(sha)
MESSAGES = [b"", b"abc", bytes(range(100)), b"The quick brown fox jumps over the lazy dog" * 5]


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=6)


def run(name: str, *operands: bytes, immediate: int = 0) -> bytes:
    """One instruction on registers 1, 2, ...; ``operands`` are what they hold, 0 comes last."""
    cpu = small_cpu(**{f"v{(n + 1) % 4}": data for n, data in enumerate(operands)})
    code = encode(form(name), (1, 2, 3), None, immediate)
    execute(HANDLERS, cpu, code.hex())
    return cpu.vec.read(1, len(operands[0]))


def padded(message: bytes, block: int) -> list[bytes]:
    length = (8 * len(message)).to_bytes(block // 8, "big")
    data = message + b"\x80"
    data += bytes(-(len(data) + len(length)) % block) + length
    return [data[i : i + block] for i in range(0, len(data), block)]


def packed(code: str, *words: int) -> bytes:
    return struct.pack(f"<{len(words)}{code}", *words)


def sha1(message: bytes) -> bytes:
    state = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0)
    for block in padded(message, 64):
        # four words a register, the first of them in the highest lane
        words = [packed("I", *struct.unpack_from(">4I", block, i)[::-1]) for i in (0, 16, 32, 48)]
        for n in range(4, 20):
            first = run("SHA1MSG1_XMM_XMMM128", words[n - 4], words[n - 3])
            mixed = bytes(a ^ b for a, b in zip(first, words[n - 2], strict=True))
            words.append(run("SHA1MSG2_XMM_XMMM128", mixed, words[n - 1]))
        abcd = packed("I", *state[3::-1])
        (w0, w1, w2, w3) = struct.unpack("<4I", words[0])
        added = packed("I", w0, w1, w2, w3 + state[4] & 0xFFFFFFFF)
        for n in range(20):
            before = abcd
            name = "SHA1RNDS4_XMM_XMMM128_IMM8"
            abcd = run(name, abcd, added, immediate=n // 5)
            following = words[n + 1] if n < 19 else bytes(16)
            added = run("SHA1NEXTE_XMM_XMMM128", before, following)
        e = struct.unpack("<4I", added)[3]
        new = (*struct.unpack("<4I", abcd)[::-1], e)
        state = tuple(a + b & 0xFFFFFFFF for a, b in zip(state, new, strict=True))
    return struct.pack(">5I", *state)


def constants(bits: int, count: int) -> list[int]:
    """The first bits of the fractions of the cube roots of the first primes (FIPS 180-4, 4.2)."""
    primes = [p for p in range(2, 410) if all(p % d for d in range(2, p))][:count]
    found = []
    for prime in primes:
        low, high = 0, 8 << bits
        while low < high:  # the integer cube root
            middle = low + high + 1 >> 1
            low, high = (middle, high) if middle**3 <= prime << 3 * bits else (low, middle - 1)
        found.append(low & (1 << bits) - 1)
    return found


def sha2(message: bytes, size: int, names: tuple[str, str, str], start: list[int]) -> bytes:
    """SHA-256 (words of 4 bytes) or SHA-512 (8) with the instructions ``names``."""
    rounds, message_1, message_2 = names
    code, mask = "I" if size == 4 else "Q", (1 << 8 * size) - 1
    count = 64 if size == 4 else 80
    table = constants(8 * size, count)
    state = start
    for block in padded(message, 16 * size):
        w = list(struct.unpack(f">16{code}", block))
        for n in range(16, count, 4):
            four = packed(code, *w[n - 16 : n - 12])
            following = packed(code, *w[n - 12 : n - 8])[: 16 if size == 8 else None]
            first = struct.unpack(f"<4{code}", run(message_1, four, following))
            mixed = [a + b & mask for a, b in zip(first, w[n - 7 : n - 3], strict=True)]
            last = run(message_2, packed(code, *mixed), packed(code, *w[n - 4 : n]))
            w += struct.unpack(f"<4{code}", last)
        a, b, c, d, e, f, g, h = state
        for n in range(0, count, 2):
            added = [w[i] + table[i] & mask for i in (n, n + 1)]
            words = packed(code, *added) + (bytes(8) if size == 4 else b"")
            old = packed(code, h, g, d, c)
            now = packed(code, f, e, b, a)
            operands = (old, now, b"", words) if size == 4 else (old, now, words)
            new = struct.unpack(f"<4{code}", run(rounds, *operands))
            c, d, g, h = a, b, e, f
            f, e, b, a = new
        now_all = (a, b, c, d, e, f, g, h)
        state = [x + y & mask for x, y in zip(state, now_all, strict=True)]
    return struct.pack(f">8{code}", *state)


def square_roots(bits: int) -> list[int]:
    from math import isqrt

    return [isqrt(p << 2 * bits) & (1 << bits) - 1 for p in (2, 3, 5, 7, 11, 13, 17, 19)]


@pytest.mark.parametrize("message", MESSAGES)
def test_sha_1(message: bytes) -> None:
    assert sha1(message) == hashlib.sha1(message, usedforsecurity=False).digest()


@pytest.mark.parametrize("message", MESSAGES)
def test_sha_256(message: bytes) -> None:
    names = ("SHA256RNDS2_XMM_XMMM128", "SHA256MSG1_XMM_XMMM128", "SHA256MSG2_XMM_XMMM128")
    assert sha2(message, 4, names, square_roots(32)) == hashlib.sha256(message).digest()


@pytest.mark.parametrize("message", MESSAGES)
def test_sha_512(message: bytes) -> None:
    names = (
        "VEX_VSHA512RNDS2_YMM_YMM_XMM",
        "VEX_VSHA512MSG1_YMM_XMM",
        "VEX_VSHA512MSG2_YMM_YMM",
    )
    assert sha2(message, 8, names, square_roots(64)) == hashlib.sha512(message).digest()
