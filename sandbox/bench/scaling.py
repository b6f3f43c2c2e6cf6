"""Suite ``scaling``: what grows with processes, code, memory and trapped sites, and what does not.

Here "ours" is the larger case; the peer is the smaller case, or Unicorn in the same case.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sandbox
from sandbox import abi
from sandbox.bench import bare
from sandbox.bench.loops import NEW_INSTRUCTION
from sandbox.bench.measure import Effort, Figure, Result, compare_all, figure, progress
from sandbox.boot import boot_flat
from sandbox.handler import Pack, handler
from sandbox.vm import Vm

SUITE = "scaling"
BLOCKS = (1_000, 10_000, 50_000, 100_000)
SITES = (100, 1_000, 10_000)
MEMORY_MB = (1, 64, 1024, 4096)
TOUCHED_MB = 256
TRAPS = 200_000
_WORK = 40_000_000
"""Iterations of the loop that each process runs."""


def scaling(effort: Effort) -> Iterator[Result]:
    """All four parts."""
    for part in (processes, blocks, memory, sites):
        yield from part(effort)


# -- processes ------------------------------------------------------------------------------------


def processes(effort: Effort) -> Iterator[Result]:
    """Wall time of the same guest in each of N processes at once, beside one alone: 1.0 where
    processes do not hinder each other."""
    for number in range(2, (os.cpu_count() or 1) + 1):
        name = f"{number} processes at once"
        if effort.wants(SUITE, name):
            work = effort.count(_WORK)
            yield from compare_all(
                SUITE, name, "ms", 1e3, partial(at_once, number, work),
                {"one alone": partial(at_once, 1, work)}, effort.rounds or 5,
            )  # fmt: skip


def at_once(number: int, work: int) -> float:
    """The longest wall time of ``number`` processes that start together when all are ready."""
    children = [_child("work", str(work)) for _ in range(number)]
    for child in children:
        child.stdout.readline()
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    return max(float(child.communicate()[0]) for child in children)


def _child(*arguments: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox.bench.scaling_child", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[1])},
    )


# -- translated blocks ----------------------------------------------------------------------------

_DATA = 0x200_0000


def block_code(count: int) -> bytes:
    """``count`` basic blocks, each executed once: five instructions with operands of their own and
    a branch to the next block; HLT at the end."""
    source = random.Random(count)
    blocks = [b"\xbf" + struct.pack("<I", _DATA)]  # mov edi, _DATA
    for _ in range(count):
        register, other = source.sample((0, 1, 2, 3), 2)
        first, second = source.getrandbits(31), 8 * source.getrandbits(16)
        blocks.append(
            b"\x81" + bytes([0xC0 | register]) + struct.pack("<I", first)  # add reg, imm
            + b"\x48\x8b" + bytes([0x87 | other << 3]) + struct.pack("<I", second)  # mov
            + b"\x48\x8d" + bytes([0x44 | register << 3, other | other << 3, first & 0x7F])  # lea
            + b"\x89" + bytes([0x87 | register << 3]) + struct.pack("<I", second)  # mov
            + b"\x39" + bytes([0xC0 | register << 3 | other])  # cmp
            + bytes([0x70 | source.randrange(16), 0])  # jcc to the next
        )  # fmt: skip
    return b"".join(blocks) + b"\xf4"


def blocks(effort: Effort) -> Iterator[Result]:
    """Time per block of code that runs once, beside Unicorn with the same protection: nearly all of
    it is translation. A ratio of 0.77 is 30 % of work on top of Unicorn's own."""
    for count in BLOCKS:
        name = f"{count:,} blocks"
        if effort.wants(SUITE, name):
            count = effort.count(count)
            code = block_code(count)
            yield from compare_all(
                SUITE, name, "us/block", 1e6 / count, partial(once, code),
                {"unicorn-protected": partial(bare.run, code, protect=True)}, effort.rounds or 5,
            )  # fmt: skip


def once(code: bytes) -> float:
    """CPU seconds of a flat guest under the default policy."""
    with Vm() as vm:
        vcpu = boot_flat(vm, code).vcpu
        start = time.process_time()
        vcpu.run()
        return time.process_time() - start


