"""Validation of manifest rows: a canonical row becomes a `Sample`, or a list of all its problems."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from umbrella_data.errors import did_you_mean
from umbrella_data.manifest.answers import normalise
from umbrella_data.manifest.dialects import IMAGE_TOKEN
from umbrella_data.manifest.path_safety import resolve_file, resolve_scan
from umbrella_data.manifest.sample import ANSWER_TYPES, ROLES, Answer, Role, Sample, Scan, Turn
from umbrella_data.modality import find_modality

ROW_KEYS = ("id", "subject", "task", "messages", "answer")
_TURN_KEYS = ("role", "content")
_TEXT_KEYS = ("type", "text")
_IMAGE_KEYS = ("type", "modality", "path", "mask")
# Rows without a `task` are listed under this name in tables of results.
DEFAULT_TASK = "question"

# From modality, paths and path of the mask to a scan; raises ValueError.
ResolveScan = Callable[[str, Sequence[str], str | None], Scan]


def parse_row(row: object, *, root: Path, may_end_with_user: bool = False) -> tuple[Sample | None, list[str]]:
    """Validate one canonical row.

    Args:
        row: The decoded JSON value of the row.
        root: The data root, resolved; all paths are relative to it and must be inside of it.
        may_end_with_user: Whether the last answer may be missing, as in a row to generate an answer for.

    Returns:
        The sample, or None if there are problems, and a message for each problem.
    """
    if not isinstance(row, Mapping):
        return None, [f"a row must be an object, not {type(row).__name__}"]
    problems: list[str] = list(_misspelt_keys(row))
    texts = {key: _text(row, key, problems) for key in ("id", "subject")}
    task = _text(row, "task", problems) if "task" in row else DEFAULT_TASK

    def resolve(modality: str, paths: Sequence[str], mask: str | None) -> Scan:
        own_mask = None if mask is None else resolve_file(mask, root=root)
        return Scan(modality, resolve_scan(paths, modality=modality, root=root), mask=own_mask)

    messages, found = parse_turns(row.get("messages"), resolve=resolve, may_end_with_user=may_end_with_user)
    problems += found
    answer = _answer(row["answer"], problems) if row.get("answer") is not None else None
    if problems:
        return None, problems
    return Sample(id=texts["id"], subject=texts["subject"], task=task, messages=messages, answer=answer), []


def _without_paths(modality: str, _paths: Sequence[str], _mask: str | None) -> Scan:
    return Scan(modality, ())


def parse_turns(
    messages: object,
    *,
    resolve: ResolveScan = _without_paths,
    may_end_with_user: bool = False,
) -> tuple[tuple[Turn, ...], list[str]]:
    """Validate a conversation.

    Args:
        messages: Turns as in a canonical row.
        resolve: Resolves the paths of scans; by default they are left out.
        may_end_with_user: Whether the last answer may be missing, as in a prompt.

    Returns:
        The turns, and a message for each problem.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return (), ["'messages' must be a list of turns"]
    problems: list[str] = []
    parsed = [_turn(turn, resolve, where=f"messages[{i}]", problems=problems) for i, turn in enumerate(messages)]
    turns = tuple(turn for turn in parsed if turn is not None)
    roles = [turn.role for turn in turns]
    if len(turns) == len(parsed):
        dialogue = roles[1:] if roles[0] == "system" else roles
        expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(dialogue))]
        if not dialogue or dialogue != expected or (dialogue[-1] == "user" and not may_end_with_user):
            problems.append(f"roles are {', '.join(roles)}; after an optional system turn, user and assistant must "
                            f"alternate, user first{'' if may_end_with_user else ' and assistant last'}")  # fmt: skip
    return turns, problems


