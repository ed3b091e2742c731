"""Every code block of every Markdown file is run by a test, or is in the table NOT_RUN with the reason."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from umbrella_data.cli import COMMANDS
from umbrella_data.cli import main as data_command
from umbrella_data.manifest import dialects
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.modality import ENTRY_POINTS, ModalitySpec
from umbrella_train.cli import app_command, eval_command, predict_command, report_command, train_command
from umbrella_train.config import load_config
from umbrella_train.evaluation.laterality import read_lexicon
from umbrella_train.evaluation.text_scores import TEXT_SCORES_GROUP

ROOT = Path(__file__).parents[1]
DATA, MODEL, TRAIN = (f"packages/umbrella-{name}/README.md" for name in ("data", "model", "train"))
THIS = "tests/test_code_blocks.py"

# All blocks of a language in a file, and the test that runs or validates them: the block itself, or for shell commands
# the same call with small sizes. Blocks of shell commands are below.
RUN = {
    ("CONTRIBUTING.md", "python"): THIS,
    ("CONTRIBUTING.md", "toml"): THIS,
    ("CONTRIBUTING.md", "json"): THIS,
    ("README.md", "python"): THIS,
    ("docs/dummy-loss.md", "python"): THIS,
    ("docs/mixtures.md", "yaml"): "tests/test_docs.py::test_configurations_in_pages_are_valid",
    ("docs/monai.md", "python"): "packages/umbrella-data/tests/test_monai.py::test_page_runs",
    ("docs/your-data.md", "console"): "tests/test_docs.py::test_commands_in_pages_print_what_is_shown",
    (DATA, "json"): "packages/umbrella-data/tests/test_readme.py::test_manifest_row_is_valid_and_its_keys_documented",
    (
        DATA,
        "python",
    ): "packages/umbrella-data/tests/test_readme.py::test_code_blocks_run_and_use_the_cache_of_the_command",
    (DATA, "yaml"): "packages/umbrella-train/tests/config/test_pipeline_options.py::test_list_of_the_readme_is_valid",
    (MODEL, "python"): "packages/umbrella-model/tests/test_readme.py::test_readme_snippets_run_in_order",
    (TRAIN, "python"): THIS,
    (TRAIN, "toml"): THIS,
    (TRAIN, "yaml"): THIS,
}
# Shell commands that start so, in a file, and the test that runs them.
RUN_COMMANDS = {
    ("README.md", "command -v uv"): "tests/test_try_readme.py::test_the_first_command_gets_uv_and_the_others_use_it",
    ("README.md", "uv run umbrella-train"): ".ci/run",
    ("README.md", "uv run umbrella-train --config"): THIS,
    (
        "README.md",
        "uv run umbrella-train --config my.yaml --resume",
    ): "packages/umbrella-train/tests/run/test_stages.py::test_interrupted_stage_is_resumed_and_ends_like_an_unbroken_run",
    (
        "README.md",
        "uv run umbrella-train --config my.yaml --name cv",
    ): "packages/umbrella-train/tests/run/test_folds.py::test_command_passes_folds",
    ("README.md", "uv run umbrella-data"): THIS,
    ("README.md", "uv run umbrella-eval"): THIS,
    (
        "README.md",
        "uv run umbrella-eval runs/bids-small --baselines",
    ): "packages/umbrella-train/tests/run/test_baselines.py::test_baselines_are_in_the_table_in_the_metrics_and_in_their_file",
    ("README.md", "uv run umbrella-predict"): THIS,
    ("README.md", "uv run umbrella-report"): THIS,
    ("README.md", "cp packages/"): THIS,
    (
        DATA,
        "umbrella-data demo",
    ): "packages/umbrella-data/tests/test_readme.py::test_code_blocks_run_and_use_the_cache_of_the_command",
    (
        DATA,
        "umbrella-data cache",
    ): "packages/umbrella-data/tests/test_readme.py::test_code_blocks_run_and_use_the_cache_of_the_command",
    (DATA, "umbrella-data check"): THIS,
    (DATA, "for i in 1 2 3"): THIS,
    (TRAIN, "umbrella-train --help"): "tests/test_docs.py::test_every_command_has_its_help",
    (
        TRAIN,
        "umbrella-eval RUN --baselines",
    ): "packages/umbrella-train/tests/run/test_baselines.py::test_baselines_are_in_the_table_in_the_metrics_and_in_their_file",
    (
        TRAIN,
        "umbrella-train --config my.yaml --folds",
    ): "packages/umbrella-train/tests/run/test_folds.py::test_command_passes_folds",
    (
        TRAIN,
        "umbrella-report runs/my",
    ): "packages/umbrella-train/tests/run/test_folds.py::test_report_command_pools_again",
    (
        TRAIN,
        "umbrella-train --config my.yaml",
    ): "packages/umbrella-train/tests/run/test_stages.py::test_command_passes_stages",
    (
        TRAIN,
        "umbrella-data from-bids BIDS --out new",
    ): "packages/umbrella-data/tests/test_cli.py::test_from_bids_writes_a_cohort_to_test_on",
    (
        TRAIN,
        "umbrella-predict RUN --manifest",
    ): "packages/umbrella-train/tests/run/test_answers.py::test_predict_prints_the_rows_or_writes_them",
    (
        TRAIN,
        "umbrella-eval RUN --manifest",
    ): "packages/umbrella-train/tests/run/test_answers.py::test_eval_writes_an_answer_for_each_row_and_scores_those_with_an_answer",
    (
        TRAIN,
        "umbrella-app RUN",
    ): "packages/umbrella-train/tests/app/test_command.py::test_a_signal_in_an_upload_ends_the_command_and_its_files",
    (TRAIN, "for name in umbrella-data"): "packages/umbrella-train/tests/test_completion.py::test_scripts_are_valid",
    (
        "docs/benchmarks.md",
        "uv run --with gguf",
    ): "tests/test_pretrained_tool.py::test_folder_appears_when_it_is_complete",
    ("docs/extending.md", "umbrella-data from-bids"): THIS,
    ("docs/faq.md", "umbrella-data from-bids"): THIS,
    ("docs/mixtures.md", "umbrella-data from-bids"): THIS,
    ("docs/models.md", "uv run --with gguf"): "tests/test_pretrained_tool.py::test_folder_appears_when_it_is_complete",
    (
        "docs/models.md",
        "uv run umbrella-train",
    ): "tests/test_pretrained_smollm2.py::test_the_shipped_configuration_trains_in_two_stages",
    ("docs/benchmarks.md", "bash tools/gpu_check.sh dry-run"): ".ci/run",
    ("CONTRIBUTING.md", "uv sync"): ".ci/run",
    ("CONTRIBUTING.md", "uv run"): ".ci/run",
    ("README.md", "uv run --isolated"): ".ci/run",
}
# Those that no test runs, and why. Their options are compared with --help, as those of all commands are.
NOT_RUN = {
    ("CONTRIBUTING.md", "UMBRELLA_REAL_DATA="): "the tests themselves",
    ("README.md", "uv run pytest"): "the tests themselves",
    ("README.md", "uv run torchrun"): "minutes; tests/test_signals.py starts such a run, with -m slow",
    ("README.md", "uv run accelerate"): "minutes; the test of DeepSpeed starts runs with it",
    ("README.md", "uv pip install"): "installs; tools/check_wheels.sh installs the wheels",
    (DATA, "uv pip install"): "installs; tools/check_wheels.sh installs the wheels",
    (MODEL, "uv pip install"): "installs; tools/check_wheels.sh installs the wheels",
    (TRAIN, "uv pip install"): "installs; tools/check_wheels.sh installs the wheels",
    (TRAIN, "tensorboard"): "a server that does not end",
    (TRAIN, "TRACKIO_DIR="): "a server that does not end",
    (TRAIN, "mlflow"): "a server that does not end",
    (TRAIN, "mkdir -p ~/"): "writes into the home directory",
    ("docs/benchmarks.md", "bash tools/gpu_check.sh"): "needs a GPU or network",
    ("docs/benchmarks.md", "umbrella-"): "minutes, on scans that are not in the repository",
    ("docs/benchmarks.md", "uv run umbrella-train"): "minutes, with a pretrained model",
    ("docs/cluster.md", "CONFIG="): "needs SLURM: tests/test_slurm.py, with -m slurm",
    ("docs/cluster.md", "export"): "needs SLURM: tests/test_slurm.py, with -m slurm",
    ("docs/cluster.md", "first="): "needs SLURM: tests/test_slurm.py, with -m slurm",
    ("docs/cluster.md", "sbatch"): "needs SLURM: tests/test_slurm.py, with -m slurm",
    ("examples/containers/README.md", ""): "needs Docker or Apptainer",
    ("examples/notebooks/README.md", "uv run --with jupyterlab"): "a server that does not end",
    ("examples/slurm/README.md", ""): "needs SLURM: tests/test_slurm.py, with -m slurm",
}
# Diagrams and outputs have no language, and are no code.
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a file."""

    file: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Shell commands without comments, continued lines joined; a loop is one command."""
        text = re.sub(r"^for .*?^done$", lambda loop: loop[0].replace("\n", " "), self.text, flags=re.S | re.M)
        lines = [re.sub(r"(^|\s)#\s.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line]


def markdown() -> list[Path]:
    """All Markdown files that are read by people."""
    folders = (".", "docs", ".github", "examples/*", "packages/*")
    return sorted(path for folder in folders for path in ROOT.glob(f"{folder}/*.md"))


def blocks(file: str | None = None, language: str | None = None) -> Iterator[Block]:
    """The code blocks with a language, in order."""
    for path in markdown():
        name = path.relative_to(ROOT).as_posix()
        for found in _BLOCK.finditer(path.read_text(encoding="utf-8")):
            text = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
            if found["language"] and file in (None, name) and language in (None, found["language"]):
                yield Block(name, found["language"], text)


def row_of(table: dict[tuple[str, str], str], file: str, command: str) -> tuple[str, str] | None:
    """The row with the longest start of a command."""
    rows = [row for row in table if row[0] == file and command.startswith(row[1])]
    return max(rows, key=lambda row: len(row[1]), default=None)


def test_every_block_is_run_or_has_a_reason():
    unknown, used = [], set()
    for block in blocks():
        if block.language != "bash":
            used.add(row := (block.file, block.language))
            unknown += [f"{block.file}: {block.language}"] if row not in RUN else []
            continue
        for command in block.commands:
            row = row_of(RUN_COMMANDS | NOT_RUN, block.file, command)
            used.add(row)
            unknown += [f"{block.file}: {command}"] if row is None else []
    assert unknown == []
    assert (RUN.keys() | RUN_COMMANDS.keys() | NOT_RUN.keys()) - used == set()
    assert not RUN_COMMANDS.keys() & NOT_RUN.keys()


@pytest.mark.parametrize("test", sorted({*RUN.values(), *RUN_COMMANDS.values()}))
def test_tests_that_run_blocks_exist(test):
    file, _, function = test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert file in (THIS, ".ci/run") or re.search(rf"^def {function}\(", text, re.MULTILINE)


def test_options_of_all_commands_exist(capsys):
    own = {"train": train_command, "eval": eval_command, "predict": predict_command, "report": report_command}
    own["app"] = app_command
    calls: dict[str, Callable[[], object]] = {
        f"umbrella-data {name}": lambda name=name: data_command([name, "--help"]) for name in COMMANDS
    }
    calls |= {f"umbrella-{name}": lambda command=command: command(["--help"]) for name, command in own.items()}
    helps = {}
    for name, call in calls.items():
        with suppress(SystemExit):
            call()
        helps[name] = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    wrong, count = [], 0
    for block in blocks(language="bash"):
        for command in block.commands:
            words = re.sub(r"^(\w+=\S+ )*(uv run )?", "", command).split(" --", 1)[0].split()
            program = " ".join(words[:2]) if words[:1] == ["umbrella-data"] else "".join(words[:1])
            if program in helps:
                count += 1
                options = {word.partition("=")[0] for word in command.split() if word.startswith("--")}
                options -= {option for option in options if re.match(r"--stages\.\d+\.", option)}
                wrong += [f"{block.file}: {program} {option}" for option in sorted(options - helps[program])]
    assert wrong == []
    assert count > 20


def execute(block: Block, names: dict[str, Any]) -> None:
    """Runs Python of a page with the names of the blocks before it."""
    exec(compile(block.text, block.file, "exec"), names)


def test_a_modality_of_a_package(monkeypatch):
    example, _ = blocks("CONTRIBUTING.md", "python")
    module = types.ModuleType("lab_modalities")
    monkeypatch.setitem(sys.modules, "lab_modalities", module)
    execute(example, vars(module))
    (project,) = (tomllib.loads(block.text)["project"] for block in blocks("CONTRIBUTING.md", "toml"))
    ((name, place),) = project["entry-points"][ENTRY_POINTS].items()
    file, _, attribute = place.partition(":")
    spec = getattr(sys.modules[file], attribute)
    assert isinstance(spec, ModalitySpec)
    assert spec.name == name == "FLAIR"


def test_a_row_and_an_adapter(tmp_path):
    (row,) = blocks("CONTRIBUTING.md", "json")
    (tmp_path / "rows.jsonl").write_text(row.text)
    (sample,) = read_manifest(tmp_path / "rows.jsonl")
    assert (sample.modalities, sample.answer.value) == (("T1",), "female")
    _, adapter = blocks("CONTRIBUTING.md", "python")
    names = dict(vars(dialects))
    execute(adapter, names)
    turns = [{"speaker": "human", "says": "Which side?"}, {"speaker": "gpt", "says": "left"}]
    other = {"id": "1", "subject": "sub-01", "scan": "sub-01/anat/sub-01_T1w.nii.gz", "dialogue": turns}
    found = names["from_dialogue"](other)
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert found["messages"][0]["content"][0]["path"] == other["scan"]


def test_configurations_and_entry_points_of_the_readme(tmp_path):
    base = "model:\n  vision_config: {model_type: siglip_vision_model}\n  text_config: {model_type: qwen2}\n"
    base += "  modalities: {T1: {image_size: [32, 32, 32], patch_size: [8, 8, 8]}}\n"
    base += "data: {train: [{manifest: train.jsonl}], evaluation: [{manifest: test.jsonl}]}\n"
    keys = []
    for block in blocks(TRAIN, "yaml"):
        (tmp_path / "block.yaml").write_text(block.text)
        content = yaml.safe_load(block.text)
        if "left" in content:
            assert "rechts" in str(read_lexicon(tmp_path / "block.yaml"))
            continue
        whole = yaml.safe_load(base)
        if "language_model" in content.get("model", {}):
            whole["model"] = {"modalities": whole["model"]["modalities"]}
        for key, value in content.items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
            keys.append(key)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
        assert load_config(tmp_path / "run.yaml").model.modalities
    assert keys.count("data") == 2
    assert {"model", "stages"} <= set(keys)
    ((group, entries),) = (
        next(iter(tomllib.loads(block.text)["project"]["entry-points"].items())) for block in blocks(TRAIN, "toml")
    )
    assert (group, list(entries)) == (TEXT_SCORES_GROUP, ["finding_f1"])


@pytest.mark.examples
def test_shards_and_indexes_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert data_command(["demo", "--out", "cohort", "--num-train", "3", "--num-test", "2"]) == 0
    (loop, merge), (index,) = (
        block.commands for block in blocks(DATA, "bash") if block.commands[0].startswith(("for", "umbrella-data check"))
    )
    shards, call = re.fullmatch(r"for i in ([\d ]+); do umbrella-data (.*) & done; wait", loop).groups()
    for shard in shards.split():
        assert data_command([*shlex.split(call.replace("$i", shard)), "--workers", "1"]) == 0
    for command in (merge, index):
        assert data_command(shlex.split(command)[1:]) == 0
    report = json.loads((tmp_path / "sharded/check.json").read_text())
    assert [manifest["num_rows"] for manifest in report["manifests"]] == [9, 6]


def test_manifests_of_single_modalities_and_own_questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_command(["demo", "--out", "BIDS", "--num-train", "6", "--num-test", "4"]) == 0
    (tmp_path / "BIDS/participants.tsv").write_text(
        "participant_id\thandedness\tbmi\n"
        + "".join(f"sub-{i:04}\t{('left', 'right')[i % 2]}\t{20 + i}\n" for i in range(1, 11))
    )
    commands = [command for page in ("mixtures", "extending") for block in blocks(f"docs/{page}.md", "bash")
                for command in block.commands]  # fmt: skip
    for command in commands:
        assert data_command([*shlex.split(command)[1:], "--workers", "1"]) == 0
    splits = [
        {split: {sample.subject for sample in read_manifest(f"manifests/{name}/{split}.jsonl", data_root="BIDS")}
         for split in ("train", "test")}
        for name in ("T1", "rsfMRI")
    ]  # fmt: skip
    assert splits[0] == splits[1]
    assert splits[0]["train"].isdisjoint(splits[0]["test"])
    asked = {
        sample.task: sample.messages[0].text for sample in read_manifest("manifests/train.jsonl", data_root="BIDS")
    }
    assert "What is the handedness of this person?" in asked["handedness"]
    assert "bmi" in asked


def test_a_site_is_held_out_and_labels_are_in_a_csv_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_command(["demo", "--out", "BIDS", "--num-train", "6", "--num-test", "4"]) == 0
    subjects = [f"sub-{i:04}" for i in range(1, 11)]
    sites = {"site-a": subjects[:6], "site-b": subjects[6:]}
    for name, members in sites.items():
        Path(f"{name}.txt").write_text("\n".join(members))
    rows = [f"{subject[4:]},{('left', 'right')[i % 2]},{20 + i}.5\n" for i, subject in enumerate(subjects)]
    Path("labels.csv").write_text("participant_id,handedness,bmi\n" + "".join(rows))
    commands = [command for block in blocks("docs/faq.md", "bash") for command in block.commands]
    assert len(commands) == 3
    for command in commands:
        assert data_command([*shlex.split(command)[1:], "--workers", "1"]) == 0

    def rows_of(name: str) -> list[Any]:
        return list(read_manifest(f"manifests/{name}.jsonl", data_root="BIDS"))

    in_training = {sample.subject for sample in rows_of("site-a/train") + rows_of("site-a/test")}
    assert in_training == set(sites["site-a"])
    assert {sample.subject for sample in rows_of("site-b/test")} == set(sites["site-b"])
    assert not Path("manifests/site-b/train.jsonl").exists()
    answers = {(sample.task, sample.subject): sample.answer.value for sample in rows_of("train")}
    some = next(subject for task, subject in answers if task == "bmi")
    assert answers["bmi", some] == 20.5 + subjects.index(some)
    assert answers["handedness", some] == ("left", "right")[subjects.index(some) % 2]


@pytest.mark.examples
def test_python_of_the_readmes(tmp_path, monkeypatch, capsys):
    """The run of umbrella-train's README, the loop of the main README with its model, and Lightning with both."""
    from umbrella_train.config import loading

    demo = yaml.safe_load(loading.demo_config_path().read_text())
    demo["data"]["synthetic"] |= {"num_train": 6, "num_test": 4}
    demo["trainer"]["per_device_train_batch_size"] = 2
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(demo))
    monkeypatch.setattr(loading, "demo_config_path", lambda: tmp_path / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    short, module = blocks(TRAIN, "python")
    (loop,) = blocks("README.md", "python")
    (dummy_loss,) = blocks("docs/dummy-loss.md", "python")
    names: dict[str, Any] = {"__name__": "__main__"}
    execute(short, names)
    assert "'report.html'" in capsys.readouterr().out
    (tmp_path / "runs/demo").symlink_to(tmp_path / "runs/short-demo")
    execute(loop, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(re.match(r"loss \d+\.\d{5}, scans of \[.+\], dummy terms of \[", line) for line in lines)
    execute(dummy_loss, names)
    assert names["loss"] > names["out"].loss
    before = {name: weight.detach().clone() for name, weight in names["model"].named_parameters()}
    names["dataset"] = [names["dataset"][0]] * 4
    execute(module, names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 {'loss': ")
    # All batches have T1 alone: the dummy loss gives the other patch embeds their gradients.
    changed = [name for name, weight in names["model"].named_parameters() if not weight.equal(before[name])]
    assert [name for name in before if "patch_embed.proj" in name and name not in changed] == []


@pytest.mark.examples
@pytest.mark.timeout(900)
def test_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """From a BIDS folder to reports, with the demo cohort and a smaller model."""
    monkeypatch.chdir(tmp_path)
    assert data_command(["demo", "--out", "BIDS", "--num-train", "8", "--num-test", "2"]) == 0
    scans = sorted(tmp_path.glob("BIDS/sub-*/anat/*_T1w.nii.gz"))
    shutil.copy(scans[0], "scan.nii.gz")
    shutil.copy("BIDS/test.jsonl", "new.jsonl")
    rows = RUN_COMMANDS | NOT_RUN
    commands = [line for block in blocks("README.md", "bash") for line in block.commands]
    commands = [line for line in commands if rows[row_of(rows, "README.md", line)] == THIS]
    programs = {"umbrella-train": train_command, "umbrella-eval": eval_command}
    programs |= {"umbrella-predict": predict_command, "umbrella-report": report_command}
    printed = {}
    for command in commands:
        words = shlex.split(command.removeprefix("uv run "))
        if words[0] == "cp":
            small(ROOT / words[1], tmp_path / words[2])
        elif words[0] == "umbrella-data":
            assert data_command([*words[1:], "--workers", "1"]) == 0
        else:
            programs[words[0]](words[1:])
        printed[command] = capsys.readouterr().out
    assert len(printed) == 10
    (table,) = (text for command, text in printed.items() if "--against" in command)
    assert "difference (95 % interval)" in table
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    assert sorted(path.parent.name for path in tmp_path.glob("runs/*/FINISHED")) == ["bids-small", "slow"]
    assert (tmp_path / "runs/bids-small/report.html").stat().st_size > 10_000


def small(source: Path, target: Path) -> None:
    """Writes a configuration with a smaller model and two steps."""
    content = yaml.safe_load(source.read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for part in ("vision_config", "text_config"):
        content["model"][part] |= sizes
    for modality in content["model"]["modalities"].values():
        modality["image_size"][:3] = [16, 16, 16]
    content["trainer"] |= {"max_steps": 2, "warmup_steps": 0, "eval_steps": 2, "use_cpu": True}
    content["data"]["cache_dir"] = "cache"
    content["report"] |= {"max_samples": 2, "max_new_tokens": 2}
    target.write_text(yaml.safe_dump(content))
