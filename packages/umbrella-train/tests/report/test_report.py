"""The report of synthetic run folders: its figures, tables and messages, and what it must not contain."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from umbrella_data.manifest.sample import Answer
from umbrella_data.viewer import viewer_script
from umbrella_train.config import dump_config, load_config
from umbrella_train.errors import RunError
from umbrella_train.evaluation.metrics import summarise
from umbrella_train.evaluation.predictions import CONDITIONS, Condition, Prediction, Reply, read_reply
from umbrella_train.evaluation.score_table import NO_INTERVAL, OVERLAP_NOTE, Cell
from umbrella_train.report import build_report
from umbrella_train.report.answers import accuracy_figure, error_figure
from umbrella_train.report.curves import MAX_POINTS, gradient_figure, loss_figure
from umbrella_train.report.figure_style import draw, modality_colours
from umbrella_train.report.page import without_paths
from umbrella_train.report.run_data import gradient_norms, has_viewers, points, read_run
from umbrella_train.report.tables import score_tables
from umbrella_train.run_folder import RunFolder

MODALITIES = ("T1", "rsfMRI", "dMRI")
# The smallest PNG there is: one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


def make_run(
    folder: Path, *, name: str = "demo", overrides: tuple[str, ...] = (), num_steps: int = 60, is_evaluated: bool = True
) -> RunFolder:
    """A run folder as written by a run with single-modality batches."""
    config = load_config(None, ["--name", name, "--data.cache-dir", "/secret/place", *overrides])
    run = RunFolder.create(folder, name=name, config_text=dump_config(config))
    dice = random.Random(name)
    for step in range(5, num_steps + 1, 5):
        present = MODALITIES[step // 5 % 3]
        row: dict[str, Any] = {"step": step, "loss": 3 * math.exp(-step / 20) + 0.02 + 0.1 * dice.random()}
        for modality in MODALITIES:
            label, norm = (modality, 0.2 + dice.random()) if modality == present else ("inactive", 1e-7)
            row[f"grad/[{label}]/vision_tower.{modality}_patch_embed"] = norm
            row[f"grad/[{label}]/vision_tower.{modality}_patch_embed.proj"] = norm * 0.9
        run.append_metrics(row)
    if is_evaluated:
        predictions = [
            ask(dice, modality, i, kind) for modality in MODALITIES for kind in CONDITIONS for i in range(40)
        ]
        predictions += [ask_age(dice, i, kind) for kind in CONDITIONS for i in range(40)]
        run.append_metrics({"step": num_steps, "eval_loss": 0.1})
        run.append_metrics({"step": num_steps, **summarise(predictions)})
        run.write_predictions(prediction.to_row() for prediction in predictions)
        run.model.mkdir()
        (run.model / "config.json").write_text("{}")
    for modality in MODALITIES:
        (run.pictures / f"{modality}.png").write_bytes(PNG)
    return run


def ask(dice: random.Random, modality: str, number: int, condition: Condition) -> Prediction:
    value = ("left", "right")[number % 2]
    generated = value if condition == "accuracy" and number else dice.choice(["left", "right"])
    answer = Answer(type="choice", value=value, options=("left", "right"))
    return prediction(modality, "lesion_side", number, condition, generated, answer)


def ask_age(dice: random.Random, number: int, condition: Condition) -> Prediction:
    spread = 4 if condition == "accuracy" else 15
    generated = f"{50 + number % 20 + dice.gauss(0, spread):.0f} years"
    return prediction(
        "T1", "age", number, condition, generated, Answer(type="number", value=50.0 + number % 20, unit="years")
    )


def prediction(
    modality: str, task: str, number: int, condition: Condition, generated: str, answer: Answer
) -> Prediction:
    reply = Reply(generated)
    if answer.type == "choice" and generated in answer.options:
        scores = tuple(-0.2 if option == generated else -1.7 for option in answer.options)
        reply = replace(reply, option_scores=scores, option_lengths=(1,) * len(scores))
    elif digits := re.match(r"\d+", generated):
        expected = float(digits[0])
        reply = replace(reply, expected=expected, interval=(expected - 5, expected + 5))
    return Prediction(
        subject=f"{number:016x}",
        task=task,
        modality=modality,
        condition=condition,
        question=f"What of {task}?",
        type=answer.type,
        options=answer.options,
        answer=answer.value,
        unit=answer.unit,
        **read_reply(reply, answer),
    )


class Page(HTMLParser):
    """The parts of a report, and whether its tags match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.sections: list[str] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.append(given.get("id") or given["class"])
        if tag == "img":
            assert given["alt"]
            self.images.append(given["src"])
        self.addresses += [value for key, value in given.items() if key in {"src", "href"}]
        if tag not in {"img", "meta", "br", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(" ".join(data.split()))


def test_report_of_a_run_has_all_its_parts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert build_report([run.path]) == run.report
    page = Page(run.report)
    assert page.sections == [
        "accuracy",
        "outcomes",
        "loss",
        "gradients",
        "pictures",
        "numbers",
        "examples",
        "configuration",
    ]
    assert len([image for image in page.images if image.startswith("data:image/svg+xml;base64,")]) == 5
    shown = re.findall(r'alt="A (\w+) scan as the model sees it"', page.text)
    assert shown == list(MODALITIES)
    assert [image for image in page.images if "png" in image] == [
        "data:image/png;base64," + base64.b64encode(PNG).decode()
    ] * 3
    for words in (
        "97.5 %",
        "40 subjects, 95 % interval 0.",
        "dMRI · lesion side",
        "years",
        "1e-07, unit, update",
        "32×32×32, patch 8×8×8",
    ):
        assert any(words in text for text in page.words), words


def test_report_needs_no_other_file_and_has_no_path(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = Page(build_report([run.path]))
    assert all(address.startswith("data:") for address in page.addresses)
    assert re.findall(r"https?://|<script|@import|url\(", page.text) == []
    assert "secret" not in page.text
    assert str(tmp_path) not in page.text
    assert run.salt.read_text().strip() not in page.text


def test_report_is_reproducible(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert build_report([run.path]).read_text() == build_report([run.path], output=tmp_path / "again.html").read_text()


def test_generated_text_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in run.predictions.read_text().splitlines()]
    run.write_predictions([{**rows[0], "generated": "<script>alert(1)</script>"}])
    assert "<script" not in build_report([run.path]).read_text()


def test_questions_without_one_readable_answer_are_in_the_table(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    answer = Answer(type="number", value=50.0, unit="years")
    predictions = [prediction("T1", "age", number, "accuracy", "no idea", answer) for number in range(3)]
    run.append_metrics({"step": 60, **summarise(predictions)})
    run.write_predictions(one.to_row() for one in predictions)
    (table,) = score_tables([read_run(run.path, name="demo")])
    (row,) = table["rows"]
    assert (table["has_units"], row["name"], row["unit"]) == (True, "T1 · age", "years")
    assert row["cells"]["unparsed"].value == "100.0 %"
    assert row["cells"]["error"] == Cell("–")
    assert "numbers" in Page(build_report([run.path])).sections


def test_report_of_one_subject_has_figures_without_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    predictions = [ask_age(random.Random(0), 0, condition) for condition in CONDITIONS]
    metrics = summarise(predictions)
    assert "eval/error_lower/T1/age" not in metrics
    run.append_metrics({"step": 60, **metrics})
    run.write_predictions(one.to_row() for one in predictions)
    assert "numbers" in Page(build_report([run.path])).sections
    (panel,) = error_figure([read_run(run.path, name="demo")]).axes
    assert panel.get_title() == "T1 · age"
    assert [row["cells"]["error"].note for row in score_tables([read_run(run.path, name="demo")])[0]["rows"]] == [
        NO_INTERVAL
    ]


def test_loss_figure_has_the_held_out_loss_of_each_modality(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    run.append_metrics({"step": 60, "eval_loss": 0.5, "eval/loss/T1": 0.1, "eval/loss/rsfMRI": 0.9})
    (axes,) = loss_figure([read_run(run.path, name="demo")]).axes
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}
    assert (drawn["held out, T1"], drawn["held out, rsfMRI"]) == ([0.1], [0.9])


def test_names_of_options_are_drawn_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    answer = Answer(type="choice", value="$\\less$5", options=("$\\less$5", "<b>$x_$</b>"))
    predictions = [prediction("T1", "cost", i, "accuracy", answer.options[i % 2], answer) for i in range(4)]
    run.append_metrics({"step": 60, **summarise(predictions)})
    run.write_predictions(one.to_row() for one in predictions)
    assert "outcomes" in Page(build_report([run.path])).sections


@pytest.mark.parametrize("is_used", [True, False])
def test_marks_at_the_top_are_explained(tmp_path: Path, is_used: bool) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    answer = Answer(type="choice", value="left", options=("left", "right"))
    said = {"accuracy": "left", "shuffled": "right" if is_used else "left"}
    predictions = [prediction("T1", "side", i, kind, said[kind], answer) for i in range(9) for kind in said]
    run.append_metrics({"step": 60, **summarise(predictions)})
    words = Page(build_report([run.path])).words
    assert ("100.0 %*" in words) != is_used
    assert words.count(OVERLAP_NOTE) == (0 if is_used else 2)  # below the tiles, and below the table


def test_figures_of_one_subject_are_drawn_without_an_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    dice = random.Random(0)
    predictions = [each for kind in CONDITIONS for each in (ask(dice, "T1", 0, kind), ask_age(dice, 0, kind))]
    metrics = summarise(predictions)
    assert "eval/error/T1/age" in metrics
    assert "eval/error_lower/T1/age" not in metrics
    run.append_metrics({"step": 60, **metrics})
    run.write_predictions(each.to_row() for each in predictions)
    assert "T1 · age" in build_report([run.path]).read_text()


def test_a_task_with_hits_and_errors_is_in_both_tables(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    number = Answer(type="number", value=50.0, unit="years")
    choice = Answer(type="choice", value="old", options=("old", "young"))
    answers = (("52", number), ("old", choice))
    predictions = [prediction("T1", "age", index, "accuracy", *each) for index, each in enumerate(answers)]
    run.append_metrics({"step": 60, **summarise(predictions)})
    data = read_run(run.path, name="demo")
    hits, errors = score_tables([data])
    assert [row["cells"]["accuracy"].value for row in hits["rows"]] == ["100.0 %"]
    assert [row["cells"]["error"].value for row in errors["rows"]] == ["2"]


def test_report_of_a_crashed_run_has_notes(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    with run.metrics.open("a") as file:
        file.write('{"step": 65, "lo')
    page = Page(build_report([run.path]))
    assert page.sections == ["notes", "loss", "gradients", "pictures", "configuration"]
    words = " ".join(page.words)
    assert "metrics.jsonl: 1 line" in words
    assert "step 60" in words
    assert "not evaluated" in words


def test_report_of_a_run_that_logged_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, name="empty", config_text="name: [broken\n")
    page = Page(build_report([run.path]))
    assert page.sections == ["notes", "configuration"]
    words = " ".join(page.words)
    assert "config.yaml: line 2: not YAML" in words
    assert "has no training loss" in words


def test_non_finite_losses_are_counted_and_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path, is_evaluated=False)
    run.append_metrics({"step": 65, "loss": math.nan})
    data = read_run(run.path, name="demo")
    assert "The loss was not finite in 1 of 13 lines, first at step 65" in data.notes
    (axes,) = loss_figure([data]).axes
    assert sum(list(line.get_xdata()) == [65, 65] for line in axes.lines) == 1


def test_skipped_steps_are_noted_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert not [note for note in read_run(run.path, name="demo").notes if "skipped" in note]
    for step, counts in ((61, {"non_finite/skipped": 1}), (62, {"non_finite/skipped": 2, "loss": 1.0})):
        run.append_metrics({"step": step, **counts})
    (note,) = [note for note in read_run(run.path, name="demo").notes if "skipped" in note]
    assert note.startswith("non_finite.jsonl: 2 steps")


def test_a_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run's folder"):
        build_report([tmp_path])


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name=name) for name in ("demo", "other")]
    runs.append(make_run(tmp_path, name="third", overrides=("--trainer.learning-rate", "0.5")))
    target = build_report([run.path for run in runs])
    assert target == tmp_path / "comparison.html"
    page = Page(target)
    assert not any(run.report.exists() for run in runs)
    words = " ".join(page.words)
    assert "trainer.learning_rate 0.002 0.002 0.5" in " ".join(words.split())
    # The runs have the same pictures: they are shown once.
    assert len([image for image in page.images if "png" in image]) == 3


@pytest.mark.parametrize("synthetic", [None, {"num_train": 3}])
@pytest.mark.parametrize("choice", [None, False, True])
def test_whole_scans_are_in_the_report_if_asked_for_or_synthetic(
    choice: bool | None, synthetic: dict[str, int] | None
) -> None:
    expected = choice if choice is not None else synthetic is not None
    assert has_viewers({"report": {"viewer": choice}, "data": {"synthetic": synthetic}}) is expected


@pytest.mark.parametrize("config", [{}, {"report": None, "data": None}, {"report": "broken", "data": []}])
def test_whole_scans_of_an_unreadable_configuration_are_not_in_the_report(config: dict[str, Any]) -> None:
    assert has_viewers(config) is False


def test_viewers_are_in_the_report_while_its_config_says_so(tmp_path: Path) -> None:
    scan = '<details class="scan-viewer"><summary>{}</summary><script type="application/json">{{}}</script></details>'
    runs = [make_run(tmp_path, name=name, overrides=("--report.viewer", "true")) for name in ("demo", "other")]
    off = make_run(tmp_path, name="off", overrides=("--report.viewer", "false"))
    for run in (*runs, off):
        (run.pictures / "dMRI.html").write_text(scan.format("FA"))
        (run.pictures / "T1.html").write_text(scan.format("T1" if run is runs[0] else "another T1"))
    page = Page(build_report([runs[0].path]))
    assert page.text.index(scan.format("T1")) < page.text.index(scan.format("FA"))
    # The script is in the page, once: the report needs no other file.
    assert page.text.count(viewer_script()) == 1
    assert not [address for address in page.addresses if not address.startswith("data:")]
    # One viewer of each different scan.
    both = Page(build_report([run.path for run in runs], output=tmp_path / "both.html")).text
    assert [both.count(scan.format(name)) for name in ("T1", "another T1", "FA")] == [1, 1, 1]
    assert both.count(viewer_script()) == 1
    without = Page(build_report([off.path])).text
    assert 'scan-viewer"' not in without
    assert "niivue" not in without


def test_runs_of_one_name_are_distinguished_by_their_folder(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place) for place in ("a", "b")]
    page = Page(build_report([run.path for run in runs], output=tmp_path / "both.html"))
    assert {"a/demo", "b/demo"} <= set(page.words)


