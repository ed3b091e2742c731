"""Every rank learns why another one failed, or which one does not answer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from umbrella_train.hf_compat import default_store

_INTERVAL = 2.0
"""Seconds between two signs of life of a rank."""
_FAILED, _RECEIVED, _DONE, _RANK = "umbrella/failed", "umbrella/received", "umbrella/done", "umbrella/rank-"


@dataclass
class _Seen:
    """What is known of a rank, and since when; in this process's clock."""

    status: dict[str, Any]
    alive_at: float
    progressed_at: float


class RankWatch(TrainerCallback):
    """A thread that tells the other ranks how far this one is, and hears of them; idle if there is one rank only.

    torch.distributed's own errors say neither which rank failed nor why: a rank that waits for a failed one sees a
    closed connection, or waits until it is killed. On a CPU, accelerate also ignores the timeout.

    Args:
        timeout: Seconds without progress after which a rank that is behind the others ends the run.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        # Steps done, whether the next one has begun, and batches read since: in this order on every rank.
        self._progress = (0, False, 0)
        self._failure: str | None = None
        self._is_ended = threading.Event()
        if not self._is_alone:
            self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
            self._host = socket.gethostname()
            self._seen: dict[int, _Seen] = {}
            # A clone: a thread that waits for the store would block the others.
            self._store = default_store().clone()
            self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
            self._thread.start()

    def has_read_batch(self) -> None:
        """Called when this rank has read a batch."""
        step, has_begun, num_batches = self._progress
        self._progress = (step, has_begun, num_batches + 1)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer after each batch of an evaluation."""
        self.has_read_batch()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer, when the batches of a step are read."""
        self._progress = (state.global_step, True, 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        self._progress = (state.global_step, False, 0)

    def fail(self, message: str) -> None:
        """Tells the others why this rank stops, and waits a moment until they know; the first failure counts.

        Args:
            message: What is wrong.
        """
        if self._is_alone or self._is_ended.is_set():
            return
        with contextlib.suppress(RuntimeError):  # the store is gone
            self._publish(message)
            # The store may end with this process.
            end = time.monotonic() + 3 * _INTERVAL
            while time.monotonic() < end and self._store.add(_RECEIVED, 0) < self._num_ranks - 1:
                time.sleep(_INTERVAL / 20)
        self.stop()

    def failure_of_another(self, *, is_lost: bool) -> str | None:
        """Which rank failed and why, or which one is silent; None if no other did.

        Args:
            is_lost: Whether this rank has lost its connection to another one, of which it then waits to hear.
        """
        if self._is_alone:
            return None
        end = time.monotonic() + (5 * _INTERVAL if is_lost else 0)
        while self._failure is None and time.monotonic() < end:
            time.sleep(_INTERVAL / 20)
            silent = self._describe_behind()
            if silent is not None and self._failure is None:
                self._failure = f"{silent}. It was killed, as for too much memory, or its machine is gone"
        return self._failure

    def stop(self) -> None:
        """Ends the thread."""
        self._is_ended.set()

    def finish(self) -> None:
        """Tells the others that this rank has done its part: its silence is not a fault then.

        The first rank, which may have the store, waits a moment for the others.
        """
        if self._is_alone or self._is_ended.is_set():
            return
        self.stop()
        self._thread.join(_INTERVAL)  # would write its own status
        with contextlib.suppress(RuntimeError):  # the store is gone
            self._write_status(beat=0, is_done=True)
            num_done, end = self._store.add(_DONE, 1), time.monotonic() + 3 * _INTERVAL
            # Several runs of one process group count on.
            while self._rank == 0 and num_done % self._num_ranks and time.monotonic() < end:
                time.sleep(_INTERVAL / 20)
                num_done = self._store.add(_DONE, 0)

    # ---- the thread ----

    def _watch(self) -> None:
        beat = 0
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that had it
            while not self._is_ended.is_set():
                self._exchange(beat := beat + 1)
                if self._store.check([_FAILED]):
                    self._leave(after=5 * _INTERVAL)
                elif time.monotonic() - self._seen[self._rank].progressed_at > self._timeout:
                    behind = self._describe_behind(timeout=self._timeout)
                    if behind is not None:
                        self._publish(f"{behind} (trainer.ddp_timeout: {self._timeout:g} s)")
                        self._leave(after=2 * _INTERVAL)
                self._is_ended.wait(_INTERVAL)

    def _exchange(self, beat: int) -> None:
        self._write_status(beat)
        for rank in range(self._num_ranks):
            if not self._store.check([f"{_RANK}{rank}"]):
                continue
            status, now = json.loads(self._store.get(f"{_RANK}{rank}")), time.monotonic()
            seen = self._seen.setdefault(rank, _Seen(status, now, now))
            if status["beat"] != seen.status["beat"]:
                seen.alive_at = now
            if status["progress"] != seen.status["progress"]:
                seen.progressed_at = now
            seen.status = status

    def _write_status(self, beat: int, *, is_done: bool = False) -> None:
        status = {"host": self._host, "progress": self._progress, "beat": beat, "is_done": is_done}
        self._store.set(f"{_RANK}{self._rank}", json.dumps(status))

    def _describe_behind(self, *, timeout: float = math.inf) -> str | None:
        """The ranks that this one waits for: silent ones, else those without progress for a time."""
        now = time.monotonic()
        seen = {rank: each for rank, each in dict(self._seen).items() if not each.status["is_done"]}
        if self._rank not in seen:
            return None  # just started
        own = seen[self._rank].status["progress"]
        silent = [rank for rank, each in seen.items() if now - each.alive_at > 2.5 * _INTERVAL]
        stuck = [
            rank for rank, each in seen.items() if each.status["progress"] < own and now - each.progressed_at > timeout
        ]
        words = []
        for rank in silent or stuck:
            step, has_begun, _ = seen[rank].status["progress"]
            doing = f"in step {step + 1}" if has_begun else f"after step {step}, before the next one"
            words.append(
                f"rank {rank} on {seen[rank].status['host']} "
                + (f"gives no sign of life; it was last {doing}" if silent else f"does not answer: it is {doing}")
            )
        return "; ".join(words) or None

    def _publish(self, message: str) -> None:
        step, has_begun, _ = self._progress
        when = f"in step {step + 1}" if has_begun else f"after step {step}"
        self._store.compare_set(_FAILED, "", f"rank {self._rank} on {self._host} stopped {when}: {message}")

    def _leave(self, *, after: float) -> None:
        """Ends the process, unless its main thread does: one that waits for another rank may wait forever."""
        self._failure = self._store.get(_FAILED).decode()
        self._store.add(_RECEIVED, 1)
        if not self._is_ended.wait(after):
            sys.stderr.write(f"error: {self._failure}\n")
            sys.stderr.flush()
            os._exit(2)
