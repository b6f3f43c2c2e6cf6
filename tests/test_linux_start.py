"""Process start: the initial stack parsed back, segments with their rights, heap and stack."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from guests.load import ElfImage, LoadSegment
from handlers.linux import Files, Process, start_process
from handlers.linux.memory import HIGHEST, PAGE
from handlers.linux.start import LOAD_BASE
from handlers.linux.start import Machine as Processor
from sandbox.cpu import Fault
from sandbox.errors import GuestImageError
from tests.linux_process import Machine


def image(*segments: LoadSegment, pie: bool = False, executable_stack: bool = False) -> ElfImage:
    return ElfImage(
        name="test",
        entry=segments[0].address + 0x10,
        segments=segments,
        headers_address=segments[0].address + 64,
        header_count=len(segments),
        header_size=56,
        tls=None,
        executable_stack=executable_stack,
        position_independent=pie,
    )


def text(address: int = 0x40_0000, size: int = 0x1800) -> LoadSegment:
    return LoadSegment(address, b"\x90" * size, size, True, False, True)


def data(address: int, content: bytes, size: int) -> LoadSegment:
    return LoadSegment(address, content, size, True, True, False)


SIMPLE = image(text(), data(0x40_3F00, b"D" * 0x200, 0x3000))


@dataclass
class Started:
    """A started process with what its initial stack says."""

    machine: Machine
    process: Process
    entry: int
    rsp: int
    argv: list[bytes] = field(default_factory=list)
    env: list[bytes] = field(default_factory=list)
    auxv: dict[int, int] = field(default_factory=dict)

    def string(self, address: int) -> bytes:
        return self.process.read_string(address, 1 << 20)

    def word(self, address: int) -> int:
        return self.machine.cpu.read_int(address, 8)

    def parse(self) -> Started:
        """Walk the stack as the System V ABI lays it out, figure 3.9."""
        count, at = self.word(self.rsp), self.rsp + 8
        self.argv = [self.string(self.word(at + 8 * i)) for i in range(count)]
        at += 8 * count
        assert self.word(at) == 0
        at += 8
        while self.word(at):
            self.env.append(self.string(self.word(at)))
            at += 8
        at += 8
        while self.word(at):
            assert self.word(at) not in self.auxv
            self.auxv[self.word(at)] = self.word(at + 8)
            at += 16
        return self


def start(
    program: ElfImage = SIMPLE,
    argv: Sequence[str | bytes] = ("test",),
    env: dict[str, str] | None = None,
    *,
    ram: int = 64 << 20,
    seed: int | None = 0,
    processor: Processor | None = None,
) -> Started:
    machine = Machine(ram)
    process, entry, rsp = start_process(
        machine.cpu,
        program,
        argv,
        env,
        space=machine.space,
        frames=machine.frames,
        files=Files(),
        seed=seed,
        machine=processor,
    )
    assert machine.cpu.services["linux"] is process
    return Started(machine, process, entry, rsp).parse()


@pytest.mark.parametrize("count", range(5))
def test_arguments_and_environment(count: int) -> None:
    argv = [f"argument{i}" * i for i in range(count)]
    env = {f"NAME{i}": "value" * i for i in range(count)}
    started = start(argv=argv, env=env)
    assert started.argv == [a.encode() for a in argv]
    assert started.env == [f"{n}={v}".encode() for n, v in env.items()]
    assert started.rsp % 16 == 0
    assert started.entry == 0x40_0010


def test_arguments_that_are_no_unicode() -> None:
    assert start(argv=[b"\xff\xfe", "\udcff", ""]).argv == [b"\xff\xfe", b"\xff", b""]


def test_auxiliary_vector() -> None:
    started = start(argv=["/bin/prog"], processor=Processor(hwcap=0x1234, hwcap2=2))
    auxv = started.auxv
    assert auxv[3] == 0x40_0040 and auxv[4] == 56 and auxv[5] == 2
    assert auxv[6] == 4096 and auxv[7] == 0 and auxv[8] == 0 and auxv[9] == started.entry
    assert auxv[11] == auxv[12] == 1000 and auxv[13] == auxv[14] == 1000
    assert auxv[16] == 0x1234 and auxv[26] == 2 and auxv[17] == 100 and auxv[23] == 0
    assert started.string(auxv[15]) == b"x86_64"
    assert started.string(auxv[31]) == b"/bin/prog"
    assert 33 not in auxv and 32 not in auxv  # no vDSO


def test_random_bytes_are_reproducible_unless_asked_otherwise() -> None:
    def secret(started: Started) -> bytes:
        return started.machine.cpu.read(started.auxv[25], 16)

    assert secret(start()) == secret(start()) != bytes(16)
    assert secret(start(seed=1)) != secret(start(seed=0))
    assert secret(start(seed=None)) != secret(start(seed=None))


def test_the_guest_does_not_learn_host_directories() -> None:
    assert start(argv=["../here/prog"]).process.executable == b"/prog"
    assert start(argv=[]).process.executable == b"/test"


def rights(machine: Machine, address: int) -> str:
    found = ""
    for letter, probe in (
        ("r", lambda: machine.memory.read(address, 1)),
        ("w", lambda: machine.memory.check_write(address, 1)),
        ("x", lambda: machine.memory.fetch(address, 1)),
    ):
        try:
            probe()
        except Fault:
            found += "-"
        else:
            found += letter
    return found


def test_segments_have_their_contents_and_rights() -> None:
    started = start()
    machine, read = started.machine, started.machine.cpu.read
    assert read(0x40_0000, 0x2000) == (b"\x90" * 0x1800).ljust(0x2000, b"\0")
    assert rights(machine, 0x40_0000) == rights(machine, 0x40_1FFF) == "r-x"
    assert rights(machine, 0x40_2000) == "---"
    assert rights(machine, 0x40_3000) == rights(machine, 0x40_6FFF) == "rw-"
    assert rights(machine, 0x40_7000) == "---"


def test_what_lies_behind_the_file_bytes_is_zero() -> None:
    read = start().machine.cpu.read
    assert read(0x40_3F00, 0x200) == b"D" * 0x200
    assert read(0x40_4100, 0x2F00) == bytes(0x2F00)
    assert read(0x40_3000, 0xF00) == bytes(0xF00)


def test_segments_that_share_a_page_keep_both_contents_and_rights() -> None:
    first, second, third = (
        LoadSegment(0x40_0000, b"A" * 0x1100, 0x1100, True, False, True),
        LoadSegment(0x40_1100, b"B" * 0x100, 0x100, True, False, False),
        LoadSegment(0x40_1200, b"C" * 0x100, 0x2000, True, True, False),
    )
    started = start(image(first, second, third))
    assert started.machine.cpu.read(0x40_10FF, 0x301) == (
        b"A" + b"B" * 0x100 + b"C" * 0x100 + bytes(0x100)
    )
    assert rights(started.machine, 0x40_0000) == "r-x"
    assert rights(started.machine, 0x40_1000) == "rwx"
    assert rights(started.machine, 0x40_2000) == "rw-"
    assert rights(started.machine, 0x40_4000) == "---"


def test_the_heap_begins_behind_the_program() -> None:
    memory = start().process.memory
    assert memory.brk == 0x40_7000
    assert memory.set_brk(0x40_7010) == 0x40_7010


def test_the_stack_is_eight_megabytes_with_a_gap_below() -> None:
    started = start()
    bottom = HIGHEST - (8 << 20)
    assert rights(started.machine, bottom) == "rw-"
    assert rights(started.machine, HIGHEST - 1) == "rw-"
    assert rights(started.machine, bottom - 1) == "---"
    assert started.process.memory.find_gap(PAGE) + PAGE <= bottom - (1 << 20)


def test_an_executable_stack_only_if_the_program_asks() -> None:
    assert rights(start(image(text(), executable_stack=True)).machine, HIGHEST - 8) == "rwx"


def test_a_position_independent_program_is_moved() -> None:
    started = start(image(text(0), data(0x3000, b"x", 0x10), pie=True))
    assert started.entry == LOAD_BASE + 0x10 == started.auxv[9]
    assert started.auxv[3] == LOAD_BASE + 64
    assert started.machine.cpu.read(LOAD_BASE, 1) == b"\x90"
    assert started.process.memory.brk == LOAD_BASE + 0x4000


def test_what_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(GuestImageError, match="do not fit into the guest's memory"):
        start(image(text(), data(0x50_0000, b"", 1 << 30)))
    with pytest.raises(GuestImageError, match="do not fit into the guest's memory"):
        start(ram=4 << 20)
    with pytest.raises(GuestImageError, match="more than 2097152 bytes"):
        start(argv=["x" * (3 << 20)])


def test_stack_words_are_what_a_c_start_file_expects() -> None:
    started = start(argv=["a", "b"], env={"K": "v"})
    raw = started.machine.cpu.read(started.rsp, 8 * 6)
    count, first, second, end, variable, last = struct.unpack("<6Q", raw)
    assert (count, end, last) == (2, 0, 0)
    assert first < second < variable  # strings in order, as some programs assume
