"""Signals: dispositions and the mask are remembered; a signal whose default is to end does so.

Handlers of the program are not run: a signal that has one ends the program with a clear reason,
but for SIGPIPE, where the call's EPIPE says the same.
"""

from __future__ import annotations

from errno import EINVAL, ENOMEM, EPERM, ESRCH
from signal import Signals as Number

from handlers.linux.outcome import Again, error
from handlers.linux.process import Process
from handlers.linux.signal_state import SS_DISABLE, STACK_T
from handlers.linux.syscalls import syscall

SIG_DFL, SIG_IGN = 0, 1
SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK = 0, 1, 2
SIGKILL, SIGPIPE, SIGSTOP = Number.SIGKILL, Number.SIGPIPE, Number.SIGSTOP
COUNT = 64
_UNBLOCKABLE = 1 << SIGKILL - 1 | 1 << SIGSTOP - 1
_IGNORED = frozenset({Number.SIGCHLD, Number.SIGCONT, Number.SIGURG, Number.SIGWINCH})
_STOPPING = frozenset({Number.SIGSTOP, Number.SIGTSTP, Number.SIGTTIN, Number.SIGTTOU})
_ACTION = 32
"""Bytes of the kernel's ``struct sigaction``: handler, flags, restorer, mask."""
_SIGSET = 8
MINSIGSTKSZ = 2048


def _name(signal: int) -> str:
    return Number(signal).name if signal in Number.__members__.values() else f"signal {signal}"


def send(process: Process, signal: int) -> None:
    """Do what ``signal`` does to the process now: nothing, wait for the mask, or end it."""
    signals = process.signals
    disposition = signals.disposition(signal)
    if disposition == SIG_IGN or (disposition == SIG_DFL and signal in _IGNORED | _STOPPING):
        return
    bit = 1 << signal - 1
    if signals.mask & bit & ~_UNBLOCKABLE:
        signals.pending |= bit
        return
    if disposition == SIG_DFL:
        raise process.kill(signal, f"killed by {_name(signal)}")
    raise process.kill(
        signal, f"{_name(signal)}: its handler at {disposition:#x} is not run (not supported)"
    )


def broken_pipe(process: Process) -> None:
    """SIGPIPE for a write that nobody will read; the call itself fails with EPIPE."""
    if process.signals.disposition(SIGPIPE) in (SIG_DFL, SIG_IGN):
        send(process, SIGPIPE)


def _check(signal: int) -> int:
    if not 1 <= signal <= COUNT:
        raise error(EINVAL)
    return signal


@syscall(13, "rt_sigaction", "int address address size")
def rt_sigaction(process: Process, signal: int, new: int, old: int, size: int) -> int:
    if size != _SIGSET:
        raise error(EINVAL)
    _check(signal)
    if new and signal in (SIGKILL, SIGSTOP):
        raise error(EINVAL)
    actions = process.signals.actions
    before = actions.get(signal, bytes(_ACTION))
    wanted = process.cpu.read(new, _ACTION) if new else None
    if old:
        process.cpu.write(old, before)
    if wanted is not None:
        actions[signal] = wanted
    return 0


@syscall(14, "rt_sigprocmask", "int address address size")
def rt_sigprocmask(process: Process, how: int, new: int, old: int, size: int) -> int:
    if size != _SIGSET:
        raise error(EINVAL)
    signals = process.signals
    before = mask = signals.mask
    if new:
        given = process.cpu.read_int(new, _SIGSET)
        changed = {SIG_BLOCK: mask | given, SIG_UNBLOCK: mask & ~given, SIG_SETMASK: given}
        if how not in changed:
            raise error(EINVAL)
        mask = changed[how] & ~_UNBLOCKABLE
    if old:
        process.write_int(old, before, _SIGSET)
    signals.mask = mask
    _deliver_pending(process)
    return 0


def _deliver_pending(process: Process) -> None:
    signals = process.signals
    for signal in range(1, COUNT + 1):
        bit = 1 << signal - 1
        if signals.pending & ~signals.mask & bit:
            signals.pending &= ~bit
            send(process, signal)


@syscall(127, "rt_sigpending", "address size")
def rt_sigpending(process: Process, where: int, size: int) -> int:
    if not 0 < size <= _SIGSET:
        raise error(EINVAL)
    process.cpu.write(where, process.signals.pending.to_bytes(_SIGSET, "little")[:size])
    return 0


@syscall(131, "sigaltstack", "address address")
def sigaltstack(process: Process, new: int, old: int) -> int:
    before, wanted = process.signals.stack, None
    if new:
        wanted = process.cpu.read(new, STACK_T.size)
        _sp, flags, size = STACK_T.unpack(wanted)
        if flags & ~SS_DISABLE:
            raise error(EINVAL)
        if not flags & SS_DISABLE and size < MINSIGSTKSZ:
            raise error(ENOMEM)
        if flags & SS_DISABLE:
            wanted = STACK_T.pack(0, SS_DISABLE, 0)
    if old:
        process.cpu.write(old, before)
    if wanted is not None:
        process.signals.stack = wanted
    return 0


@syscall(34, "pause")
def pause(process: Process) -> int:
    """Only a signal ends it, and there is nobody to send one."""
    process.sleep(0.05)
    raise Again


@syscall(62, "kill", "int int")
def kill(process: Process, pid: int, signal: int) -> int:
    own = process.identity.pid
    if pid not in (own, 0, -own):
        raise error(EPERM if pid == -1 or pid == process.identity.ppid else ESRCH)
    return _send_to_self(process, signal)


@syscall(200, "tkill", "int int")
def tkill(process: Process, tid: int, signal: int) -> int:
    return tgkill(process, process.identity.pid, tid, signal)


@syscall(234, "tgkill", "int int int")
def tgkill(process: Process, pid: int, tid: int, signal: int) -> int:
    if pid <= 0 or tid <= 0:
        raise error(EINVAL)
    if pid != process.identity.pid or tid != process.identity.pid:
        raise error(ESRCH)
    return _send_to_self(process, signal)


def _send_to_self(process: Process, signal: int) -> int:
    if signal:
        send(process, _check(signal))
    return 0
