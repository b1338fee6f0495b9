"""The screening report and the overlays in it: what it says, that it is one safe file, and what colours mean."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from flawsift.data.images import ImageSet
from flawsift.datasets import Dataset
from flawsift.detectors.base import make_detector
from flawsift.errors import InputError, OutputError
from flawsift.models.calibration import Calibration
from flawsift.models.model import Model, evaluate
from flawsift.models.predictions import Predictions
from flawsift.reports.evaluation import write_evaluation_report
from flawsift.reports.histogram import Histogram
from flawsift.reports.overlays import Scale, overlay, save_overlay
from flawsift.reports.screening import (
    agreement,
    map_scale,
    screening_report,
    write_fit_report,
    write_screening_report,
)
from flawsift.screening.consensus import Contamination
from flawsift.screening.lookalikes import describe, nearest
from flawsift.screening.result import Screening
from flawsift.screening.storage import save_screening
from flawsift.testing import easy_set, tiny_backbone, with_features

N, K = 40, 5
ESTIMATE = Contamination(0.2, "Gumbel tail excess", {"observed": 0.25}, (0.15, 0.26))
MARKUP = "<img src=x onerror=alert(1)>.png"

# ---- material ------------------------------------------------------------------------------------------------------


def noise(n: int, edge: int = 24, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for _ in range(n)]


def make_screening(images: ImageSet, n_removed: int = 8, **changes: Any) -> Screening:
    """Consensus in a shuffled order of the ids; the last sub-models' scores equal it, up to small noise."""
    n = len(images)
    generator = np.random.default_rng(1)
    consensus = generator.permutation(n).astype(np.float64) - n / 2
    kept = images.ids[np.sort(np.argsort(consensus)[: n - n_removed])]
    made = Screening(
        ids=images.ids,
        names=images.names,
        subset_of=(np.arange(n) % K)[None],
        score_matrix=(consensus + generator.uniform(-0.1, 0.1, (K, n))).astype(np.float32),
        held_out_scores=consensus + 100,
        consensus=consensus,
        divergence=None,
        kept=kept,
        contamination=ESTIMATE,
        options={"n_subsets": K, "keep": "auto", "normalize": "robust", "keep_share": (n - n_removed) / n},
        grids=generator.uniform(0, 1, (n, 4, 6)).astype(np.float16),
        descriptions=generator.normal(size=(n, 5)).astype(np.float16),
        provenance={"detector": {"name": "patchcore", "params": {"coreset_ratio": 0.1, "layers": ["a", "b"]}}},
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return ImageSet.from_arrays(noise(N), ids=range(100, 100 + N))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i, array in enumerate(noise(N - 2)):
        Image.fromarray(array).save(root / f"part-{i:02d}.png")
    Image.fromarray(noise(1)[0]).save(root / MARKUP, "PNG")
    Image.fromarray(noise(1)[0]).save(root / "a & b.png", "PNG")
    return root


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
            self.cards.setdefault(self._section, []).append({"images": [], "alike": [], "name": "", "text": ""})
        elif tag == "img":
            kind = "alike" if values["alt"].startswith("Typical") else "images"
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


# ---- the page ------------------------------------------------------------------------------------------------------


def test_suspects_are_in_rank_order_with_their_numbers(images: ImageSet) -> None:
    screening = make_screening(images)
    page = Page(screening_report(screening, images, n_suspects=11))
    assert page.names("suspects") == ranked(screening)[:11]
    best = int(np.argmax(screening.consensus))
    text = words(page.cards["suspects"][0]["text"])
    assert "Rank 1 set aside" in text
    assert f"Consensus {screening.consensus[best]:.4g}" in text
    assert f"Held-out score {screening.held_out_scores[best]:.4g}" in text
    assert "Sub-models agreeing 4 of 4" in text
    states = ["set aside" if "set aside" in card["text"] else "kept" for card in page.cards["suspects"]]
    assert states == ["set aside"] * 8 + ["kept"] * 3
    assert "cut: images from here on were kept" in page.cards["suspects"][7]["text"]


def test_pictures_belong_to_their_cards(images: ImageSet) -> None:
    flat = ImageSet.from_arrays([np.full((8, 16, 3), 6 * i, np.uint8) for i in range(N)])
    screening = make_screening(flat)
    for card in Page(screening_report(screening, flat, n_suspects=8)).cards["suspects"]:
        shown = np.asarray(picture(card["images"][0]["src"]).convert("L"))
        assert shown.shape == (8, 16)
        assert abs(shown.mean() - 6 * list(screening.names).index(card["name"].strip())) < 2


def test_borderline_shows_both_sides_of_the_cut(images: ImageSet) -> None:
    screening = make_screening(images)
    page = Page(screening_report(screening, images, n_suspects=2, n_borderline=6))
    assert page.names("borderline") == ranked(screening)[5:11]
    assert "6 more were set aside" in words(page.text["suspects"])


def test_headline_and_estimate(images: ImageSet) -> None:
    text = words(render(make_screening(images), images).text[""])
    assert "Of 40 images, 8 look defective and were set aside; 32 were kept." in text
    assert "Estimated share of defective images, by the Gumbel tail excess: 20 % (15 to 26 % by chance alone)." in text
    one = words(render(make_screening(images, 1), images).text[""])
    assert "1 looks defective and was set aside; 39 were kept." in one


def test_the_page_says_what_becomes_of_suspect_patches(images: ImageSet) -> None:
    consensus = np.where(np.arange(len(images)) < 5, 50.0, np.arange(len(images)) % 7)  # five stand out
    rejected = np.zeros((len(images), 4, 6), bool)
    rejected[10, :3] = True
    kept = images.ids[5:]
    screening = make_screening(images, consensus=consensus, kept=kept, rejected=rejected)
    text = words(render(screening, images).text[""])
    assert "Of the kept images, the 2.1 % of the patches that look least like the others are suspect" in text
    back, _ = screening.with_decisions({screening.names[i]: "keep" for i in range(3)})
    text = words(render(back, images).text[""])
    assert "Most of the images that were set aside are kept by decision" in text
    assert "are suspect" not in text


def test_a_share_set_by_the_user_is_not_called_an_estimate(images: ImageSet) -> None:
    text = words(render(make_screening(images, 24, contamination=None), images).text[""])
    assert "the 24 most unusual were set aside; 16 were kept" in text
    assert "(60 %) was set by the user" in text
    assert "look defective" not in text
    assert "Estimated" not in text
    less = replace(make_screening(images, 24, contamination=None), kept=images.ids[:4])  # a person removed more
    assert "(60 %) was set by the user" in words(render(less, images).text[""])


def test_markup_in_names_is_text(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    order = np.array([2.0 if name == MARKUP else 1.0 if name == "a & b.png" else 0.0 for name in files.names])
    screening = make_screening(files, consensus=order, unreadable={"<b>x</b>.png": "<i>why</i>"})
    screening = replace(screening, kept=files.ids[order == 0], provenance={"<script>": "<script>alert(1)</script>"})
    text = screening_report(screening, files, title="</title><script>alert(2)</script>")
    page = Page(text)
    assert page.names("suspects")[:2] == [MARKUP, "a & b.png"]
    assert {values["src"][:5] for values in page.tags("img")} == {"data:"}
    assert not any(key.startswith("on") for _, values in page.elements for key in values)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.elements}
    assert "<b>x</b>.png" in page.text["unreadable"]
    assert "<i>why</i>" in page.text["unreadable"]


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path, images: ImageSet) -> None:
    names = [f"caf\udce9-{i}.png" for i in range(N)]
    files = ImageSet.from_files(tmp_path, dict(enumerate(names)))
    path = write_screening_report(make_screening(files, unreadable={"\udcff.png": "bad"}), files, tmp_path)
    text = html.unescape(path.read_text("utf-8"))
    assert "caf\\udce9-" in text
    assert "\\udcff.png" in text