def test_gradient_norms_are_read_by_their_keys(tmp_path: Path) -> None:
    norms = gradient_norms(read_run(make_run(tmp_path).path, name="demo").training)
    assert set(norms) == set(MODALITIES)
    assert norms["rsfMRI"].active.steps == (5, 20, 35, 50)
    assert set(norms["rsfMRI"].inactive.values) == {1e-7}
    assert len(norms["rsfMRI"].inactive.steps) == 8
    # The whole patch embed, not its projection.
    assert min(norms["T1"].active.values) >= 0.2


def test_gradient_figure_distinguishes_active_and_inactive(tmp_path: Path) -> None:
    data = read_run(make_run(tmp_path).path, name="demo")
    figure = gradient_figure([data], scale=1e-7)
    assert [axes.get_title() for axes in figure.axes] == list(MODALITIES)
    for axes in figure.axes:
        inactive, active, expected = axes.lines
        assert axes.get_yscale() == "log"
        assert (len(inactive.get_xdata()), len(active.get_xdata())) == (8, 4)
        assert inactive.get_markerfacecolor() == "white" != active.get_markerfacecolor()
        assert list(expected.get_ydata()) == [1e-7, 1e-7]


def test_accuracy_figure_shows_controls_chance_and_intervals(tmp_path: Path) -> None:
    data = read_run(make_run(tmp_path).path, name="demo")
    (axes,) = accuracy_figure([data]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{name} · lesion side" for name in MODALITIES]
    # A question: the line of chance, and four values with an interval each.
    assert len(axes.lines) == 3 * (1 + 4 * 2)
    assert len(axes.collections) == 3
    assert [list(line.get_xdata()) for line in axes.lines[::9]] == [[0.5, 0.5]] * 3
    shown = {line.get_marker(): line.get_xdata()[0] for line in axes.lines[:9] if len(line.get_xdata()) == 1}
    names = {"o": "accuracy", "s": "shuffled", "^": "swapped", "D": "no_scan"}
    assert shown == {marker: data.evaluation[f"eval/{name}/T1/lesion_side"] for marker, name in names.items()}


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=5, is_evaluated=False)
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(10, 30_000))
    (axes,) = loss_figure([read_run(run.path, name="demo")]).axes
    assert {len(line.get_xdata()) for line in axes.lines} == {MAX_POINTS}
    assert (axes.lines[0].get_xdata()[0], axes.lines[0].get_xdata()[-1]) == (5, 29_999)


