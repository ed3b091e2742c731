"""Runs in stages, end to end with a tiny model: weights of the stage before, resuming, and job chains."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from umbrella_train import cli, train
from umbrella_train.assembly.predict import find_model
from umbrella_train.config import RunConfig, load_config, stage_configs
from umbrella_train.errors import RunError, RunStoppedError
from umbrella_train.report import build_report
from umbrella_train.run import in_turn
from umbrella_train.run import stages as stages_module
from umbrella_train.run import training as training_module
from umbrella_train.run.evaluation import evaluate_run
from umbrella_train.run.folds import train_folds
from umbrella_train.run.stages import train_stages
from umbrella_train.trainer.callbacks import ProgressBar

MakeConfig = Callable[..., RunConfig]
STAGES: list[dict[str, Any]] = [
    {"name": "align", "model": {"learn": {"preset": "align"}}, "trainer": {"max_steps": 2}},
    {"name": "instruct", "model": {"learn": {"preset": "patch_embed_only"}}, "data": {"evaluation": []}},
]


def config_in(make_config: MakeConfig, folder: Path, **settings: Any) -> RunConfig:
    trainer = {"max_steps": 3, "save_steps": 1, "dataloader_num_workers": 0}
    config = make_config(folder, trainer=trainer, data={"evaluation": []})
    return RunConfig.model_validate({**config.model_dump(mode="json"), "stages": STAGES, **settings})


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return config_in(make_config, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> Path:
    """Both stages, trained by one command; the folder above them."""
    last = train_stages(config)
    assert last == config.output_dir / "run/instruct"
    return config.output_dir / "run"


def weights(stage: Path) -> dict[str, Tensor]:
    return load_file(stage / "model/model.safetensors")


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are trained from now on."""
    names: list[str] = []
    write = training_module._write_results

    def count(config: RunConfig, *args: Any, **options: Any) -> None:
        names.append(config.name)
        write(config, *args, **options)

    monkeypatch.setattr(training_module, "_write_results", count)
    return names


def test_each_stage_is_a_run_of_its_own(config: RunConfig, trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"align", "instruct"}
    for stage in stage_configs(config):
        folder = trained / stage.name
        assert {path.name for path in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "model", "FINISHED"}
        assert load_config(folder / "config.yaml") == stage
        assert "stages" not in yaml.safe_load((folder / "config.yaml").read_text())
    assert (trained / "align/checkpoint-2").is_dir()
    assert (trained / "instruct/checkpoint-3").is_dir()


def test_a_stage_starts_from_the_weights_of_the_one_before(config: RunConfig, trained: Path) -> None:
    from umbrella_train.assembly.build import build_components

    initial = build_components(stage_configs(config)[0]).model.state_dict()
    align, instruct = weights(trained / "align"), weights(trained / "instruct")
    projector = [name for name in align if "multi_modal_projector" in name]
    assert projector
    # The first stage trains the projector, and the second one only patch embeds.
    assert not any(torch.equal(align[name], initial[name]) for name in projector)
    changed = [name for name in align if not torch.equal(align[name], instruct[name])]
    assert changed
    assert all("_patch_embed." in name for name in changed)


