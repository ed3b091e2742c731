"""Wording of sources and documents: words that a reader would not search for do not occur."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = (
    "anew", "lest", "for want of", "in clear", "goes on", "go on from", "stands in", "stands at", "let go", "at fault",
    "mend",
)  # fmt: skip
SUFFIXES = {".css", ".ipynb", ".j2", ".js", ".md", ".py", ".pyi", ".svg", ".toml", ".yaml"}
NOT_OURS = "niivue.umd.js"


def documents() -> list[Path]:
    """Tracked text of the packages, the documentation and the READMEs."""
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout: the files of an archive are those of a commit that was tested")
    paths = [
        ROOT / name for name in listed if name.startswith(("packages/", "docs/", "examples/")) or name.endswith(".md")
    ]
    return [path for path in paths if path.suffix in SUFFIXES and path.name != NOT_OURS and path.is_file()]


def test_forbidden_words_do_not_occur():
    paths = documents()
    assert len(paths) > 300
    # Words of one phrase may be on two lines, with a comment sign between them.
    words = "|".join(re.sub(" ", r"[\\s#]+", word) for word in FORBIDDEN)
    pattern = re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts.items()
        for match in pattern.finditer(text)
    ]
    assert not found, "\n".join(found)
