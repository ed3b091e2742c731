"""Samples with 0 to 3 scans in one batch: collator and model agree on which scan belongs to which sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import ORDER, build_collator, build_example, build_model

# The scans of one modality are in several samples, and one sample has two of one modality.
KINDS = [("dMRI", "T1", "T1"), (), ("T1",), ("rsfMRI", "dMRI"), ("dMRI", "rsfMRI", "T1")]
OWNERS = {"rsfMRI": [3, 4], "T1": [0, 0, 2, 4], "dMRI": [0, 3, 4]}


def collated(numbers: list[int], *, padding_side: str = "right") -> dict[str, Any]:
    collate = build_collator(padding_side=padding_side)
    batch = collate([build_example(KINDS[number], index=number) for number in numbers])
    # In double precision, rounding is far smaller than the effect of a scan at the wrong position.
    return {**batch, "pixel_values": {name: scans.double() for name, scans in batch["pixel_values"].items()}}


def losses_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The sum of each row's losses, shape (B,)."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(seed=0).double().eval()


# Rotary angles are computed in single precision, and left padding moves the positions.
@pytest.mark.parametrize(("padding_side", "tolerance"), [("right", 1e-10), ("left", 1e-8)])
def test_loss_of_a_sample_in_a_batch_equals_that_alone(model: Any, padding_side: str, tolerance: float) -> None:
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        together = losses_of(model, collated(order, padding_side=padding_side))
        alone = torch.cat([losses_of(model, collated([number])) for number in order])
    assert torch.allclose(together, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("modality", "first", "second"),
    [("T1", 0, 1), ("T1", 1, 2), ("T1", 2, 3), ("rsfMRI", 0, 1), ("dMRI", 0, 1), ("dMRI", 1, 2)],
)
def test_exchanged_scans_change_only_their_samples(model: Any, modality: str, first: int, second: int) -> None:
    batch = collated([0, 1, 2, 3, 4])
    with torch.no_grad():
        before = losses_of(model, batch)
        scans = batch["pixel_values"][modality]
        scans[[first, second]] = scans[[second, first]]
        moved = (losses_of(model, batch) - before).abs() > 1e-5
    assert set(moved.nonzero().flatten().tolist()) == {OWNERS[modality][first], OWNERS[modality][second]}


@pytest.mark.parametrize("number", range(5))
def test_answer_depends_only_on_the_scans_of_its_sample(model: Any, number: int) -> None:
    batch = collated([0, 1, 2, 3, 4])
    for scans in batch["pixel_values"].values():
        scans.requires_grad_()
    losses_of(model, batch)[number].backward()
    for modality, scans in batch["pixel_values"].items():
        reached = [bool(gradient.any()) for gradient in scans.grad]
        assert reached == [owner == number for owner in OWNERS[modality]]


def test_batch_of_all_samples_trains() -> None:
    model = build_model(seed=0).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batch = collated([0, 1, 2, 3, 4])
    losses = []
    for _ in range(8):
        output = model(**batch)
        assert not output.dummy_terms
        optimizer.zero_grad()
        output.loss.backward()
        norms = {
            name: max(
                float(parameter.grad.norm()) for key, parameter in model.named_parameters() if f"{name}_patch" in key
            )
            for name in ORDER
        }
        assert min(norms.values()) > 1e-8, norms
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.1
