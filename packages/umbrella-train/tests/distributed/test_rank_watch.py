"""Two ranks in one process, which share a store: each learns why the other one failed, or that it does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from umbrella_train.distributed import rank_watch
from umbrella_train.distributed.rank_watch import RankWatch


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ranks printed that ended their process from the thread."""
    ended: list[str] = []

    def leave(_code: int) -> None:
        ended.append(threading.current_thread().name)
        raise RuntimeError  # ends the thread

    monkeypatch.setattr(rank_watch.os, "_exit", leave)
    return ended


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, left: list[str]) -> Iterator[list[RankWatch]]:
    store = dist.HashStore()
    monkeypatch.setattr(rank_watch, "_INTERVAL", 0.05)
    monkeypatch.setattr(rank_watch, "default_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    watches = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        watches.append(RankWatch(timeout=0.5))
    yield watches
    for watch in watches:
        watch.stop()


def callback(watch: RankWatch, event: str, step: int) -> None:
    arguments: Any = (None, SimpleNamespace(global_step=step), None)
    getattr(watch, event)(*arguments)


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_other_rank_learns_the_first_failure(ranks: list[RankWatch]) -> None:
    callback(ranks[1], "on_step_begin", 6)
    ranks[1].fail("scan.nii is empty")
    words = ranks[0].failure_of_another(is_lost=True)
    assert words is not None
    assert words.startswith("rank 1 on ")
    assert words.endswith("stopped in step 7: scan.nii is empty")
    ranks[0].fail("connection closed")
    assert ranks[0].failure_of_another(is_lost=False) == words  # the first one counts


def test_without_a_failure_there_is_nothing_to_tell(ranks: list[RankWatch]) -> None:
    assert ranks[0].failure_of_another(is_lost=False) is None


def test_a_silent_rank_is_named_when_the_connection_is_lost(ranks: list[RankWatch]) -> None:
    callback(ranks[1], "on_step_begin", 3)
    until(lambda: 1 in ranks[0]._seen and ranks[0]._seen[1].status["progress"] == [3, True, 0])
    ranks[1].stop()  # as if killed
    words = ranks[0].failure_of_another(is_lost=True)
    assert words is not None
    assert words.startswith("rank 1 on ")
    assert "no sign of life" in words
    assert "in step 4" in words


def test_a_rank_that_is_behind_ends_the_run_after_the_timeout(
    ranks: list[RankWatch], left: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for watch in ranks:
        callback(watch, "on_step_end", 5)
    ranks[0].has_read_batch()  # waits for the other one, which reads
    until(lambda: len(left) == 2)
    message = capsys.readouterr().err
    assert "rank 0" in message.splitlines()[0]
    assert "rank 1" in message.splitlines()[0]
    assert "after step 5" in message.splitlines()[0]


def test_ranks_that_advance_are_left_alone(ranks: list[RankWatch], left: list[str]) -> None:
    begin = time.monotonic()
    step = 0
    while time.monotonic() - begin < 1.5:
        callback(ranks[0], "on_step_begin", step := step + 1)
        callback(ranks[1], "on_step_end", step)
        ranks[0].has_read_batch()
        time.sleep(0.02)
    assert not left


def test_equal_ranks_do_not_accuse_each_other(ranks: list[RankWatch], left: list[str]) -> None:
    time.sleep(1.2)  # no progress for longer than the timeout
    assert not left


def test_the_first_rank_ends_after_the_others(ranks: list[RankWatch]) -> None:
    first = threading.Thread(target=ranks[0].finish)
    first.start()
    first.join(0.05)
    assert first.is_alive()
    ranks[1].finish()
    first.join(20)
    assert not first.is_alive()


def test_one_process_has_no_thread() -> None:
    num_threads = threading.active_count()
    watch = RankWatch(timeout=1)
    watch.fail("an error")
    assert watch.failure_of_another(is_lost=True) is None
    assert threading.active_count() <= num_threads


def test_a_rank_that_has_finished_is_not_silent(ranks: list[RankWatch], left: list[str]) -> None:
    ranks[1].finish()
    time.sleep(0.8)  # longer than the timeout
    assert not left
    assert ranks[0].failure_of_another(is_lost=False) is None
    assert ranks[0]._describe_behind() is None
