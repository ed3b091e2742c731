"""A page in headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

# Generous: a browser on a busy machine.
SECONDS = 120


class Page:
    """One page; `errors` are what its console and its scripts reported."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of one command of the protocol."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=SECONDS))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        return wait_for(lambda: self.evaluate(expression), what=expression)

    def choose_files(self, selector: str, *files: Path) -> None:
        """Puts files into a file input, as a user would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def take_screenshot(self, file: Path, *, width: int) -> None:
        """A picture of the whole page, as of a window of this width."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        time.sleep(0.5)  # drawn again
        height = self.evaluate("document.documentElement.scrollHeight")
        size = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        picture = self.call("Page.captureScreenshot", clip=size, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(picture["data"]))


def find_chromium() -> str:
    """The browser; CI must have it, elsewhere the tests skip."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None and os.environ.get("CI"):
        pytest.fail("chromium is not installed: in CI the tests in a browser must not skip")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


@contextmanager
def open_page(address: str, *, folder: Path) -> Iterator[Page]:
    """The page at an address, in a browser whose profile is in a folder."""
    words = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
    # WebGL without a graphics card.
    words += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    words += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    browser = subprocess.Popen([find_chromium(), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        file = folder / "DevToolsActivePort"
        port = wait_for(lambda: file.exists() and file.read_text().partition("\n")[0], what=file.name)
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as reply:
            target = next(each for each in json.load(reply) if each["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None, open_timeout=SECONDS) as connection:
            page = Page(connection)
            page.call("Page.navigate", url=address)
            page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
            yield page
    finally:
        browser.kill()
        browser.wait()


def wait_for(find: Callable[[], Any], *, what: str) -> Any:
    """What a function returns, as soon as it is true."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not true within {SECONDS} s")
