"""Numbers to learn: with fixed decimals, drawn around the true value, in step with lengths and max_length."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.dataset.conversation import ConversationDataset
from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest

NUM_TOKENS = {"T1": 3, "rsfMRI": 2, "dMRI": 2}


@pytest.fixture
def number_row(make_row):
    """A row about a number: `number_row("a", 41.23)`."""

    def make(name, value, *, words=None, task="age", unit="years"):
        row = make_row(name, "T1", answer=f"{value} {unit}" if words is None else words)
        return {**row, "task": task, "answer": {"type": "number", "value": value, "unit": unit}}

    return make


@pytest.fixture
def make_dataset(make_tokenizer, write_manifest):
    def make(rows, **options):
        tokenizer = make_tokenizer()
        return ConversationDataset(
            read_manifest(write_manifest(rows), may_end_with_user=True),
            tokenizer=tokenizer,
            image_token_id=tokenizer.ids["<image>"],
            num_image_tokens=NUM_TOKENS,
            pipelines=dict.fromkeys(NUM_TOKENS, lambda paths, *, generator: None),
            **options,
        )

    return make


def learned(example):
    """The words to learn, without the end of the turn."""
    ids = example.labels[example.labels != -100].tolist()
    return bytes(token for token in ids if token < 256).decode()


@pytest.mark.parametrize(("decimals", "words"), [(0, "41 years"), (1, "41.2 years"), (3, "41.230 years"), (None, None)])
def test_decimals_change_the_words_of_numbers_alone(make_dataset, number_row, make_row, decimals, words):
    rows = [number_row("a", 41.23), make_row("b", "T1", answer="4.56")]
    for augment in (True, False):
        dataset = make_dataset(rows, number_decimals=decimals, augment=augment)
        assert learned(dataset[0]) == (words or "41.23 years")
        assert learned(dataset[1]) == "4.56"
        assert dataset.sample(0).messages[-1].text == "41.23 years"


def test_decimals_of_rounded_words_are_those_of_the_value(make_dataset, number_row):
    dataset = make_dataset([number_row("a", 41.23, words="About 41 years.")], number_decimals=2)
    assert learned(dataset[0]) == "About 41.23 years."


def test_lengths_and_prompts_are_those_of_the_written_words(make_dataset, number_row):
    rows = [number_row("a", 41.23), number_row("b", 8.0)]
    plain = make_dataset(rows)
    for options in ({}, {"max_length": 1000}):
        dataset = make_dataset(rows, number_decimals=4, **options)
        assert [dataset.num_tokens(i) for i in range(2)] == [len(dataset[i].input_ids) for i in range(2)]
        assert [dataset.num_tokens(i) - plain.num_tokens(i) for i in range(2)] == [2, 3]
        assert dataset.prompt(0).input_ids.tolist() == plain.prompt(0).input_ids.tolist()


def test_numbers_that_cannot_be_written_are_listed_at_once(make_dataset, number_row, make_row):
    prompt = number_row("d", 40.0)
    del prompt["messages"][-1]
    rows = [
        number_row("a", 41.0, words="forty-one"),
        number_row("b", 41.0, words="42 years"),
        number_row("c", 41.0),
        make_row("e", "T1", answer="no number"),
        number_row("f", 3.0, words="?", task="score"),
    ]
    assert list(make_dataset(rows).encoding_problems()) == []
    assert [line for line, _ in make_dataset(rows, number_decimals=0).encoding_problems()] == [1, 2, 5]
    assert list(make_dataset(rows, number_smoothing={"age": 1.0}, augment=False).encoding_problems()) == []
    smoothed = make_dataset(rows, number_smoothing={"age": 1.0})
    assert [line for line, _ in smoothed.encoding_problems()] == [1, 2]
    with pytest.raises(ValueError, match="line 1, subject sub-a"):
        smoothed[0]
    # An answer is not needed to ask, and a question is not changed.
    prompt["messages"][0]["content"][1]["text"] = "Is it 40.0 years?"
    asked, plain = (make_dataset([*rows, prompt], number_decimals=n, augment=False) for n in (0, None))
    for row in (0, 5):
        assert asked.prompt(row).input_ids.tolist() == plain.prompt(row).input_ids.tolist()


def draws(dataset, *, row=0, count=1000):
    size = len(dataset)
    return np.array([float(learned(dataset[epoch * size + row]).split()[0]) for epoch in range(count)])


@pytest.mark.parametrize(("value", "decimals", "deviation"), [(41.23, 0, 3.0), (41.25, 1, 0.4), (-3.0, 2, 1.0)])
def test_draws_have_the_mean_and_deviation(make_dataset, number_row, value, decimals, deviation):
    rows = [number_row("a", value), number_row("b", 30)]
    numbers = draws(make_dataset(rows, number_decimals=decimals, number_smoothing={"age": deviation}))
    assert abs(numbers.mean() - value) < 4 * deviation / np.sqrt(len(numbers))
    rounding = 10.0 ** (-2 * decimals) / 12
    assert numbers.std() == pytest.approx(np.sqrt(deviation**2 + rounding), rel=0.1)
    assert np.allclose(numbers * 10**decimals, np.round(numbers * 10**decimals))
    assert len(np.unique(numbers)) > 5


def test_draws_are_a_function_of_seed_and_index(make_dataset, number_row):
    rows = [number_row(name, 40.5) for name in "ab"]
    options = {"number_smoothing": {"age": 5.0}}
    one, same, other = (make_dataset(rows, seed=seed, **options) for seed in (1, 1, 2))
    for index in (5, 0, 1):
        assert learned(one[index]) == learned(same[index])
    first, second = (draws(one, row=row, count=20) for row in (0, 1))
    assert (first != second).any()
    assert (first != draws(other, count=20)).any()
    assert len(set(first)) > 10
    assert all(round(10 * number, 6).is_integer() for number in first)  # as many decimals as the words


def test_smoothing_changes_training_of_its_task_alone(make_dataset, number_row):
    rows = [number_row("a", 40), number_row("b", 40, task="score")]
    smoothed, plain = make_dataset(rows, number_smoothing={"age": 9.0}), make_dataset(rows)
    assert {learned(smoothed[i]) for i in range(1, 40, 2)} == {"40 years"}
    assert len({learned(smoothed[i]) for i in range(0, 40, 2)}) > 5
    held_out = make_dataset(rows, number_smoothing={"age": 9.0}, augment=False)
    for i in range(4):
        assert held_out[i].input_ids.tolist() == plain[i].input_ids.tolist()
        assert smoothed.prompt(i).input_ids.tolist() == plain.prompt(i).input_ids.tolist()
        assert smoothed.num_tokens(i) == plain.num_tokens(i)


def test_numbers_below_zero_are_drawn_only_for_tasks_that_have_some(make_dataset, number_row):
    options = {"number_smoothing": {"age": 2.0, "score": 2.0}, "number_decimals": 1}
    rows = [number_row("a", 0.5), number_row("b", 0.5, task="score"), number_row("c", -4.0, task="score")]
    dataset = make_dataset(rows, **options)
    assert dataset.number_tasks == {"age": False, "score": True}
    ages, scores = draws(dataset, count=300), draws(dataset, row=1, count=300)
    assert ages.min() >= 0 > scores.min()
    assert abs(scores.mean() - 0.5) < 0.5


def test_draw_that_does_not_fit_is_the_number_itself(make_dataset, number_row, make_row):
    row = number_row("a", 99)
    length = make_dataset([row]).num_tokens(0)
    options = {"number_smoothing": {"age": 20.0}}
    dataset = make_dataset([row], **options)
    free = {learned(dataset[i]) for i in range(50)}
    assert max(map(len, free)) > len("99 years")
    dataset = make_dataset([row], max_length=length, **options)
    limited = [dataset[i] for i in range(50)]
    assert max(len(example.input_ids) for example in limited) == length
    assert {learned(example) for example in limited} == {words for words in free if len(words) <= len("99 years")}
    # Nor does it drop an exchange that the number itself leaves.
    longer = {**row, "messages": make_row("b", "dMRI")["messages"] + row["messages"]}
    length = make_dataset([longer]).num_tokens(0)
    dataset = make_dataset([longer], max_length=length, **options)
    assert {tuple(scan.modality for scan in dataset[i].scans) for i in range(50)} == {("dMRI", "T1")}
    shorter = make_dataset([longer], max_length=length - 1, **options)
    assert (
        {tuple(scan.modality for scan in shorter[i].scans) for i in range(50)} == {shorter.modalities(0)} == {("T1",)}
    )


def test_invalid_row_is_found_before_numbers_are_drawn(make_dataset, number_row):
    with pytest.raises(ManifestError, match="line 2"):
        make_dataset([number_row("a", 40), {"id": "b"}], number_smoothing={"age": 1.0})
