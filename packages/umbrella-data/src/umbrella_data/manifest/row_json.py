"""Decoding the JSON of manifests strictly: what JSON readers repair or drop silently is an error here."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

from umbrella_data.files.look_alikes import describe_look_alike

TOO_DEEP = "lists or objects are nested too deeply; a row needs about 5 levels"

_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def check_start(start: bytes) -> None:
    """Reject a manifest whose first `START_BYTES` bytes are not JSON in UTF-8.

    Raises:
        ValueError: For UTF-16 or UTF-32, and for other kinds of files, such as a pointer of Git LFS.
    """
    # JSON has no NUL, but most characters of UTF-16 do.
    if start.startswith(_UTF_16_MARKS) or b"\0" in start:
        raise ValueError("line 1: the file is UTF-16, or has NUL bytes; save it as UTF-8")
    is_json = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    if start and not is_json and (look_alike := describe_look_alike(start)):
        raise ValueError(f"line 1: the file {look_alike}")


def decode_text(content: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"byte {error.start + 1} (0x{byte:02x}) is not UTF-8; save the manifest as UTF-8") from error


def decode_row(content: bytes) -> Any:
    """Decode the JSON value of a row.

    Raises:
        ValueError: For bytes that are not UTF-8, invalid JSON, NaN and infinity, a key that an object has twice, half
            of a surrogate pair, and nesting that is too deep.
    """
    text = decode_text(content)
    try:
        value = _DECODER.decode(text)
        # In UTF-8, surrogates can only be escaped.
        if "\\ud" in text or "\\uD" in text:
            _check_surrogates(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    return value


def _check_surrogates(value: Any) -> None:
    written = json.dumps(value, ensure_ascii=False)
    if half := _SURROGATE.search(written):
        near = written[max(half.start() - 20, 0) : half.end()]
        raise ValueError(f"half of a surrogate pair, which is no character, in {near!r}; write the whole character")


def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object for `json`, which keeps the last one of equal keys: an answer or a path would silently get lost.

    Raises:
        ValueError: If it has a key twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"an object has the key {', '.join(map(repr, twice))} more than once; keep one")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON; remove the key if there is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=to_object, parse_constant=_reject_constant)