def test_page_needs_nothing_but_itself(images: ImageSet) -> None:
    text = screening_report(make_screening(images), images)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    loaded = [values[key] for _, values in page.elements for key in ("src", "srcset", "href", "data") if key in values]
    assert loaded
    assert all(address.startswith(("data:image/", "#")) for address in loaded)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    targets = {values["id"] for _, values in page.elements if "id" in values}
    assert {values["href"][1:] for values in page.tags("a")} <= targets


def test_pictures_and_drawings_have_a_text_alternative(images: ImageSet) -> None:
    grids = np.zeros((N, 4, 5), np.float16)
    grids[:, 3, 0] = 1  # bottom left
    page = render(make_screening(images, grids=grids), images)
    assert all(values["alt"] for values in page.tags("img"))
    heatmap = page.cards["suspects"][0]["images"][1]
    assert "10 % from the left and 88 % from the top" in heatmap["alt"]
    svg = page.tags("svg")[0]
    assert svg["role"] == "img"
    assert svg["aria-labelledby"].split() == ["histogram-title", "histogram-text"]


def test_unreadable_files_are_listed_up_to_a_limit(images: ImageSet) -> None:
    page = render(make_screening(images, unreadable={"x/1.png": "empty file (0 bytes)"}), images)
    assert "x/1.png" in page.text["unreadable"]
    assert "empty file (0 bytes)" in page.text["unreadable"]
    assert "more in" not in page.text["unreadable"]
    assert "1 file could not be read." in page.text[""]
    many = {f"bad-{i}.png": "damaged" for i in range(207)}
    shown = render(make_screening(images, unreadable=many), images).text["unreadable"]
    assert shown.count("damaged") == 200
    assert "and 7 more in" in shown
    assert "All files could be read." in render(make_screening(images), images).text["unreadable"]


