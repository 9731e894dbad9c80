"""A real browser through chromedriver, in the W3C WebDriver protocol; standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for an element reference
ENTER = "\ue007"


class Browser:
    """One window; `run` executes JavaScript and returns its value."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--autoplay-policy=no-user-gesture-required",
            ]
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._address = f"{address}/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def open(self, page: Path) -> None:
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def resize(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def run(self, script: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str, *arguments: Any) -> Any:
        """`script` gets a callback as its last argument; returns what it is called with."""
        return self._call("POST", "/execute/async", {"script": script, "args": list(arguments)})

    def wait_for(self, script: str, value: Any) -> None:
        """Run `script` until it returns `value`; events reach the page a little later."""
        found = None
        for _ in range(100):
            found = self.run(script)
            if found == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{script}: {found!r}, waited for {value!r}")

    def type(self, selector: str, keys: str) -> None:
        """Press keys on an element, as a person without a mouse would."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{found[ELEMENT]}/value", {"text": keys})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium, or a skip that says what is missing."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver on this machine; Debian: apt-get install chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address + "/status", timeout=5).close()
                break
            time.sleep(0.1)
        window = Browser(address)
        try:
            yield window
        finally:
            window.close()
    finally:
        process.terminate()
        process.wait()
