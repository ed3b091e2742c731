"""Faults of a machine become one message; errors of the code keep their traceback."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from umbrella_data.errors import ScanError, ScanReason
from umbrella_train.distributed.finite import NonFiniteError
from umbrella_train.errors import RunError
from umbrella_train.run.faults import as_run_error, describe_fault, is_lost_connection


class Killed(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Killed(), num_workers=1)))
    words = describe_fault(caught.value, folder=tmp_path)
    assert words is not None
    assert "dataloader_num_workers" in words
    assert "memory" in words


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "full"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...", "/dev/shm"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "7, 8"),
    ],
)
def test_known_texts_of_other_libraries(text: str, word: str, tmp_path: Path) -> None:
    words = describe_fault(RuntimeError(text), folder=tmp_path)
    assert words is not None
    assert word in words


def test_too_little_memory_of_a_gpu(tmp_path: Path) -> None:
    words = describe_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), folder=tmp_path)
    assert words is not None
    assert "per_device_train_batch_size" in words


def test_a_scan_error_keeps_its_notes(tmp_path: Path) -> None:
    error = ScanError("is empty", path="a.nii", reason=ScanReason.MISSING)
    error.add_note("while reading line 3")
    assert describe_fault(error, folder=tmp_path) == f"{error}\nwhile reading line 3"


def test_errors_of_the_code_and_of_ours_are_raised_as_they_are(tmp_path: Path) -> None:
    for error in (KeyError("name"), NonFiniteError("a loss is not finite")):
        assert as_run_error(error, folder=tmp_path, watch=None) is error


def test_an_error_of_the_system_names_the_folder_of_the_run(tmp_path: Path) -> None:
    error: Any = as_run_error(OSError(errno.ENOSPC, "No space left on device"), folder=tmp_path, watch=None)
    assert isinstance(error, RunError)
    assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("shape mismatch"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_lost_connections_are_recognised(error: Exception, is_lost: bool) -> None:
    assert is_lost_connection(error) == is_lost
