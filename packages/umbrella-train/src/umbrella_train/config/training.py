"""The `dummy_loss`, `trainer` and `report` sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from umbrella_data.errors import did_you_mean
from umbrella_train.config.metric_keys import METRIC_KEYS
from umbrella_train.config.section import AbsolutePath, Section, errors_at

MAX_NUMBERS = 1_000
"""Candidate numbers of a task, each of which is a short forward pass for every question."""


class DummyLossConfig(Section):
    """How modalities that are absent from a batch are kept in the graph."""

    enabled: bool = True
    """Without it, a distributed run fails at the first absent modality."""
    scale: NonNegativeFloat = 1e-7
    """L2 norm of the gradient that an absent modality receives (with reduction unit)."""
    reduction: Literal["unit", "sum"] = "unit"
    """unit: sum of the N parameters / sqrt(N); sum: their plain sum, whose gradient grows with sqrt(N)."""
    absent: Literal["update", "hold"] = "update"
    """update: the optimizer applies the tiny step; hold: modalities that are absent on all ranks stay unchanged."""


LOGGED_IN_TRAINING = tuple(each.start for each in METRIC_KEYS if each.is_of_training)
"""Keys of metrics.jsonl, or how they begin, that are logged before the end of a run."""


def best_metric(trainer: Mapping[str, Any]) -> str | None:
    """The key that chooses the best checkpoint, by the values of the section; None if none is chosen."""
    is_needed = trainer.get("load_best_model_at_end") or trainer.get("early_stopping_patience") is not None
    return trainer.get("metric_for_best_model") or ("eval_loss" if is_needed else None)


class TrainerConfig(Section):
    """Training options with the names and meanings of transformers' TrainingArguments.

    Our own are save_before_seconds, early_stopping_patience, engine, gradient_scale, parity_every, on_non_finite,
    max_skipped_steps and world_size; gradient_checkpointing also takes a part's name, and torch_compile means single
    layers.
    """

    max_steps: int = -1
    """Optimizer steps; -1: from num_train_epochs."""
    num_train_epochs: PositiveFloat = 3.0
    """Epochs, if max_steps is -1."""
    per_device_train_batch_size: PositiveInt = 8
    """Samples per rank and forward pass."""
    per_device_eval_batch_size: PositiveInt = 8
    """Samples per rank and forward pass in evaluation."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeFloat = 0
    """Steps of warm-up; below 1: a fraction of all steps."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    """Shape of the learning rate over the steps."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0: no clipping."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = "adamw_torch_fused"
    """Optimizer."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's eps."""
    bf16: bool = False
    """Autocast to bfloat16."""
    fp16: bool = False
    """Autocast to float16 with a loss scaler (GPU)."""
    gradient_checkpointing: bool | Literal["vision_tower", "language_model"] = False
    """Recompute activations in the backward pass instead of keeping them: in all layers, or in those of one part."""
    torch_compile: bool = False
    """Compile the layers of the vision encoder and of the language model."""
    logging_steps: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    save_steps: PositiveInt = 500
    """Steps between checkpoints."""
    save_before_seconds: NonNegativeFloat = 120.0
    """Save and stop so long before the end of a SLURM job, or before the end that the option max-time gives."""
    save_total_limit: PositiveInt | None = None
    """Checkpoints to keep (default: all)."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations (default: one at the end)."""
    metric_for_best_model: str | None = None
    """Key of metrics.jsonl that chooses the best checkpoint (default: eval_loss, if one of the next keys needs it)."""
    greater_is_better: bool | None = None
    """Whether greater values of this key are better (default: false for losses)."""
    load_best_model_at_end: bool = False
    """Evaluate and keep the weights of the best checkpoint instead of the last ones."""
    early_stopping_patience: PositiveInt | None = None
    """Stop when this key was logged so many times without an improvement (default: never)."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that load scans."""
    use_cpu: bool = False
    """Use the CPU even if there is a GPU."""
    report_to: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = Field(default_factory=list)
    """Trackers in addition to metrics.jsonl, which is always written."""
    engine: Literal["ddp", "fsdp2"] = "ddp"
    """Distributed training: ddp: each process has the whole model; fsdp2: each has a shard of it."""
    gradient_scale: Literal["mean", "present"] = "mean"
    """mean: over all supervised tokens; present: a patch embed's gradient over those of samples with its modality."""
    parity_every: NonNegativeInt = 100
    """Steps between comparisons of the parameters over ranks; 0: never."""
    ddp_timeout: PositiveInt = 1800
    """Seconds that a process waits for the others before the run ends."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What happens at a loss or gradient that is NaN or infinite; stop: the run stops; skip: the step is dropped."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps that on_non_finite: skip may drop in the whole run; one more stops it."""
    world_size: PositiveInt | None = None
    """Expected number of processes; a launch with another number is an error."""

    @property
    def best_metric(self) -> str | None:
        """The key that chooses the best checkpoint; None if none is chosen."""
        return best_metric(self.model_dump())

    @field_validator("early_stopping_patience")
    @classmethod
    def _check_best_metric(cls, patience: int | None, info: ValidationInfo) -> int | None:
        key = best_metric({**info.data, "early_stopping_patience": patience})
        if key is None:
            if info.data.get("greater_is_better") is not None:
                raise ValueError("greater_is_better needs metric_for_best_model")
            return patience
        if not key.startswith(LOGGED_IN_TRAINING):
            what = "is known only at the end of a run" if key.startswith("eval/") else "is not logged in training"
            meant = did_you_mean(key, LOGGED_IN_TRAINING) or "; use one such as eval_loss, eval/loss/T1 or loss"
            raise ValueError(f"metric_for_best_model: {key} {what}{meant}")
        if key.startswith("eval") and info.data.get("eval_steps") is None:
            raise ValueError(f"metric_for_best_model: {key} needs eval_steps")
        if "loss" not in key and info.data.get("greater_is_better") is None:
            raise ValueError(f"metric_for_best_model: {key} needs greater_is_better: true or false")
        return patience

    @field_validator("max_steps")
    @classmethod
    def _check_max_steps(cls, steps: int) -> int:
        if steps != -1 and steps < 1:
            raise ValueError(f"{steps} is neither a number of steps nor -1")
        return steps

    @field_validator("fp16")
    @classmethod
    def _check_fp16(cls, fp16: bool, info: ValidationInfo) -> bool:
        if fp16 and info.data.get("bf16"):
            raise ValueError("cannot be combined with bf16: choose one")
        return fp16

    @field_validator("use_cpu", "engine", "on_non_finite")
    @classmethod
    def _check_loss_scaler(cls, value: bool | str, info: ValidationInfo) -> bool | str:
        if info.data.get("fp16") and value is True:
            raise ValueError("cannot be combined with fp16, which needs a GPU; use bf16")
        if info.data.get("fp16") and value == "fsdp2":
            raise ValueError("fsdp2 cannot be combined with fp16, whose loss scaler sees one shard; use bf16")
        if info.data.get("fp16") and value == "skip":
            raise ValueError("skip cannot be combined with fp16, whose loss scaler drops steps itself; use bf16")
        return value


