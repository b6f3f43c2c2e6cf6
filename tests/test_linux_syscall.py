"""The syscall instruction itself, and the calls about the process, its threads and its clock."""

from __future__ import annotations

import os
import struct
from errno import EAGAIN, EFAULT, EINVAL, ENOMEM, ENOSYS, EPERM, ESRCH, ETIMEDOUT
from pathlib import Path

import pytest

from handlers.linux import PACK, SYSCALLS, Files, ProcessExit, emulate_syscall
from handlers.linux.names import SYSCALL_NAMES
from sandbox.handler import Decline, Resume
from sandbox.registers import RAX, RCX
from tests.doubles import make_cpu
from tests.linux_process import BAD, RIP, SCRATCH, SYSCALL, Guest

R11 = 11
SIGABRT, SIGKILL, SIGUSR1, SIGCHLD, SIGTERM = 6, 9, 10, 17, 15


def test_registers_after_a_call() -> None:
    guest = Guest()
    guest.cpu.gpr[RCX] = guest.cpu.gpr[R11] = 0x1234
    assert guest.call(39) == 1000
    assert guest.cpu.gpr[RCX] == RIP + 2
    assert guest.cpu.gpr[R11] == 0x246
    guest.cpu.gpr[RAX] = 0
    assert guest.call(0xFFFF_FFFF_0000_0027) == 1000  # the number is EAX


def test_an_unknown_call_is_counted_and_named() -> None:
    guest = Guest()
    assert guest.call(57) == -ENOSYS
    assert guest.call(57) == -ENOSYS
    assert guest.call(9999) == -ENOSYS
    assert guest.process.unknown == {"fork": 2, "syscall_9999": 1}
    assert guest.call(334, 0, 0, 0, 0) == -ENOSYS
    assert guest.process.calls == {"rseq": 1}


def test_without_a_process_the_instruction_is_declined() -> None:
    assert emulate_syscall(make_cpu(), SYSCALL) == Decline()
    assert PACK.handlers == (emulate_syscall,)


def test_numbers_and_names_are_those_of_the_kernel_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers on this machine")
    lines = [line.split() for line in header.read_text().splitlines()]
    defines = [words for words in lines if words[:1] == ["#define"] and len(words) == 3]
    official = {int(number): name.removeprefix("__NR_") for _define, name, number in defines}
    assert all(SYSCALL_NAMES.get(number, name) == name for number, name in official.items())
    assert all(official[number] == call.name for number, call in SYSCALLS.items())


@pytest.mark.parametrize("number", [60, 231])
def test_exit_status_is_one_byte(number: int) -> None:
    assert Guest().leave(number, 3) == ProcessExit(3)
    assert Guest().leave(number, 0x1FF) == ProcessExit(255)
    assert Guest().leave(number, -1) == ProcessExit(255)


@pytest.mark.parametrize("number", [5, 228, 63, 96, 97, 99, 100, 98, 13, 14, 131, 318])
def test_a_bad_pointer_is_efault(number: int) -> None:
    arguments = {
        5: (0, BAD),
        228: (0, BAD),
        97: (3, BAD),
        98: (0, BAD),
        13: (10, BAD, 0, 8),
        14: (0, BAD, 0, 8),
        318: (BAD, 8, 0),
    }

    null = os.open("/dev/null", os.O_RDWR)
    try:
        guest = Guest(Files.standard(null, null, null))
        assert guest.call(number, *arguments.get(number, (BAD, BAD))) == -EFAULT
    finally:
        os.close(null)


def test_segment_bases() -> None:
    guest = Guest()
    set_gs, set_fs, get_fs, get_gs = 0x1001, 0x1002, 0x1003, 0x1004
    assert guest.call(158, set_fs, 0x7FFF_0000_1234) == 0
    assert guest.call(158, set_gs, 0x5678) == 0
    assert guest.machine.bank.read("fs_base") == 0x7FFF_0000_1234
    assert guest.call(158, get_fs, SCRATCH) == 0
    assert guest.call(158, get_gs, SCRATCH + 8) == 0
    assert struct.unpack("<QQ", guest.get(16)) == (0x7FFF_0000_1234, 0x5678)
    assert guest.call(158, set_fs, 1 << 47) == -EPERM
    assert guest.call(158, set_fs, (1 << 64) - 1) == -EPERM
    assert guest.call(158, get_fs, BAD) == -EFAULT
    assert guest.call(158, 0x3001, 0) == -EINVAL


def test_uname_is_linux_on_x86_64() -> None:
    guest = Guest()
    assert guest.call(63, SCRATCH) == 0
    fields = [f.rstrip(b"\0") for f in struct.unpack("65s" * 6, guest.get(390))]
    assert fields[0] == b"Linux" and fields[4] == b"x86_64"
    assert int(fields[2].split(b".")[0]) >= 4  # glibc refuses to start on less than 3.2


