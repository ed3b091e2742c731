"""Errors of weights and tokenizers that cannot be loaded, as one message without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from umbrella_train.errors import RunError

# Raised by transformers and umbrella_model for files that are missing, damaged or of another kind, or that need a
# package which is not installed (quantised weights, GGUF).
UNREADABLE = (OSError, ValueError, SafetensorError, StrictDataclassError, ImportError)

# What a name must be.
LLAVA = (
    "It must be a complete LLaVA, LLaVA-NeXT or LLaVA-OneVision checkpoint with a SigLIP or CLIP tower, or the model/ "
    "of an earlier run: a folder with config.json and safetensors, or the name of an accessible hub repository."
)
LANGUAGE_MODEL = (
    "It must be a decoder of AutoModelForCausalLM: a folder with config.json and safetensors, the name of an "
    "accessible hub repository, or a GGUF file."
)
VISION_ENCODER = (
    "It must be a SigLIP, SigLIP 2, CLIP, DINOv2, ViT or ViT-MAE model: a folder with config.json and safetensors, or "
    "the name of an accessible hub repository; or a file with the state dict of MONAI's ViT (.safetensors, .pt)."
)
ITS_TOKENIZER = "Its tokenizer is in the same folder, or named by model.tokenizer."
TOKENIZER = "It must be a folder with tokenizer.json and tokenizer_config.json, or an accessible hub repository."
TRAINED_MODEL = "It must be the model/ of a finished run, or a checkpoint-N, written by umbrella-train."


@contextmanager
def loading(
    thing: str, *, key: str, source: str | Path, right: str, errors: tuple[type[Exception], ...] = UNREADABLE
) -> Iterator[None]:
    """Turns errors of unreadable files into a `RunError`; any other error is a bug and keeps its traceback.

    Args:
        thing: What is loaded: `weights`, `tokenizer`, ...
        key: The config key of the source, or `model` for the model of a run.
        source: A folder, or a name on the hub.
        right: What the source must be.
        errors: Errors that an unreadable file can raise here.

    Raises:
        RunError: With key, source and reason.
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
    """The message of the error does not name the file."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            yield f"{path}: {error}"
