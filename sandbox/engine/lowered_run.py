"""From guest code to hidden code: runs of lowered instructions, with what lies between them.

A *run* begins at a trapped instruction that can be lowered, and goes on as long as the next
instruction can be lowered too, or is allowed and a short stretch of such leads to one that can.
It stays in its page, and ends behind a store, for that may change the code that follows. The
site is patched with a jump into the hidden copy, whose end jumps back behind the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    Encoder,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemoryOperand,
    OpAccess,
    Register,
)

from sandbox.decode import MAX_LENGTH as _MAX_LENGTH
from sandbox.decode import MNEMONIC_NAMES, Insn, decode
from sandbox.engine.hidden import HiddenMemory, Place
from sandbox.engine.host_builder import HostBuilder
from sandbox.engine.host_run import HostInsn, HostRun
from sandbox.lowering import (
    BEFORE,
    Emitter,
    Lowering,
    NotLoweredError,
    Rule,
    Step,
    signed,
    spill_memory,
)

MAX_STRETCH: Final = 8
"""So many allowed instructions between two lowered ones are worth a copy."""
_MAX_STEPS: Final = 120
_MAX_CODE: Final = 2048
_WRITES: Final = frozenset(
    (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
)
_X87: Final = frozenset(
    (CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.MMX)
)
_NOP: Final = bytes.fromhex("660f1f840000000000")
_JUMP: Final = bytes.fromhex("ff2425")  # jmp qword ptr [disp32]
_SITE_BYTES: Final = 7
_POINTERS: Final = 16
"""Bytes of the addresses before the code of a run."""
_IDLE_PREFIX: Final = b"\x3e"  # DS, which a jump in 64-bit mode does not heed
_SHORT_NOPS: Final = (b"", b"\x90", b"\x66\x90", *(
    bytes.fromhex(text)
    for text in (
        "0f1f00", "0f1f4000", "0f1f440000", "660f1f440000", "0f1f8000000000", "0f1f840000000000",
    )
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """A run in hidden code, and the patch that leads there."""

    size: int
    """Bytes of the guest's code that it stands for."""
    patch: bytes
    """What takes their place while the block is translated: padding and a jump, perhaps longer."""
    patch_count: int
    """Instructions in the patch."""
    places: tuple[tuple[int, bytes, str], ...]
    """Of the lowered instructions: address, bytes and mnemonic."""
    counter: int
    """Where it is counted how often the run began; 0 if it is not."""
    host: HostRun | None = None
    """What it is if the host does it."""


@dataclass(slots=True)
class _Found:
    """What a run consists of."""

    starts: list[int]
    """Addresses of its instructions, then of what follows."""
    lowered: list[tuple[int, str]]
    """Number and mnemonic of each that is lowered."""

    def places(self, linear: int, code: bytes) -> tuple[tuple[int, bytes, str], ...]:
        """Of the lowered instructions: address, bytes, mnemonic. ``code``: from ``linear`` on."""
        spans = [at - linear for at in self.starts]
        return tuple(
            (self.starts[n], code[spans[n] : spans[n + 1]], name) for n, name in self.lowered
        )

    @property
    def left(self) -> list[tuple[str, ...]]:
        """For each of its instructions, and what follows: the mnemonics from there on."""
        return [
            tuple(name for number, name in self.lowered if number >= index)
            for index in range(len(self.starts))
        ]


@dataclass(frozen=True, slots=True)
class _Code:
    """What the code of a run has to know of the guest: addresses of its instructions and of what
    follows, the mnemonics that are left from each on, where it goes on, and how many instructions
    are done then."""

    starts: list[int]
    left: list[tuple[str, ...]]
    following: int
    done: int


def _found_for_host(insns: Sequence[HostInsn]) -> _Found:
    starts = [item.insn.ip for item in insns]
    lowered = [
        (number, MNEMONIC_NAMES[item.insn.mnemonic])
        for number, item in enumerate(insns)
        if item.lowered
    ]
    return _Found([*starts, insns[-1].insn.next_ip], lowered)