def scan_items(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The image items of a canonical row in reading order; the row is not validated."""
    for message in row["messages"]:
        if not isinstance(message["content"], str):
            yield from (item for item in message["content"] if item["type"] == "image")


def _misspelt_keys(row: Mapping[str, Any]) -> Iterator[str]:
    # Users may add keys; but a misspelt `answer` would silently leave the sample unscored.
    for key in row.keys() - set(ROW_KEYS):
        if meant := did_you_mean(key, ROW_KEYS, cutoff=0.8):
            yield f"unknown key {key!r}{meant}"


def _unknown_keys(table: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """A key that is not read could change what is learned: a misspelt mask, a turn's `reasoning_content`."""
    return [
        f"unknown key {key!r}{did_you_mean(str(key), known) or '; it has ' + ', '.join(known)}"
        for key, value in table.items()
        if key not in known and value is not None  # exports of tables fill in nulls
    ]


def _text(row: Mapping[str, Any], key: str, problems: list[str]) -> str:
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value
    found = "is missing" if key not in row else f"is {value!r}"
    problems.append(f"{key!r} {found}; it must be a text in quotes that is not empty")
    return ""


def _turn(message: object, resolve: ResolveScan, *, where: str, problems: list[str]) -> Turn | None:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        problems.append(f"{where} must be an object with a role of {', '.join(ROLES)}")
        return None
    role = cast("Role", message["role"])
    problems += [f"{where}: {problem}" for problem in _unknown_keys(message, _TURN_KEYS)]
    content = message.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, Sequence) or not items:
        problems.append(f"{where}.content must be a text, or a list of items of type image or text")
        return None
    parsed: list[Scan | str] = []
    for i, item in enumerate(items):
        try:
            parsed.append(_item(item, resolve))
        except ValueError as error:
            problems.append(f"{where}.content[{i}]: {error}")
    turn = Turn(role=role, content=tuple(parsed))
    if turn.scans and role != "user":
        problems.append(f"{where}: a scan in the {role}'s turn; move it to a user turn")
    if role == "assistant" and not turn.text.strip() and len(parsed) == len(items):
        problems.append(f"{where}: the assistant's turn has no text; write an answer")
    return turn


def _item(item: object, resolve: ResolveScan) -> Scan | str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or kind not in ("image", "text"):
        raise ValueError(f"an item must be an object of type image or text, not {item!r:.80}")
    if unknown := _unknown_keys(item, _TEXT_KEYS if kind == "text" else _IMAGE_KEYS):
        raise ValueError("; ".join(unknown))
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise ValueError(f"'text' must be a text, not {item.get('text')!r:.80}")
        # A model would learn it as words, or a tokenizer would take it for a scan.
        if "image" in item["text"] and (token := IMAGE_TOKEN.search(item["text"])):
            raise ValueError(f"a text contains {token[0]!r}, which marks a scan; remove it, and give each scan as an "
                             "item of type image")  # fmt: skip
        return cast("str", item["text"])
    modality, path = item.get("modality"), item.get("path")
    if not isinstance(modality, str):
        raise ValueError(f"an image needs a 'modality', such as 'T1', not {modality!r:.80}")
    paths = [path] if isinstance(path, str | Path) else path
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(part, str | Path) for part in paths):
        raise ValueError(f"an image needs a 'path', or a list of the paths of its maps, not {path!r:.80}")
    name = find_modality(modality).name
    mask = item.get("mask")
    if mask is not None and not isinstance(mask, str | Path):
        raise ValueError(f"'mask' must be the path of a brain mask, not {mask!r:.80}")
    return resolve(name, [str(part) for part in paths], None if mask is None else str(mask))


def _answer(value: object, problems: list[str]) -> Answer | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or kind not in ANSWER_TYPES:
        problems.append(f"'answer' must be an object with a type of {', '.join(ANSWER_TYPES)}")
        return None
    answer = value.get("value")
    if kind == "number":
        return _number(answer, value.get("unit"), problems)
    if not isinstance(answer, str) or not answer.strip():
        problems.append(f"answer.value is {answer!r}; it must be a text that is not empty")
        return None
    return Answer(type="text", value=answer) if kind == "text" else _choice(answer, value.get("options"), problems)


def _number(value: object, unit: object, problems: list[str]) -> Answer | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Comparing rejects NaN, and whole numbers that are too large for a float.
    if not is_number or not abs(cast("float", value)) <= sys.float_info.max:
        problems.append(f"answer.value is {value!r:.80}; a number must be finite and not in quotes")
        return None
    if unit is not None and not isinstance(unit, str):
        problems.append(f"answer.unit is {unit!r}; write it as a text, such as 'years'")
        return None
    return Answer(type="number", value=float(cast("float", value)), unit=unit)


def _choice(value: str, options: object, problems: list[str]) -> Answer | None:
    is_list = isinstance(options, Sequence) and not isinstance(options, str)
    names = tuple(cast("Sequence[Any]", options)) if is_list else ()
    if len(names) < 2 or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
        problems.append(f"answer.options is {options!r:.80}; a choice needs at least two different texts")
        return None
    if len({normalise(name) for name in names}) < len(names):
        problems.append(f"answer.options is {options!r:.80}; some are the same answer: case, blanks and full stops "
                        "do not count; keep one spelling of each")  # fmt: skip
        return None
    if value not in names:
        problems.append(f"answer.value {value!r} is not one of its options: {', '.join(names)}")
        return None
    return Answer(type="choice", value=value, options=names)
