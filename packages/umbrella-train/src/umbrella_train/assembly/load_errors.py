"""Weights and tokenizers that cannot be read are the user's to mend: told in one message, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from umbrella_train.errors import RunError

# What transformers and umbrella_model raise over files that are absent, damaged or of another kind.
UNREADABLE = (OSError, ValueError, SafetensorError, StrictDataclassError)

# What would be right.
LLAVA = (
    "It must be a whole LLaVA, LLaVA-NeXT or LLaVA-OneVision checkpoint with a SigLIP or CLIP tower, or the model/ of "
    "an earlier run: a folder with config.json and its safetensors, or a name on the hub that is in reach."
)
ITS_TOKENIZER = "Its tokenizer lies beside it, or is named by model.tokenizer."
TOKENIZER = "It must be a folder with tokenizer.json and tokenizer_config.json, or a name on the hub that is in reach."
TRAINED_MODEL = "It must be the model/ of a run that ended, or a checkpoint-N of one, as umbrella-train wrote it."


@contextmanager
def loading(
    thing: str, *, key: str, source: str | Path, right: str, errors: tuple[type[Exception], ...] = UNREADABLE
) -> Iterator[None]:
    """Turns errors over unreadable files into a `RunError`; any other is a bug and keeps its traceback.

    Args:
        thing: What is loaded: `weights`, `tokenizer`, ...
        key: What names the source: a key of the config, or `model` for the one that a run made.
        source: A folder, or a name on the hub.
        right: What would be right.
        errors: Those that an unreadable file can raise here.

    Raises:
        RunError: With all of these and the reason.
    """
    try:
        yield
    except RunError:
        raise
    except errors as error:
        raise RunError(f"{key}: the {thing} of {source} cannot be loaded: {_reason(error, source)}\n{right}") from error


def _reason(error: Exception, source: str | Path) -> str:
    if isinstance(error, SafetensorError):
        return "; ".join(_damaged_weights(Path(source))) or str(error)
    return str(error).strip() if isinstance(error, UNREADABLE) else f"{type(error).__name__}: {error}"


def _damaged_weights(folder: Path) -> Iterator[str]:
    """The error's own words do not say which file it is."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            yield f"{path}: {error}"
