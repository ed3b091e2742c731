"""The Python snippets of the README, run in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

pytestmark = pytest.mark.isolated

README = Path(__file__).parents[1] / "README.md"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_llava(folder):
    """Saves a LLaVA and a tokenizer with the words of the README's question."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["?", "What", "is", "the", "sex", "of", "this", "person"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    text = Qwen2Config(vocab_size=10, num_key_value_heads=1, eos_token_id=None, **SIZES)
    vision = SiglipVisionConfig(image_size=16, patch_size=4, **SIZES)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=9, vision_feature_select_strategy="full")
    ).save_pretrained(folder)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_readme_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    save_llava(tmp_path / "path/to/llava")
    torch.manual_seed(0)
    snippets = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == README.read_text().count("```python") > 5
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    output = capsys.readouterr().out
    assert "['rsfMRI']" in output
    assert "['T1', 'rsfMRI', 'FLAIR']" in output
    assert all(".FLAIR_patch_embed." in name for name in names["info"]["missing_keys"])
    assert {folder.name for folder in tmp_path.iterdir()} >= {"trained", "with-flair"}
