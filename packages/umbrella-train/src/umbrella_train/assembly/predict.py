"""Asks a trained model one question about scans; no file is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import umbrella_model  # noqa: F401  (registers the model with the Auto classes)
from umbrella_data.manifest.dialects import IMAGE_TOKEN
from umbrella_data.manifest.sample import Scan
from umbrella_data.modality import find_modality
from umbrella_train.assembly.load_errors import TRAINED_MODEL, loading
from umbrella_train.end_of_turn import GREEDY
from umbrella_train.errors import RunError
from umbrella_train.processor import UmbrellaProcessor, question_with_scans
from umbrella_train.run_folder import fold_folders, no_run_message


def predict(
    folder: Path,
    *,
    question: str,
    scans: Sequence[Scan] = (),
    max_new_tokens: int = 32,
    device: torch.device | str | None = None,
) -> str:
    """The model's answer, decoded greedily.

    Args:
        folder: A run's folder, its `model/`, a checkpoint, or any folder with a model and its processor.
        question: The text.
        scans: In reading order; a modality may be an alias.
        max_new_tokens: Longest answer in tokens.
        device: Device to use; None takes the GPU if there is one.

    Raises:
        RunError: There is no model, it cannot be loaded, it does not have a modality, or the question has markup.
        ScanError: A scan is damaged or inconsistent.
    """
    model_folder = find_model(folder)
    processor = load_processor(model_folder)
    named = [replace(scan, modality=known_modality(scan.modality, processor)) for scan in scans]
    batch = question_batch(processor, question, named)
    model = load_model(model_folder, device=device)
    return answer_batch(model, processor, batch, max_new_tokens=max_new_tokens)


def question_batch(
    processor: UmbrellaProcessor, question: str, scans: Sequence[Scan], *, load: Callable[[Scan], Tensor] | None = None
) -> dict[str, Any]:
    """The batch of one question; `load` is that of the processor.

    Raises:
        RunError: The question has a special token of the tokenizer, such as one that marks a scan.
        ScanError: A scan is damaged or inconsistent.
    """
    image = IMAGE_TOKEN.search(question)
    added = processor.tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special and token.content in question]
    if image or special:
        raise RunError(f"the question contains {image[0] if image else special[0]!r}, a special token; remove it")
    return processor(question_with_scans(question, scans), load=load)


def answer_batch(model: Any, processor: UmbrellaProcessor, batch: dict[str, Any], *, max_new_tokens: int) -> str:
    """The answer to the first prompt of a batch of the processor, decoded greedily.

    Raises:
        RunError: The prompt and the answer have more tokens than the language model has positions.
    """
    length = batch["input_ids"].shape[1] + max_new_tokens
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise RunError(
            f"the scans, the question and an answer of up to {max_new_tokens} tokens have {length} tokens, more than "
            f"the {positions} of the language model; ask a shorter one, or allow a shorter answer (--max-new-tokens)"
        )
    volumes = {name: volume.to(model.device) for name, volume in batch.pop("pixel_values").items()}
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    stops = list(processor.end_of_turn.stop_ids)
    generated = model.generate(
        **inputs, pixel_values=volumes, max_new_tokens=max_new_tokens, **GREEDY, eos_token_id=stops
    )
    return processor.decode_answers(generated, prompt_length=inputs["input_ids"].shape[1])[0]


def find_model(folder: Path) -> Path:
    """The folder of the weights: `folder` itself, or the `model/` of a run.

    Raises:
        RunError: There are none.
    """
    for place in (folder / "model", folder):
        if (place / "config.json").is_file():
            return place
    if folds := fold_folders(folder):
        raise RunError(f"{folder}: is a cross-validation with a model in each fold; name one, as in {folds[0]}")
    if (folder / "config.yaml").is_file():
        raise RunError(f"{folder / 'model'}: has no model; the run did not finish (name a checkpoint-N instead)")
    raise RunError(no_run_message(folder, otherwise="has no model (no config.json)"))


def load_processor(model_folder: Path) -> UmbrellaProcessor:
    """The processor next to the weights.

    Raises:
        RunError: There is none of this package, or it is damaged.
    """
    has_processor = (model_folder / "processor_config.json").is_file()
    # As for a tokenizer: a damaged file raises errors of any class.
    with loading("processor", key="model", source=model_folder, right=TRAINED_MODEL, errors=(Exception,)):
        processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=False) if has_processor else None
    if not isinstance(processor, UmbrellaProcessor):
        raise RunError(f"{model_folder}: has no processor of this package; train the model with umbrella-train")
    return processor


def load_model(model_folder: Path, *, device: torch.device | str | None) -> Any:
    """The model on a device, in evaluation mode; None takes the GPU if there is one.

    Raises:
        RunError: It cannot be loaded.
    """
    with loading("weights", key="model", source=model_folder, right=TRAINED_MODEL):
        model: Any = AutoModelForImageTextToText.from_pretrained(model_folder, trust_remote_code=False)
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def known_modality(name: str, processor: UmbrellaProcessor) -> str:
    """The canonical name of one of the model's modalities.

    Raises:
        RunError: It is unknown, or the model was not trained on it.
    """
    try:
        canonical = find_modality(name).name
    except ValueError as error:
        raise RunError(str(error)) from error
    if canonical not in processor.modality_order:
        raise RunError(f"{canonical}: the model was trained on {', '.join(processor.modality_order)} only")
    return canonical
