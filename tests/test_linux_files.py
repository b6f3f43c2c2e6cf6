"""Files below the root: what can be opened, and that nothing else on the host can be reached."""

from __future__ import annotations

import gc
import os
import socket
import stat
import struct
from collections.abc import Iterator
from errno import (
    EACCES,
    EBADF,
    EEXIST,
    EFAULT,
    EINVAL,
    EISDIR,
    ELOOP,
    EMFILE,
    ENAMETOOLONG,
    ENOENT,
    ENOTDIR,
    ENOTTY,
    ERANGE,
    EROFS,
    ESPIPE,
)
from pathlib import Path

import pytest

from handlers.linux import Files, Root
from handlers.linux.roots import MAX_DEPTH
from sandbox.errors import SandboxError
from tests.linux_process import BAD, SCRATCH, SCRATCH_SIZE, Guest, guest_below

OPEN, CLOSE, LSEEK, READ, WRITE, GETDENTS, OPENAT, FCNTL = 2, 3, 8, 0, 1, 217, 257, 72
CWD = -100


def count_descriptors() -> int:
    gc.collect()  # those of guests of earlier tests
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A root ``jail`` beside a secret, with every kind of trap inside."""
    (tmp_path / "secret").write_text("host")
    jail = tmp_path / "jail"
    (jail / "dir" / "deep").mkdir(parents=True)
    (jail / "file").write_bytes(b"0123456789")
    (jail / "dir" / "inner").write_bytes(b"inner")
    (jail / "secret").write_bytes(b"guest")
    (jail / "up").symlink_to("../secret")
    (jail / "dir" / "up").symlink_to("../../../secret")
    (jail / "absolute").symlink_to("/secret")
    (jail / "host-absolute").symlink_to(tmp_path / "secret")
    (jail / "outside").symlink_to(tmp_path)
    (jail / "outside-relative").symlink_to("..")
    (jail / "good").symlink_to("dir/inner")
    (jail / "to-dir").symlink_to("dir")
    (jail / "loop").symlink_to("loop")
    os.mkfifo(jail / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(jail / "socket"))
    yield jail
    server.close()


def contents(guest: Guest, path: str | bytes) -> bytes | int:
    fd = guest.open(path)
    if fd < 0:
        return fd
    size = guest.call(READ, fd, SCRATCH, 100)
    assert guest.call(CLOSE, fd) == 0
    return guest.get(size)


def test_without_a_root_nothing_exists() -> None:
    guest = Guest()
    for path in ("/", "/etc/passwd", "/proc/self/mem", "/dev/null", ".", "x"):
        assert guest.open(path) == -ENOENT
        assert guest.call(4, guest.path(path), SCRATCH) == -ENOENT
        assert guest.open(path, os.O_CREAT | os.O_WRONLY) == -ENOENT


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/file", b"0123456789"),
        ("file", b"0123456789"),
        ("//dir/.///../file", b"0123456789"),
        ("good", b"inner"),
        ("to-dir/inner", b"inner"),
        ("/secret", b"guest"),
        ("../secret", b"guest"),
        ("/../../../../secret", b"guest"),
        ("dir/../../secret", b"guest"),
        ("up", b"guest"),
        ("dir/up", b"guest"),
        ("to-dir/up", b"guest"),
        ("absolute", b"guest"),
        ("outside-relative/secret", b"guest"),
        ("host-absolute", -ENOENT),
        ("outside/secret", -ENOENT),
        ("/etc/passwd", -ENOENT),
        ("/proc/self/mem", -ENOENT),
        ("loop", -ELOOP),
        ("loop/x", -ELOOP),
        ("fifo", -EACCES),
        ("socket", -EACCES),
        ("file/", -ENOTDIR),
        ("file/.", -ENOTDIR),
        ("file/x", -ENOTDIR),
        ("file/..", -ENOTDIR),
        ("missing/../file", -ENOENT),
        ("", -ENOENT),
        ("x" * 300, -ENAMETOOLONG),
        ("dir/" * 1200, -ENAMETOOLONG),
    ],
)
def test_paths_stay_below_the_root(tree: Path, path: str, expected: bytes | int) -> None:
    assert contents(guest_below(tree), path) == expected


def test_the_path_itself_may_be_bad(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.call(OPEN, BAD, 0, 0) == -EFAULT
    assert guest.call(OPEN, guest.put(b"x" * 100, SCRATCH + SCRATCH_SIZE - 100), 0, 0) == -EFAULT
    guest.put(b"/" * 0x2000)
    assert guest.call(OPEN, SCRATCH, 0, 0) == -ENAMETOOLONG


def test_a_directory_swapped_for_a_link_does_not_lead_out(tree: Path) -> None:
    guest = guest_below(tree)
    fd = guest.open("dir", os.O_DIRECTORY)
    (tree / "dir").rename(tree / "away")
    (tree / "dir").symlink_to(tree.parent)
    assert guest.call(OPENAT, fd, guest.path("secret"), 0, 0) == -ENOENT
    assert guest.call(OPENAT, fd, guest.path("../../secret"), 0, 0) == -ENOENT


def test_a_deep_directory_does_not_eat_the_hosts_descriptors(tree: Path) -> None:
    here = os.open(tree, os.O_RDONLY)
    for _level in range(MAX_DEPTH + 10):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    before = count_descriptors()
    guest = guest_below(tree)
    assert guest.open("d/" * (MAX_DEPTH + 5)) == -ENAMETOOLONG
    assert contents(guest, "d/" * 50 + "../" * 50 + "file") == b"0123456789"
    assert count_descriptors() == before + 1  # the root's own


def test_failed_lookups_leak_no_descriptors(tree: Path) -> None:
    guest = guest_below(tree)
    before = count_descriptors()
    for path in ("loop", "fifo", "file/x", "missing/x", "outside/secret", "socket", "x" * 300):
        guest.open(path)
        guest.call(4, guest.path(path), SCRATCH)
        guest.call(89, guest.path(path), SCRATCH, 10)
        guest.call(80, guest.path(path))
    assert count_descriptors() == before


def test_kernel_file_systems_are_no_roots_and_are_not_entered() -> None:
    for directory in ("/proc", "/proc/self", "/sys"):
        if os.path.isdir(directory):
            with pytest.raises(SandboxError, match="belongs to the kernel"):
                Root(directory)
    guest = guest_below(Path("/"))
    for path in ("/proc/self/mem", "/proc/version", "/proc/self/fd/0", "/proc/self/root/etc"):
        assert guest.open(path) == -EACCES
        assert guest.call(4, guest.path(path), SCRATCH) == -EACCES


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_bad_root_is_one_clear_error(tree: Path, name: str) -> None:
    with pytest.raises(SandboxError, match="give a directory"):
        Root(tree / name)


def test_read_only_unless_asked(tree: Path) -> None:
    guest = guest_below(tree)
    create = os.O_CREAT | os.O_WRONLY
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_RDWR | os.O_TRUNC, create):
        assert guest.open("file", flags) == -EROFS
    assert guest.open("new", create) == -EROFS
    assert guest.open("file", os.O_CREAT) >= 0
    assert not (tree / "new").exists()
    assert (tree / "file").read_bytes() == b"0123456789"
    assert guest.call(21, guest.path("file"), os.W_OK) == -EROFS
    assert guest.call(77, guest.open("file"), 0) == -EINVAL


def test_writing_where_it_is_allowed(tree: Path) -> None:
    guest = guest_below(tree, writable=True)
    fd = guest.open("new", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o7777)
    assert guest.call(WRITE, fd, guest.put(b"hello"), 5) == 5
    assert guest.call(18, fd, guest.put(b"J"), 1, 0) == 1
    assert guest.call(LSEEK, fd, 0, 1) == 5
    assert (tree / "new").read_bytes() == b"Jello"
    mode = (tree / "new").stat().st_mode
    assert stat.S_IMODE(mode) == 0o755  # umask 022, no set-user-id
    assert guest.open("new", os.O_CREAT | os.O_EXCL) == -EEXIST
    assert guest.open("up", os.O_CREAT | os.O_EXCL | os.O_WRONLY) == -EEXIST
    fd = guest.open("new", os.O_WRONLY | os.O_APPEND)
    assert guest.call(WRITE, fd, guest.put(b"!"), 1) == 1
    assert (tree / "new").read_bytes() == b"Jello!"
    assert guest.call(READ, fd, SCRATCH, 1) == -EBADF
    assert guest.call(77, fd, 2) == 0
    assert (tree / "new").read_bytes() == b"Je"
    assert guest.open("new", os.O_RDWR | os.O_TRUNC) > 0
    assert (tree / "new").read_bytes() == b""
    assert guest.open("dir", os.O_WRONLY) == -EISDIR
    assert guest.open("fifo", os.O_WRONLY) == -EACCES
    assert guest.open("file", 3) == -EINVAL


def test_writing_through_links_stays_inside(tree: Path) -> None:
    guest = guest_below(tree, writable=True)
    (tree / "out").symlink_to(tree.parent / "created")
    (tree / "out-relative").symlink_to("../created")
    assert guest.open("out", os.O_CREAT | os.O_WRONLY) == -ENOENT
    assert guest.open("out-relative", os.O_CREAT | os.O_WRONLY) >= 0
    assert (tree / "created").exists() and not (tree.parent / "created").exists()
    assert guest.open("up", os.O_WRONLY | os.O_TRUNC) >= 0
    assert (tree.parent / "secret").read_text() == "host"


def test_relative_to_a_directory(tree: Path) -> None:
    guest = guest_below(tree)
    directory = guest.open("dir")
    assert guest.call(OPENAT, directory, guest.path("inner"), 0, 0) >= 0
    assert guest.call(OPENAT, directory, guest.path("/file"), 0, 0) >= 0
    assert guest.call(OPENAT, CWD, guest.path("file"), 0, 0) >= 0
    assert guest.call(OPENAT, 99, guest.path("file"), 0, 0) == -EBADF
    assert guest.call(OPENAT, guest.open("file"), guest.path("file"), 0, 0) == -ENOTDIR
    assert guest.call(OPENAT, 99, guest.path("/file"), 0, 0) >= 0


def test_flags_about_links_and_directories(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.open("good", os.O_NOFOLLOW) == -ELOOP
    assert guest.open("file", os.O_DIRECTORY) == -ENOTDIR
    assert guest.open("dir", os.O_CREAT) == -EISDIR
    assert guest.call(READ, guest.open("dir"), SCRATCH, 1) == -EISDIR


def test_current_directory(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.call(79, SCRATCH, 2) == 2 and guest.get(2) == b"/\0"
    assert guest.call(79, SCRATCH, 1) == -ERANGE
    assert guest.call(80, guest.path("to-dir/deep")) == 0
    assert guest.call(79, SCRATCH, 100) == 10 and guest.get(10) == b"/dir/deep\0"
    assert contents(guest, "../inner") == b"inner"
    assert guest.call(80, guest.path("/file")) == -ENOTDIR
    assert guest.call(81, guest.open("/dir")) == 0
    assert contents(guest, "inner") == b"inner"


STAT = struct.Struct("<QQQIIIIQqqqqqqqqq24x")


def test_stat_says_what_the_host_says(tree: Path) -> None:
    guest = guest_below(tree)
    host = os.stat(tree / "file")
    fd = guest.open("file")
    calls = [
        lambda: guest.call(4, guest.path("file"), SCRATCH),
        lambda: guest.call(6, guest.path("file"), SCRATCH),
        lambda: guest.call(5, fd, SCRATCH),
        lambda: guest.call(262, CWD, guest.path("file"), SCRATCH, 0),
        lambda: guest.call(262, fd, guest.path(""), SCRATCH, 0x1000),
    ]
    for call in calls:
        guest.put(bytes(144))
        assert call() == 0
        found = STAT.unpack(guest.get(144))
        assert found[:6] == (
            host.st_dev, host.st_ino, host.st_nlink, host.st_mode, host.st_uid, host.st_gid,
        )  # fmt: skip
        assert found[8] == 10
        assert found[13] * 10**9 + found[14] == host.st_mtime_ns


def test_stat_looks_at_links_and_special_files_without_opening(tree: Path) -> None:
    guest = guest_below(tree)

    def kind(number: int, path: str) -> int:
        assert guest.call(number, guest.path(path), SCRATCH) == 0
        return stat.S_IFMT(STAT.unpack(guest.get(144))[3])

    assert kind(4, "good") == stat.S_IFREG and kind(6, "good") == stat.S_IFLNK
    assert kind(4, "fifo") == stat.S_IFIFO and kind(4, "socket") == stat.S_IFSOCK
    assert kind(4, "/") == kind(4, "..") == stat.S_IFDIR
    assert guest.call(262, CWD, guest.path("x"), SCRATCH, 1) == -EINVAL
    assert guest.call(262, CWD, guest.path(""), SCRATCH, 0) == -ENOENT
    assert guest.call(5, 99, SCRATCH) == -EBADF


def test_reading_links(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.call(89, guest.path("good"), SCRATCH, 100) == 9
    assert guest.get(9) == b"dir/inner"
    assert guest.call(267, CWD, guest.path("good"), SCRATCH, 3) == 3
    assert guest.call(89, guest.path("file"), SCRATCH, 100) == -EINVAL
    assert guest.call(89, guest.path("missing"), SCRATCH, 100) == -ENOENT
    assert guest.call(89, guest.path("good"), SCRATCH, 0) == -EINVAL
    assert guest.call(89, guest.path("/proc/self/exe"), SCRATCH, 100) == 8
    assert guest.get(8) == b"/program"


def test_access(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.call(21, guest.path("file"), os.R_OK) == 0
    assert guest.call(21, guest.path("file"), os.X_OK) == -EACCES
    assert guest.call(21, guest.path("dir"), os.X_OK) == 0
    assert guest.call(21, guest.path("missing"), 0) == -ENOENT
    assert guest.call(269, CWD, guest.path("file"), 99) == -EINVAL
    assert guest.call(439, CWD, guest.path("good"), 0, 0x100) == 0


def test_seeking_and_positioned_reads(tree: Path) -> None:
    guest = guest_below(tree)
    fd = guest.open("file")
    assert guest.call(LSEEK, fd, -3, 2) == 7
    assert guest.call(READ, fd, SCRATCH, 100) == 3 and guest.get(3) == b"789"
    assert guest.call(17, fd, SCRATCH, 4, 2) == 4 and guest.get(4) == b"2345"
    assert guest.call(LSEEK, fd, 0, 1) == 10
    assert guest.call(LSEEK, fd, -1, 0) == -EINVAL
    assert guest.call(LSEEK, fd, 0, 9) == -EINVAL
    assert guest.call(17, fd, SCRATCH, 4, -1) == -EINVAL
    assert guest.call(WRITE, fd, SCRATCH, 1) == -EBADF


def entries(guest: Guest, fd: int, size: int) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    while (got := guest.call(GETDENTS, fd, SCRATCH, size)) > 0:
        data = guest.get(got)
        while data:
            _inode, _next, length, kind = struct.unpack_from("<QqHB", data)
            name = data[19:length].rstrip(b"\0")
            assert length % 8 == 0 and name not in found
            found[name], data = kind, data[length:]
    assert got == 0
    return found


@pytest.mark.parametrize("size", [40, 64, 4096])
def test_listing_a_directory(tree: Path, size: int) -> None:
    guest = guest_below(tree)
    fd = guest.open("/", os.O_DIRECTORY)
    found = entries(guest, fd, size)
    assert set(found) == {b".", b".."} | {os.fsencode(name) for name in os.listdir(tree)}
    assert found[b"dir"] == 4 and found[b"file"] == 8 and found[b"good"] == 10
    assert found[b"fifo"] == 1 and found[b".."] == 4
    assert guest.call(LSEEK, fd, 0, 0) == 0
    assert entries(guest, fd, size) == found
    assert guest.call(GETDENTS, guest.open("file"), SCRATCH, 100) == -ENOTDIR
    assert guest.call(GETDENTS, guest.open("/"), SCRATCH, 10) == -EINVAL


def test_the_parent_of_the_root_is_not_shown(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.call(GETDENTS, guest.open("/"), SCRATCH, 64) > 0
    first, second = struct.unpack_from("<Q", guest.get(8))[0], guest.get(32)[24:32]
    assert int.from_bytes(second, "little") == first == os.stat(tree).st_ino


def test_descriptors_are_the_lowest_free_and_limited(tree: Path) -> None:
    guest = guest_below(tree)
    assert [guest.open("file") for _i in range(3)] == [0, 1, 2]
    assert guest.call(CLOSE, 1) == 0 and guest.open("file") == 1
    assert guest.call(CLOSE, 77) == -EBADF and guest.call(CLOSE, -1) == -EBADF
    assert guest.call(32, 0) == 3
    assert guest.call(33, 0, 9) == 9 and guest.call(33, 9, 9) == 9
    assert guest.call(292, 0, 0, 0) == -EINVAL
    assert guest.call(33, 0, 5000) == -EBADF and guest.call(33, 55, 1) == -EBADF
    while (fd := guest.call(32, 0)) >= 0:
        assert fd < 1024
    assert fd == -EMFILE
    assert guest.open("file") == -EMFILE


def test_duplicates_share_position_and_close_last(tree: Path) -> None:
    guest = guest_below(tree)
    fd = guest.open("file")
    host = guest.process.files.get(fd).host
    twin = guest.call(32, fd)
    assert guest.call(READ, fd, SCRATCH, 4) == 4
    assert guest.call(CLOSE, fd) == 0
    assert guest.call(READ, twin, SCRATCH, 4) == 4 and guest.get(4) == b"4567"
    os.fstat(host)
    assert guest.call(CLOSE, twin) == 0
    with pytest.raises(OSError):
        os.fstat(host)


def test_descriptor_flags(tree: Path) -> None:
    guest = guest_below(tree)
    fd = guest.open("file", os.O_CLOEXEC)
    assert guest.call(FCNTL, fd, 1, 0) == 1
    assert guest.call(FCNTL, fd, 2, 0) == 0 and guest.call(FCNTL, fd, 1, 0) == 0
    assert guest.call(FCNTL, fd, 3, 0) & os.O_ACCMODE == os.O_RDONLY
    assert guest.call(FCNTL, fd, 0, 10) == 10
    assert guest.call(FCNTL, fd, 1030, 10) == 11 and guest.call(FCNTL, 11, 1, 0) == 1
    assert guest.call(FCNTL, fd, 0, 4096) == -EINVAL
    assert guest.call(FCNTL, fd, 99, 0) == -EINVAL
    assert guest.call(FCNTL, 77, 1, 0) == -EBADF


def test_the_end_of_the_process_closes_what_it_opened(tree: Path) -> None:
    guest = guest_below(tree)
    before = count_descriptors()
    for _i in range(5):
        guest.open("file")
    guest.leave(231, 0)
    assert count_descriptors() == before


def test_files_are_no_terminals(tree: Path) -> None:
    guest = guest_below(tree)
    assert guest.call(16, guest.open("file"), 0x5401, SCRATCH) == -ENOTTY
    assert guest.call(221, guest.open("file"), 0, 0, 0) == 0


def test_pipes_cannot_be_sought(tree: Path) -> None:
    read_end, write_end = os.pipe()
    guest = Guest(Files.standard(read_end, write_end, write_end))
    assert guest.call(LSEEK, 0, 0, 0) == -ESPIPE
    assert guest.call(17, 0, SCRATCH, 1, 0) == -ESPIPE
    os.close(read_end)
    os.close(write_end)


MKDIR, RMDIR, UNLINK, UNLINKAT, RENAME, TRUNCATE = 83, 84, 87, 263, 82, 76


def two_paths(guest: Guest, first: str, second: str) -> tuple[int, int]:
    return guest.path(first), guest.put(os.fsencode(second) + b"\0", SCRATCH + 0x1000)


def test_changing_the_tree_where_it_is_allowed(tree: Path) -> None:
    guest = guest_below(tree, writable=True)
    assert guest.call(MKDIR, guest.path("new/"), 0o7777) == 0
    assert stat.S_IMODE((tree / "new").stat().st_mode) == 0o755
    assert guest.call(MKDIR, guest.path("new"), 0o755) == -EEXIST
    assert guest.call(RENAME, *two_paths(guest, "file", "new/file")) == 0
    assert (tree / "new" / "file").read_bytes() == b"0123456789"
    assert guest.call(TRUNCATE, guest.path("new/file"), 3) == 0
    assert (tree / "new" / "file").read_bytes() == b"012"
    assert guest.call(UNLINK, guest.path("new")) == -EISDIR
    assert guest.call(UNLINK, guest.path("new/file")) == 0
    assert guest.call(RMDIR, guest.path("/new/")) == 0
    assert not (tree / "new").exists()
    assert guest.call(RMDIR, guest.path("secret")) == -ENOTDIR
    assert guest.call(RMDIR, guest.path("dir/..")) == -EINVAL
    assert guest.call(UNLINK, guest.path("missing")) == -ENOENT
    assert guest.call(UNLINKAT, CWD, guest.path("dir"), 1) == -EINVAL


def test_changing_the_tree_never_follows_links_out(tree: Path) -> None:
    guest = guest_below(tree, writable=True)
    assert guest.call(UNLINK, guest.path("outside")) == 0  # the link itself
    assert guest.call(RENAME, *two_paths(guest, "file", "../../moved")) == 0
    assert (tree / "moved").exists() and not (tree.parent / "moved").exists()
    assert guest.call(RMDIR, guest.path("outside-relative")) == -ENOTDIR
    assert guest.call(MKDIR, guest.path("host-absolute"), 0o755) == -EEXIST
    assert guest.call(RMDIR, guest.path("/")) == -EINVAL
    assert (tree.parent / "secret").read_text() == "host"


def test_the_tree_is_read_only_unless_asked(tree: Path) -> None:
    guest = guest_below(tree)
    before = sorted(os.listdir(tree))
    assert guest.call(MKDIR, guest.path("new"), 0o755) == -EROFS
    assert guest.call(RENAME, *two_paths(guest, "file", "other")) == -EROFS
    assert guest.call(TRUNCATE, guest.path("file"), 0) == -EROFS
    assert guest.call(UNLINK, guest.path("file")) == -EROFS
    assert guest.call(RMDIR, guest.path("dir/deep")) == -EROFS
    assert sorted(os.listdir(tree)) == before
