"""What each operation of the packs costs in the handler tier, as data and as a page.

    python -m sandbox.bench.costs           # writes benchmarks/operations.json, docs/operations.md
    python -m sandbox.bench.costs --add     # the same, keeping what is there where it is less
    python -m sandbox.bench.costs --page    # writes the page of the data that is there

The widest form of each mnemonic with register operands runs in runs of ten within a loop, on the
whole machine and not lowered, so the way to the handler and back is included. Floats are between
0.5 and 0.95, so that repeated products stay normal numbers, and MXCSR.PE is set. Given is the least
of many short runs: most of what a shared machine adds is left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from iced_x86 import EncodingKind

from sandbox import abi
from sandbox.bench.command import about
from sandbox.bench.loops import NEW_INSTRUCTION, RUN, Loop, run_of
from sandbox.bench.measure import Effort
from sandbox.bench.suites import RESTARTABLE
from sandbox.boot import boot_flat
from sandbox.decode import FORM_NAMES, Insn, decode
from sandbox.encodings import Memory, all_forms, encode, features_of, info_of, mnemonic_of
from sandbox.exits import Hlt
from sandbox.gaps import has_memory_operand
from sandbox.handler import Pack
from sandbox.instructions import HANDLER, place_of
from sandbox.policy import Policy
from sandbox.registers import RBX, RCX, RDI, RSI, RSP
from sandbox.run import INSTRUCTION_PACKS
from sandbox.side_effects import SSE_FLOAT
from sandbox.vm import Vm

COUNT, ROUNDS = 40, 60
"""Iterations of a timed run, and how many runs: of these the shortest counts."""
DATA, PAGE = Path("benchmarks/operations.json"), Path("docs/operations.md")
_CRYPTOGRAPHY = frozenset("AES VAES PCLMULQDQ VPCLMULQDQ GFNI SHA SHA512 SM3 SM4".split())
_DOT_PRODUCTS = frozenset("AVX_VNNI AVX_VNNI_INT8 AVX_VNNI_INT16 AVX_IFMA".split())
_FLOATS = frozenset("FMA F16C AVX_NE_CONVERT".split())
_FEATURES = _CRYPTOGRAPHY | _DOT_PRODUCTS | _FLOATS | frozenset("AVX AVX2 BMI1 BMI2".split())
_APPROXIMATE = frozenset("rcpps rcpss rsqrtps rsqrtss".split())
_EXCLUDED = frozenset("vpcmpestri vpcmpestri64 vpcmpistri vmaskmovdqu vzeroall".split())
"""What writes to RCX, which counts, or to any address, or takes the operands away."""
_REGISTERS, _IMMEDIATE = (9, 10, 11, 13), 0xF8
"""The immediate rounds to nearest and takes part in all products of VDPPS."""
_ALL_ONES = "vpcmpeqd ymm11, ymm11, ymm11"
"""Sets the mask that a gather clears."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Nanoseconds of one trapped instruction: the way there and back, and the operation."""

    form: str
    instruction: str
    group: str
    nanoseconds: int


def measured_forms() -> Iterator[int]:
    """The widest form of each mnemonic that a handler runs, registers before memory."""
    best: dict[str, tuple[tuple[bool, int], int]] = {}
    with Vm(handlers=INSTRUCTION_PACKS) as vm:
        for code in all_forms():
            name, features = FORM_NAMES[code], features_of(code)
            vex = info_of(code).encoding == EncodingKind.VEX
            wanted = features <= _FEATURES and (vex or features & _CRYPTOGRAPHY)
            if not wanted or mnemonic_of(code) in _EXCLUDED or place_of(vm, code) != HANDLER:
                continue
            try:
                insn = sample(code)
            except ValueError:
                continue
            widths = (("YMM", 4), ("XMM", 3), ("R64", 2))
            width = next((n for text, n in widths if text in name), 1)
            rank = not has_memory_operand(insn), width
            if rank > best.get(mnemonic_of(code), ((False, 0), 0))[0]:
                best[mnemonic_of(code)] = rank, code
    return iter(code for _rank, code in best.values())


def sample(code: int) -> Insn:
    """The encoding that is measured. ValueError if the form has none with these operands."""
    vsib = Memory(RDI, 12) if "gather" in mnemonic_of(code) else None
    return decode(encode(code, _REGISTERS, vsib, _IMMEDIATE), 64)


def group_of(code: int) -> str:
    """The group that a form is summed up in."""
    name, features = FORM_NAMES[code], features_of(code)
    base = mnemonic_of(code).removeprefix("v")
    if features & _CRYPTOGRAPHY:
        return "cryptography"
    if features & _DOT_PRODUCTS:
        return "dot products"
    if "GATHER" in name:
        return "gathers"
    if features & _FLOATS or base in SSE_FLOAT | _APPROXIMATE:
        kind = "float"
    elif "MM" in name:
        kind = "integer and moves"
    else:
        return "general registers"
    return f"{kind}, {256 if 'YMM' in name else 128} bits"


