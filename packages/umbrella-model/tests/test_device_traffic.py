"""Device traffic of a step: the number of operations, and no operation that makes the host wait."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from umbrella_model import pack_batch, supervised_index

# Operations whose result, or the shape of whose result, the host reads from the device.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")


class Recorder(TorchDispatchMode):
    """Counts operations by name, and those that use both host and device memory."""

    def __init__(self):
        super().__init__()
        self.counts, self.crossings = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        # 0-dim tensors on the host are passed with the kernel launch.
        if len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1:
            self.crossings[name] += 1
        return result


def operations(model, batch, device, *, backward=True):
    """Records the operations of one forward and backward, after moving the batch to the device."""
    batch["supervised_index"] = supervised_index(batch["labels"])
    model = model.to(device)
    volumes = {name: volume.to(device) for name, volume in batch.pop("pixel_values").items()}
    tensors = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with Recorder() as recorder:
        out = model(**tensors, pixel_values=volumes)
        if backward:
            (out.loss + sum(out.dummy_terms.values())).backward()
    return recorder


def packed(batch):
    return pack_batch(batch)


def padded(batch):
    return batch


# The meta device takes the same code path as a GPU; only the CPU has its own.
@pytest.mark.parametrize(("form", "attention"), [(padded, "sdpa"), (padded, "varlen"), (packed, "varlen")])
def test_number_of_operations_does_not_depend_on_batch_size(make_model, make_batch, form, attention):
    counts = []
    for size in (2, 3, 8):
        model = make_model().bfloat16()
        model.set_attn_implementation(attention)
        device = "cpu" if attention == "sdpa" else "meta"
        rows = [(3, "T1", 2), (1, "dMRI", "T1", 4)] * size
        counts.append(operations(model, form(make_batch(*rows)), device).counts)
    assert counts[0]["embedding_dense_backward"] == 1  # backward is included
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("rows", [((3, "T1", 2), (4,)), ((5,),), ((1, "dMRI", "rsfMRI", "T1", 2),)])
@pytest.mark.parametrize("form", [padded, packed])
def test_training_step_does_not_synchronise(make_model, make_batch, rows, form):
    model = make_model().bfloat16()
    model.set_attn_implementation("varlen")
    recorder = operations(model, form(make_batch(*rows)), "meta")
    counts = recorder.counts
    assert counts["embedding_dense_backward"] == 1  # backward is included
    assert recorder.crossings == {}
    assert {name: counts[name] for name in SYNCHRONISING if counts[name]} == {}
    assert counts["nonzero_static"] == len({item for row in rows for item in row if isinstance(item, str)})


@pytest.mark.parametrize("rows", [((3, "T1", 2), (4,)), ((5,), (5,))])
@pytest.mark.parametrize("side", ["left", "right"])
def test_evaluation_step_does_not_synchronise(make_model, make_batch, rows, side):
    model = make_model().eval().bfloat16()
    model.set_attn_implementation("varlen")
    with torch.no_grad():
        recorder = operations(model, make_batch(*rows, padding_side=side), "meta", backward=False)
    assert recorder.counts["embedding"] == 1
    assert recorder.crossings == {}
    assert {name: recorder.counts[name] for name in SYNCHRONISING if recorder.counts[name]} == {}
