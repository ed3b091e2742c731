"""Shell completion of the commands that train and evaluate: bash reads the printed script."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest

from umbrella_data.modality import MODALITIES
from umbrella_train import cli
from umbrella_train.config import RunConfig, load_config
from umbrella_train.config.overrides import describe_keys
from umbrella_train.config.schema import annotation_at, dotted_keys

COMMANDS = ["train", "eval", "predict", "app", "report"]


def script(command: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        getattr(cli, f"{command}_command")(["--print-completion", shell])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["umbrella-train", "--dry"], ["--dry-run"]),
        (["umbrella-train", "--trainer.learning"], ["--trainer.learning-rate"]),
        (["umbrella-train", "--config", "my.yaml", "--trainer.engine", "fs"], ["fsdp2"]),
        (["umbrella-train", "--model.modalities.T1.image"], ["--model.modalities.T1.image-size"]),
        (["umbrella-train", "--trainer.bf16", "--trainer.learning"], ["--trainer.learning-rate"]),
        (["umbrella-train", "--config", "my"], ["my.yaml"]),
        (["umbrella-eval", "runs", "--base"], ["--baselines"]),
        (["umbrella-predict", "--max-new"], ["--max-new-tokens"]),
        (["umbrella-app", "runs", "--no-b"], ["--no-browser"]),
        (["umbrella-report", "--outp"], ["--output"]),
    ],
)
def test_bash_completes_options_keys_values_and_files(words, expected, tmp_path, capsys):
    (tmp_path / "my.yaml").touch()
    ask = (
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        f"$(complete -p {words[0]} | grep -o '[-]F [^ ]*' | cut -c 4-) {words[0]} {words[-1]}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    text = script(words[0].removeprefix("umbrella-"), "bash", capsys)
    done = subprocess.run(["bash", "-c", f"{text}\n{ask}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_are_valid(command, shell, capsys):
    text = script(command, shell, capsys)
    assert "quiet" in text
    assert ("trainer.learning-rate" in text) == (command == "train")
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_the_completed_keys_are_those_of_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    shown = set(re.findall(r"(?<![\w-])--([a-z][\w.-]+)", describe_keys(load_config(None)))) - {"help"}
    # Positions of lists and keys of Hugging Face's configurations are not completed; a switch is also shown as --no-...
    others = re.compile(r"\.\d+(\.|$)|\.(text|vision)-config\.|(^|\.)no-")
    shown = {key for key in shown if not others.search(key)}
    keys = {key for key, _ in dotted_keys(RunConfig, tables=MODALITIES)}
    assert len(shown) > 100
    assert shown - keys == set()
    assert [key for key in keys if annotation_at(RunConfig, key.replace("-", "_").split(".")) is None] == []
