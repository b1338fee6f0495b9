"""Cards of a screening: one image each, with its scores, its picture, its heatmap and typical images beside it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.paths import show
from flawsift.reports.evidence import agreement, is_typical, map_scale, smoothed
from flawsift.reports.heatmaps import Shown
from flawsift.reports.overlays import peak_position, shrink
from flawsift.reports.pages import data_uri, number
from flawsift.reports.places import crop
from flawsift.reports.regions import normal_level, outlines_of
from flawsift.reports.wording import nearest_text
from flawsift.screening.lookalikes import most_alike
from flawsift.screening.result import Screening

SMALL = 160  # pixels, of pictures for comparison: a third of a card
N_ALIKE = 3  # typical images beside each suspect
N_NEAREST = 3  # places in other images beside an image's own: one row of a card


@dataclass(frozen=True)
class ScreeningCard:
    """One image as the page of a screening shows it.

    Attributes:
        rank: 1 is the most anomalous.
        name: Relative path, printable.
        kept: Whether it goes on to stage 2.
        consensus, held_out: Scores as text.
        votes: Sub-models that suspect the image on their own.
        shown: In pictures; None where it cannot be read.
        problem: Why it cannot.
        alike: (name, data URI) of the typical images that look most like it.
        nearest_text: What is said above its worst place and those nearest to it.
        place: Data URI of its worst place; "" where it is not known or cannot be shown.
        nearest: (name, distance, data URI) of the nearest places in other images; empty without `place`.
    """

    rank: int
    name: str
    kept: bool
    consensus: str
    held_out: str
    votes: int
    shown: Shown | None = None
    problem: str = ""
    alike: Sequence[tuple[str, str]] = ()
    nearest_text: str = ""
    place: str = ""
    nearest: Sequence[tuple[str, str, str]] = ()


class ScreeningCards:
    """Makes cards by global id; each image is read once.

    Args:
        screening: What is shown.
        images: Its images, under the same ids.
    """

    def __init__(self, screening: Screening, images: ImageSet) -> None:
        self.screening, self.images = screening, images
        self.position = {i: p for p, i in enumerate(screening.ids.tolist())}
        self.rank = {i: r for r, i in enumerate(screening.ranking.tolist(), 1)}
        self.kept = screening.is_kept
        self.votes, self.voters, self.top_share = agreement(screening)
        self.scale = map_scale(screening)
        self._made: dict[int, ScreeningCard] = {}
        self._small: dict[int, str] = {}
        self._places: dict[tuple[int, int], str] = {}

    def of(self, id_: int) -> ScreeningCard:
        """The card of an image."""
        if id_ not in self._made:
            self._made[id_] = self._make(id_)
        return self._made[id_]

    def compared(self, id_: int) -> ScreeningCard:
        """With the typical images that look most like it, as far as they can be read."""
        s = self.screening
        if s.descriptions is None:
            return self.of(id_)
        near = most_alike(s.descriptions, self.position[id_], is_typical(s), N_ALIKE)
        pictures = [(show(s.names[p]), self._small_picture(int(s.ids[p]))) for p in near]
        return replace(self.of(id_), alike=[(name, picture) for name, picture in pictures if picture])

    def _small_picture(self, id_: int) -> str:
        if id_ not in self._small:
            try:
                self._small[id_] = data_uri(shrink(self.images.image(id_), SMALL))
            except UnreadableImage:
                self._small[id_] = ""
        return self._small[id_]

    def _make(self, id_: int) -> ScreeningCard:
        p = self.position[id_]
        s = self.screening
        shown, problem, place = None, "", ""
        try:
            image = self.images.image(id_)
            shown = self._shown(image, p)
            place = "" if s.evidence is None else data_uri(crop(image, s.evidence.grid, int(s.evidence.places[p])))
        except UnreadableImage as error:
            problem = show(str(error))
        nearest = self._nearest(p) if place else []
        return ScreeningCard(
            rank=self.rank[id_],
            name=show(s.names[p]),
            kept=bool(self.kept[p]),
            consensus=number(s.consensus[p]),
            held_out=number(s.held_out_scores[p]),
            votes=int(self.votes[p]),
            shown=shown,
            problem=problem,
            nearest_text=nearest_text(s, p),
            place=place if nearest else "",
            nearest=nearest,
        )

    def _nearest(self, p: int) -> list[tuple[str, str, str]]:
        """(name, distance, picture) of the nearest places in other images, as far as these can be read."""
        evidence = self.screening.evidence
        if evidence is None:
            return []
        shown = []
        for id_, place, distance in evidence.nearest(p)[:N_NEAREST]:
            if picture := self._place(id_, place, evidence.grid):
                shown.append((show(self.screening.names[self.position[id_]]), number(distance), picture))
        return shown

    def _place(self, id_: int, place: int, grid: tuple[int, int]) -> str:
        if (id_, place) not in self._places:
            try:
                self._places[id_, place] = data_uri(crop(self.images.image(id_), grid, place))
            except UnreadableImage:
                self._places[id_, place] = ""
        return self._places[id_, place]

    def _shown(self, image: Image.Image, p: int) -> Shown:
        if self.screening.patch_maps is None:
            return Shown.of(image, None, None)
        patch_map = self.screening.patch_maps[p]
        outlines = outlines_of(patch_map, self.scale, self._level, image.size, kept=bool(self.kept[p]))
        shown = Shown.of(image, smoothed(patch_map).numpy(), self.scale, outlines)
        return replace(shown, peak_position=peak_position(patch_map))

    @functools.cached_property
    def _level(self) -> float:
        return normal_level(self.screening)
