"""What the features of large pictures cost: shrunk to 256 pixels, and in full, tile by tile or in one piece.

Each measurement is a process of its own, of made-up pictures in memory and without a cache: what resizing and the
network take, the median of some pictures. `cpu_seconds` is the time of all cores together, which other work on the
machine moves less; `peak_mb` the largest resident size of the process. anomalib 2.7.0's tiler does the same with the
same network (with torch, as it runs there; ours is measured with OpenVINO, which is the default, and with torch), from
pictures that are tensors already; the environment is that of `peers.py`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import _rows
from flawsift.features.tiling import LARGEST
from peers import PEERS

SIDES = ((1024, 1024), (2048, 2048), (3072, 4096))  # (height, width): 1, 4 and 12 megapixels
SHRUNK, TILED, PIECE, TORCH = "shrunk to 256", "in tiles", "in one piece", "in tiles, with torch"
SMALL = 256  # pixels of the longer side of what is shrunk
PEER = "in tiles, by anomalib 2.7.0"
LAYERS = ("stride8", "stride16")  # what the default detector reads
MEGA = 10**6


def child(mode: str, height: int, width: int, n: int) -> dict[str, Any]:
    """One measurement, of n pictures in turn, after one that is not counted."""
    import numpy as np
    from PIL import Image

    from flawsift.data.decoding import to_pixels
    from flawsift.features.backbones import load_backbone

    scale = SMALL / max(height, width) if mode == SHRUNK else 1.0
    shape = (round(height * scale), round(width * scale))
    runtime: Any = "torch" if mode == TORCH else "auto"
    backbone = load_backbone(size=shape, tiles=(max(shape),) if mode == PIECE else None, runtime=runtime)
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(n + 1)]
    times = []
    for picture in pictures:
        started = time.perf_counter(), time.process_time()
        backbone.extract(to_pixels(picture, shape)[None], LAYERS)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    seconds, cpu = (statistics.median(some) for some in zip(*times[1:], strict=True))
    looked_at = shape[0] * shape[1] / MEGA
    result = {"seconds": seconds, "cpu_seconds": cpu, "looked_at": looked_at, "cpu_per_megapixel": cpu / looked_at}
    cut = backbone.tiles
    tiles = None if cut is None else f"{cut.edge}:{cut.overlap}"
    return {**result, "tiles": tiles, "peak_mb": _rows.peak_mb(), "weights_digest": backbone.weights_digest}


def _peer(args: argparse.Namespace, height: int, width: int) -> dict[str, Any]:
    """anomalib's tiler, with tiles of as many pixels that share as many."""
    edge, shared = LARGEST, LARGEST // 4
    flags = ["--shape", height, width, "--tile", edge, edge - shared, "--n", args.n]
    result = _rows.run_json(Path(__file__).parent / "_peer_tiles.py", *flags, python=args.peer_python)
    looked_at = height * width / MEGA
    cost = {"looked_at": looked_at, "cpu_per_megapixel": result["cpu_seconds"] / looked_at}
    return {**result, **cost, "tiles": f"{edge}:{shared}"}


def main() -> None:
    """Measure all sizes in all ways."""
    parser = _rows.common_flags(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--n", type=int, default=3, help="pictures of each size")
    parser.add_argument(
        "--peer-python", type=Path, default=PEERS / "bin" / "python", help="of an environment with anomalib"
    )
    parser.add_argument("--child", nargs=3, metavar=("MODE", "HEIGHT", "WIDTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mode, height, width = args.child
        print(json.dumps(child(mode, int(height), int(width), args.n)))
        return
    rows: list[dict[str, Any]] = []
    for height, width in SIDES:
        for mode in (SHRUNK, TILED, TORCH, PIECE, PEER):
            if mode == PEER and not args.peer_python.exists():
                _rows.say(f"anomalib is left out: {args.peer_python} is not there; see peers.py")
                continue
            if mode == PEER:
                result = _peer(args, height, width)
            else:
                result = _rows.run_json(__file__, "--n", args.n, "--child", mode, height, width)
            where = {"mode": mode, "height": height, "width": width, "n_images": args.n, "protocol": "noise, in memory"}
            rows.append({**_rows.provenance(), **where, **result})
            _rows.say(f"{width} x {height} {mode}: {result['seconds']:.2f} s, peak {result['peak_mb']:.0f} MiB")
    _rows.append_rows(args.results / "tiles.csv", rows)
    figures = {
        f"core seconds a megapixel, {row['mode']}, {row['width']} x {row['height']}": row["cpu_per_megapixel"]
        for row in rows
    }
    _rows.finish("tiles", figures, args)


if __name__ == "__main__":
    main()
