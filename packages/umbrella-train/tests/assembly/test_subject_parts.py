"""Folds and calibration subjects: each subject in one part, stratified, the same everywhere."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from umbrella_data.manifest.sample import Answer, subject_key
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.assembly.build import build_components
from umbrella_train.assembly.held_out import Overlap
from umbrella_train.assembly.masks import masked_modalities
from umbrella_train.assembly.sources import Sources, find_sources, prepare_sources
from umbrella_train.assembly.subject_parts import choose_subjects, deal_subjects, open_source
from umbrella_train.checkpoint.changes import run_settings
from umbrella_train.config import DatasetConfig, RunConfig
from umbrella_train.config.data import DataConfig
from umbrella_train.errors import RunError

MakeConfig = Callable[..., RunConfig]
SEXES = ("female", "male")


def answers_of(count: int) -> dict[str, dict[str, list[Answer]]]:
    """Subjects with a sex (one in four is male), an age, and a site that some have."""
    return {
        f"{number:03d}": {
            "sex": [Answer("choice", SEXES[number % 4 == 0], options=SEXES)],
            "age": [Answer("number", float(number * 7 % count), unit="years")] * 2,
            **({"site": [Answer("text", "London")]} if number % 2 else {}),
        }
        for number in range(count)
    }


@pytest.fixture
def manifests(tmp_path: Path) -> list[Path]:
    """Two manifests of 12 subjects; the second has eight of them under other names, and one row without an answer."""
    (tmp_path / "scan.nii.gz").touch()

    def row(name: str, task: str, answer: dict[str, Any] | None, words: str) -> dict[str, Any]:
        image = {"type": "image", "modality": "T1", "path": "scan.nii.gz"}
        turns = [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]
        turns.append({"role": "assistant", "content": words})
        return {"id": f"{name}_{task}", "subject": name, "task": task, "messages": turns, "answer": answer}

    def choice(number: int) -> dict[str, Any]:
        return {"type": "choice", "options": list(SEXES), "value": SEXES[number % 2]}

    first = [row(f"sub-{number:02d}", "sex", choice(number), SEXES[number % 2]) for number in range(12)]
    second = [
        row(f"{number:02d}", "age", {"type": "number", "value": 20.0 + number}, str(20 + number))
        for number in range(2, 10)
    ]
    second[3]["answer"] = None
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for path, rows in zip(paths, (first, second), strict=True):
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return paths


@pytest.fixture
def prepare(make_config: MakeConfig, manifests: list[Path], tmp_path: Path) -> Callable[..., tuple[RunConfig, Sources]]:
    def make(**data: Any) -> tuple[RunConfig, Sources]:
        train = [{"manifest": str(path)} for path in manifests]
        # One scan of all subjects: copies are in several parts.
        entries = {"train": train, "evaluation": [], "allow_overlap": True, **data}
        config = make_config(tmp_path / "runs", data=entries)
        return config, prepare_sources(config)

    return make


def subjects(sources: Sequence[DatasetConfig]) -> set[str]:
    return {subject_key(sample.subject) for source in sources for sample in open_source(source)}


def test_subjects_are_dealt_evenly_within_their_answers() -> None:
    answers = answers_of(103)
    folds = deal_subjects(answers, num_folds=5, seed=3)
    assert set(folds) == set(answers)
    assert sorted(Counter(folds.values()).values()) == [20, 20, 21, 21, 21]
    males = Counter(fold for subject, fold in folds.items() if answers[subject]["sex"][0].value == "male")
    assert set(males.values()) <= {5, 6}
    for low, high in itertools.pairwise((0, 34, 69, 103)):
        ages = Counter(fold for subject, fold in folds.items() if low <= answers[subject]["age"][0].value < high)
        assert max(ages.values()) - min(ages.values()) <= 2


def test_folds_are_a_function_of_subjects_answers_and_seed() -> None:
    answers = answers_of(40)
    folds = deal_subjects(answers, num_folds=4, seed=0)
    assert deal_subjects(dict(reversed(answers.items())), num_folds=4, seed=0) == folds
    assert deal_subjects(answers, num_folds=4, seed=1) != folds
    with pytest.raises(RunError, match=r"data\.num_folds: 41 folds .* has 40"):
        deal_subjects(answers, num_folds=41, seed=0)


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 20), (0.001, 1), (0.99, 99)])
def test_calibration_subjects_are_spread_over_the_answers(fraction: float, count: int) -> None:
    answers = answers_of(100)
    chosen = choose_subjects(answers, fraction=fraction, seed=0)
    assert len(chosen) == count
    num_males = sum(answers[subject]["sex"][0].value == "male" for subject in chosen)
    assert abs(num_males - count / 4) <= 1
    assert chosen == choose_subjects(dict(reversed(answers.items())), fraction=fraction, seed=0)
    assert len(choose_subjects(answers, fraction=0.2, seed=1) & choose_subjects(answers, fraction=0.2, seed=0)) < 20


def test_calibration_leaves_a_subject_to_train_on() -> None:
    with pytest.raises(RunError, match=r"data\.calibration_fraction"):
        choose_subjects(answers_of(1), fraction=0.1, seed=0)
    with pytest.raises(RunError, match=r"data\.calibration_fraction"):
        choose_subjects(answers_of(4), fraction=0.9, seed=0)


def test_each_subject_is_evaluated_in_one_fold_and_never_trained_on_there(prepare: Callable[..., Any]) -> None:
    tested: list[str] = []
    for fold in range(1, 5):
        _, sources = prepare(num_folds=4, fold=fold, calibration_fraction=0.2)
        train, held_out, calibration = map(subjects, (sources.train, sources.evaluation, sources.calibration))
        assert (len(train), len(held_out), len(calibration)) == (7, 3, 2)
        assert len(train | held_out | calibration) == 12
        tested += held_out
        rows = [open_source(source) for part in (sources.train, sources.evaluation, sources.calibration)
                for source in part]  # fmt: skip
        assert sum(map(len, rows)) == 20
        assert {manifest.path for manifest in rows} == {manifest.whole.path for manifest in rows}
    assert len(tested) == len(set(tested)) == 12


def test_parts_are_those_that_the_first_rank_found(
    prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[np.array([3, 5]), np.array([], dtype=int)], [np.array([], dtype=int), np.array([1])], [np.array([0])] * 2]
    monkeypatch.setattr("umbrella_train.assembly.subject_parts.on_first_rank", lambda _: (rows, (2, 1, 2)))
    _, sources = prepare(num_folds=2, fold=1, calibration_fraction=0.5)
    found = [[open_source(source).rows.tolist() for source in part]
             for part in (sources.train, sources.evaluation, sources.calibration)]  # fmt: skip
    assert found == [[[3, 5]], [[1]], [[0], [0]]]


def test_one_part_reads_no_rows_and_keeps_the_sources(
    prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbrella_train.assembly.subject_parts._find_rows", None)
    config, sources = prepare()
    assert sources.train == config.data.train
    assert list(sources.calibration) == []


def test_data_sets_of_parts_hold_their_rows(prepare: Callable[..., Any]) -> None:
    config, sources = prepare(num_folds=3, fold=1)
    components = build_components(config)
    for part in (sources.train, sources.evaluation):
        mixture = components.mixture(part, config=config, augment=False)
        assert {subject_key(mixture.sample(index).subject) for index in range(len(mixture))} == subjects(part)
    assert masked_modalities(sources.train) == {"T1": False}


def test_evaluation_data_are_not_used_with_folds(
    prepare: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        prepare(num_folds=3, fold=2, evaluation=[{"manifest": str(tmp_path / "missing.jsonl")}])
    (message,) = [text for text in caplog.messages if text.startswith("fold 2 of 3")]
    assert "4 subjects to evaluate on, 8 to train on" in message
    assert "not used" in message


def test_finished_run_finds_the_same_parts(prepare: Callable[..., Any], manifests: list[Path]) -> None:
    config, sources = prepare(num_folds=4, fold=2, calibration_fraction=0.3)
    found = find_sources(config)
    for name in ("train", "evaluation", "calibration"):
        assert subjects(getattr(found, name)) == subjects(getattr(sources, name))
    others = [DatasetConfig(manifest=manifests[1])]
    assert find_sources(config, others).evaluation == others
    manifests[0].unlink()
    assert list(find_sources(config, others).calibration) == []
    with pytest.raises(RunError, match=r"first\.jsonl"):
        find_sources(config)


def test_changed_part_is_a_changed_setting(prepare: Callable[..., Any]) -> None:
    def settings(**data: Any) -> dict[str, Any]:
        config, sources = prepare(**data)
        return run_settings(config, train=sources.train, evaluation=sources.evaluation, num_ranks=1)

    plain, first, second = settings(), settings(num_folds=2, fold=1), settings(num_folds=2, fold=2)
    for key in ("data.train.0.content", "data.fold"):
        assert len({str(plain[key]), str(first[key]), str(second[key])}) == 3
    assert first["data.evaluation.1.content"] != second["data.evaluation.1.content"]
    smaller = settings(calibration_fraction=0.2)
    assert smaller["data.train.0.content"].partition(",")[0] == plain["data.train.0.content"]
    assert smaller["data.train.0.content"] != plain["data.train.0.content"]


def test_copies_of_scans_in_two_parts_are_found(prepare: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match=r"scan\.nii\.gz"):
        prepare(num_folds=2, fold=1, allow_overlap=False)


def test_calibration_is_compared_with_the_evaluation_too(
    prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Sequence[DatasetConfig]] = []

    def check(train: Sequence[DatasetConfig], evaluation: Sequence[DatasetConfig], **_: Any) -> Overlap:
        compared.extend([train, evaluation])
        return Overlap(num_unchecked=7)

    monkeypatch.setattr("umbrella_train.assembly.sources.check_held_out", check)
    _, sources = prepare(num_folds=2, fold=1, calibration_fraction=0.5)
    assert subjects(compared[0]) == subjects(sources.train) | subjects(sources.calibration)
    assert (len(subjects(compared[0])), len(subjects(sources.calibration))) == (6, 3)
    assert subjects(compared[1]) == subjects(sources.evaluation)
    assert sources.overlap.num_unchecked == 7


def test_synthetic_cohort_is_split_too(make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path) -> None:
    synthetic = {"num_train": 6, "num_test": 2, "seed": 0, "directory": str(cohort.train_manifest.parent)}
    data = {"train": [], "evaluation": [], "synthetic": synthetic, "num_folds": 3}
    held_out: list[str] = []
    for fold in (1, 2, 3):
        config = make_config(tmp_path, data={**data, "fold": fold})
        held_out += subjects(prepare_sources(config).evaluation)
        assert subjects(find_sources(config).evaluation) == set(held_out[-2:])
    assert sorted(held_out) == sorted(subjects([DatasetConfig(manifest=cohort.train_manifest)]))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_folds": 1, "fold": 1}, "num_folds"),
        ({"num_folds": 3}, "fold"),
        ({"fold": 1}, "fold"),
        ({"num_folds": 3, "fold": 4}, "fold"),
        ({"num_folds": 3, "fold": 0}, "fold"),
        ({"calibration_fraction": 1.0}, "calibration_fraction"),
        ({"calibration_fraction": -0.1}, "calibration_fraction"),
    ],
)
def test_wrong_parts_are_errors(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataConfig.model_validate({"train": [{"manifest": "a.jsonl"}], **keys})
    assert [each["loc"] for each in caught.value.errors()] == [(named,)]
