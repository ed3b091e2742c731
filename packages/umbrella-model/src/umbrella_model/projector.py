"""The projector from vision features to token embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class LinearProjector(nn.Module):
    """One linear layer, as in the first LLaVA (Liu et al. 2023, arXiv:2304.08485)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(
            config.vision_config.hidden_size, config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )

    def forward(self, features: Tensor) -> Tensor:
        """Shape (..., width of the encoder) to (..., width of the language model)."""
        projected: Tensor = self.linear(features)
        return projected


def build_projector(config: Any) -> nn.Module:
    """LLaVA-1.5's two layers (`projector: mlp`), or one (`linear`)."""
    return LinearProjector(config) if config.projector == "linear" else LlavaMultiModalProjector(config)
