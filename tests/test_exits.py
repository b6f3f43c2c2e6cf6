"""Exits survive kvm_run unchanged, and emulation failures look as the kernel makes them."""

from __future__ import annotations

import pytest

from sandbox import abi
from sandbox.exits import (
    Debug,
    EmulationFailure,
    Exit,
    FailEntry,
    GuestException,
    Hlt,
    InternalError,
    Intr,
    Io,
    MemoryFault,
    Mmio,
    Other,
    RunPage,
    Shutdown,
    Unknown,
    X86Rdmsr,
    X86Wrmsr,
    emulation_failure_page,
    insn_fetch_size,
    read_exit,
)  # fmt: skip

VADDPS = bytes.fromhex("c5f858c1")
FLDS = bytes.fromhex("d900")

EXAMPLES = [
    Unknown(0x123),
    GuestException(6, 0),
    Hlt(),
    Shutdown(),
    Intr(),
    Io(abi.KVM_EXIT_IO_OUT, 0x3F8, 1, data=b"A"),
    Io(abi.KVM_EXIT_IO_IN, 0x3FD, 2, 3, bytes(range(6))),
    Mmio(0xFEE000B0, 4, True, b"\1\2\3\4"),
    Mmio(0xFEE00030, 8, False, bytes(8)),
    Debug(3, 0x1000, 0xFFFF0FF0, 0x400),
    FailEntry(0x80000021, 1),
    MemoryFault(abi.KVM_MEMORY_EXIT_FLAG_PRIVATE, 0x1234000, 0x1000),
    X86Rdmsr(0xC0000080, 5, 0, abi.KVM_MSR_EXIT_REASON_FILTER),
    X86Wrmsr(0x10, 0xFFFF_FFFF_FFFF_FFFF, 1),
    InternalError(abi.KVM_INTERNAL_ERROR_DELIVERY_EV, (1, 2, 3)),
    EmulationFailure.of(VADDPS),
    EmulationFailure.of(None, (0x1000, 0, 0, 0, 0)),
    Other(33, bytes(range(256))),
]


def failure(*words: int, ndata: int | None = None, suberror: int = 1) -> EmulationFailure:
    """Read what a kernel with these words in ``internal.data`` would send."""
    page = RunPage(bytearray(b"\xee" * abi.RUN_MMAP_SIZE))  # whatever was there before
    page.run.exit_reason = 17
    page.run.internal.suberror = suberror
    page.run.internal.ndata = len(words) if ndata is None else ndata
    page.run.internal.data[: len(words)] = words
    found = read_exit(page)
    assert isinstance(found, EmulationFailure)
    return found


@pytest.mark.parametrize("exit", EXAMPLES, ids=lambda e: type(e).__name__)
def test_an_exit_written_to_kvm_run_reads_back_equal(exit: Exit) -> None:
    page = RunPage(bytearray(b"\xee" * abi.RUN_MMAP_SIZE))
    exit.to_run(page)
    found = read_exit(page)
    assert found == exit
    assert type(found) is type(exit)


@pytest.mark.parametrize("exit", EXAMPLES, ids=lambda e: type(e).__name__)
def test_an_exit_prints_as_one_line(exit: Exit) -> None:
    assert str(exit)
    assert "\n" not in str(exit)


def test_what_people_read() -> None:
    assert str(EXAMPLES[5]) == "KVM_EXIT_IO: out to port 0x3f8, 1 byte: 41"
    assert str(EXAMPLES[7]) == "KVM_EXIT_MMIO: write of 4 bytes at 0xfee000b0: 01 02 03 04"
    assert str(EmulationFailure.of(VADDPS)) == (
        "KVM_EXIT_INTERNAL_ERROR: emulation failure, instruction bytes c5 f8 58 c1"
    )
    assert str(EmulationFailure.of(None, (0x30, 0, 0, 0, 1))) == (
        "KVM_EXIT_INTERNAL_ERROR: emulation failure, no instruction bytes,"
        " data 0x30 0x0 0x0 0x0 0x1"
    )


