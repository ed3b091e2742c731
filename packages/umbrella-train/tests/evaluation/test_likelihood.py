"""Log-likelihoods of candidates: equal to a plain loop, with few tokens through the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from umbrella_data import Example, ExampleScan, PaddingCollator
from umbrella_model import PatchEmbedConfig, UmbrellaConfig, UmbrellaForConditionalGeneration
from umbrella_train.evaluation.likelihood import Tokens, score_candidates

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 1},
    "llama": {},
    "gpt_neox": {"rotary_pct": 0.5},
    # A window shorter than the prompts.
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0},
    "phi3": {"num_key_value_heads": 1},
    "olmo2": {"num_key_value_heads": 1},
    "granite": {"num_key_value_heads": 1, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    # Absolute positions.
    "gpt2": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    # Recurrent states beside keys and values, or in layers without any.
    "falcon_h1": {"num_key_value_heads": 1, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "jamba": {"num_key_value_heads": 1, "num_experts": 1, "attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
}
# Limits the scores, which only eager attention does.
EAGER_ONLY = {"gemma2"}
IMAGE_TOKEN = 63
CANDIDATES: list[list[Tokens]] = [[(5,), (6, 7), (6, 8, 9), (10, 11)], [(12, 13, 14, 15)], []]


def make_model(kind: str) -> UmbrellaForConditionalGeneration:
    torch.manual_seed(0)
    words = {**SIZES, "vocab_size": 64, "initializer_range": 0.3, "pad_token_id": 0, **TEXT_MODELS[kind]}
    return UmbrellaForConditionalGeneration(
        UmbrellaConfig(
            modalities={"T1": PatchEmbedConfig((8, 8, 8), (4, 4, 4))},
            vision_config=AutoConfig.for_model("siglip_vision_model", **SIZES, vision_use_head=False),
            text_config=AutoConfig.for_model(kind, **words),
            image_token_index=IMAGE_TOKEN,
        )
    ).eval()


def prompt(number: int, *, num_words: int) -> Example:
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(1, IMAGE_TOKEN, (num_words,), generator=generator)
    scan = ExampleScan("T1", torch.randn(1, 8, 8, 8, generator=generator), start=1, num_tokens=8)
    ids = torch.cat([words[:1], torch.full((8,), IMAGE_TOKEN), words[1:]])
    return Example(input_ids=ids, labels=torch.full_like(ids, -100), scans=(scan,), index=number)


def plain_loop(model: Any, examples: list[Example], candidates: list[list[Tokens]]) -> list[list[float]]:
    """One forward pass over the whole conversation for each candidate."""
    collate = PaddingCollator(pad_token_id=0, modality_order=["T1"])
    scores: list[list[float]] = []
    for example, choices in zip(examples, candidates, strict=True):
        scores.append([])
        for tokens in choices:
            ids = torch.cat([example.input_ids, torch.tensor(tokens)])
            whole = Example(input_ids=ids, labels=torch.full_like(ids, -100), scans=example.scans, index=0)
            batch = collate([whole])
            batch["pixel_values"] = {"T1": batch["pixel_values"]["T1"].to(model.dtype)}
            with torch.no_grad():
                logits = model(**batch).logits[0].log_softmax(-1)
            start = len(example.input_ids)
            scores[-1].append(sum(float(logits[start + place - 1, token]) for place, token in enumerate(tokens)))
    return scores


def score(model: Any, examples: list[Example], candidates: list[list[Tokens]], *, max_rows: int) -> list[list[float]]:
    batch = PaddingCollator(pad_token_id=0, modality_order=["T1"], padding_side="left")(examples)
    batch["pixel_values"] = {"T1": batch["pixel_values"]["T1"].to(model.dtype)}
    return score_candidates(model, batch, candidates, max_rows=max_rows)


# Recurrent states are float32 in any dtype.
# Not eager in float64: it masks with the least float64 and computes the softmax in float32: padding becomes NaN.
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        ("sdpa", torch.float64, 1e-5),
        ("varlen", torch.float64, 1e-5),
        ("sdpa", torch.float32, 1e-4),
        ("eager", torch.float32, 1e-4),
    ],
)
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_scores_equal_a_plain_loop(kind: str, attention: str, dtype: torch.dtype, tolerance: float) -> None:
    if kind in EAGER_ONLY and attention != "eager":
        pytest.skip(f"{kind} has eager attention only")
    model = make_model(kind).to(dtype)
    model.set_attn_implementation({"text_config": attention})
    examples = [prompt(number, num_words=length) for number, length in enumerate((3, 7, 5))]
    expected = plain_loop(model, examples, CANDIDATES)
    for max_rows in (1, 2, 8):
        found = score(model, examples, CANDIDATES, max_rows=max_rows)
        assert [len(each) for each in found] == [4, 1, 0]
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=tolerance)


def test_the_language_model_computes_the_prompts_once_and_the_candidates_without_their_last_tokens() -> None:
    model = make_model("qwen2")
    examples = [prompt(number, num_words=5) for number in range(3)]
    counts: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    score(model, examples, CANDIDATES, max_rows=2)
    num_prompt = sum(len(example.input_ids) for example in examples)
    assert counts[0] == num_prompt
    assert sum(counts) == num_prompt + sum(len(tokens) - 1 for choices in CANDIDATES for tokens in choices)
