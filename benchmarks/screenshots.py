"""Take the pictures of docs/ anew: the review page and the reports, of synthetic images only.

Needs the extra `review`, Playwright and Chromium (--chromium).
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

import _rows
from _cloth import DEFECTS, cloth

N_GOOD, N_DEFECTIVE = 130, 20
N_DAY, N_BAD_DAY, N_TEST = 24, 6, 40
GRID = _rows.ROOT / "benchmarks" / "example.toml"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE = (1280, 800), (390, 844)
REVIEW = "review"
# name of the picture: file of the page, and the section that the documents show; None: the page is looked at only
PAGES: dict[str, tuple[str, str | None]] = {
    "screening": ("screening/report.html", "suspects"),
    "model": ("model/report.html", "model"),
    "evaluation": ("evaluation/report.html", "metrics"),
    "predictions": ("of-day-2/report.html", "images"),
    "drift": ("drift/report.html", None),
    "calibration": ("calibrated/calibration.html", "curve"),
    "diagnosis": ("diagnosis/diagnose.html", None),
    "benchmark": ("benchmark/report.html", None),
}


def flawsift(*arguments: object) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-m", "flawsift", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def make(folder: Path) -> None:
    """Everything whose page is shown, of synthetic images; what is there already is used again."""
    from flawsift.datasets.synthetic import write_folder, write_mvtec

    parts, tree, days = folder / "parts", folder / "tree", [folder / f"day-{n}" for n in (1, 2, 3)]
    if not tree.exists():
        write_folder(cloth(range(N_GOOD), range(N_DEFECTIVE)), parts)
        (parts / "camera-fault.png").touch()
        good, bad = N_GOOD, N_DEFECTIVE  # what comes from here on is new
        for day in days:
            write_folder(cloth(range(good, good + N_DAY), range(bad, bad + N_BAD_DAY)), day)
            good, bad = good + N_DAY, bad + N_BAD_DAY
        for path in days[-1].iterdir():  # an older lamp
            with Image.open(path) as image:
                image.point(lambda value: round(0.9 * value)).save(path)
        write_mvtec(cloth(range(good, good + N_TEST), range(bad, bad + N_TEST)), tree, train_share=0)
    model, screening = folder / "model", folder / "screening"
    commands: dict[str, list[object]] = {
        "screening": ["screen", parts],
        "model": ["fit", parts, "--screening", screening],
        "evaluation": ["evaluate", model, tree],
        **{f"of-{day.name}": ["predict", model, day] for day in days},
        "drift": ["drift", model, *(folder / f"of-{day.name}" for day in days)],
        "calibrated": ["calibrate", model, tree],
        "diagnosis": ["diagnose", parts],
        "rows": ["benchmark", GRID],
        "benchmark": ["benchmark-report", folder / "rows", "--config", GRID],
    }
    for name, words in commands.items():
        if not (folder / name).exists():
            flawsift(*words, "--out", folder / name)


# whether no picture in view is still on its way
LOADED = """() => [...document.images].every((one) => {
  const box = one.getBoundingClientRect();
  return one.complete || !one.src || box.bottom < 0 || box.top > innerHeight;
})"""


def settle(page: Any) -> None:
    """Wait until pictures are there; the review page's policy forbids Playwright's own polling."""
    for _ in range(50):
        page.wait_for_timeout(200)
        if page.evaluate(LOADED):
            break
    page.wait_for_timeout(300)  # layout, and what fades in


def shoot(page: Any, path: Path, *, full_page: bool = False) -> None:
    """A screenshot of what has settled, as JPEG: heatmaps over a noisy texture are several times that as PNG."""
    settle(page)
    page.screenshot(path=path, type="jpeg", quality=72, full_page=full_page)


def main() -> None:
    """Take those that the documents show, or, with --all, whole pages in light and dark, at two widths and printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_rows.ROOT / "docs")
    parser.add_argument("--all", action="store_true", help="whole pages, dark, phone and print too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these pages only, such as model or review")
    parser.add_argument("--work", type=Path, help="keep what is made here, and use it again")
    parser.add_argument("--chromium", type=Path, default=Path("/usr/bin/chromium"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flawsift-shots-") as scratch:
        folder = args.work or Path(scratch)
        folder.mkdir(exist_ok=True)
        make(folder)
        heatmap(folder, args.out / "heatmap.jpg")
        take(folder, args.out, args.chromium, every=args.all, only=args.only)


def heatmap(folder: Path, path: Path) -> None:
    """The highest-scoring scratch among new parts, and its heatmap beside it."""
    with (folder / "of-day-2" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["score"]))
    scratches = [f"{N_DAY + n:06d}.png" for n in range(N_BAD_DAY) if (N_DEFECTIVE + N_BAD_DAY + n) % len(DEFECTS) == 0]
    name = next(row["path"] for row in rows if row["path"] in scratches)
    with Image.open(folder / "day-2" / name) as part, Image.open(folder / "of-day-2" / "maps" / f"{name}.png") as map_:
        pair = Image.new("RGB", (2 * part.width + 6, part.height), "white")
        pair.paste(part, (0, 0))
        pair.paste(map_.convert("RGB").resize(part.size), (part.width + 6, 0))
        pair.save(path, quality=85)


def take(folder: Path, out: Path, chromium: Path, *, every: bool, only: list[str] | None) -> None:
    """All pictures of one folder."""
    from playwright.sync_api import sync_playwright

    names = [name for name in (*PAGES, REVIEW) if only is None or name in only]
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(chromium), args=FLAGS)
        schemes, sizes = (("light", "dark"), (DESK, PHONE)) if every else (("light",), (DESK,))
        for scheme, (width, height) in product(schemes, sizes):
            suffix = ("-dark" if scheme == "dark" else "") + ("-phone" if (width, height) == PHONE else "")
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
            page = context.new_page()
            page.set_default_timeout(20_000)
            for name in names:
                if name == REVIEW:
                    review(page, folder / "screening", out, suffix, every=every)
                else:
                    report(page, folder, name, out, suffix, every=every)
            context.close()
        browser.close()


