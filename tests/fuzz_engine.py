"""Random bytes as guests: ``python -m tests.fuzz_engine [--seconds N] [--seed N]``.

``confined``: only a few forms are allowed, which change nothing but CF, DF and RIP. Whatever else
changes was done by a forbidden instruction. Long mode in turn with page tables of the guest's own.
``open``: the baseline with all handlers; only the
process is at stake: nothing but an exit or an error of the sandbox's own may come of it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from sandbox.boot import CODE_32, CODE_64, DATA, Machine, Mode
from sandbox.decode import Insn
from sandbox.errors import SandboxError
from sandbox.exits import EmulationFailure, Exit, GuestException, Hlt, Intr, Io, Mmio, Shutdown
from sandbox.registers import CF, DF, DescriptorTable, Segment
from sandbox.stats import TraceRecord
from tests.guest import BASE, MODES, machine, own_tables, policy

ALLOWED = ("clc", "stc", "cmc", "cld", "std", "jmp", "jb", "jae", "je", "jne", "nop", "endbr64")
"""JMP of a register or memory is among them: only its target is of interest."""
SIZE = 0x800
SEED_BYTES = bytes.fromhex(
    "f8 f9 f5 fc fd 90 eb 72 73 74 75 66 f3 f2 2e 64 67 f0 48 41 4c 0f 1f 1e fa c3 e8 e9 ff c5 c4"
    "62 c8 b8 a2 a3 ab 38 3a d9 dd c7 06 8f 82 d6 cc cd ce 0b 05 01 02 04 00"
)
OUTCOMES = (EmulationFailure, GuestException, Hlt, Intr, Io, Mmio, Shutdown)


def soup(rng: random.Random) -> bytes:
    """Random bytes, most of them prefixes, escapes and allowed opcodes."""
    weight = rng.random()
    data = bytearray(
        rng.choice(SEED_BYTES) if rng.random() < weight else rng.randrange(256)
        for _ in range(rng.choice((16, 64, 256)))
    )
    for at, byte in enumerate(data[:-1]):
        if byte in (0xEB, 0x72, 0x73, 0x74, 0x75):
            data[at + 1] &= 0x1F  # forward, mostly into the middle of something
    return bytes(data)


def reset(found: Machine, mode: Mode, rng: random.Random, at: int) -> None:
    """The registers as at the start, random where that is harmless."""
    bank, registers = found.vm.engine.bank, found.vcpu.registers
    if mode == "real":
        bank.write_segment("cs", Segment(type=11))
    else:
        bank.write_segment("cs", CODE_64 if mode == "long" else CODE_32)
    for name in ("ds", "es", "fs", "gs", "ss"):
        bank.write_segment(name, Segment() if mode == "real" else DATA)
    bank.write_table("idtr", DescriptorTable(0, 0))  # no event writes a frame
    bank.write("rflags", 2)
    mask = {"real": 0xFFFF, "protected": 0xFFFF_FFFF, "long": (1 << 64) - 1}[mode]
    for number in range(16):
        value = rng.choice((rng.getrandbits(64), rng.getrandbits(16), at + rng.randrange(64)))
        registers.gpr[number] = value & mask
    registers.rip = at


def confined(mode: Mode, rng: random.Random, until: float) -> Counter[str]:
    """Fuzz one mode; AssertionError when something forbidden ran."""
    tally: Counter[str] = Counter()
    few = policy(allowed=ALLOWED)
    with machine(b"\xf4" * SIZE * 3, mode, policy=few) as found:
        vcpu, memory = found.vcpu, found.vm.memory
        registers = vcpu.registers
        trapped: list[TraceRecord] = []
        vcpu.on_trap = trapped.append
        if mode == "long" and rng.random() < 0.5:
            found.vm.engine.bank.write("cr3", own_tables(found).root)
        while time.process_time() < until:
            code = soup(rng)
            at = rng.choice((BASE, BASE + 0x10, 0x2000 - len(code) // 2, 0x2000 - 3))
            image = bytes(rng.choice((b"\xf4", b"\x90", b"\xff"))) * 16 + code + b"\xf4" * 32
            memory.load(at - 16, image)
            reset(found, mode, rng, at)
            before = registers.gpr.tobytes(), memory.read(0, 0x4000)
            vectors = bytes(registers.images[0][-2048:])
            trapped.clear()
            left = vcpu.run(0.1)
            what = f"{mode} {code.hex()} at {at:#x}: {left} at {registers.rip:#x}"
            assert isinstance(left, OUTCOMES), what
            if all(record.reason != "intercept" for record in trapped):
                after = registers.gpr.tobytes(), memory.read(0, 0x4000)
                assert vectors == bytes(registers.images[0][-2048:]), what
                assert after == before, what
                assert registers.rflags & ~(CF | DF) == 2, what
            if isinstance(left, EmulationFailure) and left.bytes is not None:
                insn = vcpu.instruction()
                assert not (insn.code and few.allows(insn)) or _excused(insn), what
            tally[type(left).__name__] += 1
            if isinstance(left, (Io, Mmio)):  # give up what waits for an answer
                reset(found, mode, rng, BASE + SIZE * 3 - 1)
                assert isinstance(vcpu.run(1), Hlt)
    return tally


def _excused(insn: Insn) -> bool:
    """Allowed, but Unicorn reads it otherwise; or a far jump through memory that is not there."""
    return bool(set(insn.raw) & {0x66, 0xF2, 0xF3}) or "_M16" in insn.form


def unconfined(mode: Mode, rng: random.Random, until: float) -> Counter[str]:
    """Fuzz with everything on."""
    tally: Counter[str] = Counter()
    handlers = ["integer", "avx2", "x87"]
    while time.process_time() < until:
        with machine(b"\xf4" * SIZE * 3, mode, handlers=handlers) as found:
            for _ in range(50):
                code = soup(rng)
                at = rng.choice((BASE, 0x2000 - len(code) // 2))
                found.vm.memory.load(at, code)
                reset(found, mode, rng, at)
                try:
                    left = found.vcpu.run(0.05)
                except SandboxError as error:
                    raise AssertionError(f"{mode} {code.hex()} at {at:#x}") from error
                assert isinstance(left, Exit), f"{mode} {code.hex()} at {at:#x}: {left!r}"
                tally[type(left).__name__] += 1
    return tally


KINDS: dict[str, Callable[[Mode, random.Random, float], Counter[str]]] = {
    "confined": confined,
    "open": unconfined,
}


def main() -> None:
    """Fuzz for a while, all modes in turn; prints how the runs ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    each = options.seconds / len(kinds) / len(MODES)
    for kind in kinds:
        for mode in MODES:
            rng = random.Random(f"{options.seed} {kind} {mode}")
            tally = KINDS[kind](mode, rng, time.process_time() + each)
            print(kind, mode, dict(tally))


if __name__ == "__main__":
    sys.exit(main())
