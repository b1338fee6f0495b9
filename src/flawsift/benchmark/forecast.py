"""What a grid lacks and about how long it takes, before anything was run."""

from collections.abc import Sequence

from flawsift.benchmark.grid import Cell, Config
from flawsift.datasets import load
from flawsift.errors import FlawsiftError

# Seconds per training image and preset: medians of the project's own rows at 256 pixels on two cores lie between 0.01
# and 0.05 for detectors that compute distances or statistics, and between 0.5 and 2.8 for those that train a network.
SECONDS, TRAINED_SECONDS = 0.03, 0.8
TYPICAL_N_TRAIN = 200  # where the file leaves it to the size of the set
TRAINING = ("epochs", "steps")  # ends of the names of parameters that only detectors with a training have


def missing_data(config: Config) -> dict[str, str]:
    """{data set: why it cannot be read, and where to get it}, of those of a grid that are not there.

    Looks at lists of files; no image is read.
    """
    missing = {}
    for data in config.data:
        for category in data.categories or ("",):
            options = {**dict(data.options), **({"category": category} if category else {})}
            try:
                load(data.name, **options)
            except FlawsiftError as error:
                missing[data.name] = str(error)
                break
    return missing


def rough_seconds(cells: Sequence[Cell]) -> float:
    """About how long cells take on two cores, one after the other, by the number of training images alone."""
    total = 0.0
    for cell in cells:
        trained = any(name.endswith(TRAINING) for name in cell.detector.make(cell.seed).params())
        n_train = int(dict(cell.data.sizes).get("n_train", TYPICAL_N_TRAIN))
        total += n_train * len(cell.presets) * (TRAINED_SECONDS if trained else SECONDS)
    return total


def duration(seconds: float) -> str:
    """In words: minutes, or hours and minutes."""
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
