"""The commands and code blocks of the README run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from umbrella_data.cli import main
from umbrella_data.manifest.manifest import read_manifest

pytestmark = pytest.mark.isolated

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """The arguments of each call of an `umbrella-data` command."""
    lines = [shlex.split(line) for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [words[1:] for words in lines if words[:2] == ["umbrella-data", name]]


def test_manifest_row_is_valid_and_its_keys_documented(tmp_path: Path) -> None:
    (text,) = blocks("json")
    row = json.loads(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = read_manifest(tmp_path / "rows.jsonl")
    assert (sample.modalities, sample.messages[1].text) == (("T1",), "left")
    assert sample.answer is not None
    assert set(row) == set(re.findall(r"^\| `(\w+)` \|", README.split("## From a manifest")[0], re.MULTILINE))


def test_code_blocks_run_and_use_the_cache_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (demo,), (cache,) = commands("demo"), commands("cache")
    assert main(demo) == 0
    assert main([*cache, "--workers", "1"]) == 0
    prepared = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/volumes/*/*")}
    assert len(prepared) == 12
    capsys.readouterr()
    names = {"__name__": "__main__"}
    snippets = blocks("python")
    assert len(snippets) == 4
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/volumes/*/*")} == prepared
    assert not caplog.records
    assert (tmp_path / "scan.html").read_text(encoding="utf-8").count('<details class="scan-viewer" open>') == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("torch.Size([1, 40, 40, 40]) (5.0, 5.0, 5.0)")
    batches = printed[2:]
    assert [line[0] for line in batches] == ["0"] * 6 + ["1"] * 6
    assert batches[:6] != [line.replace("1", "0", 1) for line in batches[6:]]
    for shape in ("'T1': (2, 1, 32, 32, 32)", "'rsfMRI': (2, 1, 24, 24, 24, 8)", "'dMRI': (2, 2, 24, 24, 24)"):
        assert sum(shape in line for line in batches) == 4
