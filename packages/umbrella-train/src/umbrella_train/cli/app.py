"""The command umbrella-app."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING

from umbrella_train.cli.options import positive
from umbrella_train.command import errors_as_messages, make_parser, set_up_output
from umbrella_train.errors import RunError
from umbrella_train.exit_guard import guard_exit, last_call
from umbrella_train.stop_signals import StoppedAtOnce, StopSignals, ended_by_signals, stop_signals_handled_by

if TYPE_CHECKING:
    import uvicorn

_PORT = 8790
_MAX_PORT = 65535


def app_command(arguments: Sequence[str] | None = None) -> None:
    """Serve a local web page to ask a trained model about scans."""
    with contextlib.nullcontext() if arguments is not None else last_call():
        _serve(arguments)


@errors_as_messages()
def _serve(arguments: Sequence[str] | None) -> None:
    parser = make_parser(
        "umbrella-app",
        "Open a page on this machine to ask a trained model about a scan. Only the printed address, with its random "
        "token, can use it. Scans stay on this machine: their files are removed once they are read. Ctrl-C ends it. "
        "Needs the extra umbrella-train[app].",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run or of a model, as in RUN/model")
    parser.add_argument(
        "--port", type=_port, metavar="N", help=f"the port; 0 for any free one (default: {_PORT}, if it is free)"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.add_argument(
        "--max-gb", type=_gigabytes, default=4.0, metavar="GB", help="largest scan, with its other files (4)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="longest answer in tokens (32)"
    )
    parser.add_argument("--use-cpu", action="store_true", help="use the CPU even if there is a GPU")
    options = parser.parse_args(arguments)
    missing = [name for name in ("anyio", "starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise RunError(
            f"umbrella-app needs {' and '.join(missing)}; install it with: pip install 'umbrella-train[app]' "
            "(in a checkout: uv pip install './packages/umbrella-train[app]')"
        )
    set_up_output(is_quiet=options.quiet, has_messages=False)
    with ended_by_signals():
        from umbrella_train.app.server import HOST, build_server
        from umbrella_train.app.session import Session
    # A scan that is being read does not delay the end.
    guard_exit()
    signals = StopSignals()
    signals.install()
    try:
        with _listen(HOST, options.port) as listener, TemporaryDirectory(prefix="umbrella-app-") as folder:
            session = Session(
                options.run, max_new_tokens=options.max_new_tokens, device="cpu" if options.use_cpu else None
            )
            token, port = secrets.token_urlsafe(24), listener.getsockname()[1]
            server = build_server(
                session,
                options.run,
                port=port,
                token=token,
                uploads=Path(folder),
                max_bytes=int(options.max_gb * 1e9),
            )
            address = f"http://{HOST}:{port}/{token}/"
            listener.listen()  # from here on, requests wait for the server
            print(f"address: {address}", flush=True)
            if not options.no_browser:
                _open_browser(address, folder=Path(folder))
            with _ended_by_every_signal(server):
                server.run(sockets=[listener])
    except StoppedAtOnce as stopped:
        raise SystemExit(128 + stopped.signal_number) from None
    finally:
        signals.restore()


@contextlib.contextmanager
def _ended_by_every_signal(server: uvicorn.Server) -> Iterator[None]:
    """Every stop signal ends the server, not only SIGINT and SIGTERM; it is raised again once the server has ended."""
    received: list[int] = []

    # An exception here could be raised in a request, which would be answered with an error instead.
    def end(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    with stop_signals_handled_by(end):
        yield
    if received:
        signal.raise_signal(received[0])


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket on loopback.

    Raises:
        RunError: The port is in use, or may not be used.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, _PORT if port is None else port))
    except OSError as error:
        if port is not None:
            listener.close()
            raise RunError(f"--port {port}: {error.strerror}; give another one, or 0 for any free one") from error
        listener.bind((host, 0))
    return listener


def _open_browser(address: str, *, folder: Path) -> None:
    """Opens the address by a file that only this user can read: other users see the arguments of a browser."""
    # Without a display, a browser would take over the terminal.
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    page = folder / "open.html"
    page.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
    webbrowser.open(page.as_uri())


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to {_MAX_PORT}")
    return number


def _gigabytes(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number