class RunBuilder:
    """Makes runs, once for the same code at the same address.

    ``rule``: how a trapped instruction is lowered, if it is; ``traps``: whether an instruction is;
    ``host``: what makes host runs, where the host can do them;
    ``counted``: whether executions are counted, which costs as much as one or two instructions.
    """

    def __init__(
        self,
        hidden: HiddenMemory,
        rule: Callable[[Insn], Lowering | None],
        traps: Callable[[Insn], bool],
        *,
        counted: bool,
        host: HostBuilder | None = None,
    ) -> None:
        self._hidden = hidden
        self._host = host
        self._rule = rule
        self._traps = traps
        self._runs: dict[tuple[int, bytes], Run] = {}
        self.jumps: dict[int, tuple[int, bytes]] = {}
        """Address of the jump in a patch behind padding: address and bytes of the run's code."""
        self._counted = counted
        self._executions: Counter[str] = Counter()
        """Of runs that have been cleared, less what was counted too much."""
        self._gone: dict[int, tuple[str, ...]] = {}
        """By index of words: what is left undone if hidden code does the instruction and then the
        guest goes on."""
        self._info = InstructionInfoFactory()
        self._encoder = Encoder(64)
        self.full = False
        """Whether the hidden memory is used up: it has to be cleared."""

    def build(self, linear: int, code: bytes) -> Run | None:
        """The run that begins at ``linear``, where ``code`` stands up to the end of the page."""
        counter = self._hidden.free_counter() if self._counted else 0
        insns = self._host.collect(linear, code) if self._host else []
        emitter = Emitter(self._hidden.state)
        if insns:
            found = _found_for_host(insns)
        else:
            if counter:
                emitter.count(counter)
            found = self._collect(emitter, linear, code)
        if not found.lowered:
            return None
        size = found.starts[-1] - linear
        if max(size, _SITE_BYTES) > len(code):
            return None
        key = linear, code[:size]
        run = self._runs.get(key)
        if run is None:
            room = self._room_for_jump(found.starts)
            if room is None:
                return None
            host: HostRun | None = None
            if insns:
                pointer, host = self._write_for_host(insns, counter)
            else:
                emitter.finish()
                starts = found.starts
                code_of = _Code(starts, found.left, starts[-1], len(starts) - 1)
                pointer = self._write(emitter.steps, code_of)
            if pointer is None:
                return None
            if room[0]:
                self.jumps[linear + room[0]] = key
            if counter:
                self._hidden.take_counter()
            places = found.places(linear, code)
            run = self._runs[key] = Run(size, *_patch(*room, pointer), places, counter, host)
        return run

    def is_for_host(self, insn: Insn) -> bool:
        """Whether the host does a trapped instruction."""
        return self._host is not None and self._host.accepts(insn)

    def instead(self, address: int, *, unmasked: bool) -> int | None:
        """The entry of hidden code that does the instruction which a host run has bailed out at;
        None if there is no such code. The run will go on there by itself the next time.

        ``address``: host address of the words; ``unmasked``: whether MXCSR has exceptions that are
        not masked.
        """
        assert self._host is not None
        memory = self._host.memory
        words = (address - memory.words_address) // 8
        run, number = self._host.bails[words]
        item = run.insns[number]
        if item.spilled or (unmasked and item.operands.uses_mxcsr):
            return None
        entry = self._alone(run, number, words)
        if entry is not None:
            memory.words[words] = entry
            memory.words[words + 2] -= 1
            memory.words[words + 3] += 1
        return entry

    def _alone(self, run: HostRun, number: int, words: int) -> int | None:
        """Hidden code for one instruction of a host run, which goes on with the next; its entry."""
        assert self._host is not None
        item, left = run.insns[number], _found_for_host(run.insns).left
        here, after = left[number], left[number + 1]
        following = self._host.reenter(run, number + 1, after)
        if following is None:
            self._gone[words] = after
            here, after, following = here[: len(here) - len(after)], (), item.insn.next_ip
        emitter, done = Emitter(self._hidden.state), 1
        if item.operands.ends:
            return item.insn.ip  # the guest's own
        try:
            if not item.lowered:
                emitter.copy(item.insn)
            elif not self._lower(emitter, item.insn, item.raw):
                emitter, done = Emitter(self._hidden.state), 0
                emitter.lower(item.insn, spill_memory)
                following = self._host.spilled(item, following)
        except NotLoweredError:
            return None
        emitter.finish()
        code = _Code([item.insn.ip, item.insn.next_ip], [here, after], following or 0, done)
        pointer = self._write(emitter.steps, code) if following else None
        return None if pointer is None else pointer + _POINTERS

    def _write_for_host(
        self, insns: list[HostInsn], counter: int
    ) -> tuple[int | None, HostRun | None]:
        assert self._host is not None
        made = self._host.write(insns, counter)
        if made is None:
            self.full = True
        return made or (None, None)

    def _room_for_jump(self, starts: Sequence[int]) -> tuple[int, int] | None:
        """Offset of the jump in the patch, and how many idle prefixes it has.

        It stands where no instruction of the run begins but the first, and no jump of another
        patch: so a guest that stops there is known to be in this patch.
        """
        for prefixes in range(_MAX_LENGTH - _SITE_BYTES + 1):
            at = max(starts[-1] - starts[0] - _SITE_BYTES - prefixes, 0)
            linear = starts[0] + at
            other = self.jumps.get(linear)
            if at == 0 or (linear not in starts and (other is None or other[0] == starts[0])):
                return at, prefixes
        return None

    def sites(self) -> Counter[str]:
        """How many instructions are lowered now, by mnemonic."""
        places = {place for run in self._runs.values() for place in run.places}
        return Counter(name for _address, _raw, name in places)

    def executions(self) -> Counter[str]:
        """How often lowered instructions ran, by mnemonic, if that is counted."""
        total = Counter(self._executions)
        for run in self._runs.values():
            self._add(total, run)
        return +total

    def _add(self, total: Counter[str], run: Run) -> None:
        if run.counter:
            times = self._hidden.count(run.counter)
            total.update(
                {
                    name: n * times
                    for name, n in Counter(name for _address, _raw, name in run.places).items()
                }
            )
            if run.host is not None:
                self._take_off(total, run.host)

    def _take_off(self, total: Counter[str], run: HostRun) -> None:
        """What a host run did not do, because it was left before its end."""
        assert self._host is not None
        words, left = self._host.memory.words, _found_for_host(run.insns).left
        for way in run.ways_out:
            for times, names in (
                (words[way.words + 2], left[way.number]),
                (words[way.words + 3], self._gone.get(way.words, ())),
            ):
                total.subtract({name: n * times for name, n in Counter(names).items()})

    def leave(self, place: Place) -> None:
        """The guest goes on elsewhere, before it has run all that was counted."""
        if self._counted:
            self._executions.subtract(place.left)

    def clear(self) -> None:
        """Forget all runs."""
        for run in self._runs.values():
            self._add(self._executions, run)
        self._runs.clear()
        self._gone.clear()
        self.jumps.clear()
        self._hidden.clear()
        if self._host is not None:
            self._host.clear()
        self.full = False

    # -- which instructions ---------------------------------------------------------------------

    def _collect(self, emitter: Emitter, linear: int, code: bytes) -> _Found:
        found = _Found([linear], [])
        decoder = Decoder(64, code, ip=linear)
        pending: list[int] = []
        last_mark = emitter.mark()
        while len(emitter.steps) < _MAX_STEPS and decoder.can_decode:
            at = decoder.position
            insn = decoder.decode()
            if insn.is_invalid:
                break
            mark = emitter.mark()
            raw = decode(code[at : decoder.position], 64)
            if not self._traps(raw):
                full = len(pending) == MAX_STRETCH
                if not found.lowered or full or not self._copy(emitter, insn):
                    break  # at the start: Unicorn refuses what is allowed, as BMI under CR0.TS
                pending.append(decoder.ip)
                continue
            if not self._lower(emitter, insn, raw):
                emitter.back_to(mark)
                break
            found.starts += pending
            found.lowered.append((len(found.starts) - 1, raw.mnemonic))
            found.starts.append(decoder.ip)
            pending.clear()
            last_mark = emitter.mark()
            if self._stores(insn):
                break
        emitter.back_to(last_mark)
        return found

    def _lower(self, emitter: Emitter, insn: Instruction, raw: Insn) -> bool:
        lowering = self._rule(raw)
        if lowering is None or lowering.rule is None:
            return False
        return self._emit(emitter, insn, lowering.rule)

    def _emit(self, emitter: Emitter, insn: Instruction, rule: Rule) -> bool:
        before = len(emitter.steps)
        try:
            emitter.lower(insn, rule)
            return all(self._is_allowed(step.instruction) for step in emitter.steps[before:])
        except (NotLoweredError, ValueError):  # iced-x86: a displacement that cannot be encoded
            return False

    def _is_allowed(self, insn: Instruction) -> bool:
        """Whether the fast path may run an instruction of ours."""
        return not self._traps(decode(self._encode(insn, self._hidden.linear), 64))

    def _encode(self, insn: Instruction, at: int) -> bytes:
        """Raises ValueError if it cannot be encoded at ``at``."""
        try:
            self._encoder.encode(insn, at)
        finally:
            code = self._encoder.take_buffer()
        return code

    def _copy(self, emitter: Emitter, insn: Instruction) -> bool:
        """Copy an allowed instruction, unless it depends on where it stands or stores."""
        if (
            insn.flow_control != FlowControl.NEXT
            or insn.is_string_instruction
            or insn.is_stack_instruction
            or _X87.intersection(insn.cpuid_features())
            or self._stores(insn)
        ):
            return False
        try:
            emitter.copy(insn)
        except NotLoweredError:
            return False
        return True

    def _stores(self, insn: Instruction) -> bool:
        return any(m.access in _WRITES for m in self._info.info(insn).used_memory())

    # -- the hidden code ------------------------------------------------------------------------

    def _write(self, steps: Sequence[Step], what: _Code) -> int | None:
        """Write the code of a run; where the address of its entry stands.

        First come the addresses of the entry and of what follows the run, then the code.
        """
        base = self._hidden.room(_MAX_CODE)
        if base is None:
            self.full = True
            return None
        entry = at = base + _POINTERS
        code = b""
        places: dict[int, Place] = {}
        starts, left = what.starts, what.left
        back = Instruction.create_mem(
            Code.JMP_RM64, MemoryOperand(Register.RIP, displ=signed(base + 8), displ_size=8)
        )
        last = Step(back, what.done, True, (), False)
        for step in (*steps, last):
            try:
                encoded = self._encode(step.instruction, at)
            except ValueError:
                return None
            code += encoded
            rip, rest = starts[max(step.index, 0)], () if step.index == BEFORE else left[step.index]
            places[at] = Place(rip, step.first, step.saved, step.lowered, rest)
            at += len(encoded)
        if at - base > _MAX_CODE:
            return None
        pointers = entry.to_bytes(8, "little") + what.following.to_bytes(8, "little")
        self._hidden.write(base, pointers + code, places)
        return base


def _patch(at: int, prefixes: int, pointer: int) -> tuple[bytes, int]:
    """Padding of ``at`` bytes and a jump by ``pointer``, and how many instructions that is."""
    parts = []
    while at > 0:
        parts.append(_NOP if at >= len(_NOP) else _SHORT_NOPS[at])
        at -= len(parts[-1])
    jump = _IDLE_PREFIX * prefixes + _JUMP + (pointer & 0xFFFF_FFFF).to_bytes(4, "little")
    return b"".join((*parts, jump)), len(parts) + 1
