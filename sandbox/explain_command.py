"""The command ``sandbox explain``: a file or bytes, instruction by instruction."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from guests.load import Kind, detect, load_elf, load_raw, read_file
from sandbox.errors import SandboxError
from sandbox.explain import explain, parse_hex, table
from sandbox.run import BITNESS, make_vm


def explain_command(options: Namespace) -> int:
    """Print the table; the status to exit with."""
    path = Path(options.what)
    kind = detect(path) if path.exists() else Kind.RAW
    bitness = 64 if kind is Kind.ELF else BITNESS[options.mode]
    with make_vm(options, kind) as vm:
        for address, data in _parts(options, path, kind, bitness):
            lines = explain(data, bitness, vm.policy, vm.handler_names, address)
            for row in table(lines):
                print(row)
    return 0


def _parts(options: Namespace, path: Path, kind: Kind, bitness: int) -> Iterator[tuple[int, bytes]]:
    """(address, code) of each executable part."""
    if not path.exists():
        try:
            yield options.base, parse_hex(options.what)
        except ValueError as error:
            raise SandboxError(str(error)) from None
    elif kind is Kind.ELF:
        for segment in load_elf(path).segments:
            if segment.executable:
                yield segment.address, segment.data
    elif kind is Kind.RAW:
        yield options.base, load_raw(path)
    else:
        from guests.assemble import assemble

        source = read_file(path).decode(errors="replace")
        yield options.base, assemble(source, options.base, bitness, str(path))
