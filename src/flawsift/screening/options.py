"""The options of stage 1, declared once: Python, the presets, the command line and the benchmark use these."""

from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from math import isfinite
from numbers import Integral, Number, Real
from typing import Any, Literal, NoReturn, get_args

from flawsift.errors import ParameterError, unknown_name

Consensus = Literal["mean", "median", "trimmed_mean", "rank_mean"]
Normalize = Literal["none", "robust", "rank"]
RankBy = Literal["auto", "submodels"]

OWN = "own"  # the detector of stage 1 that is the final detector itself
FINAL = "quorum"  # the detector of stage 2 where none is named
OF_SUBMODELS = ("n_subsets", "n_partitions", "consensus", "normalize", "exclude_own", "divergence_weight")
HELP, FLAG = "help", "flag"  # of a field: what the command line says of it, and its flag where that is not the name


@dataclass(frozen=True, kw_only=True)
class ScreenOptions:
    """How stage 1 ranks the training images, and what it keeps. The values without arguments are the default preset.

    Attributes:
        screener: Registry name of the detector of stage 1, or "own" for the final detector itself as in the paper.
        rank_by: "auto" ranks by the screener's own scores of its training images without themselves, where it has
            them exactly (`flawsift.detectors.protocols.LeavesOut`), as Quorum does, and by sub-models elsewhere, or
            where one of their options (`OF_SUBMODELS`) is set; "submodels" always by these.
        keep: Share of the images kept, floor(keep * N) (LLBNAD, equation 4), or "auto": see `consensus.choose`;
            without rejection of patches, as many as the estimate of the contamination says.
        reject_patches: Patches whose mean held-out score lies more than so many robust deviations above the set's
            median are left out of stage 2; 0 rejects none, None takes the screener's own `patch_rejection`.
        n_subsets: k, disjoint subsets of a random partition (equation 1).
        n_partitions: R, independent partitions; their R * k sub-models vote together.
        consensus: How an image's scores become one (equation 3 is the mean).
        normalize: How sub-models come on one scale first: "robust" by median and MAD of each one's held-out scores,
            "rank" by ranks among them, "none" as the paper.
        exclude_own: Leave out the sub-model that trained on the image. The paper keeps it; a memory bank scores its
            own images near zero.
        divergence_weight: Weight of the divergence of equation 2 beside the consensus, both in robust units.

    Raises:
        ParameterError: A value is out of range.
    """

    screener: str = field(default=FINAL, metadata={HELP: "Detector of stage 1; 'own' for --detector."})
    rank_by: RankBy = field(
        default="auto", metadata={HELP: "'submodels' also where the screener can leave an image out by itself."}
    )
    keep: float | Literal["auto"] = field(default="auto", metadata={HELP: "'auto', or the share to keep such as 0.4."})
    reject_patches: float | None = field(
        default=None, metadata={HELP: "Robust deviations above which a patch is not learned from; 0 rejects none."}
    )
    n_subsets: int = field(default=5, metadata={HELP: "Disjoint subsets k.", FLAG: "--subsets"})
    n_partitions: int = field(default=1, metadata={HELP: "Independent random partitions.", FLAG: "--partitions"})
    consensus: Consensus = field(default="mean", metadata={HELP: "How sub-models vote."})
    normalize: Normalize = field(default="robust", metadata={HELP: "How sub-models come on one scale."})
    exclude_own: bool = field(
        default=True,
        metadata={HELP: "Leave out the sub-model that trained on the image.", FLAG: "--exclude-own/--include-own"},
    )
    divergence_weight: float = field(default=0.0, metadata={HELP: "Weight of the paper's equation 2."})

    def __post_init__(self) -> None:
        least = 2 if self.exclude_own or self.divergence_weight else 1
        why = {2: " when exclude_own is set" if self.exclude_own else " for a divergence"}.get(least, "")
        checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
            "screener": (lambda v: isinstance(v, str) and bool(v), "be the name of a detector, or 'own'"),
            "rank_by": (lambda v: v in get_args(RankBy), f"be one of {', '.join(get_args(RankBy))}"),
            "keep": (lambda v: v == "auto" or (_number(v) and 0 < v <= 1), "be 'auto' or in (0, 1]"),
            "reject_patches": (lambda v: v is None or (_number(v) and v >= 0), "be None or not negative"),
            "n_subsets": (lambda v: _count(v) and v >= least, f"be a whole number of at least {least}{why}"),
            "n_partitions": (lambda v: _count(v) and v >= 1, "be a whole number of at least 1"),
            "consensus": (lambda v: v in get_args(Consensus), f"be one of {', '.join(get_args(Consensus))}"),
            "normalize": (lambda v: v in get_args(Normalize), f"be one of {', '.join(get_args(Normalize))}"),
            "exclude_own": (lambda v: isinstance(v, bool), "be True or False"),
            "divergence_weight": (lambda v: _number(v) and v >= 0, "be a number that is not negative"),
        }
        for name, (holds, constraint) in checks.items():
            value = getattr(self, name)
            if isinstance(value, Number) and hasattr(value, "item"):  # numpy's, of a sweep; JSON has plain ones only
                value = value.item()
                object.__setattr__(self, name, value)
            if not holds(value):
                named = flag(self.__dataclass_fields__[name])
                raise ParameterError(f"Stage 1: {name} ({named}) must {constraint}, got {value!r}.")

    @classmethod
    def of(cls, preset: "ScreenOptions | str" = "default", **changes: Any) -> "ScreenOptions":
        """A preset by name, or options, with some values changed.

        >>> ScreenOptions.of("paper", n_subsets=3).keep
        0.4

        Raises:
            ParameterError: Unknown preset or option, or a value out of range.
        """
        if not isinstance(preset, str | ScreenOptions):
            raise ParameterError(f"Options of stage 1 are ScreenOptions or {' or '.join(PRESETS)}, got {preset!r}.")
        if isinstance(preset, str) and preset not in PRESETS:
            raise ParameterError(unknown_name("preset of stage 1", preset, PRESETS))
        known = [f.name for f in fields(cls)]
        for name in changes:
            if name not in known:
                raise ParameterError(unknown_name("option of stage 1", name, known))
        return replace(PRESETS[preset] if isinstance(preset, str) else preset, **changes)

    def refuse(self, *, no_screen: bool) -> NoReturn:
        """Say that these options would not be read, since no stage 1 is made.

        Args:
            no_screen: There is to be none; else a screening is given.

        Raises:
            ParameterError: Always.
        """
        changed = [flag(f) for f in fields(self) if getattr(self, f.name) != f.default]
        named = f" ({', '.join(changed)})" if changed else ""
        which = f"options of stage 1{named} would not be read"
        if no_screen:
            raise ParameterError(
                f"Without stage 1 (no_screen, --no-screen), {which}. Leave them out, or have the images screened."
            )
        raise ParameterError(
            f"Stage 1 is the screening that is given, so {which}. Leave them out, or screen the images again with them "
            "(flawsift screen). To keep more or fewer images of this one, edit the column kept of its screening.csv."
        )

    def as_json(self) -> dict[str, Any]:
        """All values by name."""
        return asdict(self)


def flag(option: Field[Any]) -> str:
    """How the command line calls an option."""
    return str(option.metadata.get(FLAG, f"--{option.name.replace('_', '-')}"))


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


PRESETS: Mapping[str, ScreenOptions] = {
    # held-out scores only, on one scale; where the detector can, defective patches go instead of whole images
    "default": ScreenOptions(),
    # section IV-A of the paper: k = 5, t = 40 %, plain mean of all sub-models, the native one included
    "paper": ScreenOptions(
        screener=OWN, rank_by="submodels", keep=0.4, normalize="none", exclude_own=False, reject_patches=0.0
    ),
}
