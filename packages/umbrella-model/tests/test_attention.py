"""Attention `varlen`: the arguments of the GPU kernel, checked with a reference implementation, and errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from umbrella_model import attention, pack_batch
from umbrella_model.attention import varlen_attention

ROWS = ((3, "T1", 2), (1, "dMRI", "rsfMRI", 1, "T1", 3), (6,), (2, "T1", "T1", 4))
BOUNDARIES = [0, 3, 4, 11]


def reference(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    scale=None, window_size=(-1, -1), is_causal=False, enable_gqa=False,
):  # fmt: skip
    """Attention by its formula; positions outside every sequence stay NaN."""
    assert {tensor.dtype for tensor in (query, key, value)} <= {torch.bfloat16, torch.float16}
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] in (-1, 0)
    assert window_size[0] == -1
    repeats = query.shape[1] // key.shape[1]
    output = torch.full_like(query, torch.nan)
    for (begin, end), (key_begin, key_end) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        assert end - begin <= max_q
        assert key_end - key_begin <= max_k
        q = query[begin:end].float()
        k, v = (tensor[key_begin:key_end].float().repeat_interleave(repeats, dim=1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal or window_size[1] == 0:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        output[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(output.dtype)
    return output


@pytest.fixture(params=[("scale", "window_size", "enable_gqa"), ("scale", "is_causal"), ("is_causal",)])
def kernel(request, monkeypatch):
    """Replaces the kernel with the reference, with the options of several versions of torch."""
    monkeypatch.setattr(attention, "_VARLEN_OPTIONS", request.param)

    def only_known(*args, **options):
        assert set(options) <= set(request.param)
        return reference(*args, **options)

    monkeypatch.setattr(attention, "varlen_attn", only_known)
    return request.param


def heads(*, dtype=torch.bfloat16, key_heads=2):
    generator = torch.Generator().manual_seed(0)
    sizes = (4, key_heads, key_heads)
    return [torch.randn(BOUNDARIES[-1], count, 8, generator=generator).to(dtype) * 2 for count in sizes]


def run_kernel(query, key, value, *, boundaries=BOUNDARIES, scale=None):
    max_length = max(end - begin for begin, end in pairwise(boundaries))
    cu_seq_lens = torch.tensor(boundaries, dtype=torch.int32)
    return attention._attend_varlen_kernel(
        query, key, value, cu_seq_lens=cu_seq_lens, max_length=max_length, scale=scale
    )


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_kernel_call_equals_sequential_attention(kernel, key_heads, scale):
    if "scale" not in kernel and scale is not None:
        pytest.skip("this kernel takes no scale")
    tensors = heads(key_heads=key_heads)
    expected = attention._attend_sequentially(*tensors, boundaries=BOUNDARIES, scale=scale)
    torch.testing.assert_close(run_kernel(*tensors, scale=scale), expected, atol=0.03, rtol=0.03)


def test_unsupported_scale_raises_unless_it_is_the_default(monkeypatch):
    monkeypatch.setattr(attention, "_VARLEN_OPTIONS", ("is_causal", "enable_gqa"))
    monkeypatch.setattr(attention, "varlen_attn", reference)
    tensors = heads()
    torch.testing.assert_close(run_kernel(*tensors, scale=8**-0.5), run_kernel(*tensors))
    with pytest.raises(ValueError, match=r"scale 0\.05"):
        run_kernel(*tensors, scale=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_inputs_have_one_half_dtype_when_rotary_embeddings_give_float32(kernel, dtype):
    query, key, value = heads(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        mixed = run_kernel(query, key, value.to(dtype))
        all_float32 = run_kernel(query, key, value)
    assert mixed.dtype == all_float32.dtype == dtype
    expected = attention._attend_sequentially(query, key, value, boundaries=BOUNDARIES, scale=None)
    torch.testing.assert_close(mixed.float(), expected, atol=0.05, rtol=0.05)
    assert run_kernel(query, key, value.to(dtype)).dtype == dtype


def test_float32_raises_without_autocast(kernel):
    with pytest.raises(ValueError, match=r"torch\.float32"):
        run_kernel(*heads(dtype=torch.float32))


@pytest.mark.parametrize("is_autocast", [False, True])
def test_packed_step_with_the_kernel_equals_the_padded_step(kernel, make_model, make_batch, monkeypatch, is_autocast):
    batch = make_batch(*ROWS)
    model = make_model() if is_autocast else make_model().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        expected = model(**batch)
        model.set_attn_implementation("varlen")
        calls = []

        def attend_as_on_gpu(*tensors, boundaries, scale):
            calls.append(boundaries)
            return run_kernel(*tensors, boundaries=boundaries, scale=scale)

        monkeypatch.setattr(attention, "_attend_sequentially", attend_as_on_gpu)
        out = model(**pack_batch(batch))
    assert len(calls) == 2  # one for each layer
    torch.testing.assert_close(out.supervised_logits, expected.supervised_logits, atol=0.06, rtol=0.06)


def test_sliding_window_without_a_mask_raises():
    query = torch.randn(1, 2, 6, 4)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    empty = attention.no_mask(query)
    for mask, options in ((None, {"cu_seq_lens_q": boundaries, "max_length_q": 4}), (empty, {})):
        with pytest.raises(ValueError, match="sliding window"):
            varlen_attention(torch.nn.Module(), query, query, query, mask, sliding_window=3, **options)
    mask = torch.ones(1, 1, 6, 6).tril().bool()
    varlen_attention(torch.nn.Module(), query, query, query, mask, sliding_window=3)


@pytest.mark.gpu
def test_packed_equals_padded_on_a_gpu(make_model, make_batch):
    batch = make_batch(*ROWS)
    found = []
    for implementation, inputs in (("sdpa", batch), ("varlen", pack_batch(batch))):
        model = make_model().bfloat16().cuda()
        model.set_attn_implementation(implementation)
        volumes = {name: volume.cuda().bfloat16() for name, volume in inputs["pixel_values"].items()}
        tensors = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        out = model(**{**tensors, "pixel_values": volumes})
        out.loss.backward()
        found.append((out.loss.float(), model.lm_head.weight.grad.float()))
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)
