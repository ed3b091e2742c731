"""A process whose exit hooks, threads or child processes hang ends all the same, with its exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

HANGS = """
import atexit, subprocess, sys, threading
from umbrella_train import exit_guard
exit_guard.COMMAND_SECONDS = exit_guard.OTHER_SECONDS = 0.1
exit_guard.guard_exit()
atexit.register(threading.Event().wait)
{hang}
with exit_guard.last_call() if {is_command} else threading.Lock():
    print("done")
    {end}
"""
THREAD = "threading.Thread(target=threading.Event().wait).start()"
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])"


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(7)", 7), ("sys.exit()", 0), ("sys.exit('words')", 1), ("1 / 0", 1)]
)
def test_a_command_keeps_its_exit_code(end: str, code: int) -> None:
    done = run_python(HANGS.format(hang=THREAD, is_command=True, end=end))
    assert (done.returncode, done.stdout) == (code, "done\n")


@pytest.mark.parametrize("hang", [THREAD, CHILD, "pass"])
def test_other_programs_end_with_an_error(hang: str) -> None:
    done = run_python(HANGS.format(hang=hang, is_command=False, end="sys.exit(0)"))
    assert (done.returncode, done.stdout) == (1, "done\n")


def test_a_program_that_ends_by_itself_is_left_alone() -> None:
    done = run_python("import sys; from umbrella_train.exit_guard import guard_exit; guard_exit(); sys.exit(5)")
    assert (done.returncode, done.stderr) == (5, "")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    # Reads the output to its end, as a pipe would.
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
