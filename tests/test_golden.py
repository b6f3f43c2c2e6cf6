"""Handlers against answers recorded from hardware: no special CPU is needed."""

from __future__ import annotations

import json
import lzma
from typing import Any

import pytest

from sandbox.conformance import defined_flags, difference
from sandbox.golden import read_record
from sandbox.run import INSTRUCTION_PACKS
from sandbox.subjects import HandlerTier, Stage
from tests.record_golden import FILE

PARTS = 8


@pytest.fixture(scope="module")
def handlers() -> HandlerTier:
    return HandlerTier(Stage(INSTRUCTION_PACKS))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    data = json.loads(lzma.decompress(FILE.read_bytes()))
    found: list[dict[str, Any]] = data["records"]
    assert len({record["insn"] for record in found}) > 5000
    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_handlers_do_what_hardware_did(
    handlers: HandlerTier, records: list[dict[str, Any]], part: int
) -> None:
    for record in records[part::PARTS]:
        insn, before, native = read_record(record)
        assert handlers.accepts(insn), f"no handler takes {insn!r}"
        found = difference(insn, native, handlers.run(insn, before), defined_flags(insn))
        assert found is None, f"{insn!r}: {found}\n{record}"


def test_the_file_is_small_enough_to_be_committed() -> None:
    assert FILE.stat().st_size < 4 << 20
