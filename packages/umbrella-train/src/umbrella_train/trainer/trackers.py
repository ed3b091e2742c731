"""The trackers, each an adapter over its own interface, and what they may receive.

Trackers receive numbers and settings only: no command line, host, user, path, commit, console output or packages.
Without a server, each writes to the run's folder; wandb, without a key, to the folder of all runs.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

from umbrella_train.config import RunConfig
from umbrella_train.config.schema import flatten

logger = logging.getLogger(__name__)

_PROJECT = "umbrella"
_DEFAULT_WANDB_URL = "https://api.wandb.ai"
# Settings that wandb would fill in by itself.
_PRIVATE_SETTINGS: Mapping[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "",
    "program": "umbrella-train",
    "program_relpath": "umbrella-train",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_executable": "python",
    "x_save_requirements": False,
}
_TRACKIO_WARNING = "* Trackio warning: "
_MAX_PARAMETERS = 100  # of mlflow, in one call


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker receives at its start.

    Attributes:
        name: Name of the run's folder.
        folder: The run's folder.
        settings: What `public_settings` leaves of the configuration.
        step: The step that the run starts from; 0 for a new run.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    step: int = 0


class Tracker(Protocol):
    """Adapter of one tracker. Its methods are called in one thread; they may raise anything, and may not return."""

    def start(self, run: TrackedRun) -> None:
        """Imports the tracker and begins a run."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Records numbers of an optimizer step."""

    def finish(self, *, has_failed: bool) -> None:
        """Ends the run, with everything written or sent."""


class WandbTracker:
    """Weights & Biases; offline without a key. A resumed run is a new run of the same name."""

    def start(self, run: TrackedRun) -> None:
        """Begins a run in `WANDB_PROJECT`."""
        os.environ.setdefault("WANDB_SILENT", "true")  # read at import
        import wandb

        # Its debug log contains the names of the folders that it writes to.
        logging.getLogger("wandb").addFilter(_is_warning)
        is_offline = "WANDB_MODE" not in os.environ and not has_wandb_key()
        if is_offline:
            logger.warning("wandb: no key for %s: the run is recorded offline", _wandb_host())
        self._wandb = wandb
        begun = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            config=dict(run.settings),
            dir=os.environ.get("WANDB_DIR", str(run.folder.parent)),
            mode="offline" if is_offline else None,
            reinit="finish_previous",
            settings=wandb.Settings(**_PRIVATE_SETTINGS),
        )
        logger.info("wandb: %s", Path(begun.dir).parent if begun.offline else begun.url)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a row to the history."""
        self._wandb.log(dict(numbers), step=step)

    def finish(self, *, has_failed: bool) -> None:
        """Waits until everything is uploaded."""
        self._wandb.finish(exit_code=int(has_failed))


class TensorboardTracker:
    """TensorBoard's event files in `tensorboard`. A resumed run hides what it will write again."""

    def start(self, run: TrackedRun) -> None:
        """Creates a file of events."""
        from tensorboard.summary.writer import event_file_writer

        # The name of the file would contain that of this machine.
        event_file_writer.socket = SimpleNamespace(gethostname=lambda: _PROJECT)
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            log_dir=str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None, flush_secs=10
        )
        text = json.dumps(run.settings, indent=1, default=str).replace("\n", "\n\t")
        self._writer.add_text("config", f"\t{text}", global_step=run.step)  # indented: shown as it is

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a scalar for each number."""
        for key, number in numbers.items():
            self._writer.add_scalar(key, number, global_step=step)

    def finish(self, *, has_failed: bool) -> None:  # noqa: ARG002
        """Closes the file."""
        self._writer.close()


class TrackioTracker:
    """Trackio; without `TRACKIO_SPACE_ID` and `TRACKIO_SERVER_URL` in `trackio`. A resumed run continues there."""

    def start(self, run: TrackedRun) -> None:
        """Begins a run in `TRACKIO_PROJECT`."""
        os.environ.setdefault("TRACKIO_DIR", str(run.folder.resolve() / "trackio"))  # read at import
        import trackio

        self._trackio = trackio
        self._problems: list[str] = []
        # trackio reports errors, also those of its threads, as warnings, and prints those that are raised.
        warnings.filterwarnings("error", module=r"trackio\b")
        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = self._note
        begun = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=run.name,
            config=dict(run.settings),
            resume="allow" if run.step else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        begun.config["_Username"] = None  # written with the first numbers
        self._raise_problem()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a row."""
        self._trackio.log(dict(numbers), step=step)
        self._raise_problem()

    def finish(self, *, has_failed: bool) -> None:  # noqa: ARG002
        """Waits until everything is written."""
        self._trackio.finish()
        self._raise_problem()

    def _note(self, *words: Any, **_: Any) -> None:
        """Trackio's `print`: messages would be among the results of the command, on stdout."""
        text = " ".join(map(str, words))
        if text.startswith(_TRACKIO_WARNING):
            self._problems.append(text.removeprefix(_TRACKIO_WARNING))

    def _raise_problem(self) -> None:
        if self._problems:
            raise RuntimeError(self._problems[0])


