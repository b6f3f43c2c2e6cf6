"""Host runs that are left and come back at any time: stops, steps, code that changes, lack of room.

With other seeds, and more: ``HOST_RUN_SEEDS=100000:2000 pytest tests/test_host_loops.py``.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import pytest
from iced_x86 import Decoder
from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from sandbox.boot import Machine
from sandbox.engine import hidden, host_memory
from sandbox.exits import GuestException, Intr
from sandbox.memory import PAGE_SIZE
from sandbox.registers import TF
from tests.guest import BASE
from tests.host_programs import (
    DATA,
    Program,
    computer,
    copy_state,
    counts,
    first_difference,
    load,
    program,
    run,
    snapshot,
)

FIRST, COUNT = map(int, os.environ.get("HOST_RUN_SEEDS", "0:30").split(":"))
SECONDS = 30
KEYSTONE = Ks(KS_ARCH_X86, KS_MODE_64)


@pytest.fixture(scope="module")
def both() -> Iterator[list[Machine]]:
    """Host runs, handlers."""
    with ExitStack() as stack:
        yield [stack.enter_context(computer(lowering=low)) for low in (True, False)]


@contextmanager
def disturbed(found: Machine, seed: int, pause: float = 0.0006) -> Iterator[None]:
    """Somebody asks for a stop all the time."""
    rng, done = random.Random(seed), threading.Event()

    def disturb() -> None:
        while not done.wait(rng.random() * pause):
            found.vcpu.request_stop()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_stop_finds_the_guest_between_two_instructions_with_all_its_state(
    both: list[Machine],
) -> None:
    """At each stop handlers go on from there, in another machine: they come to the same end."""
    host, handlers = both
    rng, stops = random.Random(FIRST), 0
    for seed in range(FIRST + 10_000, FIRST + 10_000 + COUNT):
        what = program(seed, faults=False, floats=False)
        load(handlers, what)
        want = run(handlers, what)
        load(host, what)
        load(handlers, what)
        with disturbed(host, seed):
            while isinstance(host.vcpu.run(SECONDS), Intr):
                stops += 1
                assert host.vcpu.registers.rip in what.starts
                if rng.random() < 0.15:
                    copy_state(host, handlers)
                    got = run(handlers, what)
                    assert first_difference(want, got) is None, f"seed {seed}\n{what.text}"
        end = snapshot(host)
        assert want[-1][-len(end) :] == end, f"seed {seed}\n{what.text}"
    assert stops


def test_counts_are_exact_however_often_the_guest_is_stopped() -> None:
    with computer() as host, computer(lowering=False) as handlers:
        host.vm.settings.count_lowered = True
        host.vm.policy = host.vm.policy
        for seed in range(FIRST + 20_000, FIRST + 20_000 + COUNT):
            what = program(seed, faults=False)
            before = [counts(found) for found in (host, handlers)]
            for found in (host, handlers):
                load(found, what)
            run(handlers, what)
            with disturbed(host, seed):
                run(host, what)
            got = [counts(found) - b for found, b in zip((host, handlers), before, strict=True)]
            assert got[0] == got[1], f"seed {seed}\n{what.text}"


def test_single_stepping_sees_the_same_states(both: list[Machine]) -> None:
    """From anywhere in a program: with TF set while it runs, then not any more."""
    for seed in range(FIRST + 30_000, FIRST + 30_000 + COUNT):
        what = program(seed, faults=False)
        steps = random.Random(seed).randrange(30)
        states: list[list[Any]] = [[], []]
        for found, seen in zip(both, states, strict=True):
            load(found, what)
            run(found, what)  # so that there is hidden code already
            load(found, what)
            bank = found.vm.engine.bank
            bank.write("rflags", bank.read("rflags") | TF)
            for _ in range(steps):
                left = found.vcpu.run(SECONDS)
                seen.append((type(left).__name__, *snapshot(found)))
                if not isinstance(left, GuestException) or left.exception != 1:
                    break
            bank.write("rflags", bank.read("rflags") & ~TF)
            seen += run(found, what)
        assert first_difference(states[1], states[0]) is None, f"seed {seed}\n{what.text}"


# -- code that changes ---------------------------------------------------------------------------

OPERATIONS = [
    bytes(KEYSTONE.asm(text)[0])
    for text in (
        "vpaddd ymm1, ymm1, ymm0", "vpsubd ymm1, ymm1, ymm0", "vpxor ymm1, ymm1, ymm0",
        "vpaddd ymm0, ymm1, ymm0", "vpsubd ymm1, ymm0, ymm1", "vpaddw ymm1, ymm1, ymm1",
        "lea eax, [rax + 5]; nop", "add eax, ebx; add eax, eax", "not eax; not ebx",
    )
]  # fmt: skip
"""Of 4 bytes each."""


def changing(seed: int) -> Program:
    """A loop of slots of 4 bytes, and stores into them: before them, behind, and across pages."""
    rng = random.Random(seed)
    lines = [f"mov ecx, {rng.choice((3, 9))}", "lea r10, [rip + slots]", "again:"]
    count = rng.randrange(12, 40)
    assert all(len(operation) == 4 for operation in OPERATIONS)

    def store() -> list[str]:
        slot, wide = rng.randrange(count - 8), rng.choice((0, 1, 2, 4, 8))
        data = b"".join(rng.choice(OPERATIONS) for _ in range(8))
        value = int.from_bytes(data[:4], "little")
        if wide == 0:
            return [f"mov dword ptr [rip + s{slot}], {value}"]
        if wide == 1:
            return [f"mov r11d, {value}", f"mov dword ptr [r10 + s{slot} - slots], r11d"]
        data_at = rng.randrange(16) * 4
        if wide == 2:
            return [
                f"vmovsd xmm3, qword ptr [r9 + {data_at}]",
                f"vmovsd qword ptr [rip + s{slot}], xmm3",
            ]
        register = "xmm3" if wide == 4 else "ymm3"
        return [f"vmovdqu {register}, [r9 + {data_at}]", f"vmovdqu [rip + s{slot}], {register}"]

    for number in range(count):
        if rng.random() < 0.12:
            lines += store()
        lines += ["slots:"] if number == 0 else []
        lines += [f"s{number}:", f".byte {', '.join(map(str, rng.choice(OPERATIONS)))}"]
    lines += store() if rng.random() < 0.5 else []
    lines += ["dec ecx", "jnz again", "hlt"]
    at = BASE + rng.choice((0, PAGE_SIZE - rng.randrange(1, 150)))
    text = "\n".join(lines)
    code = bytes(KEYSTONE.asm(text, at)[0])
    starts = frozenset(insn.ip for insn in Decoder(64, code, ip=at))
    return Program(text, b"\xcc" * (at - BASE) + code, seed, 0x1F80, bool(seed & 1), starts)


def prepare(found: Machine, what: Program) -> None:
    load(found, what)
    rng = random.Random(what.seed + 2)
    table = b"".join(rng.choice(OPERATIONS) for _ in range(64))
    found.vm.memory.load(DATA, table)
    found.vcpu.registers.gpr[9] = DATA


@pytest.mark.parametrize("stopped", [False, True])
def test_stores_into_the_code_take_effect_at_once(both: list[Machine], stopped: bool) -> None:
    host, handlers = both
    for seed in range(FIRST + 40_000, FIRST + 40_000 + COUNT):
        what = changing(seed)
        for _again in range(1 if stopped else 2):
            prepare(handlers, what)
            want = run(handlers, what)
            prepare(host, what)
            with disturbed(host, seed) if stopped else nullcontext():
                got = run(host, what)
            assert first_difference(want, got) is None, f"seed {seed}\n{what.text}"


# -- room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lack", ["entries", "machine code", "words", "hidden code"])
def test_the_machine_goes_on_when_room_is_used_up(
    monkeypatch: pytest.MonkeyPatch, lack: str, both: list[Machine]
) -> None:
    if lack == "entries":
        few = _few_entries(hidden.HiddenMemory.call_host)
        monkeypatch.setattr(hidden.HiddenMemory, "call_host", few)
    elif lack == "machine code":
        monkeypatch.setattr(host_memory, "_CODE_BYTES", host_memory._MOST_CODE + 20_000)
    elif lack == "words":
        monkeypatch.setattr(host_memory, "_WORDS_BYTES", 32 * host_memory.MAX_INSNS + 1000 & -8)
    else:
        monkeypatch.setattr(hidden, "_CODE_LIMIT", 2 * PAGE_SIZE)
    with computer() as found:
        found.vm.settings.count_lowered = True
        found.vm.policy = found.vm.policy
        for seed in range(FIRST + 60_000, FIRST + 60_000 + COUNT):
            what = program(seed, floats=False)
            load(both[1], what)
            load(found, what)
            want, got = run(both[1], what), run(found, what)
            assert first_difference(want, got) is None, f"seed {seed}\n{what.text}"


def _few_entries(call: Any) -> Any:
    def few(self: hidden.HiddenMemory) -> tuple[int, int] | None:
        return cast("tuple[int, int] | None", call(self)) if self._used_entries < 300 else None

    return few


def test_machines_at_once_in_threads_come_to_the_same_ends() -> None:
    seeds = range(FIRST + 70_000, FIRST + 70_000 + COUNT)
    programs = [program(seed, floats=False) for seed in seeds]
    traces: list[list[Any]] = [[], [], []]

    def play(found: Machine, seen: list[Any]) -> None:
        for what in programs:
            load(found, what)
            seen.append(run(found, what))

    with ExitStack() as stack:
        machines = [stack.enter_context(computer()) for _ in traces]
        threads = [
            threading.Thread(target=play, args=pair) for pair in zip(machines, traces, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with computer(lowering=False) as handlers:
            want: list[Any] = []
            play(handlers, want)
    assert all(len(seen) == len(programs) for seen in traces)
    for number, what in enumerate(programs):
        for seen in traces:
            assert first_difference(want[number], seen[number]) is None, what.text
