"""Shell completion of umbrella-data: bash reads the printed script."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from umbrella_data.cli import main


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert not end.value.code
    return capsys.readouterr().out


def complete(text: str, words: list[str], folder: str) -> list[str]:
    """What bash offers for the last word."""
    ask = (
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        f"$(complete -p {words[0]} | grep -o '[-]F [^ ]*' | cut -c 4-) {words[0]} {shlex.quote(words[-1])}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", f"{text}\n{ask}"], cwd=folder, capture_output=True, text=True, check=True)
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fr"], ["from-bids"]),
        (["check", "--tok"], ["--tokenizer"]),
        (["cache", "--max"], ["--max-gb"]),
        (["check", "--non-finite", "out"], ["outside_mask"]),
        (["check", "--out", "tab"], ["table.jsonl"]),
        (["check", "tab"], ["table.jsonl"]),
    ],
)
def test_bash_completes_subcommands_options_values_and_files(words, expected, tmp_path, capsys):
    (tmp_path / "table.jsonl").touch()
    assert complete(script("bash", capsys), ["umbrella-data", *words], str(tmp_path)) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_valid_and_have_every_subcommand(shell, capsys):
    text = script(shell, capsys)
    assert "from-bids" in text
    assert "index-dir" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_another_shell_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "cmd"])
    assert end.value.code == 2
