"""What `accelerate launch` asks for through the environment, held against the config: no wish is quietly dropped."""

from __future__ import annotations

import os

from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError


def check_launcher(config: RunConfig) -> None:
    """Refuses what the launcher asks for and the run would not do; all of it at once.

    Raises:
        RunError: FSDP or a precision through accelerate, or settings that DeepSpeed cannot keep.
    """
    problems = []
    if _is_on("ACCELERATE_USE_FSDP"):
        problems.append(
            "accelerate asks for FSDP, which it drops on a CPU without a word; "
            "set trainer.engine: fsdp2 instead, and leave FSDP out of accelerate's config"
        )
    section = config.trainer
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    chosen = "bf16" if section.bf16 else "fp16" if section.fp16 else "no"
    if precision not in ("no", chosen):
        problems.append(
            f"accelerate asks for {precision} and the config for {chosen}; set it in the config alone "
            f"(trainer.{precision}: true), and mixed_precision: 'no' in accelerate's"
        )
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        if config.dummy_loss.absent == "hold":
            problems.append(
                "dummy_loss.absent: hold has no effect under DeepSpeed, whose partitions step a cleared gradient "
                "as well; use update, or trainer.engine: fsdp2"
            )
        if section.gradient_scale == "present":
            problems.append(
                "trainer.gradient_scale: present has no effect under DeepSpeed, which keeps the gradients to itself; "
                "use mean, or trainer.engine: fsdp2"
            )
        if section.engine == "fsdp2":
            problems.append("trainer.engine: fsdp2 and DeepSpeed cannot both share the model out; choose one")
    if problems:
        raise RunError("the launcher and the config do not fit together:\n  " + "\n  ".join(problems))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
