"""The page of what operations cost is of the data beside it, and the data of today's packs.

No figure is measured here; the limits are those of the data that was recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from sandbox.bench import costs
from sandbox.bench.loops import run_of
from sandbox.decode import FORM_NAMES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / costs.DATA).read_text())
    return found


def test_the_page_is_of_the_data(data: dict[str, Any]) -> None:
    assert (ROOT / costs.PAGE).read_text() == costs.page(data)


def test_all_operations_of_the_packs_are_there(data: dict[str, Any]) -> None:
    measured = {cost["form"]: cost["group"] for cost in data["operations"]}
    wanted = {FORM_NAMES[code]: costs.group_of(code) for code in costs.measured_forms()}
    assert measured == wanted
    assert len(measured) > 350


@pytest.mark.parametrize(
    ("group", "limit"), [("integer and moves, 256 bits", 2000), ("float, 256 bits", 4000)]
)
def test_the_average_operation_is_within_its_limit(
    data: dict[str, Any], group: str, limit: int
) -> None:
    times = [cost["nanoseconds"] for cost in data["operations"] if cost["group"] == group]
    assert len(times) > 50
    assert mean(times) <= limit


def test_of_two_runs_the_lesser_figures_are_kept() -> None:
    now, before = (
        {"machine": "m", "python": "3", "trivial": t,
         "operations": [{"form": f, "nanoseconds": n} for f, n in costs_of.items()]}
        for t, costs_of in ((5, {"A": 3, "B": 7}), (4, {"A": 4, "B": 6, "GONE": 1}))
    )  # fmt: skip
    costs.keep_least(now, before)
    assert now["trivial"] == 4
    assert now["operations"] == [{"form": "A", "nanoseconds": 3}, {"form": "B", "nanoseconds": 6}]
    with pytest.raises(SystemExit, match="another machine"):
        costs.keep_least(now, {**before, "machine": "n"})


def test_one_operation_is_measured() -> None:
    loop = run_of("vpaddd", "vpaddd ymm1, ymm2, ymm3")
    assert 0 < costs.nanoseconds(loop, "u1", "integer", "avx2") < 1e6
