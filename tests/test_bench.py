"""The suites of ``sandbox bench`` run on the smallest settings and give well-formed results.

No figure is compared with a limit: times belong to the machine.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from iced_x86 import Decoder, FlowControl

from guests.samples import PREBUILTS
from sandbox import KVM_CAP_EXIT_ON_EMULATION_FAILURE
from sandbox.bench import command, picture, programs, scaling
from sandbox.bench.measure import (
    TARGET_SECONDS,
    Effort,
    Figure,
    Note,
    Result,
    compare_all,
)
from sandbox.bench.suites import SUITES
from sandbox.bench.table import Table, number, summary
from sandbox.boot import boot_flat
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.engine.kvm_device import unavailable
from sandbox.errors import SandboxError
from sandbox.exits import Hlt
from sandbox.handler import FunctionHandler, Pack
from sandbox.vm import Vm
from tests.command import Command

TINY = Effort(rounds=1, scale=0.0001)


@pytest.fixture
def sandbox(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def check(results: list[Result], suite: str) -> None:
    assert results
    for result in results:
        assert result.suite == suite
        assert result.peer_name
        if isinstance(result, Note):
            assert result.text
        else:
            assert result.name
            assert result.ours > 0 and result.peer > 0
            assert 0 < result.ratio_low <= result.ratio <= result.ratio_high < math.inf
    table = Table()
    assert all(table.line(result) for result in results)


@pytest.mark.parametrize(
    ("suite", "only"),
    [
        ("fastpath", "alu|sse"),
        ("fallback", ""),
        ("operations", "vpaddd"),
        ("startup", ""),
        ("kvm", "failure|out|program demo"),
        ("scaling", "processes|1,000 blocks|1 MB|1,000 trapped"),
    ],
)
def test_suite(suite: str, only: str) -> None:
    effort = Effort(TINY.rounds, TINY.scale, only)
    results = list(SUITES[suite](effort))
    check(results, suite)
    left_out = suite == "kvm" and unavailable() is not None
    assert left_out or any(isinstance(result, Figure) for result in results)


def test_suite_gives_only_what_is_asked_for() -> None:
    for suite in SUITES:
        names = {result.name for result in SUITES[suite](Effort(1, 0.0001, "nothing like this"))}
        assert names <= {""}


def test_programs_compares_output_and_time_with_every_peer_installed() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    results = list(SUITES["programs"](Effort(1, 0.0001, "programs (hash v1|longdouble v2)$")))
    check(results, "programs")
    figures = {(result.name, result.peer_name) for result in results if isinstance(result, Figure)}
    assert ("hash v1", "unicorn") in figures
    wrong = [result for result in results if isinstance(result, Note) and result.name]
    assert {(note.name, note.text) for note in wrong} == {("longdouble v2", "wrong output")}
    assert {note.peer_name for note in wrong} == {"unicorn"}
    assert {line.partition(":")[0] for line in summary(results)} >= {
        "programs v1 against unicorn"
    }  # fmt: skip


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    notes = list(SUITES["programs"](Effort(1, 0.0001, "nothing")))
    absent = {note.peer_name for note in notes if isinstance(note, Note)}
    assert programs.QEMU in absent


def test_prebuilt_programs_are_taken_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    made = list(programs.make_programs(tmp_path, Effort()))
    assert [program.path for program in made] == list(PREBUILTS.values())


def test_numbers_keep_three_digits() -> None:
    assert [number(value) for value in (0.00354, 0.97, 7.0, 123.4, 12345.0)] == [
        "0.00354", "0.970", "7.00", "123", "12345"
    ]  # fmt: skip


def test_count_of_iterations_grows_until_a_run_is_long_enough() -> None:
    counts: list[int] = []

    def run(count: int) -> float:
        counts.append(count)
        return count * 1e-6

    assert Effort().per_iteration(run)() == pytest.approx(1e-6)
    assert counts == sorted(counts)
    assert TARGET_SECONDS <= counts[-1] * 1e-6 < 4 * TARGET_SECONDS


def test_rounds_alternate_in_order_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    peers = {"slow": partial(run, "slow", 4.0), "fast": partial(run, "fast", 1.0)}
    figures = list(compare_all("suite", "name", "s", 1, partial(run, "ours", 2.0), peers, 2))
    assert order == "ours slow fast ours slow fast fast slow ours".split()
    assert [(figure.peer_name, figure.ratio) for figure in figures] == [("slow", 2), ("fast", 0.5)]


@pytest.mark.parametrize("count", [1, 3])
def test_trapped_sites_are_met_as_often_as_asked(count: int) -> None:
    code = scaling.site_code(count, b"\x0f\x3f\x01", 7)
    met: list[int] = []

    def note(cpu: Cpu, _insn: Insn) -> None:
        met.append(cpu.rip)

    pack = Pack.of("note", FunctionHandler(note, patterns=("0f 3f 01",)))
    with Vm("baseline", (pack,)) as vm:
        vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        vcpu = boot_flat(vm, code).vcpu
        assert isinstance(vcpu.run(), Hlt)
        assert len(met) == 2 * count and len(set(met)) == count
        met.clear()
        assert isinstance(vcpu.run(), Hlt)
    assert len(met) == 7 and len(set(met)) == count


def test_block_code_is_of_as_many_blocks_as_asked() -> None:
    instructions = list(Decoder(64, scaling.block_code(50)))
    branches = [
        insn for insn in instructions if insn.flow_control == FlowControl.CONDITIONAL_BRANCH
    ]
    assert len(branches) == 50
    assert len(instructions) == 6 * 50 + 2


RESULTS: list[Result] = [
    Figure("fastpath", "alu", "ns", 2.0, 4.0, "unicorn", 2.0, 1.9, 2.1, "others"),
    Figure("programs", "hash v1", "ms", 2.0, 1.0, "native", 0.5, 0.4, 0.6, "v1"),
    Figure("programs", "hash v1", "ms", 2.0, 1.0, "bochs", 9.0, 0.4, 11.0, "v1"),
    Note("programs", "", "qemu-x86_64", "left out"),
    Note("programs", "hash v3", "unicorn", "refuses", "v3"),
]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command.write_results(path, command.about(Effort()), RESULTS)
    data, results = command.read_results(path)
    assert results == RESULTS
    assert data["machine"] and data["python"] and data["versions"]["unicorn"]


def test_reference_run_can_be_shown_again(sandbox: Command) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "reference.json"
    ran = sandbox("bench", "--read", path, "fallback")
    assert ran.status == 0
    assert len(ran.out.splitlines()) > 2 and "fastpath" not in ran.out


def test_what_is_no_results_file_is_said_to_be(tmp_path: Path, sandbox: Command) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"figures": 3}')
    ran = sandbox("bench", "--read", path)
    assert ran.status == 2
    assert ran.line.startswith(f"{path}: no results of sandbox bench")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "("), "no regular expression"),
        (("--rounds", "0"), "--rounds must be 1 or more"),
        (("--scale", "0"), "--scale above 0"),
        (("nothing",), "no suite is named 'nothing'"),
        (("--picture", "ratios.txt"), ".png, .svg, .pdf"),
    ],
)
def test_wrong_options(options: tuple[str, ...], said: str, sandbox: Command) -> None:
    ran = sandbox("bench", *options)
    assert ran.status == 2
    assert said in ran.line


def test_command_prints_and_keeps_what_was_asked_for(tmp_path: Path, sandbox: Command) -> None:
    path = tmp_path / "results.json"
    ran = sandbox(
        "bench", "fallback", "--only", "one trap, triv", "--scale", "0.001", "--rounds", "1",
        "--json", path,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "fallback one trap, trivial" in ran.out
    assert [figure["peer_name"] for figure in json.loads(path.read_text())["figures"]] == [
        "hook that skips"
    ]


def test_every_result_has_a_row_in_the_picture() -> None:
    frames = picture.panels(RESULTS)
    assert [(panel.title, panel.rows) for panel in frames] == [
        ("Loops of allowed instructions", ["alu"]),
        ("C programs built for x86-64-v1", ["hash"]),
        ("C programs built for x86-64-v3", ["hash"]),
    ]
    assert [panel.row("hash v1") for panel in frames[1:]] == ["hash", "hash"]
    assert picture.columns(frames) == [[panel] for panel in frames]
    assert picture.columns(frames[:1]) == [frames[:1]]


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_picture(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"ratios{suffix}"
    picture.check(path)
    picture.draw(RESULTS, "a machine", path)
    assert path.stat().st_size > 1000


def test_picture_without_matplotlib_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SandboxError, match="needs matplotlib: pip install"):
        picture.check(tmp_path / "ratios.png")


def test_suites_and_peers_are_explained() -> None:
    text = Path(__file__).parents[1].joinpath("docs/benchmarks.md").read_text()
    for name in SUITES:
        assert f"| `{name}` |" in text
    for peer in picture._COLOURS:
        assert peer == "sandbox" or f"`{peer}" in text
