"""Checks of the source of a model: it exists, and has exactly the tensors of the model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_source(source: Any, *, kinds: tuple[type, ...], argument: str, suffixes: tuple[str, ...]) -> None:
    """Rejects a source of another type, and a path where nothing is, which transformers would look for on the hub.

    Args:
        source: A loaded part, a config, or a path or name.
        kinds: Classes of loaded parts and configs.
        argument: Its name, for the message.
        suffixes: Endings of names that can only be files.

    Raises:
        ValueError: The source has another type, or is a folder with adapters (LoRA) alone.
        FileNotFoundError: There is no such folder or file.
    """
    if isinstance(source, kinds):
        return
    if hasattr(source, "merge_and_unload"):  # peft is an optional package
        raise ValueError(f"{argument} is a {type(source).__name__} with adapters; pass model.merge_and_unload()")
    if not isinstance(source, (str, Path)):
        right = ", a ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{argument} is a {type(source).__name__}; pass a {right}, a path or a name on the hub")
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{argument} is {source}, which has adapters alone, without a model; load it with peft and save the result "
            "of merge_and_unload()"
        )
    name = str(source)
    only_path = isinstance(source, Path) or name[:1] in (".", "/", "~") or name.count("/") > 1
    if (only_path or name.endswith(suffixes)) and not Path(source).exists():
        raise FileNotFoundError(f"{argument} is {name}: there is no such file or folder; check the path")


@contextmanager
def mute_load_report() -> Iterator[None]:
    """Mutes transformers' report on keys, which says "can be ignored" of keys that `check_loaded_keys` rejects."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


def check_loaded_keys(
    info: Mapping[str, Collection[Any]],
    *,
    source: str,
    advice: str = "use strict=False to load those that match and initialise the rest",
) -> None:
    """Rejects a checkpoint whose keys are not those of the model.

    Args:
        info: The loading info that Hugging Face's `from_pretrained(..., output_loading_info=True)` returns.
        source: Path or name of the checkpoint, for the message.
        advice: What to do, for the message.

    Raises:
        ValueError: A key is missing, unexpected or has another shape; the message lists all of them.
    """
    lines = [
        *(f"  missing in the checkpoint: {key}" for key in sorted(info.get("missing_keys", ()))),
        *(f"  not in the model: {key}" for key in sorted(info.get("unexpected_keys", ()))),
        *(
            f"  shape mismatch: {key} is {tuple(theirs)} in the checkpoint and {tuple(ours)} in the model"
            for key, theirs, ours in sorted(info.get("mismatched_keys", ()))
        ),
    ]
    if lines:
        raise ValueError(f"{source}: {len(lines)} keys do not match the model; {advice}:\n" + "\n".join(lines))
