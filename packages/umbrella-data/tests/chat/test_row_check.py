"""Rows are checked against a tokenizer, by the function and by `umbrella-data check --tokenizer`."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from chat import TEMPLATES, build_tokenizer

from umbrella_data.chat.encoder import ChatEncoder
from umbrella_data.chat.row_check import encoding_problems
from umbrella_data.cli import main
from umbrella_data.manifest.manifest import read_manifest

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"


@pytest.fixture
def check(tmp_path, capsys):
    """Returns the exit code and the output of `check` with a template, for rows that differ in the second one."""

    def run(template, second, *, tokenizer=None):
        build_tokenizer("byte level", template).save_pretrained(tmp_path / "tokenizer")
        asked = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "left"}]
        rows = [{"id": f"r{i}", "subject": f"sub-{i}", "messages": turns} for i, turns in enumerate((asked, second))]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["check", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tokenizer or tmp_path / "tokenizer")]
        code = main(words)
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


@pytest.mark.parametrize(
    "second",
    [
        [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "?"},
         {"role": "assistant", "content": "left"}],
        [{"role": "user", "content": "What is </s>?"}, {"role": "assistant", "content": "left"}],
    ],
)  # fmt: skip
def test_row_that_cannot_be_encoded_is_listed(check, second):
    code, said = check(NO_SYSTEM + TEMPLATES["ChatML"], second)
    assert code == 1
    assert "line 2, subject sub-1: " in said
    assert "line 1" not in said


def test_an_option_that_cannot_be_asked_is_listed(write_manifest):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "left"}]
    answers = [{"type": "choice", "options": ["left", other], "value": "left"} for other in ("right", "</s>", "a <b>")]
    rows = [{"id": f"r{i}", "subject": "s", "messages": turns, "answer": each} for i, each in enumerate(answers)]
    tokenizer = build_tokenizer("byte level", TEMPLATES["ChatML"])
    encoder = ChatEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), num_image_tokens={})
    assert [line for line, _ in encoding_problems(read_manifest(write_manifest(rows)), encoder)] == [2]


def test_rows_that_can_be_encoded_pass(check):
    code, said = check(TEMPLATES["ChatML"], [{"role": "user", "content": "?"}, {"role": "assistant", "content": "7"}])
    assert (code, "unusable rows" in said) == (0, False)


@pytest.mark.parametrize("template", ["{{ messages[0].content.nothing.more }}</s>", "{{ strftime_now('%Y') }}"])
def test_template_that_cannot_be_used_is_one_message(check, template):
    code, said = check(template + TEMPLATES["ChatML"], [])
    assert code == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_tokenizer_that_cannot_be_loaded_is_named(check, tmp_path):
    (tmp_path / "none").mkdir()
    code, said = check(TEMPLATES["ChatML"], [], tokenizer=tmp_path / "none")
    assert (code, str(tmp_path / "none") in said) == (1, True)
