"""Open files: what the program's descriptors stand for on the host.

Standard input, output and error are the host's own descriptors, lent: the program may use them,
but never closes them, nor changes their flags. Everything else lies below the :class:`Root`.
"""

from __future__ import annotations

import os
import select
import stat
import struct
from dataclasses import dataclass, field
from errno import EAGAIN, EBADF, EINVAL, EMFILE, ENOENT, ENOTDIR

from handlers.linux.outcome import Again, error
from handlers.linux.roots import Place, Root

MAX_FILES = 1024
"""Descriptors a program may have (RLIMIT_NOFILE)."""
AT_FDCWD = -100
WAIT_MS = 50
"""How long a call waits for the host before the guest executes it again."""
PIPE_BUF = 4096

_STATUS_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECTORY | os.O_SYNC


@dataclass(slots=True)
class OpenFile:
    """An open file description: shared by the descriptors that ``dup`` makes of one."""

    host: int
    kind: int
    """``S_IFMT`` part of the host file's mode."""
    flags: int
    """What F_GETFL says: access mode and status flags."""
    path: bytes = b""
    """The guest's absolute path; empty for the standard streams."""
    owned: bool = True
    """Whether the last close closes ``host``."""
    references: int = 0
    entries: list[tuple[bytes, int, int]] | None = None
    """Of a directory that is being read: (name, inode, d_type)."""
    position: int = 0
    """Index into ``entries``."""

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    @property
    def stream(self) -> bool:
        """Whether a transfer may have to wait, and a short one is normal: pipe, tty, socket."""
        return self.kind not in (stat.S_IFREG, stat.S_IFDIR)

    def wait(self, event: int) -> None:
        """Wait until a transfer will not block: EAGAIN if it should not wait, or Again."""
        if not self.stream:
            return
        poller = select.poll()
        poller.register(self.host, event)
        if self.flags & os.O_NONBLOCK:
            if not poller.poll(0):
                raise error(EAGAIN)
        elif not poller.poll(WAIT_MS):
            raise Again

    def read_entries(self) -> list[tuple[bytes, int, int]]:
        """The directory's entries; ``..`` has the inode of ``.``, for it may lie outside."""
        if self.kind != stat.S_IFDIR:
            raise error(ENOTDIR)
        if self.entries is None:
            inode = os.fstat(self.host).st_ino
            self.entries = [(b".", inode, _DT_DIR), (b"..", inode, _DT_DIR)]
            with os.scandir(self.host) as listing:
                for entry in listing:
                    self.entries.append((os.fsencode(entry.name), entry.inode(), _d_type(entry)))
        return self.entries


_DT_UNKNOWN = 0
_DT_DIR = stat.S_IFDIR >> 12


def _d_type(entry: os.DirEntry[str]) -> int:
    try:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
    except FileNotFoundError:  # removed since it was listed
        return _DT_UNKNOWN


@dataclass(slots=True)
class Descriptor:
    """One entry of the program's descriptor table."""

    file: OpenFile
    close_on_exec: bool = False


def standard_stream(host: int, access: int) -> OpenFile | None:
    """The host's descriptor ``host`` as a stream of the program; None if it is not open."""
    try:
        kind = stat.S_IFMT(os.fstat(host).st_mode)
    except OSError:
        return None
    return OpenFile(host, kind, access, owned=False)


@dataclass(slots=True)
class Files:
    """Descriptor table, current directory and what can be seen of the host."""

    root: Root | None = None
    cwd: bytes = b"/"
    umask: int = 0o022
    table: dict[int, Descriptor] = field(default_factory=dict)

    @classmethod
    def standard(
        cls, stdin: int = 0, stdout: int = 1, stderr: int = 2, root: Root | None = None
    ) -> Files:
        """A table with the three standard streams on these host descriptors."""
        files = cls(root)
        streams = ((stdin, os.O_RDONLY), (stdout, os.O_WRONLY), (stderr, os.O_WRONLY))
        for number, (host, access) in enumerate(streams):
            stream = standard_stream(host, access)
            if stream is not None:
                files.install(stream, number)
        return files

    def get(self, fd: int) -> OpenFile:
        """The open file of a descriptor; EBADF if there is none."""
        return self.descriptor(fd).file

    def descriptor(self, fd: int) -> Descriptor:
        found = self.table.get(fd)
        if found is None:
            raise error(EBADF)
        return found

    def free_number(self, lowest: int = 0) -> int:
        """The lowest free descriptor from ``lowest`` on; EMFILE if all are taken."""
        for fd in range(lowest, MAX_FILES):
            if fd not in self.table:
                return fd
        raise error(EMFILE)

    def install(self, file: OpenFile, fd: int, *, close_on_exec: bool = False) -> int:
        """Let ``fd`` stand for ``file``, in place of what it stood for."""
        if not 0 <= fd < MAX_FILES:
            raise error(EBADF)
        file.references += 1
        if fd in self.table:
            self.close(fd)
        self.table[fd] = Descriptor(file, close_on_exec)
        return fd

    def close(self, fd: int) -> None:
        """Take a descriptor away; the host's is closed with the last one if it is ours."""
        file = self.descriptor(fd).file
        del self.table[fd]
        file.references -= 1
        if file.references == 0 and file.owned:
            os.close(file.host)

    def close_all(self) -> None:
        """Close every descriptor: the program is over."""
        for fd in list(self.table):
            self.close(fd)

    def base(self, directory: int, path: bytes) -> bytes:
        """The guest directory that ``path`` is relative to, for a call with a ``dirfd``."""
        if path.startswith(b"/"):
            return b"/"
        if directory == AT_FDCWD:
            return self.cwd
        file = self.get(directory)
        if file.kind != stat.S_IFDIR:
            raise error(ENOTDIR)
        return file.path

    def find(self, directory: int, path: bytes, *, follow: bool = True) -> Place:
        """Look a path up below the root; ENOENT for all of them if there is no root."""
        base = self.base(directory, path)
        if self.root is None:
            raise error(ENOENT)
        return self.root.find(path, base, follow=follow)

    def open(self, directory: int, path: bytes, flags: int, mode: int) -> int:
        """Open a file below the root on the lowest free descriptor."""
        fd = self.free_number()
        base = self.base(directory, path)
        if self.root is None:
            raise error(ENOENT)
        if flags & os.O_ACCMODE == os.O_ACCMODE:
            raise error(EINVAL)
        host, found, status = self.root.open(path, base, flags, mode & ~self.umask)
        file = OpenFile(host, stat.S_IFMT(status.st_mode), flags & _STATUS_FLAGS, found)
        return self.install(file, fd, close_on_exec=bool(flags & os.O_CLOEXEC))


_STAT = struct.Struct("<QQQIIIIQqqqqqqqqq24x")
"""``struct stat`` of x86-64 (asm/stat.h), 144 bytes."""
_BLOCK = 4096


def pack_stat(status: os.stat_result) -> bytes:
    """``struct stat`` as the program gets it."""
    times = [
        part
        for stamp in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        for part in divmod(stamp, 1_000_000_000)
    ]
    return _STAT.pack(
        status.st_dev,
        status.st_ino,
        status.st_nlink,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        0,
        status.st_rdev,
        status.st_size,
        _BLOCK,
        status.st_blocks,
        *times,
    )
