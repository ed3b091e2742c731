"""Exit codes of the commands of all packages."""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes; one above 128 is 128 plus the number of the signal that stopped the command."""

    DONE = 0
    PROBLEMS = 1
    ERROR = 2
    INTERRUPTED = 128 + signal.SIGINT
    TIME_LIMIT = 128 + signal.SIGUSR1
    CLOSED_PIPE = 128 + signal.SIGPIPE
    TERMINATED = 128 + signal.SIGTERM

    @property
    def meaning(self) -> str:
        """When a command ends with this code."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.DONE: "the command has done what it was called for; a run that is already finished is also 0",
    ExitCode.PROBLEMS: "`umbrella-data` check, preview and cache: rows or scans that cannot be used; from-bids leaves "
    "such scans out, and ends with 1 if there is none to train on; all of it: an invalid value; "
    "all commands: an unexpected error, with a traceback; under torchrun: any failure of a run",
    ExitCode.ERROR: "an unknown option, or an error that you can fix, as one message without a traceback: "
    "configuration, manifest, scan, disk; of `umbrella-data` only an unknown option or a path",
    ExitCode.CLOSED_PIPE: "the reader of the output has stopped, as in `| head` (SIGPIPE)",
    ExitCode.INTERRUPTED: "Ctrl-C (SIGINT); a training run has saved a checkpoint",
    ExitCode.TERMINATED: "SIGTERM; a training run has saved a checkpoint",
    ExitCode.TIME_LIMIT: "SIGUSR1, or the end of the job or of `--max-time`: a training run has saved a checkpoint",
}
