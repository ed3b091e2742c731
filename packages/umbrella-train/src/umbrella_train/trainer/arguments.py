"""Hugging Face's `TrainingArguments` from the `trainer` section, and checks of how the run was launched."""

from __future__ import annotations

import logging
import os
from copy import copy
from pathlib import Path

import torch
from transformers import TrainingArguments

from umbrella_train.config import RunConfig
from umbrella_train.config.run_checks import world_size_problem
from umbrella_train.distributed.launcher import check_launcher
from umbrella_train.errors import RunError
from umbrella_train.hf_compat import keep_one_device

logger = logging.getLogger(__name__)

# Fields of the section that Hugging Face does not have, or knows fewer values of.
_OWN_FIELDS = {
    "world_size",
    "engine",
    "gradient_scale",
    "parity_every",
    "on_non_finite",
    "max_skipped_steps",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "early_stopping_patience",
    "save_before_seconds",
    "torch_compile",
    "gradient_checkpointing",
    "report_to",
}


def build_arguments(config: RunConfig, *, output_dir: Path, dry_run: bool = False) -> TrainingArguments:
    """Training arguments, with defaults that would train wrongly replaced; a dry run saves and tracks nothing.

    Initialises the process group if several processes were launched.

    Raises:
        RunError: The number of processes differs from the launched or the configured one, or the launcher has
            unsupported settings.
    """
    check_launcher(config)
    section = config.trainer.model_dump(exclude=_OWN_FIELDS)
    # Without a GPU this must be set, or each rank under torchrun would train by itself.
    section["use_cpu"] = section["use_cpu"] or not torch.cuda.is_available()
    section["eval_strategy"] = "no" if section["eval_steps"] is None else "steps"
    if dry_run:
        section |= {"max_steps": 2, "logging_steps": 1, "eval_strategy": "no"}
    arguments = TrainingArguments(
        **section,
        output_dir=str(output_dir),
        save_strategy="no" if dry_run else "steps",
        seed=config.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        # The default replaces a NaN by an average of earlier losses and continues.
        logging_nan_inf_filter=False,
        average_tokens_across_devices=True,
        run_name=config.name,
        disable_tqdm=True,
    )
    # Trackers are called by `trainer.tracking`; Hugging Face would add its own, also by itself (Kubeflow's).
    arguments.report_to = []
    _check_world_size(config, arguments)
    return arguments


def _check_world_size(config: RunConfig, arguments: TrainingArguments) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != launched:
        raise RunError(f"{launched} processes were launched, but this one sees {arguments.world_size} of them")
    problem = world_size_problem(config.trainer.world_size)
    if problem is not None:
        raise RunError(problem)


def on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """A copy without `DataParallel`, Hugging Face's choice for several GPUs, which assigns scans to wrong samples."""
    arguments = copy(arguments)
    num_devices = arguments.n_gpu  # initialises the devices on first use
    if num_devices > 1:
        keep_one_device(arguments)
        logger.warning(
            "this process sees %d GPUs and uses one; to use all: torchrun --nproc-per-node %d -m umbrella_train ...",
            num_devices,
            num_devices,
        )
    return arguments
