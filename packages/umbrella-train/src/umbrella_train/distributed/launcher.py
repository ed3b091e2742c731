"""Checks settings of `accelerate launch` in the environment against the config, so that none is silently ignored."""

from __future__ import annotations

import os

from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError


def check_launcher(config: RunConfig) -> None:
    """Rejects settings of the launcher that the run does not support, all at once.

    Raises:
        RunError: FSDP, compilation, other parallelism, a precision or accumulation through accelerate.
    """
    problems = []
    if _is_on("ACCELERATE_USE_FSDP"):
        problems.append(
            "accelerate is configured for FSDP, which it silently ignores on a CPU; "
            "set trainer.engine: fsdp2 instead, and remove FSDP from accelerate's config"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        problems.append(
            "accelerate is configured to compile the whole model, again for every mixture of modalities; set "
            "trainer.torch_compile: true instead (single layers), and dynamo_backend: 'NO' in accelerate's config"
        )
    problems += [
        f"accelerate is configured for {name}, which is not supported; use DDP, trainer.engine: fsdp2 or DeepSpeed"
        for name in ("MEGATRON_LM", "PARALLELISM_CONFIG")
        if _is_on(f"ACCELERATE_USE_{name}")
    ]
    section = config.trainer
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps.isdecimal() and int(steps) not in (1, section.gradient_accumulation_steps):
        problems.append(
            f"accelerate is configured for {steps} gradient accumulation steps and the config for "
            f"{section.gradient_accumulation_steps}; set them in the config only (trainer.gradient_accumulation_steps)"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    chosen = "bf16" if section.bf16 else "fp16" if section.fp16 else "no"
    if precision not in ("no", chosen):
        problems.append(
            f"accelerate is configured for {precision} and the config for {chosen}; set it in the config only "
            f"(trainer.{precision}: true), and mixed_precision: 'no' in accelerate's"
        )
    if problems:
        raise RunError("the launcher and the config do not match:\n  " + "\n  ".join(problems))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
