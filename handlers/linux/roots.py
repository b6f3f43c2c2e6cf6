"""The host directory that a program may see, and how a guest path is looked up below it.

The guest sees the directory as ``/``. A path is walked one component at a time: each component is
opened relative to the descriptor of the directory before it, never following a link. ``..`` goes
back to the descriptor we came from, and the target of a symbolic link is walked as a guest path
of its own. So nothing outside can be reached, whatever somebody renames meanwhile on the host.
Directories on other file systems (/proc, /dev, /sys below a root of ``/``) are refused, and
nothing but regular files and directories is ever opened.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from errno import EACCES, EEXIST, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EROFS, ESTALE

from handlers.linux.outcome import error
from sandbox.errors import SandboxError

MAX_LINKS = 40
"""Symbolic links in one look-up (MAXSYMLINKS)."""
MAX_DEPTH = 128
"""Directories below the root: each costs a host descriptor while a path is walked."""

_WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_KERNEL_DIRECTORIES = ("/proc", "/sys", "/dev")
_HONOURED = os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECTORY


class Place:
    """Where a path leads: a directory held open, and a name in it or (None) that directory.

    ``status`` is what stands there, not followed, or None where nothing does. A context manager.
    """

    def __init__(self, parent: int, name: bytes | None, path: bytes) -> None:
        self.parent = parent
        self.name = name
        self.path = path
        """The guest's absolute path of it, without links."""
        self.status: os.stat_result | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_unused: object) -> None:
        os.close(self.parent)

    def required(self) -> os.stat_result:
        """What stands there; ENOENT if nothing."""
        if self.status is None:
            raise error(ENOENT)
        return self.status

    def readlink(self) -> bytes:
        """Target of the symbolic link that stands there."""
        if self.name is None:
            raise error(ENOENT)
        return os.readlink(self.name, dir_fd=self.parent)


class Root:
    """A directory of the host, for reading only or also for ``writable`` use. Hold it open."""

    def __init__(self, directory: str | os.PathLike[str], *, writable: bool = False) -> None:
        self.writable = writable
        try:
            self._fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as failure:
            raise SandboxError(
                f"root directory {os.fspath(directory)!r}: {failure.strerror}; "
                "give a directory that the guest may see"
            ) from None
        self._device = os.fstat(self._fd).st_dev
        if self._device in _kernel_devices():
            os.close(self._fd)
            raise SandboxError(
                f"root directory {os.fspath(directory)!r}: it belongs to the kernel "
                "(proc, sysfs, devices) and cannot be given to a guest"
            )

    def close(self) -> None:
        os.close(self._fd)

    def find(self, path: bytes, base: bytes = b"/", *, follow: bool = True) -> Place:
        """Walk ``path`` from the guest directory ``base``; ``follow`` is for a link at its end."""
        if not path:
            raise error(ENOENT)
        walk = _Walk(self._fd, self._device)
        try:
            place = walk.run(path if path.startswith(b"/") else base + b"/" + path, follow)
        finally:
            walk.close()
        return place

    def open(
        self, path: bytes, base: bytes, flags: int, mode: int
    ) -> tuple[int, bytes, os.stat_result]:
        """Open a regular file or directory: its host descriptor, guest path and status.

        ``flags`` are the kernel's; ``mode`` is for a new file.
        """
        creates, writes = flags & os.O_CREAT, flags & os.O_ACCMODE != os.O_RDONLY
        exclusive = creates and flags & os.O_EXCL
        follow = not flags & os.O_NOFOLLOW and not exclusive
        with self.find(path, base, follow=follow) as place:
            if place.status is None:
                if not creates:
                    raise error(ENOENT)
                host = self._create(place, flags, mode)
            else:
                if exclusive:
                    raise error(EEXIST)
                self._check(place.status, flags, bool(writes or flags & os.O_TRUNC))
                host = _reopen(place, flags)
                if flags & os.O_TRUNC:
                    os.ftruncate(host, 0)
            return host, place.path, os.fstat(host)

    def _create(self, place: Place, flags: int, mode: int) -> int:
        if not self.writable:
            raise error(EROFS)
        if flags & os.O_DIRECTORY or place.name is None:
            raise error(ENOENT)
        access = flags & (os.O_ACCMODE | _HONOURED)
        safe = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(place.name, access | safe, mode & 0o777, dir_fd=place.parent)

    def _check(self, status: os.stat_result, flags: int, writes: bool) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFLNK:
            raise error(ELOOP)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise error(EACCES)
        if kind == stat.S_IFDIR and (writes or flags & os.O_CREAT):
            raise error(EISDIR)
        if kind != stat.S_IFDIR and flags & os.O_DIRECTORY:
            raise error(ENOTDIR)
        if writes and not self.writable:
            raise error(EROFS)


def _reopen(place: Place, flags: int) -> int:
    """Open what ``place`` found, and nothing that was put there since.

    O_NONBLOCK keeps even an exchanged name (a FIFO) from blocking us; files do not heed it.
    """
    safe = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    access = flags & (os.O_ACCMODE | _HONOURED)
    host = os.open(place.name or b".", access | safe, dir_fd=place.parent)
    now, seen = os.fstat(host), place.required()
    if (now.st_dev, now.st_ino, now.st_mode) != (seen.st_dev, seen.st_ino, seen.st_mode):
        os.close(host)
        raise error(ESTALE)
    return host


def _kernel_devices() -> set[int]:
    root = os.stat("/").st_dev
    found = {os.stat(path).st_dev for path in _KERNEL_DIRECTORIES if os.path.isdir(path)}
    return found - {root}


class _Walk:
    """One look-up: the directories entered so far, outermost first."""

    def __init__(self, root: int, device: int) -> None:
        self._device = device
        self._open = [os.dup(root)]
        self._names: list[bytes] = []

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)

    def run(self, path: bytes, follow: bool) -> Place:
        parts = deque(_components(path))
        directory = path.endswith((b"/", b"/."))
        links = 0
        while parts:
            part = parts.popleft()
            if part == b"..":
                self._leave()
                continue
            try:
                fd = os.open(part, _WALK, dir_fd=self._open[-1])
            except FileNotFoundError:
                if parts or directory:
                    raise
                return self._place(part, None)
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                self._enter(fd, part, status)
                continue
            try:
                target = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else None
            finally:
                os.close(fd)
            last = not parts
            if target is None or (last and not follow and not directory):
                if not last or (directory and target is None):
                    raise error(ENOTDIR)
                return self._place(part, status)
            links += 1
            if links > MAX_LINKS:
                raise error(ELOOP)
            if target.startswith(b"/"):
                self._leave_all()
            directory |= last and target.endswith((b"/", b"/."))
            parts.extendleft(reversed(_components(target)))
        return self._place(None, os.fstat(self._open[-1]))

    def _place(self, name: bytes | None, status: os.stat_result | None) -> Place:
        names = self._names if name is None else [*self._names, name]
        place = Place(os.dup(self._open[-1]), name, b"/" + b"/".join(names))
        place.status = status
        return place

    def _enter(self, fd: int, name: bytes, status: os.stat_result) -> None:
        self._open.append(fd)
        self._names.append(name)
        if status.st_dev != self._device:
            raise error(EACCES)
        if len(self._open) > MAX_DEPTH:
            raise error(ENAMETOOLONG)

    def _leave(self) -> None:
        if len(self._open) > 1:
            os.close(self._open.pop())
            self._names.pop()

    def _leave_all(self) -> None:
        while len(self._open) > 1:
            self._leave()


def _components(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]
