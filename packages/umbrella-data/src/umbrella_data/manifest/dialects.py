"""Adapters for rows of other dialects (LLaVA, UMBRELLA JSON, Hugging Face): each returns a canonical row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from umbrella_data.manifest.row_json import decode_row
from umbrella_data.modality import MODALITIES, find_modality

Row = Mapping[str, Any]
Adapter = Callable[[Row], dict[str, Any]]

IMAGE_PLACEHOLDER = re.compile(r"<image(?:_(\w+))?>")
"""The place of a scan in a text: `<image>`, or `<image_sMRI>` in the first version of UMBRELLA JSON."""

IMAGE_TOKEN = re.compile(r"<\|?image(?:_\w+)?\|?>")
"""What marks a scan in a text, of any dialect or of a tokenizer, such as `<|image_pad|>`."""

_BIDS_SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_])")
_BIDS_SUFFIX = re.compile(r"_([A-Za-z0-9]+)\.(?:nii|hdr|img)(?:\.gz)?$")
# Shown in the error message about an unknown dialect.
_EXAMPLE_ROWS = (
    '{"id": ..., "subject": ..., "messages": [{"role": "user", "content": [{"type": "image", "modality": "T1", '
    '"path": ...}, {"type": "text", "text": ...}]}, {"role": "assistant", "content": ...}]} or {"image": ..., '
    '"modality": "T1", "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value": ...}]}'
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def to_canonical(row: Any, *, root: Path) -> Any:
    """Convert a row of any known dialect, recognised by its keys; a canonical row is returned unchanged.

    Args:
        row: The decoded JSON value of the row.
        root: The data root. Absolute paths of other dialects that are inside of it are made relative.

    Raises:
        ValueError: If the dialect is unknown, or the scans do not match the placeholders in the text.
    """
    if not isinstance(row, Mapping):
        return row  # rejected by the validation
    adapter = _find_adapter(row)
    if adapter is None:
        return row
    canonical = adapter(row)
    for item in _images(canonical):
        item |= {key: _relative(item[key], root=root) for key in ("path", "mask") if key in item}
    return canonical


def _find_adapter(row: Row) -> Adapter | None:
    turns = row.get("conversations", row.get("conversation"))
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        return from_llava if "from" in turns[0] else from_umbrella
    if "messages" not in row:
        raise ValueError(f"the row's keys ({', '.join(map(str, row))}) are of no known dialect; it needs 'messages' "
                         f"or 'conversations', as in {_EXAMPLE_ROWS}")  # fmt: skip
    return from_hugging_face if "images" in row else None


def from_llava(row: Row) -> dict[str, Any]:
    """LLaVA: `conversations` with `from` and `value`; `image` with a `modality`, or `modality_paths`.

    `modality_paths` maps a modality to a path or a list of paths: the maps of one scan if the modality has several
    channels, several scans otherwise.
    """
    turns = [{"role": turn.get("from"), "content": turn.get("value")} for turn in _turns(row, "conversations")]
    scans: list[dict[str, Any]] = []
    for name, paths in _expect(row, "modality_paths", (Mapping,), "an object from modality to path").items():
        is_one = isinstance(paths, str) or find_modality(name).num_channels > 1
        if not is_one and not isinstance(paths, list):
            raise ValueError(f"modality_paths of {name} must be a path or a list of paths, not {paths!r:.60}")
        scans += [{"modality": name, "path": path} for path in ([paths] if is_one else paths)]
    images = "image" if row.get("image") is not None else "images"
    return _assemble(row, turns, [*scans, *_listed_scans(row, images)])


def from_umbrella(row: Row) -> dict[str, Any]:
    """UMBRELLA JSON: `conversations` with `role` and `content`; image items have `modality` and `image_path`."""
    turns = _turns(row, "conversations" if "conversations" in row else "conversation")
    items = [item for turn in turns if isinstance(turn.get("content"), list) for item in turn["content"]]
    # `images` repeats the files of image items: it is needed only if the turns are plain texts.
    has_files = any(isinstance(item, Mapping) and "image_path" in item for item in items)
    return _assemble(row, turns, [] if has_files else _listed_scans(row, "images"))


def from_hugging_face(row: Row) -> dict[str, Any]:
    """Hugging Face: `messages` with image placeholders, and `images` with their files, in order.

    The answer may be a JSON string, as `to_hf_dataset` writes it: an Arrow column has one type.
    """
    answer = row.get("answer")
    if isinstance(answer, str):
        row = {**row, "answer": decode_row(answer.encode("utf-8"))}
    scans = _listed_scans(row, "images")
    masks = _expect(row, "masks", (list,), "a list with the path of a brain mask, or null, for each image") or []
    if masks and len(masks) != len(scans):
        raise ValueError(f"{len(scans)} images, but {len(masks)} masks; give a path or null for each image")
    for scan, mask in zip(scans, masks, strict=False):
        if mask is not None:
            scan["mask"] = mask
    return _assemble(row, _turns(row, "messages"), scans)


def _turns(row: Row, key: str) -> list[Row]:
    turns = row[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{key!r} must be a list of turns, each an object, the last one the assistant's")
    return turns


def _listed_scans(row: Row, key: str) -> list[dict[str, Any]]:
    """Scans of a list of files; the modality of each is declared for it or for all, or is that of its BIDS suffix."""
    images = _expect(row, key, (str, Mapping, list), "a path, or a list of paths")
    listed = images if isinstance(images, list) else [images] if images else []
    declared = "modality" if row.get("modality") is not None else "modalities"
    names = _expect(row, declared, (str, list), "a name, or a list of names")
    if not isinstance(names, list) or not names:
        names = [names or None] * len(listed)
    if len(names) != len(listed):
        raise ValueError(f"{len(listed)} images, but {len(names)} modalities; give one for each image, or one for all")
    scans = []
    for image, name in zip(listed, names, strict=True):
        path = image.get("path", image.get("image_path")) if isinstance(image, Mapping) else image
        if not isinstance(path, str | list) or not path:
            raise ValueError(f"an image without a path ({image!r:.60}); give the path of a file")
        own = image.get("modality") if isinstance(image, Mapping) else None
        scans.append({"modality": own or name or _modality_of_name(path), "path": path})
    return scans


def _expect(row: Row, key: str, types: tuple[type, ...], expected: str) -> Any:
    """The value of a key; an empty one if it is missing or null."""
    value = row.get(key)
    if value is not None and not isinstance(value, types):
        raise ValueError(f"{key!r} must be {expected}, not {value!r:.60}")
    return value if value is not None else {} if types[0] is Mapping else ""


def _modality_of_name(path: Any) -> str:
    match = _BIDS_SUFFIX.search(path) if isinstance(path, str) else None
    for spec in MODALITIES.values():
        if match and match[1] in spec.bids_suffixes:
            return spec.name
    raise ValueError(f"the modality of {path!r} is unknown; add 'modality' to the row, or use a BIDS suffix")


def _assemble(row: Row, turns: Sequence[Row], scans: list[dict[str, Any]]) -> dict[str, Any]:
    """A canonical row, with the scans in the places that the turns have for them."""
    messages: list[dict[str, Any]] = [
        {"role": _ROLES.get(str(turn.get("role")), turn.get("role")), "content": list(_split(turn.get("content")))}
        for turn in turns
    ]
    _place_scans(messages, scans)
    canonical = {"messages": messages, "subject": _subject(row, messages)}
    task = row.get("task") or _metadata(row).get("task") or row.get("task_type")
    canonical |= {"task": task} if task is not None else {}
    canonical |= {"answer": row["answer"]} if row.get("answer") is not None else {}
    return {"id": row.get("id", row.get("task_id", _fingerprint(canonical))), **canonical}


def _place_scans(messages: list[dict[str, Any]], scans: list[dict[str, Any]]) -> None:
    places = [item for message in messages for item in message["content"] if item.get("type") == "place"]
    if scans and not places:
        # As in LLaVA, a conversation without placeholders starts with its images.
        places = [{} for _ in scans]
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [*places, *first["content"]]
    if len(places) != len(scans):
        raise ValueError(f"the text has {len(places)} image placeholders, but the row has {len(scans)} scans")
    for place, scan in zip(places, scans, strict=True):
        wanted, given = place.get("modality"), scan["modality"]
        if not isinstance(given, str) or not isinstance(wanted, str | None):
            raise ValueError(f"a modality must be a name, not {given!r:.60} or {wanted!r:.60}")
        if wanted and find_modality(wanted) is not find_modality(given):
            raise ValueError(f"a placeholder for {wanted}, but the scan {scan['path']!r} is {given}")
        place.clear()
        place.update(type="image", **scan)


def _split(content: Any) -> Iterator[dict[str, Any]]:
    """The items of a turn; placeholders within texts become items of type `place`."""
    if not isinstance(content, str | list):
        raise ValueError(f"the content of a turn must be a text or a list of items, not {content!r:.60}")
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or not isinstance(kind, str):
            yield {"type": None, "text": item}  # rejected by the validation
        elif kind.startswith("image"):
            modality = item.get("modality") or kind.removeprefix("image").lstrip("_") or None
            path = item.get("image_path", item.get("path"))
            mask = {"mask": item["mask"]} if path and item.get("mask") is not None else {}
            yield {"type": "image" if path else "place", "modality": modality, "path": path, **mask}
        elif isinstance(item.get("text"), str):
            parts = IMAGE_PLACEHOLDER.split(item["text"])
            for i, part in enumerate(parts):
                if i % 2 == 1:
                    yield {"type": "place", "modality": part}
                elif part.strip():
                    yield {"type": "text", "text": part.strip()}
        else:
            yield dict(item)


def _subject(row: Row, messages: Sequence[Row]) -> Any:
    """The subject of the row; by default that of the scan's BIDS path, or else the scan's file name."""
    for source in (row, _metadata(row)):
        for key in ("subject", "subject_id", "participant_id"):
            if source.get(key) is not None:
                return source[key]
    for item in _images({"messages": messages}):
        path = str(item["path"][0] if isinstance(item["path"], list) and item["path"] else item["path"])
        match = _BIDS_SUBJECT.search(path)
        return match[1] if match else PurePosixPath(path).name.split(".")[0]
    return row.get("id", row.get("task_id"))


def _metadata(row: Row) -> Row:
    metadata = row.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


def _images(row: Row) -> Iterator[dict[str, Any]]:
    return (item for message in row["messages"] for item in message["content"] if item.get("type") == "image")


def _relative(path: Any, *, root: Path) -> Any:
    if isinstance(path, list):
        return [_relative(part, root=root) for part in path]
    if isinstance(path, str) and path.startswith(f"{root}/"):
        return path.removeprefix(f"{root}/")
    return path


def _fingerprint(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode("utf-8")).hexdigest()[:16]
