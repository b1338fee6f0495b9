"""What the page of `flawsift review` shows, and what it does when a reviewer decides.

Pictures are encoded anew and requested by the ids of the screening, so no path ever comes from the network. Decisions
are on disk before they are confirmed. `flawsift.review.server` serves all this.
"""

import functools
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flawsift.data.images import ImageSet
from flawsift.errors import InputError, ParameterError
from flawsift.files import ensure_folder
from flawsift.models.calibration import Calibration
from flawsift.models.plan import Judged
from flawsift.paths import show
from flawsift.reports.evidence import agreement, is_typical
from flawsift.reports.overlays import peak_position
from flawsift.reports.pages import css_ramp, flat, number, template, unreadable_files
from flawsift.reports.screening import consensus_histogram
from flawsift.reports.wording import explanation, headline, nearest_text
from flawsift.review import region
from flawsift.review.pictures import Pictures
from flawsift.review.process import Refit
from flawsift.screening import decisions
from flawsift.screening.consensus import EFFECT
from flawsift.screening.decisions import Change, Decision, DecisionStore
from flawsift.screening.lookalikes import most_alike
from flawsift.screening.mixture import UNKNOWN
from flawsift.screening.result import Screening
from flawsift.screening.seen import region_of
from flawsift.screening.storage import images_of, load_screening, screening_folder

N_ALIKE = 6
REPORT = "report.html"


