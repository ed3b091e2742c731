"""What holds for the tests of all packages and those that use several."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.fixture
def end_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Ends the data workers that a test has started; otherwise garbage collection waits 5 or 10 s for each of them.

    It ends the thread that tells a worker to stop before the object that would use it.
    """
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    started: list[Any] = []
    start = _MultiProcessingDataLoaderIter.__init__

    def start_and_keep(self: Any, loader: Any) -> None:
        started.append(self)
        start(self, loader)

    def end() -> None:
        while started:
            started.pop()._shutdown_workers()

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__init__", start_and_keep)
    yield end
    end()
