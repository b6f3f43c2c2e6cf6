"""Random and special machine states for differential tests, shaped to an instruction.

Vector registers hold what the instruction is likely to stumble over: special integers, shift
counts, NaNs (quiet and signalling), infinities, zeros, denormals, values at the edges of
conversions. Memory operands land in the test memory of :mod:`sandbox.native`: aligned, misaligned,
at its very end, and, if faults are wanted, across it or on the read-only page.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from iced_x86 import (
    CodeSize,
    InstructionInfoFactory,
    MemorySizeInfo,
    Register,
    RegisterExt,
    RegisterInfo,
)

from sandbox.decode import Insn
from sandbox.native import CODE, DATA, END, READONLY, REGION, REGION_SIZE, State
from sandbox.registers import DF, RCX
from sandbox.xsave import full_tags

_SPECIAL_INTS = (0, 1, 2, 3, 0x1F, 0x20, 0x3F, 0x40, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF,
                 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 63) - 1, (1 << 64) - 1,
                 (1 << 64) - 0x80, (1 << 64) - 0x8000, 0x0123456789ABCDEF)  # fmt: skip
_SPECIAL = np.array(_SPECIAL_INTS, np.uint64)
_BYTE, _ONE = np.uint64(0xFF), np.uint64(1)

_GS_BASE = 0x1240
_POOL = 2048
_BLOCK = 16
"""Random registers are made for so many states at once."""
_FLOATS = {"f2": (10, 5), "f4": (23, 8), "f8": (52, 11)}
"""Mantissa and exponent bits."""

_SUFFIX = re.compile(r"([ps])([hsd])(?:_|$|[0-9])")
_FLOAT_OF = {"h": "f2", "s": "f4", "d": "f8"}
_FLOAT_NAMES = re.compile(r"^v?(add|sub|mul|div|sqrt|min|max|f?n?m?(add|sub)|cmp|u?comi|round|dp|"
                          r"hadd|hsub|cvt|rcp|rsqrt|range|reduce|get|scalef|fixup|fm|fnm|fpclass|"
                          r"rndscale|exp2|fc)")  # fmt: skip
_BIT_STRINGS = frozenset(("bt", "bts", "btr", "btc"))
_GPR_NUMBER = {
    getattr(Register, name): number
    for number, name in enumerate(
        "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()
    )
}


def float_type(insn: Insn) -> str | None:
    """Lane type ``f2 f4 f8`` if the instruction computes with floats, by its name; else None."""
    name = insn.mnemonic
    found = _SUFFIX.search(name)
    if not found or not _FLOAT_NAMES.match(name):
        return None
    return _FLOAT_OF[found.group(2)]


def _special_floats(kind: str) -> list[int]:
    mantissa, exponent = _FLOATS[kind]
    bias = (1 << exponent - 1) - 1
    top = (1 << exponent) - 1

    def bits(e: int, m: int) -> int:
        return e << mantissa | m

    positive = [
        bits(0, 0), bits(0, 1), bits(0, (1 << mantissa) - 1), bits(0, 1 << mantissa - 1),
        bits(1, 0), bits(1, 1), bits(top - 1, (1 << mantissa) - 1), bits(top, 0),
        bits(top, 1), bits(top, 0x155), bits(top, 1 << mantissa - 1),
        bits(top, 1 << mantissa - 1 | 0x2A), bits(top, (1 << mantissa) - 1),
        bits(bias, 0), bits(bias, 1), bits(bias - 1, 0), bits(bias - 1, (1 << mantissa) - 1),
        bits(bias + 1, 1 << mantissa - 2), bits(bias, 1 << mantissa - 1), bits(bias - 1, 1),
    ]  # fmt: skip
    for edge in (7, 8, 15, 16, 31, 32, 63, 64, 52, 23):  # where conversions begin to overflow
        if bias + edge < top:
            positive += [bits(bias + edge, 0), bits(bias + edge - 1, (1 << mantissa) - 1)]
    return positive + [v | 1 << mantissa + exponent for v in positive]


def _float_pool(kind: str, rng: np.random.Generator) -> npt.NDArray[Any]:
    mantissa, exponent = _FLOATS[kind]
    size = 1 + mantissa + exponent
    unsigned = np.dtype(f"u{size // 8}")
    shape = (_POOL, 512 // size)
    bias = (1 << exponent - 1) - 1
    raw = rng.integers(0, 1 << 64, shape, np.uint64) & np.uint64((1 << size) - 1)
    fraction = raw & np.uint64((1 << mantissa) - 1)
    sign = raw & np.uint64(1 << size - 1)
    near = rng.integers(bias - 4, bias + 5, shape).astype(np.uint64) << np.uint64(mantissa)
    special = rng.choice(np.array(_special_floats(kind), np.uint64), shape)
    # products and quotients at the edge of the range
    edges = rng.choice(np.array([1, 2, bias // 2, bias + bias // 2, 2 * bias], np.uint64), shape)
    extreme = sign | fraction | edges << np.uint64(mantissa)
    row_kind = rng.integers(0, 8, (_POOL, 1))
    some = rng.integers(0, 4, shape) == 0
    normal = sign | fraction | near
    mixed = np.where(some, special, normal)
    pool = np.select(
        [row_kind < 2, row_kind < 5, row_kind == 5, row_kind == 6],
        [normal, mixed, special, np.where(some, special, extreme)],
        raw,
    )
    rows: npt.NDArray[Any] = pool.astype(unsigned).view("u1").reshape(_POOL, 64)
    return rows


def _int_pool(rng: np.random.Generator) -> npt.NDArray[Any]:
    rows = []
    for size in (1, 2, 4, 8):
        shape = (_POOL // 4, 64 // size)
        limit = np.uint64((1 << 8 * size) - 1)
        raw = rng.integers(0, 1 << 64, shape, np.uint64)
        special = rng.choice(np.array(_SPECIAL_INTS, np.uint64), shape)
        small = rng.integers(0, 8 * size + 2, shape, np.uint64)
        row_kind = rng.integers(0, 6, (shape[0], 1))
        some = rng.integers(0, 3, shape) == 0
        lanes = np.select(
            [row_kind < 2, row_kind == 2, row_kind == 3, row_kind == 4],
            [raw, np.where(some, special, raw), special, small],
            raw[:, :1],
        )
        rows.append((lanes & limit).astype(f"u{size}").view("u1").reshape(-1, 64))
    return np.concatenate(rows)


def _integers(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """For general registers: any bits, any width, bytes, special values."""
    kind = rng.integers(0, 8, shape)
    bits = rng.integers(0, 1 << 64, shape, np.uint64)
    width = rng.integers(0, 64, shape, np.uint64)
    special = rng.choice(_SPECIAL, shape)
    return np.select([kind < 3, kind == 3, kind == 4], [bits, bits >> width, bits & _BYTE], special)


def _masks(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """For opmask registers: any bits in half of them, all or none in the others."""
    bits = rng.integers(0, 1 << 64, shape, np.uint64)
    return np.where(rng.integers(0, 2, shape, bool), bits, -(bits & _ONE))


@lru_cache(maxsize=8)
def _pool(kind: str) -> npt.NDArray[Any]:
    """``_POOL`` register contents, shape (n, 64) of bytes: ``u`` integers, or floats."""
    rng = np.random.default_rng(len(kind) * 1000 + ord(kind[-1]))
    return _int_pool(rng) if kind == "u" else _float_pool(kind, rng)


def has_mmx_register(insn: Insn) -> bool:
    """Whether an operand is an MMX register."""
    iced = insn.iced
    return any(RegisterExt.is_mm(iced.op_register(i)) for i in range(iced.op_count))


def uses_x87(insn: Insn) -> bool:
    """Whether the instruction looks at the x87 state or changes it."""
    by_feature = any(f.startswith(("FPU", "MMX", "D3NOW")) for f in insn.features)
    return by_feature or has_mmx_register(insn)


@lru_cache(maxsize=8)
def _mixed_pool(lane: str | None, converts: bool) -> npt.NDArray[Any]:
    """What stands in vector registers for instructions on such floats (None: on integers)."""
    if lane is None:
        parts = [_pool("u")] * 4 + [_pool("f4"), _pool("f8")]
    elif converts:
        parts = [_pool(lane)] * 2 + [_pool("u"), _pool("f4"), _pool("f8"), _pool("f2")]
    else:
        parts = [_pool(lane)] * 5 + [_pool("u")]
    return np.concatenate(parts)


class Cases:
    """A source of states for one instruction. The same seed gives the same states.

    ``faults``: some memory operands lie where they fault. ``mxcsr``: values to choose from
    instead of random rounding modes, FTZ, DAZ, flags, and (for float instructions) masks; then the
    x87 unit, too, is asked for full precision and masked exceptions only.
    """

    def __init__(
        self, insn: Insn, seed: int = 0, faults: bool = True, mxcsr: Sequence[int] | None = None
    ) -> None:
        self.insn = insn
        self.faults = faults
        self.mxcsr = mxcsr
        self.rng = random.Random(f"{insn.raw.hex()} {seed}")
        self._numbers = np.random.default_rng(self.rng.getrandbits(64))
        self._pool = _mixed_pool(float_type(insn), "cvt" in insn.mnemonic)
        self._noise = self.rng.randbytes(REGION_SIZE)
        self._memory = list(InstructionInfoFactory().info(insn.iced).used_memory())
        self._mmx = has_mmx_register(insn)
        self._x87 = uses_x87(insn)
        self._float = float_type(insn) is not None
        self._registers = self._blocks()

    def take(self, count: int) -> list[State]:
        return [self.state() for _ in range(count)]

    def state(self) -> State:
        rng = self.rng
        vectors, gpr, opmask = next(self._registers)
        self._equal_lanes(vectors)
        state = State(
            gpr=gpr,
            rflags=0x202 | rng.getrandbits(12) & 0x8D5,
            mxcsr=self._control(),
            opmask=opmask,
            memory=self._noise,
        )
        if self.insn.iced.is_string_instruction:
            state.rflags |= DF * (rng.random() < 0.3)
            state.gpr[RCX] = rng.randrange(12)
        if self._x87:
            self._fill_x87(state)
        if self._mmx:
            self._fill_mmx(state)
        self._bit_string(state)
        for used in self._memory:
            self._place(state, vectors, used)
        state.vectors = vectors.tobytes()
        return state

    def _blocks(self) -> Iterator[tuple[npt.NDArray[Any], list[int], list[int]]]:
        """Without end: vectors of shape (32, 64), 16 integers, 8 masks."""
        numbers, pool = self._numbers, self._pool
        while True:
            vectors = pool[numbers.integers(0, len(pool), (_BLOCK, 32))]
            gpr = _integers(numbers, (_BLOCK, 16)).tolist()
            yield from zip(vectors, gpr, _masks(numbers, (_BLOCK, 8)).tolist(), strict=True)

    def _control(self) -> int:
        rng = self.rng
        if self.mxcsr is not None:
            return rng.choice(self.mxcsr)
        value = 0x1F80 | rng.randrange(4) << 13 | (rng.getrandbits(6) & rng.getrandbits(6))
        if rng.random() < 0.3:
            value |= rng.choice((0x40, 0x8000, 0x8040))
        if self._float and rng.random() < 0.15:
            value &= ~(rng.getrandbits(6) << 7)
        return value

    def _equal_lanes(self, vectors: npt.NDArray[Any]) -> None:
        """In a third of the cases some lanes are equal between registers."""
        if self.rng.random() < 0.33:
            lane = self.rng.choice((1, 2, 4, 8, 16, 64))
            equal = self._numbers.integers(0, 2, 64 // lane, bool).repeat(lane)
            np.copyto(vectors, vectors[self.rng.randrange(32)].copy(), where=equal)

    def _fill_x87(self, state: State) -> None:
        rng = self.rng
        for number in range(8):
            exponent = rng.choice((0, 0x7FFF, 0x3FFF, rng.randrange(1, 0x7FFF), 0x3FFF + 20))
            fraction = rng.choice((0, 1 << 62, rng.getrandbits(63)))
            integer_bit = exponent != 0
            state.st[number] = rng.getrandbits(1) << 79 | exponent << 64 | integer_bit << 63
            state.st[number] |= fraction
        state.fpcw = 0x37F & ~0xC00 | rng.randrange(4) << 10
        if self.mxcsr is None:
            self._narrow_x87(state)
        state.fpsw = rng.randrange(8) << 11 | rng.getrandbits(4) << 8
        top = state.fpsw >> 11 & 7
        state.fptag = full_tags(self._used_registers(top), top, state.st)

    def _narrow_x87(self, state: State) -> None:
        """Sometimes a lower precision, sometimes exceptions that are not masked."""
        kind = self.rng.random()
        if kind < 0.2:
            state.fpcw = state.fpcw & ~0x300 | self.rng.choice((0, 0x200))
        elif kind < 0.35:
            state.fpcw &= ~self.rng.getrandbits(6)

    def _used_registers(self, top: int) -> int:
        """A bit for each physical register: mostly there is room for a push, sometimes none,
        sometimes any are empty."""
        kind = self.rng.random()
        if kind < 0.25:
            return 0xFF
        if kind < 0.75:
            return 0xFF & ~(1 << (top - 1 & 7) | 1 << (top - 2 & 7))
        return self.rng.getrandbits(8)

    def _fill_mmx(self, state: State) -> None:
        """Lanes as in vector registers, some of them equal; some x87 registers are empty."""
        rng, (rows, _gpr, _masks) = self.rng, next(self._registers)
        self._equal_lanes(rows)
        for number in range(8):
            low = int.from_bytes(rows[number, :8].tobytes(), "little")
            state.st[number] = rng.choice((0xFFFF, 0x3FFF, 0)) << 64 | low
        used = rng.choice((0, 0xFF, rng.getrandbits(8)))
        state.fptag = full_tags(used, state.fpsw >> 11 & 7, state.st)

    def _bit_string(self, state: State) -> None:
        iced = self.insn.iced
        if self.insn.mnemonic in _BIT_STRINGS and self._memory and iced.op_count == 2:
            number = _full_gpr(iced.op1_register)
            if number is not None:
                state.gpr[number] = self.rng.randrange(-1024, 1024) & (1 << 64) - 1

    def _target(self, size: int) -> int:
        """An address for an operand of ``size`` bytes."""
        rng, place = self.rng, self.rng.random()
        if place < 0.55:
            return rng.randrange(DATA + 0x1000, DATA + 0x3000, 64)
        if place < 0.75:
            return rng.randrange(DATA + 0x1000, DATA + 0x3000)
        if place < 0.82 or not self.faults:
            return END - size
        if place < 0.88:
            return END - rng.randrange(size)
        if place < 0.93:
            return rng.randrange(READONLY.start, READONLY.stop, 64)
        if place < 0.96:
            return DATA - rng.randrange(size)
        if place < 0.99:
            return REGION - rng.randrange(1, size + 1)
        return 0x8000_0000_0000_0000

    def _place(self, state: State, vectors: npt.NDArray[Any], used: Any) -> None:
        """Set the address registers of one memory operand, and mostly the bytes there."""
        size = max(MemorySizeInfo(used.memory_size).size, 1)
        base, offset = _full_gpr(used.base), used.displacement
        width = address_width(used)
        garbage = self.rng.getrandbits(64) & -1 << width  # above a 32-bit address
        if used.segment == Register.GS:
            state.gs_base = _GS_BASE
            offset += _GS_BASE
        if used.vsib_size:
            target = DATA + 0x1800
            self._place_indices(vectors, used)
        elif base is None and self.insn.iced.is_ip_rel_memory_operand:
            target = CODE + offset & (1 << 64) - 1
        else:
            target = self._target(size) & (1 << width) - 1
            index = _full_gpr(used.index)
            if index is not None:
                value = self.rng.randrange(-16, 16)
                is_byte = RegisterInfo(used.index).size == 1  # AL, of XLAT
                state.gpr[index] = value & 15 if is_byte else value & (1 << width) - 1 | garbage
                offset += value * used.scale if not is_byte else value & 15
        if base is not None:
            state.gpr[base] = target - offset & (1 << width) - 1 | garbage
        if not REGION <= target <= END - size or self.rng.random() < 0.1:
            return
        if self.rng.random() < 0.2:
            content = b"".join(v.to_bytes(8, "little") for v in (state.gpr[0], state.gpr[2])) * 4
        else:
            content = self._pool[self.rng.randrange(len(self._pool))].tobytes()
        state.store(target, content[:size])

    def _place_indices(self, vectors: npt.NDArray[Any], used: Any) -> None:
        """Small indices for a gather or scatter; sometimes one that leads out of the memory."""
        number = RegisterInfo(used.index).number
        lanes = vectors[number].view(f"i{used.vsib_size}")
        lanes[:] = self._numbers.integers(-200, 200, len(lanes))
        if self.faults and self.rng.random() < 0.15:
            lanes[self.rng.randrange(len(lanes))] = 0x4000


def _full_gpr(register: Any) -> int | None:
    if register == Register.NONE:
        return None
    return _GPR_NUMBER.get(RegisterInfo(register).full_register)


def address_width(used: Any) -> int:
    """Address size in bits of one of iced-x86's used memory operands."""
    return 32 if used.address_size == CodeSize.CODE32 else 64


def linear_address(insn: Insn, used: Any, state: State) -> int | None:
    """Where a used memory operand of an instruction at ``native.CODE`` lies; None: many places."""
    if used.vsib_size:
        return None
    address: int = used.displacement
    if used.base == Register.NONE and insn.iced.is_ip_rel_memory_operand:
        address += CODE
    base, index = _full_gpr(used.base), _full_gpr(used.index)
    if base is not None:
        address += state.gpr[base]
    if index is not None:
        value = state.gpr[index] & (1 << 8 * RegisterInfo(used.index).size) - 1
        address += value * used.scale
    address &= (1 << address_width(used)) - 1
    return address + (state.gs_base if used.segment == Register.GS else 0) & (1 << 64) - 1
