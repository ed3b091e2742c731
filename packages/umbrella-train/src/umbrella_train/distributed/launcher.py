"""What a rank has to know of its launcher: settings in the environment, and whether it still lives."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)

_WATCH_SECONDS, _GRACE_SECONDS = 5.0, 60.0


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


def stop_with_launcher() -> None:
    """Stops this rank if torchrun or accelerate, which started it, is gone: nobody else would end it.

    As after SIGTERM, the run is saved if all ranks can. A rank that waits for another one ends after a minute.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher watch", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_WATCH_SECONDS)
    logger.error("the launcher of this rank is gone: the rank stops")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
