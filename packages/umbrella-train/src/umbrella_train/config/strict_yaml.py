"""Reads YAML strictly: duplicate keys are errors. Finds keys that look like secrets."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

SECRET_ADVICE = "looks like a secret: set keys and tokens in the environment, never in a configuration"
# Names without "-" and "_". "pad_token" and similar keys name a word of the vocabulary.
_SECRET = re.compile(
    r"passw|passphrase|secret|credential|^token$|(api|access|private|auth|ssh|hf|hub|wandb|bearer|refresh)(key|token)$"
)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader that lists duplicate keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    self.duplicates.append(f"line {line}: duplicate key {key}, first on line {seen[key]}")
                seen.setdefault(key, line)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a YAML file.

    Args:
        path: The file.

    Returns:
        Its content (empty if it cannot be read), and its problems, each with its line.
    """
    try:
        loader = _StrictLoader(path.read_text(encoding="utf-8"))
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except FileNotFoundError:
        return {}, ["no such file"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"cannot be read: {error}"]
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return {}, [f"{where}not YAML: {error.problem}"]
    except yaml.YAMLError as error:
        return {}, [f"not YAML: {error}"]
    if content is not None and not isinstance(content, dict):
        return {}, [f"contains a {type(content).__name__}; it must contain sections (model, data, ...)"]
    return content or {}, loader.duplicates


def looks_secret(key: str) -> bool:
    """Whether a key names a secret: `api_key`, `hub_token`, `password`; but not `pad_token`, `max_new_tokens`."""
    return _SECRET.search(re.sub("[-_]", "", key).lower()) is not None


def secret_keys(table: Mapping[str, Any]) -> list[str]:
    """Dotted paths of the keys in a nested table that look like secrets."""
    paths = []
    for key, value in table.items():
        if looks_secret(str(key)):
            paths.append(str(key))
        elif isinstance(value, Mapping):
            paths += [f"{key}.{path}" for path in secret_keys(value)]
    return paths