def test_identity() -> None:
    guest = Guest()
    assert guest.call(39) == guest.call(186) == guest.call(218, 0x1234)
    assert guest.call(110) == 1
    assert guest.call(102) == guest.call(107) == 1000
    assert guest.call(104) == guest.call(108) == 1000
    assert guest.call(118, SCRATCH, SCRATCH + 4, SCRATCH + 8) == 0
    assert struct.unpack("<3I", guest.get(12)) == (1000, 1000, 1000)
    assert guest.call(115, 0, 0) == 0
    assert guest.call(105, 0) == -EPERM
    assert guest.call(121, 0) == 1000 and guest.call(121, 5) == -ESRCH


def test_limits() -> None:
    guest = Guest()
    assert guest.call(97, 3, SCRATCH) == 0
    assert struct.unpack("<QQ", guest.get(16)) == (8 << 20, (1 << 64) - 1)
    new = guest.put(struct.pack("<QQ", 512, 1024), SCRATCH + 0x100)
    assert guest.call(302, 0, 7, new, SCRATCH) == 0
    assert struct.unpack("<QQ", guest.get(16)) == (1024, 1024)
    assert guest.call(302, 1000, 7, 0, SCRATCH) == 0
    assert struct.unpack("<QQ", guest.get(16)) == (512, 1024)
    assert guest.call(302, 77, 7, 0, SCRATCH) == -ESRCH
    assert guest.call(302, 0, 99, 0, SCRATCH) == -EINVAL
    assert guest.call(302, 0, 7, guest.put(struct.pack("<QQ", 2, 1)), 0) == -EINVAL
    assert guest.call(302, 0, 7, guest.put(struct.pack("<QQ", 1, 5000)), 0) == -EPERM


def test_random_numbers_repeat_with_the_seed() -> None:
    first, second = Guest(), Guest()
    assert first.call(318, SCRATCH, 64, 0) == second.call(318, SCRATCH, 64, 0) == 64
    assert first.get(64) == second.get(64) != bytes(64)
    before = first.get(64)
    assert first.call(318, SCRATCH, 64, 0) == 64
    assert first.get(64) != before
    assert first.call(318, SCRATCH, 8, 0x80) == -EINVAL
    assert first.call(318, SCRATCH, 1 << 40, 0) == 0x4000  # as far as memory goes


def test_clocks_read_the_hosts() -> None:
    guest = Guest()
    assert guest.call(228, 0, SCRATCH) == 0
    assert struct.unpack("<qq", guest.get(16)) == (1_700_000_000, 123_456_789)
    assert guest.call(228, 99, SCRATCH) == -EINVAL
    assert guest.call(229, 1, SCRATCH) == 0 and guest.call(229, 1, 0) == 0
    assert guest.call(96, SCRATCH, 0) == 0
    assert struct.unpack("<qq", guest.get(16)) == (1_700_000_000, 123_456)
    assert guest.call(201, SCRATCH) == 1_700_000_000
    assert guest.call(201, 0) == 1_700_000_000


@pytest.mark.parametrize(("number", "prefix"), [(35, ()), (230, (1, 0))])
def test_sleeping_waits_in_steps_and_the_right_time(number: int, prefix: tuple[int, ...]) -> None:
    guest = Guest()
    wanted = guest.put(struct.pack("<qq", 1, 500_000_000))
    start = guest.clock.now
    assert guest.call(number, *prefix, wanted, 0) == 0
    assert abs(guest.clock.now - start - 1_500_000_000) < 1000
    assert guest.repeats >= 20 and max(guest.clock.slept) <= 0.05
    for seconds, nanoseconds, expected in ((0, 0, 0), (0, 10**9, -EINVAL), (-1, 0, -EINVAL)):
        guest.put(struct.pack("<qq", seconds, nanoseconds))
        assert guest.call(number, *prefix, SCRATCH, 0) == expected
    assert guest.call(number, *prefix, BAD, 0) == -EFAULT


def test_sleep_until_an_absolute_time() -> None:
    guest = Guest()
    end = guest.clock.now + 200_000_000
    wanted = guest.put(struct.pack("<qq", *divmod(end, 1_000_000_000)))
    assert guest.call(230, 0, 1, wanted, 0) == 0
    assert abs(guest.clock.now - end) < 1000


def test_a_lone_thread_wakes_nobody_and_never_deadlocks_silently() -> None:
    guest = Guest()
    guest.put(struct.pack("<I", 5))
    wait, wake, private = 0, 1, 0x80
    assert guest.call(202, SCRATCH, wake | private, 1, 0) == 0
    assert guest.call(202, SCRATCH, wait | private, 4, 0) == -EAGAIN
    assert guest.call(202, SCRATCH + 1, wait, 4, 0) == -EINVAL
    assert guest.call(202, BAD, wait, 4, 0) == -EFAULT
    timeout = guest.put(struct.pack("<qq", 0, 120_000_000), SCRATCH + 64)
    start = guest.clock.now
    assert guest.call(202, SCRATCH, wait, 5, timeout) == -ETIMEDOUT
    assert guest.clock.now - start >= 119_999_000
    assert guest.call(202, SCRATCH, 3, 5, 0) == -ENOSYS
    exit = guest.leave(202, SCRATCH, wait, 5, 0)
    assert exit.status == 134 and "deadlock" in exit.reason


