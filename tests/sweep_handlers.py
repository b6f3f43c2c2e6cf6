"""Sweep handlers against the host CPU for as long as one likes, and print what differs.

    python -m tests.sweep_handlers [options] [MODULE ...]      (default: all of handlers/)

Not a test: the tests take samples of this. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import handlers
from sandbox.conformance import Verdict, sweep, table
from sandbox.decode import FORM_NAMES
from sandbox.encodings import all_forms, forms_with, mnemonic_of
from sandbox.handler import Handler, Pack
from tests.differential import HandlerSubject, native_reason


def handlers_in(value: Any) -> Iterator[Handler]:
    """All handlers in a module's public names, a pack or a list, nested ones too."""
    if isinstance(value, Handler):
        yield value
    elif isinstance(value, Pack):
        yield from value.handlers
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from handlers_in(item)


def load(names: list[str]) -> Pack:
    """The handlers of the named modules, each once; without names, of all in handlers/."""
    names = names or [f"handlers.{info.name}" for info in pkgutil.iter_modules(handlers.__path__)]
    found: dict[int, Handler] = {}
    for name in names:
        for public, value in vars(importlib.import_module(name)).items():
            if not public.startswith("_"):
                found |= {id(handler): handler for handler in handlers_in(value)}
    return Pack("swept", tuple(found.values()))


def choose_forms(pack: Pack, pattern: str, features: list[str] | None) -> list[int]:
    """Forms that a handler of the pack is asked for."""
    mnemonics = {m for handler in pack.handlers for m in handler.mnemonics}
    forms = {f for handler in pack.handlers for f in handler.forms}
    allowed = set(all_forms() if features is None else forms_with(*features))
    return [
        code
        for code in all_forms()
        if code in allowed
        and (mnemonic_of(code) in mnemonics or FORM_NAMES[code] in forms)
        and re.search(pattern, FORM_NAMES[code], re.IGNORECASE)
    ]


def run(pack: Pack, codes: list[int], options: argparse.Namespace) -> Iterator[Verdict]:
    """Rounds over all forms with a new seed each, until the time is over."""
    subject, started, seed = HandlerSubject(pack), time.monotonic(), options.seed
    while True:
        for code in codes:
            if time.monotonic() - started > options.seconds:
                return
            try:
                yield next(sweep(subject, [code], options.cases, seed, not options.no_faults))
            except ValueError as error:  # control transfers and the like
                yield Verdict(FORM_NAMES[code], skipped=str(error))
        seed += 1
        if options.once:
            return


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep_handlers", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--forms", default="", help="regular expression on form names")
    parser.add_argument("--features", nargs="+", help="only forms that need no other features")
    parser.add_argument("--cases", type=int, default=32, help="per encoding and round")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--once", action="store_true", help="one round only")
    parser.add_argument("--no-faults", action="store_true", help="no faulting memory operands")
    parser.add_argument("--all", action="store_true", help="print the forms without difference")
    parser.add_argument("--full", action="store_true", help="print the first differences in full")
    options = parser.parse_args()
    if native_reason():
        print(native_reason(), file=sys.stderr)
        return 2
    pack = load(options.modules)
    codes = choose_forms(pack, options.forms, options.features)
    totals, started = Verdict(""), time.monotonic()
    differing: set[str] = set()
    declined: set[str] = set()
    skipped: set[str] = set()
    for verdict in run(pack, codes, options):
        totals.cases += verdict.cases
        totals.differences += verdict.differences
        if verdict.differences:
            differing.add(verdict.form)
        if verdict.declined:
            declined.add(verdict.form)
        if verdict.skipped:
            skipped.add(verdict.form)
        if verdict.differences or options.all:
            print(*table([verdict]), flush=True)
            if options.full and verdict.first:
                print(verdict.first, flush=True)
    print(
        f"{len(codes)} forms, {totals.cases} cases, {totals.differences} differences in "
        f"{len(differing)} forms; {len(declined)} forms declined in part or whole, "
        f"{len(skipped)} skipped; {time.monotonic() - started:.0f} s"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
