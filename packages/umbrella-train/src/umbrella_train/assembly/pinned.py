"""Models of the Hugging Face hub at a revision of one's choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from umbrella_train.assembly.load_errors import loading
from umbrella_train.config import ModelConfig
from umbrella_train.config.run_checks import split_revision

# What is read of a repository, without weights in other formats.
FILES = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
OTHER_WEIGHTS = ("pytorch_model*.bin",)
# Copies of the weights for other programs.
IGNORED = ("consolidated*.safetensors",)
REVISION = "It must be an accessible hub repository with that branch, tag or commit."


def with_folders(section: ModelConfig) -> ModelConfig:
    """The section with the folder of the hub's cache in place of every `name@revision`, downloaded where missing.

    Raises:
        RunError: A repository or a revision cannot be loaded.
    """
    folders = {}
    for key in ("pretrained", "language_model", "vision_encoder", "tokenizer"):
        name, revision = split_revision(getattr(section, key) or "")
        if revision is not None:
            with loading("files", key=f"model.{key}", source=f"{name}@{revision}", right=REVISION):
                folders[key] = _download(name, revision, FILES)
                if key != "tokenizer" and not any(Path(folders[key]).glob("*.safetensors")):
                    _download(name, revision, OTHER_WEIGHTS)
    return section.model_copy(update=folders)


def _download(name: str, revision: str, files: Sequence[str]) -> str:
    folder: str = snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=list(IGNORED))
    return folder
