"""``explain`` shows for each instruction where it runs, by which rule, and who emulates it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.cli import main
from sandbox.decode import Insn
from sandbox.explain import explain, parse_hex, table
from sandbox.policy import Policy

POLICY = Policy.parse(
    '[[rule]]\naction = "allow"\nfeature = ["INTEL8086", "SSE2"]\ncomment = "old and good"\n'
    '[[rule]]\naction = "trap"\nmnemonic = ["paddd", "vpaddd"]\n',
    "p.toml",
)
CODE = bytes.fromhex("90 c5f5fec2 660ffec1 06 0f30")
"""nop; vpaddd ymm0, ymm1, ymm2; paddd xmm0, xmm1; (not in 64-bit mode); wrmsr"""


def resolve(insn: Insn) -> list[str]:
    return ["handlers.integer.vpaddd", "mine"] if insn.mnemonic == "vpaddd" else []


def test_each_instruction_has_place_rule_and_handler() -> None:
    lines = list(explain(CODE, 64, POLICY, resolve, 0x1000))
    assert [line.address for line in lines] == [0x1000, 0x1001, 0x1005, 0x1009, 0x100A]
    assert [line.where for line in lines] == ["fast path", "trap", "trap", "trap", "trap"]
    assert [line.why for line in lines] == [
        "p.toml:1 old and good",
        "p.toml:5",
        "p.toml:5",
        "bytes that do not decode are never allowed",
        "no rule allows it",
    ]
    assert [line.taker for line in lines] == [
        "",
        "handlers.integer.vpaddd, mine",
        *["none: #UD in the guest"] * 3,
    ]
    assert lines[1].features == ("AVX2",)
    assert lines[1].text == "vpaddd ymm0, ymm1, ymm2"


def test_bytes_that_do_not_decode_are_skipped_one_by_one() -> None:
    lines = list(explain(b"\x06\xff\xff\x90\x0f", 64, POLICY, resolve))
    assert [(line.raw, line.insn is None) for line in lines] == [
        (b"\x06", True),
        (b"\xff", True),
        (b"\xff", True),
        (b"\x90", False),
        (b"\x0f", True),
    ]


def test_branch_targets_are_shown_at_their_address() -> None:
    line = next(explain(bytes.fromhex("eb10"), 64, POLICY, resolve, 0x1000))
    assert line.text == "jmp 0x1012"


def test_code_decodes_as_its_mode_says() -> None:
    assert next(explain(b"\x06", 32, POLICY, resolve)).text == "push es"
    assert next(explain(b"\xb8\x34\x12", 16, POLICY, resolve)).text == "mov ax, 0x1234"


@pytest.mark.parametrize(
    ("unhandled", "shown"), [("exit", "none: exit to the caller"), ("skip", "none: skipped")]
)
def test_what_happens_without_a_handler_is_the_policys(unhandled: str, shown: str) -> None:
    policy = Policy.parse(f'extends = "nothing"\nunhandled = "{unhandled}"\n')
    assert next(explain(b"\x90", 64, policy, resolve)).taker == shown


def test_the_table_lines_up() -> None:
    rows = list(table(explain(CODE, 64, POLICY, resolve, 0x1000)))
    assert len(rows) == 6
    at = rows[0].index("runs on")
    assert [row[at : at + 9].rstrip() for row in rows[1:]] == ["fast path", *["trap"] * 4]
    assert rows[2].split("  ")[1].strip() == "c5 f5 fe c2"


@pytest.mark.parametrize(
    "text", ["c5f5fec2", "c5 f5 FE c2", "0xc5,0xf5, 0xfe 0xc2", "\\xc5\\xf5fec2"]
)
def test_hex_comes_in_the_usual_ways(text: str) -> None:
    assert parse_hex(text) == bytes.fromhex("c5f5fec2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c5f", "'c5f' is neither a file nor bytes in hex"),
        ("nop", "'nop' is neither"),
        (" ", "no b"),
    ],
)
def test_bad_hex_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_hex(text)


@pytest.mark.parametrize(
    ("code", "place", "taker", "why"),
    [
        ("90", "fast path", "", "everything.toml"),
        ("f4", "trap", "the machine", "intercepted by the machine"),
        ("0fa2", "trap", "handlers.system.cpuid", "intercepted by the machine"),
        ("66f20f58c1", "trap", "vector.addsd", "takes these bytes for another instruction"),
        ("660f3a63c100", "fast path", "", "everything.toml"),
        ("66480f3a61c100", "trap", "", "crashes Unicorn"),
        ("62f17d48fec1", "fast path", "", "everything.toml"),
    ],
)
def test_the_command_knows_what_no_policy_can_allow(
    code: str, place: str, taker: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--policy", "everything", code]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert f"  {place}  " in row
    assert taker in row
    assert why in row


@pytest.mark.parametrize(
    ("option", "code", "why"),
    [
        ("--float-flags", "0f58c1", 'float_flags = "exact"'),
        ("--float-flags", "d9fa", 'float_flags = "exact"'),
        ("--alignment", "660ffe00", 'alignment = "exact"'),
    ],
)
def test_exact_side_effects_trap(
    option: str, code: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, place in (("lazy", "fast path"), ("exact", "trap")):
        assert main(["explain", option, value, code]) == 0
        row = capsys.readouterr().out.splitlines()[1]
        assert f"  {place}  " in row
        assert (why in row) == (value == "exact")


def test_handlers_that_decline_a_form_are_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--handlers", "none", "--handlers", "x87", "c5f5fec2"]) == 0
    assert "none: #UD in the guest" in capsys.readouterr().out


def test_bytes_that_only_a_handler_knows_are_an_instruction(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pack = tmp_path / "mine.py"
    pack.write_text(
        "from sandbox.handler import handler\n"
        "@handler(pattern='0f 3f ??')\n"
        "def mine(cpu, insn): pass\n"
    )
    assert main(["explain", "--handlers", str(pack), "0f3f0690"]) == 0
    _title, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[1:4] == ["0f", "3f", "06"]
    assert ".mine" in first
    assert second.split()[0] == "0x1003"


@pytest.mark.parametrize(
    ("policy", "mode", "code", "where"),
    [
        ('extends = "verified"', "long", "c5fdfec1", "lowered"),
        ('extends = "verified"\nlowering = false', "long", "c5fdfec1", "trap"),
        ('extends = "verified"', "protected", "c5fdfec1", "trap"),
        ('extends = "verified"\nhost = false\nfloat_flags = "exact"', "long", "c5fc58c1", "trap"),
        ('extends = "verified"', "long", "c5fc58c1", "lowered"),
        ('extends = "verified"', "long", "c4e379600607", "trap"),
        ('extends = "kvm-emulator"', "long", "c5fdfec1", "trap"),
    ],
    ids=[
        "vpaddd",
        "switched off",
        "32-bit",
        "addps is trapped",
        "vaddps",
        "vpcmpestrm",
        "paddd is trapped",
    ],
)
def test_what_is_lowered_is_told_apart(
    policy: str,
    mode: str,
    code: str,
    where: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "p.toml"
    file.write_text(policy)
    assert main(["explain", "--policy", str(file), "--mode", mode, code]) == 0
    assert f"  {where}  " in capsys.readouterr().out
