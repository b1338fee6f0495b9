"""`python -m tools.campaign fuzz` and `kill`: that bad input and kills end in a clear word and lose nothing.

Exit code 1 where there is a fault, which is printed with how to see it again.
"""

import argparse
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tools.campaign.fuzz import AREAS, fault_line, fuzz, only, work
from tools.campaign.kill import kill
from tools.campaign.rows import write_rows


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Run what is asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["fuzz", "kill", "work"])
    parser.add_argument("--minutes", type=float, default=10, help="of fuzz, for all areas together")
    parser.add_argument("--seed", type=int, help="of all that is random; a new one unless given")
    parser.add_argument("--area", choices=sorted(AREAS), help="this one alone")
    parser.add_argument("--only", type=int, help="this mutation alone")
    parser.add_argument("--kills", type=int, default=50, help="of kill, of all commands in turn")
    parser.add_argument("--results", type=Path, help="CSV file whose rows of this task are written anew")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--material", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # before anything is forked, and alike in all processes: the test network's last digits depend on it
    torch.set_num_threads(1)
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    areas = sorted(AREAS) if args.area is None else [args.area]
    if args.task == "work":
        work(args.area, args.material, seed, args.first)
        return 0
    _say(f"seed {seed}")
    if args.only is not None and args.task == "fuzz":
        outcome = only(args.area, seed, args.only)
        _say(fault_line(args.area, seed, args.only, outcome) if outcome.kind == "fault" else str(outcome))
        return int(outcome.kind == "fault")
    if args.task == "kill":
        counts = _kill(args, seed)
    else:
        counts = fuzz(args.minutes, seed, areas, _say)
    for name, count in counts.items():
        _say(f"{name}: {dict(count)}")
    if args.results is not None:
        write_rows(args.results, args.task, seed, counts)
    return int(any(count["fault"] for count in counts.values()))


def _kill(args: argparse.Namespace, seed: int) -> dict[str, Counter[str]]:
    tries = range(args.kills) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(prefix="flawsift-kill-") as folder:
        return kill(tries, seed, Path(folder) / "kill", _say)


if __name__ == "__main__":
    sys.exit(main())
