"""Standard streams and transfers: pipes, broken pipes, waiting, huge sizes, bad memory."""

from __future__ import annotations

import os
import pty
import select
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EAGAIN, EBADF, EFAULT, EINVAL, ENOTTY, EPIPE
from pathlib import Path
from random import Random

import pytest

from handlers.linux import Files, Root
from sandbox.handler import Resume
from tests.linux_process import BAD, RIP, SCRATCH, SCRATCH_SIZE, Guest, guest_below

READ, WRITE, READV, WRITEV, POLL, PPOLL, IOCTL, FCNTL = 0, 1, 19, 20, 7, 271, 16, 72
END = SCRATCH + SCRATCH_SIZE
HUGE = 1 << 40


@dataclass
class Pipes:
    """A guest whose standard streams are pipes, with the host's ends."""

    guest: Guest
    feed: int
    result: int

    def output(self) -> bytes:
        return os.read(self.result, 1 << 20)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    stdin, feed = os.pipe()
    result, stdout = os.pipe()
    yield Pipes(Guest(Files.standard(stdin, stdout, stdout)), feed, result)
    for fd in (stdin, feed, result, stdout):
        try:
            os.close(fd)
        except OSError:
            continue


def test_output_and_input_pass_through(pipes: Pipes) -> None:
    guest = pipes.guest
    assert guest.call(WRITE, 1, guest.put(b"out\0\xff"), 5) == 5
    assert pipes.output() == b"out\0\xff"
    assert guest.call(WRITE, 2, guest.put(b"error"), 5) == 5
    assert pipes.output() == b"error"
    os.write(pipes.feed, b"typed")
    assert guest.call(READ, 0, SCRATCH, 100) == 5
    assert guest.get(5) == b"typed"
    os.close(pipes.feed)
    assert guest.call(READ, 0, SCRATCH, 100) == 0


def test_directions_are_kept(pipes: Pipes) -> None:
    guest = pipes.guest
    assert guest.call(WRITE, 0, SCRATCH, 1) == -EBADF
    assert guest.call(READ, 1, SCRATCH, 1) == -EBADF
    assert guest.call(WRITE, 3, SCRATCH, 1) == -EBADF
    assert guest.call(WRITE, -1, SCRATCH, 1) == -EBADF


def test_a_stream_the_host_has_not_is_not_there() -> None:
    closed = os.open("/dev/null", os.O_RDWR)
    os.close(closed)
    guest = Guest(Files.standard(closed, closed, closed))
    assert guest.call(WRITE, 1, SCRATCH, 1) == -EBADF


def test_vectors_are_gathered_and_scattered(pipes: Pipes) -> None:
    guest = pipes.guest
    guest.put(b"helloworld", SCRATCH + 0x100)
    vectors = struct.pack("<6Q", SCRATCH + 0x105, 5, SCRATCH, 0, SCRATCH + 0x100, 5)
    assert guest.call(WRITEV, 1, guest.put(vectors), 3) == 10
    assert pipes.output() == b"worldhello"
    os.write(pipes.feed, b"0123456789")
    vectors = struct.pack("<4Q", SCRATCH + 0x200, 4, SCRATCH + 0x300, 100)
    assert guest.call(READV, 0, guest.put(vectors), 2) == 4  # a pipe may give less
    assert guest.get(4, SCRATCH + 0x200) == b"0123"
    assert guest.call(READ, 0, SCRATCH, 100) == 6


def test_absurd_vectors(pipes: Pipes) -> None:
    guest = pipes.guest
    for number in (READV, WRITEV):
        assert guest.call(number, 1 - number % 2, SCRATCH, -1) == -EINVAL
        assert guest.call(number, 1 - number % 2, SCRATCH, 1025) == -EINVAL
        assert guest.call(number, 1 - number % 2, SCRATCH, 0x7FFF_FFFF) == -EINVAL
        assert guest.call(number, 1 - number % 2, BAD, 1) == -EFAULT
        guest.put(struct.pack("<2Q", SCRATCH, 1 << 63))
        assert guest.call(number, 1 - number % 2, SCRATCH, 1) == -EINVAL


def test_bad_buffers_are_efault_and_lose_nothing(pipes: Pipes) -> None:
    guest = pipes.guest
    assert guest.call(WRITE, 1, BAD, 10) == -EFAULT
    assert guest.call(WRITE, 1, SCRATCH, (1 << 63) - 1) == -EFAULT
    assert guest.call(WRITE, 1, SCRATCH, 1 << 63) == -EINVAL
    os.write(pipes.feed, b"kept")
    assert guest.call(READ, 0, BAD, 10) == -EFAULT
    guest.memory.protect(SCRATCH, 0x1000, 1)
    assert guest.call(READ, 0, SCRATCH, 10) == -EFAULT
    assert guest.call(READ, 0, SCRATCH + 0x1000, 10) == 4
    assert guest.get(4, SCRATCH + 0x1000) == b"kept"


