"""Generates a model's answers to the questions of a data set, with their scans and with controls, and scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from umbrella_data import ConversationDataset, ScanError
from umbrella_data.manifest.sample import Sample
from umbrella_train.end_of_turn import EndOfTurn
from umbrella_train.errors import RunError
from umbrella_train.evaluation.answers import modality_name, question_text, scored_row
from umbrella_train.evaluation.controls import Question, plan_questions
from umbrella_train.evaluation.metrics import Prediction, score_answer, summarise

Batch = Mapping[str, Any]

# A batch has one list of modalities: of several batches of rows in order, few are smaller than batch_size.
_BATCHES_AHEAD = 16


@dataclass(frozen=True)
class EvaluationResult:
    """Answers and their metrics.

    Attributes:
        metrics: As from `summarise`.
        predictions: One per scored question, of all ranks, in the order of the questions.
        answers: Rows as of `scored_row`, of samples with and without an answer, in the order of the data set.
    """

    metrics: dict[str, float]
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
    controls: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int | None = None,
    every_row: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Generate answers and score them.

    Args:
        model: With `generate(**batch, max_new_tokens, do_sample)`, which returns (B, L + new) token ids.
        dataset: Samples with the questions.
        tokenizer: Decodes the answers.
        collator: Pads prompts on the left.
        batch_size: Number of prompts in a batch.
        max_new_tokens: Maximum length of an answer in tokens.
        device: Device of the model.
        subject_hash: Returns the name of a subject in the predictions.
        end_of_turn: What ends an answer; with None, the model's own end-of-sequence tokens.
        controls: Whether to add shuffled, swapped and absent scans.
        seed: Seed of the control scans and the intervals.
        rank: Rank of this process.
        world_size: Number of processes; each generates a part, and all get the complete result.
        max_samples: Maximum number of samples for each list of modalities; those with an answer come first.
        every_row: Whether samples without an answer are asked too, and the result has `answers`.
        progress: Called with the numbers of completed and of all batches of this rank.
    """
    questions = plan_questions(dataset, controls=controls, seed=seed, max_samples=max_samples, every_row=every_row)
    asker = _Asker(model, dataset, tokenizer, collator, max_new_tokens, device, end_of_turn or EndOfTurn())
    batches = list(_batches(dataset, questions, batch_size=batch_size))
    was_training = model.training
    model.eval()
    try:
        ask = partial(asker.ask, questions)
        answers = _ask_in_rounds(ask, batches, rank=rank, world_size=world_size, progress=progress)
    finally:
        model.train(was_training)
    texts = dict(sorted(_gather(answers, world_size=world_size)))
    predictions = [
        _prediction(sample, questions[position], text, subject_hash=subject_hash)
        for position, text in texts.items()
        if (sample := dataset.sample(questions[position].index)).answer is not None
    ]
    own = {question.index: position for position, question in enumerate(questions) if question.condition == "accuracy"}
    rows = [scored_row(dataset.sample(index), texts.get(own[index])) for index in sorted(own)] if every_row else []
    return EvaluationResult(summarise(predictions, seed=seed), predictions, rows)


def merge_results(results: Sequence[EvaluationResult], *, seed: int = 0) -> EvaluationResult:
    """Combine the results of several data sets."""
    predictions = [prediction for result in results for prediction in result.predictions]
    answers = [row for result in results for row in result.answers]
    return EvaluationResult(summarise(predictions, seed=seed), predictions, answers)


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
    asker = _Asker(model, dataset, tokenizer, collator, max_new_tokens, device, end_of_turn)
    for start in range(0, len(dataset), batch_size * _BATCHES_AHEAD):
        end = min(start + batch_size * _BATCHES_AHEAD, len(dataset))
        questions = [Question(index, "accuracy") for index in range(start, end)]
        texts: dict[int, str] = {}
        for positions in _batches(dataset, questions, batch_size=batch_size):
            texts |= asker.ask(questions, positions)
        yield from ((questions[position].index, texts[position]) for position in sorted(texts))


@dataclass(frozen=True)
class _Asker:
    """Asks questions about one data set; the fields are arguments of `evaluate_dataset`."""

    model: Any
    dataset: ConversationDataset
    tokenizer: Any
    collator: Callable[[list[Any]], Batch]
    max_new_tokens: int
    device: torch.device | str
    end: EndOfTurn

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], positions: Sequence[int]) -> list[tuple[int, str]]:
        """Positions and answers of one batch of questions, without skipped ones."""
        examples = _prompts(self.dataset, {position: questions[position] for position in positions})
        if not examples:
            return []
        batch = self.collator(list(examples.values()))
        inputs = {key: _to_device(value, self.device) for key, value in batch.items() if key != "labels"}
        stops = {"eos_token_id": list(self.end.stop_ids)} if self.end.stop_ids else {}
        output = self.model.generate(**inputs, **stops, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        texts = [self.end.decode(tokens, self.tokenizer) for tokens in new]
        return list(zip(examples, texts, strict=True))


def _batches(dataset: ConversationDataset, questions: Sequence[Question], *, batch_size: int) -> Iterator[list[int]]:
    """Batches of positions of questions; all prompts of a batch have the same list of modalities, or no scans."""

    def kind(position: int) -> tuple[bool, tuple[str, ...]]:
        question = questions[position]
        return question.condition == "no_scan", dataset.modalities(question.index)

    for _, group in groupby(sorted(range(len(questions)), key=kind), key=kind):
        positions = list(group)
        for start in range(0, len(positions), batch_size):
            yield positions[start : start + batch_size]


def _ask_in_rounds(
    ask: Callable[[Sequence[int]], list[tuple[int, str]]],
    batches: Sequence[Sequence[int]],
    *,
    rank: int,
    world_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[int, str]]:
    """Positions and answers of this rank's batches; in each round every rank generates one batch."""
    num_rounds = -(-len(batches) // world_size)
    answers: list[tuple[int, str]] = []
    for turn in range(num_rounds):
        number = turn * world_size + rank
        # A rank without a batch repeats the last one and drops its answers: a sharded model needs every rank in each
        # forward.
        generated = ask(batches[min(number, len(batches) - 1)])
        if number < len(batches):
            answers += generated
        if progress is not None:
            progress(turn + 1, num_rounds)
    return answers


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


def _gather(answers: list[tuple[int, str]], *, world_size: int) -> list[tuple[int, str]]:
    if world_size == 1:
        return answers
    shares: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(shares, answers)
    return [answer for share in shares for answer in share]


def _prediction(
    sample: Sample, question: Question, generated: str, *, subject_hash: Callable[[str], str]
) -> Prediction:
    answer = sample.answer
    assert answer is not None, "only samples with an answer are planned"
    score = score_answer(generated, answer)
    return Prediction(
        subject=subject_hash(sample.subject),
        task=sample.task,
        modality=modality_name(sample.modalities),
        condition=question.condition,
        question=question_text(sample),
        type=answer.type,
        options=answer.options,
        answer=answer.value,
        unit=answer.unit,
        generated=generated,
        score=score.value,
        is_parsed=score.is_parsed,
    )
