"""The pages of the documentation: assembled from the files, and references that miss nothing. No site is built here."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from umbrella_data.cli import main
from umbrella_data.cli.exit_codes import ExitCode
from umbrella_data.errors import ScanReason
from umbrella_data.scan.header import ScanWarning
from umbrella_train.cli import train_command
from umbrella_train.config import load_config
from umbrella_train.config.run_config import RunConfig, StageConfig
from umbrella_train.config.schema import annotation_at, is_mapping, is_sequence, section_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tools() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def reference(tools: None) -> dict[str, str]:
    import docs_reference

    return docs_reference.pages()


@pytest.fixture
def assemble(tools: None, tmp_path: Path):
    import docs_pages

    (tmp_path / "package").mkdir()
    (tmp_path / "script.sh").touch()

    def run(readme: str, **pages: str) -> dict[str, str]:
        (tmp_path / "package/README.md").write_text(readme)
        return docs_pages.assemble({f"{name}.md": text for name, text in pages.items()}, root=tmp_path)

    return run


README = """# Package
Text.

## One
First.

### Part
Small.

## Two
```text
## no heading, [no link](nowhere.md)
```
See [one](#one), [two](#two), [the
page](../docs/other.md), [docs/other.md](../docs/other.md) and [a `script`](../script.sh), `[no](link.md)`.
"""
REST = "[Package](../package/README.md) <!-- include -->"


def test_sections_are_on_the_page_of_the_smallest_include(assemble):
    one = "# Mine\n\n[One](../package/README.md#one) <!-- include -->"
    part = "# Part of it\n[Part](../package/README.md#part) <!-- include -->\nEnd."
    pages = assemble(README, rest=REST, one=one, other=part)
    assert pages["one.md"] == "# Mine\n\n## One\nFirst.\n"
    assert pages["other.md"] == "# Part of it\n### Part\nSmall.\n\nEnd.\n"
    assert pages["rest.md"].startswith("# Package\nText.\n\n## Two\n```text\n")


def test_links_follow_the_sections_and_those_to_files_become_text(assemble):
    pages = assemble(
        README,
        rest=REST,
        one="[One](../package/README.md#one) <!-- include -->",
        other="# Other\n[two](../package/README.md#two)",
    )
    assert (
        "See [one](one.md#one), [two](#two), [the\npage](other.md), [Other](other.md) and a `script`, `[no](link.md)`."
        in pages["rest.md"]
    )
    assert "[no link](nowhere.md)" in pages["rest.md"]
    assert pages["other.md"] == "# Other\n[two](rest.md#two)\n"


def test_links_to_notebooks_lead_to_their_pages(assemble, tmp_path):
    (tmp_path / "package/book.ipynb").touch()
    pages = assemble("# Package\n[book.ipynb](book.ipynb)\n", rest=REST)
    assert pages["rest.md"] == "# Package\n[book.ipynb](book.md)\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[a](missing.md)", "docs/missing.md"),
        ("[a](../package/missing.ipynb)", "package/missing.ipynb"),
        ("[a](../package/README.md#three)", "README.md#three"),
        ("[a](../package/README.md#three) <!-- include -->", "README.md#three"),
        (REST, "package/README.md"),
    ],
)
def test_links_and_includes_that_do_not_hold_are_errors(assemble, line, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        assemble(README, rest=REST, other=f"# Other\n{line}")


def test_lists_and_tables_are_those_of_python_markdown(assemble):
    page = "# A\nText:\n- one\n  more\n  ```json\n  - x\n  ```\n- two\n\nText:\n1. one\n   more\n\nText\n| a |\n|---|\n"
    wanted = "# A\nText:\n\n- one\n    more\n    ```json\n    - x\n    ```\n- two\n\nText:\n\n1. one\n    more\n\n"
    assert assemble(README, a=page)["a.md"] == f"{wanted}Text\n\n| a |\n|---|\n"


def test_pages_of_this_repository_are_complete(tools, reference):
    import docs_pages

    sources = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    assert set(reference) == {name for name, text in sources.items() if "is generated when the site is built" in text}
    notebooks = docs_pages.notebook_pages()
    assert len(notebooks) == 3
    assert all(text.startswith("# ") and "```python\n" in text for text in notebooks.values())
    pages = docs_pages.assemble(sources | reference | notebooks)
    text = "\n".join(pages.values())
    for file in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"packages/umbrella-{name}/README.md" for name in ("data", "model", "train")),
    ):
        headings = [part.lines[0] for part in docs_pages.sections(file, (ROOT / file).read_text())]
        assert [line for line in headings if f"{line}\n" not in text] == []
    assert docs_pages.named_pages() == set(pages)


def test_every_public_name_is_in_the_api(reference):
    for package in ("umbrella_data", "umbrella_model", "umbrella_train"):
        page = reference[f"api-{package.removeprefix('umbrella_')}.md"]
        names = re.findall(rf"^::: {package}\.(\w+)$", page, re.MULTILINE)
        assert sorted(names) == sorted(importlib.import_module(package).__all__)
        assert len(names) > 4


def test_messages_of_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").split("## By what you see")[0]
    # Messages are in several strings, with values between them.
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("packages/*/src/**/*.py"))
    sources = re.sub(r"\{[^{}]*\}|%[sd]", "…", re.sub(r'"\s*f?"', "", "\n".join(texts)))
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(messages) > 12
    assert [message for message in messages if message not in sources] == []


def test_every_name_that_a_page_imports_is_in_the_api(reference):
    places = ("*.md", "docs/*.md", "packages/*/README.md", "examples/notebooks/*.ipynb")
    text = "\n".join(path.read_text(encoding="utf-8") for place in places for path in ROOT.glob(place))
    imports = re.findall(r"from (umbrella_(?:data|model|train)[\w.]*) import ([\w, ]+)", text)
    named = {f"{module}.{name}" for module, names in imports for name in re.split(r"\W+", names) if name}
    assert len(named) > 15
    pages = "".join(reference.values())
    assert [name for name in sorted(named) if f"::: {name}\n" not in f"{pages}\n"] == []


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, with NAME and N for names in tables and numbers in lists."""
    for name in section.model_fields:
        yield f"{prefix}{name}"
        if section is StageConfig:
            continue
        annotation = annotation_at(section, [name])
        path = f"{prefix}{name}."
        if section_of(annotation) is None and is_mapping(annotation):
            annotation, path = annotation_at(section, [name, "NAME"]), f"{path}NAME."
        elif section_of(annotation) is None and is_sequence(annotation):
            annotation, path = annotation_at(section, [name, 0]), f"{path}N."
        if (below := section_of(annotation)) is not None:
            yield from keys(below, path)


