"""A real browser that a test drives: Chromium without a window, spoken to in its DevTools protocol, through pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "End": (35, ""), "Home": (36, ""), "ArrowUp": (38, ""),
        "ArrowDown": (40, "")}  # fmt: skip
SHIFT, CONTROL = 8, 2
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def find_chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return found


@dataclass
class Page:
    """A page of the browser. `complaints` is what its console said: errors, and what its policy refused.

    `warnings` are the dialogs that it opened, such as the one before it is left; each was accepted.
    """

    commands: int
    events: int
    session: str = ""
    complaints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _loaded: set[str] = field(default_factory=set)
    _downloads: set[str] = field(default_factory=set)
    _held: bytes = b""
    _number: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        number = self._send(method, **parameters)
        while (message := self._next()).get("id") != number:
            pass
        assert "error" not in message, (method, message)
        result: dict[str, Any] = message["result"]
        return result

    def _send(self, method: str, **parameters: Any) -> int:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(command | session).encode() + b"\0")
        return self._number

    def open(self, url: str) -> None:
        """Load a page, and wait until its scripts have run."""
        loader = self.call("Page.navigate", url=url)["loaderId"]
        while loader not in self._loaded:
            self._next()

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true, which may await something."""
        self.run(f"(async () => {{ while (!({condition})) await new Promise(next => setTimeout(next, 5)); }})()")

    def choose(self, selector: str, paths: Sequence[Path]) -> None:
        """Choose files, as the user would in the dialog of a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False, control: bool = False) -> None:
        """Press a key: one of KEYS, or a letter."""
        code, text = KEYS.get(key, (ord(key[-1].upper()), key))
        modifiers = SHIFT * shift | CONTROL * control
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text and not control else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        """Click into the middle of the first such element, by the mouse."""
        place = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int) -> None:
        """The window's, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """As a system that is `light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.run(frame)  # what was changed is drawn by then
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def downloaded(self, folder: Path, script: str) -> Path:
        """The file that a script lets the browser download into an empty folder."""
        self._downloads.clear()
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)
        self.run(script)
        while "completed" not in self._downloads:
            self._next()
        (found,) = folder.iterdir()
        return found

    def _next(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + PATIENCE_S
        while b"\0" not in self._held:
            ready, _, _ = select.select([self.events], [], [], max(0.0, deadline_s - time.monotonic()))
            data = os.read(self.events, 1 << 16) if ready else b""
            assert data, "the browser has ended, or says nothing"
            self._held += data
        line, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        match message:
            case {"method": "Page.lifecycleEvent", "params": {"name": "load", "loaderId": loader}}:
                self._loaded.add(loader)
            case {"method": "Log.entryAdded", "params": {"entry": entry}}:
                self.complaints.append(entry["text"])
            case {"method": "Browser.downloadProgress", "params": {"state": state}}:
                self._downloads.add(state)
            case {"method": "Page.javascriptDialogOpening", "params": {"type": kind}}:
                self.warnings.append(kind)
                self._send("Page.handleJavaScriptDialog", accept=True)
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                self.complaints.append(str(details))
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with one page, its profile in a folder. It reads commands from descriptor 3 and writes to 4."""
    (their_commands, commands), (events, their_events) = os.pipe(), os.pipe()
    line = [find_chromium(), *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    shell = ["bash", "-c", f'exec "$@" 3<&{their_commands} 4>&{their_events}', "bash", *line]
    fds = their_commands, their_events
    process = subprocess.Popen(shell, pass_fds=fds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in fds:
        os.close(fd)
    page = Page(commands, events)
    try:
        targets = page.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            page.call(f"{domain}.enable")
        page.call("Page.setLifecycleEventsEnabled", enabled=True)
        yield page
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        os.close(commands)
        os.close(events)
