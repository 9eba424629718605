"""Which gate holds for which metric, and what a malformed table is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.traces.errors import InputError
from kvtwin.validate.gates import FAMILIES, METRICS, Gate, judge, parse_gates
from kvtwin.validate.result import Check, Verdict

NAN = float("nan")
CHECK = Check("run", "e2e", "ttft_p99", "ms", 100.0, 106.0, 0.06, (0.05, 0.07), 300)


@pytest.mark.parametrize(
    ("gates", "error", "floor", "threshold", "verdict"),
    [
        ({}, 0.06, None, None, "no gate"),
        ({}, 0.06, 0.05, None, "no gate"),
        ({}, -0.06, 0.06, None, "not distinguishable"),
        ({"tpot": 0.01}, 0.06, None, None, "no gate"),
        ({"ttft": 0.05}, 0.06, None, 0.05, "fail"),
        ({"ttft": 0.05}, -0.06, None, 0.05, "fail"),
        ({"ttft": 0.06}, -0.06, None, 0.06, "pass"),
        ({"ttft": 0.05, "ttft_p99": 0.1}, 0.06, None, 0.1, "pass"),
        ({"ttft": 0.1, "ttft_p99": 0.05}, 0.06, None, 0.05, "fail"),
        ({"ttft": 0.05}, 0.06, 0.07, 0.05, "not distinguishable"),
        ({"ttft": {"max_error": 0.05, "floor_factor": 1.5}}, 0.06, None, 0.05, "fail"),
        ({"ttft": {"max_error": 0.05, "floor_factor": 1.5}}, 0.06, 0.03, 0.05, "fail"),
        ({"ttft": {"max_error": 0.05, "floor_factor": 1.5}}, 0.06, 0.05, 0.075, "pass"),
        ({"ttft": {"max_error": 0.05}}, 0.06, 0.05, 0.05, "fail"),
        ({"ttft": 0}, 0.0, None, 0.0, "pass"),
        ({"ttft": 0.05}, NAN, None, 0.05, "fail"),
        ({"ttft": 0.05}, NAN, 0.1, 0.05, "fail"),
        ({}, NAN, 0.1, None, "no gate"),
    ],
)
def test_judge(
    gates: dict[str, Any], error: float, floor: float | None, threshold: float | None, verdict: Verdict
) -> None:
    judged = judge(replace(CHECK, error=error, noise_floor=floor), parse_gates(gates))
    assert judged.threshold == (None if threshold is None else pytest.approx(threshold))
    assert judged.verdict == verdict


def test_a_family_gate_holds_for_its_members_and_no_others() -> None:
    gates = parse_gates({"step_mape": 0.05, "ttft": 0.02})
    gated = [m for m in METRICS if judge(replace(CHECK, metric=m), gates).threshold is not None]
    assert gated == [*FAMILIES["ttft"], "step_mape", *FAMILIES["step_mape"]]
    assert "ttft_mape" not in gated


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ttft_p98": 0.05}, "t.toml, gates.ttft_p98: unknown metric; did you mean 'ttft_p99'?"),
        ({"steps_mape": 0.05}, "t.toml, gates.steps_mape: unknown metric; did you mean 'step_mape'?"),
        ({"ttft": -0.05}, "t.toml, gates.ttft: -0.05 is negative"),
        ({"ttft": NAN}, "t.toml, gates.ttft: nan is not a number"),
        ({"ttft": True}, "t.toml, gates.ttft: True is not a number"),
        ({"ttft": "5 %"}, "t.toml, gates.ttft: '5 %' is not a number"),
        ({"ttft": 5}, "t.toml, gates.ttft: 5 is above 1: an error is a fraction of the measurement (0.05 for 5 %)"),
        ({"ttft": {}}, "t.toml, gates.ttft: max_error is missing: it holds where there is no noise floor"),
        (
            {"ttft": {"max_err": 1}},
            "t.toml, gates.ttft: unknown key 'max_err'; known: max_error, floor_factor, max_drift",
        ),
        (
            {"ttft": {"max_error": 0.1, "floor_factor": -1}},
            "t.toml, gates.ttft.floor_factor: -1 is negative",
        ),
        ({"ttft": {"max_error": False}}, "t.toml, gates.ttft.max_error: False is not a number"),
        (
            {"ttft": float("inf")},
            "t.toml, gates.ttft: inf is above 1: an error is a fraction of the measurement (0.05 for 5 %)",
        ),
        (
            {"ttft": {"max_error": 0.1, "floor_factor": 10**400}},
            f"t.toml, gates.ttft.floor_factor: {10**400} is above 100",
        ),
        ([0.05], "t.toml, gates: [0.05] is not a table of metric = max error"),
    ],
)
def test_bad_gates_get_one_line(table: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_gates(table, "t.toml")
    assert str(error.value) == message


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["max_error", "floor_factor"]) | st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*METRICS, *FAMILIES]) | st.text(max_size=9), toml_values, max_size=4))
def test_any_table_gives_gates_or_one_line(table: dict[str, Any]) -> None:
    try:
        gates = parse_gates(table, "t.toml")
    except InputError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("t.toml, gates")
        return
    for gate in gates.values():
        assert isinstance(gate, Gate)
        assert 0 <= gate.max_error <= 1
        assert 0 <= gate.floor_factor <= 100
