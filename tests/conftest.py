"""Shared fixtures: where the real measurements lie, and what the property tests are allowed to take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("kvtwin", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvtwin")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real measurements beside the repository (KVTWIN_SHARED names another place)."""
    folder = Path(os.environ.get("KVTWIN_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the measurements in {folder}, which a user's clone does not have")
    return folder
