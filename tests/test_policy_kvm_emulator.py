"""The preset ``kvm-emulator`` against KVM's instruction emulator: recorded sweeps, and live.

``data/kvm_emulator_sweep.csv.xz`` holds what a real kernel did with 70,656 encodings; its first
line says how it was made. An encoding was *taken* unless KVM reported an emulation failure at its
own address: what ran into a fault, an exit or another instruction that fails was taken before.
Where the preset decides otherwise, one of DIFFERENCES says why.
"""

from __future__ import annotations

import csv
import lzma
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from iced_x86 import Code, EncodingKind, OpCodeInfo

from sandbox.boot import Machine
from sandbox.decode import FORM_NAMES, DecodeError, Insn, decode
from sandbox.engine.protocol import Stop
from sandbox.policy import ALLOW, ASK, Policy
from tests.guest import BASE
from tests.kvm_guest import KVM, guest

SWEEP = Path(__file__).parent / "data" / "kvm_emulator_sweep.csv.xz"
PROBES, NATIVE = 70_656, 4_013
MAPS = {"1byte": "", "0f": "0f", "0f38": "0f38", "0f3a": "0f3a"}
HLT = b"\xf4"
POLICY = Policy.load("kvm-emulator")


@dataclass(frozen=True)
class Probe:
    """One encoding, and what became of it. ``code`` is hex, from the opcode map on."""

    mode: str
    prefix: str
    code: str
    outcome: str
    rip: int

    @property
    def bitness(self) -> int:
        return 16 if self.mode == "real" else 64

    @property
    def data(self) -> bytes:
        """The instruction as it stood in memory: HLT behind it."""
        prefix = "" if self.prefix == "none" else self.prefix
        return bytes.fromhex(prefix + self.code).ljust(15, HLT)

    @property
    def insn(self) -> Insn | None:
        try:
            return decode(self.data, self.bitness)
        except DecodeError:
            return None

    @property
    def native(self) -> bool:
        """Whether the CPU itself ran it, or refused to: that says nothing about the emulator."""
        return self.mode == "long64_cpl3_mmio" and self.outcome.startswith("fault_")

    @property
    def taken(self) -> bool:
        return self.outcome != "emulation_failure" or self.rip != BASE

    @property
    def allowed(self) -> bool:
        return self.insn is not None and POLICY.allows(self.insn)

    def __str__(self) -> str:
        form = self.insn.form if self.insn else "no instruction"
        return f"{self.mode} {self.prefix} {self.code} {self.outcome} ({form})"


@cache
def sweep() -> tuple[Probe, ...]:
    with lzma.open(SWEEP, "rt") as file:
        assert next(file).startswith("# Linux 6.18")
        return tuple(
            Probe(
                row["mode"],
                row["prefix"],
                MAPS[row["opcode_map"]] + row["opcode"] + row["modrm_form"],
                row["class"],
                int(row["rip_after"], 16),
            )
            for row in csv.DictReader(file)
        )


@dataclass(frozen=True)
class Difference:
    """A reason for which preset and record differ, and the most probes it may account for.

    ``match`` is for the whole of ``mode prefix code outcome form``.
    """

    reason: str
    most: int
    taken: bool
    match: str

    def holds(self, probe: Probe) -> bool:
        form = probe.insn.form if probe.insn else "-"
        text = f"{probe.mode} {probe.prefix} {probe.code} {probe.outcome} {form}"
        return probe.taken == self.taken and re.fullmatch(self.match, text) is not None


# The first that holds counts. LOCAL: what the recorded kernel does unlike Linux as published.
DIFFERENCES = (
    Difference("LOCAL: SYSRET and IRET to 64-bit code are emulated",
               24, True, r"\w+ \w+ (0f07|cf)\w* .*"),
    Difference("LOCAL: hint opcodes 0F 19, 0F 1C, 0F 1D and ENDBR are emulated",
               29, True, r"\w+ \w+ 0f(19|1c|1d|1efa|1efb)\w* executed.*"),
    Difference("LOCAL: fences and RDFSBASE are emulated, whatever the prefix",
               73, True, r"\w+ \w+ 0fae[c-f]\w executed.*"),
    Difference("LOCAL: 0F 01 E8 and 0F 01 F8 are emulated, whatever the prefix",
               8, True, r"\w+ \w+ 0f01[ef]8 executed.*"),
    Difference("LOCAL: UD2 raises #UD instead of failing",
               18, True, r"\w+ \w+ 0f0b\w+ fault_6 UD2"),
    Difference("#UD from the emulator where there is no instruction: trapped, it is #UD, too",
               3858, True, r"\w+ \w+ \w+ fault_6 -"),
    Difference("#UD from the emulator: SVM is off, and TSX is not known to it",
               36, True, r"real \w+ (0f01d[8-f]|c[67]f8) fault_6 .*"),
    Difference("a prefix makes it undefined, the emulator ignores the prefix",
               168, True, r"\w+ (66|f2|f3) 0f(01|ae|c3)\w\w .* -"),
    Difference("MOVNTDQ to a register: undefined, the emulator writes the register",
               2, True, r"\w+ 66 0fe7c1 executed_len4 -"),
    Difference("SYSENTER fails in 64-bit mode",
               10, False, r"long64_cpl0 \w+ 0f34\w+ .*"),
    Difference("INT3 and INT are emulated in real mode only",
               20, False, r"long64_cpl0 \w+ c[cd]\w+ .*"),
    Difference("ENTER is emulated for nesting level 0 only",
               18, False, r"\w+ \w+ c8\w+ .*"),
    Difference("a far branch to an offset beyond the limit",
               30, False, r"real 66 (ca|cb|ea|ff)\w+ .*"),
    Difference("FXSAVE reaches no MMIO",
               2, False, r"long64_cpl3_mmio \w+ 0fae00 .*"),
)  # fmt: skip


