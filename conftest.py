"""What holds for the tests of all packages and those that use several."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _skip_what_is_imported() -> None:
    """Garbage collection leaves out what exists before the tests of a file, most of it torch and transformers.

    Accelerate collects at the end of each training: 0.3 s for all objects, longer than a training of these tests.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Everything is collected at the end."""
    gc.unfreeze()
