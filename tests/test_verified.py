"""The preset ``verified``: made from evidence, and what it traps as wrong is wrong."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import unicorn

from sandbox.campaign_worker import compare_form
from sandbox.conformance import Outcome, defined_flags, difference
from sandbox.decode import FORM_NAMES, Insn, decode
from sandbox.encodings import all_forms, encodings
from sandbox.gaps import reconcile
from sandbox.golden import read_record
from sandbox.intercepts import intercepted_forms
from sandbox.native import Result, State
from sandbox.policy import Policy
from sandbox.run import INSTRUCTION_PACKS
from sandbox.subjects import FastPath, HandlerTier, Stage
from sandbox.verified import policy_text
from tests.differential import native_reason
from tests.test_known_wrong import CASES as HAND_MADE
from tests.test_known_wrong import Case, instructions

POLICIES = resources.files("sandbox.policies")
KNOWN_WRONG: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden" / "known_wrong.json").read_text()
)
CASES = [record for record in KNOWN_WRONG if "crash" not in record]
SAMPLE = random.Random(0).sample(range(len(all_forms())), 60)


def name_of(record: dict[str, Any]) -> str:
    return f"{record['form']}-{record['operands']}"


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(INSTRUCTION_PACKS)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load("verified")


def found(insn: Insn, native: Result, outcome: Outcome) -> str | None:
    return difference(insn, native, outcome, defined_flags(insn))


def test_the_policy_is_what_follows_from_the_evidence() -> None:
    evidence = json.loads(POLICIES.joinpath("verified.json").read_text())
    assert POLICIES.joinpath("verified.toml").read_text() == policy_text(evidence)


def test_nothing_is_allowed_without_evidence_or_a_reason(policy: Policy) -> None:
    evidence = json.loads(POLICIES.joinpath("verified.json").read_text())["forms"]
    for code, name in FORM_NAMES.items():
        if policy.allowed[code]:
            rule = policy.rules[policy.deciding(code)]
            assert rule.comment
            if rule.file == "verified.toml":
                assert all(entry[2] == 0 for entry in evidence[name]["fast"].values())


@pytest.mark.parametrize("record", CASES, ids=map(name_of, CASES))
def test_what_is_known_to_be_wrong_is_trapped(policy: Policy, record: dict[str, Any]) -> None:
    assert not policy.allows(decode(bytes.fromhex(record["insn"]), 64))


@pytest.mark.skipif(unicorn.__version__ != "2.1.4", reason="the cases are for Unicorn 2.1.4")
@pytest.mark.parametrize("record", CASES, ids=map(name_of, CASES))
def test_unicorn_does_something_else_than_hardware(stage: Stage, record: dict[str, Any]) -> None:
    insn, before, native = read_record(record)
    outcome = FastPath(stage).run(insn, before)
    outcome, _gaps = reconcile(insn, before, native, outcome)
    assert found(insn, native, outcome)


@pytest.mark.parametrize("record", CASES, ids=map(name_of, CASES))
def test_the_handlers_do_what_hardware_did(stage: Stage, record: dict[str, Any]) -> None:
    insn, before, native = read_record(record)
    handlers = HandlerTier(stage)
    if not handlers.accepts(insn):
        pytest.skip("no handler takes it")
    assert found(insn, native, handlers.run(insn, before)) is None


def test_forms_that_crash_unicorn_are_never_run_whatever_the_policy(stage: Stage) -> None:
    crashing = [record["form"] for record in KNOWN_WRONG if "crash" in record]
    codes = {name: code for code, name in FORM_NAMES.items()}
    fast = FastPath(stage)
    for name in crashing:
        for insn in encodings(codes[name]):
            assert fast.run(insn, State()).fault is not None


@pytest.mark.skipif(bool(native_reason()), reason=native_reason())
@pytest.mark.parametrize("code", [all_forms()[n] for n in SAMPLE], ids=FORM_NAMES.__getitem__)
def test_what_is_allowed_is_right_on_this_cpu(stage: Stage, policy: Policy, code: int) -> None:
    if intercepted_forms()[code] or not policy.allowed[code]:
        pytest.skip("not on the fast path")
    for finding in compare_form(FastPath(stage), "fast", code, 4, 12345):
        assert finding.differences == 0, finding.first


LEFT_TO_THE_PROCESSOR = {"cvtpi2pd"}  # whether a memory operand touches the x87 tags


@pytest.mark.parametrize("case", HAND_MADE, ids=[case.wrong for case in HAND_MADE])
def test_what_was_found_by_hand_is_trapped_too(policy: Policy, case: Case) -> None:
    wrong = [i for i in instructions(bytes.fromhex(case.code)) if i.mnemonic == case.wrong]
    if case.wrong in LEFT_TO_THE_PROCESSOR:
        pytest.skip("processors differ")
    assert not any(policy.allows(insn) for insn in wrong)