def test_parameters_and_next_steps_are_there(images: ImageSet) -> None:
    page = render(make_screening(images), images)
    rows = words(page.text["details"])
    for expected in ("options.n_subsets 5", "detector.params.coreset_ratio 0.1", "detector.params.layers a, b"):
        assert expected in rows
    assert "flawsift fit IMAGES --out MODEL --screening DIR" in page.text["next"]


def test_nothing_removed(images: ImageSet) -> None:
    screening = make_screening(images, 0, contamination=Contamination(0.0, "Gumbel tail excess", {}))
    page = render(screening, images, 24)
    assert "Of 40 images, none was set aside; all were kept." in page.text[""]
    assert page.names("suspects") == ranked(screening)[:24]
    assert page.names("borderline") == []
    assert "there is no cut" in page.text["borderline"]
    assert not [values for values in page.tags("line") if values["class"] == "cut"]


def test_without_grids_only_thumbnails(images: ImageSet) -> None:
    page = render(make_screening(images, grids=None), images)
    assert {len(card["images"]) for card in page.cards["suspects"]} == {1}
    with_maps = render(make_screening(images), images)
    assert {len(card["images"]) for card in with_maps.cards["suspects"]} == {2}


def test_a_vanished_file_is_named_without_a_picture(folder: Path) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files)
    gone = ranked(screening)[1]
    (folder / gone).unlink()
    cards = render(screening, files).cards["suspects"]
    assert [len(card["images"]) for card in cards[:3]] == [2, 0, 2]
    assert "cannot be read: No such file" in cards[1]["text"]
    assert cards[1]["name"].strip() == gone


def test_another_set_is_refused(folder: Path, images: ImageSet) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files)
    (folder / files.names[0]).unlink()
    (folder / "zzz.png").write_bytes((folder / files.names[1]).read_bytes())
    with pytest.raises(InputError, match="40 ids of the screening belong to other images"):
        screening_report(screening, ImageSet.from_folder(folder))
    with pytest.raises(InputError, match="not in this set"):
        screening_report(screening, images)


