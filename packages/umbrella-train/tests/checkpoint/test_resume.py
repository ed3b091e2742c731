"""A run that is stopped and resumed has the losses and weights of an unbroken run, bit for bit."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import warm
from transformers import TrainerCallback

from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.checkpoint.integrity import checkpoint_problems, write_integrity_manifest
from umbrella_train.checkpoint.resume import Start, find_start, open_folder
from umbrella_train.config import RunConfig, dump_config, load_config
from umbrella_train.errors import RunError
from umbrella_train.run import training as run
from umbrella_train.run_folder import RunFolder, read_lines
from umbrella_train.run_lock import LOCK_NAME, RunLock

MakeConfig = Callable[..., RunConfig]

# 18 samples in batches of 3 are 6 batches per epoch: 2 epochs and a third of another.
NUM_STEPS = 14

KILL_IN_THE_FOURTH_STEP = """
import os, signal, sys
from umbrella_train.run import training as run
from umbrella_train.cli import train_command

class KilledTrainer(run.UmbrellaTrainer):
    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().compute_loss(*args, **kwargs)

run.UmbrellaTrainer = KilledTrainer
train_command(sys.argv[1:])
"""


class PowerCutError(Exception):
    """The process ends without a message."""


class AtStep(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, do: Callable[[], None]) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.do()


@contextmanager
def at_step(step: int, do: Callable[[], None]) -> Iterator[None]:
    """Every trainer built in this context calls a function at the end of a step."""

    class WatchedTrainer(run.UmbrellaTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(AtStep(step, do))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "UmbrellaTrainer", WatchedTrainer)
        yield


def cut_the_power() -> None:
    raise PowerCutError


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in lines_of(folder) if "loss" in row]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def config_of(make_config: MakeConfig, output_dir: Path, *, accumulation: int = 1, **trainer: Any) -> RunConfig:
    return make_config(
        output_dir,
        trainer={
            "max_steps": NUM_STEPS // accumulation,
            "gradient_accumulation_steps": accumulation,
            "lr_scheduler_type": "cosine",
            **trainer,
        },
        data={"evaluation": [], "pipelines": {"T1": {"augment": {}}}},
    )


@pytest.fixture(scope="module")
def unbroken(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of an unbroken run, by its number of batches per step."""
    done: dict[int, Path] = {}

    def folder_of(accumulation: int) -> Path:
        if accumulation not in done:
            config = config_of(make_config, tmp_path_factory.mktemp("unbroken"), accumulation=accumulation)
            folder = run.train(config)
            assert folder is not None
            done[accumulation] = folder
        return done[accumulation]

    return folder_of