def difference(probe: Probe) -> Difference | None:
    return next((e for e in DIFFERENCES if e.holds(probe)), None)


def test_each_recorded_encoding_is_allowed_if_and_only_if_the_kernel_took_it() -> None:
    verdicts = [probe for probe in sweep() if not probe.native]
    assert (len(sweep()), len(sweep()) - len(verdicts)) == (PROBES, NATIVE)
    differing = [probe for probe in verdicts if probe.allowed != probe.taken]
    reasons = Counter(difference(probe) for probe in differing)
    assert [str(probe) for probe in differing if difference(probe) is None] == []
    for known in DIFFERENCES:
        assert 0 < reasons[known] <= known.most, (known.reason, reasons[known])


def opcode(code: int) -> tuple[int, ...]:
    """What a kernel's opcode table is indexed by: map, opcode, mandatory prefix, ModRM.reg."""
    info = OpCodeInfo(code)  # type: ignore[arg-type]
    return info.table, info.op_code, info.mandatory_prefix, info.group_index


def test_each_allowed_opcode_was_taken_in_a_recorded_probe() -> None:
    taken = {opcode(p.insn.code) for p in sweep() if p.taken and not p.native and p.insn}
    allowed = (code for code, allow in enumerate(POLICY.allowed) if allow)
    never = {FORM_NAMES[code] for code in allowed if opcode(code) not in taken}
    not_probed = {f"ENTER{size}_IMM16_IMM8" for size in "WDQ"}  # with level 0
    not_probed |= {f"RESERVEDNOP_RM{size}_R{size}_0F1F" for size in (16, 32, 64)}  # /1 to /7
    assert never == not_probed


def test_no_form_after_a_vex_evex_or_xop_prefix_is_allowed() -> None:
    for code, allowed in enumerate(POLICY.allowed):
        if allowed and code != Code.INVALID:
            assert OpCodeInfo(code).encoding == EncodingKind.LEGACY, FORM_NAMES[code]  # type: ignore[arg-type]


def test_forms_alone_decide_so_that_no_instruction_needs_to_be_asked_about() -> None:
    assert ASK not in POLICY.marks
    assert POLICY.marks.count(ALLOW) == sum(POLICY.allowed)


# -- live ---------------------------------------------------------------------------------------

FLDS = bytes.fromhex("d907")
"""flds [bx]: what no kernel emulates."""
NATIVE_REAL_MODE = "this kernel runs real mode natively, not in KVM's emulator"
SAMPLE = 211
"""One recorded probe of so many is tried; a prime, so that each prefix and opcode has its share."""
STOP = 0x600
LOW = 0x10000


def probed_live(data: bytes) -> bool:
    """Whether KVM takes ``data`` in real mode. All vectors lead to HLT, as does all else below."""
    with guest("kvm", data, "real") as found:
        _stop_everywhere(found, data)
        engine = found.vcpu.engine  # without the handler tier, which may take what KVM does not
        for _attempt in range(3):  # on a busy machine the time may be over before it runs
            watchdog = threading.Timer(0.5, engine.stop)
            watchdog.start()
            stop = engine.enter()
            watchdog.cancel()
            if stop is not Stop.ASKED:
                break
        return stop is not Stop.INSN or found.vcpu.registers.rip != BASE


def _stop_everywhere(found: Machine, data: bytes) -> None:
    vectors = STOP.to_bytes(4, "little") * 256
    memory = bytearray(vectors.ljust(LOW, HLT))
    memory[BASE : BASE + len(data)] = data
    found.vm.memory.load(0, bytes(memory))


def sample() -> Iterator[Probe]:
    """Real-mode probes whose outcome depends on no state and on no kernel's own ways."""
    for probe in sweep()[::SAMPLE]:
        if probe.mode == "real" and probe.outcome != "errno4" and difference(probe) is None:
            yield probe


@KVM
def test_a_sample_is_taken_live_as_the_preset_says() -> None:
    if probed_live(FLDS + HLT):
        pytest.skip(NATIVE_REAL_MODE)
    probes = list(sample())
    assert len(probes) > 200
    wrong = [str(p) for p in probes if probed_live(p.data) != p.allowed]
    assert wrong == []


@KVM
@pytest.mark.parametrize(
    ("taken", "failing"),
    [
        ("c8 0000 00", "c8 0000 01"),  # enter 0, level
        ("66 ea ffff0000 0000", "66 ea 00000100 0000"),  # jmp far 0:offset
    ],
)
def test_what_a_form_does_not_tell_about_its_operands(taken: str, failing: str) -> None:
    if probed_live(FLDS + HLT):
        pytest.skip(NATIVE_REAL_MODE)
    assert probed_live(bytes.fromhex(taken) + HLT)
    assert not probed_live(bytes.fromhex(failing) + HLT)