def test_one_processor() -> None:
    guest = Guest()
    assert guest.call(204, 0, 128, SCRATCH) == 8
    assert guest.get(8) == b"\1" + bytes(7)
    assert guest.call(204, 0, 4, SCRATCH) == -EINVAL
    assert guest.call(24) == 0
    assert guest.call(273, SCRATCH, 24) == 0 and guest.call(273, SCRATCH, 8) == -EINVAL


def test_signal_actions_are_remembered() -> None:
    guest = Guest()
    action = struct.pack("<QQQQ", 0x40_2000, 0x0400_0000, 0x40_3000, 1)
    assert guest.call(13, SIGUSR1, guest.put(action), 0, 8) == 0
    assert guest.call(13, SIGUSR1, 0, SCRATCH + 64, 8) == 0
    assert guest.get(32, SCRATCH + 64) == action
    assert guest.call(13, SIGTERM, 0, SCRATCH + 64, 8) == 0
    assert guest.get(32, SCRATCH + 64) == bytes(32)
    for signal in (0, 65, -1):
        assert guest.call(13, signal, 0, SCRATCH, 8) == -EINVAL
    assert guest.call(13, SIGKILL, SCRATCH, 0, 8) == -EINVAL
    assert guest.call(13, SIGUSR1, SCRATCH, 0, 4) == -EINVAL
    assert guest.call(13, SIGUSR1, BAD, 0, 8) == -EFAULT


def test_the_signal_mask() -> None:
    guest = Guest()
    block, unblock, set_ = 0, 1, 2

    def mask(how: int, bits: int) -> int:
        new = guest.put(struct.pack("<Q", bits))
        assert guest.call(14, how, new, SCRATCH + 8, 8) == 0
        return int.from_bytes(guest.get(8, SCRATCH + 8), "little")

    assert mask(block, 0b1010) == 0
    assert mask(block, 0b0100) == 0b1010
    assert mask(unblock, 0b0010) == 0b1110
    assert mask(set_, (1 << 64) - 1) == 0b1100
    assert mask(set_, 0) == (1 << 64) - 1 - (1 << 8) - (1 << 18)  # KILL and STOP cannot be
    assert guest.call(14, 7, SCRATCH, 0, 8) == -EINVAL
    assert guest.call(14, 7, 0, 0, 8) == 0


def test_abort_shows_as_134() -> None:
    guest = Guest()
    exit = guest.leave(234, 1000, 1000, SIGABRT)
    assert exit == ProcessExit(134, SIGABRT, "killed by SIGABRT")


def test_a_blocked_signal_kills_when_it_is_unblocked() -> None:
    guest = Guest()
    everything = guest.put(b"\xff" * 8)
    assert guest.call(14, 2, everything, 0, 8) == 0
    assert guest.call(200, 1000, SIGABRT) == 0
    assert guest.call(127, SCRATCH + 8, 8) == 0
    assert int.from_bytes(guest.get(8, SCRATCH + 8), "little") == 1 << SIGABRT - 1
    assert guest.leave(14, 2, guest.put(bytes(8)), 0, 8).status == 134


def test_ignored_signals_do_nothing_and_handlers_are_not_skipped_silently() -> None:
    guest = Guest()
    assert guest.call(62, 1000, 0) == 0
    assert guest.call(62, 1000, SIGCHLD) == 0
    assert guest.call(62, 1000, 99) == -EINVAL
    assert guest.call(62, 4242, SIGTERM) == -ESRCH
    assert guest.call(62, 1, SIGTERM) == -EPERM
    assert guest.call(13, SIGTERM, guest.put(struct.pack("<QQQQ", 1, 0, 0, 0)), 0, 8) == 0
    assert guest.call(62, 1000, SIGTERM) == 0
    assert guest.call(13, SIGUSR1, guest.put(struct.pack("<QQQQ", 0x40_2000, 0, 0, 0)), 0, 8) == 0
    exit = guest.leave(62, 0, SIGUSR1)
    assert exit.status == 138 and "0x402000" in exit.reason


def test_alternate_stack_is_remembered() -> None:
    guest = Guest()
    stack = struct.pack("<QixxxxQ", 0x7000, 0, 8192)
    assert guest.call(131, guest.put(stack), SCRATCH + 64) == 0
    assert struct.unpack("<QixxxxQ", guest.get(24, SCRATCH + 64)) == (0, 2, 0)
    assert guest.call(131, 0, SCRATCH + 64) == 0
    assert guest.get(24, SCRATCH + 64) == stack
    assert guest.call(131, guest.put(struct.pack("<QixxxxQ", 0x7000, 0, 100)), 0) == -ENOMEM


def test_pause_waits_without_end_but_can_be_stopped() -> None:
    guest = Guest()
    for _again in range(3):
        assert guest.step(34) == Resume(RIP)


def test_process_name() -> None:
    guest = Guest()
    assert guest.call(157, 15, guest.put(b"a-rather-long-name\0")) == 0
    assert guest.call(157, 16, SCRATCH) == 0
    assert guest.get(16) == b"a-rather-long-n\0"
    assert guest.call(157, 4711, 0) == -EINVAL
    assert guest.call(157, 15, BAD) == -EFAULT
