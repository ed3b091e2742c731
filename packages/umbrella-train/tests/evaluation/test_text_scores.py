"""Scores of texts, against rouge-score and by hand; lexicons and entry points of other packages."""

from __future__ import annotations

import random
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from umbrella_train.errors import RunError
from umbrella_train.evaluation import text_scores as module
from umbrella_train.evaluation.laterality import packaged_lexicon, read_lexicon
from umbrella_train.evaluation.text_scores import (
    TEXT_SCORES,
    exact_match,
    laterality_f1,
    rouge_l,
    text_scores,
    token_f1,
)

WORDS = "a lesion in the left right frontal temporal lobe with oedema, no midline shift. Both"
THEIRS = """
def length(generated, answer): return len(generated) - len(answer)
def never(generated, answer): return None
def raises(generated, answer): raise KeyError("missing")
def infinite(generated, answer): return float("inf")
def word(generated, answer): return "high"
"""


def add_entry_points(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    entries = [EntryPoint(name, value, "umbrella_train.text_scores") for name, value in values.items()]
    monkeypatch.setattr(module, "entry_points", lambda group: [e for e in entries if e.group == group])


def test_rouge_l_equals_rouge_score() -> None:
    rng = random.Random(0)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for _ in range(50):
        one, other = (" ".join(rng.choices(WORDS.split(), k=rng.randint(1, 12))) for _ in range(2))
        assert rouge_l(one, other) == scorer.score(other, one)["rougeL"].fmeasure
    assert rouge_l("", "a lesion") == 0
    assert rouge_l("병변", "왼쪽 병변") is None


def test_exact_match_folds_case_and_punctuation() -> None:
    assert exact_match(" Left Frontal  lobe.", "left frontal lobe") == 1
    assert exact_match("left temporal lobe", "left frontal lobe") == 0


def test_token_f1_counts_repeated_words() -> None:
    # given: the left lobe left; right: a left lobe. Common: left, lobe.
    assert token_f1("The left, lobe LEFT.", "a left lobe") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert token_f1("none", "left") == 0
    assert token_f1("", "left") == token_f1("left", "...") == 0
    assert token_f1("", "") == 1


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        ("A lesion in the left lobe", "Lesion, left-sided", 1),
        ("A lesion in the right lobe", "Lesion, left-sided", 0),
        ("LEFT", "left and right", 0),
        ("Bilateral atrophy", "Atrophy of both hippocampi", 1),
        ("left and  right", "bilaterally", 1),
        ("left frontal, right temporal", "left frontal", pytest.approx(2 / 3)),
        ("a lesion", "on the left", 0),
        ("on the left", "a lesion", 0),
        ("a lesion", "no lesion", None),
        ("brightness of the cleft", "L1, TR", None),
        ("right-handed, lesion on the left", "left", 1),
        ("L hippocampus", "R hippocampus", 0),
    ],
)
def test_laterality_f1_of_sides(generated: str, answer: str, expected: float | None) -> None:
    assert laterality_f1(generated, answer) == expected


@pytest.mark.parametrize("name", TEXT_SCORES)
def test_reasoning_is_removed_before_scoring(name: str) -> None:
    assert text_scores()[name]("<think>right, bilateral, both lobes</think>left lobe", "left lobe") == 1


def test_packaged_lexicon_has_each_side() -> None:
    lexicon = packaged_lexicon()
    assert set(lexicon.entries.values()) == {"left", "right", "bilateral", "ignored"}
    assert all(lexicon.sides(word) == {side} - {"ignored"} for word, side in lexicon.entries.items())


def test_lexicon_of_a_lab_replaces_the_words(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("left: [links, Linke Seite]\nright: [rechts]\nbilateral: [beidseits]\n", encoding="utf-8")
    scores = text_scores(laterality_lexicon=path)
    assert list(scores) == list(TEXT_SCORES)
    assert scores["laterality_f1"]("Läsion, linke  Seite", "links") == 1
    assert scores["laterality_f1"]("rechts", "links") == 0
    assert scores["laterality_f1"]("left", "right") is None


def test_problems_of_a_lexicon_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("left: [l, no]\nright: [L, r]\nbilaterl: [both]\n", encoding="utf-8")
    with pytest.raises(RunError) as caught:
        read_lexicon(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in lines] == [
        "bilaterl", "bilateral", "left", "right",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["left: [", "- left", "", "left: l\nright: [r]\nbilateral: [b]\n", "\x00"])
def test_lexicon_of_another_form_is_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"words\.yaml"):
        read_lexicon(path)
    with pytest.raises(RunError, match=r"missing\.yaml"):
        read_lexicon(tmp_path / "missing.yaml")


@pytest.fixture
def _theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of another package."""
    (tmp_path / "their_scores.py").write_text(THEIRS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_theirs")
def test_scores_of_other_packages_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    add_entry_points(monkeypatch, length="their_scores:length", never="their_scores:never")
    scores = text_scores()
    assert list(scores) == [*TEXT_SCORES, "length", "never"]
    assert scores["length"]("<think>because</think>four", "two") == 1.0
    assert scores["never"]("", "") is None


def test_broken_scores_of_other_packages_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    add_entry_points(monkeypatch, missing="no_such_module:f", number="math:pi", rouge_l="math:sqrt")
    with pytest.raises(RunError) as caught:
        text_scores()
    assert [line.split("'")[1] for line in str(caught.value).splitlines()] == ["missing", "number", "rouge_l"]


@pytest.mark.usefixtures("_theirs")
@pytest.mark.parametrize("function", ["raises", "infinite", "word"])
def test_failing_scores_of_other_packages_are_named(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    add_entry_points(monkeypatch, theirs=f"their_scores:{function}")
    with pytest.raises(RunError, match="'theirs'"):
        text_scores()["theirs"]("a", "b")
