"""What the tests of the reports share: screenings made by hand, a page as a browser would read it, vectors."""

import base64
import io
import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from flawsift.data.images import ImageSet
from flawsift.detectors.protocols import Evidence
from flawsift.reports.screening import screening_report
from flawsift.screening.consensus import Contamination
from flawsift.screening.options import ScreenOptions
from flawsift.screening.result import Screening, SubModelScores

N, K = 40, 5
ESTIMATE = Contamination(0.2, "mixture of two laws", {"probability_of_none": 0.01}, (0.15, 0.26))
MARKUP = "<img src=x onerror=alert(1)>.png"


def noise(n: int, edge: int = 24, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for _ in range(n)]


def make_screening(images: ImageSet, n_removed: int = 8, **changes: Any) -> Screening:
    """Consensus in a shuffled order of the ids; the last sub-models' scores equal it, up to small noise.

    Who is removed is probably defective, unless `changes` say otherwise.
    """
    n = len(images)
    generator = np.random.default_rng(1)
    consensus = generator.permutation(n).astype(np.float64) - n / 2
    kept = images.ids[np.sort(np.argsort(consensus)[: n - n_removed])]
    made = Screening(
        ids=images.ids,
        names=images.names,
        consensus=consensus,
        held_out_scores=consensus + 100,
        probability=np.where(np.isin(images.ids, kept), 0.1, 0.9),
        kept=kept,
        keep_share=(n - n_removed) / n,
        options=ScreenOptions(),
        contamination=ESTIMATE,
        submodels=SubModelScores(
            subset_of=(np.arange(n) % K)[None],
            score_matrix=(consensus + generator.uniform(-0.1, 0.1, (K, n))).astype(np.float32),
        ),
        patch_maps=generator.uniform(0, 1, (n, 4, 6)).astype(np.float16),
        descriptions=generator.normal(size=(n, 5)).astype(np.float16),
        provenance={"detector": {"name": "patchcore", "params": {"coreset_ratio": 0.1, "layers": ["a", "b"]}}},
    )
    return replace(made, **changes)


def make_evidence(ids: npt.ArrayLike, k: int = 3, grid: tuple[int, int] = (4, 6), seed: int = 0) -> Evidence:
    """Any places; the nearest images of each are those listed after it. The first image has one fewer than k."""
    named, generator = np.asarray(ids, np.int64), np.random.default_rng(seed)
    n, n_places = len(named), grid[0] * grid[1]
    images = np.stack([np.roll(named, -j) for j in range(1, k + 1)], axis=1)
    image_places = generator.integers(0, n_places, (n, k))
    distances = np.sort(generator.uniform(1, 9, (n, k)).astype(np.float32), axis=1)
    images[0, -1], image_places[0, -1], distances[0, -1] = -1, -1, np.nan
    places = generator.integers(0, n_places, n)
    return Evidence(grid, places, images, image_places, distances, np.full(n, n - 1, np.int64))


class Page(HTMLParser):
    """What a browser would make of the page: elements, and the cards of each section."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cards: dict[str, list[dict[str, Any]]] = {}
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self._section = ""
        self._in_name = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.elements.append((tag, values))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = values["id"]
        elif values.get("class") == "card":
            self.cards.setdefault(self._section, []).append(
                {"images": [], "close": [], "alike": [], "name": "", "text": ""}
            )
        elif tag == "img":
            alt = values["alt"]
            kind = "alike" if alt.startswith("Typical") else "close" if alt.endswith("pixel by pixel") else "images"
            self.cards[self._section][-1][kind].append(values)
        elif tag == "h3":
            self._in_name = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "h3":
            self._in_name = False
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        self.text[self._section] = f"{self.text.get(self._section, '')} {' '.join(data.split())}"
        if "li" in self.open and self._section in self.cards:
            card = self.cards[self._section][-1]
            card["text"] += f" {' '.join(data.split())}"
            if self._in_name:
                card["name"] += data

    def names(self, section: str) -> list[str]:
        return [card["name"].strip() for card in self.cards.get(section, [])]

    def tags(self, tag: str) -> list[dict[str, str]]:
        return [values for name, values in self.elements if name == tag]


def render(screening: Screening, images: ImageSet, n_suspects: int = 3, n_borderline: int = 2) -> Page:
    """A page with few pictures, for speed."""
    return Page(screening_report(screening, images, n_suspects=n_suspects, n_borderline=n_borderline))


def words(text: str) -> str:
    return " ".join(text.split())


def ranked(screening: Screening) -> list[str]:
    return [screening.names[p] for p in np.argsort(-screening.consensus)]


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def synthetic_setting(
    channels: int, n_normal: int = 1000, n_anomalous: int = 100, *, shift: float = 1.5, variance: float = 2.0, seed: int
) -> tuple[Tensor, Tensor]:
    """The synthetic setting of the FUN-AD paper: normal ~ N(0, I), anomalous ~ N(shift, variance I).

    Returns:
        (N, C) vectors and (N,) labels, True for anomalous.
    """
    draws = np.random.default_rng(seed).standard_normal((n_normal + n_anomalous, channels))
    draws[n_normal:] = shift + math.sqrt(variance) * draws[n_normal:]
    return torch.from_numpy(draws.astype(np.float32)), torch.arange(len(draws)) >= n_normal
