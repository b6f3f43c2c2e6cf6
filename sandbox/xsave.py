"""The extended state: components, their places in the XSAVE area, their bytes.

Source: SDM Vol. 1, chapter 13 (XSAVE) and 10.5 (FXSAVE). The standard format has Intel's offsets
(those of processors without MPX in use keep its hole); the guest learns them from CPUID leaf 0xD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sandbox.cpu import Cpu
from sandbox.registers import VECTOR_BYTES

X87, SSE, AVX, OPMASK, ZMM_HI256, HI16_ZMM, PKRU = 0, 1, 2, 5, 6, 7, 9
"""State component numbers: bits of XCR0, XSTATE_BV and XCOMP_BV."""

LEGACY_SIZE, HEADER_SIZE = 512, 64
EXTENDED_OFFSET = LEGACY_SIZE + HEADER_SIZE
COMPACTED = 1 << 63
"""XCOMP_BV bit that tells the compacted format."""

MXCSR_MASK = 0xFFFF
MXCSR_RESET = 0x1F80
FPCW_RESET = 0x37F
TAGS_EMPTY = 0xFFFF


@dataclass(frozen=True, slots=True)
class Component:
    """An extended state component: its size and its place in the standard format, in bytes."""

    name: str
    size: int
    offset: int


COMPONENTS: Final = {
    AVX: Component("AVX", 256, 576),
    OPMASK: Component("opmask", 64, 1088),
    ZMM_HI256: Component("ZMM_Hi256", 512, 1152),
    HI16_ZMM: Component("Hi16_ZMM", 1024, 1664),
    PKRU: Component("PKRU", 8, 2688),
}
AVX512_MASK: Final = 1 << OPMASK | 1 << ZMM_HI256 | 1 << HI16_ZMM


def standard_size(mask: int) -> int:
    """Size of the standard-format area for the components in ``mask``."""
    ends = (c.offset + c.size for n, c in COMPONENTS.items() if mask >> n & 1)
    return max(ends, default=EXTENDED_OFFSET)


def compacted_offsets(mask: int) -> dict[int, int]:
    """Offset of each extended component of ``mask`` in the compacted format."""
    at, offsets = EXTENDED_OFFSET, {}
    for number, component in COMPONENTS.items():
        if mask >> number & 1:
            offsets[number] = at
            at += component.size
    return offsets


def compacted_size(mask: int) -> int:
    """Size of the compacted-format area for the components in ``mask``."""
    used = sum(c.size for n, c in COMPONENTS.items() if mask >> n & 1)
    return EXTENDED_OFFSET + used


def standard_offsets(mask: int) -> dict[int, int]:
    """Offset of each extended component of ``mask`` in the standard format."""
    return {n: c.offset for n, c in COMPONENTS.items() if mask >> n & 1}


# Extended components


def _registers(cpu: Cpu) -> int:
    """How many of the vector registers the running mode can name without EVEX."""
    return 16 if cpu.bitness == 64 else 8


def _gather(cpu: Cpu, first: int, count: int, low: int, high: int) -> bytes:
    raw = cpu.vec.raw
    starts = range(first * VECTOR_BYTES, (first + count) * VECTOR_BYTES, VECTOR_BYTES)
    return b"".join(bytes(raw[at + low : at + high]) for at in starts)


def _scatter(cpu: Cpu, first: int, count: int, low: int, high: int, data: bytes) -> None:
    raw, width = cpu.vec.raw, high - low
    for i in range(count):
        at = (first + i) * VECTOR_BYTES
        raw[at + low : at + high] = data[i * width : (i + 1) * width]


_SLICES: Final = {SSE: (0, 0, 16), AVX: (0, 16, 32), ZMM_HI256: (0, 32, 64), HI16_ZMM: (16, 0, 64)}
"""Vector components: first register, and which bytes of each register."""


def read_component(cpu: Cpu, number: int) -> bytes:
    """The bytes of SSE (XMM only) or an extended component, as far as the mode can see them.

    Outside 64-bit mode registers 8 to 15 are neither saved nor restored, and Hi16_ZMM is empty.
    """
    if number == OPMASK:
        return cpu.opmask.tobytes()
    if number == PKRU:
        return cpu.registers.pkru.to_bytes(8, "little")
    count = _registers(cpu)
    if number == HI16_ZMM and count == 8:
        return b""
    first, low, high = _SLICES[number]
    return _gather(cpu, first, count, low, high)


def write_component(cpu: Cpu, number: int, data: bytes | None) -> None:
    """Load SSE (XMM only) or an extended component; None is its initial state, all zero."""
    if data is None:
        data = bytes(VECTOR_BYTES * 16)
    if number == OPMASK:
        cpu.opmask[:] = memoryview(data[:64]).cast("Q")
        return
    if number == PKRU:
        cpu.registers.pkru = int.from_bytes(data[:4], "little")
        return
    count = _registers(cpu)
    if number == HI16_ZMM and count == 8:
        return
    first, low, high = _SLICES[number]
    _scatter(cpu, first, count, low, high, data)


# x87


def read_x87(cpu: Cpu, wide: bool) -> tuple[bytes, bytes]:
    """Bytes 0-23 and 32-159 of the legacy area; ``wide``: FIP and FDP have 64 bits (REX.W).

    The selectors of the narrow form are 0: they are deprecated (CPUID.7:EBX[13]).
    """
    read = cpu.registers.bank.read
    full = read("fptag")
    tags = sum(1 << n for n in range(8) if full >> 2 * n & 3 != 3)
    fields = [(read("fpcw"), 2), (read("fpsw"), 2), (tags, 2), (read("fop") & 0x7FF, 2)]
    mask = (1 << 64) - 1 if wide else 0xFFFF_FFFF
    fields += [(read("fip") & mask, 8), (read("fdp") & mask, 8)]
    head = b"".join(value.to_bytes(size, "little") for value, size in fields)
    return head, b"".join(read(f"st{n}").to_bytes(16, "little") for n in range(8))


def write_x87(cpu: Cpu, head: bytes, registers: bytes, wide: bool) -> None:
    """Load what :func:`read_x87` gives."""
    write = cpu.registers.bank.write
    word = [int.from_bytes(head[at : at + 2], "little") for at in range(0, 8, 2)]
    stack = [int.from_bytes(registers[at : at + 10], "little") for at in range(0, 128, 16)]
    pointer = 8 if wide else 4
    write("fpcw", word[0])
    write("fpsw", word[1])
    for number, value in enumerate(stack):
        write(f"st{number}", value)
    write("fptag", full_tags(word[2] & 0xFF, word[1] >> 11 & 7, stack))
    write("fop", word[3] & 0x7FF)
    write("fip", int.from_bytes(head[8 : 8 + pointer], "little"))
    write("fdp", int.from_bytes(head[16 : 16 + pointer], "little"))


def reset_x87(cpu: Cpu) -> None:
    """The initial state of x87: FNINIT, and the registers zero (SDM Vol. 1, 13.6)."""
    write_x87(cpu, FPCW_RESET.to_bytes(24, "little"), bytes(128), wide=True)


def full_tags(used: int, top: int, stack: list[int]) -> int:
    """The full tag word from the abridged one (SDM Vol. 2, FXSAVE, table 3-45)."""
    full = 0
    for physical in range(8):
        kind = _tag(stack[physical - top & 7]) if used >> physical & 1 else 3
        full |= kind << 2 * physical
    return full


def _tag(value: int) -> int:
    exponent, significand = value >> 64 & 0x7FFF, value & (1 << 64) - 1
    if exponent == 0 and significand == 0:
        return 1
    return 0 if significand >> 63 and exponent not in (0, 0x7FFF) else 2


# Which components are in use


def in_use(cpu: Cpu, mask: int) -> int:
    """XINUSE for the components in ``mask``: those not in their initial state (13.6)."""
    found = 0
    for number in (X87, SSE, *COMPONENTS):
        if mask >> number & 1 and _modified(cpu, number):
            found |= 1 << number
    return found


_X87_INITIAL: Final = (FPCW_RESET.to_bytes(24, "little"), bytes(128))


def _modified(cpu: Cpu, number: int) -> bool:
    if number == X87:
        return read_x87(cpu, wide=True) != _X87_INITIAL
    return any(read_component(cpu, number))
