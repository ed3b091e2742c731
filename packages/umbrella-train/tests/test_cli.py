"""The commands: arguments, help without torch, and errors as one message."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from umbrella_data.pipeline.config import AugmentConfig, PipelineSettings
from umbrella_data.progress import progress_bar
from umbrella_train import cli
from umbrella_train.config import DatasetConfig, RunConfig, load_config
from umbrella_train.config.overrides import apply_overrides, describe_keys
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.evaluation.score_table import score_table

SCORES = {
    "eval/accuracy/T1/sex": 0.97531,
    "eval/accuracy_lower/T1/sex": 0.9,
    "eval/accuracy_upper/T1/sex": 0.99,
    "eval/majority/T1/sex": 0.5,
    "eval/subjects/T1/sex": 64,
}


TRACKERS = {"wandb", "tensorboard", "trackio", "mlflow"}
DEFAULTS = {"dry_run": False, "resume": None, "allow_changed": [], "max_time": None}


@pytest.fixture(autouse=True)
def _hide_other_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """Fake `umbrella_train.run.training` and `evaluation` that record their calls."""
    module = types.ModuleType("umbrella_train.run.training")
    module.calls = []

    def train(config: RunConfig, **options: object) -> Path:
        module.calls.append((config, options))
        return tmp_path

    def evaluate_run(folder: Path, **options: object) -> dict[str, float]:
        module.calls.append((folder, options))
        return SCORES

    module.train, module.evaluate_run = train, evaluate_run
    for name in ("umbrella_train.run.training", "umbrella_train.run.evaluation"):
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(name, module, raising=False)
    return module


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("{}")
    return tmp_path


def test_train_without_arguments_runs_the_demo(
    run: types.ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli.train_command([])
    assert run.calls == [(load_config(None), DEFAULTS)]
    assert str(tmp_path) in capsys.readouterr().out


def test_train_passes_its_options_and_overrides(run: types.ModuleType) -> None:
    cli.train_command(["--trainer.max-steps", "-1", "--dry-run", "--resume", "auto", "--trainer.learning-rate", "1e-4"])
    ((config, options),) = run.calls
    assert (config.trainer.max_steps, config.trainer.learning_rate) == (-1, 1e-4)
    assert options == {**DEFAULTS, "dry_run": True, "resume": "auto"}


def test_train_passes_the_options_of_a_job(run: types.ModuleType) -> None:
    cli.train_command(["--resume", "auto", "--allow-changed", "data,trainer.learning-rate", "--max-time", "2:30:00"])
    ((_, options),) = run.calls
    assert options == {
        **DEFAULTS,
        "resume": "auto",
        "allow_changed": ["data", "trainer.learning_rate"],
        "max_time": 9000,
    }


@pytest.mark.parametrize(
    ("text", "seconds"), [("900", 900), ("0:01:05", 65), ("26:00:00", 93600), ("1-02:00:00", 93600)]
)
def test_max_time_is_a_time_of_slurm_or_seconds(run: types.ModuleType, text: str, seconds: float) -> None:
    cli.train_command(["--max-time", text])
    assert run.calls[0][1]["max_time"] == seconds


@pytest.mark.parametrize("words", [["--max-time", "2h"], ["--max-time", "2:30"], ["--allow-changed", "data"]])
def test_wrong_options_of_a_job_are_errors(run: types.ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.train_command(words)
    assert caught.value.code == 2
    assert run.calls == []


def test_train_prints_the_run_folder_only_on_rank_0(
    run: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    cli.train_command([])
    assert capsys.readouterr().out == ""


def test_train_prints_no_folder_after_a_dry_run(
    run: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "train", lambda config, **options: None)
    cli.train_command(["--dry-run"])
    assert capsys.readouterr().out == ""


def test_train_shows_messages_of_the_run(
    run: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = logging.getLogger("umbrella_train.trainer.dry_run")
    monkeypatch.setattr(run, "train", lambda config, **options: messages.info("step 1"))
    cli.train_command(["--dry-run"])
    assert capsys.readouterr().err == "step 1\n"


@pytest.mark.parametrize(("rank", "shown"), [("0", "kept\n"), ("1", "")])
def test_train_shows_messages_of_the_model_only_on_rank_0(
    run: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    shown: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    messages = logging.getLogger("umbrella_model.from_llava")
    monkeypatch.setattr(run, "train", lambda config, **options: messages.info("kept"))
    cli.train_command(["--dry-run"])
    assert capsys.readouterr().err == shown


def test_train_reports_wrong_keys_in_one_message_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.train_command(["--trainer.learning-rat", "1", "--seed", "x"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "2 problems" in message
    assert "Traceback" not in message


def test_errors_that_a_user_can_fix_end_with_exit_code_2(
    run: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: RunConfig, **options: object) -> Path:
        raise RunError("expected 4 processes, 2 were launched")

    monkeypatch.setattr(run, "train", fail)
    with pytest.raises(SystemExit) as caught:
        cli.train_command([])
    assert caught.value.code == 2
    assert "2 were launched" in capsys.readouterr().err


def test_notes_of_an_error_are_printed(
    run: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: RunConfig, **options: object) -> Path:
        error = RunError("is damaged")
        error.add_note("while reading a T1 scan of line 3")
        raise error

    monkeypatch.setattr(run, "train", fail)
    with pytest.raises(SystemExit) as caught:
        cli.train_command([])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: is damaged\nwhile reading a T1 scan of line 3\n"


def test_other_errors_keep_their_traceback(run: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig, **options: object) -> Path:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.train_command([])


def test_eval_passes_its_options_and_prints_a_table(
    run: types.ModuleType, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.eval_command(
        [
            str(run_folder),
            "--manifest",
            "a.jsonl",
            "--manifest",
            "b.jsonl",
            "--no-controls",
            "--max-samples",
            "3",
            "--out",
            "answers.jsonl",
        ]
    )
    options = {"manifests": [Path("a.jsonl"), Path("b.jsonl")], "data_root": None, "controls": False, "max_samples": 3}
    options |= {"out": Path("answers.jsonl"), "baselines": False, "segmentations": None}
    assert run.calls == [(run_folder, options)]
    assert capsys.readouterr().out == score_table(SCORES) + "\n"


def test_eval_prints_the_baselines_after_the_models_scores(
    run: types.ModuleType, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {**SCORES, "baseline/cnn/accuracy/T1/sex": 0.75}
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(run, "evaluate_run", lambda folder, **options: calls.append(options) or scores)
    cli.eval_command([str(run_folder), "--baselines", "--segmentations", "derivatives"])
    assert (calls[0]["baselines"], calls[0]["segmentations"]) == (True, Path("derivatives"))
    printed = capsys.readouterr().out
    assert printed == score_table(scores) + "\n"
    assert "\n  cnn " in printed


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        ("predict", [], "--question"),
        ("predict", ["--manifest", "a.jsonl", "--question", "?"], "--question cannot be combined with --manifest"),
        ("predict", ["--manifest", "a.jsonl", "--scan", "T1=a.nii"], "--scan cannot be combined with --manifest"),
        ("predict", ["--question", "?", "--out", "a.jsonl"], "--out needs --manifest"),
        ("predict", ["--question", "?", "--data-root", "."], "--data-root needs --manifest"),
        ("predict", ["--question", "?", "--batch-size", "2"], "--batch-size needs --manifest"),
        ("predict", ["--manifest", "a.jsonl", "--batch-size", "0"], "--batch-size: 0"),
        ("eval", ["--data-root", "."], "--data-root needs --manifest"),
        ("eval", ["--max-samples", "0"], "--max-samples: 0"),
        ("eval", ["--segmentations", "derivatives"], "--segmentations needs --baselines"),
    ],
)
def test_options_that_would_be_ignored_are_rejected(
    run: types.ModuleType,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
    named: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        getattr(cli, f"{command}_command")([str(run_folder), *words])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert run.calls == []


def test_answers_end_with_their_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("umbrella_train.assembly.answer_manifests")
    rows = iter([{"id": "a"}, {"id": "b"}, {"id": "c"}])
    module.answer_manifests = lambda *words, **options: rows
    monkeypatch.setitem(sys.modules, module.__name__, module)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        cli.predict_command([str(tmp_path), "--manifest", "a.jsonl"])
    assert list(rows) == [{"id": "b"}, {"id": "c"}]


def test_eval_without_scores_prints_no_table(
    run: types.ModuleType, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "evaluate_run", lambda folder, **options: {})
    cli.eval_command([str(run_folder), "--manifest", "a.jsonl", "--out", "answers.jsonl"])
    assert capsys.readouterr().out == ""


def test_eval_reports_which_files_it_wrote(
    run: types.ModuleType, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = logging.getLogger("umbrella_train.run.evaluation")
    monkeypatch.setattr(run, "evaluate_run", lambda folder, **options: messages.info("nothing was written") or SCORES)
    cli.eval_command([str(run_folder), "--json"])
    printed = capsys.readouterr()
    assert (json.loads(printed.out), printed.err) == (SCORES, "nothing was written\n")


def test_eval_prints_every_metric_as_json(
    run: types.ModuleType, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.eval_command([str(run_folder), "--json"])
    assert json.loads(capsys.readouterr().out) == SCORES


def test_a_stopped_run_ends_with_the_exit_code_of_its_signal(
    run: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(config: RunConfig, **options: object) -> Path:
        raise RunStoppedError(tmp_path, step=5, signal_number=signal.SIGINT)

    monkeypatch.setattr(run, "train", stop)
    with pytest.raises(SystemExit) as caught:
        cli.train_command([])
    assert caught.value.code == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("stopped after step 5")
    assert "--resume auto" in printed.err
    # A launcher that restarts failed processes must not start a second run.
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(SystemExit) as caught:
        cli.train_command([])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("words", "name", "meant"),
    [
        (["my.yaml"], "my.yaml", "--config my.yaml"),
        (["train"], "train", ""),
        (["--confg", "my.yaml"], "--confg", "'--config'"),
        (["--seed", "1", "--resum=auto"], "--resum", "'--resume'"),
    ],
)
def test_train_suggests_the_option_for_a_misspelt_one(
    run: types.ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], name: str, meant: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.train_command(words)
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {name}: ")
    assert meant in error
    assert run.calls == []


def test_help_shows_the_keys_of_empty_lists_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    cli.train_command(["--help"])
    printed = capsys.readouterr().out
    for key in ("data.train.0.manifest", "data.evaluation.0.data-root", "data.pipelines.T1.augment.max-shift"):
        assert f"--{key}" in printed
    assert "with the values of the demo" in printed


def test_help_ignores_a_closed_pipe() -> None:
    words = [sys.executable, "-c", "from umbrella_train import cli; cli.train_command(['--help'])"]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None
    command.stdout.close()
    _, printed = command.communicate(timeout=60)
    assert (command.returncode, printed) == (0, "")


@pytest.mark.parametrize("command", [cli.eval_command, cli.report_command])
def test_a_folder_that_is_not_a_run_is_rejected(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: types.ModuleType
) -> None:
    with pytest.raises(SystemExit) as caught:
        command([str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    assert run.calls == []


@pytest.mark.parametrize(
    "command", ["train_command", "eval_command", "predict_command", "app_command", "report_command"]
)
def test_help_imports_nothing_heavy(command: str) -> None:
    unneeded = {
        "torch",
        "transformers",
        "matplotlib",
        "scipy",
        "monai",
        "nibabel",
        "numpy",
        "pandas",
        "shtab",
        "starlette",
        "uvicorn",
        *TRACKERS,
    }
    # The keys of the configuration are described by its classes.
    unneeded |= set() if command == "train_command" else {"pydantic"}
    code = (
        "import sys; from umbrella_train import cli\n"
        f"try: cli.{command}(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        f"found = {unneeded!r} & sys.modules.keys()\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: umbrella-" in done.stdout
    if command == "train_command":
        assert "--model.modalities.T1.patch-size" in done.stdout


def test_commands_import_only_what_they_need() -> None:
    # In this order: what a module may import is also there for the next ones.
    unneeded = {
        "umbrella_train.report": {"torch", "transformers", "scipy", "nibabel", "monai"},
        "umbrella_train.assembly.predict": {"transformers.trainer", "datasets", "scipy.stats", "monai", "wandb"},
        "umbrella_train.assembly.answer_manifests": {"transformers.trainer", "datasets", "scipy.stats", "wandb"},
        "umbrella_train.run.evaluation": {"transformers.trainer", "datasets", "scipy.stats", "scipy.ndimage", "wandb"}
        | {"sklearn"},
    }
    code = (
        "import importlib, sys\n"
        f"for name, unneeded in {unneeded!r}.items():\n"
        "    importlib.import_module(name)\n"
        "    found = unneeded & sys.modules.keys()\n"
        "    assert not found, (name, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_training_imports_no_drawing_and_no_tracker() -> None:
    unneeded = {"matplotlib", "scipy.stats", "monai", "sklearn", *TRACKERS}
    code = (
        f"import sys, umbrella_train.run.training\nfound = {unneeded!r} & sys.modules.keys()\nassert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_configuration_is_reported_without_torch(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(f"name: x\nunknown: 1\ntrainer: {{report_to: [{', '.join(TRACKERS)}]}}\n")
    code = (
        "import sys; from umbrella_train import cli\n"
        f"try: cli.train_command(['--config', {str(tmp_path / 'wrong.yaml')!r}])\n"
        "except SystemExit as end: assert end.code == 2\n"
        f"assert not { {'torch', 'transformers', 'nibabel', 'numpy', *TRACKERS} } & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "unknown" in done.stderr


@pytest.mark.parametrize(
    ("words", "has_progress", "has_messages"),
    [([], True, True), (["--quiet"], False, False), (["--quiet", "--dry-run"], False, True)],
)
def test_quiet_hides_progress_and_messages_but_not_the_tables_of_a_dry_run(
    run: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    *,
    has_progress: bool,
    has_messages: bool,
) -> None:
    def train(config: RunConfig, **options: object) -> None:
        logging.getLogger("umbrella_train.run.training").info("a message")
        logging.getLogger("umbrella_model.anything").warning("a warning")
        list(progress_bar(range(3), words="working"))

    monkeypatch.setattr(run, "train", train)
    cli.train_command(words)
    shown = capsys.readouterr().err
    assert ("working: 3/3" in shown, "a message" in shown) == (has_progress, has_messages)
    assert "a warning\n" in shown


@pytest.mark.parametrize("command", [cli.eval_command, cli.predict_command, cli.app_command, cli.report_command])
def test_every_command_has_quiet(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "--quiet" in capsys.readouterr().out


def test_module_is_the_train_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "umbrella_train", "--seed", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "seed" in done.stderr


def test_every_flag_of_the_help_is_a_valid_override() -> None:
    config = load_config(None)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]+", describe_keys(config))) - {"--help"}
    assert len(flags) > 60
    content = config.model_dump(mode="json")
    # The help shows empty lists and tables with an entry.
    dataset = DatasetConfig(manifest=Path("train.jsonl"))
    pipeline = PipelineSettings(augment=AugmentConfig())
    content["data"] |= {
        "train": [dataset.model_dump(mode="json")],
        "evaluation": [dataset.model_dump(mode="json")],
        "pipelines": {"T1": pipeline.model_dump(mode="json")},
    }
    content["stages"] = [{"name": "align", "seed": 0}]
    for flag in flags:
        values = [] if ".no-" in flag else ["1"]
        changed, problems = apply_overrides(content, overrides=[flag, *values], section=RunConfig)
        assert problems == []
        # An unknown key would have been added.
        assert keys_of(changed) == keys_of(content), flag


def keys_of(content: object) -> object:
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [keys_of(value) for value in content]
    # An empty table is a value: the flag with its name replaces it.
    return {key: keys_of(value) for key, value in content.items()} if content and isinstance(content, dict) else None
