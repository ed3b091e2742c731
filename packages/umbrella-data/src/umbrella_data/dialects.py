"""Foreign manifest rows: one adapter function a dialect turns them into the canonical form, which is then checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from umbrella_data.modality import MODALITIES, find_modality

Row = Mapping[str, Any]
Adapter = Callable[[Row], dict[str, Any]]

# Where a scan stands in a text: `<image>`, or `<image_sMRI>` in the first version of UMBRELLA JSON.
_MARK = re.compile(r"<image(?:_(\w+))?>")
_BIDS_SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_])")
_BIDS_SUFFIX = re.compile(r"_([A-Za-z0-9]+)\.nii(?:\.gz)?$")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def to_canonical(row: Any, *, root: Path) -> Any:
    """Turn a row of any known dialect, told by its keys, into a canonical one; that one is returned as it is.

    Args:
        row: The decoded JSON value of the row.
        root: The folder that paths are relative to. Absolute paths of foreign rows that lie in it are made relative.

    Raises:
        ValueError: If the row belongs to no dialect, or scans and their places in the text do not agree.
    """
    if not isinstance(row, Mapping):
        return row  # the strict reading says what is wrong
    adapter = _find_adapter(row)
    if adapter is None:
        return row
    canonical = adapter(row)
    for item in _images(canonical):
        item["path"] = _relative(item["path"], root=root)
    return canonical


def _find_adapter(row: Row) -> Adapter | None:
    turns = row.get("conversations", row.get("conversation"))
    if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping):
        return from_llava if "from" in turns[0] else from_umbrella
    if "messages" not in row:
        raise ValueError(f"the row's keys ({', '.join(map(str, row))}) belong to no known dialect; it needs "
                         "'messages' or 'conversations'")  # fmt: skip
    return from_hugging_face if "images" in row else None


def from_llava(row: Row) -> dict[str, Any]:
    """LLaVA: `conversations` of `from` and `value`; `image` with a `modality`, or `modality_paths`.

    `modality_paths` maps a modality to its file, or to a list: ready maps for a modality of several channels, several
    scans for the others.
    """
    turns = [{"role": turn.get("from"), "content": turn.get("value")} for turn in row["conversations"]]
    scans: list[dict[str, Any]] = []
    for name, paths in (row.get("modality_paths") or {}).items():
        is_one = isinstance(paths, str) or find_modality(name).num_channels > 1
        scans += [{"modality": name, "path": path} for path in ([paths] if is_one else paths)]
    scans += _listed_scans(row.get("image", row.get("images")), modalities=row.get("modality", row.get("modalities")))
    return _assemble(row, turns, scans)


def from_umbrella(row: Row) -> dict[str, Any]:
    """UMBRELLA JSON: `conversations` of `role` and `content`, images as items with `modality` and `image_path`."""
    turns = row.get("conversations", row.get("conversation"))
    assert turns is not None
    has_items = any(isinstance(item, Mapping) and "image_path" in item for item in _items_of(turns))
    # `images` names the same files once more: it is needed only where the turns are plain texts.
    scans = [] if has_items else _listed_scans(row.get("images"), modalities=row.get("modalities"))
    return _assemble(row, turns, scans)


def from_hugging_face(row: Row) -> dict[str, Any]:
    """Hugging Face: `messages` with places for images, and `images` with their files, in order."""
    scans = _listed_scans(row["images"], modalities=row.get("modalities", row.get("modality")))
    return _assemble(row, row["messages"], scans)


def _listed_scans(images: Any, *, modalities: Any) -> list[dict[str, Any]]:
    """Scans of a list of files. A modality is declared beside each, for all, or by the file's BIDS suffix."""
    listed = [] if images is None else [images] if isinstance(images, str | Mapping) else list(images)
    names = [modalities] * len(listed) if modalities is None or isinstance(modalities, str) else list(modalities)
    if len(names) != len(listed):
        raise ValueError(f"{len(listed)} images, but {len(names)} modalities; give one for each image, or one for all")
    scans = []
    for image, name in zip(listed, names, strict=True):
        path = image.get("path", image.get("image_path")) if isinstance(image, Mapping) else image
        declared = image.get("modality") if isinstance(image, Mapping) else None
        if not path:
            raise ValueError(f"an image without a path ({image!r:.60}): scans are read from files")
        scans.append({"modality": declared or name or _modality_of_name(path), "path": path})
    return scans


def _modality_of_name(path: Any) -> str:
    match = _BIDS_SUFFIX.search(path) if isinstance(path, str) else None
    for spec in MODALITIES.values():
        if match and match[1] in spec.bids_suffixes:
            return spec.name
    raise ValueError(f"the modality of {path!r} is declared neither in the row ('modality') nor by a BIDS suffix")


def _assemble(row: Row, turns: Any, scans: list[dict[str, Any]]) -> dict[str, Any]:
    """A canonical row of turns, with scans put where the turns have places for them."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("the turns must be a list of objects, the last one the assistant's")
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
        # LLaVA's convention for a conversation that does not say where its image stands.
        places = [{} for _ in scans]
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [*places, *first["content"]]
    if len(places) != len(scans):
        raise ValueError(f"the text has {len(places)} places for scans, but {len(scans)} scans are given")
    for place, scan in zip(places, scans, strict=True):
        wanted = place.get("modality")
        if wanted and find_modality(wanted) is not find_modality(scan["modality"]):
            raise ValueError(f"a place for a {wanted} scan is met by the {scan['modality']} scan {scan['path']!r}")
        place.clear()
        place.update(type="image", **scan)


def _split(content: Any) -> Iterator[dict[str, Any]]:
    """The items of a turn; marks within texts become places."""
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        kind = item.get("type") if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or not isinstance(kind, str):
            yield {"type": None, "text": item}  # refused in words by the strict reading
        elif kind.startswith("image"):
            modality = item.get("modality") or kind.removeprefix("image").lstrip("_") or None
            path = item.get("image_path", item.get("path"))
            yield {"type": "image" if path else "place", "modality": modality, "path": path}
        elif isinstance(item.get("text"), str):
            parts = _MARK.split(item["text"])
            for i, part in enumerate(parts):
                if i % 2 == 1:
                    yield {"type": "place", "modality": part}
                elif part.strip():
                    yield {"type": "text", "text": part.strip()}
        else:
            yield dict(item)


def _subject(row: Row, messages: Sequence[Row]) -> Any:
    """The subject as the row names it; else by the scan's BIDS path, else by its file: one file is one subject."""
    for source in (row, _metadata(row)):
        for key in ("subject", "subject_id", "participant_id"):
            if source.get(key) is not None:
                return source[key]
    for item in _images({"messages": messages}):
        path = item["path"] if isinstance(item["path"], str) else str((item["path"] or [""])[0])
        match = _BIDS_SUBJECT.search(path)
        return match[1] if match else PurePosixPath(path).name.split(".")[0]
    return row.get("id", row.get("task_id"))


def _metadata(row: Row) -> Row:
    metadata = row.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


def _images(row: Row) -> Iterator[dict[str, Any]]:
    return (item for message in row["messages"] for item in message["content"] if item.get("type") == "image")


def _items_of(turns: Sequence[Any]) -> Iterator[Any]:
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        yield from content if isinstance(content, list) else ()


def _relative(path: Any, *, root: Path) -> Any:
    if isinstance(path, list):
        return [_relative(part, root=root) for part in path]
    if isinstance(path, str) and path.startswith(f"{root}/"):
        return path.removeprefix(f"{root}/")
    return path


def _fingerprint(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode("utf-8")).hexdigest()[:16]
