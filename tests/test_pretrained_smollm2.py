"""With the weights of a pretrained language model: `UMBRELLA_SMOLLM2` names its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.pretrained


def test_language_model_loads_and_answers(smollm2: Path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**question, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, question["input_ids"].shape[1] :])
