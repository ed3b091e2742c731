"""Tokenizer, model, data sets and collator from a `RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from umbrella_data import ConversationDataset, InterleaveDataset, PaddingCollator
from umbrella_data.cache.store import VolumeCache
from umbrella_data.chat.template import pin_date
from umbrella_data.dataset.bad_scans import BadScanList
from umbrella_data.errors import did_you_mean
from umbrella_data.modality import find_modality
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_model import (
    LoraSettings,
    PatchEmbedConfig,
    UmbrellaConfig,
    UmbrellaForConditionalGeneration,
    set_trainable,
)
from umbrella_model.language_model import load_language_model
from umbrella_model.packing import check_supports_packing
from umbrella_model.parts import Part
from umbrella_model.tokens import image_token_id
from umbrella_model.trainable import Mode
from umbrella_model.vision_encoder import load_vision_encoder
from umbrella_train.assembly.acceleration import set_attention
from umbrella_train.assembly.byte_tokenizer import load_tokenizer
from umbrella_train.assembly.conversation_check import check_vocabulary
from umbrella_train.assembly.load_errors import (
    ITS_TOKENIZER,
    LANGUAGE_MODEL,
    LLAVA,
    TRAINED_MODEL,
    VISION_ENCODER,
    loading,
)
from umbrella_train.assembly.pinned import with_folders
from umbrella_train.assembly.subject_parts import open_source
from umbrella_train.assembly.trained_model import check_tokenizer, is_trained_model, load_trained_model
from umbrella_train.batches.collators import SupervisedCollator
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.distributed.deepspeed import built_whole
from umbrella_train.errors import RunError
from umbrella_train.processor import UmbrellaProcessor


@dataclass(frozen=True)
class TrainingComponents:
    """Tokenizer, model and pipelines of a run.

    Attributes:
        tokenizer: Of the language model.
        model: On the CPU; the trainer moves it.
        pipelines: From scan files to volumes, by modality.
        bad_scans: Samples skipped for bad scans; None if they raise errors.
        asks_for_reasoning: Whether rows without an answer are asked for one that starts with reasoning.
    """

    tokenizer: PreTrainedTokenizerBase
    model: UmbrellaForConditionalGeneration
    pipelines: Mapping[str, Pipeline]
    bad_scans: BadScanList | None = None
    asks_for_reasoning: bool = False

    def list_bad_scans_in(self, folder: Path) -> None:
        """Sets the folder of the list of bad scans, if the config skips them."""
        if self.bad_scans is not None:
            self.bad_scans.folder = folder

    def collator(self, *, padding_side: Literal["left", "right"] = "right") -> PaddingCollator:
        """The collator for training (`right`), which adds the supervised positions, or for generation (`left`)."""
        kind = SupervisedCollator if padding_side == "right" else PaddingCollator
        return kind(
            pad_token_id=self.tokenizer.pad_token_id,
            modality_order=list(self.pipelines),
            padding_side=padding_side,
        )

    def processor(
        self, *, masked: Mapping[str, bool] | None = None, asks_for_reasoning: bool = False
    ) -> UmbrellaProcessor:
        """The processor that is saved with the weights; arguments are those of `UmbrellaProcessor`."""
        return UmbrellaProcessor(
            self.tokenizer,
            image_token_id=self.model.config.image_token_id,
            modality_order=list(self.pipelines),
            num_image_tokens=self._num_image_tokens,
            pipelines={name: pipeline.config.preprocessing() for name, pipeline in self.pipelines.items()},
            masked=masked,
            asks_for_reasoning=asks_for_reasoning,
        )

    @property
    def _num_image_tokens(self) -> dict[str, int]:
        return {name: self.model.num_image_tokens(name) for name in self.pipelines}

    def dataset(
        self, source: DatasetConfig, *, config: RunConfig, augment: bool, may_end_with_user: bool = False
    ) -> ConversationDataset:
        """The examples of one manifest, whose rows may end with the user's turn if answers are generated for them.

        Raises:
            RunError: The tokenizer or its chat template cannot be used, or arguments of augmentation.
        """
        if augment:
            self._build_augmentation()
        try:
            return ConversationDataset(
                open_source(source, may_end_with_user=may_end_with_user),
                tokenizer=self.tokenizer,
                image_token_id=self.model.config.image_token_id,
                num_image_tokens=self._num_image_tokens,
                pipelines=self.pipelines,
                seed=config.seed,
                max_length=config.data.max_length,
                augment=augment,
                bad_scans=self.bad_scans,
                asks_for_reasoning=self.asks_for_reasoning,
                number_decimals=config.data.number_decimals,
                number_smoothing=config.data.number_smoothing,
            )
        except ValueError as error:
            raise RunError(f"{_tokenizer_source(config)}: {error}") from error

    def _build_augmentation(self) -> None:
        """Import MONAI here, once, and not in each loader worker."""
        for name, pipeline in self.pipelines.items():
            try:
                _ = pipeline.augmentation
            except ValueError as error:
                raise RunError(f"data.pipelines.{name}.{error}") from error

    def mixture(self, sources: Sequence[DatasetConfig], *, config: RunConfig, augment: bool) -> InterleaveDataset:
        """Several manifests as one data set; arguments are those of `dataset`.

        The config's mixing applies to training; for evaluation (`augment` off) every sample occurs exactly once.

        Raises:
            RunError: As `dataset`, or numbers of a task without such answers are to be smoothed.
        """
        data = config.data
        datasets = [self.dataset(source, config=config, augment=augment) for source in sources]
        if not augment:
            return InterleaveDataset(datasets, seed=config.seed)
        tasks = {task for dataset in datasets for task in dataset.number_tasks}
        if unknown := [f"{task}{did_you_mean(task, tasks)}" for task in data.number_smoothing if task not in tasks]:
            raise RunError(
                f"data.number_smoothing: the training data have no answers of type number for the task "
                f"{', '.join(unknown)}; remove it"
            )
        return InterleaveDataset(
            datasets,
            mixing=[source.weight for source in sources] if data.mixing == "weights" else data.mixing,
            temperature=data.temperature,
            stop=data.stop,
            seed=config.seed,
        )


def build_components(config: RunConfig, *, weights: Path | None = None) -> TrainingComponents:
    """Builds everything that does not depend on the samples.

    The model is float32, whatever the dtype of the checkpoint: in half precision small optimizer steps would not change
    weights, and the gradient of an absent modality would be zero. `trainer.bf16` sets the precision of the computation.
    `weights` is a folder with a trained model and its tokenizer, instead of what the config starts from.

    Raises:
        RunError: Weights or tokenizer cannot be loaded, or the language model does not support `varlen`.
    """
    with built_whole():
        if weights is not None:
            tokenizer = load_tokenizer(str(weights), key="model", right=TRAINED_MODEL)
            with loading("weights", key="model", source=weights, right=TRAINED_MODEL):
                model = UmbrellaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
        else:
            config = config.model_copy(update={"model": with_folders(config.model)})
            tokenizer = _load_tokenizer(config)
            model = _build_model(config, tokenizer)
    embedding = cast(torch.nn.Embedding, model.get_input_embeddings())
    check_vocabulary(
        tokenizer,
        num_embeddings=embedding.num_embeddings,
        image_token_id=model.config.image_token_id,
        source=str(weights or _tokenizer_source(config)),
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_attention(model, config.model.attn_implementation)
    if config.data.packing and weights is None:
        try:
            check_supports_packing(model)
        except ValueError as error:
            raise RunError(f"data.packing: {error}") from error
    learn = config.model.learn
    try:
        set_trainable(model, cast(Mapping[Part, Mode], learn.parts), lora=LoraSettings(**learn.lora.model_dump()))
    except (ImportError, ValueError) as error:
        raise RunError(f"model.learn: {error}") from error
    skips = config.data.on_bad_scan == "skip"
    return TrainingComponents(
        tokenizer=tokenizer,
        model=model,
        pipelines=_build_pipelines(config),
        bad_scans=BadScanList(max_fraction=config.data.max_bad_fraction) if skips else None,
    )


def _tokenizer_source(config: RunConfig) -> str:
    section = config.model
    return str(section.tokenizer or section.pretrained or section.language_model or "the built-in tokenizer")


def _load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    section = config.model
    if section.tokenizer is not None:
        tokenizer = load_tokenizer(section.tokenizer, key="model.tokenizer")
    elif section.language_model is not None:
        right = f"{LANGUAGE_MODEL} {ITS_TOKENIZER}"
        tokenizer = load_tokenizer(section.language_model, key="model.language_model", right=right)
    else:  # a LLaVA checkpoint brings its own
        tokenizer = load_tokenizer(section.pretrained, key="model.pretrained", right=f"{LLAVA} {ITS_TOKENIZER}")
    if section.template_date is not None and tokenizer.chat_template is not None:
        tokenizer.chat_template = pin_date(tokenizer.chat_template, section.template_date)
    return tokenizer


def _patch_embeds(config: RunConfig) -> dict[str, PatchEmbedConfig]:
    return {
        name: PatchEmbedConfig(
            modality.image_size,
            modality.patch_size,
            in_channels=find_modality(name).num_channels,
            pool=config.model.pool.get(name, 1),
        )
        for name, modality in config.model.modalities.items()
    }


def _build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> UmbrellaForConditionalGeneration:
    torch.manual_seed(config.seed)
    section = config.model
    if section.pretrained is not None:
        with loading("weights", key="model.pretrained", source=section.pretrained, right=LLAVA):
            if is_trained_model(section.pretrained):
                check_tokenizer(tokenizer, source=section.pretrained)
                return load_trained_model(section.pretrained, section=section, patch_embeds=_patch_embeds(config))
            return UmbrellaForConditionalGeneration.from_llava(
                section.pretrained,
                modalities=_patch_embeds(config),
                init=section.init,
                vision_feature_layer=section.vision_feature_layer,
                dtype=torch.float32,
            )
    if section.language_model is not None or section.vision_encoder is not None:
        return _compose_model(config, tokenizer)
    image_id = image_token_id(tokenizer)
    assert section.vision_config is not None
    text = _text_config(config, tokenizer)
    model = UmbrellaForConditionalGeneration(
        UmbrellaConfig(
            modalities=_patch_embeds(config),
            vision_config=AutoConfig.for_model(**section.vision_config),
            text_config=AutoConfig.for_model(**text),
            image_token_index=image_id,
            projector=section.projector or "mlp",
            # The last layer: every layer that was built is used.
            vision_feature_layer=-1 if section.vision_feature_layer is None else section.vision_feature_layer,
        )
    )
    return model.float()  # the config of a part may have a `dtype`


def _compose_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> UmbrellaForConditionalGeneration:
    """The model from a language model and a vision encoder, of which one may have random weights."""
    section = config.model
    language: Any
    encoder: Any
    if section.language_model is None:
        language = AutoConfig.for_model(**_text_config(config, tokenizer))
    else:
        with loading("weights", key="model.language_model", source=section.language_model, right=LANGUAGE_MODEL):
            language = load_language_model(section.language_model, dtype=torch.float32)
        if section.tokenizer is not None:
            check_tokenizer(tokenizer, source=section.language_model, may_have_more=True)
    if section.vision_encoder is None:
        assert section.vision_config is not None
        encoder = AutoConfig.for_model(**section.vision_config)
    else:
        with loading("weights", key="model.vision_encoder", source=section.vision_encoder, right=VISION_ENCODER):
            encoder = load_vision_encoder(
                section.vision_encoder,
                feature_layer=section.vision_feature_layer,
                num_heads=section.vision_num_heads,
                image_size=section.vision_image_size,
                patch_size=section.vision_patch_size,
                dtype=torch.float32,
            )
    try:
        return UmbrellaForConditionalGeneration.from_parts(
            language_model=language,
            vision_encoder=encoder,
            modalities=_patch_embeds(config),
            tokenizer=tokenizer,
            projector=section.projector or "mlp",
            init=section.init,
            vision_feature_layer=section.vision_feature_layer if section.vision_encoder is None else None,
            dtype=torch.float32,
        )
    except ValueError as error:
        raise RunError(f"model: {error}") from error


def _text_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The config of a language model with random weights."""
    image_id, section = image_token_id(tokenizer), config.model
    assert section.text_config is not None
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **section.text_config,
    }
    # Before the model is built: an embedding without a row for the padding token raises an error of torch.
    check_vocabulary(
        tokenizer, num_embeddings=text["vocab_size"], image_token_id=image_id, source=_tokenizer_source(config)
    )
    return text


def _build_pipelines(config: RunConfig) -> dict[str, Pipeline]:
    cache = None if config.data.cache_dir is None else VolumeCache(config.data.cache_dir)
    index_folder = config.data.index_dir
    return {
        name: Pipeline(pipeline, modality=name, cache=cache, index_folder=index_folder)
        for name, pipeline in config.pipeline_configs.items()
    }
