"""The cases of the engine matrix: every two settings together, and all combinations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines import Case
from pairwise import all_combinations, pairwise

OPTIONS: dict[str, Sequence[Any]] = {
    "engine": ["ddp", "fsdp2"],
    "schedule": ["same", "different", "text", "absent", "all", "random"],
    "steps_as": ["sgd32", "adam64", "bf16"],
    "accumulation": [1, 2],
    "gradient_checkpointing": [False, True],
    "absent": ["update", "hold"],
}


def build_case(
    *, engine: str, schedule: str, steps_as: str, accumulation: int, gradient_checkpointing: bool, absent: str
) -> Case:
    dummy_loss: dict[str, Any] = {"absent": absent}
    if steps_as == "adam64":
        # The dummy gradient itself would differ by its own rounding; zero keeps the graph and nothing else.
        dummy_loss["scale"] = 0.0
    return Case(
        f"{engine}-{schedule}-{steps_as}-{accumulation}-{'ckpt' if gradient_checkpointing else 'keep'}-{absent}",
        schedule=schedule,
        steps=4,
        accumulation=accumulation,
        optim="adamw_torch" if steps_as == "adam64" else "sgd",
        dummy_loss=dummy_loss,
        engine=engine,
        dtype="float64" if steps_as == "adam64" else "float32",
        arguments={"gradient_checkpointing": gradient_checkpointing, "bf16": steps_as == "bf16", "weight_decay": 0.01},
    )


PAIRS = [build_case(**combination) for combination in pairwise(OPTIONS)]
# A modality's gradient over the tokens of its own samples, wherever they lie.
PAIRS += [
    Case(f"{engine}-present", "random", steps=4, accumulation=4, engine=engine, gradient_scale="present")
    for engine in ("ddp", "fsdp2")
]
PAIRS += [
    Case(
        f"{engine}-{learn}",
        "random",
        steps=4,
        optim="adamw_torch",
        dummy_loss={"scale": 0.0},
        engine=engine,
        dtype="float64",
        learn=learn,
    )
    for engine in ("ddp", "fsdp2")
    for learn in ("lora", "patch_embed_only")
]
EVERY = [build_case(**combination) for combination in all_combinations(OPTIONS)]
