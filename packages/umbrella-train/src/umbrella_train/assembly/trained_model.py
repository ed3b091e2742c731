"""The model of an earlier run as the start of another one: a second stage, or another cohort."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_model import LoraSettings, PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration, merge_lora
from umbrella_model.key_checks import check_loaded_keys
from umbrella_model.lora import has_lora
from umbrella_model.parts import PARTS
from umbrella_train.assembly.byte_tokenizer import load_tokenizer
from umbrella_train.assembly.masks import warn_of_other_masks
from umbrella_train.assembly.pinned import with_folders
from umbrella_train.config import DatasetConfig
from umbrella_train.config.model import LearnConfig, ModelConfig
from umbrella_train.errors import RunError
from umbrella_train.processor import UmbrellaProcessor

logger = logging.getLogger(__name__)


def is_trained_model(source: str) -> bool:
    """Whether a folder, or a hub repository, has an UMBRELLA model rather than a LLaVA."""
    return isinstance(AutoConfig.from_pretrained(source, trust_remote_code=False), UmbrellaConfig)


def load_trained_model(
    source: str, *, section: ModelConfig, patch_embeds: Mapping[str, PatchEmbedConfig]
) -> UmbrellaForConditionalGeneration:
    """The model, in float32; adapters are kept if this run trains the same ones, and merged otherwise.

    The patch embeds are those of the run's modalities, in order; modalities that follow those of the model get random
    weights. The source is a folder, such as RUN/model, or a hub repository.

    Raises:
        RunError: With every difference of modalities, sizes or pools between model and config; or if a tensor is
            missing or unexpected.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    problems = [*_differences(config, patch_embeds)]
    layer = section.vision_feature_layer
    own_layer = None if config.vision_final_norm else config.vision_feature_layer
    if layer is not None and layer != own_layer:
        shown = "not set (the output after the final norm)" if own_layer is None else own_layer
        problems.append(f"vision_feature_layer is {shown} in the model and {layer} in the config")
    if problems:
        raise RunError(f"model.pretrained: {source} does not match this config:\n  " + "\n  ".join(problems))
    added = [name for name in patch_embeds if name not in config.patch_embeds]
    try:
        model, account = UmbrellaForConditionalGeneration.from_pretrained(
            source, dtype=torch.float32, modalities=dict(patch_embeds), strict=not added, output_loading_info=True
        )
    except ImportError as error:
        raise RunError(f"model.pretrained: {source}: {error}") from error
    if added:
        prefixes = tuple(f"{name}_patch_embed." for name in added)
        missing = {
            key for key in account["missing_keys"] if not key.rpartition("vision_tower.")[2].startswith(prefixes)
        }
        check_loaded_keys({**account, "missing_keys": missing}, source=source)
        logger.info("%s: new in this run, from random weights: %s", source, ", ".join(added))
    if has_lora(model) and model.config.lora != _adapters(section.learn):
        merge_lora(model)
        logger.info("the adapters of %s are merged into its weights", source)
    return model


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, source: str, may_have_more: bool = False) -> None:
    """Rejects a tokenizer whose ids differ from those of the model's own tokenizer, if that is saved with the model.

    Args:
        tokenizer: To check.
        source: Folder or hub repository of the model.
        may_have_more: Whether it may have tokens that the model's own tokenizer does not have.

    Raises:
        RunError: A token has another id.
    """
    try:
        own = load_tokenizer(source).get_vocab()
    except RunError:
        logger.warning("%s: has no tokenizer that can be read; the ids of model.tokenizer were not compared", source)
        return
    words = tokenizer.get_vocab()
    if may_have_more:
        words = {word: number for word, number in words.items() if word in own}
    other = next((word for word, number in words.items() if own.get(word) != number), None)
    if other is not None:
        raise RunError(
            f"model.tokenizer: its id of {other!r} differs from that of the tokenizer of {source}; remove "
            "model.tokenizer"
        )


def warn_of_other_pipelines(
    section: ModelConfig, pipelines: Mapping[str, Pipeline], *, sources: Sequence[DatasetConfig]
) -> None:
    """Warns when preprocessing, or brain masks of manifests, differ from those that the run's model was trained with.

    Args:
        section: The run's model, which may start from a trained one.
        pipelines: Of the run.
        sources: Its training data.
    """
    source = with_folders(section).pretrained
    if source is None or not is_trained_model(source):
        return
    try:
        processor = UmbrellaProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        logger.warning("%s: has no processor with the preprocessing that it was trained with", source)
        return
    warn_of_other_masks(sources, trained=processor.masked)
    trained_on = processor.pipelines
    for name, pipeline in pipelines.items():
        before: Mapping[str, Any] = trained_on.get(name, {})
        now = pipeline.config.preprocessing()
        changes = [
            f"{key} {now[key]} (before: {before[key]})" for key in now if key in before and before[key] != now[key]
        ]
        if changes:
            logger.warning("data.pipelines.%s: preprocessing differs from the model's: %s", name, ", ".join(changes))


def _differences(config: UmbrellaConfig, wanted: Mapping[str, PatchEmbedConfig]) -> Iterator[str]:
    trained, order = config.patch_embeds, config.modality_order or []
    if order != list(wanted)[: len(order)]:
        yield (
            f"modalities, in the order of their tags, are {', '.join(order)} in the model and {', '.join(wanted)} in "
            "the config; new ones must come last"
        )
    for name in wanted:
        if name in trained and trained[name] != wanted[name]:
            before, now = trained[name].to_dict(), wanted[name].to_dict()
            changes = [
                f"{key} is {before[key]} in the model and {now[key]} in the config"
                for key in now
                if before[key] != now[key]
            ]
            yield f"{name}: {', '.join(changes)}"


def _adapters(learn: LearnConfig) -> dict[str, Any] | None:
    """The adapters as `umbrella_model.lora.add_lora` records them."""
    parts = [part for part in PARTS if learn.parts[part] == "lora"]
    return {"parts": parts, **asdict(LoraSettings(**learn.lora.model_dump()))} if parts else None