def test_flds_failure_passes_the_assertions_of_the_kernel_selftest() -> None:
    page = RunPage()
    EmulationFailure.of(FLDS + bytes(13)).to_run(page)
    assert page.run.exit_reason == 17
    raw = page.run.emulation_failure
    assert raw.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    assert raw.ndata >= 3
    assert raw.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    assert raw.insn_size >= 2
    assert bytes(raw.insn_bytes[:2]) == FLDS


def test_filling_with_bytes_is_the_kernels() -> None:
    info = (0x1000, 1, 2, 3, 4)
    assert emulation_failure_page(VADDPS, info) == bytes.fromhex(
        "01000000 08000000 0100000000000000"  # suberror, ndata, flags
        "04 c5f858c1 9090909090909090909090"  # insn_size, insn_bytes
        "0010000000000000 0100000000000000 0200000000000000 0300000000000000 0400000000000000"
    )


def test_filling_without_bytes_is_the_kernels() -> None:
    assert emulation_failure_page(None, (0x1000, 0, 0, 0, 0)) == bytes.fromhex(
        "01000000 06000000 0000000000000000 0010000000000000" + "00" * 32
    )
    assert emulation_failure_page(b"") == emulation_failure_page(None)


def test_prebuilt_bytes_are_what_to_run_writes() -> None:
    page = RunPage()
    EmulationFailure.of(VADDPS).to_run(page)
    assert bytes(page.bytes[32 : 32 + 72]) == emulation_failure_page(VADDPS)


def test_bytes_past_insn_size_are_not_code() -> None:
    found = EmulationFailure.of(VADDPS)
    assert found.insn_bytes == VADDPS + b"\x90" * 11
    assert found.bytes == VADDPS
    assert found.insn_size == 4


def test_without_the_flag_that_memory_is_debug_data() -> None:
    # Measured on a real kernel: fetch from unmapped memory; byte 1 of the word reads as 0x10.
    found = failure(0, 0x1000, 0, 0, 0, 0)
    assert found.bytes is None
    assert found.insn_bytes == b""
    assert found.insn_size == 0
    assert found.debug == (0x1000, 0, 0, 0, 0)


def test_eight_words_without_the_flag_are_no_bytes() -> None:
    found = failure(0, *range(7))  # SGX sends two extra words: ndata 8, flags 0
    assert found.bytes is None
    assert found.debug == tuple(range(7))


def test_a_failure_without_any_data_has_no_flags() -> None:
    found = failure(ndata=0)
    assert (found.flags, found.bytes, found.debug) == (0, None, ())


@pytest.mark.parametrize("ndata", [1, 2])
def test_the_flag_without_room_for_bytes_is_not_believed(ndata: int) -> None:
    assert failure(1, 0x9090, ndata=ndata).bytes is None


def test_unknown_flags_and_more_words_are_kept() -> None:
    flags = 1 | 1 << 1 | 1 << 63
    first = int.from_bytes(b"\x04" + VADDPS + b"\x90" * 3, "little")
    words = (flags, first, 0x90909090_90909090, *range(100, 113))
    found = failure(*words)
    assert found.flags == flags
    assert found.bytes == VADDPS
    assert found.debug == tuple(range(100, 113))
    page = RunPage()
    found.to_run(page)
    assert tuple(page.run.internal.data) == words


def test_ndata_beyond_the_array_is_kept_but_not_followed() -> None:
    found = failure(*range(16), ndata=1000)
    assert found.ndata == 1000
    assert len(found.data) == 16


def test_a_size_beyond_the_array_gives_the_fifteen_bytes_there_are() -> None:
    found = failure(1, 0x9090909090909000 | 200, 0x9090909090909090)
    assert found.bytes == b"\x90" * 15


def test_another_suberror_is_a_plain_internal_error() -> None:
    page = RunPage()
    InternalError(abi.KVM_INTERNAL_ERROR_SIMUL_EX, (0x80000B0E, 0x30)).to_run(page)
    assert type(read_exit(page)) is InternalError


def test_emulation_failures_match_by_their_bytes() -> None:
    match EmulationFailure.of(FLDS):
        case EmulationFailure(bytes=code):
            assert code == FLDS


