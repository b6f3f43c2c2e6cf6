"""The report of a run, as data: why it ended, the registers, where the time went."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sandbox.errors import SandboxError
from sandbox.exits import EmulationFailure, Exit
from sandbox.registers import GPR_NAMES, Registers
from sandbox.stats import Stats

REPORT_VERSION = 1


def registers_data(registers: Registers) -> dict[str, str]:
    """GPRs, RIP, RFLAGS, MXCSR, ZMM0-31 and k0-k7 as hex (vectors: most significant first)."""
    found = {name: f"{registers.gpr[n]:#018x}" for n, name in enumerate(GPR_NAMES)}
    found["rip"] = f"{registers.rip:#018x}"
    found["rflags"] = f"{registers.rflags:#010x}"
    found["mxcsr"] = f"{registers.mxcsr:#010x}"
    for number in range(32):
        found[f"zmm{number}"] = "0x" + registers.vec.read(number)[::-1].hex()
    for number in range(8):
        found[f"k{number}"] = f"{registers.opmask[number]:#018x}"
    return found


def exit_data(left: Any, status: int) -> dict[str, Any]:
    """What :meth:`Vcpu.run` returned, with the exit status that the command ends with."""
    data: dict[str, Any] = {"status": status}
    data["name"] = left.name if isinstance(left, Exit) else type(left).__name__
    if isinstance(left, EmulationFailure):
        data["flags"] = left.flags
        data["insn_size"] = left.insn_size
        data["insn_bytes"] = left.insn_bytes.hex()
    elif is_dataclass(left) and not isinstance(left, type):
        for field in fields(left):
            value = getattr(left, field.name)
            data[field.name] = value.hex() if isinstance(value, bytes) else value
    return data


def stats_data(stats: Stats) -> dict[str, Any]:
    """Seconds on the fast path and in the handler tier, how often and for what."""
    return {
        "fast_path_seconds": stats.fast_seconds,
        "fallback_seconds": stats.fallback_seconds,
        "fallback_count": stats.fallback_count,
        "lowered_count": sum(stats.lowered.values()),
    }


def report_data(left: Any, status: int, registers: Registers, stats: Stats) -> dict[str, Any]:
    """The whole report, ready for JSON."""
    return {
        "report_version": REPORT_VERSION,
        "exit": exit_data(left, status),
        "registers": registers_data(registers),
        "stats": stats_data(stats),
        "by_mnemonic": _ranked(stats.by_mnemonic),
        "lowered": _ranked(stats.lowered),
        "notices": [{"rip": f"{n.rip:#x}", "text": n.text} for n in stats.notices],
    }


def _ranked(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write_report(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` as JSON, whole or not at all."""
    text = json.dumps(data, indent=2) + "\n"
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError as error:
        raise SandboxError(f"{path}: the report cannot be written: {error.strerror}") from error
