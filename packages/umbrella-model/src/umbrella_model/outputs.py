"""What the model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast


@dataclass
class UmbrellaModelOutput(BaseModelOutputWithPast):
    """Hidden states of the language model, and the dummy terms of absent modalities."""

    dummy_terms: dict[str, Tensor] | None = None


@dataclass
class UmbrellaCausalLMOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output, and for each modality absent from a training batch its dummy term.

    Attributes:
        logits: Shape (B, L, vocabulary); None where a training step computed them at supervised positions alone.
        supervised_logits: Shape (K, vocabulary): those of the positions whose next token carries loss.
        dummy_terms: 0-dim float32 tensors, sum / sqrt(N) over the N trainable elements of each absent patch embed.
    """

    supervised_logits: Tensor | None = None
    dummy_terms: dict[str, Tensor] | None = None
