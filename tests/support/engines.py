"""Training cases that run in one process and on several ranks, for bitwise comparison."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from sabotage import SABOTAGES
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, rms_norm
from torch.utils.data import DataLoader
from toy import ORDER, ToyDataset, build_collator, build_composed, build_model
from transformers import TrainingArguments
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from umbrella_model import checkpoint_parts, set_trainable
from umbrella_train.assembly.acceleration import compile_layers, set_attention
from umbrella_train.config import DummyLossConfig
from umbrella_train.distributed.deepspeed import built_whole, is_partitioned
from umbrella_train.distributed.fsdp2 import whole_state_dict
from umbrella_train.trainer.trainer import UmbrellaTrainer


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: Name of its result files.
        schedule: Which modalities each rank sees at each step; see `kinds_of`.
        steps: Optimizer steps.
        accumulation: Micro-batches per rank and step.
        optim: Hugging Face's name of the optimizer; or muon, which steps matrices only.
        dummy_loss: Settings of the dummy loss.
        engine: As in `UmbrellaTrainer`, like the following two.
        gradient_scale: Tokens that gradients are averaged over.
        packing: Whether batches are packed.
        dtype: Of the parameters: float32, float64 or bfloat16.
        batch_size: Samples of a rank's micro-batch.
        model: A name of `toy.COMPOSED`; None for the model of `build_model`.
        learn: Parts or preset of `set_trainable`.
        compiler: Backend to compile the layers with.
        resume: A checkpoint to resume from.
        sabotage: A rule to break, see `sabotage.py`.
        parity_every: Steps between comparisons of the ranks.
        arguments: More training arguments.
        on_non_finite: As in `UmbrellaTrainer`.
        compare_drift: Whether all weights are copied at every step, to compute the drift from them.
    """

    name: str
    schedule: str = "different"
    steps: int = 6
    accumulation: int = 1
    optim: str = "sgd"
    dummy_loss: dict[str, Any] = field(default_factory=dict)
    engine: str = "ddp"
    gradient_scale: str = "mean"
    packing: bool = False
    dtype: str = "float32"
    batch_size: int = 2
    model: str | None = None
    learn: str | dict[str, str] | None = None
    compiler: str | None = None
    resume: str | None = None
    sabotage: str | None = None
    parity_every: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    on_non_finite: Literal["stop", "skip"] = "stop"
    compare_drift: bool = False


def kinds_of(schedule: str, *, step: int, rank: int, number: int, batch_size: int) -> list[tuple[str, ...]]:
    """The modalities of each sample of one rank's batch.

    Args:
        schedule: `different`: another modality on each rank; `same`: one modality on all; `text`: rank 0 has only
            text; `absent`: no batch has dMRI; `vanishes`: only the first step has dMRI; `returns`: every third step has
            dMRI, and none rsfMRI; `all`: every batch has all;
            `random`: any samples of 0 to 3 scans; `samples`: the same, random by the number of the sample, so that
            they do not depend on their distribution to batches and ranks.
        step: The optimizer step.
        rank: The rank.
        number: Number of the micro-batch in the whole run.
        batch_size: Samples of the micro-batch.
    """
    if schedule == "different":
        kind: tuple[str, ...] = (ORDER[(step + rank) % 3],)
        return [kind] * batch_size
    if schedule == "same":
        return [(ORDER[step % 3],)] * batch_size
    if schedule == "text":
        return [() if rank == 0 else (ORDER[step % 3],)] * batch_size
    if schedule == "absent" or (schedule == "vanishes" and step > 0):
        return [("T1",) if (step + rank) % 2 else ("rsfMRI",)] * batch_size
    if schedule == "returns":
        return [("T1", "dMRI") if rank and step % 3 == 0 else ("T1",)] * batch_size
    if schedule == "samples":
        draws = [random.Random(number * batch_size + place) for place in range(batch_size)]
        return [tuple(draw.choices(ORDER, k=draw.randint(0, 3))) for draw in draws]
    if schedule in ("all", "vanishes"):
        return [("T1", "dMRI"), ("rsfMRI",)]
    assert schedule == "random", schedule
    draw = random.Random(number)
    return [tuple(draw.choices(ORDER, k=draw.randint(0, 3))) for _ in range(batch_size)]


