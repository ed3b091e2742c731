"""Generating, decoding and scoring answers, on one rank and on several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from umbrella_data.manifest.sample import Answer, Sample, Scan, Turn
from umbrella_train.end_of_turn import GREEDY, EndOfTurn
from umbrella_train.errors import RunError
from umbrella_train.evaluation import asker
from umbrella_train.evaluation.answer_space import AnswerSpace
from umbrella_train.evaluation.answers import make_prediction, modality_name
from umbrella_train.evaluation.controls import Question, repeated_questions
from umbrella_train.evaluation.generate import EvaluationResult, evaluate_dataset, generate_in_order
from umbrella_train.evaluation.metrics import summarise
from umbrella_train.evaluation.predictions import Reply

SIDES = ("left", "right")
STOP = 1


def side_sample(number: int, *, modality: str | None = "T1", task: str = "side", subject: str | None = None) -> Sample:
    """A question whose right answer is left for even numbers, right for odd ones."""
    scans = () if modality is None else (Scan(modality, (Path(f"{number}.nii"),)),)
    value = SIDES[number % 2]
    return Sample(
        id=f"{number}_{task}",
        subject=subject or f"sub-{number:03}",
        task=task,
        messages=(Turn("user", (*scans, f"Which {task}?")), Turn("assistant", (value,))),
        answer=Answer(type="choice", value=value, options=SIDES),
    )


@dataclass
class ToyDataset:
    """Its prompts are the text and the number of the sample whose scan they contain."""

    samples: list[Sample]
    prompts: list[tuple[int, int | None, bool]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]

    def modalities(self, index: int) -> tuple[str, ...]:
        return self.samples[index].modalities

    def candidate_tokens(self, index: int, candidates: Sequence[str], *, with_scans: bool = True) -> None:
        """As where an answer follows its reasoning: it is only generated."""

    def prompt(self, index: int, *, scans_from: int | None = None, with_scans: bool = True) -> tuple[bytes, int | None]:
        self.prompts.append((index, scans_from, with_scans))
        source = self.samples[index if scans_from is None else scans_from]
        number = int(source.scans[0].paths[0].stem) if with_scans and source.scans else None
        words = "x" * (index % 3) + self.samples[index].messages[0].text
        return words.encode(), number


def collate(examples: list[tuple[bytes, int | None]]) -> dict[str, Any]:
    """Pad on the left; scans are single numbers."""
    longest = max(len(words) for words, _ in examples)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (longest - len(words)) + list(words) for words, _ in examples]),
        "labels": torch.full((len(examples), longest), -100),
        "pixel_values": {"T1": torch.tensor([float(number) for _, number in examples if number is not None])},
    }
    return batch


class ToyModel(nn.Module):
    """Answers with the side of the lesion, left without a scan. Fills rows after their end with arbitrary tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_batches = 0
        self.stops: list[int] | None = None

    def generate(
        self,
        *,
        input_ids: Tensor,
        pixel_values: dict[str, Tensor],
        max_new_tokens: int,
        eos_token_id: list[int] | None = None,
        **options: Any,
    ) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert options == GREEDY
        self.num_batches += 1
        self.stops = eos_token_id
        numbers = [int(number) for number in pixel_values["T1"].tolist()] or [0] * len(input_ids)
        ending = bytes([STOP]) + b"and more to fill up"
        generated = [(SIDES[number % 2].encode() + ending)[:max_new_tokens] for number in numbers]
        return torch.cat([input_ids, torch.tensor([list(words) for words in generated])], dim=1)


