"""A headless Chromium for the tests, controlled by its DevTools protocol over a pipe."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

_FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
_ANSWER_S: Final = 60.0  # of the browser, on a busy machine


def chromium() -> str | None:
    """Return the path of Chromium; None if it is not installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a Chromium with its profile in `folder`."""

    def __init__(self, program: str, folder: Path) -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        command = [program, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        moved = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'  # the descriptors that Chromium expects
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._read = b""
        self._number = 0
        self._session: str | None = None
        page = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(_ANSWER_S)
        os.close(self._to)
        os.close(self._from)

    def open(self, address: str) -> None:
        """Load a page, even if it is loaded already."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Wait until an expression is true; return its value."""
        end = time.monotonic() + _ANSWER_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, (
                f"never true: {expression}\n{self.evaluate('document.body.innerText')[:4000]}"
            )
            time.sleep(0.02)
        return value

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Choose the files of a file input."""
        found = self._call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self._call("DOM.setFileInputFiles", files=[str(path) for path in files], objectId=found["result"]["objectId"])

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window, in pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _ANSWER_S
        while True:
            whole, mark, rest = self._read.partition(b"\0")
            if mark:
                self._read = rest
                answer = json.loads(whole)
                if answer.get("id") == self._number:
                    assert "error" not in answer, answer["error"]
                    result: dict[str, Any] = answer["result"]
                    return result
                continue
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium does not answer to {method}"
            piece = os.read(self._from, 1 << 16)
            assert piece, "Chromium is gone"
            self._read += piece
