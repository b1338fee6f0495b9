"""anomalib's side of tiles.py, run by the python of its own environment; the last line of stdout is JSON.

It stands alone: flawsift is not installed there. The network and its layers are those of flawsift's default, without
weights, which change no cost; tiles are cut and put together again by its `Tiler`, and embedded as by its PatchCore.
"""

import argparse
import json
import logging
import resource
import statistics
import time
import warnings

warnings.filterwarnings("ignore")
logging.getLogger("anomalib").setLevel(logging.WARNING)
NETWORK, LAYERS = "tf_efficientnet_lite0", ("blocks.2", "blocks.4")


def main() -> None:
    """Some pictures in turn, after one that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, required=True, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, nargs=2, required=True, metavar=("EDGE", "STRIDE"))
    parser.add_argument("--n", type=int, required=True)
    args = parser.parse_args()
    import torch
    from anomalib.data.utils.tiler import Tiler
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.set_num_threads(2)
    model = PatchcoreModel(layers=LAYERS, backbone=NETWORK, pre_trained=False)
    model.train()  # it then gives its embedding and asks for no memory bank
    model.feature_extractor.eval()
    model.tiler = Tiler(tile_size=args.tile[0], stride=args.tile[1])
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(args.n + 1):
        picture = torch.rand(1, 3, *args.shape, generator=generator)
        started = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model(picture)
        model.embedding_store.clear()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    seconds, cpu = (statistics.median(some) for some in zip(*times[1:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak}))


if __name__ == "__main__":
    main()