def test_an_io_answer_is_written_where_io_data_offset_says() -> None:
    page = RunPage()
    Io(abi.KVM_EXIT_IO_IN, 0x60, 2).to_run(page)
    page.run.io.data_offset = 5000
    answer = read_exit(page)
    assert isinstance(answer, Io)
    answer.value = 0xBEEF
    answer.complete(page)
    assert bytes(page.bytes[5000:5002]) == b"\xef\xbe"


def test_an_io_output_is_not_written_back() -> None:
    page = RunPage()
    Io(abi.KVM_EXIT_IO_OUT, 0x60, 1, data=b"A").to_run(page)
    mine = read_exit(page)
    assert isinstance(mine, Io)
    mine.data = b"B"
    mine.complete(page)
    assert read_exit(page) == Io(abi.KVM_EXIT_IO_OUT, 0x60, 1, data=b"A")


def test_an_mmio_answer_leaves_the_rest_of_the_exit_alone() -> None:
    page = RunPage()
    Mmio(0xA0000, 2, False).to_run(page)
    answer = read_exit(page)
    assert isinstance(answer, Mmio)
    answer.value = 0x1234
    answer.complete(page)
    assert bytes(page.run.mmio.data) == b"\x34\x12" + bytes(6)
    assert read_exit(page) == answer


def test_an_msr_answer_reaches_kvm_run() -> None:
    page = RunPage()
    X86Rdmsr(0x1B).to_run(page)
    answer = read_exit(page)
    assert isinstance(answer, X86Rdmsr)
    answer.data, answer.error = 0xFEE00900, 1
    answer.complete(page)
    assert (page.run.msr.data, page.run.msr.error) == (0xFEE00900, 1)


def test_an_answer_of_the_wrong_length_is_refused() -> None:
    page = RunPage()
    io = Io(abi.KVM_EXIT_IO_IN, 0x3FD, 1)
    io.to_run(page)
    io.data = b"ab"
    with pytest.raises(
        ValueError, match=r"IO port 0x3fd: the answer has 2 bytes, the guest wants 1"
    ):
        io.complete(page)
    mmio = Mmio(0xA0000, 4, False)
    mmio.to_run(page)
    mmio.data = b"a"
    with pytest.raises(ValueError, match=r"MMIO address 0xa0000: the answer has 1 byte,"):
        mmio.complete(page)


@pytest.mark.parametrize(("remaining", "size"), [(15, 15), (4000, 15), (3, 3), (2, 2), (1, 15)])
def test_fetch_stops_at_the_page_end_as_measured_with_vaddps(remaining: int, size: int) -> None:
    assert insn_fetch_size(VADDPS + bytes(11), remaining) == size


@pytest.mark.parametrize(
    ("code", "bitness", "needed"),
    [
        ("62f17c4858c1", 64, 1),  # EVEX: opcode 62 has no entry
        ("c4e27d58c1", 64, 2),  # VEX: fetched as LDS/LES with ModRM
        ("0f3a0fc108", 64, 2),  # no 0f 3a map
        ("660f3800c1", 64, 4),  # a prefix and a three-byte opcode
        ("f30f58c1", 64, 3),  # addss
        ("66480f6ec0", 64, 4),  # two prefixes, movq
        ("d98578563412", 64, 2),  # flds: given up after ModRM
        ("d9bd78563412", 64, 6),  # fnstcw: decoded whole
        ("dbe3", 64, 2),  # fninit
        ("63c0", 32, 2),  # arpl
        ("0f38f0c1", 64, 4),  # movbe between registers: no such thing, seen after ModRM
        ("4058", 32, 1),  # no REX outside 64-bit mode: inc eax
    ],
)
def test_fetch_crosses_the_page_only_when_decoding_needs_it(
    code: str, bitness: int, needed: int
) -> None:
    data = bytes.fromhex(code).ljust(15, b"\xcc")
    sizes = [insn_fetch_size(data, remaining, bitness) for remaining in range(1, 16)]
    assert sizes == [15 if remaining < needed else remaining for remaining in range(1, 16)]


def test_fetch_ends_where_the_memory_ends() -> None:
    assert insn_fetch_size(VADDPS, 1) == 4
