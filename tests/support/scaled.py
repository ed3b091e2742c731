"""A loss scaler on several ranks of a CPU, which the Trainer does not support: gradient norms after unscaling."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy import build_collator, build_example, build_model

from umbrella_train import DummyLoss


def scaled_norms(accumulation: int) -> dict[str, Any]:
    """One optimizer step of only T1 with DDP, bfloat16 autocast and a scaler around model and dummy loss."""
    model = DistributedDataParallel(build_model(seed=0).train())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for number in range(accumulation):
        batch = build_collator()([build_example(("T1",), index=number * 2 + dist.get_rank())])
        is_last = number == accumulation - 1
        with nullcontext() if is_last else model.no_sync():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(**batch)
            scaler.scale((out.loss + DummyLoss()(out.dummy_terms)) / accumulation).backward()
    scaler.unscale_(optimizer)
    tower = model.module.model.vision_tower
    norms = {
        name: torch.stack([parameter.grad.double().norm() for parameter in tower.patch_embed(name).parameters()]).norm()
        for name in tower.modality_order
    }
    return {"has_scaler": scaler.is_enabled(), **{name: norm.item() for name, norm in norms.items()}}


def write_norms(folder: Path) -> None:
    """As one of the ranks, for windows of one and eight micro-batches."""
    dist.init_process_group("gloo")
    results = {str(accumulation): scaled_norms(accumulation) for accumulation in (1, 8)}
    (folder / f"scaled-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
