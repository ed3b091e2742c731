"""Trackers receive numbers and settings only: no command line, host, path, commit or console output.

Hugging Face's callback would send all of these, and the folders of model and run. Without a key, wandb runs offline.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

from umbrella_train.config import RunConfig

logger = logging.getLogger(__name__)

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


class PrivateWandbCallback(WandbCallback):
    """Hugging Face's callback on a wandb run with private settings and this run's configuration.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self._config = config

    def setup(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        model: Any,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Called by the callback before its first line."""
        self._initialized = True
        if not state.is_world_process_zero:
            return
        wandb = self._wandb
        # Its debug log contains the names of the folders that it writes to.
        logging.getLogger("wandb").addFilter(_is_warning)
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "umbrella"),
            name=self._config.name,
            config=public_settings(self._config),
            reinit="finish_previous",
            settings=wandb.Settings(**_PRIVATE_SETTINGS),
        )
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        run.config["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())


def keep_trackers_private(trainer: Trainer, config: RunConfig) -> None:
    """Replaces Hugging Face's callback; wandb runs offline without a key.

    Args:
        trainer: Not started yet. Unchanged if it reports to no tracker.
        config: The run.
    """
    if "wandb" not in (trainer.args.report_to or ()):
        return
    os.environ.setdefault("WANDB_DIR", str(config.output_dir))
    if "WANDB_MODE" not in os.environ and not has_wandb_key():
        logger.warning("wandb: no key for %s: the run is recorded offline", _wandb_host())
        os.environ["WANDB_MODE"] = "offline"
    trainer.remove_callback(WandbCallback)
    trainer.add_callback(PrivateWandbCallback(config))


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


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
