"""`gradient_scale: present`: gradients averaged over the tokens of the samples with the modality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Train = Callable[..., Any]

# Supervised tokens by the index of a sample: 2, 3, 4, 5. only the third has dMRI.
BATCHES = [[("T1",), ("T1",)], [("T1", "dMRI"), ()]]
FACTORS = {"T1": 14 / 9, "dMRI": 14 / 4, "rsfMRI": 1.0}


def test_present_multiplies_a_patch_embeds_gradient_by_all_tokens_over_its_own(train_batches: Train) -> None:
    mean, present = (
        train_batches(BATCHES, gradient_scale=scale, gradient_accumulation_steps=2) for scale in ("mean", "present")
    )
    assert len(mean.gradients) == len(present.gradients) == 1
    for name, gradient in mean.gradients[0].items():
        owner = next((modality for modality in FACTORS if f"{modality}_patch_embed" in name), None)
        factor = 1.0 if owner is None else FACTORS[owner]
        assert torch.allclose(present.gradients[0][name], gradient * factor, rtol=1e-5, atol=1e-12), name
    # The log has the gradients that the optimizer gets.
    key = "grad/[dMRI]/vision_tower.dMRI_patch_embed"
    assert present.log[0][key] == pytest.approx(mean.log[0][key] * FACTORS["dMRI"], rel=1e-5)
