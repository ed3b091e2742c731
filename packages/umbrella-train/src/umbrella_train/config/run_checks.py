"""Checks that only a run that is about to start needs: the installed transformers, this disk, this launch.

They are left out where a configuration is read for other reasons (help, the evaluation of a finished run).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from umbrella_data.errors import did_you_mean
from umbrella_train.config.model import STATE_DICT_FILES

# Only files and folders have them.
_PATH_ENDINGS = ("/", ".gguf", *STATE_DICT_FILES)
# The modules that a tracker needs, and what installs them. None of them is imported here.
_TRACKERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "wandb": (("wandb",), "wandb"),
    "tensorboard": (("tensorboard",), "umbrella-train[tensorboard]"),
    "trackio": (("trackio",), "umbrella-train[trackio]"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "umbrella-train[mlflow]"),
}


def run_problems(content: Mapping[str, Any], *, coming: str | None = None) -> list[str]:
    """List what would prevent a configuration from starting on this machine, each with its dotted path.

    The content is raw, with overrides applied; values that the schema rejects are skipped. `coming` is a model that an
    earlier stage will have written.
    """
    model = _table(content, "model")
    problems = []
    for name in ("vision_config", "text_config"):
        problems += [f"model.{name}{text}" for text in _hf_config_problems(_table(model, name))]
    for key in ("pretrained", "language_model", "vision_encoder", "tokenizer"):
        source = model.get(key)
        if not isinstance(source, str) or not is_path_like(split_revision(source)[0]) or source == coming:
            continue
        if not Path(source).expanduser().exists():
            problems.append(f"model.{key}: {source} is neither an existing folder or file nor a name on the hub")
    problems += _tracker_problems(_table(content, "trainer").get("report_to"))
    # From the command line it is still text.
    world_size = str(_table(content, "trainer").get("world_size"))
    problem = world_size_problem(int(world_size) if world_size.isdecimal() else None)
    return problems if problem is None else [*problems, problem]


def _tracker_problems(names: Any) -> list[str]:
    problems = []
    for name in sorted(_TRACKERS.keys() & {str(name) for name in (names if isinstance(names, list) else ())}):
        modules, source = _TRACKERS[name]
        if name == "mlflow" and os.environ.get("MLFLOW_TRACKING_URI"):
            modules = modules[:1]  # the others are for the store in the run's folder
        missing = [module for module in modules if module not in sys.modules and find_spec(module) is None]
        if missing:
            problems.append(
                f"trainer.report_to: {name} needs {' and '.join(missing)}, which is not installed; install it with: "
                f"pip install '{source}'"
            )
    return problems


def split_revision(source: str) -> tuple[str, str | None]:
    """The name on the hub and the revision of `name@revision`; a path, and a name without a revision, have None."""
    name, _, revision = source.partition("@")
    if not revision or is_path_like(name) or source.endswith(_PATH_ENDINGS) or Path(source).exists():
        return source, None
    return name, revision


def is_path_like(name: str) -> bool:
    """Whether a source can only be a folder or file; names on the hub are `name` or `owner/name`."""
    return name[:1] in (".", "/", "~") or name.count("/") > 1 or name.endswith(_PATH_ENDINGS) or "\\" in name


def world_size_problem(expected: int | None) -> str | None:
    """Compare the expected number of processes with the number launched."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is None or expected == launched:
        return None
    return (
        f"trainer.world_size is {expected}, but the number of processes launched is {launched}; "
        f"start the run with: torchrun --nproc-per-node {expected} -m umbrella_train ..."
    )


def _hf_config_problems(section: Mapping[str, Any]) -> list[str]:
    """Problems of a Hugging Face config, each after the rest of its path."""
    model_type = section.get("model_type")
    if model_type is None:
        return []  # the schema reports it
    # Late: these imports take seconds.
    from huggingface_hub.errors import StrictDataclassError

    from umbrella_train.config.model_types import CONFIG_CLASSES

    if model_type not in CONFIG_CLASSES:
        meant = did_you_mean(model_type, CONFIG_CLASSES.keys(), num=3)
        return [f".model_type: {model_type} is not a model type of transformers{meant}"]
    try:
        config = CONFIG_CLASSES[str(model_type)](
            **{key: value for key, value in section.items() if key != "model_type"}
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        return [f": {' '.join(str(error).split())}"]
    # transformers keeps keys that a model does not have. Those unlike the model's may be of older versions.
    known = {key for key in vars(type(config)()) | config.attribute_map if not key.startswith("_")}
    similar = {key: did_you_mean(key, known, cutoff=0.8) for key in section.keys() - known - {"model_type"}}
    problems = [f".{key}: no such key of {model_type}{text}" for key, text in sorted(similar.items()) if text]
    size, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(size, int) and isinstance(heads, int) and "head_dim" not in section and (heads < 1 or size % heads):
        problems.append(f".hidden_size: {size} is not divisible by num_attention_heads, which is {heads}")
    return problems


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}