def report(page: Any, folder: Path, name: str, out: Path, suffix: str, *, every: bool) -> None:
    """What the documents show of a page, or all of it."""
    file, section = PAGES[name]
    page.goto((folder / file).as_uri())
    if every:
        page.evaluate("document.querySelectorAll('img').forEach(one => { one.loading = 'eager'; })")
        shoot(page, out / f"report-{name}-whole{suffix}.jpg", full_page=True)
        if not suffix:
            page.pdf(path=out / f"report-{name}.pdf", format="A4")
    elif section is not None:
        page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
        for closed in page.query_selector_all(f"#{section} > details"):
            closed.evaluate("element => { element.open = true; }")
        shoot(page, out / f"report-{name}.jpg")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the review page of a screening, as long as it is looked at."""
    command = [sys.executable, "-m", "flawsift", "review", str(folder), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def review(page: Any, folder: Path, out: Path, suffix: str, *, every: bool) -> None:
    """The review page: the grid with some decisions, one image beside another, a region, and the dialogs."""
    (folder / "decisions.csv").unlink(missing_ok=True)
    with served(folder) as address:
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        page.evaluate("document.querySelector('.path bdi').textContent = 'screening'")  # not where this machine has it
        page.locator(".tile").first.focus()
        for key in ("r", "r", "k", "r", "u"):
            page.keyboard.press(key)
        page.evaluate("scrollTo(0, 0)")
        for _ in range(50):
            if page.locator("#saved").inner_text() == "Saved":
                break
            page.wait_for_timeout(200)
        shoot(page, out / f"review-grid{suffix}.jpg")
        page.keyboard.press("Enter")
        page.locator("#alike-list button").first.click()
        page.evaluate("document.querySelector('.side').scrollTo(0, 0)")
        shoot(page, out / f"review-single{suffix}.jpg")
        if every:
            for _ in range(3):
                page.keyboard.press("+")
            shoot(page, out / f"review-zoom{suffix}.jpg")
        page.keyboard.press("Escape")
        page.click("#open-region")
        settle(page)
        box = page.locator("#region-svg").bounding_box()
        for x, y in ((0.1, 0.1), (0.9, 0.15), (0.85, 0.8), (0.2, 0.9)):
            page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.click("#region-close")
        shoot(page, out / f"review-region{suffix}.jpg")
        page.click("#region [data-close]")
        for dialog in ("overview", "help", "refit") if every else ():
            page.click(f"#open-{dialog}")
            shoot(page, out / f"review-{dialog}{suffix}.jpg")
            page.click(f"#{dialog} [data-close]")


if __name__ == "__main__":
    main()
