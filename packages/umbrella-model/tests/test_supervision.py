"""Logits at supervised positions only: equal loss and gradients, less memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from umbrella_model import supervised_index
from umbrella_model.supervision import gather_supervised

ROWS = ((3, "T1", 2), (1, "dMRI", "rsfMRI", 1, "T1", 3), (6,))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of rows that one operation returned with the vocabulary as its last axis."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_weight = func is torch.ops.aten.t.default
        if (
            not is_weight
            and isinstance(out, torch.Tensor)
            and out.ndim
            and out.shape[-1] == self.vocabulary
            and out.is_floating_point()
        ):
            self.rows = max(self.rows, out.numel() // self.vocabulary)
        return out


def test_supervised_index_has_the_positions_before_labels():
    labels = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, 8]])
    assert supervised_index(labels).tolist() == [1, 2, 6]  # the first token of a row is never predicted
    assert supervised_index(labels, multiple_of=4).tolist() == [1, 2, 6, -1]
    assert supervised_index(torch.full((2, 3), -100)).tolist() == []


def test_gather_returns_hidden_states_and_next_tokens():
    labels = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, 8]])
    hidden = torch.arange(8.0).view(2, 4, 1)
    chosen, targets = gather_supervised(hidden, labels, torch.tensor([1, 2, 6, -1]))
    assert chosen[:3, 0].tolist() == [1, 2, 6]
    assert targets.tolist() == [5, 6, 8, -100]


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 10}])
@pytest.mark.parametrize("multiple_of", [None, 1, 64])
def test_loss_and_gradients_equal_those_over_all_logits(make_model, make_batch, options, multiple_of):
    model, batch = make_model(), make_batch(*ROWS)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    expected = total / options.get("num_items_in_batch", 6)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    if multiple_of is not None:
        options = options | {"supervised_index": supervised_index(batch["labels"], multiple_of=multiple_of)}
    out = model(**batch, **options)
    torch.testing.assert_close(out.loss, expected)
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    for grad, reference in zip(ours, grads, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-6, rtol=1e-4)


def test_training_computes_logits_only_at_supervised_positions(make_model, make_batch):
    model, batch = make_model(), make_batch((40, "T1", 4), (44, "T1", 4))
    with LargestTensor(64) as largest:
        out = model(**batch)
        out.loss.backward()
    assert largest.rows == 4
    assert out.logits is None
    assert out.supervised_logits.shape == (4, 64)


def test_evaluation_computes_all_logits_unless_given_an_index(make_model, make_batch):
    model, batch = make_model(), make_batch(*ROWS)
    trained = model(**batch)
    evaluated = model.eval()(**batch)
    assert evaluated.logits.shape == (*batch["input_ids"].shape, 64)
    assert evaluated.supervised_logits is None
    torch.testing.assert_close(evaluated.loss, trained.loss)
    index = supervised_index(batch["labels"])
    torch.testing.assert_close(trained.supervised_logits, evaluated.logits.flatten(0, 1)[index])
    named = model(**batch, supervised_index=index)
    assert named.logits is None
    torch.testing.assert_close(named.supervised_logits, trained.supervised_logits)


def test_a_batch_without_labels_has_zero_loss(make_model, make_batch):
    model, batch = make_model(), make_batch(*ROWS)
    batch["labels"][:] = -100
    out = model(**batch, num_items_in_batch=8)
    assert out.loss.item() == 0.0
    (out.loss + sum(out.dummy_terms.values())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
