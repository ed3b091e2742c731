"""A server of the page, in a thread, and requests to it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from random_run import write_random_run

from umbrella_train.app.server import HOST, build_server
from umbrella_train.app.session import Session
from umbrella_train.config import RunConfig

TOKEN = "the-token"
MAX_BYTES = 10_000_000
NUM_TOKENS = 6


@dataclass(frozen=True)
class Reply:
    """What the server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class App:
    """A server, and the folder for its uploads."""

    port: int
    uploads: Path
    token: str = TOKEN

    def send(
        self, method: str, path: str, body: bytes = b"", *, token: str | None = None, **headers: str | None
    ) -> Reply:
        """A request of the page; a header that is None is not sent."""
        given = {"Host": f"{HOST}:{self.port}", "Origin": f"http://{HOST}:{self.port}"} | headers
        connection = HTTPConnection(HOST, self.port, timeout=60)
        address = f"/{self.token if token is None else token}/{path}"
        connection.request(method, address, body, {name: value for name, value in given.items() if value})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, content)

    def give(self, modality: str, files: Mapping[str, Path | bytes]) -> Reply:
        """Gives a scan: the names on the server, and the files."""
        contents = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}
        sizes = {name: len(content) for name, content in contents.items()}
        return self.send("POST", f"scan?{urlencode({'modality': modality, **sizes})}", b"".join(contents.values()))

    def start_of_upload(self, query: str, size: int) -> bytes:
        """What precedes the body, for uploads that are not complete."""
        host = f"{HOST}:{self.port}"
        lines = ["POST /{}/scan?{} HTTP/1.1", "Host: {}", "Origin: http://{}", "Content-Length: {}", "", ""]
        return "\r\n".join(lines).format(self.token, query, host, host, size).encode()

    def ask(self, key: str, question: str) -> Reply:
        return self.send("POST", "answer", json.dumps({"key": key, "question": question}).encode())

    def files(self) -> Sequence[Path]:
        return list(self.uploads.rglob("*"))


@pytest.fixture(scope="session")
def random_run(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "the <run>"
    return write_random_run(folder, make_config(folder.parent))


@pytest.fixture(scope="module")
def app(random_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    pytest.importorskip("uvicorn", reason="the server is an extra")
    uploads = tmp_path_factory.mktemp("uploads")
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        session = Session(random_run, max_new_tokens=NUM_TOKENS, device="cpu")
        server = build_server(session, random_run, port=port, token=TOKEN, uploads=uploads, max_bytes=MAX_BYTES)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield App(port, uploads)
        server.should_exit = True
        thread.join()


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)
