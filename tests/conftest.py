"""Fixtures of the tests that use several packages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def folder_of(variable: str, *, content: str) -> Path:
    """The folder that an environment variable names; CI must have it, elsewhere the tests skip."""
    folder = os.environ.get(variable)
    if folder:
        assert Path(folder).is_dir(), f"{variable} names {folder}, which is no folder"
        return Path(folder)
    if os.environ.get("CI"):
        pytest.fail(f"{variable} is not set: in CI the tests on {content} must not skip")
    pytest.skip(f"{variable} is not set")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The BIDS tree of real scans that UMBRELLA_REAL_DATA names."""
    return folder_of("UMBRELLA_REAL_DATA", content="real scans")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder that UMBRELLA_SMOLLM2 names, of a language model that tools/pretrained_smollm2.py has written."""
    return folder_of("UMBRELLA_SMOLLM2", content="a pretrained model")
