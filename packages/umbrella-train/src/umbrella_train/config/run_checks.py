"""What only a run that is about to start can be held against: the installed transformers, this disk, this launch.

A configuration is read for other reasons too (help, a finished run's evaluation), where none of this matters.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_problems(content: Mapping[str, Any]) -> list[str]:
    """Say what would keep this configuration from starting here and now.

    Args:
        content: The raw content, overrides laid over it; what the schema refuses in it is passed over.

    Returns:
        One sentence a problem, each with its dotted path.
    """
    model = _table(content, "model")
    problems = []
    for name in ("vision_config", "text_config"):
        problems += [f"model.{name}{text}" for text in _hf_config_problems(_table(model, name))]
    for key in ("pretrained", "tokenizer"):
        source = model.get(key)
        if isinstance(source, str) and is_path_like(source) and not Path(source).expanduser().exists():
            problems.append(f"model.{key}: there is no {source}: neither a folder here nor a name on the hub")
    return problems + _world_size_problems(_table(content, "trainer").get("world_size"))


def is_path_like(name: str) -> bool:
    """Tell a folder from a name on the hub, which is `name` or `owner/name`."""
    return name[:1] in (".", "/", "~") or name.count("/") > 1 or name.endswith("/") or "\\" in name


def world_size_problem(expected: int | None) -> str | None:
    """Compare the number of processes that a run is meant for with the one that was launched."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is None or expected == launched:
        return None
    return (
        f"trainer.world_size is {expected}, but the number of processes launched is {launched}; "
        f"start it with: torchrun --nproc-per-node {expected} -m umbrella_train ..."
    )


def _world_size_problems(expected: Any) -> list[str]:
    # From the command line it is text still.
    number = int(expected) if str(expected).isdecimal() else None
    problem = world_size_problem(number)
    return [] if problem is None else [problem]


def _hf_config_problems(section: Mapping[str, Any]) -> list[str]:
    """Problems of a Hugging Face config, each with the rest of its path in front."""
    model_type = section.get("model_type")
    if model_type is None:
        return []  # the schema says so
    # Late: these take seconds.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        return [f".model_type: transformers knows no {model_type}{meant}"]
    try:
        config = CONFIG_MAPPING[str(model_type)](
            **{key: value for key, value in section.items() if key != "model_type"}
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        return [f": {' '.join(str(error).split())}"]
    size, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(size, int) and isinstance(heads, int) and "head_dim" not in section and (heads < 1 or size % heads):
        return [f".hidden_size: {size} is not divisible by num_attention_heads, which is {heads}"]
    return []


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}
