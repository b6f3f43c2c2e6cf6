"""Integers and packed decimals: FILD, FIST, FISTP, FISTTP, FBLD, FBSTP (SDM Vol. 2)."""

from __future__ import annotations

from collections.abc import Callable

from handlers.softfloat import IE, PE, RZERO
from handlers.x87_format import (
    DEFAULT_NAN,
    SIGN,
    Kind,
    kind_of,
    pack,
    shift_right,
    split,
)
from handlers.x87_fpu import Body, Fpu, instruction
from sandbox.cpu import Cpu, bind_address
from sandbox.decode import Insn

SIZES = {"M16INT": 2, "M32INT": 4, "M64INT": 8, "M80BCD": 10}
_DECIMAL_LIMIT = 10**18
_DECIMAL_INDEFINITE = 0xFFFF_C000_0000_0000_0000


def size_of(insn: Insn) -> int:
    """Size in bytes of the operand in memory, by the name of the form."""
    return SIZES[insn.form.rpartition("_")[2]]


def to_integer(a: int, rounding: int) -> tuple[int, bool, bool] | None:
    """A register as an integer: its value, whether that is inexact, and whether rounding made it
    larger. None for what is no finite number, or far larger than any operand."""
    if kind_of(a) not in (Kind.ZERO, Kind.NORMAL, Kind.DENORMAL):
        return None
    m, e = split(a)
    if e > 0:
        return None
    negative = a & SIGN != 0
    q, inexact, up = shift_right(m, -e, negative, rounding)
    return (-q if negative else q), inexact, up


def _bind_store(
    cpu: Cpu,
    fpu: Fpu,
    insn: Insn,
    encode: Callable[[int, bool], int | None],
    indefinite: int,
    pops: bool,
    truncates: bool = False,
) -> Body:
    """Store ST(0) as ``encode(integer, negative)``, or ``indefinite`` if that is None."""
    size, address = size_of(insn), bind_address(cpu, insn)

    def body() -> None:
        at = address()
        cpu.check_write(at, size)
        data, flags, up = indefinite, 0, False
        if fpu.is_empty(0):
            fpu.underflow()
        else:
            a = fpu.st(0)
            found = to_integer(a, RZERO if truncates else fpu.cw >> 10 & 3)
            encoded = None if found is None else encode(found[0], a & SIGN != 0)
            if found is None or encoded is None:
                fpu.signal(IE)
            else:
                data, flags, up = encoded, PE if found[1] else 0, found[2]
        cpu.write_int(at, data, size)
        fpu.note(flags)
        if flags:
            fpu.rounded_up(up)
        if pops:
            fpu.pop()

    return body


def _bind_integer(
    cpu: Cpu, fpu: Fpu, insn: Insn, pops: bool = True, truncates: bool = False
) -> Body:
    limit = 1 << 8 * size_of(insn) - 1

    def encode(value: int, _negative: bool) -> int | None:
        return value if -limit <= value < limit else None

    return _bind_store(cpu, fpu, insn, encode, limit, pops, truncates)


@instruction("fist")
def fist(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store as an integer, rounded."""
    return _bind_integer(cpu, fpu, insn, pops=False)


@instruction("fistp")
def fistp(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store as an integer, rounded, and pop."""
    return _bind_integer(cpu, fpu, insn)


@instruction("fisttp")
def fisttp(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store as an integer, truncated, and pop."""
    return _bind_integer(cpu, fpu, insn, truncates=True)


@instruction("fbstp")
def fbstp(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store as 18 packed decimal digits and a sign, and pop."""
    return _bind_store(cpu, fpu, insn, encode_decimal, _DECIMAL_INDEFINITE, pops=True)


def encode_decimal(value: int, negative: bool) -> int | None:
    """The ten bytes of a packed decimal as an integer; None if there are too many digits."""
    if abs(value) >= _DECIMAL_LIMIT:
        return None
    return int(str(abs(value)), 16) | (SIGN if negative else 0)


def decode_decimal(data: int) -> int:
    """The register that a packed decimal is: digits beyond 9 count as they are."""
    value = 0
    for shift in range(68, -4, -4):
        value = value * 10 + (data >> shift & 15)
    return pack(data & SIGN != 0, value, 0)


def _bind_load(cpu: Cpu, fpu: Fpu, insn: Insn, decode: Callable[[int], int]) -> Body:
    size, address, read = size_of(insn), bind_address(cpu, insn), cpu.read_int

    def body() -> None:
        value = decode(read(address(), size))
        fpu.push(value if fpu.check_room() else DEFAULT_NAN)

    return body


def from_signed(data: int, size: int) -> int:
    """The register that a signed integer of ``size`` bytes is: always exact."""
    value = data - (1 << 8 * size) if data >> 8 * size - 1 else data
    return pack(value < 0, abs(value), 0)


@instruction("fild")
def fild(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Push a signed integer."""
    size = size_of(insn)
    return _bind_load(cpu, fpu, insn, lambda data: from_signed(data, size))


@instruction("fbld")
def fbld(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Push a packed decimal."""
    return _bind_load(cpu, fpu, insn, decode_decimal)


HANDLERS = [fist, fistp, fisttp, fbstp, fild, fbld]
