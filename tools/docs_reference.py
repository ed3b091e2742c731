"""Pages of the documentation that are generated from the code: API, configuration, metrics, codes and commands."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from umbrella_data.cli import COMMANDS
from umbrella_data.cli import main as data_command
from umbrella_data.cli.exit_codes import ExitCode
from umbrella_data.errors import ScanReason
from umbrella_data.scan.header import ScanWarning
from umbrella_train.cli import app_command, eval_command, predict_command, report_command, train_command
from umbrella_train.config.metric_keys import METRIC_KEYS
from umbrella_train.config.run_config import RunConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("umbrella_data", "umbrella_model", "umbrella_train")
MODULES = {"umbrella_data": ("preview.figure", "monai", "viewer"), "umbrella_train": ("processor",)}
"""Documented modules that are imported by their own name."""
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """The text of each generated page by its file name."""
    api = {f"api-{name.removeprefix('umbrella_')}.md": api_page(name) for name in PACKAGES}
    return api | {
        "configuration.md": configuration_page(),
        "metrics.md": metrics_page(),
        "codes.md": codes_page(),
        "commands.md": commands_page(),
    }


def api_page(package: str) -> str:
    """A directive of mkdocstrings for each public name: classes and functions are read from the sources."""
    lines = [f"# {package}", f"Public names: `from {package} import ...`; of modules below, by their full name.\n"]
    for module in (package, *(f"{package}.{name}" for name in MODULES.get(package, ()))):
        lines += [f"::: {module}.{name}\n" for name in sorted(public_names(module), key=str.lower)]
    return "\n".join(lines)


def public_names(module: str) -> list[str]:
    """`__all__` of a package or module, from its source: an import would load torch."""
    package, *names = module.split(".")
    folder = ROOT.joinpath("packages", package.replace("_", "-"), "src", package, *names)
    places = (folder / "__init__.pyi", folder / "__init__.py", folder.with_suffix(".py"))
    source = next(path for path in places if path.is_file())
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{source}: has no __all__")


def configuration_page() -> str:
    """A table of keys for each section of the configuration."""
    schema = RunConfig.model_json_schema()
    lines = [
        "# Configuration",
        "A run is configured by a YAML file with these keys; a key that does not exist is an error. On the command "
        "line, `--trainer.max-steps 100` replaces `trainer.max_steps`.",
        "`null` means that the key is not set.",
        *_section("The file", schema, prefix="", definitions=schema["$defs"]),
    ]
    return "\n\n".join(lines) + "\n"


def _section(title: str, section: Schema, *, prefix: str, definitions: Schema) -> Iterator[str]:
    yield f"## {title}"
    if prefix:
        yield _cell(section.get("description", ""), separator="\n")
    required = section.get("required", ())
    rows = []
    below = []
    for name, field in section["properties"].items():
        default = "required" if name in required else _default(field)
        rows.append((f"`{prefix}{name}`", _type(field), default, _cell(field.get("description", ""))))
        # The keys of a stage are those of the run.
        if prefix != "stages.N.":
            below += [(f"{prefix}{name}{end}", definitions[found]) for found, end in _sections_of(field)]
    yield _table(("key", "type", "default", "meaning"), rows)
    for path, definition in below:
        if "properties" in definition:
            yield from _section(f"`{path}`", definition, prefix=f"{path}.", definitions=definitions)


def _sections_of(field: Schema, end: str = "") -> Iterator[tuple[str, str]]:
    """The definitions that a field refers to, each with what follows the key in a path."""
    if "$ref" in field:
        yield field["$ref"].rsplit("/", 1)[1], end
    for member in field.get("anyOf", ()):
        yield from _sections_of(member, end)
    if isinstance(field.get("items"), dict):
        yield from _sections_of(field["items"], f"{end}.N")
    if isinstance(field.get("additionalProperties"), dict):
        yield from _sections_of(field["additionalProperties"], f"{end}.NAME")


def _type(field: Schema) -> str:
    if "anyOf" in field:
        members = [member for member in field["anyOf"] if member.get("type") != "null"]
        return " or ".join(dict.fromkeys(_type(member) for member in members))
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "table"
    kind = field.get("type", "any")
    if kind == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_type(items)}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"table of {_type(values)}" if isinstance(values, dict) else "table"
    if field.get("format") == "path":
        return "path"
    words = {"boolean": "`true` or `false`", "integer": "whole number", "string": "text"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {field[bound]:g}" for bound, word in bounds.items() if bound in field]
    return " ".join([words.get(kind, str(kind)), *limits])


def _default(field: Schema) -> str:
    if "default" not in field:
        return "empty" if field.get("type") in ("array", "object") or "anyOf" in field else ""
    value = field["default"]
    if isinstance(value, dict):
        return ""
    if isinstance(value, float) and value == int(value):
        return f"`{value:.1f}`"
    return f"`{str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}`"


def metrics_page() -> str:
    """The forms of keys in metrics.jsonl; the figures of answers follow where the page is assembled."""
    rows = [(f"`{each.form}`", each.meaning, "yes" if each.is_of_training else "") for each in METRIC_KEYS]
    return "\n\n".join(
        [
            "# Metrics",
            "`metrics.jsonl` in a run's folder has one JSON object a line. Words in capitals are replaced: MODALITY by "
            "`T1`, MODALITIES by all that a sample has (`rsfMRI+T1`), PART by the name of the patch embed, NAME by "
            "modalities and task (`T1/sex`), LABEL by a figure. Keys that are logged during training can be "
            "`trainer.metric_for_best_model`.",
            _table(("key", "value", "during training"), rows),
            "A figure LABEL has its 95 % interval in `LABEL_lower` and `LABEL_upper`, and its controls in "
            "`LABEL_shuffled`, `LABEL_swapped` and `LABEL_no_scan`; those of `accuracy` have no prefix. Of pooled "
            "folds, there are `LABEL_fold_mean`, `LABEL_fold_min` and `LABEL_fold_max` too. Baselines: `constant`, "
            "`text`, `volume`, `histogram`, `regions`, `cnn`.",
            "[Figures](../packages/umbrella-train/README.md#figures) <!-- include -->",
            "[Scores of texts](../packages/umbrella-train/README.md#scores-of-texts) <!-- include -->",
        ]
    )


def codes_page() -> str:
    """Reasons, warnings and exit codes."""
    return "\n\n".join(
        [
            "# Codes",
            "Codes are stable: programs may depend on them. Messages may change.",
            "## Why a scan is rejected",
            "`ScanError.reason`, and the `reason` in lists of bad scans:",
            _table(("reason", "meaning"), [(f"`{code}`", _cell(code.meaning)) for code in ScanReason]),
            "## Warnings about a scan",
            "The scan is used. `umbrella-data check` counts them by code:",
            _table(("code", "meaning"), [(f"`{code}`", _cell(code.meaning)) for code in ScanWarning]),
            "## Exit codes",
            "For any other signal, a run that it stopped ends with 128 plus its number (1 under torchrun).",
            _table(("exit code", "meaning"), [(f"`{code.value}`", _cell(code.meaning)) for code in ExitCode]),
        ]
    )


def commands_page() -> str:
    """The help of every command, as the terminal shows it."""
    commands: dict[str, Callable[[], object]] = {
        f"umbrella-data {name}": partial(data_command, [name, "--help"]) for name in COMMANDS
    }
    own = {
        "train": train_command,
        "eval": eval_command,
        "predict": predict_command,
        "app": app_command,
        "report": report_command,
    }
    commands |= {f"umbrella-{name}": partial(command, ["--help"]) for name, command in own.items()}
    parts = ["# Commands", "Every command has `--help`, and `--version`."]
    for name, command in commands.items():
        parts += [f"## {name}", f"```text\n{_printed(command)}\n```"]
    return "\n\n".join(parts)


def _printed(command: Callable[[], object]) -> str:
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        command()
    # The keys of the configuration have a page of their own.
    return text.getvalue().partition("\nKeys to override")[0].strip()


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str, *, separator: str = " ") -> str:
    """Text as one line of Markdown: vertical bars and angle brackets are escaped."""
    return re.sub(r"\s*\n\s*", separator, text.strip()).replace("|", "\\|").replace("<", "&lt;")
