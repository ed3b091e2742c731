"""The command umbrella-app: its options, its address, and its end by a signal."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from umbrella_train.app.server import HOST
from umbrella_train.cli import app as command
from umbrella_train.stop_signals import STOP_SIGNALS

from .conftest import App, wait_until

uvicorn = pytest.importorskip("uvicorn", reason="the server is an extra")


def start(run: Path, folder: Path, *words: str, before: str = "pass") -> tuple[subprocess.Popen[str], App]:
    """A process with an app, whose temporary files are in a folder, once it has an address; `before` is Python."""
    folder.mkdir()
    program = f"{before}\nfrom umbrella_train.cli import app_command; app_command()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(run), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert process.stdout is not None
    address = re.fullmatch(r"address: http://127\.0\.0\.1:(\d+)/([\w-]{32})/\n", process.stdout.readline())
    assert address is not None
    return process, App(int(address[1]), folder, token=address[2])


def test_a_signal_in_an_upload_ends_the_command_and_its_files(random_run: Path, tmp_path: Path) -> None:
    process, app = start(random_run, tmp_path / "temporary", "--port", "0", "--no-browser", "--use-cpu")
    with process, socket.create_connection((HOST, app.port), timeout=60) as connection:
        connection.sendall(app.start_of_upload("modality=T1&scan.nii=1000000", 1_000_000) + b"1" * 1000)
        wait_until(lambda: any(path.name == "scan.nii" for path in app.files()))
        (folder,) = app.uploads.glob("umbrella-app-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (143, "")
    assert list(app.uploads.glob("umbrella-app-*")) == []


def test_a_signal_while_a_request_is_handled_ends_the_command_and_its_files(random_run: Path, tmp_path: Path) -> None:
    # A closed terminal, at a moment in which the server's code runs and not the wait of asyncio.
    hang_up = "import os, signal; from umbrella_train.app import server\n"
    hang_up += "server.read_question = lambda _: os.kill(os.getpid(), signal.SIGHUP)"
    words = ("--port", "0", "--no-browser", "--use-cpu")
    process, app = start(random_run, tmp_path / "temporary", *words, before=hang_up)
    with process, socket.create_connection((HOST, app.port), timeout=60) as connection:
        connection.sendall(app.start_of_upload("modality=T1&scan.nii=1000000", 1_000_000) + b"1" * 1000)
        wait_until(lambda: any(path.name == "scan.nii" for path in app.files()))
        app.ask("key", "?")
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGHUP
    assert list(app.uploads.glob("umbrella-app-*")) == []


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_stop_signal_ends_the_server_and_is_raised_again_afterwards(number: int) -> None:
    server = uvicorn.Server(uvicorn.Config("none"))
    received: list[int] = []
    previous = signal.signal(number, lambda number, _: received.append(number))
    try:
        with command._ended_by_every_signal(server):
            signal.raise_signal(number)
            assert (server.should_exit, received) == (True, [])
        assert received == [number]
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with command._ended_by_every_signal(server):
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, previous)


def test_the_command_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(SystemExit) as caught:
        command.app_command([str(tmp_path)])
    assert caught.value.code == 2
    assert "needs uvicorn; " in (error := capsys.readouterr().err)
    assert "pip install 'umbrella-train[app]'" in error
    assert "uv pip install './packages/umbrella-train[app]'" in error  # also in the README


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--port", "65536"], "--port"),
        (["--max-gb", "0"], "--max-gb"),
        (["--max-gb", "inf"], "--max-gb"),
        (["--host", "0.0.0.0"], "--host"),
        ([], "no model"),
    ],
)
def test_wrong_options_and_folders_are_errors(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.app_command([str(tmp_path), *words])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_a_port_in_use_is_an_error_only_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            command.app_command([str(tmp_path), "--port", str(port)])
        assert caught.value.code == 2
        assert f"--port {port}" in capsys.readouterr().err
        monkeypatch.setattr(command, "_PORT", port)
        with command._listen(HOST, None) as listener:
            assert listener.getsockname()[0] == HOST
            assert listener.getsockname()[1] != port


@pytest.mark.parametrize(("display", "is_opened"), [(":0", True), ("", False)])
def test_a_browser_is_opened_by_a_private_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, display: str, *, is_opened: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    monkeypatch.setattr(command.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    command._open_browser("http://127.0.0.1:1/secret/", folder=tmp_path)
    assert opened == ([(tmp_path / "open.html").as_uri()] if is_opened else [])
    if is_opened:
        assert "url=http://127.0.0.1:1/secret/" in (tmp_path / "open.html").read_text()