class ByteDecoder:
    """Bytes as text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token_ids).decode()


def evaluate(model: ToyModel, dataset: ToyDataset, **options: Any) -> EvaluationResult:
    arguments: dict[str, Any] = {
        "batch_size": 5,
        "max_new_tokens": 12,
        "end_of_turn": EndOfTurn((STOP,)),
        "seed": 0,
        **options,
    }
    return evaluate_dataset(
        model,
        dataset,
        tokenizer=ByteDecoder(),
        collator=collate,
        device="cpu",
        subject_hash=lambda subject: f"hash of {subject[-3:]}",
        **arguments,
    )


def test_numbers_of_a_grid_are_candidates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (Turn("user", ("Age?",)), Turn("assistant", ("41 years",)))
    dataset = ToyDataset([Sample("i", "s", "age", turns, Answer("number", 41, unit="years"))])
    texts: list[Sequence[str]] = []

    def candidate_tokens(_: ToyDataset, index: int, candidates: Sequence[str], **options: bool) -> list[tuple[int]]:
        texts.append(candidates)
        return [(1,)] * len(candidates)

    monkeypatch.setattr(ToyDataset, "candidate_tokens", candidate_tokens)
    spaces = {"text/age": AnswerSpace(frame="0 years", decimals=0, minimum=40, maximum=42)}
    grids = {"age": (40, 42, 0.25)}
    one = asker.Asker(
        None, cast(Any, dataset), None, cast(Any, None), 1, "cpu", EndOfTurn(), spaces=spaces, grids=grids
    )
    question = Question(0, "accuracy")
    tokens = one._candidates(question)
    assert texts == [["40 years", "41 years", "42 years"]]
    reply = one._reply(question, None, (-100.0, 0.0, 0.0), tokens)
    assert reply.expected == pytest.approx(41.5)


def test_names_in_questions_and_answers_are_hidden_after_they_are_scored() -> None:
    text = "sub-007 has 12.nii_old"
    turns = (Turn("user", (Scan("T1", (Path("/d/12.nii"),)), "Report of sub-007?")), Turn("assistant", (text,)))
    sample = Sample("i", "sub-007", "report", turns, Answer("text", text))
    prediction = make_prediction(
        sample,
        cast(Answer, sample.answer),
        Reply(generated=text.upper()),
        condition="accuracy",
        subject_hash=lambda name: f"<{len(name)}>",
    )
    assert (prediction.subject, prediction.question) == ("<7>", "Report of <7>?")
    assert (prediction.answer, prediction.generated) == ("<7> has <6>_old", "<7> HAS <6>_OLD")
    assert (prediction.predicted, prediction.score) == ("<7> has <6>_old", 1)
    named = evaluate(ToyModel(), ToyDataset([side_sample(n, task=f"side of sub-{n:03}") for n in range(4)]))
    assert {each.question for each in named.predictions} == {f"Which side of hash of {n:03}?" for n in range(4)}


def test_a_model_that_uses_the_scan_is_right_with_its_own_scan_only() -> None:
    metrics = summarise(evaluate(ToyModel(), ToyDataset([side_sample(i) for i in range(40)])).predictions)
    assert metrics["eval/accuracy/T1"] == metrics["eval/accuracy/T1/side"] == 1
    assert metrics["eval/swapped/T1"] == 0
    assert metrics["eval/no_scan/T1"] == 0.5
    assert 0.25 < metrics["eval/shuffled/T1"] < 0.75
    assert (metrics["eval/questions/T1"], metrics["eval/subjects/T1"], metrics["eval/unparsed/T1"]) == (40, 40, 0)
    assert metrics["eval/accuracy_lower/T1"] < 1 == metrics["eval/accuracy_upper/T1"]


def test_generation_stops_at_the_end_of_turn() -> None:
    model = ToyModel()
    evaluate(model, ToyDataset([side_sample(0)]))
    assert model.stops == [STOP]


def test_predictions_have_the_text_and_a_hash_of_the_subject() -> None:
    rows = [prediction.to_row() for prediction in evaluate(ToyModel(), ToyDataset([side_sample(3)])).predictions]
    assert rows[0] == {
        "subject": "hash of 003",
        "task": "side",
        "modality": "T1",
        "condition": "accuracy",
        "question": "Which side?",
        "type": "choice",
        "options": ("left", "right"),
        "answer": "right",
        "unit": None,
        "predicted": "right",
        "score": 1.0,
        "generated": "right",
        "score_generated": 1.0,
        "is_parsed": True,
        "option_scores": None,
        "option_lengths": None,
        "expected": None,
        "interval": None,
    }
    assert "sub-003" not in str(rows)


def test_answers_to_every_row_are_in_order_and_scored_where_there_is_an_answer() -> None:
    samples = [side_sample(0, modality=None), side_sample(1), side_sample(2, modality=None), side_sample(3)]
    dataset = ToyDataset([samples[0], replace(samples[1], answer=None), *samples[2:]])
    result = evaluate(ToyModel(), dataset, every_row=True)
    assert [(row["id"], row["subject"], row["generated"]) for row in result.answers] == [
        ("0_side", "sub-000", "left"),
        ("1_side", "sub-001", "right"),
        ("2_side", "sub-002", "left"),
        ("3_side", "sub-003", "right"),
    ]
    assert [(row["answer"], row["predicted"], row["score"], row["is_parsed"]) for row in result.answers] == [
        ("left", "left", 1.0, True),
        (None, None, None, None),
        ("left", "left", 1.0, True),
        ("right", "right", 1.0, True),
    ]
    assert result.predictions == evaluate(ToyModel(), dataset).predictions
    assert evaluate(ToyModel(), dataset).answers == []


def test_generate_in_order_needs_only_a_few_batches_for_the_first_answers() -> None:
    dataset = ToyDataset([side_sample(i, modality="T1" if i % 3 else None) for i in range(100)])
    model = ToyModel().eval()
    sizes: list[int] = []

    def collate_and_count(examples: list[Any]) -> Any:
        assert len({number is None for _, number in examples}) == 1
        sizes.append(len(examples))
        return collate(examples)

    answers = generate_in_order(
        model,
        dataset,
        tokenizer=ByteDecoder(),
        collator=collate_and_count,
        batch_size=2,
        max_new_tokens=12,
        device="cpu",
        end_of_turn=EndOfTurn((STOP,)),
    )
    assert next(answers) == (0, "left")
    assert sum(sizes) < 50
    assert list(answers) == [(i, SIDES[i % 2] if i % 3 else "left") for i in range(1, 100)]
    assert sum(sizes) == 100
    assert max(sizes) == 2


def test_text_after_the_end_of_turn_is_dropped() -> None:
    dataset = ToyDataset([side_sample(i) for i in range(4)])
    assert summarise(evaluate(ToyModel(), dataset, end_of_turn=None).predictions)["eval/unparsed/T1"] == 1
    assert summarise(evaluate(ToyModel(), dataset).predictions)["eval/unparsed/T1"] == 0


def test_the_mode_of_the_model_is_restored() -> None:
    model = ToyModel().train()
    evaluate(model, ToyDataset([side_sample(0)]))
    assert model.training


def gather_in_turn(monkeypatch: pytest.MonkeyPatch, world_size: int) -> list[list[Any]]:
    """The shares of ranks that run one after the other in this process; the last one gathers all."""
    shares: list[list[Any]] = []

    def gather(filled: list[Any], share: Any) -> None:
        shares.append(share)
        filled[: len(shares)] = shares
        filled[len(shares) :] = [[]] * (world_size - len(shares))

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return shares


@pytest.mark.parametrize("num_samples", [1, 4, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_split_the_questions_and_get_the_same_result(
    num_samples: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [side_sample(i) for i in range(num_samples)]
    dataset = ToyDataset([*samples[:-1], replace(samples[-1], answer=None)])
    single = evaluate(ToyModel(), dataset, batch_size=2, every_row=True)
    assert len(single.answers) == num_samples
    shares = gather_in_turn(monkeypatch, world_size)
    models = [ToyModel() for _ in range(world_size)]
    for rank, model in enumerate(models):
        together = evaluate(model, dataset, batch_size=2, every_row=True, rank=rank, world_size=world_size)
    assert together == single
    # A sharded model needs the same number of forwards on every rank.
    assert len({model.num_batches for model in models}) == 1
    positions = [position for share in shares for position, _ in share]
    assert sorted(positions) == sorted(set(positions))


@dataclass
class CandidateDataset(ToyDataset):
    """Its candidates are single tokens."""

    def candidate_tokens(self, index: int, candidates: Sequence[str], *, with_scans: bool = True) -> Any:
        return [(number + 1,) for number in range(len(candidates))]


@pytest.mark.parametrize("num_samples", [1, 5, 7])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_likelihoods_of_all_questions_each_once(
    num_samples: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(model: Any, batch: Any, candidates: Any, *, max_rows: int) -> list[list[float]]:
        numbers = [int(number) for number in batch["pixel_values"]["T1"].tolist()] or [0] * len(candidates)
        return [[-float(number % 2), -0.5] for number in numbers]

    monkeypatch.setattr(asker, "score_candidates", score)
    dataset = CandidateDataset([side_sample(i) for i in range(num_samples)])
    single = evaluate(ToyModel(), dataset, batch_size=2)
    assert all(p.option_scores is not None for p in single.predictions)
    # Controls are answered by likelihood only.
    assert {p.generated is None for p in single.predictions if p.condition != "accuracy"} <= {True}
    assert all(p.generated == p.predicted == p.answer for p in single.predictions if p.condition == "accuracy")
    shares = gather_in_turn(monkeypatch, world_size)
    for rank in range(world_size):
        together = evaluate(ToyModel(), dataset, batch_size=2, rank=rank, world_size=world_size)
    assert together == single
    positions = [position for share in shares for position, _ in share]
    # Of the equal questions without a scan, one is asked.
    assert len(positions) == len(set(positions)) == len(single.predictions) - (num_samples - 1)


def test_rounding_errors_of_batches_do_not_order_equal_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    num_calls = iter(range(1000))

    def score(model: Any, batch: Any, candidates: Any, *, max_rows: int) -> list[list[float]]:
        noise = 1e-7 * next(num_calls)
        return [[-0.5, -0.5 + noise]] * len(candidates)

    monkeypatch.setattr(asker, "score_candidates", score)
    # All left sides come first, as in a sorted manifest.
    samples = sorted((side_sample(i) for i in range(8)), key=lambda sample: str(sample.messages[-1].text))
    metrics = summarise(evaluate(ToyModel(), CandidateDataset(samples), batch_size=4).predictions)
    assert metrics["eval/auroc/T1"] == 1
    assert metrics["eval/auroc_no_scan/T1"] == 0.5


def test_only_equal_questions_are_repeated() -> None:
    one, other = side_sample(0), side_sample(1)
    rows = [one, other, side_sample(2, task="lobe"), replace(other, answer=replace(one.answer, options=("a", "b")))]
    questions = [Question(index, "no_scan") for index in range(4)] + [Question(0, "accuracy"), Question(0, "no_scan")]
    assert repeated_questions(questions, ToyDataset(rows)) == {1: 0, 5: 0}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_likelihood_that_is_not_finite_is_an_error(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(model: Any, batch: Any, candidates: Any, *, max_rows: int) -> list[list[float]]:
        return [[-1.0, value]] * len(candidates)

    monkeypatch.setattr(asker, "score_candidates", score)
    with pytest.raises(RunError, match=r"^sample \d .*condition \w+: .*not finite"):
        evaluate(ToyModel(), CandidateDataset([side_sample(i) for i in range(2)]))


def test_batches_have_similar_prompts_and_every_question_once() -> None:
    dataset = ToyDataset([side_sample(i, modality="T1" if i % 2 else None) for i in range(12)])
    seen: list[set[bool]] = []

    def collate_and_look(examples: list[Any]) -> Any:
        seen.append({number is None for _, number in examples})
        return collate(examples)

    evaluate_dataset(
        ToyModel(),
        dataset,
        tokenizer=ByteDecoder(),
        collator=collate_and_look,
        batch_size=4,
        max_new_tokens=8,
        device="cpu",
        subject_hash=str,
    )
    assert all(len(kinds) == 1 for kinds in seen)
    # 6 of text only; 6 of T1 with the own scan and shuffled, and one without, since all ask the same. All answers are
    # equal, so there is no swapped.
    assert len(dataset.prompts) == len(set(dataset.prompts)) == 19


def test_without_questions_there_are_no_predictions() -> None:
    assert evaluate(ToyModel(), ToyDataset([])) == EvaluationResult([])
    assert summarise([]) == {}


@pytest.mark.parametrize(
    ("modalities", "name"), [((), "text"), (("dMRI", "T1", "dMRI"), "T1+dMRI"), (("rsfMRI",), "rsfMRI")]
)
def test_modality_name_does_not_depend_on_the_order(modalities: tuple[str, ...], name: str) -> None:
    assert modality_name(modalities) == name
