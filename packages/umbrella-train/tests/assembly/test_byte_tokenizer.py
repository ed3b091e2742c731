"""The byte-level tokenizer: lossless for any text, with the special tokens of ChatML."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbrella_model.tokens import IMAGE_TOKEN, image_token_id
from umbrella_train.assembly.byte_tokenizer import (
    TURN_END,
    TURN_START,
    build_byte_tokenizer,
    load_tokenizer,
)
from umbrella_train.errors import RunError

TEXTS = [
    "On which side is the lesion?",
    "  blanks \t\n before and behind  ",
    "Größe: 3 µm² – 左側の病変 🧠",
    "don't , stop .",
    "e\u0301 is not \u00e9",
    "".join(chr(code) for code in range(1, 256)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_one_token_per_byte_and_decodes_to_itself(text: str) -> None:
    tokenizer = build_byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_and_skipped_in_decoding() -> None:
    tokenizer = build_byte_tokenizer()
    ids = tokenizer.encode(f"{TURN_START}a{IMAGE_TOKEN}{TURN_END}", add_special_tokens=False)
    assert len(ids) == 4
    assert sum(token >= 256 for token in ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"
    assert tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_vocabulary_is_reproducible_and_saved(tmp_path: Path) -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for other in (build_byte_tokenizer(), load_tokenizer(None), load_tokenizer(str(tmp_path))):
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other(TEXTS[2])["input_ids"] == tokenizer(TEXTS[2])["input_ids"]
        assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_image_token_of_the_tokenizer_is_used_without_adding_one() -> None:
    tokenizer = build_byte_tokenizer()
    size = len(tokenizer)
    assert image_token_id(tokenizer) == tokenizer.get_vocab()[IMAGE_TOKEN]
    assert len(tokenizer) == size


def test_image_token_is_added_if_it_is_missing(tmp_path: Path) -> None:
    build_byte_tokenizer().save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace(IMAGE_TOKEN, "<|other|>"))
    tokenizer = load_tokenizer(str(tmp_path))
    size = len(tokenizer)
    token = image_token_id(tokenizer)
    assert token == size
    assert tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False) == [token]


def test_code_of_a_folder_is_not_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    (tmp_path / "config.json").write_text('{"model_type": "theirs"}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["theirs.Words", null]}}')
    (tmp_path / "theirs.py").write_text("class Words: ...")
    with pytest.raises(RunError, match=r"model\.tokenizer: the tokenizer of"):
        load_tokenizer(str(tmp_path), key="model.tokenizer")
    assert asked == []