def nanoseconds(loop: Loop, kind: str, *packs: Pack | str) -> float:
    """Of one of the :data:`~sandbox.bench.loops.RUN` instructions of ``loop``; ``kind`` of lanes is
    ``f4``, ``f8`` or ``u1``, or ``0`` for zeros."""
    policy = Policy.load("baseline").with_exactness(lowering=False)
    best = float("inf")
    with Vm(policy, packs) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        vcpu = boot_flat(vm, loop.code(COUNT)).vcpu
        registers = vcpu.registers
        registers.bank.write("mxcsr", 0x1FA0)
        random = np.random.default_rng(1)
        for number in {*range(16)} - {RCX, RBX, RSP, RSI, RDI}:
            registers.gpr[number] = int(random.integers(1 << 62))
        for _round in range(ROUNDS + 1):
            registers.vec.raw[:] = _lanes(kind)
            start = time.perf_counter()
            left = vcpu.run(10)
            taken = time.perf_counter() - start
            if not isinstance(left, Hlt):
                raise RuntimeError(f"{loop.body}: a benchmark guest ended with {left}")
            best = min(best, taken) if _round else best
    return best / (COUNT * RUN) * 1e9


def _lanes(kind: str) -> bytes:
    random = np.random.default_rng(1)
    if kind in ("f4", "f8"):
        return random.uniform(0.5, 0.95, 2048 // int(kind[1])).astype(kind).tobytes()
    return bytes(2048) if kind == "0" else random.bytes(2048)


def lane_kind(code: int) -> str:
    """What the registers hold while a form is measured."""
    name = mnemonic_of(code)
    if "gather" in name:
        return "0"
    if not group_of(code).startswith("float"):
        return "u1"
    return "f8" if name.endswith(("pd", "sd")) or "pd2" in name or "sd2" in name else "f4"


def costs() -> Iterator[Cost]:
    """One for each form of :func:`measured_forms`."""
    ones = nanoseconds(run_of("ones", _ALL_ONES), "u1", *INSTRUCTION_PACKS)
    for code in measured_forms():
        insn = sample(code)
        body = ".byte " + ", ".join(f"{byte:#x}" for byte in insn.raw)
        gathers = "gather" in insn.mnemonic
        if gathers:
            body = f"{_ALL_ONES}\n{body}"
        found = nanoseconds(run_of(insn.mnemonic, body), lane_kind(code), *INSTRUCTION_PACKS)
        found -= ones if gathers else 0
        yield Cost(FORM_NAMES[code], insn.text(), group_of(code), round(found))


def page(data: dict[str, Any]) -> str:
    """The page in Markdown."""
    found = [Cost(**entry) for entry in data["operations"]]
    lines = [
        "# What operations cost in the handler tier",
        "",
        "Made by `python -m sandbox.bench.costs`; do not edit, run it again. The data is",
        "[benchmarks/operations.json](../benchmarks/operations.json).",
        "",
        f"Nanoseconds of one trapped instruction in a run of ten, the way to the handler and back "
        f"included (a handler that does nothing: {data['trivial']}), on {data['machine']}, Python "
        f"{data['python']}, {data['date']}. Not lowered: a sequence of SSE costs less.",
        "",
        "| Group | Operations | Mean | Least | Most |",
        "|-------|-----------:|-----:|------:|-----:|",
    ]
    for group in sorted({cost.group for cost in found}):
        mine = [cost.nanoseconds for cost in found if cost.group == group]
        mean = round(sum(mine) / len(mine))
        lines.append(f"| {group} | {len(mine)} | {mean} | {min(mine)} | {max(mine)} |")
    lines += ["", "| Instruction | Group | ns |", "|-------------|-------|---:|"]
    for cost in sorted(found, key=lambda cost: (cost.group, cost.instruction)):
        lines.append(f"| `{cost.instruction}` | {cost.group} | {cost.nanoseconds} |")
    return "\n".join(lines) + "\n"


def _data(found: Iterable[Cost]) -> dict[str, Any]:
    loop = run_of("trivial", f".byte {', '.join('0x' + b for b in NEW_INSTRUCTION.split())}")
    known = about(Effort())
    kept = {key: known[key] for key in ("date", "machine", "cores", "kernel", "python")}
    trivial = round(nanoseconds(loop, "u1", RESTARTABLE))
    return {**kept, "trivial": trivial, "operations": [asdict(cost) for cost in found]}


def keep_least(data: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Put into ``data`` the figures that an earlier run on this machine found less."""
    if (data["machine"], data["python"]) != (earlier["machine"], earlier["python"]):
        raise SystemExit(f"{DATA} is of another machine or Python: measure again without --add")
    data["trivial"] = min(data["trivial"], earlier["trivial"])
    known = {cost["form"]: cost["nanoseconds"] for cost in earlier["operations"]}
    for cost in data["operations"]:
        cost["nanoseconds"] = min(cost["nanoseconds"], known.get(cost["form"], 1 << 60))


def main() -> int:
    if "--page" not in sys.argv[1:]:
        data = _data(costs())
        if "--add" in sys.argv[1:]:
            keep_least(data, json.loads(DATA.read_text()))
        DATA.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(json.loads(DATA.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
