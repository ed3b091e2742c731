"""Trains the baselines on the training rows of each question, and answers its test rows."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from umbrella_data.bids.layout import first_of
from umbrella_data.manifest.sample import subject_key
from umbrella_train.baselines.cnn import predict_cnn
from umbrella_train.baselines.features import VolumeFile, bin_edges, histogram
from umbrella_train.baselines.models import Targets, bag_of_words, predict_constant, predict_linear
from umbrella_train.baselines.rows import Row
from umbrella_train.evaluation.answers import make_prediction, modality_name
from umbrella_train.evaluation.metrics import summarise
from umbrella_train.evaluation.predictions import Prediction, Reply

logger = logging.getLogger(__name__)

BASELINES = ("constant", "text", "volume", "histogram", "regions", "cnn")
# A probability of 0 has no logarithm.
_MIN_PROBABILITY = float(np.finfo(np.float64).tiny)
# Modalities in reading order, task, type of the answer, unit.
Question = tuple[tuple[str, ...], str, str, str | None]


def predict_baselines(
    train: Sequence[Row],
    test: Sequence[Row],
    *,
    volumes: VolumeFile,
    subject_hash: Callable[[str], str],
    with_regions: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Prediction]]:
    """Answer the test rows with every baseline; nothing about them is used for training.

    Args:
        train: Rows to train on. Those with the same modalities, task, type and unit of the answer are one question.
        test: Rows to answer. Texts as answers, and questions without training rows, are left out, with a message.
        volumes: Has the stored volumes of all rows.
        subject_hash: Returns what replaces names of subjects and files in the predictions.
        with_regions: Whether there are segmentations. Without one for every scan of a question, its `regions` are left
            out, with a warning.
        seed: Seed of the CNN.
        device: Where to train the CNN.
        progress: Called with the numbers of completed and of all questions.

    Returns:
        By name of the baseline, those of `BASELINES` that could answer a question. `constant` and `text` answer all,
        the others those with scans.
    """
    training, tests = _by_question(train), _by_question(test)
    results: dict[str, list[Prediction]] = {name: [] for name in BASELINES}
    for number, (question, rows) in enumerate(sorted(tests.items(), key=lambda item: str(item[0]))):
        if progress is not None:
            progress(number, len(tests))
        if question[2] not in ("choice", "number"):
            logger.info("%s: the answers are texts, which no baseline predicts", _name(question))
        elif question not in training:
            logger.warning(
                "%s: no training row has this question with an answer; its %d test rows have no baselines",
                _name(question),
                len(rows),
            )
        else:
            known = training[question]
            targets = _targets(known)
            for name, values in _predict(
                question, known, rows, targets, volumes, with_regions=with_regions, seed=seed, device=device
            ):
                results[name] += [
                    _prediction(row, value, targets.classes, subject_hash=subject_hash)
                    for row, value in zip(rows, values, strict=True)
                ]
    if progress is not None:
        progress(len(tests), len(tests))
    return {name: predictions for name, predictions in results.items() if predictions}


def summarise_baselines(predictions: Mapping[str, Sequence[Prediction]], *, seed: int = 0) -> dict[str, float]:
    """The metrics of `summarise` for each baseline: `baseline/volume/accuracy/T1/sex`; arguments are alike."""
    return {
        f"baseline/{name}/{key.removeprefix('eval/')}": value
        for name, own in predictions.items()
        for key, value in summarise(own, seed=seed).items()
    }


def _by_question(rows: Sequence[Row]) -> dict[Question, list[Row]]:
    groups: dict[Question, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.sample.modalities, row.sample.task, row.answer.type, row.answer.unit].append(row)
    return groups


def _name(question: Question) -> str:
    return f"{modality_name(question[0])}/{question[1]}"


def _targets(rows: Sequence[Row]) -> Targets:
    is_choice = rows[0].answer.type == "choice"
    values = [str(row.answer.value) if is_choice else float(row.answer.value) for row in rows]
    subjects = np.array([subject_key(row.sample.subject) for row in rows])
    return Targets(np.array(values), subjects, is_choice)


def _predict(
    question: Question,
    train: Sequence[Row],
    test: Sequence[Row],
    targets: Targets,
    volumes: VolumeFile,
    *,
    with_regions: bool,
    seed: int,
    device: torch.device | str,
) -> Iterator[tuple[str, np.ndarray]]:
    """Names of baselines with probabilities of the classes (M, K), or numbers (M,)."""
    constant = predict_constant(targets, num_rows=len(test))
    names = [name for name in BASELINES if question[0] or name in ("constant", "text")]
    if not with_regions or ("regions" in names and not _have_regions(question, [*train, *test])):
        names = [name for name in names if name != "regions"]
    for name in names:
        if name == "constant" or targets.is_constant:
            yield name, constant
        elif name == "cnn":
            known, asked = ([[scan.stored for scan in row.scans] for row in rows] for rows in (train, test))
            yield name, predict_cnn(known, asked, targets, read=volumes.read, seed=seed, device=device)
        else:
            yield name, predict_linear(*_FEATURES[name](train, test), targets)


def _have_regions(question: Question, rows: Sequence[Row]) -> bool:
    missing = sorted({row.sample.subject for row in rows if any(scan.regions is None for scan in row.scans)})
    if missing:
        logger.warning(
            "%s: %d subjects have scans without a segmentation, or with several (%s); region volumes are left out",
            _name(question),
            len(missing),
            first_of(missing),
        )
    return not missing


def _texts(train: Sequence[Row], test: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    return bag_of_words([row.text for row in train], [row.text for row in test])


def _volumes(train: Sequence[Row], test: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    features = [
        np.stack([np.concatenate([scan.volume for scan in row.scans]) for row in rows]).astype(np.float64)
        for rows in (train, test)
    ]
    return features[0], features[1]


def _histograms(train: Sequence[Row], test: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Bins of each channel of each scan, with edges from the training rows."""
    features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for place, scan in enumerate(train[0].scans):
        for channel in range(len(scan.counts)):
            edges = bin_edges(np.stack([row.scans[place].counts[channel] for row in train]).sum(axis=0))
            for rows, columns in zip((train, test), features, strict=True):
                columns.append(np.stack([histogram(row.scans[place].counts[channel], edges) for row in rows]))
    return np.concatenate(features[0], axis=1), np.concatenate(features[1], axis=1)