def test_a_transfer_goes_as_far_as_memory_goes(pipes: Pipes, tmp_path: Path) -> None:
    guest = pipes.guest
    guest.put(b"tail", END - 4)
    assert guest.call(WRITE, 1, END - 4, 100) == 4
    assert pipes.output() == b"tail"
    os.write(pipes.feed, b"0123456789")
    assert guest.call(READ, 0, END - 4, HUGE) == 4
    assert guest.get(4, END - 4) == b"0123"
    (tmp_path / "big").write_bytes(b"z" * 3 * SCRATCH_SIZE)
    guest = guest_below(tmp_path)
    fd = guest.open("big")
    assert guest.call(READ, fd, SCRATCH, HUGE) == SCRATCH_SIZE
    assert guest.call(READ, fd, END - 1, HUGE) == 1
    assert guest.call(READ, fd, END, HUGE) == -EFAULT


def test_large_files_are_read_in_one_call(tmp_path: Path) -> None:
    content = Random(1).randbytes((2 << 20) + 12345)
    (tmp_path / "big").write_bytes(content)
    guest = guest_below(tmp_path)
    at = guest.call(9, 0, 4 << 20, 3, 0x22, -1, 0)
    assert guest.call(READ, guest.open("big"), at, 4 << 20) == len(content)
    assert guest.get(len(content), at) == content


def test_a_full_pipe_makes_the_call_wait_and_go_on_where_it_was(pipes: Pipes) -> None:
    guest = pipes.guest
    content = Random(2).randbytes(SCRATCH_SIZE) * 16
    at = guest.call(9, 0, len(content), 3, 0x22, -1, 0)
    guest.put(content, at)
    assert guest.step(WRITE, 1, at, len(content)) == Resume(RIP)
    assert 0 < guest.process.waiting < len(content)
    received = bytearray()

    def drain() -> None:
        while len(received) < len(content):
            received.extend(pipes.output())

    reader = threading.Thread(target=drain)
    reader.start()
    assert guest.call(WRITE, 1, at, len(content)) == len(content)
    reader.join(10)
    assert bytes(received) == content
    assert guest.process.waiting is None


def test_waiting_for_input_gives_way(pipes: Pipes) -> None:
    assert pipes.guest.step(READ, 0, SCRATCH, 10) == Resume(RIP)
    os.write(pipes.feed, b"late")
    assert pipes.guest.call(READ, 0, SCRATCH, 10) == 4


def test_nonblocking_is_the_guests_own_business(pipes: Pipes) -> None:
    guest = pipes.guest
    host = guest.process.files.get(0).host
    assert guest.call(FCNTL, 0, 4, os.O_NONBLOCK) == 0
    assert guest.call(FCNTL, 0, 3, 0) & os.O_NONBLOCK
    assert os.get_blocking(host)
    assert guest.call(READ, 0, SCRATCH, 10) == -EAGAIN


def test_a_closed_pipe_ends_the_program_as_sigpipe_does(pipes: Pipes) -> None:
    os.close(pipes.result)
    exit = pipes.guest.leave(WRITE, 1, SCRATCH, 10)
    assert (exit.status, exit.signal) == (141, 13)


@pytest.mark.parametrize("handler", [1, 0x40_2000])
def test_a_program_that_minds_sigpipe_gets_epipe(pipes: Pipes, handler: int) -> None:
    guest = pipes.guest
    os.close(pipes.result)
    assert guest.call(13, 13, guest.put(struct.pack("<4Q", handler, 0, 0, 0)), 0, 8) == 0
    assert guest.call(WRITE, 1, SCRATCH, 10) == -EPIPE