def test_chain_of_single_stages_is_the_same_as_one_command(
    make_config: MakeConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(make_config, tmp_path)
    top = tmp_path / "run"
    with pytest.raises(RunError, match=r"align is not finished.*--stage align"):
        train_stages(config, stage="instruct", resume="auto")
    names = count_runs(monkeypatch)
    assert train_stages(config, stage="align", resume="auto") == top / "align"
    assert not (top / "instruct").exists()
    assert train_stages(config, resume="auto") == top / "instruct"
    assert names == ["align", "instruct"]
    assert are_equal(weights(top / "instruct"), weights(trained / "instruct"))
    assert train_stages(config, resume="auto") == top / "instruct"
    assert train_stages(config, stage="align", resume="auto") == top / "align"
    assert names == ["align", "instruct"]


def test_interrupted_stage_is_resumed_and_ends_like_an_unbroken_run(
    make_config: MakeConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(make_config, tmp_path)
    top = tmp_path / "run"
    end = ProgressBar.on_step_end

    def stop(bar: ProgressBar, args: Any, state: Any, control: Any, **options: Any) -> None:
        end(bar, args, state, control, **options)
        if state.max_steps == 3 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", stop)
        with pytest.raises(RunStoppedError) as caught:
            train_stages(config)
    assert (caught.value.step, caught.value.signal_number) == (2, signal.SIGTERM)
    assert (top / "REQUEUE").exists()
    names = count_runs(monkeypatch)
    # Another setting that does not alter the weights: the finished stage stays as it is.
    changed = config.trainer.model_copy(update={"parity_every": 7})
    assert train_stages(config.model_copy(update={"trainer": changed}), resume="auto") == top / "instruct"
    assert names == ["instruct"]
    assert not (top / "REQUEUE").exists()
    assert are_equal(weights(top / "instruct"), weights(trained / "instruct"))


@pytest.fixture
def copied(trained: Path, config: RunConfig, tmp_path: Path) -> RunConfig:
    """The configuration of a copy of the trained stages."""
    shutil.copytree(trained, tmp_path / "run")
    return config.model_copy(update={"output_dir": tmp_path})


def test_a_stage_that_was_continued_from_is_not_trained_again(
    copied: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = count_runs(monkeypatch)
    changed = copied.trainer.model_copy(update={"learning_rate": 0.5})
    other = copied.model_copy(update={"trainer": changed})
    with pytest.raises(RunError, match=r"align.*\n.*trainer\.learning_rate: 0\.5"):
        train_stages(other, resume="auto")
    top = copied.output_dir / "run"
    assert train_stages(other, stage="align", resume="auto", allow_changed=["trainer"]) == top / "align"
    (top / "align/FINISHED").unlink()
    with pytest.raises(RunError, match="instruct has started from its model"):
        train_stages(copied, resume="auto")
    assert names == []


def test_wrong_arguments_and_folders_in_use_are_errors(copied: RunConfig, tmp_path: Path) -> None:
    top = tmp_path / "run"
    with pytest.raises(RunError, match="has align, instruct; resume with --resume auto"):
        train_stages(copied)
    with pytest.raises(RunError, match="has instruct; resume with --resume auto"):
        train_stages(copied, stage="instruct")
    with pytest.raises(RunError, match="did you mean 'instruct'"):
        train_stages(copied, stage="instuct")
    with pytest.raises(RunError, match=f"--resume {top}"):
        train_stages(copied, resume=str(top))
    with pytest.raises(RunError, match="has no stages"):
        train_stages(copied.model_copy(update={"stages": []}), stage="align")
    with pytest.raises(RunError, match="train_stages"):
        train(copied)
    with pytest.raises(RunError, match=r"--folds.*--stages \[\]"):
        train_folds(copied, num_folds=2)
    with pytest.raises(RunError, match="run in stages"):
        train_folds(copied.model_copy(update={"stages": []}), num_folds=2)
    shutil.copytree(top / "align", top / "align-2")
    with pytest.raises(RunError, match="align-2"):
        train_stages(copied, resume="auto")
    shutil.rmtree(top / "align-2")
    (top / "align").rename(top / "fold-1")
    with pytest.raises(RunError, match="cross-validation"):
        train_stages(copied, resume="auto")
    (top / "config.yaml").write_text("{}")
    with pytest.raises(RunError, match="without stages"):
        train_stages(copied, resume="auto")


@pytest.mark.parametrize("read", [evaluate_run, find_model, lambda path: build_report([path])])
def test_folder_above_the_stages_is_no_run(trained: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(RunError, match=r"runs align, instruct.*run/instruct$"):
        read(trained)


def test_dry_run_of_every_stage_starts_from_the_weights_of_the_run(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert train_stages(config_in(make_config, tmp_path), dry_run=True) is None
    assert not (tmp_path / "run").exists()
    stages = [record.args[0] for record in caplog.records if record.msg == "\nstage %s"]
    assert stages == ["align", "instruct"]
    assert caplog.text.count("step 2: loss") == 2


def test_time_and_signals_are_those_of_all_stages(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    clock = iter([0.0, 0.0, 890.0])

    def train(config: RunConfig, *, max_time: float, **_: Any) -> Path:
        (config.output_dir / config.name).mkdir(parents=True)
        times.append(max_time)
        return config.output_dir / config.name

    monkeypatch.setattr(in_turn, "train", train)
    monkeypatch.setattr("umbrella_train.run.in_turn.time.monotonic", lambda: next(clock))
    with pytest.raises(RunStoppedError) as caught:
        train_stages(config_in(make_config, tmp_path), max_time=900)
    assert (times, caught.value.signal_number) == ([900.0], signal.SIGUSR1)
    assert (tmp_path / "run/REQUEUE").exists()


def test_command_passes_stages(
    monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[list[int], Any]] = []

    def train(config: RunConfig, *, stage: str | None, **_: Any) -> Path:
        calls.append(([each.trainer.max_steps for each in stage_configs(config)], stage))
        return tmp_path

    monkeypatch.setattr(stages_module, "train_stages", train)
    words = ["--stages.0.name", "a", "--stages.1.name", "b", "--stages.1.trainer.max-steps", "3"]
    cli.train_command([*words, "--trainer.max-steps", "2"])
    cli.train_command([*words, "--trainer.max-steps", "2", "--stage", "b"])
    cli.train_command(["--stage", "b"])
    assert calls == [([2, 3], None), ([2, 3], "b"), ([], "b")]
    for words in (["--stgae", "b"], ["--stage", "b", "--folds", "2"], ["--stages.0.name", "a", "--stages.1.name", "a"]):
        with pytest.raises(SystemExit) as caught:
            cli.train_command(words)
        assert caught.value.code == 2
    assert "--stage" in capsys.readouterr().err
