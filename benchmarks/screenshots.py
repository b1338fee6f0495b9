"""Take the pictures of docs/ anew: the review page and the reports, of synthetic images only.

Needs the extra `review`, Playwright and Chromium (--chromium).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _rows

N_GOOD, N_DEFECTIVE = 170, 30
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE = (1280, 800), (390, 844)


def flawsift(*arguments: object) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-m", "flawsift", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def make(folder: Path) -> None:
    """A screening, a model and an evaluation of synthetic images."""
    from flawsift.datasets.synthetic import synthetic, write_folder, write_mvtec

    # of one seed: the first good images of the larger set are those of the smaller one
    write_folder(synthetic(N_GOOD, N_DEFECTIVE, size=256, texture="weave", seed=3), folder / "parts")
    write_mvtec(synthetic(60, 60, size=256, texture="weave", seed=3), folder / "tree")
    (folder / "parts" / "camera-fault.png").touch()
    flawsift("screen", folder / "parts", "--out", folder / "screening")
    flawsift("fit", folder / "parts", "--out", folder / "model", "--screening", folder / "screening")
    flawsift("evaluate", folder / "model", folder / "tree", "--out", folder / "evaluation")


def shoot(page: Any, path: Path) -> None:
    """A screenshot of what has settled, as JPEG: heatmaps over a noisy texture are several times that as PNG."""
    page.wait_for_timeout(900)
    page.screenshot(path=path, type="jpeg", quality=80)


def main() -> None:
    """Take them all, in light and dark and at two widths; those that the documents show carry no suffix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_rows.ROOT / "docs")
    parser.add_argument("--all", action="store_true", help="dark and phone too")
    parser.add_argument("--work", type=Path, help="keep what is made here, and use it again")
    parser.add_argument("--chromium", type=Path, default=Path("/usr/bin/chromium"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flawsift-shots-") as scratch:
        folder = args.work or Path(scratch)
        if not (folder / "evaluation").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
        take(folder, args.out, args.chromium, every=args.all)


def take(folder: Path, out: Path, chromium: Path, *, every: bool) -> None:
    """All pictures of one folder."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "flawsift", "review", str(folder / "screening"), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as running:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        browser = running.chromium.launch(executable_path=str(chromium), args=FLAGS)
        for scheme in ("light", "dark") if every else ("light",):
            for width, height in (DESK, PHONE) if every else (DESK,):
                suffix = ("-dark" if scheme == "dark" else "") + ("-phone" if (width, height) == PHONE else "")
                context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
                page = context.new_page()
                for name, section in (("screening", "suspects"), ("model", "model"), ("evaluation", "metrics")):
                    page.goto((folder / name / "report.html").as_uri())
                    if every:
                        shoot(page, out / f"report-{name}-top{suffix}.jpg")
                    page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
                    shoot(page, out / f"report-{name}{suffix}.jpg")
                page.goto(address)
                page.wait_for_selector("body[data-ready]")
                page.locator(".tile").first.focus()
                for key in ("r", "r", "k", "r", "u"):
                    page.keyboard.press(key)
                page.evaluate("scrollTo(0, 0)")
                shoot(page, out / f"review-grid{suffix}.jpg")
                page.keyboard.press("Enter")
                page.locator("#alike-list button").first.click()
                shoot(page, out / f"review-single{suffix}.jpg")
                page.keyboard.press("Escape")
                for dialog in ("overview", "help", "refit") if every else ():
                    page.click(f"#open-{dialog}")
                    shoot(page, out / f"review-{dialog}{suffix}.jpg")
                    page.keyboard.press("Escape")
                for _ in range(5):
                    page.keyboard.press("z")
                page.wait_for_timeout(500)
                context.close()
        browser.close()
        server.terminate()


if __name__ == "__main__":
    main()
