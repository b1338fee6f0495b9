"""How fast frozen features come: OpenVINO against torch, in images per second, on this machine's CPU.

    python benchmarks/features.py [--images 32] [--repeats 7]

Network: efficientnet_lite0 at 256 px, random uint8 pixels. All ways run in turn (A B C A B C ..), so that slow
drifts of the machine hit all alike; each figure is the median over the repeats. Other work hits them differently, so
its share of the CPU is told. "torch eager" is what one would write first, the network called on a batch, at the best
of several batch sizes; "torch runtime" is flawsift's own (channels last, image by image). Goal: OpenVINO at least 4
times torch eager. The share of the matmul rate says how much of what this machine can multiply at all is reached;
2 FLOP per multiply-add.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import _rows
from flawsift.features.backbones import Backbone, load_backbone

GOAL = 4.0  # times torch eager
SIZE = 256  # the default input
LAYERS = {"s8_s16": ["stride8", "stride16"], "s4_s8_s16": ["stride4", "stride8", "stride16"]}  # PatchCore; all to 16
QUIET = 0.1  # share of the CPU that other work may take before the ratios mean little
EAGER_BATCHES = (1, 8, 32)
MATMUL = 2048  # large enough to be bound by arithmetic, small enough to take a fraction of a second


def eager(backbone: Backbone, pixels: Tensor, layers: list[str], batch: int) -> Callable[[], object]:
    """The plain way: torch's default memory format, the network called on batches."""
    trunk = backbone._trunk
    taps = [trunk.layers.index(backbone.resolve(layer)) for layer in layers]

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, len(pixels), batch):
                trunk.taps(pixels[start : start + batch], taps)

    return run


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds per repeat of each way, the ways in turn, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def gflop_per_image(backbone: Backbone, layers: list[str]) -> float:
    """Of the network up to the deepest layer, 2 FLOP per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        eager(backbone, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), layers, 1)()
    return float(counter.get_total_flops()) / 1e9


def busy_seconds() -> tuple[float, float]:
    """CPU seconds of the whole machine and of this process; the machine's are 0 where /proc/stat is not there."""
    stat = Path("/proc/stat")
    ticks = [int(tick) for tick in stat.read_text().splitlines()[0].split()[1:]] if stat.exists() else [0] * 8
    working = sum(ticks[:8]) - ticks[3] - ticks[4]  # all but idle and waiting for disks
    return working / os.sysconf("SC_CLK_TCK"), time.process_time()


def measure(
    backbones: dict[str, Backbone], pixels: Tensor, layers: list[str], repeats: int
) -> dict[str, tuple[float, float]]:
    """{way: (median images per second, GFLOP/s)}, with the matmul rate as one more way."""
    matrix = torch.rand(MATMUL, MATMUL)
    ways: dict[str, Callable[[], object]] = {
        "openvino": lambda: backbones["openvino"].extract(pixels, layers),
        "torch runtime": lambda: backbones["torch"].extract(pixels, layers),
        **{f"torch eager, batch {b}": eager(backbones["eager"], pixels, layers, b) for b in EAGER_BATCHES},
        "matmul": lambda: torch.mm(matrix, matrix),
    }
    gflop = gflop_per_image(backbones["eager"], layers)
    rates = {}
    for name, seconds in interleaved(ways, repeats).items():
        median = statistics.median(seconds)
        images, work = (1, 2 * MATMUL**3 / 1e9) if name == "matmul" else (len(pixels), gflop * len(pixels))
        rates[name] = images / median, work / median
    return rates


def figures(rates: dict[str, tuple[float, float]]) -> dict[str, float]:
    best = max((name for name in rates if name.startswith("torch eager")), key=lambda name: rates[name][0])
    matmul = rates["matmul"][1]
    eager_rates = {f"torch_images_per_s_batch_{b}": rates[f"torch eager, batch {b}"][0] for b in EAGER_BATCHES}
    return {
        "openvino_images_per_s": rates["openvino"][0],
        "torch_images_per_s": rates[best][0],
        "torch_runtime_images_per_s": rates["torch runtime"][0],
        "openvino_speedup": rates["openvino"][0] / rates[best][0],
        "openvino_speedup_over_torch_runtime": rates["openvino"][0] / rates["torch runtime"][0],
        "matmul_gflops": matmul,
        "openvino_share_of_matmul": rates["openvino"][1] / matmul,
        "torch_share_of_matmul": rates[best][1] / matmul,
        "torch_runtime_share_of_matmul": rates["torch runtime"][1] / matmul,
        "torch_best_batch": float(best.rsplit(" ", 1)[1]),
        **eager_rates,
    }


def show(title: str, rates: dict[str, tuple[float, float]]) -> None:
    heads = ("images/s", "GFLOP/s", "of matmul", "OpenVINO is")
    print(f"\n{title}\n  {'':24s}" + "".join(f"{head:>12s}" for head in heads), file=sys.stderr)
    for name, (images, gflops) in rates.items():
        share = f"{gflops:12.1f}{gflops / rates['matmul'][1]:12.0%}"
        ratio = (
            f"{images:12.1f}{share}{rates['openvino'][0] / images:10.1f} x" if name != "matmul" else " " * 12 + share
        )
        print(f"  {name:24s}{ratio}", file=sys.stderr)


def main() -> None:
    """Measure both sets of layers and report."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    backbones = {
        "openvino": load_backbone(size=SIZE, runtime="openvino", device="cpu"),
        "torch": load_backbone(size=SIZE, runtime="torch", device="cpu"),
        "eager": load_backbone(size=SIZE, runtime="torch", device="cpu"),
    }
    backbones["eager"]._trunk.to(memory_format=torch.contiguous_format)  # the runtime had made it channels last
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.images, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    before, start = busy_seconds(), time.perf_counter()
    measured: dict[str, float] = {}
    for name, layers in LAYERS.items():
        rates = measure(backbones, pixels, layers, args.repeats)
        show(f"efficientnet_lite0, {SIZE} px, {' + '.join(layers)}", rates)
        measured |= {key if name == "s8_s16" else f"{key}_{name}": value for key, value in figures(rates).items()}
    after, wall = busy_seconds(), time.perf_counter() - start
    others = (after[0] - before[0] - (after[1] - before[1])) / wall / (os.cpu_count() or 1)
    measured["others_cpu_share"] = max(others, 0.0)
    if others > QUIET:  # torch's threads wait for each other at each layer, so a shared core hurts torch most
        _rows.say(f"\nOther work took {others:.0%} of the CPU: the ratios flatter OpenVINO.")
    speedup = measured["openvino_speedup"]
    verdict = f"{speedup:.2f} x: {'met' if speedup >= GOAL else 'MISSED'}"
    _rows.say(f"\nGoal: OpenVINO >= {GOAL:g} x torch eager at its best batch: {verdict}")
    _rows.finish("features", measured, args)


if __name__ == "__main__":
    main()