class ScheduledTrainer(UmbrellaTrainer):
    """Uses this rank's batches in the order of the data set."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches rank, rank + world_size, ..."""
        size = self.args.per_device_train_batch_size
        starts = range(0, len(self.train_dataset), size)
        mine = list(starts)[self.args.process_index :: self.args.world_size]
        batches = [list(range(start, start + size)) for start in mine]
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


class PlainDrift(TrainerCallback):
    """Drift of each modality after each step, from copies of all weights and the schedule of the data set."""

    def __init__(self, trainer: UmbrellaTrainer) -> None:
        self._trainer = trainer
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._copy()
        self._last_seen = dict.fromkeys(ORDER, self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset, now = self._trainer.train_dataset, self._copy()
        size = len(dataset) // args.max_steps
        seen = {name for kind in dataset.kinds[(state.global_step - 1) * size :][:size] for name in kind}
        self._last_seen.update(dict.fromkeys(seen, now))
        self.rows.append({name: self._distance(name, now) for name in ORDER})

    def _copy(self) -> dict[str, Tensor]:
        whole = whole_state_dict(self._trainer.model, keep=True)
        return {name: tensor.double() for name, tensor in whole.items() if "_patch_embed." in name}

    def _distance(self, modality: str, now: dict[str, Tensor]) -> float:
        prefix = f"model.vision_tower.{modality}_patch_embed."
        names = [name for name in now if name.startswith(prefix)]
        moved = torch.cat([(now[name] - self._last_seen[modality][name]).flatten() for name in names])
        return (moved.square().mean().sqrt() / self._start[f"{prefix}proj.weight"].std()).item()


def build_dataset(case: Case, *, world_size: int) -> ToyDataset:
    """Samples in the order (step, micro-batch, rank): one process that accumulates longer sees the same windows."""
    kinds: list[tuple[str, ...]] = []
    for number in range(case.steps * case.accumulation * world_size):
        step = number // (case.accumulation * world_size)
        kinds += kinds_of(case.schedule, step=step, rank=number % world_size, number=number, batch_size=case.batch_size)
    return ToyDataset(kinds)


def keep_double(model: Any) -> Any:
    """A model in float64 throughout: Hugging Face's loss and RMSNorm round to float32 on the way.

    In float32 a third of three times a gradient differs from the gradient, and Adam turns the difference into a step
    where a sum over tokens cancels.
    """
    model = model.double()
    model.loss_function = _loss_in_double
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = partial(_norm_in_double, module)
    return model


def _loss_in_double(logits: Tensor, *, shift_labels: Tensor, num_items_in_batch: Any, **_kwargs: Any) -> Tensor:
    return cross_entropy(logits, shift_labels, reduction="sum") / num_items_in_batch


def _norm_in_double(norm: Qwen2RMSNorm, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def build_case_model(case: Case) -> Any:
    """The initial model of a case, the same on every rank."""
    with built_whole():
        model = build_model(seed=0) if case.model is None else build_composed(case.model)
    set_attention(model, None)  # as in a run
    if case.learn is not None:
        torch.manual_seed(1)  # adapters have random initial weights
        set_trainable(model, case.learn)
    if case.dtype == "float64":
        return keep_double(model)
    return model.bfloat16() if case.dtype == "bfloat16" else model


def run_case(case: Case, *, output: Path, simulated_world_size: int | None = None) -> dict[str, Any]:
    """Trains one case and writes this rank's parameters and log.

    Args:
        case: What to train.
        output: Folder of the results.
        simulated_world_size: In one process: the number of ranks whose batches it accumulates.

    Returns:
        The content of `NAME-RANK.json`.
    """
    # From the environment: the first case of a process initialises torch.distributed.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = simulated_world_size or world_size
    model = build_case_model(case)
    settings = dict(case.arguments)
    if settings.pop("gradient_checkpointing", False):
        # As in a run.
        checkpoint_parts(model, ("vision_tower", "language_model"))
    if case.compiler is not None:
        torch._dynamo.reset()
        compile_layers(model, backend=case.compiler)
    arguments = TrainingArguments(
        output_dir=str(output / f"{case.name}-run"),
        max_steps=case.steps,
        per_device_train_batch_size=case.batch_size,
        gradient_accumulation_steps=case.accumulation * ranks // world_size,
        optim="sgd" if case.optim == "muon" else case.optim,
        **{
            "learning_rate": 0.05 if case.optim == "sgd" else 1e-3,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "ddp_find_unused_parameters": False,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )
    trainer = ScheduledTrainer(
        model=model,
        args=arguments,
        train_dataset=build_dataset(case, world_size=ranks),
        data_collator=build_collator(),
        dummy_loss=DummyLossConfig(**case.dummy_loss),
        engine=case.engine,
        gradient_scale=case.gradient_scale,
        packing=case.packing,
        parity_every=case.parity_every,
        on_non_finite=case.on_non_finite,
    )
    if case.sabotage is not None:
        SABOTAGES[case.sabotage](trainer)
    trainer.remove_callback(PrinterCallback)
    if case.optim == "muon":
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        # Two iterations: on shards, each of the five by default takes long.
        trainer.optimizer = torch.optim.Muon(matrices, lr=arguments.learning_rate, ns_steps=2)
    plain = PlainDrift(trainer)
    if case.compare_drift:
        trainer.add_callback(plain)
    result: dict[str, Any] = {"case": asdict(case), "error": None, "warnings": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train(resume_from_checkpoint=case.resume)
        except (RuntimeError, ValueError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exception(error)
    result["warnings"] = [str(item.message) for item in caught]
    result["log"] = trainer.state.log_history
    result["drift"] = plain.rows
    rank = arguments.process_index
    result["parameters"] = [name for name, _ in model.named_parameters()]
    result["num_sharded"] = sum(isinstance(each, DTensor) or is_partitioned(each) for each in model.parameters())
    result["device"] = str(arguments.device)
    result["backend"] = dist.get_backend() if dist.is_initialized() else None
    result["has_scaler"] = trainer.accelerator.scaler is not None
    (output / f"{case.name}-{rank}.json").write_text(json.dumps(result))
    if result["error"] is not None and (case.engine == "fsdp2" or trainer.is_deepspeed_enabled):
        # The other ranks wait in a collective that is not called here: they cannot end normally.
        os._exit(1)
    # A state dict shares memory between tied weights: each tensor is copied.
    state = {name: tensor.clone().contiguous() for name, tensor in _whole_state(trainer, model).items()}
    for name, parameter in model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                state[f"{name}/{key}"] = whole.clone().contiguous()
    save_file(state, output / f"{case.name}-{rank}.safetensors")
    return result


def _whole_state(trainer: UmbrellaTrainer, model: torch.nn.Module) -> dict[str, Tensor]:
    """The unsharded parameters; under ZeRO-3 only on the first rank."""
    if not trainer.is_deepspeed_enabled:
        return whole_state_dict(model, keep=True)
    return trainer.accelerator.get_state_dict(trainer.deepspeed) or {}


def run_cases(cases: Sequence[Case], output: Path) -> None:
    """Runs cases, one after the other, as one of the ranks."""
    torch.set_num_threads(1)
    for case in cases:
        run_case(case, output=output)
        if case is cases[0]:
            # As in conftest.py: Accelerate collects at the end of each training, and the first one imports the most.
            gc.freeze()


def main(arguments: Sequence[str]) -> None:
    """Runs a list of cases on every rank: `torchrun engines.py CASES.json OUTPUT`."""
    run_cases([Case(**entry) for entry in json.loads(Path(arguments[0]).read_text())], Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
