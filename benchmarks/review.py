"""Does the review page scroll through thousands of images without a stall? In headless Chromium.

A screening of synthetic images is written without training, the page is opened, the grid is scrolled from top to bottom
at a constant speed and every frame is timed. Then decisions are timed until they are on disk, and the heap is read.
Needs the extra `review`, Playwright and Chromium (--chromium).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _rows

N = 10_000
SECONDS = 20  # for the whole way
BASE = 200  # images that are drawn; the others are links to those
STALL = 100  # milliseconds; a frame that takes longer is seen as a stall
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

SCROLL = """(seconds) => new Promise((done) => {
  const way = document.documentElement.scrollHeight - innerHeight;
  const frames = [];
  let start = null, last = null;
  const step = (now) => {
    if (start === null) start = now; else frames.push(now - last);
    last = now;
    const share = Math.min(1, (now - start) / (1000 * seconds));
    scrollTo(0, way * share);
    if (share < 1) requestAnimationFrame(step);
    else done({frames, way, tiles: document.querySelectorAll('.tile').length});
  };
  requestAnimationFrame(step);
})"""


def make_screening(folder: Path, n: int, size: int) -> Path:
    """A screening of n synthetic images with random scores and maps."""
    import numpy as np

    from flawsift.datasets.synthetic import synthetic, write_folder
    from flawsift.screening.options import ScreenOptions
    from flawsift.screening.result import Screening, SubModelScores
    from flawsift.screening.storage import ROOT, save_screening

    base = min(n, BASE)
    write_folder(synthetic(base - base // 10, base // 10, size=size, texture="weave"), folder / "base")
    images = folder / "images"
    images.mkdir()
    drawn = sorted((folder / "base").iterdir())
    for i in range(n):
        (images / f"{i:06d}.png").symlink_to(drawn[i % base])
    generator = np.random.default_rng(0)
    consensus = generator.gumbel(size=n)
    ids = np.arange(n, dtype=np.int64)
    screening = Screening(
        ids=ids,
        names=[f"{i:06d}.png" for i in range(n)],
        consensus=consensus,
        held_out_scores=consensus,
        kept=ids[consensus < np.quantile(consensus, 0.9)],
        keep_share=0.9,
        options=ScreenOptions(keep=0.9),
        submodels=SubModelScores((ids % 5)[None], (consensus + generator.normal(0, 0.1, (5, n))).astype(np.float32)),
        patch_maps=generator.gumbel(size=(n, 32, 32)).astype(np.float16),
        descriptions=generator.normal(size=(n, 152)).astype(np.float16),
        provenance={ROOT: str(images)},
    )
    return save_screening(screening, folder / "screening")


def wait(page: Any, condition: str, seconds: float = 30) -> None:
    """Until a condition holds; the page's policy forbids Playwright's own waiting, which evaluates inside it."""
    started = time.perf_counter()
    while not page.evaluate(condition):
        if time.perf_counter() - started > seconds:
            raise RuntimeError(f"The page did not reach {condition} within {seconds:g} s.")
        time.sleep(0.002)


def measure(folder: Path, chromium: Path, seconds: float) -> dict[str, Any]:
    """Open the page, scroll it, decide."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "flawsift", "review", str(folder), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = server.stdout.readline().strip()
        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=str(chromium), args=FLAGS)
            page = browser.new_context(viewport={"width": 1360, "height": 860}).new_page()
            started = time.perf_counter()
            page.goto(address)
            page.wait_for_selector("body[data-ready]")
            opened = time.perf_counter() - started
            page.select_option("#filter", "all")
            page.wait_for_timeout(1000)
            scrolled = page.evaluate(SCROLL, seconds)
            page.wait_for_timeout(200)
            started = time.perf_counter()
            wait(page, "document.querySelectorAll('.tile img').length > 0")
            wait(page, "[...document.querySelectorAll('.tile img')].every((i) => i.complete)")
            settled = 0.2 + time.perf_counter() - started
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(500)
            page.locator(".tile").first.focus()
            times = []
            for _ in range(10):
                started = time.perf_counter()
                page.keyboard.press("r")
                wait(page, "document.getElementById('saved').textContent === 'Saved'")
                times.append(time.perf_counter() - started)
                page.evaluate("document.getElementById('saved').textContent = ''")
            heap = page.evaluate("performance.memory.usedJSHeapSize") / _rows.MIB
            browser.close()
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    frames = sorted(scrolled["frames"])
    return {
        "seconds_to_open": opened,
        "pixels_scrolled": scrolled["way"],
        "frames": len(frames),
        "frame_median_ms": statistics.median(frames),
        "frame_p99_ms": frames[int(0.99 * (len(frames) - 1))],
        "frame_max_ms": frames[-1],
        "stalls": sum(f > STALL for f in frames),
        "tiles_in_page": scrolled["tiles"],
        "seconds_until_pictures": settled,
        "decision_median_ms": 1000 * statistics.median(times),
        "heap_mb": heap,
    }


def main() -> None:
    """Measure one size."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--n", type=int, default=N, help="number of images")
    parser.add_argument("--size", type=int, default=512, help="their edge length in pixels")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the way through the grid")
    parser.add_argument("--chromium", type=Path, default=Path("/usr/bin/chromium"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as scratch:
        folder = make_screening(Path(scratch), args.n, args.size)
        figures = measure(folder, args.chromium, args.seconds)
    _rows.finish("review", figures, args)


if __name__ == "__main__":
    main()
