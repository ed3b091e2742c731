"""A model that was trained before, as the start of another run: a second stage, or another cohort."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_model import LoraSettings, PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration, merge_lora
from umbrella_model.key_checks import check_loaded_keys
from umbrella_model.lora import has_lora
from umbrella_model.parts import PARTS
from umbrella_train.config.model import LearnConfig, ModelConfig
from umbrella_train.errors import RunError
from umbrella_train.processor import UmbrellaProcessor

logger = logging.getLogger(__name__)


def is_trained_model(source: str) -> bool:
    """Whether a folder, or a name on the hub, holds a model of ours and not a LLaVA."""
    return isinstance(AutoConfig.from_pretrained(source), UmbrellaConfig)


def load_trained_model(
    source: str, *, section: ModelConfig, patch_embeds: Mapping[str, PatchEmbedConfig]
) -> UmbrellaForConditionalGeneration:
    """The model, in float32, with adapters only where this run goes on with the same ones; others become weights.

    Modalities that the config has behind the model's own get patch embeds that start from nothing.

    Args:
        source: A folder, as RUN/model, or a name on the hub.
        section: What the run's config says of its model.
        patch_embeds: Of the run's modalities, in their order.

    Raises:
        RunError: The model has other modalities, sizes or pools than the config, which names all that differs; or a
            tensor is missing or too many.
    """
    config = AutoConfig.from_pretrained(source)
    problems = [*_differences(config, patch_embeds)]
    layer = section.vision_feature_layer
    if layer is not None and layer != config.vision_feature_layer:
        problems.append(f"vision_feature_layer is {config.vision_feature_layer} there and {layer} here")
    if problems:
        raise RunError(f"model.pretrained: {source} is another model than this config's:\n  " + "\n  ".join(problems))
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, source: str) -> None:
    """Refuses another tokenizer than the model's own, where that one lies beside it: its ids would mean other words.

    Raises:
        RunError: A word has another id.
    """
    try:
        own = AutoTokenizer.from_pretrained(source).get_vocab()
    except (OSError, ValueError):
        return
    other = next((word for word, number in tokenizer.get_vocab().items() if own.get(word) != number), None)
    if other is not None:
        raise RunError(
            f"model.tokenizer: its id of {other!r} is not that of the tokenizer that {source} was trained with; leave "
            "model.tokenizer out"
        )


def warn_of_other_pipelines(source: str, pipelines: Mapping[str, Pipeline]) -> None:
    """Says where scans are prepared otherwise than those that the model was trained on."""
    try:
        trained_on = UmbrellaProcessor.from_pretrained(source).pipelines
    except (OSError, ValueError):
        logger.warning(
            "%s: has no processor, which would say how the scans that it was trained on were prepared", source
        )
        return
    for name, pipeline in pipelines.items():
        before: Mapping[str, Any] = trained_on.get(name, {})
        now = pipeline.config.model_dump(mode="json", exclude={"augment"})
        changes = [
            f"{key} {now[key]} (then: {before[key]})" for key in now if key in before and before[key] != now[key]
        ]
        if changes:
            logger.warning("data.pipelines.%s: the model was trained on other scans: %s", name, ", ".join(changes))


def _differences(config: UmbrellaConfig, asked: Mapping[str, PatchEmbedConfig]) -> Iterator[str]:
    trained, order = config.patch_embeds, config.modality_order or []
    if order != list(asked)[: len(order)]:
        yield (
            f"modalities, in the order of their tags, are {', '.join(order)} there and {', '.join(asked)} here; "
            "new ones stand behind"
        )
    for name in asked:
        if name in trained and trained[name] != asked[name]:
            there, here = trained[name].to_dict(), asked[name].to_dict()
            changes = [f"{key} is {there[key]} there and {here[key]} here" for key in here if there[key] != here[key]]
            yield f"{name}: {', '.join(changes)}"


def _adapters(learn: LearnConfig) -> dict[str, Any] | None:
    """As `umbrella_model.lora.add_lora` notes them."""
    parts = [part for part in PARTS if learn.parts[part] == "lora"]
    return {"parts": parts, **asdict(LoraSettings(**learn.lora.model_dump()))} if parts else None
