"""One conversation about scans: the frozen classes, and the strict reading of one canonical manifest row."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from umbrella_data.errors import did_you_mean
from umbrella_data.files.paths import pair_of, sibling_file
from umbrella_data.modality import find_modality

Role = Literal["system", "user", "assistant"]
AnswerType = Literal["choice", "number", "text"]

ROLES = ("system", "user", "assistant")
ANSWER_TYPES = ("choice", "number", "text")
ROW_KEYS = ("id", "subject", "task", "messages", "answer")
# A question that no manifest names still needs a name in a table of results.
DEFAULT_TASK = "question"


@dataclass(frozen=True)
class Scan:
    """A scan as a conversation names it.

    Attributes:
        modality: The canonical name, such as `T1`.
        paths: Absolute files: one, or several ready maps in the order of the modality's channels.
        mask: The absolute file of its brain mask, see `umbrella_data.scan.voxels`; None takes the whole scan.
    """

    modality: str
    paths: tuple[Path, ...]
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it names, the mask last."""
        return self.paths if self.mask is None else (*self.paths, self.mask)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: texts and scans in reading order. Scans are in user turns only."""

    role: Role
    content: tuple[Scan | str, ...]

    @property
    def scans(self) -> tuple[Scan, ...]:
        """The scans of this turn in reading order."""
        return tuple(item for item in self.content if isinstance(item, Scan))

    @property
    def text(self) -> str:
        """The texts of this turn, one a line."""
        return "\n".join(item for item in self.content if isinstance(item, str))


@dataclass(frozen=True)
class Answer:
    """The right answer of a sample that can be scored.

    Attributes:
        type: `choice`, `number` or `text`.
        value: One of `options`, a finite number, or the text.
        options: The choices, in the order of the question; empty for the other types.
        unit: The unit of a number, such as `years`.
    """

    type: AnswerType
    value: str | float
    options: tuple[str, ...] = ()
    unit: str | None = None


@dataclass(frozen=True)
class Sample:
    """One row of a manifest. The last turn is the assistant's."""

    id: str
    subject: str
    task: str
    messages: tuple[Turn, ...]
    answer: Answer | None = None

    @property
    def scans(self) -> tuple[Scan, ...]:
        """All scans in reading order."""
        return tuple(scan for turn in self.messages for scan in turn.scans)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modality of each scan in reading order."""
        return tuple(scan.modality for scan in self.scans)


def scan_items(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The image items of a canonical row in reading order, unchecked."""
    for message in row["messages"]:
        if not isinstance(message["content"], str):
            yield from (item for item in message["content"] if item["type"] == "image")


def parse_row(row: object, *, root: Path) -> tuple[Sample | None, list[str]]:
    """Read one canonical row.

    Args:
        row: The decoded JSON value of the row.
        root: Resolved folder that all paths are relative to, and may not leave.

    Returns:
        The sample, or None where there are problems, and one sentence for each problem.
    """
    if not isinstance(row, Mapping):
        return None, [f"a row must be an object, not {type(row).__name__}"]
    problems: list[str] = list(_misspelt_keys(row))
    texts = {key: _text(row, key, problems) for key in ("id", "subject")}
    task = _text(row, "task", problems) if "task" in row else DEFAULT_TASK
    messages = _messages(row.get("messages"), root=root, problems=problems)
    answer = _answer(row["answer"], problems) if row.get("answer") is not None else None
    if problems:
        return None, problems
    return Sample(id=texts["id"], subject=texts["subject"], task=task, messages=messages, answer=answer), []


def parse_turns(row: object) -> tuple[tuple[Turn, ...], list[str]]:
    """Read the conversation of a canonical row and look at no path: its scans have none.

    Returns:
        The turns, and one sentence for each problem.
    """
    problems: list[str] = []
    messages = row.get("messages") if isinstance(row, Mapping) else None
    return _messages(messages, root=None, problems=problems), problems


def resolve_inside(text: str, *, root: Path) -> Path:
    """Resolve a manifest's path under its root.

    Args:
        text: A relative path with forward slashes.
        root: Resolved folder that the path, symbolic links followed, may not leave.

    Raises:
        ValueError: For an absolute path, `..`, odd bytes, or a link that leads out of the root.
    """
    if not text or text != text.strip() or not text.isprintable() or "\\" in text:
        raise ValueError(f"path {text!r} is empty or has blanks at its ends, control characters or backslashes")
    if text.startswith(("/", "~")) or (len(text) > 1 and text[1] == ":"):
        raise ValueError(f"path {text!r} is absolute; write it relative to {root}, or give the data_root that has it")
    if ".." in text.split("/"):
        raise ValueError(f"path {text!r} has '..'; paths may not leave {root}")
    return _checked_inside(root / text, text, root=root)


def resolve_scan(texts: Sequence[str], *, modality: str, root: Path) -> tuple[Path, ...]:
    """Resolve the files of one scan under their root, as `resolve_inside`, and hold what is read next to them to it.

    Args:
        texts: Relative paths: one, or the maps of the scan.
        modality: Its canonical name.
        root: Resolved folder that no file may leave.

    Raises:
        ValueError: As `resolve_inside`; also for the gradients of a DWI, and the sidecar of a series.
    """
    paths = tuple(_resolve_file(text, root=root) for text in texts)
    spec = find_modality(modality)
    is_dwi = spec.num_channels > 1 and len(paths) == 1
    for ending in (".bval", ".bvec") if is_dwi else (".json",) if spec.is_series else ():
        beside = sibling_file(paths[0], ending)
        _checked_inside(beside, beside.relative_to(root).as_posix(), root=root)
    return paths


