"""The words about a side, left, right or bilateral, that a text mentions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from umbrella_train.errors import RunError

SIDES = ("left", "right", "bilateral")
_IGNORED = "ignored"


@dataclass(frozen=True)
class Lexicon:
    """Words and phrases of each side.

    Attributes:
        entries: Side of each word or phrase, in lower case with single blanks; `ignored` for those that do not count.
    """

    entries: Mapping[str, str]

    def sides(self, text: str) -> set[str]:
        """The sides that a text mentions, by whole words; a phrase counts before the words that it contains."""
        folded = _fold(text)
        return {self.entries[match[0]] for match in self._pattern.finditer(folded)} - {_IGNORED}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.entries, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def read_lexicon(path: Path) -> Lexicon:
    """Read the words of each side from a YAML file.

    Args:
        path: A list of words or phrases under each of `left`, `right` and `bilateral`, and optionally under `ignored`.

    Raises:
        RunError: If it cannot be read, or has other content; with all problems of the file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}; check report.laterality_lexicon") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    problems, entries = _entries(content)
    if problems:
        raise RunError("\n".join(f"{path}: {problem}" for problem in problems))
    return Lexicon(entries)


@cache
def packaged_lexicon() -> Lexicon:
    """The English words that come with this package."""
    return read_lexicon(Path(str(files("umbrella_train") / "lexicons" / "laterality.yaml")))


def _entries(content: Any) -> tuple[Sequence[str], Mapping[str, str]]:
    keys = (*SIDES, _IGNORED)
    if not isinstance(content, Mapping):
        return [f"must have the keys {', '.join(SIDES)}, each with a list of words"], {}
    problems = [f"{key}: no such key; use {', '.join(keys)}" for key in content if key not in keys]
    problems += [f"{side}: is missing; list its words" for side in SIDES if not content.get(side)]
    entries: dict[str, str] = {}
    for key in keys:
        words = content.get(key) or []
        if not isinstance(words, list):
            problems.append(f"{key}: must be a list of words")
            continue
        for word in words:
            folded = _fold(word) if isinstance(word, str) else ""
            if not folded:
                problems.append(f"{key}: {word!r} is not a word; put it in quotes")
            elif entries.setdefault(folded, key) != key:
                problems.append(f"{key}: {word!r} is listed under {entries[folded]} too")
    return problems, entries


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
