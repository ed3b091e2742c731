"""Asks a model single questions of a data set: the likelihoods of possible answers, and the answer in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbrella_data import ConversationDataset, ScanError
from umbrella_train.end_of_turn import GREEDY, EndOfTurn
from umbrella_train.errors import RunError
from umbrella_train.evaluation.answer_space import AnswerSpace, find_answer_space
from umbrella_train.evaluation.controls import Question
from umbrella_train.evaluation.likelihood import Tokens, score_candidates
from umbrella_train.evaluation.predictions import Reply
from umbrella_train.evaluation.regression import expected_value

Batch = Mapping[str, Any]

# Most questions of a task are asked with the same few texts.
_MAX_KEPT_CANDIDATES = 256


@dataclass(frozen=True)
class Asker:
    """Asks questions about one data set; the fields are arguments of `evaluate_dataset`."""

    model: Any
    dataset: ConversationDataset
    tokenizer: Any
    collator: Callable[[list[Any]], Batch]
    max_new_tokens: int
    device: torch.device | str
    end: EndOfTurn
    spaces: Mapping[str, AnswerSpace] = field(default_factory=dict)
    grids: Mapping[str, Sequence[float]] = field(default_factory=dict)
    max_rows: int = 1
    generates_own: bool = True
    known: dict[Any, list[Tokens] | None] = field(default_factory=dict)

    def is_generated(self, question: Question) -> bool:
        """Whether the answer is wanted in words."""
        is_own = question.condition == "accuracy"
        return (is_own and self.generates_own) or self._candidates(question) is None

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], positions: Sequence[int]) -> list[tuple[int, Reply]]:
        """Positions and replies of one batch of questions, without skipped ones."""
        examples = _prompts(self.dataset, {position: questions[position] for position in positions})
        if not examples:
            return []
        inputs = self._collate(examples)
        is_generated = self.is_generated(questions[next(iter(examples))])
        texts = self._generate(inputs) if is_generated else [None] * len(examples)
        tokens = {position: self._candidates(questions[position]) for position in examples}
        scores: dict[int, tuple[float, ...]] = dict.fromkeys(examples, ())
        if any(tokens.values()):
            candidates = [tokens[position] or [] for position in examples]
            found = score_candidates(self.model, inputs, candidates, max_rows=self.max_rows)
            scores = {position: tuple(each) for position, each in zip(examples, found, strict=True)}
        return [
            (position, self._reply(questions[position], text, scores[position], tokens[position]))
            for position, text in zip(examples, texts, strict=True)
        ]

    @torch.no_grad()
    def generate(self, questions: Sequence[Question], positions: Sequence[int]) -> list[tuple[int, str]]:
        """Positions and texts of one batch of questions, without skipped ones."""
        examples = _prompts(self.dataset, {position: questions[position] for position in positions})
        return list(zip(examples, self._generate(self._collate(examples)), strict=True)) if examples else []

    def _collate(self, examples: Mapping[int, Any]) -> dict[str, Any]:
        batch = self.collator(list(examples.values()))
        return {key: _to_device(value, self.device) for key, value in batch.items() if key != "labels"}

    def _generate(self, inputs: Mapping[str, Any]) -> list[str]:
        stops = {"eos_token_id": list(self.end.stop_ids)} if self.end.stop_ids else {}
        output = self.model.generate(**inputs, **stops, max_new_tokens=self.max_new_tokens, **GREEDY)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self.end.decode(tokens, self.tokenizer) for tokens in new]

    def _reply(
        self, question: Question, text: str | None, scores: tuple[float, ...], tokens: list[Tokens] | None
    ) -> Reply:
        answer = self.dataset.sample(question.index).answer
        if not scores or tokens is None or answer is None:
            return Reply(generated=text)
        if not np.isfinite(scores).all():
            raise RunError(
                f"sample {question.index + 1} of the evaluation data, condition {question.condition}: the model's "
                "log-likelihood of a possible answer is not finite; look for weights or scans with values that are not "
                "finite, or compute in float32 or bfloat16"
            )
        if answer.type == "choice":
            return Reply(text, option_scores=scores, option_lengths=tuple(map(len, tokens)))
        mean, lower, upper = expected_value(np.array(self._numbers(question)), np.array(scores))
        return Reply(text, expected=mean, interval=(lower, upper))

    def _numbers(self, question: Question) -> list[float]:
        """Candidate numbers as they are written, each once; none if training did not have such numbers."""
        sample = self.dataset.sample(question.index)
        space = find_answer_space(self.spaces, sample)
        return [] if space is None else space.numbers(self.grids.get(sample.task))

    def _candidates(self, question: Question) -> list[Tokens] | None:
        """Tokens of the options, or of the candidate numbers; None if the answer is only generated."""
        sample = self.dataset.sample(question.index)
        answer, space = sample.answer, find_answer_space(self.spaces, sample) or AnswerSpace()
        if answer is None or answer.type == "text":
            return None
        if answer.type == "choice":
            texts = space.option_texts(answer.options)
        else:
            texts = [space.number_text(number) for number in self._numbers(question)]
        if not texts:
            return None
        with_scans = question.condition != "no_scan"
        turns = tuple((turn.role, len(turn.scans), turn.text) for turn in sample.messages)
        key = (turns if with_scans else tuple((role, 0, text) for role, _, text in turns), tuple(texts))
        if key not in self.known:
            if len(self.known) >= _MAX_KEPT_CANDIDATES:
                self.known.clear()
            try:
                self.known[key] = self.dataset.candidate_tokens(question.index, texts, with_scans=with_scans)
            except ValueError as error:  # an option has markup
                raise RunError(str(error)) from error
        return self.known[key]


def _prompts(dataset: ConversationDataset, questions: Mapping[int, Question]) -> dict[int, Any]:
    """Examples by position, without skipped ones, whose scans are unusable."""
    examples = {}
    for position, question in questions.items():
        try:
            examples[position] = dataset.prompt(
                question.index, scans_from=question.scans_from, with_scans=question.condition != "no_scan"
            )
        except ScanError as error:
            dataset.leave_out(question.index if question.scans_from is None else question.scans_from, error)
        except ValueError as error:  # the text has markup, or is too long
            raise RunError("\n".join([str(error), *getattr(error, "__notes__", ())])) from error
    return examples


def _to_device(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_device(entry, device) for key, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
