"""Calls that change the directory tree; all need a writable root.

Each acts on a name in a directory that the walk of :mod:`handlers.linux.roots` holds open, and
the host's call does not follow that name. There is no symlink, link, mknod, chmod or chown: what a
program leaves behind is plain files and directories.
"""

from __future__ import annotations

import os
import stat
from errno import EBUSY, EEXIST, EINVAL, EISDIR, ENOENT, ENOTDIR, EROFS

from handlers.linux.files import AT_FDCWD
from handlers.linux.outcome import error
from handlers.linux.process import Process
from handlers.linux.roots import Place
from handlers.linux.syscalls import syscall

AT_REMOVEDIR = 0x200


def _changeable(process: Process, place: Place) -> bytes:
    """The name that is to be changed; not the root or a directory reached by ``.`` or ``..``."""
    root = process.files.root
    if root is None or not root.writable:
        raise error(EROFS)
    if place.name is None:
        raise error(EBUSY)
    return place.name


@syscall(258, "mkdirat", "int path uint")
def mkdirat(process: Process, directory: int, path: bytes, mode: int) -> int:
    with process.files.find(directory, path.rstrip(b"/") or path, follow=False) as place:
        if place.status is not None:
            raise error(EEXIST)
        name = _changeable(process, place)
        os.mkdir(name, mode & 0o777 & ~process.files.umask, dir_fd=place.parent)
    return 0


@syscall(83, "mkdir", "path uint")
def mkdir(process: Process, path: bytes, mode: int) -> int:
    return mkdirat(process, AT_FDCWD, path, mode)


@syscall(263, "unlinkat", "int path int")
def unlinkat(process: Process, directory: int, path: bytes, flags: int) -> int:
    if flags & ~AT_REMOVEDIR:
        raise error(EINVAL)
    with process.files.find(directory, path, follow=False) as place:
        is_directory = stat.S_ISDIR(place.required().st_mode)
        if flags and not is_directory:
            raise error(ENOTDIR)
        if is_directory and not flags:
            raise error(EISDIR)
        if not is_directory:
            os.unlink(_changeable(process, place), dir_fd=place.parent)
            return 0
    return _remove_directory(process, directory, path)


def _remove_directory(process: Process, directory: int, path: bytes) -> int:
    """Of a directory the walk holds the directory itself: look its parent up, then its name."""
    head, _slash, name = path.rstrip(b"/").rpartition(b"/")
    if name in (b".", b"..", b""):
        raise error(EINVAL)
    parent = head or (b"/" if path.startswith(b"/") else b".")
    with process.files.find(directory, parent) as place:
        root = process.files.root
        if root is None or not root.writable:
            raise error(EROFS)
        if place.name is not None:
            raise error(ENOTDIR)
        os.rmdir(name, dir_fd=place.parent)
    return 0


@syscall(87, "unlink", "path")
def unlink(process: Process, path: bytes) -> int:
    return unlinkat(process, AT_FDCWD, path, 0)


@syscall(84, "rmdir", "path")
def rmdir(process: Process, path: bytes) -> int:
    return unlinkat(process, AT_FDCWD, path, AT_REMOVEDIR)


@syscall(264, "renameat", "int path int path")
def renameat(process: Process, from_: int, old: bytes, to: int, new: bytes) -> int:
    """Of files; a directory stays where it is (EBUSY), for a walk may be inside it."""
    find = process.files.find
    with find(from_, old, follow=False) as source, find(to, new, follow=False) as target:
        source.required()
        os.rename(
            _changeable(process, source),
            _changeable(process, target),
            src_dir_fd=source.parent,
            dst_dir_fd=target.parent,
        )
    return 0


@syscall(316, "renameat2", "int path int path uint")
def renameat2(process: Process, from_: int, old: bytes, to: int, new: bytes, flags: int) -> int:
    if flags:
        raise error(EINVAL)
    return renameat(process, from_, old, to, new)


@syscall(82, "rename", "path path")
def rename(process: Process, old: bytes, new: bytes) -> int:
    return renameat(process, AT_FDCWD, old, AT_FDCWD, new)


@syscall(76, "truncate", "path long")
def truncate(process: Process, path: bytes, size: int) -> int:
    files = process.files
    if size < 0:
        raise error(EINVAL)
    if files.root is None:
        raise error(ENOENT)
    host, _path, _status = files.root.open(path, files.base(AT_FDCWD, path), os.O_WRONLY, 0)
    try:
        os.ftruncate(host, size)
    finally:
        os.close(host)
    return 0
