"""Language models: any decoder of `AutoModelForCausalLM` that takes embeddings, and the factors of its logits."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from umbrella_model.hf_compat import CACHE
from umbrella_model.key_checks import check_loaded_keys, check_source, mute_load_report

logger = logging.getLogger(__name__)

LanguageModelSource = PreTrainedModel | PretrainedConfig | str | Path
"""A loaded `...ForCausalLM`, a config (random weights), a folder or a name on the hub, or a GGUF file."""


def load_language_model(
    source: LanguageModelSource, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> Any:
    """A decoder with its head, in eval mode.

    Args:
        source: A loaded model is used as it is, its weights are not copied.
        dtype: Of the weights; None for that of the source.
        attn_implementation: As in Hugging Face's `from_pretrained`; None for that of the source.

    Raises:
        ValueError: The model cannot be composed with a vision encoder; see `check_language_model`. Or a weight is
            missing in the source, or has another shape there than in its config.
        OSError: The folder, file or hub repository does not exist.
    """
    check_source(source, kinds=(PreTrainedModel, PretrainedConfig), argument="language_model", suffixes=(".gguf",))
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if isinstance(source, PreTrainedModel):
        model: Any = source
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        _set_dtype(model, dtype)
    elif isinstance(source, PretrainedConfig):
        _check_kind(source)
        model = AutoModelForCausalLM.from_config(source, **options)
        _set_dtype(model, dtype)
    elif str(source).endswith(".gguf"):
        model = _load_gguf(Path(source), dtype=dtype, options=options)
    else:
        _check_kind(AutoConfig.from_pretrained(source, trust_remote_code=False))
        model = _load_weights(source, dtype="auto" if dtype is None else dtype, **options)
    check_language_model(model)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        # A config may say that a checkpoint with a head of its own is tied: resizing would replace the head.
        model.config.tie_word_embeddings = False
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == "gguf":
        del model.config.quantization_config  # the weights are dequantised
    return model.eval()


def _load_gguf(file: Path, *, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    """The weights of a GGUF file, dequantised."""
    try:
        return _load_weights(
            file.parent, gguf_file=file.name, dtype=torch.float32 if dtype is None else dtype, **options
        )
    except ImportError as error:
        raise ImportError(f"{file}: GGUF files need the package gguf; install it with: pip install gguf") from error


def _load_weights(source: str | Path, **options: Any) -> Any:
    """The model of a checkpoint that has all of its weights; transformers only warns of random ones."""
    with mute_load_report():
        result: Any = AutoModelForCausalLM.from_pretrained(
            str(source), output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    model, info = result
    check_loaded_keys(
        {**info, "unexpected_keys": ()},
        source=str(source),
        advice="it must be a whole model with its language-model head, and its config the one of its weights",
    )
    if unread := sorted(info["unexpected_keys"]):
        logger.warning(
            "%s: %d tensors are not read, since %s has no such ones (%s)",
            source, len(unread), type(model).__name__, ", ".join(unread[:8]),
        )  # fmt: skip
    return model


@torch.no_grad()
def _set_dtype(model: Any, dtype: torch.dtype | None) -> None:
    """Converts what a checkpoint has; other buffers, as the frequencies of rotary positions, stay in float32."""
    if dtype is not None:
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.data = tensor.data.to(dtype if tensor.is_floating_point() else tensor.dtype)


def _check_kind(config: Any) -> None:
    """Rejects configs of other kinds of model, before any weight is read."""
    kind = config.model_type
    if kind == "umbrella":
        raise ValueError(
            "it is a trained model of this package, not a language model alone; load it with from_pretrained (in a "
            "run's configuration: model.pretrained)"
        )
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder; the language model must be a decoder, such as Llama or Qwen")
    if config.get_text_config() is not config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{kind} is not a model that AutoModelForCausalLM loads as a decoder of text; pass a language model, such "
            "as Llama or Qwen, or load a LLaVA checkpoint with from_llava"
        )


def check_language_model(model: Any) -> None:
    """Rejects a model whose logits are not a linear head on a causal decoder that reads `inputs_embeds`.

    It is tried on a few tokens, since nothing in a config says so; a model on the meta device is not tried.

    Args:
        model: A `...ForCausalLM` of transformers.

    Raises:
        ValueError: With the name of the model and the reason.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    _check_kind(model.config)
    embedding: Any = model.get_input_embeddings()
    takes = inspect.signature(model.base_model.forward).parameters
    if "inputs_embeds" not in takes:
        raise ValueError(f"{name} does not take inputs_embeds, in which the scans are; use another language model")
    if CACHE not in takes:
        raise ValueError(
            f"{name} keeps no key-value cache, from which answers are generated (as state-space models without "
            "attention); use a language model with attention"
        )
    if embedding.embedding_dim != model.config.hidden_size:
        raise ValueError(
            f"{name} has token embeddings of width {embedding.embedding_dim} and layers of width "
            f"{model.config.hidden_size}; use a language model in which both are equal"
        )
    if embedding.weight.is_meta:
        return
    was_training = model.training
    model.eval()
    try:
        problem = _find_problem(model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"it fails on a few embeddings with a cache ({type(error).__name__}: {error})"
    finally:
        model.train(was_training)
    if problem is not None:
        raise ValueError(f"{name}: {problem}; use another language model")


@torch.no_grad()
def _find_problem(model: Any) -> str | None:
    """Compares logits on a few tokens with those of the decoder on embeddings and of the head, also with a cache."""
    decoder, embedding = model.base_model, model.get_input_embeddings()

    def logits_of(ids: Tensor, **options: Any) -> Tensor:
        hidden = decoder(inputs_embeds=embedding(ids), return_dict=True, **options).last_hidden_state
        return scale_logits(model.get_output_embeddings()(hidden), model.config)

    tokens = (torch.arange(1, 9, device=embedding.weight.device) % embedding.num_embeddings).unsqueeze(0)
    other_end = tokens.clone()
    other_end[0, -1] = 0
    expected = model(tokens).logits
    if not _is_close(logits_of(tokens, use_cache=False), expected):
        return (
            "its logits are not those of its decoder on inputs_embeds and of a linear head (it reads token ids "
            "elsewhere, or transforms the logits in its own way)"
        )
    if not _is_close(model(other_end).logits[:, :-1], expected[:, :-1]):
        return "it attends to later tokens, and must be a causal decoder"
    cache = DynamicCache(config=model.config)
    cached = [logits_of(part, use_cache=True, **{CACHE: cache}) for part in (tokens[:, :-1], tokens[:, -1:])]
    if not _is_close(torch.cat(cached, dim=1), expected):
        return "its logits with a cache, from which answers are generated, differ from those without"
    return None


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    scale = max(1.0, float(expected.abs().max()))
    return float((actual - expected).abs().max()) <= tolerance * scale


def build_head(config: PretrainedConfig) -> nn.Linear:
    """The language-model head of a text config, with a bias if this kind of model has one (Phi, GPT-J)."""
    with torch.device("meta"):
        head: Any = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def scale_logits(logits: Tensor, config: Any) -> Tensor:
    """What `...ForCausalLM` does to the logits after the head: a factor (Granite, Cohere), a soft limit (Gemma 2)."""
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    if (limit := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / limit) * limit
    return logits
