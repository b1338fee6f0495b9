"""The result of a screening in sentences: how many images were set aside, on what estimate, what stage 2 leaves out."""

from flawsift.reports.pages import plural
from flawsift.screening.consensus import SUSPECT
from flawsift.screening.result import Screening

LIKE = 0.5  # of an image's score, the mean distance to k groups: what is nearer to its worst place looks like it


def headline(screening: Screening) -> str:
    """The result in one sentence or two."""
    n, n_kept, n_bad = len(screening.ids), len(screening.kept), len(screening.unreadable)
    n_removed = n - n_kept
    start = f"Of {n:,} {plural(n, 'image')}, "
    end = f"{n_kept:,} {'was' if n_kept == 1 else 'were'} kept."
    if not n_removed:
        text = f"{start}none was set aside; all were kept." if n > 1 else "The only image was kept."
    elif screening.contamination is None:
        text = f"{start}the {n_removed:,} most unusual {'was' if n_removed == 1 else 'were'} set aside; {end}"
    else:
        looks = "looks defective and was" if n_removed == 1 else "look defective and were"
        text = f"{start}{n_removed:,} {looks} set aside; {end}"
    return text + (f" {n_bad:,} {plural(n_bad, 'file')} could not be read." if n_bad else "")


def explanation(screening: Screening) -> str:
    """What stands below the headline: the estimate, and what stage 2 leaves out."""
    return f"{contamination_text(screening)} {selection_text(screening)}".strip()


def next_step(screening: Screening) -> str:
    """What a person does with the result."""
    if len(screening.kept) < len(screening.ids):
        return "look at the suspects below and say of each whether it is defective. Then train again."
    return "look at the first images below: a defect that looks ordinary can still be among them."


def caveat(screening: Screening) -> str:
    """What must be known before the headline is believed; empty where the images tell how many are defective."""
    estimate = screening.contamination
    if estimate is None or estimate.method.startswith("none"):
        return contamination_text(screening)
    if estimate.is_evident or estimate.interval == (0, 0):
        return ""
    return (
        f"The images do not tell whether some are defective. Estimated share: {estimate.text}. "
        "So nothing was set aside; look at the highest-ranked images."
    )


def contamination_text(screening: Screening) -> str:
    """Where the share that was set aside comes from."""
    estimate = screening.contamination
    if estimate is None:
        kept = screening.keep_share  # whatever a reviewer has decided since
        if kept == 1:
            return "To keep all images was set by the user, so the share of defective ones was not estimated."
        share = 100 * (1 - kept)
        return (
            f"The share to set aside ({share:.0f}\u00a0%) was set by the user, not estimated from the images: "
            "it says nothing about how many are defective."
        )
    if estimate.method.startswith("none"):
        return f"The share of defective images could not be estimated ({estimate.method.removeprefix('none: ')})."
    if estimate.interval == (0, 0):
        return (
            "No more images score high than would in a set of good images. "
            "Defects that look ordinary can still be among the highest-ranked."
        )
    text = f"Estimated share of defective images: {estimate.text}."
    if estimate.is_evident:
        return text + " Nine of ten such intervals hold the true share; defects that score like good images widen it."
    return text + " Perhaps none is defective, so nothing was set aside; look at the highest-ranked images."


def selection_text(screening: Screening) -> str:
    """What stage 2 leaves out of the kept images; empty when it is nothing, unless a reviewer has decided so."""
    if screening.rejected is None:
        return ""
    if not screening.rejected.any():
        return ""
    share = 100 * float(screening.rejected[screening.is_kept].mean())
    text = f"Of the kept images, the {share:.1f} % of the patches that look least like the others are suspect,"
    text += " and left out by detectors that leave out patches. Quorum, the default, is trained on all."
    if screening.contamination is None:
        return text
    text += f" Images that are defective with a probability above {SUSPECT:.0%} were set aside."
    if screening.is_partly_learned.any():
        text += " Of these, a detector that leaves out patches is trained on the most ordinary patches only."
    return text


def nearest_text(screening: Screening, position: int) -> str:
    """What stands above the worst place of the image at a position; empty where there is nothing to compare it with.

    Only of an image that stands out, and was set aside, it is said that nothing is like it, unless the nearest place is
    nearer than `LIKE` of its score: then the same is there a few times. A person, or a share that was set by the user,
    sets aside ordinary images too.
    """
    evidence = screening.evidence
    if evidence is None or not (nearest := evidence.nearest(position)):
        return ""
    n = int(evidence.n_others[position])
    others = f"{n:,} other {plural(n, 'image')}"
    if screening.is_suspect[position] and not screening.is_kept[position]:
        _, _, distance = nearest[0]
        found = "Few like this" if distance < LIKE * screening.held_out_scores[position] else "Nothing like this"
        return f"{found} in {others}. The closest places:"
    return f"The closest places in {others}:"
