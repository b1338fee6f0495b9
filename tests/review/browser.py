"""A real browser and a real server, for tests. Without Playwright or Chromium those that import this are skipped.

Needs Chromium (FLAWSIFT_CHROMIUM or /usr/bin/chromium), Playwright, and axe-core for the accessibility checks
(FLAWSIFT_AXE, the path of axe.min.js). `.ci/run` has them all.
"""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect

CHROMIUM = Path(os.environ.get("FLAWSIFT_CHROMIUM", "/usr/bin/chromium"))
AXE = Path(os.environ.get("FLAWSIFT_AXE", "axe.min.js"))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")
needs_axe = pytest.mark.skipif(not AXE.exists(), reason="axe-core is not there; FLAWSIFT_AXE names no file")


class Server:
    """`flawsift review` in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "flawsift", "review", str(self.folder), "--no-browser", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def decisions(self) -> dict[str, str]:
        """What is on disk."""
        path = self.folder / "decisions.csv"
        if not path.exists():
            return {}
        with path.open(newline="", encoding="utf-8") as file:
            return {row["path"]: row["decision"] for row in csv.DictReader(file) if row["decision"]}


class Errors(list[str]):
    """What the page complained of."""

    def watch(self, page: Any) -> Any:
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("console", lambda message: self.append(message.text) if message.type == "error" else None)
        page.on("dialog", self._dismiss)
        return page

    def _dismiss(self, dialog: Any) -> None:
        self.append(dialog.message)
        dialog.dismiss()


def open_page(browser: Any, errors: Errors, address: str, **context: Any) -> Any:
    page = errors.watch(browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **context}).new_page())
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def saved(page: Any) -> None:
    expect(page.locator("#saved")).to_have_text("Saved")


def names(page: Any) -> list[str]:
    shown: list[str] = page.locator(".tile .name").all_inner_texts()
    return shown


def hold(page: Any) -> list[Any]:
    """Requests to save, held back until they are let go one by one."""
    held: list[Any] = []
    page.route("**/decide", lambda route: held.append(route))  # a builtin is not taken
    return held


def arrived(page: Any, held: list[Any], n: int) -> Any:
    for _ in range(200):
        if len(held) >= n:
            return held[n - 1]
        page.wait_for_timeout(20)
    raise AssertionError(f"{len(held)} of {n} requests came")


def violations(page: Any) -> list[str]:
    """What axe-core finds, one line each. Evaluated by the debugger, which a content security policy does not bind."""
    page.evaluate(AXE.read_text("utf-8"))
    rules = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}"
    found = page.evaluate(f"axe.run(document, {rules})")["violations"]
    return [f"{v['id']}: {n['html'][:150]} {n['failureSummary'][:300]}" for v in found for n in v["nodes"]]