def test_size_is_bounded_with_thousands_of_large_images(tmp_path: Path) -> None:
    worst = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)  # noise does not compress
    large = ImageSet.from_arrays([worst] * 5000)
    path = write_screening_report(make_screening(large, 300), large, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    page = Page(path.read_text("utf-8"))
    assert len(page.tags("img")) == 2 * (24 + 8) + 3 * 24
    assert picture(page.tags("img")[0]["src"]).size == (320, 320)
    assert path.stat().st_size < 15e6
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_and_constant_sets(n: int) -> None:
    tiny = ImageSet.from_arrays(noise(n, edge=1))
    screening = replace(
        make_screening(tiny, 0),
        consensus=np.zeros(n),
        score_matrix=np.ones((1, n), np.float32),
        subset_of=np.zeros((1, n), np.int64),
        grids=np.zeros((n, 1, 1), np.float16),
        contamination=Contamination(0.0, "none: too few or constant scores", {}),
    )
    page = render(screening, tiny)
    assert len(page.names("suspects")) == n
    assert "could not be estimated (too few or constant scores)" in page.text[""]


def test_typical_look_alikes_stand_beside_each_suspect(images: ImageSet) -> None:
    screening = make_screening(images)
    order = np.argsort(-screening.consensus)
    suspect, ordinary = int(order[0]), order[-16:]  # half of the 32 kept ones
    descriptions = np.zeros((N, 5), np.float16)
    descriptions[suspect] = descriptions[order[1]] = descriptions[order[9]] = 9  # a suspect, and a kept but unusual one
    descriptions[ordinary[5]], descriptions[ordinary[3]], descriptions[ordinary[8]] = 3, 2, 1
    page = render(replace(screening, descriptions=descriptions), images)
    shown = [values["alt"] for values in page.cards["suspects"][0]["alike"]]
    assert shown == [f"Typical image {screening.names[p]}" for p in (ordinary[5], ordinary[3], ordinary[8])]
    assert not any(card["alike"] for card in page.cards["borderline"])
    without = render(replace(screening, descriptions=None), images)
    assert not any(card["alike"] for card in without.cards["suspects"])


class Given:
    """Features that are given: {layer: (N, C, h, w)}."""

    size, key = 64, "given"

    def __init__(self, features: dict[str, torch.Tensor]) -> None:
        self.features = features

    def read(self, images: ImageSet, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        return {layer: self.features[layer][torch.from_numpy(images.ids)] for layer in layers}


def test_descriptions_are_standardised_means_and_bounded() -> None:
    features = {
        "a": 5 * torch.randn(90, 600, 3, 3, generator=torch.Generator().manual_seed(0)),
        "b": torch.ones(90, 3, 2, 2),
    }
    images = replace(ImageSet.from_arrays(noise(90, edge=2)), reader=Given(features))
    found = describe(images, ["a", "b"])
    assert found is not None
    assert found.shape == (90, 302)  # every second of 603 channels
    means = features["a"].mean((2, 3))
    expected = (means - means.mean(0)) / means.std(0, correction=0)
    np.testing.assert_allclose(found[:, :300], expected[:, ::2], atol=5e-3)
    assert (found[:, 300:] == 0).all()  # constant channels say nothing
    assert describe(images, []) is None
    like = nearest(found, 4, np.arange(90) > 2, 5)
    distances = ((found.astype(np.float32) - found[4].astype(np.float32)) ** 2).sum(1)
    assert like == [p for p in np.argsort(distances, kind="stable").tolist() if p > 2 and p != 4][:5]


def test_the_report_of_a_fit_names_its_threshold_and_decisions(folder: Path, tmp_path: Path) -> None:
    files = ImageSet.from_folder(folder)
    screening = make_screening(files, provenance={"images_root": str(folder)})
    save_screening(screening, tmp_path / "s")
    names = dict(zip(screening.ids.tolist(), screening.names, strict=True))
    back = names[int(screening.removed[0])]
    training = {"n_kept": 33, "decisions": {"keep": 1, "remove": 0, "unsure": 0, "elsewhere": 0}, "seed": 7}
    model = Model(make_detector("padim"), tiny_backbone(), Calibration.of([100.0, 101.0, 123.5]), training)
    path = write_fit_report(model, tmp_path / "s", tmp_path / "m", choices={back: "keep"})
    page = Page(path.read_text("utf-8"))
    text = words(page.text["model"])
    assert " was trained on 33 of 40 images; a person decided to keep 1 and to remove 0" in text
    assert "above 123.5" in text
    assert "threshold 123.5" in text
    # the detector is not the screener: its histogram is of its own scores, and nothing was set aside by them
    assert "trained on (3)" in text
    assert "set aside (" not in text
    assert "training.seed 7" in words(page.text["details"])
    assert "kept" in page.cards["suspects"][0]["text"]
    assert page.names("suspects")[0] == back
    assert [values["href"] for values in page.tags("a")].count("#model") == 1
    assert "model" not in Page(screening_report(screening, files)).text


# ---- evaluation ----------------------------------------------------------------------------------------------------


def evaluated(folder: Path, threshold: bool = True) -> tuple[Page, Predictions, Dataset]:
    data = easy_set()
    detector = make_detector("padim").fit(with_features(data.images.select(range(30)), make_detector("padim")))
    scores = detector.predict(with_features(data.images.select(range(30)), detector)).scores
    model = Model(detector, tiny_backbone(), Calibration.of(scores if threshold else []), {"seed": 0})
    test = data.images.select(range(30, 50))
    metrics, found = evaluate(model, test, data.truth)
    path = write_evaluation_report(model, metrics, found, test, data.truth, folder)
    return Page(path.read_text("utf-8")), found, data


def test_the_report_of_an_evaluation_shows_the_worst_errors(tmp_path: Path) -> None:
    page, found, _ = evaluated(tmp_path)
    assert found.threshold is not None
    cut = found.threshold.value
    scores = dict(zip(found.names, found.scores.tolist(), strict=True))
    good, bad = list(scores)[:10], list(scores)[10:]
    alarms = sorted((n for n in good if scores[n] > cut), key=lambda n: -scores[n])
    missed = sorted((n for n in bad if scores[n] <= cut), key=lambda n: scores[n])
    assert page.names("false-alarms") == (alarms or sorted(good, key=lambda n: -scores[n]))
    assert page.names("missed") == (missed or sorted(bad, key=lambda n: scores[n]))
    assert "20 test images, 10 of them defective" in page.text[""]
    assert "Image AUROC" in page.text["metrics"]
    assert {len(card["images"]) for card in page.cards["missed"]} == {2}
    assert all(values["alt"] for values in page.tags("img"))
    assert not {"script", "link"} & {tag for tag, _ in page.elements}
    assert "All files could be read" in page.text["unreadable"]


def test_an_evaluation_without_a_threshold(tmp_path: Path) -> None:
    page, found, _ = evaluated(tmp_path, threshold=False)
    assert found.threshold is None
    assert len(page.names("false-alarms")) == len(page.names("missed")) == 10
    assert "The model has no threshold" in page.text["missed"]


# ---- numbers behind the page ---------------------------------------------------------------------------------------


def test_agreement_leaves_the_own_sub_model_out() -> None:
    images = ImageSet.from_arrays(noise(20, edge=2))
    scores = np.tile(np.arange(20, dtype=np.float32), (K, 1))
    scores[0, 0] = 1000  # sub-model 0 trained on image 0: its vote must not count
    scores[1, 5] = 1000  # image 5 is in subset 0 as well: sub-model 1's vote counts
    screening = make_screening(images, 2, score_matrix=scores)
    votes, voters, share = agreement(screening)
    assert (voters, share) == (4, 0.1)
    # of the 16 images that a sub-model did not see, 10 % are the highest 2
    assert votes[[0, 5, 19, 18]].tolist() == [0, 1, 4, 3]
    assert votes[:5].sum() == 0


def test_agreement_widens_with_the_share_removed_and_ignores_ties(images: ImageSet) -> None:
    screening = make_screening(images, 20)
    assert agreement(screening)[2] == 0.5
    flat = replace(screening, score_matrix=np.ones((K, N), np.float32))
    assert agreement(flat)[0].tolist() == [0] * N


def test_histogram_counts_everybody_and_cuts_between_the_sides() -> None:
    scores = np.concatenate([np.random.default_rng(0).normal(size=200), np.linspace(6, 8, 20), [1e6]])
    kept = np.arange(len(scores)) < 200
    found = Histogram.of(scores, kept)
    assert sum(row[2] for row in found.table) == 200
    assert sum(row[3] for row in found.table) == 21
    assert found.n_beyond == 1
    assert found.cut is not None
    assert all(x + width <= found.cut + 1e-6 for x, _, width, _, is_kept, _ in found.bars if is_kept)
    assert all(x >= found.cut - 1e-6 for x, _, _, _, is_kept, _ in found.bars if not is_kept)
    tallest = max(found.bars, key=lambda bar: bar[3])
    assert tallest[3] <= Histogram.HEIGHT + 1e-6
    assert int(tallest[5].split()[0]) == max(max(kept, removed) for _, _, kept, removed in found.table)


def test_histogram_with_a_given_line_has_it_on_the_axis() -> None:
    scores, first = np.arange(40.0), np.arange(40) % 2 == 0
    for cut in (-7.0, 12.5, 55.0):
        found = Histogram.of(scores, first, cut=cut, sides=("good", "defective"))
        assert found.cut is not None
        assert -1e-6 <= found.cut <= Histogram.WIDTH + 1e-6
        assert found.totals == (20, 20)
        assert {bar[5].split()[1].rstrip(",") for bar in found.bars} == {"good", "defective"}
        assert sum(row[2] + row[3] for row in found.table) == 40


def test_histogram_of_an_edited_selection_has_no_cut() -> None:
    found = Histogram.of(np.arange(40.0), np.arange(40) % 2 == 0)
    assert found.cut is None
    assert (sum(row[2] for row in found.table), sum(row[3] for row in found.table)) == (20, 20)


@pytest.mark.parametrize("scores", [[], [3.0], [0.0] * 9, [np.nan, 1.0, 2.0], [1.0, np.inf]])
def test_histogram_of_odd_scores(scores: list[float]) -> None:
    found = Histogram.of(np.array(scores), np.ones(len(scores), bool))
    assert sum(row[2] for row in found.table) == np.isfinite(scores).sum()
    assert np.isfinite([value for bar in found.bars for value in bar[:4]]).all()


def test_colours_of_the_report_come_from_kept_images_alone(images: ImageSet) -> None:
    screening = make_screening(images)
    assert screening.patch_maps is not None
    grids = screening.patch_maps.copy()
    grids[~screening.is_kept] *= 1000
    assert map_scale(replace(screening, grids=grids)) == map_scale(screening)
    grids[screening.is_kept] *= 2
    assert map_scale(replace(screening, grids=grids)) != map_scale(screening)


# ---- overlays ------------------------------------------------------------------------------------------------------

SCALE = Scale(1.0, 2.0)


def grey(size: tuple[int, int], value: int = 128) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def opacity(map_: npt.NDArray[np.floating[Any]], size: tuple[int, int] = (64, 64)) -> npt.NDArray[np.float64]:
    """What an overlay takes away from the difference between black and white, in [0, 1]."""
    black, white = (np.asarray(overlay(grey(size, v), map_, SCALE), np.float64) for v in (0, 255))
    result: npt.NDArray[np.float64] = 1 - (white - black).mean(2) / 255
    return result


@pytest.mark.parametrize("size", [(64, 64), (90, 30), (31, 77), (1, 1)])
def test_overlay_has_the_size_of_the_picture(size: tuple[int, int]) -> None:
    for shape in ((8, 8), (5, 9), (128, 128), (1, 1)):
        assert overlay(grey(size), np.full(shape, 1.5), SCALE).size == size


def test_large_pictures_are_shrunk_in_their_aspect_ratio() -> None:
    assert overlay(grey((1200, 600)), np.zeros((4, 4)), SCALE).size == (512, 256)
    assert overlay(grey((1200, 600)), np.zeros((4, 4)), SCALE, max_edge=None).size == (1200, 600)


def test_overlay_leaves_good_places_and_marks_bad_ones() -> None:
    image = Image.fromarray(noise(1, edge=64)[0])
    before = np.asarray(image).copy()
    map_ = np.zeros((64, 64), np.float32)
    map_[20:40, 10:50] = 2.5
    map_[50:60, 50:60] = 1.4  # above typical, below the threshold
    after = np.asarray(overlay(image, map_, SCALE))
    changed = (after != before).any(2)
    assert not changed[map_ == 0].any()
    assert changed[map_ > 2].mean() > 0.99
    assert changed[map_ == np.float32(1.4)].mean() > 0.95
    assert (np.asarray(image) == before).all()
    # the line, dark then white, runs along the edge of the area above the threshold and nowhere else
    assert (after[20, 10:50] == 20).all()
    assert (after[21, 11:49] == 255).all()
    inside = (after == 255).all(2)
    assert not inside[50:60, 50:60].any()


def test_the_place_is_right_on_pictures_that_are_not_square() -> None:
    map_ = np.zeros((8, 8), np.float32)
    map_[1, 6] = 9
    difference = np.abs(np.asarray(overlay(grey((160, 40)), map_, SCALE), int) - 128).sum(2)
    row, column = (float(np.average(np.indices(difference.shape)[axis], weights=difference)) for axis in (0, 1))
    assert abs(column - 6.5 / 8 * 160) < 3
    assert abs(row - 1.5 / 8 * 40) < 2


def test_opacity_rises_with_the_value() -> None:
    levels = [opacity(np.full((4, 4), value)).mean() for value in (0.5, 1.0, 1.2, 1.5, 1.9, 2.0)]
    assert levels[0] == 0
    assert levels[1] == 0
    assert (np.diff(levels[1:]) > 0.01).all()
    above = [opacity(np.full((4, 4), value))[32, 32] for value in (2.0, 2.5, 3.0, 30.0)]
    assert above[0] < above[1] < above[2] == above[3] < 0.9  # saturated, and the picture still shines through


def test_colours_are_anchored_to_the_scale_not_to_the_image() -> None:
    map_ = np.linspace(0, 3, 64).reshape(8, 8)
    low = overlay(grey((64, 64)), map_, SCALE)
    with_peak = map_.copy()
    with_peak[7, 7] = 1000
    same = np.asarray(low)[:40] == np.asarray(overlay(grey((64, 64)), with_peak, SCALE))[:40]
    assert same.all()
    dark, bright = (np.asarray(overlay(grey((64, 64), v), map_, SCALE), int) for v in (60, 180))
    alpha = opacity(map_)[..., None]
    # the same map on two pictures adds the same colour; what differs is the picture below
    assert np.abs((bright - dark) - 120 * (1 - alpha)).max() <= 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 7.0])
