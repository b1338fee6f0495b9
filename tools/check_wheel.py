"""Checks that the flawsift of this environment, which was installed from a wheel, has every file of src/flawsift."""

import sys
from importlib import resources
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "flawsift"


def main() -> None:
    """Name the files that are absent or differ."""
    installed = resources.files("flawsift")
    if str(installed) == str(SOURCE):
        sys.exit(f"{SOURCE} itself is imported, no wheel.")
    names = [p.relative_to(SOURCE) for p in SOURCE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    here = {n: installed.joinpath(*n.parts) for n in names}
    lost = [str(n) for n, file in here.items() if not file.is_file() or file.read_bytes() != (SOURCE / n).read_bytes()]
    if lost or not names:
        sys.exit(f"Not in the wheel, or not as in {SOURCE}: {', '.join(sorted(lost)) or 'anything'}.")


if __name__ == "__main__":
    main()
