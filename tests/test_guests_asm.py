"""The assembly guests do on the machine what their headers promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests.assemble import assemble_file
from guests.header import Header, read_header
from sandbox import abi
from sandbox.boot import Mode, boot_flat
from sandbox.errors import GuestImageError
from sandbox.exits import Hlt, Io
from sandbox.registers import GPR_NAMES
from sandbox.vm import Vm

GUESTS = sorted((Path(__file__).parent.parent / "guests" / "asm").glob("*.asm"))
MODES: dict[str, Mode] = {"real": "real", "protected": "protected", "long": "long"}
HANDLERS = ("avx2", "system")


def run(code: bytes, header: Header) -> tuple[dict[str, int], dict[int, bytes]]:
    """The registers at the final HLT, and what was written to each port."""
    written: dict[int, bytes] = {}
    with Vm(handlers=HANDLERS) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        vcpu = boot_flat(vm, code, header.base, MODES[header.mode]).vcpu
        vcpu.registers.xcr0 = 7  # x87, SSE, AVX: the guests do not enable them themselves
        while not isinstance(left := vcpu.run(timeout=20), Hlt):
            assert isinstance(left, Io), left
            written[left.port] = written.get(left.port, b"") + left.data
        return dict(zip(GPR_NAMES, vcpu.registers.gpr, strict=True)), written


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


@pytest.mark.parametrize("path", GUESTS, ids=lambda path: path.stem)
def test_guest_ends_as_its_header_says(path: Path) -> None:
    header = read_header(path.read_text(), str(path))
    code = assemble_file(path, header.base, header.bitness)
    registers, written = run(code, header)
    assert header.expect
    assert {name: registers[name] for name in header.expect} == header.expect
    assert written == header.output
    if path.stem == "checksum":
        assert registers["rax"] == fnv1a(code)


def test_header_defaults_to_long_mode_at_0x1000() -> None:
    assert read_header("hlt\n; mode: real") == Header("long", 0x1000, {}, {})


@pytest.mark.parametrize(
    "line", ["; mode: fast", "; base: top", "; expect: rax", "; output: 0x3f8 hello"]
)
def test_unreadable_header_names_its_line(line: str) -> None:
    with pytest.raises(GuestImageError, match=r"^f\.asm:2: cannot read `; "):
        read_header(f"; title\n{line}\n", "f.asm")
