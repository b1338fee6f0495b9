"""`python -m tools.campaign fuzz` and `kill`: that bad input and kills end in a clear word and lose nothing.

Exit code 1 where there is a fault, which is printed with how to see it again.
"""

import argparse
import secrets
import sys
from pathlib import Path

from tools.campaign.fuzz import AREAS, fault_line, fuzz, only, work


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
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--material", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    areas = sorted(AREAS) if args.area is None else [args.area]
    if args.task == "work":
        work(args.area, args.material, seed, args.first)
        return 0
    _say(f"seed {seed}")
    if args.only is not None:
        outcome = only(args.area, seed, args.only)
        _say(fault_line(args.area, seed, args.only, outcome) if outcome.kind == "fault" else str(outcome))
        return int(outcome.kind == "fault")
    counts = fuzz(args.minutes, seed, areas, _say)
    return int(any(count["fault"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
