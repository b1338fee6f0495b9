"""What the detectors that train by gradient steps cost on this machine's CPU, with their budget presets.

Per detector, in a process of its own: a fit on synthetic images whose features come from a cold cache (seconds,
seconds per step, how often an image passed the backbone), a short fit under torch's profiler (the share of time that
is not spent in matrix products and convolutions), and whether k sub-models train cheaper in one batched step than one
by one (torch.func's stacked state under vmap against a loop; forward, backward and Adam, dropout and batch norm
included; without clipping and mining, which both ways have to do). `--batched-only` measures no more than that, in a
minute. Goal: a fit of 200 images of 256 px within three minutes (Dinomaly, RD), fifteen (DeSTSeg) or five (the others).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import _rows
from flawsift.detectors.dinomaly import Dinomaly, Reconstruction
from flawsift.detectors.rd import RD, Student

GOALS = {"dinomaly": 180, "rd": 180, "funad": 300, "cflow": 300, "simplenet": 300, "uniad": 300, "destseg": 900}  # s
BATCHED = ("dinomaly", "rd")
BATCH, RATE = 16, 1e-3  # of the batched comparison; its rate changes no time
COSTS = ("seconds", "seconds_per_step", "passes_per_image", "share_outside_products")
FIGURES = (*COSTS, "batched_seconds", "in_turn_seconds", "batched_ratio")
PROFILED_STEPS, PROFILED_BATCHES = 10, 2  # a profile holds every operation of every step
MATRIX = ("mm", "conv")  # parts of the names of operations that multiply matrices: addmm, bmm, mkldnn_convolution, ...


def child(name: str, n: int, size: int, n_models: int, repeats: int, batched_only: bool) -> _rows.Row:
    """All figures of one detector, or only those of the batched comparison."""
    from flawsift.datasets.synthetic import synthetic
    from flawsift.detectors.parts.training import Watch
    from flawsift.detectors.registry import make_detector
    from flawsift.features.backbones import load_backbone
    from flawsift.features.extraction import attach
    from flawsift.features.store import FeatureStore
    from flawsift.models.model import set_digest

    images = synthetic(n, 0, size=size, seed=0).images
    backbone, detector = load_backbone(size=size), make_detector(name, "budget")
    first = backbone.extract(images.select(images.ids[:1]).pixels(size), detector.layers)
    shapes = [(first[layer].shape[1], first[layer].shape[2]) for layer in detector.layers]
    together = (
        compare(network_of(detector, [c for c, _ in shapes]), shapes, n_models, repeats) if name in BATCHED else {}
    )
    trained = {
        **together,
        "params": detector.params(),
        "weights_digest": backbone.weights_digest,
    }
    if batched_only:
        return trained
    passes, steps, phase = 0, 0, 0
    extract = backbone.extract

    def counted(pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        nonlocal passes
        passes += len(pixels)
        return extract(pixels, layers)

    def progress(_stage: str, done: int, _total: int) -> None:
        nonlocal steps, phase
        if done < steps - phase:  # a second training counts from 0 again
            phase = steps
        steps = phase + done

    backbone.extract = counted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="flawsift-bench-") as cache:
        data, _ = attach(images, backbone, detector.layers, views=detector.views, store=FeatureStore(Path(cache)))
        started = time.perf_counter()
        detector.fit(data, watch=Watch(progress))
        seconds = time.perf_counter() - started
        share = share_outside(detector, data)
        digest = set_digest(data)
    return {
        "seconds": seconds,
        "steps": steps,
        "seconds_per_step": seconds / steps,
        "passes_per_image": passes / n,
        "share_outside_products": share,
        **trained,
        "peak_mb": _rows.peak_mb(),
        "data_digest": digest,
    }


def share_outside(detector: Any, data: Any) -> float:
    """Share of a short fit's time that is not spent in matrix products and convolutions."""
    few = data.select(data.ids[: PROFILED_BATCHES * detector.batch_size])
    passes = {"epochs": PROFILED_STEPS // PROFILED_BATCHES}
    lengths = dict.fromkeys(("steps", "student_steps", "head_steps"), PROFILED_STEPS) | passes | {"warmup": 1}
    brief = detector.clone(**{name: n for name, n in lengths.items() if hasattr(detector, name)})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        brief.fit(few)
        seconds = time.perf_counter() - started
    own = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    products = sum(value for key, value in own.items() if any(part in key for part in MATRIX))
    return float(1 - products / 1e6 / seconds)


def network_of(detector: Any, channels: Sequence[int]) -> Callable[[], nn.Module]:
    """Makes untrained networks of a detector."""
    if isinstance(detector, Dinomaly):
        options: dict[str, Any] = {"n_blocks": detector.n_blocks, "dropout": detector.dropout, "init_std": None}
        return lambda: Reconstruction(channels, width=detector.width, **options)
    assert isinstance(detector, RD)
    return lambda: Student(channels, detector.block, detector.n_blocks, final_relu=detector.final_relu)


Step = Callable[[], Tensor]


def trainings(
    make: Callable[[], nn.Module], shapes: Sequence[tuple[int, int]], n_models: int, batch: int = BATCH
) -> tuple[Step, Step]:
    """The same k trainings twice: functions that take a step of all k, in one call and in turn.

    Args:
        make: Makes an untrained network.
        shapes: Channels and edge length of each tap.
        n_models: k.
        batch: Images in a step of each network; every network has images of its own.

    Returns:
        Two functions that return the (k,) losses before the step.
    """
    torch.manual_seed(0)
    networks = [make().train() for _ in range(n_models)]
    if isinstance(networks[0], Reconstruction):  # its groups are on one grid, the coarsest
        shapes = [(c, min(edge for _, edge in shapes)) for c, _ in shapes]
    given = [torch.randn(n_models, batch, c, edge, edge) for c, edge in shapes]
    stacked, buffers = torch.func.stack_module_state(networks)
    template = make().to("meta").train()
    joint = torch.optim.Adam(list(stacked.values()), lr=RATE)
    own = [torch.optim.Adam(network.parameters(), lr=RATE) for network in networks]

    def loss_of(outputs: Sequence[Tensor], taps: Sequence[Tensor]) -> Tensor:
        pairs = zip(outputs, taps, strict=True)
        return torch.stack([(1 - F.cosine_similarity(f.flatten(1), t.flatten(1))).mean() for f, t in pairs]).sum()

    def one(weights: Mapping[str, Tensor], state: Mapping[str, Tensor], taps: Sequence[Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(template, (dict(weights), dict(state)), (taps,)), taps)

    def together() -> Tensor:
        joint.zero_grad()
        losses: Tensor = torch.vmap(one, randomness="different")(stacked, buffers, given)
        losses.sum().backward()
        joint.step()
        return losses.detach()

    def in_turn() -> Tensor:
        losses = []
        for m, (network, optimizer) in enumerate(zip(networks, own, strict=True)):
            taps = [tap[m] for tap in given]
            optimizer.zero_grad()
            loss = loss_of(network(taps), taps)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return together, in_turn


def compare(
    make: Callable[[], nn.Module], shapes: Sequence[tuple[int, int]], n_models: int, repeats: int
) -> dict[str, float]:
    """Median seconds of a step of k networks in one call and in turn, taken alternately, and their ratio."""
    seconds: dict[Step, list[float]] = {way: [] for way in trainings(make, shapes, n_models)}
    for repeat in range(repeats + 1):  # the first round warms up
        for way, of_way in seconds.items():
            started = time.perf_counter()
            way()
            if repeat:
                of_way.append(time.perf_counter() - started)
    together, in_turn = (statistics.median(of_way) for of_way in seconds.values())
    return {"batched_seconds": together, "in_turn_seconds": in_turn, "batched_ratio": together / in_turn}


def main() -> None:
    """Run each detector in its own process and append its row."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--n", type=int, default=200, help="training images")
    parser.add_argument("--size", type=int, default=256, help="edge length of the network input")
    parser.add_argument("--models", type=int, default=5, help="networks in the batched call")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each way in the batched comparison")
    parser.add_argument("--batched-only", action="store_true", help="only the batched comparison")
    parser.add_argument("--detectors", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--child", choices=list(GOALS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.n, args.size, args.models, args.repeats, args.batched_only)))
        return
    figures: dict[str, Any] = {}
    for name in [n for n in args.detectors if n in BATCHED or not args.batched_only]:
        flags = ["--n", args.n, "--size", args.size, "--models", args.models, "--repeats", args.repeats]
        flags += ["--batched-only"] if args.batched_only else []
        result = _rows.run_json(__file__, *flags, "--child", name)
        protocol = f"synthetic {args.n} x {args.size}, budget preset, cold cache, k={args.models}"
        if args.batched_only:
            protocol = f"noise as taps of {args.size} px, budget preset, k={args.models}, only the batched comparison"
        row = {**_rows.provenance(), "detector": name, "seed": 0, "protocol": protocol, **result}
        _rows.append_rows(args.results / "training.csv", [row])
        figures |= {f"{name}_{key}": result[key] for key in FIGURES if key in result}
        if not args.batched_only:
            _rows.say(
                f"{name}: {result['seconds']:.1f} s (goal: at most {GOALS[name]}), "
                f"{result['seconds_per_step']:.3f} s per step, {result['share_outside_products']:.0%} outside products"
            )
        if name in BATCHED:
            _rows.say(
                f"{name}: a step of {args.models} networks takes {result['batched_seconds']:.2f} s batched, "
                f"{result['in_turn_seconds']:.2f} s in turn: {result['batched_ratio']:.2f}"
            )
    _rows.finish("training", figures, args)


if __name__ == "__main__":
    main()
