"""One instruction, the state it starts from and what a CPU made of it, as compact data.

All registers are zero but those named, and the test memory holds :data:`PATTERN` but where said::

    {"insn": "660ffeca", "in": {"vec": {"1": "01000000.."}, "mxcsr": 8064},
     "out": {"vec": {"1": "02000000.."}}}                    # only what changed
    {"insn": "8b06", "in": {"gpr": {"6": 0}}, "fault": [14, 4, 0]}
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from iced_x86 import InstructionInfoFactory, MemorySizeInfo, Register, RegisterExt, RegisterInfo

from sandbox.cases import linear_address, uses_x87
from sandbox.decode import Insn, decode
from sandbox.native import END, REGION, REGION_SIZE, Result, State, Trap

Record: TypeAlias = dict[str, Any]

PATTERN: Final = random.Random("test memory").randbytes(REGION_SIZE)
_SCALARS = ("rflags", "mxcsr", "fpcw", "fpsw", "fptag", "gs_base")
_INITIAL = State(memory=PATTERN)


def reduced(insn: Insn, state: State) -> State:
    """The state with only what ``insn`` may look at; the rest as in an empty record."""
    info = InstructionInfoFactory().info(insn.iced)
    less = State(memory=PATTERN, rflags=state.rflags, mxcsr=state.mxcsr, gs_base=state.gs_base)
    for used in info.used_registers():
        full = RegisterInfo(used.register).full_register
        number = RegisterInfo(full).number
        if RegisterExt.is_gpr(full):
            less.gpr[number] = state.gpr[number]
        elif RegisterExt.is_vector_register(full):
            less.set_vector(number, state.vector(number))
        elif Register.K0 <= full <= Register.K7:
            less.opmask[number] = state.opmask[number]
    for memory in info.used_memory():
        address, size = linear_address(insn, memory, state), MemorySizeInfo(memory.memory_size).size
        if address is not None:
            start, end = max(address, REGION), min(address + max(size, 16), END)
            if start < end:
                less.store(start, state.load(start, end - start))
    if uses_x87(insn):
        less.st = state.st[:]
        less.fpcw, less.fpsw, less.fptag = state.fpcw, state.fpsw, state.fptag
    return less


def make_record(insn: Insn, before: State, native: Result) -> Record:
    """The record of a case that ran on hardware."""
    record: Record = {"insn": insn.raw.hex(), "in": _changes(_INITIAL, before)}
    after = _changes(before, native.state)
    if after:
        record["out"] = after
    if native.fault:
        trap = native.fault
        record["fault"] = [trap.vector, trap.error_code, trap.address]
    return record


def read_record(record: Record) -> tuple[Insn, State, Result]:
    """The instruction, the state before, and what the hardware made of it."""
    before = _apply(_INITIAL, record["in"])
    fault = record.get("fault")
    trap = Trap(fault[0], fault[1], fault[2], 0, 0) if fault else None
    return (
        decode(bytes.fromhex(record["insn"]), 64),
        before,
        Result(_apply(before, record.get("out", {})), trap),
    )


def _changes(old: State, new: State) -> Record:
    found: Record = {n: getattr(new, n) for n in _SCALARS if getattr(new, n) != getattr(old, n)}
    for name, a, b in (("gpr", old.gpr, new.gpr), ("k", old.opmask, new.opmask)):
        items = {str(i): y for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}
        if items:
            found[name] = items
    if old.st != new.st:
        found["st"] = [f"{value:x}" for value in new.st]
    vectors = {}
    for number in range(32):
        if old.vector(number) != new.vector(number):
            vectors[str(number)] = new.vector(number).rstrip(b"\0").hex()
    if vectors:
        found["vec"] = vectors
    memory = {f"{at:x}": data.hex() for at, data in _spans(old.memory, new.memory)}
    if memory:
        found["memory"] = memory
    return found


def _spans(old: bytes, new: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of 16-byte rows that differ, neighbours joined."""
    start: int | None = None
    for at in range(0, len(new) + 16, 16):
        differs = old[at : at + 16] != new[at : at + 16]
        if differs and start is None:
            start = at
        elif not differs and start is not None:
            yield start, new[start:at]
            start = None


def _apply(base: State, changes: Record) -> State:
    state = base.copy()
    for name in _SCALARS:
        if name in changes:
            setattr(state, name, changes[name])
    for key, values in (("gpr", state.gpr), ("k", state.opmask)):
        for number, value in changes.get(key, {}).items():
            values[int(number)] = value
    if "st" in changes:
        state.st = [int(value, 16) for value in changes["st"]]
    for number, data in changes.get("vec", {}).items():
        state.set_vector(int(number), bytes.fromhex(data).ljust(64, b"\0"))
    for at, data in changes.get("memory", {}).items():
        state.store(REGION + int(at, 16), bytes.fromhex(data))
    return state