class MlflowTracker:
    """MLflow; without `MLFLOW_TRACKING_URI` in `mlflow/mlflow.db`. A resumed run is a new run of the same name."""

    def start(self, run: TrackedRun) -> None:
        """Begins a run in `MLFLOW_EXPERIMENT_NAME`; the client, unlike `mlflow.start_run`, adds no tags."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read at import
        import mlflow

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # names each table that it creates
        self._entities = mlflow.entities
        has_server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(None if has_server else self._local_store(run.folder / "mlflow"))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(number, run_name=run.name).info.run_id
        flat = [mlflow.entities.Param(_mlflow_name(key), str(value)) for key, value in flatten(run.settings)]
        for first in range(0, len(flat), _MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=flat[first : first + _MAX_PARAMETERS])

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds all numbers in one call."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_mlflow_name(key), number, now, step) for key, number in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self, *, has_failed: bool) -> None:
        """Sets the state of the run."""
        self._client.set_terminated(self._run_id, status="FAILED" if has_failed else "FINISHED")

    @staticmethod
    def _local_store(folder: Path) -> str:
        """The address of a local database; a store of files could not have the metrics `a` and `a/b`."""
        import mlflow

        # mlflow would write the path of a folder for artifacts, of which there are none.
        os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        file, unfinished = folder / "mlflow.db", folder / "unfinished.db"
        if not file.exists():
            # Takes seconds: a run that ends in between must not leave a database that cannot be opened.
            folder.mkdir(exist_ok=True)
            unfinished.unlink(missing_ok=True)
            mlflow.MlflowClient(f"sqlite:///{unfinished}")
            unfinished.rename(file)
        return f"sqlite:///{file}"


TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}
"""The adapters by their names in `trainer.report_to`."""


def has_wandb_key() -> bool:
    """Whether wandb can log in: by the environment, or by an entry for its host in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(_names_host(path.expanduser(), _wandb_host()) for path in files)


def _wandb_host() -> str:
    return urlsplit(os.environ.get("WANDB_BASE_URL") or _DEFAULT_WANDB_URL).hostname or ""


def _names_host(path: Path, host: str) -> bool:
    try:
        # Not `authenticators`: it falls back to the default entry, the password of another service.
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _mlflow_name(key: str) -> str:
    """A key with the characters that mlflow allows: `grad/[T1]/x` becomes `grad/_T1_/x`."""
    return re.sub(r"[^\w\-. :/]", "_", key)


def public_settings(config: RunConfig) -> dict[str, Any]:
    """The configuration without paths of folders, manifests, or a local checkpoint or tokenizer."""
    settings: dict[str, Any] = _without_paths(config.model_dump())
    for key in ("pretrained", "tokenizer"):
        name = settings["model"].get(key)
        if name is not None and (Path(name).expanduser().exists() or not name[:1].isalnum()):
            settings["model"][key] = "a local folder"
    return settings


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(entry) for key, entry in value.items() if not isinstance(entry, Path)}
    if isinstance(value, (list, tuple)):
        return [_without_paths(entry) for entry in value if not isinstance(entry, Path)]
    return value
