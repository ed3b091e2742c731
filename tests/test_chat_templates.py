"""A tiny model learns numbers and words with chat templates of several families, and says them when it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat import KINDS, TEMPLATES, build_tokenizer

from umbrella_train import load_config, train

# One of each way to begin an answer: after a blank, a line break, a reasoning block, and a token that is neither.
IN_CI = [("Vicuna", "digits split"), ("Llama-3", "byte level"), ("Qwen3", "digits split"), ("Mistral", "metaspace")]
SLOW = [(name, kind) for name in TEMPLATES for kind in KINDS if (name, kind) not in IN_CI]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_rows() -> list[dict[str, Any]]:
    """Eight questions: numbers of one to three digits, and words; the last rows have an earlier exchange."""
    rows = []
    subjects = ["the brain", "the left one", "this person", "it", "yes", "no", "the answer", "the user"]
    answers = ["4", "41", "7", "118", "female", "male", "male", "female"]
    for number, word in enumerate(answers):
        is_choice = word.isalpha()
        scored = {"type": "choice", "options": ["female", "male"]} if is_choice else {"type": "number", "unit": "years"}
        turns = [("user", f"{'Which' if is_choice else 'How old'} is {subjects[number]}?"), ("assistant", word)]
        earlier = [("user", "Is it a brain?"), ("assistant", "yes")] if number in (3, 7) else []
        rows.append({
            "id": f"r{number}",
            "subject": f"sub-{number}",
            "task": scored["type"],
            "messages": [{"role": role, "content": text} for role, text in (*earlier, *turns)],
            "answer": {**scored, "value": word if is_choice else float(word)},
        })  # fmt: skip
    return rows


@pytest.mark.parametrize(("name", "kind"), [*IN_CI, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_answers_are_learned_and_given(tmp_path: Path, name: str, kind: str) -> None:
    build_tokenizer(kind, TEMPLATES[name]).save_pretrained(tmp_path / "tokenizer")
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    settings = {
        "name": "templates",
        "output_dir": str(tmp_path / "runs"),
        "report": {"enabled": False},
        "model": {
            "tokenizer": str(tmp_path / "tokenizer"),
            "text_config": {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True, **SIZES},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **SIZES},
            "modalities": {"T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]}},
        },
        "data": {
            "train": [{"manifest": str(manifest)}],
            "evaluation": [{"manifest": str(manifest)}],
            "allow_overlap": True,
        },
        "trainer": {
            "max_steps": 100,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "lr_scheduler_type": "linear",
            "use_cpu": True,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    folder = train(load_config(tmp_path / "run.yaml"))
    assert folder is not None
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    answers = [row["messages"][-1]["content"] for row in make_rows()]
    own = [row for row in predictions if row["condition"] == "accuracy"]
    assert [row["generated"] for row in own] == answers
    # By the likelihood of the options. With few numbers in training, others are likely too, and their mean says little.
    for row in own:
        assert row["predicted"] == (row["answer"] if row["type"] == "choice" else row["expected"])