class ReportConfig(Section):
    """Evaluation and the report at the end of a run."""

    enabled: bool = True
    """Write report.html."""
    pictures: bool = True
    """Draw one picture per modality of what the model sees."""
    viewer: bool | None = None
    """With pictures: put their whole scans, which can show a face, into report.html (default: synthetic ones only)."""
    max_new_tokens: PositiveInt = 32
    """Longest answer in tokens."""
    controls: bool = True
    """Ask every question also with another subject's scan and without a scan."""
    max_samples: PositiveInt | None = None
    """Questions to evaluate per set of modalities, drawn by seed from all of its tasks (default: all)."""
    laterality_lexicon: AbsolutePath | None = None
    """YAML file with the words of the text score laterality_f1 (default: packaged English words)."""
    number_grids: dict[str, tuple[float, float, float]] = Field(default_factory=dict)
    """Candidate numbers by task: first, last and step, as in age: [18, 90, 1] (default: range of training answers)."""

    @field_validator("number_grids")
    @classmethod
    def _check_grids(cls, grids: dict[str, tuple[float, float, float]]) -> dict[str, tuple[float, float, float]]:
        problems = []
        for task, (first, last, step) in grids.items():
            if not (math.isfinite(first) and math.isfinite(last) and step > 0 and first < last):
                problems.append((task, f"{[first, last, step]} is not first, last and step, as in [18, 90, 1]"))
            elif (last - first) / step >= MAX_NUMBERS:
                problems.append((task, f"has more than {MAX_NUMBERS:,} numbers; choose a larger step"))
        if problems:
            raise errors_at(problems)
        return grids