def _regions(train: Sequence[Row], test: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Volume in mm3 of each label that occurs in the training rows, for each scan; a label without voxels has 0."""
    labels = [sorted({label for row in train for label in row.scans[place].regions or ()})
              for place in range(len(train[0].scans))]  # fmt: skip

    def volumes(row: Row) -> list[float]:
        return [
            (scan.regions or {}).get(label, 0.0) for scan, own in zip(row.scans, labels, strict=True) for label in own
        ]

    return np.array([volumes(row) for row in train]), np.array([volumes(row) for row in test])


_FEATURES: Mapping[str, Callable[[Sequence[Row], Sequence[Row]], tuple[np.ndarray, np.ndarray]]] = {
    "text": _texts,
    "volume": _volumes,
    "histogram": _histograms,
    "regions": _regions,
}


def _prediction(
    row: Row, value: np.ndarray, classes: Sequence[str], *, subject_hash: Callable[[str], str]
) -> Prediction:
    """The prediction from the probabilities of the classes (K,), or from a number."""
    answer = row.answer
    if answer.type == "choice":
        known = dict(zip(classes, value.tolist(), strict=True))
        # Options that training never saw have probability 0; classes that are no option of this row do not count.
        probabilities = np.maximum([known.get(option, 0.0) for option in answer.options], _MIN_PROBABILITY)
        reply = Reply(option_scores=tuple(np.log(probabilities / probabilities.sum()).tolist()))
    else:
        reply = Reply(expected=float(value))
    return make_prediction(row.sample, answer, reply, condition="accuracy", subject_hash=subject_hash)