def test_constant_and_non_finite_maps(value: float) -> None:
    result = np.asarray(overlay(grey((32, 32)), np.full((4, 4), value, np.float32), SCALE))
    assert (result == 128).all() == (not value > SCALE.low)
    one_bad = np.zeros((4, 4), np.float32)
    one_bad[0, 0] = value
    assert (np.asarray(overlay(grey((32, 32)), one_bad, SCALE))[16:, 16:] == 128).all()


def test_one_odd_cell_does_not_spoil_its_neighbours() -> None:
    # cell centres are at 16 and 48: between them the hot cell fades out, beyond them it stays
    assert opacity(np.array([[np.nan, 3.0]]))[32, 40] > 0.3
    assert opacity(np.array([[1.0, np.inf]]))[32, 60] == opacity(np.array([[1.0, 3.0]]))[32, 60] > 0.7


def test_tensors_and_half_precision_are_maps_too() -> None:
    map_ = np.linspace(0, 3, 16).reshape(4, 4)
    expected = overlay(grey((32, 32)), map_.astype(np.float32), SCALE).tobytes()
    assert overlay(grey((32, 32)), torch.from_numpy(map_), SCALE).tobytes() == expected
    read_only = map_.astype(np.float32)
    read_only.flags.writeable = False
    assert overlay(grey((32, 32)), read_only, SCALE).tobytes() == expected
    assert overlay(grey((32, 32)), torch.from_numpy(map_).bfloat16(), SCALE).size == (32, 32)
    assert overlay(grey((32, 32)).convert("L"), map_.astype(np.float16), SCALE).mode == "RGB"


