"""What the documents say is true: their examples run, and their lists are those of the code."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import handlers
import sandbox
from guests.assemble import assemble
from handlers.vector import Operation
from sandbox import Hlt, Vm, boot_flat, cli, run
from sandbox.bench.suites import SUITES
from sandbox.cpuid import features
from sandbox.policy import presets
from sandbox.registers import RAX
from sandbox.vm import DEFAULT_POLICY

ROOT = Path(__file__).parent.parent
EXAMPLES = ("README.md", "docs/handlers.md", "docs/kvm.md", "docs/machine.md", "docs/policy.md")
NAMED_TEST = re.compile(r"`(?:(tests/\w+\.py)(?:::)?)?(test_\w+)?`")
DOCUMENTS = (*EXAMPLES, "ARCHITECTURE.md", "CHANGELOG.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"^[#;] ([\w-]+\.(?:py|asm|toml))$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the file it is said to be, if any."""

    language: str
    text: str
    file: str


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str) -> list[Block]:
    found = []
    for language, text in FENCE.findall(text_of(document)):
        name = FILE_NAME.match(text.split("\n", 1)[0])
        found.append(Block(language, text, name[1] if name else ""))
    return found


def same(wanted: str, got: str) -> bool:
    """Whether an output is as shown: spaces count as one, ``...`` is anything."""
    parts = [re.escape(" ".join(part.split())) for part in wanted.split("...")]
    return re.fullmatch(r" ?.* ?".join(parts), " ".join(got.split())) is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory in which the examples run: it has ``guests`` and a command ``sandbox``."""
    (tmp_path / "guests").symlink_to(ROOT / "guests")
    command = tmp_path / "bin" / "sandbox"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sandbox "$@"\n')
    command.chmod(0o755)
    return tmp_path


def commands(session: str) -> Iterator[tuple[str, str]]:
    """(command, expected output) of a console session."""
    for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        command, _newline, output = part.partition("\n")
        yield command, output


@pytest.mark.parametrize("document", EXAMPLES)
def test_console_sessions_print_what_is_shown(document: str, folder: Path) -> None:
    if shutil.which("sh") is None:
        pytest.skip("needs a shell")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for block in blocks(document):
        if block.file:
            (folder / block.file).write_text(block.text)
        if block.language != "console":
            continue
        for command, wanted in commands(block.text):
            done = subprocess.run(
                ["sh", "-c", command], cwd=folder, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
            )  # fmt: skip
            assert same(wanted, done.stdout), f"$ {command}\n{done.stdout}"
            assert done.returncode == 0, command


@pytest.mark.parametrize("document", EXAMPLES)
def test_python_examples_run_and_print_what_is_shown(document: str, folder: Path) -> None:
    shown = blocks(document)
    for block, after in zip(shown, [*shown[1:], Block("", "", "")], strict=True):
        if block.language != "python" or block.text.startswith("# from "):
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.text, f"{document} (example)", "exec"), {"__name__": "example"})
        wanted = after.text if after.language == "output" else ""
        assert same(wanted, out.getvalue())


def test_python_examples_are_as_short_as_promised() -> None:
    run_example, handler_example, *_rest = (
        [line for line in block.text.splitlines() if line]
        for block in blocks("README.md")
        if block.language == "python"
    )
    assert len(run_example) < 15
    guest = next(block.text for block in blocks("README.md") if block.language == "asm")
    assert len(handler_example) + len(guest.splitlines()) < 20


def test_quoted_code_stands_in_the_named_file() -> None:
    quotes = [b.text for b in blocks("README.md") if b.text.startswith("# from ")]
    assert quotes
    for quote in quotes:
        head, _newline, code = quote.partition("\n")
        assert code in text_of(head.removeprefix("# from "))


def example(document: str, containing: str) -> dict[str, Any]:
    """The names that a Python example defines."""
    text = next(b.text for b in blocks(document) if b.language == "python" and containing in b.text)
    names: dict[str, Any] = {"__name__": "example"}
    exec(text, names)
    return names


def run_guest(source: str, pack: object) -> Vm:
    vm = Vm("nothing", handlers=[pack, "integer"])  # type: ignore[list-item]
    vm.enable_cap(sandbox.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
    vcpu = boot_flat(vm, assemble(source)).vcpu
    assert vcpu.run(10) == Hlt()
    return vm


def test_the_bound_handler_of_the_handbook_loads_big_endian() -> None:
    pack = example("docs/handlers.md", "LoadBigEndian")["PACK"]
    source = """
        lea rdx, [rip + data]
        movbe rax, qword ptr [rdx]
        hlt
    data:
        .byte 1, 2, 3, 4, 5, 6, 7, 8
    """
    with run_guest(source, pack) as vm:
        assert vm.vcpu is not None
        assert vm.vcpu.registers.gpr[RAX] == 0x0102030405060708


def test_the_vector_operations_of_the_handbook_are_operations() -> None:
    names = example("docs/handlers.md", "vpdpbusd")
    assert isinstance(names["vpdpbusd"], Operation)
    assert names["XOR"].mnemonics == ("pxor", "vpxor", "xorps", "vxorps", "xorpd", "vxorpd")


# -- lists --------------------------------------------------------------------------------------


def table(document: str, title: str) -> list[list[str]]:
    """The rows of the table whose header begins with ``title``."""
    lines = text_of(document).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def table_column(document: str, title: str) -> list[str]:
    """The first cells of that table."""
    return [row[0] for row in table(document, title)]


def test_presets_are_those_of_the_code() -> None:
    assert sorted(table_column("docs/policy.md", "Preset")) == [f"`{name}`" for name in presets()]
    for name in presets():
        assert f"`{name}`" in text_of("README.md")
        assert f"`{name}`" in text_of("CHANGELOG.md")


def test_the_default_policy_is_the_one_that_is_said_to_be() -> None:
    assert f"`{DEFAULT_POLICY}` is the default" in text_of("README.md")
    rows = {row[0]: row[1] for row in table("docs/policy.md", "Preset")}
    assert rows[f"`{DEFAULT_POLICY}`"].endswith("The default")


def test_packs_are_those_of_the_code() -> None:
    installed = {row[0].strip("`"): row[2] for row in table("README.md", "Pack")}
    assert set(installed) == set(handlers.PACKS)
    assert {name for name, when in installed.items() if when == "always"} == set(run.DEFAULT_PACKS)
    for name in handlers.PACKS:
        assert f"`{name}`" in text_of("CHANGELOG.md")


def test_suites_are_those_of_the_code() -> None:
    paragraph = re.search(r"^`sandbox bench` .*?\n\n", text_of("README.md"), re.DOTALL | re.M)
    assert paragraph
    assert set(re.findall(r"\(`(\w+)`\)", paragraph[0])) == set(SUITES)


def test_exit_statuses_are_those_of_the_code() -> None:
    listed = set()
    for cell in table_column("README.md", "Status"):
        listed |= {int(n) for n in re.findall(r"\d+", cell)} - {128}
    named = {value for name, value in vars(run).items() if name.startswith("STATUS_")}
    signals = {128 + n for n in run._SIGNAL_OF_VECTOR.values()}
    signals |= {128 + value for name, value in vars(run).items() if name.startswith("_SIG")
                and isinstance(value, int)}  # fmt: skip
    assert listed == named | signals | {cli.STATUS_USAGE}


def test_dependencies_are_those_of_the_distribution() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    names = [re.split(r"[<>=; ]", requirement)[0] for requirement in project["dependencies"]]
    assert sorted(table_column("README.md", "Package")) == sorted(f"`{name}`" for name in names)


def test_policy_keys_are_those_of_the_code() -> None:
    from sandbox import policy

    keys = table_column("docs/policy.md", "Key of a rule")
    assert sorted(keys) == sorted(f"`{key}`" for key in policy._RULE_KEYS)
    for key in policy._TOP_KEYS:
        assert re.search(rf"`{key}`|^{key} = |\[\[{key}\]\]", text_of("docs/policy.md"), re.M), key
    for answer in policy.UNHANDLED:
        assert f'`"{answer}"`' in text_of("docs/policy.md")


def test_exit_reasons_are_those_of_the_code() -> None:
    from sandbox import exits

    lines = text_of("docs/kvm.md").splitlines()
    rows = [line.split("|")[1:3] for line in lines if re.match(r"\| `\w+` \| \d+ \|", line)]
    assert len(rows) == 6
    for name, reason in rows:
        assert getattr(exits, name.strip(" `")).exit_reason == int(reason)


def test_what_is_said_not_to_be_handled_is_not_offered() -> None:
    assert "- **AVX-512 and AMX.** Not handled yet" in text_of("README.md")
    with Vm(handlers=run.DEFAULT_PACKS) as vm:
        offered = features(vm.runs_form)
    assert {"AVX2", "FMA", "F16C", "BMI2", "SHA", "GFNI"} <= offered
    assert not [name for name in offered if name.startswith(("AVX512", "AMX"))]


def help_of(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "sandbox", *command, "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip


def commands_of_the_program() -> list[str]:
    listed = help_of().split("positional arguments:")[1].split("options:")[0]
    return re.findall(r"^    (\w+)", listed, re.MULTILINE)


def test_every_command_is_described() -> None:
    assert len(commands_of_the_program()) >= 4
    for command in commands_of_the_program():
        assert f"`sandbox {command}`" in text_of("README.md")
        assert f"`sandbox {command}`" in text_of("CHANGELOG.md")


def test_every_option_named_exists() -> None:
    known = set[str]()
    for command in commands_of_the_program():
        known |= set(re.findall(r"(?<![\w-])--[a-z-]+", help_of(command)))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text_of(document)))
        assert named <= known, document


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    for document in (*DOCUMENTS, ".ci/run"):
        named = set(re.findall(r"(?:^ *|`)make ([a-z]+)", text_of(document), re.MULTILINE))
        assert named <= targets, document


def test_every_file_named_exists() -> None:
    for document in DOCUMENTS:
        prose = FENCE.sub("", text_of(document))
        paths = re.findall(r"`((?:sandbox|handlers|guests|tests|docs)/[\w./-]+)`", prose)
        folder = Path(document).parent
        paths += [str(folder / link) for link in re.findall(r"\]\(([\w./-]+)\)", prose)]
        for path in paths:
            assert (ROOT / path).exists(), f"{document} names {path}"
    for name in re.findall(r"`(\w+\.py)`", text_of("ARCHITECTURE.md")):
        assert list((ROOT / "sandbox").rglob(name)), name


def test_public_names_can_be_imported() -> None:
    for name in sandbox.__all__:
        assert getattr(sandbox, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = sandbox.nope  # type: ignore[attr-defined]


def test_import_sandbox_imports_nothing_else() -> None:
    program = "import sys, sandbox; print(sorted(m for m in sys.modules if 'sandbox.' in m))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


# -- imports ------------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """Second parts of the ``sandbox`` modules that a file imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "sandbox":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sandbox."):
            found.add((node.module or "").split(".")[1])
    return found


def test_imports_point_downwards() -> None:
    text = next(b.text for b in blocks("ARCHITECTURE.md") if b.language == "layers")
    rank = {name: i for i, line in enumerate(text.splitlines()) for name in line.split()}
    for name, level in rank.items():
        module = ROOT / "sandbox" / name
        files = list(module.glob("*.py")) if module.is_dir() else [module.with_suffix(".py")]
        for path in files:
            upward = {other for other in imports(path) if rank.get(other, level) < level}
            assert not upward, f"{path.name} imports {upward}"


def test_handlers_import_only_what_handlers_are_written_with() -> None:
    paragraph = re.search(
        r"^`handlers` imports of .*?\n\n", text_of("ARCHITECTURE.md"), re.S | re.M
    )
    assert paragraph
    allowed = set(re.findall(r"`(\w+)`", paragraph[0])) - {"handlers", "sandbox"}
    for path in (ROOT / "handlers").rglob("*.py"):
        assert imports(path) <= allowed, path.name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_named_exist(document: str) -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    for file, name in NAMED_TEST.findall(text_of(document)):
        assert not file or (ROOT / file).is_file(), file
        assert not name or name in known, name
