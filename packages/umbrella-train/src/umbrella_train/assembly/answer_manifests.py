"""Asks a trained model every question of manifests, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from umbrella_data import ConversationDataset, ManifestError, PaddingCollator, Pipeline, PipelineConfig, read_manifest
from umbrella_data.manifest.manifest import Manifest
from umbrella_data.progress import progress_bar
from umbrella_train.assembly.masks import warn_of_other_masks
from umbrella_train.assembly.predict import find_model, load_model, load_processor
from umbrella_train.config import DatasetConfig
from umbrella_train.errors import RunError
from umbrella_train.evaluation.answers import answer_row
from umbrella_train.evaluation.generate import generate_in_order
from umbrella_train.processor import UmbrellaProcessor


def answer_manifests(
    folder: Path,
    manifests: Sequence[Path],
    *,
    data_root: Path | None = None,
    batch_size: int = 4,
    max_new_tokens: int = 32,
    device: torch.device | str | None = None,
) -> Iterator[dict[str, Any]]:
    """The model's answers to all rows of manifests, decoded greedily; `answer` and the last answer's text are not used.

    All rows are validated before the model is loaded; they may end with the user's turn. Only a few batches of answers,
    of `batch_size` prompts each, are in memory. The folder, the longest answer and the device are as in `predict`.

    Returns:
        Rows as of `umbrella_train.evaluation.answers.answer_row`, in the order of the manifests.

    Raises:
        RunError: There is no model, it cannot be loaded, or with all problems of all rows.
        ScanError: A scan is damaged or inconsistent; while answers are generated.
    """
    model_folder = find_model(folder)
    processor = load_processor(model_folder)
    opened = _open(manifests, data_root=data_root, modalities=processor.modality_order)
    warn_of_other_masks(
        [DatasetConfig(manifest=path, data_root=data_root) for path in manifests], trained=processor.masked
    )
    model = load_model(model_folder, device=device)

    def generate() -> Iterator[dict[str, Any]]:
        with progress_bar(words="answering", total=sum(map(len, opened)), unit="row") as bar:
            for manifest in opened:
                dataset = _dataset(manifest, processor)
                answers = generate_in_order(
                    model,
                    dataset,
                    tokenizer=processor.tokenizer,
                    collator=PaddingCollator(
                        pad_token_id=processor.tokenizer.pad_token_id,
                        modality_order=processor.modality_order,
                        padding_side="left",
                    ),
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    device=model.device,
                    end_of_turn=processor.end_of_turn,
                )
                for index, text in answers:
                    yield answer_row(dataset.sample(index), text)
                    bar.update()

    return generate()


def _open(manifests: Sequence[Path], *, data_root: Path | None, modalities: Sequence[str]) -> list[Manifest]:
    """The manifests, after every row was validated.

    Raises:
        RunError: With all problems of all rows of all manifests, and modalities that the model does not have.
    """
    opened, problems = [], []
    for path in manifests:
        try:
            manifest = read_manifest(path, data_root=data_root, may_end_with_user=True)
            manifest.validate()
            opened.append(manifest)
        except (ManifestError, OSError) as error:
            problems.append(str(error))
            continue
        unknown = frozenset[str]().union(*manifest.facts.modality_sets()) - set(modalities)
        if unknown:
            problems.append(
                f"{path}: has {', '.join(sorted(unknown))} scans, but the model was trained on "
                f"{', '.join(modalities)} only; remove these rows"
            )
    if problems:
        raise RunError("\n".join(problems))
    return opened


def _dataset(manifest: Manifest, processor: UmbrellaProcessor) -> ConversationDataset:
    return ConversationDataset(
        manifest,
        tokenizer=processor.tokenizer,
        image_token_id=processor.image_token_id,
        num_image_tokens=processor.num_image_tokens,
        asks_for_reasoning=processor.asks_for_reasoning,
        pipelines={
            name: Pipeline(PipelineConfig.model_validate(settings), modality=name)
            for name, settings in processor.pipelines.items()
        },
        augment=False,
    )
