"""The process that trains anew while a reviewer goes on deciding."""

import contextlib
import json
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from flawsift.paths import show
from flawsift.progress import Stage


@dataclass(eq=False)
class Refit:
    """Stage 2 in a process of its own, one at a time.

    Attributes:
        command: What is run.
        status: What the page shows: state (idle, running, done, failed) and more.
    """

    command: list[str]
    status: dict[str, Any] = field(default_factory=lambda: {"state": "idle"})
    _process: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> bool:
        """Start, unless one is running; False then."""
        with self._lock:
            if self.status["state"] == "running":
                return False
            self.status = {"state": "running", "stage": Stage.STARTING, "done": 0, "total": 0, "started": time.time()}
            try:
                self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            except OSError as error:
                self.status = {"state": "failed", "message": show(f"cannot start: {error}")}
                return True
        threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()
        return True

    def stop(self) -> None:
        """End the process; the next one resumes where it was."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        result = error = None
        for line in process.stdout:
            try:
                message = json.loads(line, parse_constant=lambda _: None)  # JSON for browsers has no nan
            except (ValueError, RecursionError):
                continue  # a library printed something
            if not isinstance(message, dict):
                continue  # likewise, a number for instance
            if "stage" in message:
                self.status = {**self.status, **{key: message.get(key) for key in ("stage", "done", "total")}}
            result, error = message.get("result", result), message.get("error", error)
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if isinstance(result, dict):
            self.status = {"state": "done", **result}
        else:
            self.status = {"state": "failed", "message": error or f"ended with code {code}"}
