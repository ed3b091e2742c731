"""Fixtures of the tests that use several packages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The BIDS tree of real scans that UMBRELLA_REAL_DATA names; CI must have it, elsewhere the tests skip."""
    folder = os.environ.get("UMBRELLA_REAL_DATA")
    if folder:
        assert Path(folder).is_dir(), f"UMBRELLA_REAL_DATA names {folder}, which is no folder"
        return Path(folder)
    if os.environ.get("CI"):
        pytest.fail("UMBRELLA_REAL_DATA is not set: in CI the tests on real scans must not skip")
    pytest.skip("UMBRELLA_REAL_DATA is not set")
