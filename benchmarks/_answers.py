"""Sentences of benchmarks/README.md. Their numbers are read from the tables behind them, so that both agree."""

from collections.abc import Callable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[Path], str | None]]
Cells = dict[tuple[str, ...], list[str]]


def cells(text: str, n_keys: int) -> Cells:
    """The rows of a Markdown table without bold type: {the first cells: all others}; of equal keys the first."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip().strip("*") for cell in line[1:-1].split("|")] for line in lines]
    return {tuple(row[:n_keys]): row[n_keys:] for row in reversed(rows)}


def accuracy(table: Cells) -> str:
    """Of `headline`."""
    lines = []
    for name, clean in table.items():
        if name[1] != "0%":
            continue
        dirty = table[name[0], "20%"]
        lines.append(
            f"- Mean of {name[0].replace(', ', ' sets, ', 1)}: with 20 % of the training images "
            f"defective, `flawsift fit` has an image AUROC of "
            f"**{dirty[2]}**, PatchCore trained on everything {dirty[0]}, SoftPatch {dirty[1]}. "
            f"Quorum trained on the "
            f"good images only has {dirty[3]}. With no defective image in training: {clean[2]}, "
            f"{clean[0]} and {clean[1]}."
        )
    return "\n".join(reversed(lines))


def threshold(table: Cells) -> str:
    """Of `verdict`."""
    without, decided = table["1%", "0", "20%"], table["1%", "10", "20%"]
    return (
        f"With 20 % defective and 1 false alarm in 100 asked for, the threshold promises "
        f"{without[0]} in 100 (few images "
        f"support no less) and has **{without[1]}** on new images. It misses **{without[3]}** of "
        f"100 defective ones. The "
        f"promised interval agrees with what was counted in {without[5]} runs; in {without[7]} a "
        f"warning says that the "
        f"promise may not hold. After ten right decisions of a person it misses {decided[3]} of "
        f"100. The best possible "
        f"threshold misses {without[4]}."
    )


def estimate(table: Cells) -> str:
    """Of `estimates`."""
    low, high = table["10%", "0"], table["40%", "0"]
    return (
        f"Where 10 % are defective, the estimates have a mean of {low[0]}; where 40 % are, "
        f"{high[0]}. The 90 % interval "
        f"holds the true share in {low[3]} and {high[3]} runs, and is wide: {low[2]} and {high[2]} on average. Ten "
        f"decisions narrow it to {table['10%', '10'][2]} and {table['40%', '10'][2]}."
    )


def decisions(table: Cells) -> str:
    """Of `decisions-patchcore`."""
    shares = table[("recovery",)][2:]
    return (
        f"For PatchCore, training on everything loses accuracy against training on the good images only. The default "
        f"screening wins {shares[1]} of that loss back, ten right decisions on the highest-ranked "
        f"images **{shares[2]}**."
    )


def screening(table: Cells) -> str:
    """Of `goals`."""
    goal = table[("goal",)]
    missed = any(_percent(row[1]) < _percent(goal[1]) for row in table.values())
    texts = [f"{name[0]} {row[1]}" for name, row in table.items() if name != ("goal",)]
    return (
        f"Detectors that learn defects gain from stage 1. It wins back this share of what contamination costs them: "
        f"{'; '.join(reversed(texts))}. The goal was {goal[1].replace('>=', 'at least')}: "
        f"{'missed' if missed else 'met'}. Quorum, the default, "
        f"needs no such help: it learns all images."
    )


def _percent(text: str) -> float:
    return float(text.strip(">=% "))


def speed(table: Cells) -> str:
    """Of `speed`."""
    return (
        f"PatchCore's fit and test are {table[('PatchCore fit and test against anomalib 2.7.0',)][0]} than those of "
        f"anomalib 2.7.0 on the same images, PaDiM's "
        f"{table[('PaDiM fit and test against anomalib 2.7.0',)][0]}. Both "
        f"stages of PatchCore take "
        f"{table[('PatchCore: screening and training against one plain fit',)][0]} the time of "
        f"one plain fit. The backbone sees {table[('images per second through the backbone',)][0]} "
        f"images per second on "
        f"two cores."
    )


def cost(table: Cells) -> str:
    """Of `quorum-cost`."""
    few, many = table[("400",)], table[("4,000",)]
    return (
        f"Stage 1 of Quorum takes {few[0]} for 400 images and {many[0]} for 4,000, a new image "
        f"{few[2]} and {many[2]} with "
        f"its map, the model {few[3]} and {many[3]}; peak memory is {few[4]} and {many[4]} "
        f"(features in memory, 2 cores)."
    )


# answer: (table that it is read from, columns that name its rows, the sentences)
ANSWERS: Mapping[str, tuple[str, int, Callable[[Cells], str]]] = {
    "answer-accuracy": ("headline", 2, accuracy),
    "answer-threshold": ("verdict", 3, threshold),
    "answer-estimate": ("estimates", 2, estimate),
    "answer-decisions": ("decisions-patchcore", 1, decisions),
    "answer-screening": ("goals", 1, screening),
    "answer-speed": ("speed", 1, speed),
    "answer-cost": ("quorum-cost", 1, cost),
}


def answers(tables: Tables) -> Tables:
    """Functions like those of tables, which make the sentences."""

    def answer(name: str) -> Callable[[Path], str | None]:
        of, n_keys, sentences = ANSWERS[name]

        def written(results: Path) -> str | None:
            text = tables[of](results)
            return None if text is None else sentences(cells(text, n_keys)) + "\n"

        return written

    return {name: answer(name) for name in ANSWERS}
