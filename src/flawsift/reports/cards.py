"""Cards of a screening: one image each, with its scores, its picture, its heatmap and typical images beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from flawsift.data.decoding import UnreadableImage
from flawsift.data.images import ImageSet
from flawsift.paths import show
from flawsift.reports.evidence import agreement, is_typical, map_scale, smoothed
from flawsift.reports.overlays import overlay, peak_position, shrink
from flawsift.reports.pages import THUMB, data_uri, number
from flawsift.screening.lookalikes import most_alike
from flawsift.screening.result import Screening

SMALL = 160  # pixels, of pictures for comparison: a third of a card
N_ALIKE = 3  # typical images beside each suspect


@dataclass(frozen=True)
class ScreeningCard:
    """One image as the page of a screening shows it.

    Attributes:
        rank: 1 is the most anomalous.
        name: Relative path, printable.
        kept: Whether it goes on to stage 2.
        consensus, held_out: Scores as text.
        votes: Sub-models that suspect the image on their own.
        picture, heatmap: Data URIs; "" where there is none.
        peak_position: Where its map is highest, in words.
        problem: Why there is no picture.
        alike: (name, data URI) of the typical images that look most like it.
    """

    rank: int
    name: str
    kept: bool
    consensus: str
    held_out: str
    votes: int
    picture: str = ""
    heatmap: str = ""
    peak_position: str = ""
    problem: str = ""
    alike: Sequence[tuple[str, str]] = ()


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
        picture = heatmap = problem = ""
        try:
            image = self.images.image(id_)
            picture = data_uri(shrink(image, THUMB))
            heatmap = self._heatmap(image, p)
        except UnreadableImage as error:
            problem = show(str(error))
        return ScreeningCard(
            rank=self.rank[id_],
            name=show(s.names[p]),
            kept=bool(self.kept[p]),
            consensus=number(s.consensus[p]),
            held_out=number(s.held_out_scores[p]),
            votes=int(self.votes[p]),
            picture=picture,
            heatmap=heatmap,
            peak_position=peak_position(s.patch_maps[p]) if s.patch_maps is not None else "",
            problem=problem,
        )

    def _heatmap(self, image: Image.Image, p: int) -> str:
        if self.screening.patch_maps is None or self.scale is None:
            return ""
        # full chroma resolution: the contour is one pixel wide
        return data_uri(
            overlay(image, smoothed(self.screening.patch_maps[p]), self.scale, max_edge=THUMB), subsampling=0
        )
