"""What a comparison with the host CPU tries: encodings, immediates, states; under which policy."""

from __future__ import annotations

import pytest

from sandbox.campaign import Campaign
from sandbox.campaign_worker import FEW, UnderPolicy, operands_of, planned
from sandbox.decode import decode
from sandbox.encodings import form
from sandbox.policy import Policy
from sandbox.subjects import FastPath, Stage
from tests.differential import native_reason

native = pytest.mark.skipif(bool(native_reason()), reason=native_reason())


@pytest.mark.parametrize("name", ["VEX_VPSHUFD_YMM_YMMM256_IMM8", "ROL_RM32_IMM8", "FLD_M32FP"])
def test_each_encoding_is_planned_once(name: str) -> None:
    raw = [insn.raw for insn, _cases in planned(form(name), 8)]
    assert len(raw) == len(set(raw))


@pytest.mark.parametrize("name", ["PSHUFD_XMM_XMMM128_IMM8", "VEX_VPERMQ_YMM_YMMM256_IMM8"])
def test_every_immediate_of_8_bits_is_tried(name: str) -> None:
    plan = planned(form(name), 1)
    assert {insn.iced.immediate8 for insn, cases in plan if cases} == set(range(256))


@pytest.mark.parametrize("name", ["LEAVEQ", "CLD", "ADD_RM32_R32", "VEX_VPADDD_YMM_YMM_YMMM256"])
def test_each_kind_of_operands_is_tried_often_however_few_the_encodings(name: str) -> None:
    totals: dict[str, int] = {}
    for insn, cases in planned(form(name), 10):
        assert cases >= 10
        totals[operands_of(insn)] = totals.get(operands_of(insn), 0) + cases
    assert all(total >= 10 * (FEW - 1) for total in totals.values())


@pytest.mark.parametrize(
    ("code", "allowed"),
    [("01c8", True), ("660f3800ca", False), ("c5edfecb", False), ("0fa2", False)],
    ids=["add", "pshufb: wrong in Unicorn", "vpaddd: left to the handlers", "cpuid: intercepted"],
)
def test_under_a_policy_only_what_it_allows_is_tried(code: str, allowed: bool) -> None:
    subject = UnderPolicy(FastPath(Stage()), Policy.load("verified"))
    assert subject.accepts(decode(bytes.fromhex(code), 64)) == allowed


@native
def test_under_the_policy_verified_nothing_differs() -> None:
    codes = [form(name) for name in ("PSHUFB_XMM_XMMM128", "PSHUFB_MM_MMM64", "POPCNT_R32_RM32")]
    with Campaign(["integer"], 1, "verified") as campaign:
        found = [f for each in campaign.run([("fast", c) for c in codes], 4, 1) for f in each]
    assert all(finding.differences == 0 for finding in found)
    tried = {finding.form for finding in found if finding.cases}
    assert "POPCNT_R32_RM32" in tried and "PSHUFB_XMM_XMMM128" not in tried