@dataclass(eq=False)
class Review:
    """One screening, its images, and what a reviewer decides about them.

    Attributes:
        folder: The screening's.
        out: Where a refit writes its model.
        screening: Read from disk, without the decisions.
        images: Under the same ids.
        store: Decisions on disk.
        refit: Stage 2 in the background.
    """

    folder: Path
    out: Path
    screening: Screening
    images: ImageSet
    store: DecisionStore
    refit: Refit
    _verdict: dict[str, Any] = field(default_factory=dict)
    _verdict_lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: str | Path, *, images: str | Path | None = None, cache: str | Path | None = None) -> "Review":
        """From a screening folder, or a model folder that has one.

        Raises:
            InputError: There is no screening, it or its decisions are damaged, or its images are not there.
            OutputError: The folder cannot be written.
        """
        folder = screening_folder(folder)
        ensure_folder(folder)
        of_model = folder.name == "screening" and (folder.parent / "model.json").exists()
        out = folder.parent if of_model else folder / "model"
        screening = load_screening(folder)
        pictures = images_of(screening, images)
        store = DecisionStore(folder / decisions.NAME, [show(name) for name in screening.names])
        # -P: modules are not looked for in the working folder, where a csv.py may lie
        command = [os.path.abspath(sys.executable), "-P", "-m", "flawsift.review.refit"]
        command += ["--screening", str(folder), "--out", str(out)]
        command += ["--decisions", str(store.path), "--region", str(folder / region.NAME)]
        command += ["--images", str(images)] if images is not None else []
        command += ["--cache", str(cache)] if cache is not None else []
        return cls(folder, out, screening, pictures, store, Refit(command))

    @functools.cached_property
    def drawing(self) -> region.Drawing:
        """The region of interest."""
        return region.Drawing(self.folder / region.NAME, self.images, region_of(self.screening))

    @functools.cached_property
    def pictures(self) -> Pictures:
        """What is asked for by id."""
        return Pictures(self.screening, self.images)

    @functools.cached_property
    def position(self) -> dict[int, int]:
        """{global id: position in the screening}."""
        return {i: p for p, i in enumerate(self.screening.ids.tolist())}

    @functools.cached_property
    def id_of(self) -> dict[str, int]:
        """{name as shown: global id}."""
        return {show(n): i for i, n in zip(self.screening.ids.tolist(), self.screening.names, strict=True)}

    def _choices(self) -> tuple[int, dict[str, str]]:
        """The revision of the decisions, and those that are in force."""
        revision, rows = self.store.since(-1)
        return revision, {n: d.choice for n, d in rows.items() if d.choice and n in self.id_of}

    def reviewed_screening(self) -> Screening:
        """The screening with the decisions in force."""
        return self._reviewed(self._choices()[1])

    def _reviewed(self, choices: Mapping[str, str]) -> Screening:
        try:
            return self.screening.with_decisions(choices)[0]
        except InputError:  # everything was removed: nothing to train on, but something to look at
            return replace(self.screening, kept=self.screening.ids[:0], rejected=None)

    def changes_since(self, since: int) -> dict[str, Any]:
        """The revision now, the decisions that changed after an older one, by id, and the state of the refit."""
        revision, rows = self.store.since(since)
        return {"revision": revision, "decisions": self._by_id(rows), "refit": self.refit.status}

    def verdict(self) -> dict[str, Any]:
        """What follows from the decisions so far, by the scores of the screening, and which answers would say most.

        Returns:
            The revision that it is of; facts, pairs of a name and a text; a warning or None; `kept`, 0 or 1 for each
            image; and `ask`, the ids that say most first: in turn the highest-ranked undecided image and the one whose
            probability of a defect is nearest to one half.
        """
        revision, choices = self._choices()
        with self._verdict_lock:
            if self._verdict.get("revision") != revision:
                self._verdict = {"revision": revision, **self._judge(choices)}
            return self._verdict

    def _judge(self, choices: Mapping[str, str]) -> dict[str, Any]:
        decided, known = self._reviewed(choices), self.screening.known(choices)
        estimate, facts = decided.contamination, []
        judged = Judged.of(decided)
        effect = 1.0 if estimate is None else estimate.evidence.get(EFFECT, 1.0)
        made = Calibration.of_unlabelled(judged.scores, judged.ordinary, effect, decided.is_kept, known)
        if estimate is not None and estimate.interval is not None:
            facts.append(("Defective", estimate.text))
        if (threshold := made.threshold()) is not None:
            facts.append(("Threshold", f"{number(threshold.value)}: {threshold.promise}"))
        undecided = [p for p in np.argsort(-decided.consensus, kind="stable").tolist() if known[p] == UNKNOWN]
        # an image of the lower half is hardly defective, however much it stands out among those of its kind
        upper, lower = undecided[: len(decided.ids) // 2], undecided[len(decided.ids) // 2 :]
        doubtful = sorted(upper, key=lambda p: abs(float(decided.probability[p]) - 0.5))
        in_turn = dict.fromkeys([*(p for pair in zip(upper, doubtful, strict=True) for p in pair), *lower])
        return {
            "facts": facts,
            "warning": made.warning,
            "kept": decided.is_kept.astype(int).tolist(),
            "ask": [int(decided.ids[p]) for p in in_turn],
        }

    def decide(self, changes: list[Any]) -> dict[str, Any]:
        """Write decisions; see `DecisionStore.write`.

        Raises:
            ParameterError: A change is not of the form {"id", "decision", "version"}, perhaps with "type", or of an
                unknown image.
            OutputError: They cannot be written.
        """
        wanted = []
        for change in changes:
            try:
                id_, choice, seen = change["id"], change["decision"], change["version"]
                kind = change.get("type")
                name = show(self.screening.names[self.position[id_]])
            except (KeyError, TypeError, AttributeError) as error:
                raise ParameterError("A change needs the id of an image, a decision and a version.") from error
            # True and 5.0 equal whole numbers and would pass for ids, but are none
            if type(id_) is not int or not isinstance(choice, str) or type(seen) is not int:
                raise ParameterError("A decision is a text, an id and a version are whole numbers.")
            if not isinstance(kind, str | None):
                raise ParameterError("A defect type is a text.")
            wanted.append(Change(name, choice, seen, kind))
        written, refused = self.store.write(wanted)
        return {"written": self._by_id(written), "refused": self._by_id(refused), "revision": self.store.revision}

    def _by_id(self, rows: Mapping[str, Decision]) -> dict[int, list[Any]]:
        """[choice, version] of each, and the defect type where it has one."""
        told = {n: [d.choice, d.version, *([d.defect_type] if d.defect_type else [])] for n, d in rows.items()}
        return {self.id_of[n]: row for n, row in told.items() if n in self.id_of}

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        s = self.screening
        votes, voters, _ = agreement(s)
        rank = np.empty(len(s.ids), np.int64)
        rank[np.argsort(-s.consensus, kind="stable")] = np.arange(1, len(s.ids) + 1)
        return {
            "ids": s.ids.tolist(),
            "names": [show(name) for name in s.names],
            "rank": rank.tolist(),
            "consensus": [number(v) for v in s.consensus.tolist()],
            "held_out": [number(v) for v in s.held_out_scores.tolist()],
            "votes": votes.tolist(),
            "kept": s.is_kept.astype(int).tolist(),
            "probability": [round(v, 3) for v in s.probability.tolist()],
            "peak_positions": [] if s.patch_maps is None else [peak_position(patch_map) for patch_map in s.patch_maps],
            "voters": voters,
            "has_maps": s.patch_maps is not None,
        }

    def content(self) -> dict[str, Any]:
        """Everything that the page shows of the images, pictures left out."""
        return {**self._content, **self.changes_since(-1)}

    def page(self) -> str:
        """The page's frame."""
        return template("review.html", "review").render(
            folder=show(self.folder),
            out=show(self.out),
            has_maps=self.screening.patch_maps is not None,
            has_region=self.drawing.screened is not None,
            is_aligned=self.images.alignment is not None,
            has_votes=self.screening.submodels is not None,
        )

    def style(self) -> str:
        """The style that the page shares with the report."""
        return template("style.css").render(ramp=css_ramp())

    def overview(self) -> str:
        """What the report says beyond single images, with the decisions in force."""
        now = self.reviewed_screening()
        return template("overview.html").render(
            headline=headline(self.screening),
            n_kept=len(now.kept),
            n_removed=len(now.ids) - len(now.kept),
            explanation=explanation(now),
            **consensus_histogram(now),
            **unreadable_files(now.unreadable.items()),
            details=list(flat({"options": now.options.as_json(), **now.provenance})),
        )

    def report(self) -> bytes | None:
        """The report of the model where a refit writes it; None where there is none."""
        path = self.out / REPORT
        return path.read_bytes() if path.is_file() else None

    def alike(self, id_: int) -> list[int]:
        """Ids of the typical images that look most like one."""
        if self.screening.descriptions is None:
            return []
        typical = is_typical(self.reviewed_screening())
        near = most_alike(self.screening.descriptions, self.position[id_], typical, N_ALIKE)
        return [int(self.screening.ids[p]) for p in near]

    def nearest(self, id_: int) -> dict[str, Any]:
        """The worst place of an image and the nearest places in others; empty where these are not known."""
        evidence, position = self.screening.evidence, self.position[id_]
        if evidence is None or not (nearest := evidence.nearest(position)):
            return {}
        return {
            "text": nearest_text(self.screening, position),
            "place": int(evidence.places[position]),
            "nearest": [{"id": i, "place": place, "distance": number(d)} for i, place, d in nearest],
        }