def test_every_key_of_the_configuration_has_a_row_with_its_meaning(reference):
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.* \| (.+) \|$", reference["configuration.md"], re.MULTILINE))
    assert set(keys(RunConfig)) <= set(rows)
    assert {"trainer.max_steps", "data.pipelines.NAME.augment.max_shift", "stages.N.trainer"} <= set(rows)
    assert all(rows.values())


def test_rows_have_type_and_default(reference):
    page = reference["configuration.md"]
    assert "| `dummy_loss.absent` | `update` or `hold` | `update` |" in page
    assert "| `trainer.learning_rate` | number above 0 | `5e-05` |" in page
    assert "| `data.calibration_fraction` | number from 0 below 1 | `0.0` |" in page
    assert "| `trainer.save_total_limit` | whole number above 0 | `null` |" in page
    assert "| `model.modalities.NAME.image_size` | list of whole number above 0 | required |" in page


@pytest.mark.parametrize("codes", [ScanReason, ScanWarning, ExitCode])
def test_every_code_has_a_row_with_its_meaning(reference, codes):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", reference["codes.md"], re.MULTILINE))
    assert {str(code.value) for code in codes} <= set(rows)
    assert all(code.meaning for code in codes)


def test_every_command_has_its_help(reference):
    page = reference["commands.md"]
    own = ("train", "eval", "predict", "app", "report")
    for name in ("umbrella-data check", "umbrella-data whois", *(f"umbrella-{each}" for each in own)):
        assert f"\n## {name}\n\n```text\nusage: {name} " in page
    assert "--allow-changed" in page
    assert "Keys to override" not in page


def shown_calls(section: str) -> list[str]:
    """The commands in a section of docs/your-data.md, each with the lines that it prints."""
    text = (ROOT / "docs/your-data.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "".join(re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).split("$ ")[1:]


def test_commands_in_pages_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = shown_calls("A first look, with the built-in cohort")
    assert len(calls) == 4
    codes = []
    for call in calls:
        line, *shown = call.splitlines()
        command, *words = shlex.split(line)
        if command == "umbrella-data":
            codes.append(main([*words, *([] if words[0] == "demo" else ["--workers", "1"])]))
        else:
            subprocess.run([command, *words], check=True)
        printed = capsys.readouterr().out.splitlines()
        assert [text for text in shown if text not in printed] == []
    assert codes == [0, 0, 1]


@pytest.mark.examples
def test_commands_with_real_scans_print_what_is_shown(real_data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BIDS").symlink_to(real_data)
    shutil.copy(ROOT / "packages/umbrella-train/src/umbrella_train/configs/t1_age_sex.yaml", "my.yaml")
    calls = shown_calls("The whole way, with real scans")
    assert [call.split()[:2] for call in calls] == [
        ["umbrella-data", "from-bids"],
        ["umbrella-data", "check"],
        ["umbrella-data", "preview"],
        ["umbrella-train", "--config"],
        ["umbrella-train", "--config"],
        ["umbrella-eval", "runs/first"],
    ]
    # Scores of training depend on the machine in their last digits, and the baselines take minutes: not compared.
    for call in calls[:4]:
        line, *shown = call.splitlines()
        command, *words = shlex.split(line)
        if command == "umbrella-data":
            assert main([*words, *([] if words[0] == "preview" else ["--workers", "1"])]) == 0
        else:
            train_command(words)
        done = capfd.readouterr()
        printed = [text.rstrip() for text in (done.out + done.err).splitlines()]
        starts = [text.partition("…")[0] for text in shown if "loss" not in text]
        assert [text for text in starts if not any(line.startswith(text) for line in printed)] == []


def test_configurations_in_pages_are_valid(tmp_path):
    blocks = [
        block
        for path in (ROOT / "docs").glob("*.md")
        for block in re.findall(r"^```yaml\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert blocks
    model = "model:\n  vision_config: {model_type: siglip_vision_model}\n  text_config: {model_type: qwen2}\n"
    model += "  modalities: {T1: {image_size: [32, 32, 32], patch_size: [8, 8, 8]}}\n"
    for block in blocks:
        (tmp_path / "run.yaml").write_text(model + block)
        assert load_config(tmp_path / "run.yaml").data.train
