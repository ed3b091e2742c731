"""Every key of the configuration, with its type, its meaning and its value, as text for `--help`."""

from __future__ import annotations

import contextlib
import io
import sys

from umbrella_train.config.data import AugmentSettings, DatasetConfig, PipelineSettings
from umbrella_train.config.run_config import RunConfig


def describe_keys(config: RunConfig) -> str:
    """List every key with its type, its meaning and the value that the configuration gives it.

    Lists and tables that the configuration leaves empty are shown with a first entry, for its keys.
    """
    import tyro  # late: for the help alone

    # In the terminal's own encoding: tyro draws its boxes with what that can show.
    text = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(RunConfig, default=_filled(config), args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    text.seek(0)
    _, _, keys = text.read().partition("\n\n")
    return keys


def _filled(config: RunConfig) -> RunConfig:
    """The configuration with an entry in each list and table of sections; not valid, and shown only."""
    from tyro import MISSING

    dataset = DatasetConfig.model_construct(manifest=MISSING, data_root=None, weight=1.0)
    entries = {
        "train": config.data.train or [dataset],
        "evaluation": config.data.evaluation or [dataset],
        "pipelines": {
            name: pipeline if pipeline.augment else pipeline.model_copy(update={"augment": AugmentSettings()})
            for name, pipeline in (
                config.data.pipelines or {next(iter(config.model.modalities)): PipelineSettings()}
            ).items()
        },
    }
    return config.model_copy(update={"data": config.data.model_copy(update=entries)})