def test_the_host_survives_a_closed_pipe() -> None:
    program = (
        "import os\n"
        "from handlers.linux import Files\n"
        "from tests.linux_process import Guest, SCRATCH\n"
        "r, w = os.pipe(); os.close(r)\n"
        "print(Guest(Files.standard(w, w, w)).leave(1, 1, SCRATCH, 5).status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "141\n"), done.stderr


def test_closing_standard_streams_leaves_the_hosts_open(pipes: Pipes) -> None:
    guest = pipes.guest
    hosts = [guest.process.files.get(fd).host for fd in range(3)]
    assert guest.call(32, 1) == 3
    for fd in range(4):
        assert guest.call(3, fd) == 0
    assert guest.call(WRITE, 1, SCRATCH, 1) == -EBADF
    for host in hosts:
        os.fstat(host)
    guest.leave(231, 0)
    for host in hosts:
        os.fstat(host)


def test_streams_are_what_the_hosts_are(pipes: Pipes) -> None:
    guest = pipes.guest
    assert guest.call(5, 1, SCRATCH) == 0
    assert stat.S_ISFIFO(struct.unpack_from("<24xI", guest.get(144))[0])
    assert guest.call(IOCTL, 1, 0x5401, SCRATCH) == -ENOTTY
    assert guest.call(IOCTL, 99, 0x5401, SCRATCH) == -EBADF


def test_a_terminal_answers_as_one() -> None:
    try:
        controller, terminal = pty.openpty()
    except OSError:
        pytest.skip("no pseudo-terminals here")
    guest = Guest(Files.standard(terminal, terminal, terminal))
    assert guest.call(IOCTL, 1, 0x5401, SCRATCH) == 0
    assert guest.call(IOCTL, 1, 0x5413, SCRATCH) == 0
    assert guest.call(IOCTL, 1, 0x5401, BAD) == -EFAULT
    assert guest.call(IOCTL, 1, 0x5412, SCRATCH) == -EINVAL  # TIOCSTI: typing for the user
    os.close(terminal)
    os.close(controller)


def pollfd(*asked: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<iHH", fd, events, 0xFFFF) for fd, events in asked)


def test_poll_asks_the_host(pipes: Pipes) -> None:
    guest = pipes.guest
    guest.put(pollfd((0, select.POLLIN), (1, select.POLLOUT), (-1, 1), (44, 1)))
    assert guest.call(POLL, SCRATCH, 4, -1) == 2
    found = [struct.unpack_from("<iHH", guest.get(32), 8 * i)[2] for i in range(4)]
    assert found == [0, select.POLLOUT, 0, select.POLLNVAL]
    os.write(pipes.feed, b"x")
    assert guest.call(POLL, guest.put(pollfd((0, 0xFFFF))), 1, -1) == 1
    assert guest.call(POLL, BAD, 1, 0) == -EFAULT
    assert guest.call(POLL, SCRATCH, 0x7FFF_FFFF, 0) == -EINVAL


def test_poll_times_out(pipes: Pipes) -> None:
    guest = pipes.guest
    guest.put(pollfd((0, select.POLLIN)))
    assert guest.call(POLL, SCRATCH, 1, 0) == 0
    assert guest.step(POLL, SCRATCH, 1, 200) == Resume(RIP)
    guest.clock.now += 200_000_000
    assert guest.call(POLL, SCRATCH, 1, 200) == 0
    assert guest.step(POLL, SCRATCH, 1, -1) == Resume(RIP)
    timeout = guest.put(struct.pack("<2q", 0, 1), SCRATCH + 64)
    guest.process.waiting = None
    assert guest.call(PPOLL, SCRATCH, 1, timeout, 0, 8) == 0


def test_sendfile_copies_a_file_to_a_stream(pipes: Pipes, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"0123456789")
    guest = pipes.guest
    guest.process.files.root = Root(tmp_path)
    fd, sendfile = guest.open("data"), 40
    assert guest.call(sendfile, 1, fd, 0, 4) == 4
    assert guest.call(sendfile, 1, fd, 0, HUGE) == 6
    assert guest.call(sendfile, 1, fd, 0, HUGE) == 0
    assert pipes.output() == b"0123456789"
    offset = guest.put(struct.pack("<q", 8))
    assert guest.call(sendfile, 1, fd, offset, 100) == 2
    assert (pipes.output(), guest.get(1)) == (b"89", b"\x0a")
    assert guest.call(sendfile, 1, 0, 0, 1) == -EINVAL
    assert guest.call(sendfile, 0, fd, 0, 1) == -EBADF
    assert guest.call(sendfile, 1, fd, BAD, 1) == -EFAULT


def test_an_endless_transfer_gives_way(tmp_path: Path) -> None:
    """1024 vectors over the same memory: gigabytes by one call."""
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 32)
    guest = guest_below(tmp_path)
    at = guest.call(9, 0, 8 << 20, 3, 0x22, -1, 0)
    guest.put(struct.pack("<2Q", at, 8 << 20) * 1024)
    fd = guest.open("sparse")
    assert guest.step(READV, fd, SCRATCH, 1024) == Resume(RIP)
    first = guest.process.waiting
    assert guest.step(READV, fd, SCRATCH, 1024) == Resume(RIP)
    assert 0 < first < guest.process.waiting == guest.call(8, fd, 0, 1)


def test_nothing_to_move_touches_no_memory(pipes: Pipes) -> None:
    """As at the end of a file into a page not used yet, or poll without descriptors."""
    guest = pipes.guest
    os.close(pipes.feed)
    fresh = guest.call(9, 0, 4096, 3, 0x22, -1, 0)
    assert guest.call(READ, 0, fresh, 100) == 0
    assert guest.call(READ, 0, BAD, 0) == guest.call(WRITE, 1, BAD, 0) == 0
    assert guest.call(READV, 0, BAD, 0) == guest.call(WRITEV, 1, BAD, 0) == 0
    assert guest.call(POLL, BAD, 0, 0) == 0
