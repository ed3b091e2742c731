"""Rows that cannot be encoded, and tokenizers that do not fit the model, are found before the first step."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_model.tokens import image_token_id
from umbrella_train.assembly.build import TrainingComponents, build_components
from umbrella_train.assembly.byte_tokenizer import build_byte_tokenizer
from umbrella_train.assembly.conversation_check import check_conversations, check_vocabulary
from umbrella_train.config import DatasetConfig, RunConfig, load_config
from umbrella_train.errors import RunError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def config(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(tmp_path_factory.mktemp("runs"))


def make_row(number: int, *turns: tuple[str, str]) -> dict[str, Any]:
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"id": f"row-{number}", "subject": f"sub-0{number}", "messages": messages}


ASKED = (("user", "Where?"), ("assistant", "left"))


@pytest.fixture
def problems_of(config: RunConfig, tmp_path: Path) -> Callable[..., list[str]]:
    """Returns the problems of rows with a chat template."""

    def find(rows: list[dict[str, Any]], *, template: str = CHATML, max_rows: int = 100, **data: Any) -> list[str]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        components: TrainingComponents = build_components(config)
        components.tokenizer.chat_template = template
        own = config.model_copy(update={"data": config.data.model_copy(update=data)})
        dataset = components.dataset(DatasetConfig(manifest=tmp_path / "rows.jsonl"), config=own, augment=False)
        try:
            check_conversations([dataset], max_rows=max_rows)
        except RunError as error:
            return str(error).splitlines()
        return []

    return find


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
         make_row(2, ("system", "Be exact."), *ASKED)),
        ("{% if messages|length > 2 %}{{ 1 // 0 }}{% endif %}" + CHATML, make_row(2, *ASKED, *ASKED)),
        (CHATML, make_row(2, ("user", "Where <|im_end|>?"), ("assistant", "left"))),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_encoded_is_named_by_manifest_line_and_subject(
    problems_of: Callable[..., list[str]], template: str, row: dict[str, Any]
) -> None:
    (problem,) = problems_of([make_row(1, *ASKED), row, make_row(3, *ASKED)], template=template)
    assert "rows.jsonl, line 2, subject sub-02: " in problem


def test_a_row_longer_than_max_length_is_named(problems_of: Callable[..., list[str]]) -> None:
    rows = [make_row(1, *ASKED), make_row(2, ("user", "Where? " * 30), ("assistant", "left"))]
    (problem,) = problems_of(rows, max_length=100)
    assert "line 2, subject sub-02: " in problem


def test_any_error_of_a_tokenizer_is_a_problem_of_its_row(
    problems_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, text: str) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setattr("umbrella_data.chat.encoder.ChatEncoder._encode_text", fail)
    assert ["line 1" in problem for problem in problems_of([make_row(1, *ASKED)])] == [True]


def test_an_answer_that_no_prompt_asks_for_is_named(
    problems_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from umbrella_data.chat.template import ChatTemplate

    own = ChatTemplate.prompt_layout
    monkeypatch.setattr(
        ChatTemplate, "prompt_layout", lambda self, shape, *, answer="t": (*own(self, shape, answer=answer), "<think>")
    )
    (problem,) = problems_of([make_row(1, *ASKED)])
    assert "line 1, subject sub-01: " in problem


def test_of_a_large_manifest_some_rows_are_checked(
    problems_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella_train.assembly.conversation_check._SOME_ROWS", 3)
    bad = ("user", "<|im_end|>")
    rows = [make_row(number, bad if number < 2 else ("user", "Where?"), ("assistant", "left")) for number in range(9)]
    assert len(problems_of(rows, max_rows=9)) == 2
    assert len(problems_of(rows, max_rows=8)) == 1


@pytest.mark.parametrize(
    ("num_embeddings", "token_id", "numbers"),
    [(250, 249, (250, 260)), (260, 10_000, (10_000, 260)), (260, -1, (-1, 260)), (260, 65, (65,))],
)
def test_tokens_without_an_embedding_are_rejected_with_the_numbers(
    num_embeddings: int, token_id: int, numbers: tuple[int, ...]
) -> None:
    tokenizer = build_byte_tokenizer()
    image = image_token_id(tokenizer)
    check_vocabulary(tokenizer, num_embeddings=260, image_token_id=image, source="a")
    with pytest.raises(RunError) as caught:
        check_vocabulary(tokenizer, num_embeddings=num_embeddings, image_token_id=token_id, source="a")
    assert all(str(number) in str(caught.value) for number in numbers)


def test_a_fresh_model_with_too_small_a_vocabulary_is_rejected_before_it_is_built(config: RunConfig) -> None:
    text_config = {**(config.model.text_config or {}), "vocab_size": 100}
    small = config.model_copy(update={"model": config.model.model_copy(update={"text_config": text_config})})
    with pytest.raises(RunError, match=r"\b260\b.*\b100\b"):
        build_components(small)


def test_a_tokenizer_without_padding_and_end_is_rejected() -> None:
    tokenizer = build_byte_tokenizer()
    image = image_token_id(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(RunError, match="padding"):
        check_vocabulary(tokenizer, num_embeddings=260, image_token_id=image, source="a")


def test_a_template_that_writes_the_date_needs_a_fixed_one_which_is_saved(
    config: RunConfig, cohort: DemoCohort, tmp_path: Path
) -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer.save_pretrained(tmp_path / "dated")
    source = DatasetConfig(manifest=cohort.test_manifest)
    dated = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": str(tmp_path / "dated")})})
    with pytest.raises(RunError, match=r"model\.template_date"):
        build_components(dated).dataset(source, config=dated, augment=False)

    section = dated.model.model_copy(update={"template_date": datetime.date(2025, 1, 31)})
    fixed = dated.model_copy(update={"model": section})
    components = build_components(fixed)
    components.dataset(source, config=fixed, augment=False)
    components.processor().save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = saved.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert text.startswith("31 Jan 2025\n")
    assert load_config(None, ["--model.template-date", "2025-01-31"]).model.template_date == section.template_date
