"""Progress: a bar on a terminal, lines in a file, nothing for quiet commands and other ranks."""

from __future__ import annotations

import io
import os
import re
import select

import pytest

from umbrella_data import progress
from umbrella_data.cli import main
from umbrella_data.progress import progress_bar, show_progress

LINE = re.compile(r"reading: (\d+)/(\d+|\?) \[.*scan.*\]")


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def make_stderr(monkeypatch):
    """Replaces stderr."""

    def make(file):
        monkeypatch.setattr("sys.stderr", file)
        return file

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return make


def lines_of(file):
    text = file.getvalue()
    assert not {"\r", "\x1b"} & set(text)
    assert text.endswith("\n")
    matches = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(matches), text
    return [int(match[1]) for match in matches]


def test_a_file_has_the_first_and_the_last_line(make_stderr):
    file = make_stderr(io.StringIO())
    assert list(progress_bar(range(500), words="reading", unit="scan")) == list(range(500))
    assert lines_of(file) == [0, 500]


def test_a_file_has_a_line_every_few_seconds(make_stderr, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    file = make_stderr(io.StringIO())
    with progress_bar(total=60, words="reading", unit="scan") as bar:
        for _ in range(30):
            bar.update()
            now[0] += 1
    assert lines_of(file) == [0, 11, 21, 30]
    assert "11/60 [00:10<" in file.getvalue()


def test_a_file_has_the_added_numbers_once(make_stderr):
    file = make_stderr(io.StringIO())
    with progress_bar(total=9, words="reading", unit="scan", initial=4) as bar:
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update(5)
    assert lines_of(file) == [4, 9]
    assert file.getvalue().count("loss=0.5") == 1


def test_bars_within_bars_are_lines_too(make_stderr):
    file = make_stderr(io.StringIO())
    for _ in progress_bar(range(2), words="reading", unit="scan"):
        for _ in progress_bar(range(3), words="reading", unit="scan"):
            pass
    assert lines_of(file) == [0, 0, 3, 0, 3, 2]


def test_short_work_with_a_delay_is_silent(make_stderr):
    file = make_stderr(io.StringIO())
    list(progress_bar(range(3), words="reading", delay=60))
    assert file.getvalue() == ""


def test_a_terminal_has_a_bar(make_stderr):
    file = make_stderr(Terminal())
    list(progress_bar(range(3), words="reading"))
    assert "\r" in file.getvalue()
    assert "100%|" in file.getvalue()


def test_a_pseudo_terminal_has_a_bar(make_stderr):
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as file:
        make_stderr(file)
        list(progress_bar(range(3), words="reading"))
        shown = b""
        # On a busy machine it arrives in parts.
        while b"100%" not in shown and select.select([reader], [], [], 10)[0]:
            shown += os.read(reader, 4096)
    os.close(reader)
    assert b"\rreading: 100%|" in shown


def test_a_dumb_terminal_has_lines(make_stderr, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = make_stderr(Terminal())
    list(progress_bar(range(3), words="reading", unit="scan"))
    assert lines_of(file) == [0, 3]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_other_ranks_and_quiet_commands_show_nothing(make_stderr, monkeypatch, kind):
    file = make_stderr(kind())
    monkeypatch.setattr(progress, "_is_shown", True)
    show_progress(False)
    assert list(progress_bar(range(3), words="reading")) == [0, 1, 2]
    show_progress(True)
    monkeypatch.setenv("RANK", "1")
    assert list(progress_bar(range(3), words="reading")) == [0, 1, 2]
    assert file.getvalue() == ""


@pytest.fixture
def manifest(nifti, random_voxels, make_row, write_manifest):
    """A manifest with two scans."""
    rows = []
    for name in ("a", "b"):
        nifti.write(random_voxels(6, 6, 6), f"{name}_T1.nii.gz")
        rows.append(make_row(name, "T1"))
    return write_manifest(rows)


@pytest.mark.parametrize("words", [["check"], ["cache", "--size", "T1=8,8,8", "--cache-dir", "CACHE"]])
def test_commands_write_lines_into_files_and_nothing_if_quiet(manifest, monkeypatch, tmp_path, capfd, words):
    monkeypatch.setattr(progress, "_is_shown", True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    words = [words[0], str(manifest), *words[1:], "--workers", "1"]
    words = [str(tmp_path / "cache") if word == "CACHE" else word for word in words]
    main(words)
    out, shown = capfd.readouterr()
    assert not {"\r", "\x1b"} & set(out + shown)
    assert re.search(r"scans: 2/2 \[", shown)
    main([*words, "--quiet"])
    assert capfd.readouterr().err == ""