# -- guest memory ---------------------------------------------------------------------------------


def memory(effort: Effort) -> Iterator[Result]:
    """A VM with so much memory, made and run to HLT, beside Unicorn: CPU time, and the resident
    memory that the process gains; then the same after a byte of each page was written."""
    for size in MEMORY_MB:
        name = f"{size:,} MB of memory"
        if effort.wants(SUITE, name):
            yield from _memory(name, size, 0, effort)
    name = f"{TOUCHED_MB} MB of memory written"
    if effort.wants(SUITE, name):
        yield from _memory(name, TOUCHED_MB, TOUCHED_MB, effort)


def _memory(name: str, size: int, touched: int, effort: Effort) -> Iterator[Figure]:
    pairs = []
    for _round in range(effort.rounds or 5):
        progress(f"{SUITE} {name}")
        pairs.append([memory_run(engine, size, touched) for engine in ("sandbox", "unicorn")])
    times = [(ours["seconds"], theirs["seconds"]) for ours, theirs in pairs]
    sizes = [(ours["resident"], theirs["resident"]) for ours, theirs in pairs]
    yield figure(SUITE, f"{name}, start", "ms", 1e3, times, "unicorn")
    yield figure(SUITE, f"{name}, resident", "MB", 1, sizes, "unicorn")


def memory_run(engine: str, size: int, touched: int) -> dict[str, float]:
    """One process; ``seconds`` of CPU and ``resident`` MB gained."""
    output, _ = _child("memory", engine, str(size), str(touched)).communicate()
    result: dict[str, float] = json.loads(output)
    return result


# -- trapped sites --------------------------------------------------------------------------------


@handler(pattern=NEW_INSTRUCTION)
def _nothing(_cpu: object, _insn: object) -> None:
    pass


def sites(effort: Effort) -> Iterator[Result]:
    """Time per trapped instruction where the traps are spread over so many addresses, all met once
    before, beside a single address: 1.0 where the number does not matter."""
    kinds: dict[str, tuple[bytes, tuple[Pack | str, ...]]] = {
        "": (bytes.fromhex(NEW_INSTRUCTION), (Pack.of("nothing", _nothing),)),
        ", vpaddd": (bytes.fromhex("c5 ed fe cb"), ("integer", "avx2")),
    }
    for kind, (instruction, packs) in kinds.items():
        for count in SITES:
            name = f"{count:,} trapped sites{kind}"
            if effort.wants(SUITE, name):
                traps = effort.count(TRAPS)
                many, one = (_sites_run(n, instruction, packs, traps) for n in (count, 1))
                yield from compare_all(
                    SUITE, name, "ns/trap", 1e9 / traps, many, {"one site": one},
                    effort.rounds or 5,
                )  # fmt: skip


def _sites_run(
    count: int, instruction: bytes, packs: tuple[Pack | str, ...], traps: int
) -> Callable[[], float]:
    code = site_code(count, instruction, traps)

    def run() -> float:
        with Vm("baseline", packs) as vm:
            vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
            vcpu = boot_flat(vm, code).vcpu
            vcpu.run()
            start = time.process_time()
            vcpu.run()
            return time.process_time() - start

    return run


def site_code(count: int, instruction: bytes, traps: int) -> bytes:
    """A ring of ``count`` trapped instructions, each followed by ``dec ecx; jz end; jmp next``. It
    is walked twice around up to HLT; when resumed, until ``traps`` have been met."""
    length = len(instruction) + 13
    end = count * length + 5
    parts = [b"\xb9" + struct.pack("<I", 2 * count)]  # mov ecx, 2 * count
    for number in range(count):
        after = 5 + (number + 1) * length
        target = after if number < count - 1 else 5
        parts.append(
            instruction
            + b"\xff\xc9"
            + b"\x0f\x84" + struct.pack("<i", end - (after - 5))
            + b"\xe9" + struct.pack("<i", target - after)
        )  # fmt: skip
    parts.append(b"\xf4\xb9" + struct.pack("<I", traps) + b"\xe9" + struct.pack("<i", -6 - end))
    return b"".join(parts)
