"""The cases of the engine matrix: every pair of settings, and all combinations."""

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


# Other settings of every engine, and the number of ranks.
MORE_OPTIONS: dict[str, Sequence[Any]] = {
    **OPTIONS,
    "learn": ["full", "lora", "patch_embed_only"],
    "gradient_scale": ["mean", "present"],
    "packing": [False, True],
    "world_size": [2, 3],
}


def build_case(
    *,
    engine: str,
    schedule: str,
    steps_as: str,
    accumulation: int,
    gradient_checkpointing: bool,
    absent: str,
    learn: str = "full",
    gradient_scale: str = "mean",
    packing: bool = False,
) -> Case:
    """One combination as a case."""
    dummy_loss: dict[str, Any] = {"absent": absent}
    if steps_as == "adam64":
        # The dummy gradient would differ by rounding; zero keeps only the graph.
        dummy_loss["scale"] = 0.0
    words = [engine, schedule, steps_as, str(accumulation), "ckpt" if gradient_checkpointing else "keep", absent]
    return Case(
        "-".join([*words, learn, gradient_scale, "packed" if packing else "padded"]),
        schedule=schedule,
        steps=4,
        accumulation=accumulation,
        optim="adamw_torch" if steps_as == "adam64" else "sgd",
        dummy_loss=dummy_loss,
        engine=engine,
        gradient_scale=gradient_scale,
        packing=packing,
        dtype="float64" if steps_as == "adam64" else "float32",
        learn=learn,
        arguments={"gradient_checkpointing": gradient_checkpointing, "bf16": steps_as == "bf16", "weight_decay": 0.01},
    )


TRIALS = [(build_case(**chosen), ranks) for chosen, ranks in ((c, c.pop("world_size")) for c in pairwise(MORE_OPTIONS))]
EVERY = [build_case(**combination) for combination in all_combinations(OPTIONS)]