def _checked_inside(path: Path, text: str, *, root: Path) -> Path:
    base, real = os.fspath(root), os.path.realpath(path)
    # Texts are compared, and no paths: this is done for every scan that is read.
    if real != base and not real.startswith(base.rstrip(os.sep) + os.sep):
        raise ValueError(f"path {text!r} is a link that leads out of {root}; copy the file, or give a data_root "
                         "that has both (--data-root)")  # fmt: skip
    return path


def _misspelt_keys(row: Mapping[str, Any]) -> Iterator[str]:
    # Keys of the user's own are welcome; a misspelt `answer` would leave the sample unscored without a word.
    for key in row.keys() - set(ROW_KEYS):
        if meant := did_you_mean(key, ROW_KEYS, cutoff=0.8):
            yield f"unknown key {key!r}{meant}"


def _text(row: Mapping[str, Any], key: str, problems: list[str]) -> str:
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return value
    found = "is missing" if key not in row else f"is {value!r}"
    problems.append(f"{key!r} {found}; it must be a text that is not empty, in quotes")
    return ""


def _messages(value: object, *, root: Path | None, problems: list[str]) -> tuple[Turn, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        problems.append("'messages' must be a list of turns, the last one the assistant's")
        return ()
    turns = [_turn(message, root=root, where=f"messages[{i}]", problems=problems) for i, message in enumerate(value)]
    roles = [turn.role for turn in turns if turn is not None]
    if len(roles) == len(turns):
        spoken = roles[1:] if roles[0] == "system" else roles
        right = ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]
        if not spoken or spoken != right or spoken[-1] != "assistant":
            problems.append(f"roles are {', '.join(roles)}; after an optional system turn they must alternate, "
                            "user first and assistant last")  # fmt: skip
    return tuple(turn for turn in turns if turn is not None)


def _turn(message: object, *, root: Path | None, where: str, problems: list[str]) -> Turn | None:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        problems.append(f"{where} must be an object with a role of {', '.join(ROLES)}")
        return None
    role = cast("Role", message["role"])
    content = message.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, Sequence) or not items:
        problems.append(f"{where}.content must be a text, or a list of items of type image or text")
        return None
    parsed: list[Scan | str] = []
    for i, item in enumerate(items):
        try:
            parsed.append(_item(item, root=root))
        except ValueError as error:
            problems.append(f"{where}.content[{i}]: {error}")
    turn = Turn(role=role, content=tuple(parsed))
    if turn.scans and role != "user":
        problems.append(f"{where}: a scan is in the {role}'s turn; scans belong to user turns")
    if role == "assistant" and not turn.text.strip():
        problems.append(f"{where}: the assistant says nothing; an answer needs words")
    return turn


def _item(item: object, *, root: Path | None) -> Scan | str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or kind not in ("image", "text"):
        raise ValueError(f"an item must be an object of type image or text, not {item!r:.80}")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise ValueError(f"'text' must be a text, not {item.get('text')!r:.80}")
        return cast("str", item["text"])
    modality, path = item.get("modality"), item.get("path")
    if not isinstance(modality, str):
        raise ValueError(f"an image needs its 'modality' declared, not {modality!r:.80}")
    paths = [path] if isinstance(path, str) else path
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(part, str) for part in paths):
        raise ValueError(f"an image needs a 'path', or a list of ready maps, not {path!r:.80}")
    name = find_modality(modality).name
    mask = item.get("mask")
    if mask is not None and not isinstance(mask, str):
        raise ValueError(f"'mask' must be the path of a brain mask, not {mask!r:.80}")
    if root is None:
        return Scan(modality=name, paths=())
    return Scan(
        modality=name,
        paths=resolve_scan(paths, modality=name, root=root),
        mask=None if mask is None else _resolve_file(mask, root=root),
    )


def _resolve_file(text: str, *, root: Path) -> Path:
    # Of a pair, neither file may leave the root; it goes by the name of its voxels.
    *_, path = [resolve_inside(part, root=root) for part in pair_of(text) or (text,)]
    return path


def _answer(value: object, problems: list[str]) -> Answer | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or kind not in ANSWER_TYPES:
        problems.append(f"'answer' must be an object with a type of {', '.join(ANSWER_TYPES)}")
        return None
    right = value.get("value")
    if kind == "number":
        return _number(right, value.get("unit"), problems)
    if not isinstance(right, str) or not right.strip():
        problems.append(f"answer.value is {right!r}; it must be a text that is not empty")
        return None
    return Answer(type="text", value=right) if kind == "text" else _choice(right, value.get("options"), problems)


def _number(right: object, unit: object, problems: list[str]) -> Answer | None:
    if isinstance(right, bool) or not isinstance(right, int | float) or not math.isfinite(right):
        problems.append(f"answer.value is {right!r}; a number must be finite, and not in quotes")
        return None
    if unit is not None and not isinstance(unit, str):
        problems.append(f"answer.unit is {unit!r}; write it as a text, such as 'years'")
        return None
    return Answer(type="number", value=float(right), unit=unit)


def _choice(right: str, options: object, problems: list[str]) -> Answer | None:
    is_list = isinstance(options, Sequence) and not isinstance(options, str)
    names = tuple(cast("Sequence[Any]", options)) if is_list else ()
    if len(names) < 2 or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
        problems.append(f"answer.options is {options!r:.80}; a choice needs two or more different texts")
        return None
    if right not in names:
        problems.append(f"answer.value {right!r} is none of its options: {', '.join(names)}")
        return None
    return Answer(type="choice", value=right, options=names)
