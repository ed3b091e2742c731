"""The cases of the engine matrix: every pair of settings, and all combinations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines import Case
from pairwise import all_combinations, pairwise
from toy import COMPOSED as COMPOSED_MODELS
from toy import UNPACKED

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
    model: str | None = None,
) -> Case:
    """One combination as a case."""
    dummy_loss: dict[str, Any] = {"absent": absent}
    if steps_as == "adam64":
        # The dummy gradient would differ by rounding; zero keeps only the graph.
        dummy_loss["scale"] = 0.0
    words = [engine, schedule, steps_as, str(accumulation), "ckpt" if gradient_checkpointing else "keep", absent]
    words += [learn, gradient_scale, "packed" if packing else "padded"]
    return Case(
        "-".join(words if model is None else [model, *words]),
        schedule=schedule,
        steps=4,
        accumulation=accumulation,
        optim="adamw_torch" if steps_as == "adam64" else "sgd",
        dummy_loss=dummy_loss,
        engine=engine,
        gradient_scale=gradient_scale,
        packing=packing,
        dtype="float64" if steps_as == "adam64" else "float32",
        model=model,
        learn=learn,
        arguments={"gradient_checkpointing": gradient_checkpointing, "bf16": steps_as == "bf16", "weight_decay": 0.01},
    )


TRIALS = [(build_case(**chosen), ranks) for chosen, ranks in ((c, c.pop("world_size")) for c in pairwise(MORE_OPTIONS))]
EVERY = [build_case(**combination) for combination in all_combinations(OPTIONS)]

# Composed models: language models that can be packed, and the others.
COMPOSED_OPTIONS: dict[str, Sequence[Any]] = {
    "model": [name for name in COMPOSED_MODELS if name not in UNPACKED],
    "engine": ["ddp", "fsdp2"],
    "schedule": ["different", "text", "random"],
    "learn": ["full", "lora", "align"],
    "accumulation": [1, 2],
    "gradient_checkpointing": [False, True],
    "packing": [False, True],
}
UNPACKED_OPTIONS = {**COMPOSED_OPTIONS, "model": UNPACKED, "packing": [False]}
COMPOSED = [
    build_case(steps_as="sgd32", absent="update", **chosen)
    for options in (COMPOSED_OPTIONS, UNPACKED_OPTIONS)
    for chosen in pairwise(options)
]
# Each engine with adapters on packed batches. The first step changes one matrix of an adapter, the second both.
TRIALS += [
    (Case(f"gpt2-{engine}", "random", steps=2, model="gpt2", learn="lora", packing=True, engine=engine), 2)
    for engine in ("ddp", "fsdp2")
]
