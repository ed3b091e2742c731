"""Unsupported combinations of trainer settings, rejected together before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, get_args

import torch
from torch import nn
from transformers import TrainingArguments

from umbrella_model import UmbrellaForConditionalGeneration
from umbrella_model.attention import VARLEN
from umbrella_model.hf_compat import attention_of
from umbrella_model.vision_tower import UmbrellaVisionTower
from umbrella_train.config import DataConfig, DummyLossConfig, TrainerConfig
from umbrella_train.errors import RunError

ABSENT_WITHOUT_DUMMY_LOSS = (
    "DDP found parameters without a gradient: a modality was absent from a batch and the dummy loss is off; set "
    "dummy_loss.enabled: true"
)
_GATHERS_WEIGHTS = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def check_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    *,
    dummy_loss: DummyLossConfig,
    engine: str,
    gradient_scale: str,
    batches: str = "by_modality",
    packing: bool = False,
    on_non_finite: str = "stop",
    has_metrics: bool = False,
) -> None:
    """Checks the trainer's settings, those of `UmbrellaTrainer`, against each other, the model and the device.

    Raises:
        RunError: With every unsupported combination.
    """
    chosen = {"batches": batches, "engine": engine, "gradient_scale": gradient_scale, "on_non_finite": on_non_finite}
    problems = [*_unknown_values(**chosen), *_hugging_face_problems(arguments, engine=engine, has_metrics=has_metrics)]
    if not _patch_embeds(model):
        problems.append(f"{type(model).__name__} has no patch embeds: it is no model of umbrella_model")
    plugin: Any = arguments.deepspeed_plugin
    zero_stage = 0 if plugin is None else plugin.zero_stage
    if zero_stage:
        problems += _deepspeed_problems(arguments, dummy_loss=dummy_loss, engine=engine, gradient_scale=gradient_scale)
    elif arguments.fp16 and engine == "fsdp2":
        problems.append("fp16 cannot be combined with engine fsdp2: its loss scaler sees one shard; use bf16")
    if on_non_finite == "skip" and arguments.fp16:
        problems.append(
            "trainer.on_non_finite: skip cannot be combined with fp16, whose loss scaler drops steps itself; use bf16"
        )
    elif on_non_finite == "skip" and zero_stage:
        problems.append(
            "trainer.on_non_finite: skip is not supported with DeepSpeed, whose gradients cannot be dropped; use stop, "
            "or trainer.engine: fsdp2"
        )
    if arguments.fp16 and arguments.device.type == "cpu":
        problems.append("fp16 needs a GPU: a CPU would silently compute in float32; use bf16")
    if not dummy_loss.enabled and (zero_stage or engine == "fsdp2"):
        problems.append(
            "dummy_loss.enabled: false is not supported with fsdp2 or DeepSpeed: a rank without a modality would "
            "reduce other gradients than the other ranks, which hangs them or corrupts gradients"
        )
    if arguments.fp16 and dummy_loss.absent == "hold" and _only_patch_embeds_learn(model):
        problems.append(
            "dummy_loss.absent: hold with fp16 leaves the loss scaler without gradients if only patch embeds are "
            "trained and a batch has no scan; use bf16, or absent: update"
        )
    if zero_stage == 3 and plugin.hf_ds_config.get_value(_GATHERS_WEIGHTS) is not True:
        problems.append(
            "DeepSpeed ZeRO-3 must gather the weights to save them: set zero3_save_16bit_model: true in accelerate's "
            f"config, or {_GATHERS_WEIGHTS}: true in DeepSpeed's"
        )
    if zero_stage == 3 and not all(type(each.proj) is nn.Linear for each in _patch_embeds(model)):
        problems.append("model.learn.patch_embed: lora is not supported by DeepSpeed ZeRO-3; use ZeRO-2, fsdp2 or DDP")
    if packing:
        problems += _packing_problems(model, arguments)
    if problems:
        raise RunError("\n  ".join(problems))


def _unknown_values(**chosen: str) -> Iterator[str]:
    for name, value in chosen.items():
        section = DataConfig if name in DataConfig.model_fields else TrainerConfig
        known = get_args(section.model_fields[name].annotation)
        if value not in known:
            yield f"{name} is {value!r}; it must be one of {', '.join(known)}"


def _hugging_face_problems(arguments: TrainingArguments, *, engine: str, has_metrics: bool) -> Iterator[str]:
    if arguments.label_smoothing_factor:
        yield "label_smoothing_factor is not supported: the loss would be that of labels one token off"
    if has_metrics:
        yield "compute_metrics is not supported: it needs the logits of all samples; use umbrella-eval"
    if arguments.load_best_model_at_end and engine == "fsdp2":
        yield (
            "load_best_model_at_end is not supported with engine fsdp2, whose shards Hugging Face's Trainer cannot "
            "load; load the checkpoint state.best_model_checkpoint after the training"
        )


def _patch_embeds(model: nn.Module) -> list[Any]:
    towers = [module for module in model.modules() if isinstance(module, UmbrellaVisionTower)]
    return [tower.patch_embed(name) for tower in towers for name in tower.modality_order]


def _only_patch_embeds_learn(model: nn.Module) -> bool:
    own = {id(parameter) for embed in _patch_embeds(model) for parameter in embed.parameters()}
    return all(id(parameter) in own for parameter in model.parameters() if parameter.requires_grad)


def _deepspeed_problems(
    arguments: TrainingArguments, *, dummy_loss: DummyLossConfig, engine: str, gradient_scale: str
) -> Iterator[str]:
    if dummy_loss.absent == "hold":
        yield (
            "dummy_loss.absent: hold has no effect under DeepSpeed, which steps cleared gradients too; "
            "use update, or trainer.engine: fsdp2"
        )
    if gradient_scale == "present":
        yield (
            "trainer.gradient_scale: present has no effect under DeepSpeed, which does not expose gradients; "
            "use mean, or trainer.engine: fsdp2"
        )
    if engine == "fsdp2":
        yield "trainer.engine: fsdp2 and DeepSpeed cannot both shard the model; choose one"
    if arguments.fp16:
        yield "trainer.fp16 is not supported with DeepSpeed, which scales the loss itself; use bf16"


def _packing_problems(model: nn.Module, arguments: TrainingArguments) -> Iterator[str]:
    language_model: Any = cast(UmbrellaForConditionalGeneration, model).model.language_model
    text = language_model.config
    attention = attention_of(text)
    if attention in ("eager", "sdpa"):
        yield (
            f"data.packing: true with attention {attention} would compute a mask over the whole row, several times the "
            f"work; set model.attn_implementation: {VARLEN} if the language model supports it, or data.batches: "
            "by_length"
        )
    dropout: float = getattr(text, "attention_dropout", 0.0)
    if attention == VARLEN and dropout:
        yield (
            f"data.packing: true cannot be combined with attention dropout, which is {dropout} in the "
            "language model; set attention_dropout: 0 in model.text_config, or in the config.json of the checkpoint"
        )
    is_half = arguments.mixed_precision != "no" or language_model.dtype in (torch.bfloat16, torch.float16)
    if arguments.device.type == "cuda" and not is_half:
        yield "data.packing: true needs bfloat16 or float16 on a GPU: set trainer.bf16: true"
