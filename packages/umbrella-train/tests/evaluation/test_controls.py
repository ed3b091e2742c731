"""The scan of each question: its own, that of a control, or none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from umbrella_data.manifest.sample import Answer, Sample, Scan, Turn
from umbrella_train.evaluation.controls import Question, plan_questions

SIDES = ("left", "right")


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
class Questions:
    """Samples as a data set."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]

    def modalities(self, index: int) -> tuple[str, ...]:
        return self.samples[index].modalities


def of(questions: list[Question], condition: str) -> list[Question]:
    return [question for question in questions if question.condition == condition]


@pytest.mark.parametrize("max_samples", [None, 3])
def test_every_row_adds_samples_without_an_answer_and_changes_no_other_question(max_samples: int | None) -> None:
    scored = [side_sample(i, modality=modality) for i, modality in enumerate(["T1"] * 6 + ["dMRI"])]
    samples = [replace(sample, answer=None) if i in (1, 4) else sample for i, sample in enumerate(scored)]
    samples += [replace(side_sample(9 + i, modality="dMRI"), answer=None) for i in range(4)]
    dataset = Questions(samples)
    plain = plan_questions(dataset, controls=True, seed=1, max_samples=max_samples)
    every = plan_questions(dataset, controls=True, seed=1, max_samples=max_samples, every_row=True)
    assert every[: len(plain)] == plain
    added = every[len(plain) :]
    assert {question.condition for question in added} == {"accuracy"}
    assert len({question.index for question in added}) == len(added)
    if max_samples is None:
        assert sorted(question.index for question in added) == [1, 4, 7, 8, 9, 10]
    else:
        # Of T1 there are three rows with an answer, of dMRI one.
        assert len(added) == 2
        assert {samples[question.index].modalities for question in added} == {("dMRI",)}


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_questions_get_another_subjects_scan_of_the_same_task(seed: int) -> None:
    samples = [side_sample(i, task=task) for task in ("side", "size") for i in range(9)]
    # Two visits of one subject: they must not exchange scans.
    samples += [side_sample(20 + i, subject="sub-twice") for i in range(2)]
    dataset = Questions(samples)
    shuffled = of(plan_questions(dataset, controls=True, seed=seed), "shuffled")
    assert sorted(question.index for question in shuffled) == list(range(20))
    for question in shuffled:
        asks, lends = samples[question.index], samples[question.scans_from]
        assert asks.subject != lends.subject
        assert asks.task == lends.task


def test_shuffled_scans_of_single_visits_are_each_used_once() -> None:
    shuffled = of(plan_questions(Questions([side_sample(i) for i in range(16)]), controls=True, seed=0), "shuffled")
    assert sorted(question.scans_from for question in shuffled) == list(range(16))


@pytest.mark.parametrize("seed", range(5))
def test_swapped_questions_get_a_scan_with_another_answer(seed: int) -> None:
    samples = [side_sample(i) for i in range(9)]
    swapped = of(plan_questions(Questions(samples), controls=True, seed=seed), "swapped")
    assert sorted(question.index for question in swapped) == list(range(9))
    for question in swapped:
        assert samples[question.index].answer.value != samples[question.scans_from].answer.value


def test_swapped_scans_are_drawn_from_all_candidates() -> None:
    swapped = of(plan_questions(Questions([side_sample(i) for i in range(40)]), controls=True, seed=0), "swapped")
    assert len({question.scans_from for question in swapped}) > 20


def test_control_scans_have_the_same_modalities() -> None:
    samples = [side_sample(i, modality=modality) for modality in ("T1", "dMRI") for i in range(6)]
    for question in plan_questions(Questions(samples), controls=True, seed=0):
        if question.scans_from is not None:
            assert samples[question.index].modalities == samples[question.scans_from].modalities


def test_impossible_controls_are_skipped() -> None:
    single = Questions([side_sample(0)])
    assert {question.condition for question in plan_questions(single, controls=True, seed=0)} == {"accuracy", "no_scan"}
    same = Questions([side_sample(0), side_sample(2)])
    conditions = {question.condition for question in plan_questions(same, controls=True, seed=0)}
    assert conditions == {"accuracy", "no_scan", "shuffled"}
    text = Questions([side_sample(i, modality=None) for i in range(4)])
    assert {question.condition for question in plan_questions(text, controls=True, seed=0)} == {"accuracy"}
    assert {question.condition for question in plan_questions(same, controls=False, seed=0)} == {"accuracy"}


def test_questions_without_an_answer_are_skipped() -> None:
    dataset = Questions([side_sample(0), replace(side_sample(1), answer=None), side_sample(2)])
    questions = plan_questions(dataset, controls=True, seed=0)
    assert {question.index for question in questions} == {0, 2}
    assert {question.scans_from for question in questions} <= {None, 0, 2}


def test_max_samples_is_a_limit_for_each_set_of_modalities() -> None:
    samples = [side_sample(i, modality=modality) for modality in ("T1", "dMRI", None) for i in range(8)]
    questions = of(plan_questions(Questions(samples), controls=True, seed=0, max_samples=3), "accuracy")
    chosen = [samples[question.index].modalities for question in questions]
    assert [chosen.count(modalities) for modalities in (("T1",), ("dMRI",), ())] == [3, 3, 3]
    assert [question.index for question in questions] != [16, 17, 18, 0, 1, 2, 8, 9, 10]


def test_plan_depends_on_its_seed() -> None:
    dataset = Questions([side_sample(i) for i in range(20)])
    plan = plan_questions(dataset, controls=True, seed=3)
    assert plan == plan_questions(dataset, controls=True, seed=3)
    assert plan != plan_questions(dataset, controls=True, seed=4)
