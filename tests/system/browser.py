"""Headless Chromium over the DevTools protocol, through a pipe: no driver and no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.system.jobs import kill_family

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# All text that a person sees, also inside custom elements, whose shadow trees no selector enters.
SEEN = """
(function text(node) {
    if (node.nodeType == Node.TEXT_NODE) return node.textContent;
    if (["STYLE", "SCRIPT", "NOSCRIPT", "TEMPLATE"].includes(node.nodeName)) return "";
    if (node.nodeType == Node.ELEMENT_NODE && getComputedStyle(node).display == "none") return "";
    const children = [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes];
    return children.map(text).join(" ");
})(document.body)
"""


class Browser:
    """A page of a browser of its own; leave the block to end it."""

    def __init__(self, width: int = 1400, height: int = 1000) -> None:
        assert CHROMIUM is not None
        self.profile = tempfile.mkdtemp(prefix="chromium")
        ours, theirs = os.pipe(), os.pipe()
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--disable-background-networking"]
        # TensorBoard draws its lines with WebGL: on the CPU here.
        command += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        command += [f"--window-size={width},{height}", f"--user-data-dir={self.profile}"]
        # The browser reads commands from descriptor 3 and answers on descriptor 4.
        shell = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.commands, self.answers = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")
        # Ends the reads below, should the browser hang.
        self.watchdog = threading.Timer(240, kill_family, [self.process.pid])
        self.watchdog.start()
        self.number, self.session, self.rest = 0, "", b""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.cancel()
        kill_family(self.process.pid)
        self.process.wait(30)
        self.commands.close()
        self.answers.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while True:
            while b"\0" not in self.rest:
                part = self.answers.read1(1 << 16)
                assert part, "the browser has ended"
                self.rest += part
            answer, _, self.rest = self.rest.partition(b"\0")
            found = json.loads(answer)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def go(self, url: str) -> None:
        # Another fragment alone would not load the page anew.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, *texts: str, timeout: float = 60) -> str:
        """The text that a person sees, as soon as it holds all of these; without any space, since
        what is read as one word may be several elements."""
        deadline, seen = time.monotonic() + timeout, ""
        wanted = ["".join(text.split()) for text in texts]
        while time.monotonic() < deadline:
            seen = "".join((self.run(SEEN) or "").split()) if self.run("!!document.body") else ""
            if all(text in seen for text in wanted):
                return seen
            time.sleep(0.2)
        missing = [text for text in wanted if text not in seen]
        raise AssertionError(f"the page does not show {missing}, but: {seen[:3000]}")

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