def test_scale_of_a_sample() -> None:
    scores = np.append(np.arange(101.0), [np.nan, np.inf])
    assert Scale.of(scores, None) == Scale(50.0, 99.0)
    assert Scale.of(scores, 80.0) == Scale(50.0, 80.0)
    levels = Scale(50.0, 80.0).levels(np.array([-9.0, 50.0, 80.0, 110.0, 999.0, np.nan, np.inf, -np.inf]))
    assert levels.tolist() == [0, 0, 0.5, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("threshold", [None, 3.0, -3.0, 0.0, np.nan])
@pytest.mark.parametrize("scores", [[], [3.0], [3.0] * 5, [np.nan], [-1.0, 9.0, 9.0], [0.0, 0.0]])
def test_scale_is_never_empty(scores: list[float], threshold: float | None) -> None:
    scale = Scale.of(scores, threshold)
    assert scale.low < scale.threshold
    if threshold is not None and np.isfinite(threshold):
        assert scale.threshold == threshold
    assert np.isfinite([scale.low, scale.threshold]).all()


@pytest.mark.parametrize("scale", [Scale(2.0, 2.0), Scale(3.0, 2.0), Scale(np.nan, 2.0)])
def test_a_scale_without_width_still_draws(scale: Scale) -> None:
    assert overlay(grey((16, 16)), np.linspace(0, 9, 16).reshape(4, 4), scale).size == (16, 16)


def test_save_overlay_makes_folders_and_leaves_no_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "part.jpg.png"
    save_overlay(path, grey((20, 10)), np.ones((2, 2)), SCALE)
    with Image.open(path) as saved:
        assert (saved.format, saved.size) == ("PNG", (20, 10))
    assert [file.name for file in path.parent.iterdir()] == ["part.jpg.png"]
    with pytest.raises(OutputError):
        save_overlay(path / "below-a-file" / "x.png", grey((2, 2)), np.ones((2, 2)), SCALE)


def test_details_show_nested_values_as_text(images: ImageSet) -> None:
    provenance: Mapping[str, Any] = {"versions": {"torch": "9.9"}, "seconds": 1.5, "nothing": None}
    rows = words(render(make_screening(images, provenance=provenance), images).text["details"])
    for expected in ("versions.torch 9.9", "seconds 1.5", "nothing none"):
        assert expected in rows
