"""Asks a model the questions of a data set, by likelihood and in words, with their scans and with controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from umbrella_data import ConversationDataset
from umbrella_train.end_of_turn import EndOfTurn
from umbrella_train.evaluation.answer_space import AnswerSpace
from umbrella_train.evaluation.answers import make_prediction, scored_row
from umbrella_train.evaluation.asker import Asker, Batch
from umbrella_train.evaluation.controls import Question, plan_questions, repeated_questions
from umbrella_train.evaluation.predictions import Prediction, Reply

# A batch has one list of modalities: of several batches of rows in order, few are smaller than batch_size.
_BATCHES_AHEAD = 16


@dataclass(frozen=True)
class EvaluationResult:
    """Answers to the questions of a data set.

    Attributes:
        predictions: One per scored question, of all ranks, in the order of the questions.
        answers: Rows as of `scored_row`, of samples with and without an answer, in the order of the data set.
    """

    predictions: list[Prediction] = field(repr=False)
    answers: list[dict[str, Any]] = field(default_factory=list, repr=False)


def evaluate_dataset(
    model: nn.Module,
    dataset: ConversationDataset,
    *,
    tokenizer: Any,
    collator: Callable[[list[Any]], Batch],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device | str,
    subject_hash: Callable[[str], str],
    end_of_turn: EndOfTurn | None = None,
    spaces: Mapping[str, AnswerSpace] | None = None,
    grids: Mapping[str, Sequence[float]] | None = None,
    controls: bool = True,
    is_generated: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
    every_row: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Ask the questions of a data set and score the answers.

    Choices and numbers are answered by the likelihood of the possible answers; with their own scans, and where there
    are no such candidates (texts, answers after reasoning, numbers that training did not have), in words too.

    Args:
        model: An `UmbrellaForConditionalGeneration`.
        dataset: Samples with the questions.
        tokenizer: Decodes the answers.
        collator: Pads prompts on the left.
        batch_size: Number of prompts in a batch.
        max_new_tokens: Maximum length of an answer in tokens.
        device: Device of the model.
        subject_hash: Returns what replaces names of subjects and files in the predictions.
        end_of_turn: What ends an answer; with None, the model's own end-of-sequence tokens.
        spaces: The possible answers by `task_name`.
        grids: First, last and step of the candidate numbers of a task, in place of the training answers' range.
        controls: Whether to add shuffled, swapped and absent scans.
        is_generated: Whether questions with their own scans are also answered in words, beside the likelihoods.
        seed: Seed of the control scans.
        rank: Rank of this process.
        world_size: Number of processes; each generates a part, and all get the complete result.
        max_samples: Maximum number of samples for each list of modalities; those with an answer come first.
        every_row: Whether samples without an answer are asked too, and the result has `answers`.
        progress: Called with the numbers of completed and of all batches of this rank.
    """
    questions = plan_questions(dataset, controls=controls, seed=seed, max_samples=max_samples, every_row=every_row)
    asker = Asker(
        model,
        dataset,
        tokenizer,
        collator,
        max_new_tokens,
        device,
        end_of_turn or EndOfTurn(),
        spaces=spaces or {},
        grids=grids or {},
        max_rows=batch_size,
        generates_own=is_generated,
    )
    same = repeated_questions(questions, dataset)
    positions = [position for position in range(len(questions)) if position not in same]
    batches = list(_batches(dataset, questions, positions, batch_size=batch_size, is_generated=asker.is_generated))
    was_training = model.training
    model.eval()
    try:
        ask = partial(asker.ask, questions)
        answers = _ask_in_rounds(ask, batches, rank=rank, world_size=world_size, progress=progress)
    finally:
        model.train(was_training)
    asked = dict(_gather(answers, world_size=world_size))
    copied = {position: asked[first] for position, first in same.items() if first in asked}
    replies = dict(sorted((asked | copied).items()))
    predictions = [
        make_prediction(
            sample, sample.answer, reply, condition=questions[position].condition, subject_hash=subject_hash
        )
        for position, reply in replies.items()
        if (sample := dataset.sample(questions[position].index)).answer is not None
    ]
    own = {question.index: position for position, question in enumerate(questions) if question.condition == "accuracy"}
    rows = [scored_row(dataset.sample(index), replies.get(own[index])) for index in sorted(own)] if every_row else []
    return EvaluationResult(predictions, rows)


def generate_in_order(
    model: nn.Module,
    dataset: ConversationDataset,
    *,
    tokenizer: Any,
    collator: Callable[[list[Any]], Batch],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device | str,
    end_of_turn: EndOfTurn,
) -> Iterator[tuple[int, str]]:
    """Generate the answers to all samples, in order; only a few batches of them are in memory.

    Arguments are those of `evaluate_dataset`; the model is in evaluation mode.

    Yields:
        Index of the sample and the text.
    """
    asker = Asker(model, dataset, tokenizer, collator, max_new_tokens, device, end_of_turn)
    for start in range(0, len(dataset), batch_size * _BATCHES_AHEAD):
        end = min(start + batch_size * _BATCHES_AHEAD, len(dataset))
        questions = [Question(index, "accuracy") for index in range(start, end)]
        texts: dict[int, str] = {}
        for positions in _batches(dataset, questions, range(len(questions)), batch_size=batch_size):
            texts |= asker.generate(questions, positions)
        yield from ((questions[position].index, texts[position]) for position in sorted(texts))


def _batches(
    dataset: ConversationDataset,
    questions: Sequence[Question],
    positions: Sequence[int],
    *,
    batch_size: int,
    is_generated: Callable[[Question], bool] = lambda _: True,
) -> Iterator[list[int]]:
    """Batches of these positions of questions; all prompts of one have the same list of modalities, or no scans."""

    def kind(position: int) -> tuple[bool, bool, tuple[str, ...]]:
        question = questions[position]
        return question.condition == "no_scan", is_generated(question), dataset.modalities(question.index)

    kinds = {position: kind(position) for position in positions}
    for _, group in groupby(sorted(positions, key=kinds.__getitem__), key=kinds.__getitem__):
        members = list(group)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _ask_in_rounds(
    ask: Callable[[Sequence[int]], list[tuple[int, Reply]]],
    batches: Sequence[Sequence[int]],
    *,
    rank: int,
    world_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[int, Reply]]:
    """Positions and replies of this rank's batches; in each round every rank asks one batch."""
    num_rounds = -(-len(batches) // world_size)
    answers: list[tuple[int, Reply]] = []
    for turn in range(num_rounds):
        number = turn * world_size + rank
        # A rank without a batch repeats the last one and drops its answers: a sharded model needs every rank in each
        # forward.
        replies = ask(batches[min(number, len(batches) - 1)])
        if number < len(batches):
            answers += replies
        if progress is not None:
            progress(turn + 1, num_rounds)
    return answers


def _gather(answers: list[tuple[int, Reply]], *, world_size: int) -> list[tuple[int, Reply]]:
    if world_size == 1:
        return answers
    shares: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(shares, answers)
    return [answer for share in shares for answer in share]
