"""Reads YAML without its traps: a key that stands twice is an error, and so is a key that holds a secret."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_SECRET_WORDS = frozenset({"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"})
_KEY_KINDS = frozenset({"api", "access", "private", "auth", "wandb", "hf", "hub", "ssh"})
# `pad_token` and its like name a word of the vocabulary.
_VOCABULARY_TOKENS = frozenset(
    {
        "bos",
        "eos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "image",
        "video",
        "audio",
        "start",
        "end",
        "special",
        "boi",
        "eoi",
    }
)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with duplicate keys refused and listed."""

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
                    self.duplicates.append(f"line {line}: {key} stands here again, first on line {seen[key]}")
                seen.setdefault(key, line)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a YAML file.

    Args:
        path: The file.

    Returns:
        Its content (empty where it cannot be read), and its problems, each with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, ["no such file"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"cannot be read: {error}"]
    return parse_yaml(text)


def parse_yaml(text: str) -> tuple[dict[str, Any], list[str]]:
    """Parse YAML text; see `read_yaml`."""
    loader = _StrictLoader(text)
    try:
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return {}, [f"{where}not YAML: {error.problem}"]
    except yaml.YAMLError as error:
        return {}, [f"not YAML: {error}"]
    finally:
        loader.dispose()
    if content is None:
        content = {}
    if not isinstance(content, dict):
        return {}, [f"holds a {type(content).__name__} where sections (model, data, ...) belong"]
    return content, loader.duplicates


def looks_secret(key: str) -> bool:
    """Tell whether a key names a secret: `api_key`, `hub_token`, `password`; but not `pad_token`, `max_new_tokens`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").lower().split("_")
    if _SECRET_WORDS.intersection(words) or words[-1] in {"apikey", "authtoken"}:
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "key":
        return before in _KEY_KINDS
    return words[-1] == "token" and before not in _VOCABULARY_TOKENS


def remove_secrets(content: Any) -> tuple[Any, list[str]]:
    """Return the content without keys that look like secrets, and a problem for each (which never shows the value)."""
    found = [".".join(map(str, path)) for path in _secret_paths(content, ())]
    advice = "looks like a secret: keys and tokens come from the environment, never a file"
    return _without_secrets(content), [f"{path}: {advice}" for path in found]


def _secret_paths(content: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if looks_secret(str(key)):
                yield (*path, str(key))
            else:
                yield from _secret_paths(value, (*path, str(key)))
    elif isinstance(content, Sequence) and not isinstance(content, str):
        for position, value in enumerate(content):
            yield from _secret_paths(value, (*path, position))


def _without_secrets(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_secrets(value) for key, value in content.items() if not looks_secret(str(key))}
    if isinstance(content, list):
        return [_without_secrets(value) for value in content]
    return content