def test_points_are_sorted_and_keep_non_finite_values() -> None:
    series = points([{"step": 2, "loss": None}, {"step": 1, "loss": 0.5}, {"loss": 3.0}], "loss")
    assert series.steps == (1, 2)
    assert series.values[0] == 0.5
    assert math.isnan(series.values[1])


def test_paths_are_hidden_and_nothing_else() -> None:
    words = [
        "--data.synthetic",
        "null",
        "--data.train.0.manifest",
        "/data/sub/m.jsonl",
        "--model.tokenizer",
        "/my/words",
    ]
    shown = without_paths(load_config(None, words).model_dump(mode="json"))
    assert shown["data"]["train"] == [{"manifest": "(see config.yaml)", "data_root": None, "weight": 1.0}]
    assert shown["output_dir"] == shown["model"]["tokenizer"] == "(see config.yaml)"
    assert shown["model"]["modalities"]["T1"]["image_size"] == [32, 32, 32]
    assert shown["model"]["vision_config"]["model_type"] == "siglip_vision_model"
    assert without_paths({"model": {"pretrained": "org/llava"}}) == {"model": {"pretrained": "org/llava"}}


def test_figures_are_drawn_without_a_display(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    build_report([make_run(tmp_path).path])
    assert plt.get_fignums() == []
    assert isinstance(loss_figure([read_run(tmp_path / "demo", name="demo")]), Figure)


def test_a_modality_has_one_colour_in_all_figures() -> None:
    configured = ["T1", "rsfMRI", "dMRI"]
    gradients, answers = modality_colours(configured, configured), modality_colours(configured, ["dMRI", "T1"])
    assert gradients == answers
    assert len(set(gradients.values())) == 3
    assert list(modality_colours([], ["dMRI", "T1"])) == ["T1", "dMRI"]


def test_changes_at_a_resume_are_listed_without_paths(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.add_changes(["seed: 7 (before: 0)", "model.pretrained: '/secret/model' (before: not set)"], step=20)
    page = build_report([run.path]).read_text()
    assert "resumed after step 20 with another setting: seed: 7 (before: 0)" in page
    assert "resumed after step 20 with another setting: model.pretrained (see config.yaml)" in page
    assert "/secret" not in page


def test_labels_of_a_logarithmic_axis_are_plain(tmp_path: Path) -> None:
    uri = draw(lambda: gradient_figure([read_run(make_run(tmp_path).path, name="demo")], scale=1e-7))
    assert "mathdefault" not in base64.b64decode(uri.partition(",")[2]).decode()


@pytest.mark.parametrize(
    ("overrides", "is_chosen"),
    [
        ((), False),
        (("--trainer.load-best-model-at-end", "true", "--trainer.eval-steps", "5"), True),
        (("--trainer.early-stopping-patience", "2", "--trainer.eval-steps", "5"), True),
        (("--trainer.early-stopping-patience", "2", "--trainer.metric-for-best-model", "loss"), False),
        (("--trainer.metric-for-best-model", "eval_loss", "--trainer.eval-steps", "5"), False),
    ],
)
def test_a_model_that_was_chosen_on_the_evaluation_subjects_is_named(
    tmp_path: Path, overrides: tuple[str, ...], is_chosen: bool
) -> None:
    data = read_run(make_run(tmp_path, overrides=overrides).path, name="demo")
    assert any("was chosen by eval_loss" in note for note in data.notes) == is_chosen
