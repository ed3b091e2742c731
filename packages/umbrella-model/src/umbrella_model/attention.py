"""Attention implementation `varlen`: packed sequences without padding, and no device synchronisation.

Hugging Face's `sdpa` path reads the padding mask in every forward, which makes the host wait for the GPU, and builds a
dense block mask for packed sequences, which is several times the work. Select with `attn_implementation="varlen"`.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from umbrella_model.hf_compat import require

VARLEN = "varlen"
_VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters


def no_mask(like: Tensor, *, packed: bool = False) -> Tensor:
    """An empty 4-D mask: transformers passes it through unchanged, and `varlen` reads it as plain causal attention.

    Args:
        like: A tensor on the device.
        packed: Whether each row holds several conversations. `varlen` then requires `cu_seq_lens_q`, which the layers
            of some language models do not pass to attention.
    """
    return torch.empty(1, 1, 0, int(packed), dtype=torch.bool, device=like.device)


def check_right_padding(attention_mask: Tensor) -> None:
    """Rejects padding before tokens, which causal attention would see (on a GPU with an asynchronous assertion).

    Args:
        attention_mask: Shape (B, L).

    Raises:
        ValueError: A row has padding before a token.
    """
    require(
        (attention_mask[:, 1:] <= attention_mask[:, :-1]).all(),
        'attention_mask: a row has padding before a token; with attn_implementation="varlen", training batches must be '
        'padded on the right (padding_side="right")',
    )


def varlen_mask(
    *, q_length: int, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """The mask of `sdpa`; on a GPU it is built without a synchronisation to check for padding.

    Args:
        q_length: Number of queries. A decoding step has one: `generate` waits for every token anyway, and attention
            without a mask is faster.
        attention_mask: Shape (B, number of keys), padded on either side, or None.
        allow_is_causal_skip: Whether the mask may be omitted if it is purely causal.
        **kwargs: For transformers' `sdpa_mask`.

    Returns:
        Shape (B, 1, q_length, number of keys), True where a query sees a key; or None.
    """
    if attention_mask is not None and q_length > 1 and not _is_on_host(attention_mask):
        allow_is_causal_skip = False
    mask: Tensor | None = sdpa_mask(
        q_length=q_length, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )
    return mask


def _is_on_host(tensor: Tensor) -> bool:
    """Whether the host can read the tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' `AttentionInterface`.

    Args:
        module: The attention layer.
        query: Shape (B, heads, L, D).
        key: Shape (B, key heads, L, D).
        value: As `key`.
        attention_mask: A 4-D mask, or None or an empty one for plain causal attention.
        cu_seq_lens_q: For packed sequences (B = 1), the boundaries: int32, shape (sequences + 1,).
        max_length_q: Length of the longest packed sequence.
        **kwargs: As transformers passes them.

    Returns:
        Shape (B, L, heads, D), and None for the weights.

    Raises:
        ValueError: The layer has a sliding window and no mask; or the rows are packed and `cu_seq_lens_q` is missing,
            the layer has attention dropout, or it computes in float32 on a GPU.
    """
    has_no_mask = attention_mask is not None and attention_mask.numel() == 0
    if has_no_mask and attention_mask is not None:
        if attention_mask.shape[-1] == 1 and cu_seq_lens_q is None:
            raise ValueError(
                f"{type(module).__name__} did not receive cu_seq_lens_q for a packed batch: the layers of this "
                "language model do not pass it to attention; train on padded batches"
            )
        attention_mask = None
    if (has_no_mask or cu_seq_lens_q is not None) and kwargs.get("sliding_window") is not None:
        # Without a mask, nothing limits attention to the window.
        raise ValueError(
            f'{type(module).__name__} has a sliding window, which attn_implementation="{VARLEN}" does not support in '
            'training; use "sdpa"'
        )
    if cu_seq_lens_q is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    if kwargs.get("dropout"):
        raise ValueError(
            f"{type(module).__name__} has attention dropout, which packed sequences do not support; set it to 0 or "
            "train on padded batches"
        )
    assert max_length_q is not None
    scale: float | None = kwargs.get("scaling")
    packed = tuple(tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if query.device.type == "cpu":
        output = _attend_sequentially(*packed, boundaries=cu_seq_lens_q.tolist(), scale=scale)
    else:
        output = _attend_varlen_kernel(*packed, cu_seq_lens=cu_seq_lens_q, max_length=max_length_q, scale=scale)
    return output.unsqueeze(0), None


# Not compiled: every new number of sequences would trigger a recompilation.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_sequentially(
    query: Tensor, key: Tensor, value: Tensor, *, boundaries: list[int], scale: float | None
) -> Tensor:
    """One attention call per sequence; tensors of shape (T, heads, D)."""
    outputs = []
    for begin, end in pairwise(boundaries):
        q, k, v = (tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _attend_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seq_lens: Tensor, max_length: int, scale: float | None
) -> Tensor:
    """All sequences in one call of torch's flash kernel, in bfloat16 or float16; tensors of shape (T, heads, D)."""
    dtype = _kernel_dtype(value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    options: dict[str, Any] = {"scale": scale} if "scale" in _VARLEN_OPTIONS else {}
    if not options and scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5):
        raise ValueError(
            f"the attention layer has scale {scale}, and varlen_attn of torch {torch.__version__} has no scale "
            "argument; install a newer torch"
        )
    # The arguments for causal attention and grouped heads differ between versions of torch.
    options |= {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Newer versions prefer cuDNN, which makes a new plan for every shape, and packed rows rarely repeat a shape.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = varlen_attn(query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, **options)
    assert isinstance(output, Tensor)
    return output


def _kernel_dtype(value: Tensor) -> torch.dtype:
    """The kernel's dtype, from the values: rotary embeddings under autocast turn queries and keys into float32."""
    if value.dtype in (torch.bfloat16, torch.float16):
        return value.dtype
    kind = value.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    raise ValueError(
        f"packed sequences on a GPU need bfloat16 or float16, and this model computes in {value.dtype}: train under "
        "autocast (bf16: true), move the model to bfloat16, or pad the batch"
    )


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
