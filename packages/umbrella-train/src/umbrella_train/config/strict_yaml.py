"""Reads YAML strictly: duplicate keys are errors. Finds keys that look like secrets."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

# Aliases of aliases make a file of a few lines unfold to billions of values. A run's config has a few hundred.
MAX_SIZE = 100_000

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

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # such as the date 2024-13-45
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"a value cannot be read as {kind} ({error})",
                                                    node.start_mark) from error  # fmt: skip

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable):
                if key in seen:
                    self.duplicates.append(f"line {line}: duplicate key {key}, first on line {seen[key]}")
                seen.setdefault(key, line)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The content of a YAML file (empty if it cannot be read), and its problems, each with its line."""
    try:
        content, problems = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ["no such file"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"cannot be read: {error}"]
    if content is not None and not isinstance(content, dict):
        return {}, [f"contains a {type(content).__name__}; it must contain sections (model, data, ...)"]
    return content or {}, problems


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The content of YAML (None if it cannot be read), and its problems."""
    loader = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        if _size(node, {}) > MAX_SIZE:
            return None, [f"has more than {MAX_SIZE:,} values, or texts as long, those of its aliases (*name) counted "
                          "each time: write fewer aliases"]  # fmt: skip
        return loader.construct_document(node), loader.duplicates
    except RecursionError:
        return None, ["is nested too deeply: a value contains itself by an alias (*name), or brackets are not closed"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        return None, [f"{where}not YAML: {getattr(error, 'problem', None) or error}"]
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node with its aliases written out, of up to 64 characters each; a node is counted once."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) // 64
    if id(node) not in known:
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


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
