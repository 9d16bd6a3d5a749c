"""Chromium without a window, spoken to over its debugging pipe."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page in one browser.

    Attributes:
        complaints: What the console, the page's exceptions and the content policy said.
        requests: Every address that the page asked for.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._ids = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    _session = None

    def open(self, page: Path, width: int = 1000, dark: bool = False, scripts: bool = True) -> None:
        """Load a file into a window of this width, and forget what was said before."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        # A bar that is there or not would make the page narrower or not.
        self._call("Emulation.setScrollbarsHidden", {"hidden": True})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        # Where an earlier page left it, it may rest on a span of this one and open the panel.
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 0, "y": 0})
        self.complaints.clear()
        self.requests.clear()
        self._loaded = False
        self._call("Page.navigate", {"url": page.resolve().as_uri()})
        while not self._loaded:
            self._receive()

    def value(self, expression: str) -> Any:
        """What an expression gives on the page."""
        answer = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point_at(self, selector: str) -> None:
        """Move the pointer over the first element that a selector finds."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        # Scrolling hides the panel, and is told of at the next frame.
        time.sleep(0.2)
        box = self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": box[0], "y": box[1]})

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key})

    def screenshot(self, path: Path, whole: bool = True) -> bytes:
        """A picture of the page, as PNG, once two in a row are equal: fonts of rare letters come after the page."""
        before, data = b"", self._picture(whole)
        while data != before:
            time.sleep(0.1)
            before, data = data, self._picture(whole)
        path.write_bytes(data)
        return data

    def _picture(self, whole: bool) -> bytes:
        asked: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            # Left to itself it takes the width with or without room for a bar.
            width, height = self.value("[window.innerWidth, document.documentElement.scrollHeight]")
            asked["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        answer = self._call("Page.captureScreenshot", asked)
        return base64.b64decode(answer["data"])

    def pdf(self, path: Path) -> bytes:
        """The page as it is printed."""
        data = base64.b64decode(self._call("Page.printToPDF", {"printBackground": False})["data"])
        path.write_bytes(data)
        return data

    def _call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self._ids += 1
        asked = self._ids
        message: dict[str, Any] = {"id": asked, "method": method, "params": params or {}}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == asked:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], 60)
            chunk = os.read(self._read, 2**20) if ready else b""
            assert chunk, "the browser does not answer"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        event, params = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        elif event == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")
        return message


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser that ends with the block."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe(), os.pipe()
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    command += ["--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={profile}"]

    def descriptors() -> None:
        # The browser reads its orders from descriptor 3 and answers on 4, whatever these are here.
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_write[0], to_read[1]))
        os.dup2(read, 3)
        os.dup2(write, 4)

    process = subprocess.Popen(
        command, preexec_fn=descriptors, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_write[0])
    os.close(to_read[1])
    try:
        yield Browser(to_read[0], to_write[1])
    finally:
        process.kill()
        process.wait()
        os.close(to_read[0])
        os.close(to_write[1])
