"""A profile file that cannot be used is one line, never a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtwin.sim.latency.profile import Profile, read_profile
from kvtwin.sim.latency.regression import RegressionLatency
from kvtwin.traces.errors import InputError


@pytest.mark.parametrize("price", [float("nan"), float("inf"), "48.9", True, None])
def test_a_price_that_is_no_number(price: Any, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    Profile(kind="regression", latency=RegressionLatency({"step": 5000.0}).to_json()).write(path)
    document = json.loads(path.read_text())
    document["latency"]["coefficients_ns"]["step"] = price
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"NaN|Infinity|the price of step is"):
        read_profile(path)