@pytest.mark.parametrize(
    ("save_steps", "stop", "workers", "accumulation"),
    [(4, 5, 0, 1), (6, 8, 0, 1), (9, 11, 2, 1), (12, 13, 2, 1), (2, 3, 0, 2)],
    ids=["mid-epoch", "end-of-epoch", "second-epoch-2-workers", "end-of-second-epoch-2-workers", "accumulated"],
)
def test_resumed_run_equals_the_unbroken_run(
    make_config: MakeConfig,
    unbroken: Callable[[int], Path],
    end_workers: Callable[[], None],
    tmp_path: Path,
    save_steps: int,
    stop: int,
    workers: int,
    accumulation: int,
) -> None:
    config = config_of(
        make_config, tmp_path, accumulation=accumulation, save_steps=save_steps, dataloader_num_workers=workers
    )
    with at_step(stop, cut_the_power), pytest.raises(PowerCutError):
        run.train(config)
    end_workers()
    folder = run.train(config, resume="auto")
    assert folder == tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    reference = unbroken(accumulation)
    assert [step for step, _ in losses_of(reference)] == list(range(1, NUM_STEPS // accumulation + 1))
    assert losses_of(folder) == losses_of(reference)
    assert weights_of(folder) == weights_of(reference)


def drawn(rng: random.Random, cohort: DemoCohort, folder: Path) -> dict[str, dict[str, Any]]:
    """Random sections of a config; a second manifest repeats some rows of the first."""
    lines = cohort.train_manifest.read_text().splitlines()
    second = folder / "second.jsonl"
    second.write_text("\n".join(rng.sample(lines, rng.choice([5, 7, 11]))) + "\n")
    manifests: list[dict[str, Any]] = [
        {"manifest": str(cohort.train_manifest)},
        {"manifest": str(second), "data_root": str(cohort.train_manifest.parent)},
    ]
    mixing = rng.choice(["proportional", "equal", "temperature", "weights"])
    if mixing == "weights":
        manifests[1]["weight"] = 2.0
    lengths = rng.choice([{"max_steps": rng.randint(2, 15)}, {"num_train_epochs": rng.choice([1, 1.5, 2, 2.3, 3])}])
    return {
        "data": {
            "train": manifests,
            "batches": rng.choice(["by_modality", "mixed", "by_length"]),
            "mixing": mixing,
            "temperature": 2.0 if mixing == "temperature" else None,
            "stop": "all" if mixing == "proportional" else rng.choice(["all", "first"]),
            "max_tokens_per_batch": rng.choice([None, None, 200, 500]),
            "packing": rng.random() < 0.3,
        },
        "dummy_loss": {"absent": rng.choice(["update", "update", "hold"])},
        "trainer": {
            "max_steps": -1,
            **lengths,
            "per_device_train_batch_size": rng.randint(1, 5),
            "gradient_accumulation_steps": rng.choice([1, 1, 2, 3, 4]),
            "dataloader_num_workers": rng.choice([0, 0, 0, 1, 2]),
            "lr_scheduler_type": rng.choice(["cosine", "linear", "constant", "constant_with_warmup"]),
            "logging_steps": rng.randint(1, 4),
            "save_steps": rng.randint(1, 5),
            "eval_steps": rng.choice([None, None, 1, 2, 3]),
            "gradient_scale": rng.choice(["mean", "present"]),
            "gradient_checkpointing": rng.random() < 0.3,
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_resumed_run_with_random_settings_equals_the_unbroken_run(
    make_config: MakeConfig, cohort: DemoCohort, tmp_path: Path, number: int
) -> None:
    rng = random.Random(number)
    sections = drawn(rng, cohort, tmp_path)
    config = make_config(tmp_path / "unbroken", **sections)
    if config.data.packing:  # which does not support dropout
        text = {**(config.model.text_config or {}), "attention_dropout": 0.0}
        config = config.model_copy(update={"model": config.model.model_copy(update={"text_config": text})})
    unbroken = run.train(config)
    assert unbroken is not None
    num_steps = lines_of(unbroken)[-1]["step"]
    save_steps = sections["trainer"]["save_steps"]
    if num_steps <= save_steps:
        pytest.skip(f"{num_steps} steps end before a checkpoint after {save_steps}")
    config = config.model_copy(update={"output_dir": tmp_path / "broken"})
    with at_step(rng.randint(save_steps + 1, num_steps), cut_the_power), pytest.raises(PowerCutError):
        run.train(config)
    for _ in range(2):  # the second time the run is finished
        folder = run.train(config, resume="auto")
        assert folder is not None
        assert weights_of(folder) == weights_of(unbroken)
        assert losses_of(folder) == losses_of(unbroken)


def test_logged_loss_is_the_mean_of_steps_before_and_after_a_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"logging_steps": 3, "save_steps": 2, "max_steps": 6}
    unbroken = run.train(config_of(make_config, tmp_path / "unbroken", **settings))
    config = config_of(make_config, tmp_path / "broken", **settings)
    with at_step(5, cut_the_power), pytest.raises(PowerCutError):
        run.train(config)
    # Step 4 is not logged yet.
    folder = run.train(config, resume="auto")
    assert unbroken is not None
    assert folder is not None
    assert [step for step, _ in losses_of(folder)] == [3, 6]
    assert losses_of(folder) == losses_of(unbroken)
    # The mean loss of a training is that of its own steps: here of the last two.
    (total,) = (line["train_loss"] for line in lines_of(unbroken) if "train_loss" in line)
    assert total == pytest.approx(statistics.mean(loss for _, loss in losses_of(unbroken)))
    (last,) = (line["train_loss"] for line in lines_of(folder) if "train_loss" in line)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["losses_since_log"]
    assert kept["since"] == 3
    assert last == pytest.approx((3 * losses_of(folder)[1][1] - kept["sum"]) / 2)
    assert run.train(config, resume=str(folder)) == folder
    assert [line["train_loss"] for line in lines_of(folder) if "train_loss" in line][-1] == pytest.approx(0, abs=1e-6)


def test_sigterm_leaves_a_checkpoint_to_resume_from(
    make_config: MakeConfig, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    config = config_of(make_config, tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    words = ["--config", str(tmp_path / "config.yaml")]
    output, errors = tmp_path / "output", tmp_path / "errors"
    process = warm.start(warm.run_code, KILL_IN_THE_FOURTH_STEP, words, output=output, errors=errors)
    assert warm.end_together([process], seconds=240) == [128 + signal.SIGTERM], errors.read_text()
    assert re.search(r"step 4\b.*--resume auto$", errors.read_text().splitlines()[-1])
    assert output.read_text() == ""
    folder = tmp_path / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert checkpoint_problems(folder / "checkpoint-4") == []
    assert [step for step, _ in losses_of(folder)] == [1, 2, 3, 4]
    # The weights of an unfinished run must not look like those of a finished one.
    assert not (folder / "model").exists()
    assert run.train(config, resume="auto") == folder
    assert losses_of(folder) == losses_of(unbroken(1))
    assert weights_of(folder) == weights_of(unbroken(1))


def test_sigterm_handler_is_restored_when_training_ends(make_config: MakeConfig, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []
    with at_step(1, lambda: seen.append(signal.getsignal(signal.SIGTERM))):
        run.train(config_of(make_config, tmp_path, max_steps=1))
    assert seen != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_damaged_checkpoint_is_skipped_for_the_one_before(
    make_config: MakeConfig, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    config = config_of(make_config, tmp_path, save_steps=3)
    with at_step(8, cut_the_power), pytest.raises(PowerCutError):
        run.train(config)
    weights = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.raises(RunError, match=r"model\.safetensors: its content changed"):
        run.train(config, resume=str(weights.parent))
    starts: list[int] = []
    with at_step(4, lambda: starts.append(4)):
        folder = run.train(config, resume="auto")
    assert starts == [4]
    assert folder is not None
    assert losses_of(folder) == losses_of(unbroken(1))
    assert weights_of(folder) == weights_of(unbroken(1))


@pytest.mark.parametrize("max_steps", [2, 6], ids=["mid-epoch", "end-of-epoch"])
def test_resume_of_a_finished_run_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, max_steps: int
) -> None:
    config = config_of(make_config, tmp_path, max_steps=max_steps, save_steps=max_steps)
    folder = run.train(config)
    assert folder is not None
    losses, weights = losses_of(folder), weights_of(folder)
    caplog.set_level("INFO")
    # By its folder, independently of the name in the config.
    other = config.model_copy(update={"name": "other"})
    assert run.train(other, resume=str(folder)) == folder
    assert f"resuming from {folder / f'checkpoint-{max_steps}'}" in caplog.text
    assert f"all {max_steps} steps are done" in caplog.text
    assert (losses_of(folder), weights_of(folder)) == (losses, weights)


def test_resume_of_a_missing_folder_is_rejected_by_its_name(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--resume .*/nothing: there is no such folder"):
        run.train(config_of(make_config, tmp_path), resume=str(tmp_path / "nothing"))


FIND_ON_TWO_RANKS = """
import sys
from pathlib import Path
import torch.distributed as dist
from umbrella_train.config import load_config
from umbrella_train.errors import RunError
from contextlib import ExitStack
from umbrella_train.checkpoint.resume import find_start
dist.init_process_group("gloo")
# The second rank's file system does not show the run yet.
config = load_config(Path(sys.argv[1]), ["--output-dir", "/nowhere"] if dist.get_rank() else [])
for resume in ("auto", str(config.output_dir / "broken")):
    try:
        print(find_start(config, resume, locks=ExitStack()).checkpoint)
    except RunError as error:
        print(error)
dist.destroy_process_group()
"""


def test_first_rank_finds_the_checkpoint_for_all_ranks(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    checkpoint = write_checkpoint(write_run(tmp_path / "run"), 7)
    (tmp_path / "broken").mkdir()
    printed = [lines.splitlines() for lines in warm.output_of_ranks(FIND_ON_TWO_RANKS, [str(path)], folder=tmp_path)]
    assert printed[0] == printed[1]
    assert printed[0][0] == str(checkpoint)
    assert str(config.output_dir / "broken") in "".join(printed[0][1:])


def test_resumed_run_uses_the_settings_of_its_config(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(make_config, tmp_path, max_steps=4, save_steps=2)
    with at_step(3, cut_the_power), pytest.raises(PowerCutError):
        run.train(config)
    changed = config.model_copy(
        update={"seed": 7, "trainer": config.trainer.model_copy(update={"learning_rate": 1e-4, "weight_decay": 0.3})}
    )
    before = contents_of(tmp_path / "run")
    with pytest.raises(RunError, match=r"--allow-changed seed,trainer.learning_rate,trainer.weight_decay$"):
        run.train(changed, resume="auto")
    assert contents_of(tmp_path / "run") == before
    folder = run.train(changed, resume="auto", allow_changed=["seed", "trainer"])
    assert folder is not None
    (changes,) = read_lines(folder / "changes.jsonl")[0]
    assert changes == {
        "step": 2,
        "changes": [
            "seed: 7 (before: 0)",
            "trainer.learning_rate: 0.0001 (before: 0.01)",
            "trainer.weight_decay: 0.3 (before: 0.0)",
        ],
    }
    comments = [line for line in (folder / "config.yaml").read_text().splitlines() if line.startswith("#")]
    assert comments == [f"# Changed after step 2: {line}" for line in changes["changes"]]
    assert load_config(folder / "config.yaml") == changed
    assert "learning_rate 0.0001 (before: 0.01)" in caplog.text
    assert "weight_decay 0.3 (before: 0.0)" in caplog.text
    # Another seed gives another order, in which the position in the epoch has no meaning.
    assert "'seed': 0" in caplog.text
    rates = {line["step"]: line["learning_rate"] for line in lines_of(folder) if "loss" in line}
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx({1: 1e-2 * cosine[0], 2: 1e-2 * cosine[1], 3: 1e-4 * cosine[2], 4: 1e-4 * cosine[3]})


def write_run(folder: Path, *, age: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    os.utime(folder / "config.yaml", (1e9 + age, 1e9 + age))
    return folder


def write_checkpoint(run: Path, step: int) -> Path:
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    write_integrity_manifest(checkpoint)
    return checkpoint


def start_of(config: RunConfig, resume: str | None = "auto") -> Start:
    with ExitStack() as locks:
        return find_start(config, resume, locks=locks)


def test_auto_starts_a_new_run_if_there_is_none(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path)
    assert start_of(config) == Start()
    write_run(tmp_path / "run-other")
    assert start_of(config) == Start()


def test_auto_starts_the_newest_run_again_if_it_has_no_checkpoint(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runs = [write_run(tmp_path / name, age=age) for age, name in enumerate(("run", "run-2", "run-3"))]
    checkpoint = write_checkpoint(runs[0], 4)
    (runs[2] / "checkpoint-5").mkdir()  # was being written
    config = config_of(make_config, tmp_path)
    start = start_of(config)
    assert start == Start(RunFolder(runs[2]))
    # The older run is named, and not used: its settings may differ.
    assert f"--resume {checkpoint}" in caplog.text
    with ExitStack() as locks:
        open_folder(config, start, changes={}, is_only=True, locks=locks)
    assert list(runs[2].glob("checkpoint-*")) == []


def test_auto_does_not_start_again_what_is_damaged(make_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(write_run(tmp_path / "run"), 4)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 5}')
    with pytest.raises(RunError, match="its content changed"):
        start_of(config_of(make_config, tmp_path))


def test_a_finished_run_is_not_started_again_unless_its_config_changes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path)
    folder = RunFolder(write_run(tmp_path / "run"))
    checkpoint = write_checkpoint(folder.path, 4)
    folder.config.write_text(f"# a comment\n{dump_config(config)}")
    folder.finished.touch()
    assert start_of(config) == Start(folder, is_finished=True)
    longer = config.model_copy(update={"trainer": config.trainer.model_copy(update={"max_steps": 99})})
    assert start_of(longer) == Start(folder, checkpoint)


def test_a_run_in_use_cannot_be_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(write_run(tmp_path / "run"), 4)
    config = config_of(make_config, tmp_path)
    with RunLock(tmp_path / "run"):
        for resume in ("auto", str(tmp_path / "run"), str(checkpoint)):
            with pytest.raises(RunError, match=f"is in use by process {os.getpid()} "):
                start_of(config, resume)
    assert start_of(config) == start_of(config, str(checkpoint))


def test_of_two_new_runs_with_auto_one_is_rejected(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path)
    starts = [start_of(config), start_of(config)]
    with ExitStack() as locks:
        folder = open_folder(config, starts[0], changes={}, is_only=True, locks=locks)
        with pytest.raises(RunError, match="another job has just created this run"):
            open_folder(config, starts[1], changes={}, is_only=True, locks=locks)
        assert (folder.path / LOCK_NAME).exists()
        assert list(tmp_path.glob("run*")) == [folder.path]
        assert open_folder(config, Start(), changes={}, is_only=False, locks=locks).path == tmp_path / "run-2"
    assert list(tmp_path.rglob(LOCK_NAME)) == []


def test_resume_from_an_older_checkpoint_sets_newer_ones_aside(make_config: MakeConfig, tmp_path: Path) -> None:
    run_folder = write_run(tmp_path / "run")
    checkpoints = [write_checkpoint(run_folder, step) for step in (2, 4, 6)]
    config = config_of(make_config, tmp_path)
    with ExitStack() as locks:
        start = find_start(config, str(checkpoints[0]), locks=locks)
        open_folder(config, start, changes={}, is_only=False, locks=locks)
    assert start_of(config) == Start(RunFolder(run_folder), checkpoints[0])
    assert {path.name for path in (run_folder / "set-aside-1").iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_resume_replaces_the_config_and_keeps_the_old_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, tmp_path)
    folder = RunFolder(write_run(tmp_path / "run"))
    folder.config.write_text("a: 1\n")
    write_checkpoint(folder.path, 4)
    folder.requeue.touch()
    folder.finished.touch()
    with ExitStack() as locks:
        open_folder(config, find_start(config, "auto", locks=locks), changes={}, is_only=True, locks=locks)
    assert folder.config.read_text() == dump_config(config)
    assert (folder.path / "config-until-checkpoint-4.yaml").read_text() == "a: 1\n"
    assert not folder.requeue.exists()
    assert not folder.finished.exists()
