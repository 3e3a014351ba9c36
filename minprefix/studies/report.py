"""What came out of a study: its rows as a Markdown table, the paper's numbers beside them, and as a figure."""

import statistics
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minprefix.system.files import atomic_write

Row = dict[str, Any]  # of rows.jsonl, see `make_row` in experiments.py

METRICS = {  # as the paper prints them: times what, decimals
    "BLEU": (100, 1), "NIST": (1, 2), "METEOR": (100, 1), "ROUGE-1": (100, 1), "ROUGE-2": (100, 1),
    "ROUGE-L": (100, 1), "CIDEr": (1, 2), "TER": (1, 2), "slots": (100, 1),
}  # fmt: skip
WEBNLG = ("BLEU", "METEOR", "TER")  # the paper's, for each half of the test set
# (study, task) -> what the numbers are; and for each line of the table its numbers
PAPER: dict[tuple[str, str], tuple[str, dict[tuple[Any, ...], str]]] = {
    ("full", "e2e"): ("the paper's GPT-2 medium: BLEU / NIST / METEOR / ROUGE-L / CIDEr", {
        ("prefix",): "69.7 / 8.81 / 46.1 / 71.4 / 2.49",
        ("finetune",): "68.2 / 8.62 / 46.2 / 71.0 / 2.47",
        ("top2",): "68.1 / 8.59 / 46.0 / 70.8 / 2.41",
        ("adapter 3%",): "68.9 / 8.71 / 46.1 / 71.3 / 2.47",
        ("adapter 0.1%",): "66.3 / 8.41 / 45.0 / 69.8 / 2.40",
        ("embedding",): "62.2",  # of length 10, table 4
    }),
    ("full", "webnlg"): ("the paper's GPT-2 medium: BLEU seen / unseen / all", {
        ("prefix",): "62.9 / 45.6 / 55.1",
        ("finetune",): "64.2 / 27.7 / 46.5",
        ("top2",): "53.6 / 18.9 / 36.0",
        ("adapter 3%",): "60.4 / 48.3 / 54.9",
        ("adapter 0.1%",): "54.5 / 45.1 / 50.2",
    }),
    ("full", "dart"): ("the paper's GPT-2 medium: BLEU", {
        ("prefix",): "46.4", ("finetune",): "46.2", ("top2",): "41.0", ("adapter 3%",): "45.2",
        ("adapter 0.1%",): "42.4",
    }),
    ("full", "xsum"): ("the paper's BART large (prefix of 2%): ROUGE-1 / 2 / L", {
        ("prefix",): "43.80 / 20.93 / 36.05", ("finetune",): "45.14 / 22.27 / 37.25",
    }),
    ("ablation", "e2e"): ("the paper's GPT-2 medium: BLEU", {
        ("embedding", 1): "48.1", ("embedding", 10): "62.2", ("embedding", 20): "61.9",
        ("infix", 1): "67.9", ("infix", 10): "67.2", ("infix", 20): "66.7",
    }),
    ("extrapolation", "webnlg"): ("the paper's GPT-2 medium, official test set: BLEU seen / unseen", {
        ("prefix",): "62.9 / 45.6", ("finetune",): "64.2 / 27.7", ("adapter 3%",): "60.4 / 48.3",
    }),
}  # fmt: skip


def by_setting(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in their seeds only, together: what they have in common (values of `what`) -> rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["what"].values()), []).append(row)
    return groups


def values(group: list[Row], name: str, metric: str) -> list[float]:
    """A metric in a set of scores, as the paper prints it, for each row of a group; [] where a row lacks it."""
    found = [row["scores"][name].get(metric) for row in group]  # METEOR is left out where Java was not there
    return [] if None in found else [METRICS[metric][0] * value for value in found]


def mean_and_range(numbers: list[float], decimals: int) -> str:
    """Their mean, and half their range; a dash for none."""
    if not numbers:
        return "-"
    mean, half = statistics.mean(numbers), (max(numbers) - min(numbers)) / 2
    return f"{mean:.{decimals}f}" + (f" ± {half:.{decimals}f}" if len(numbers) > 1 else "")


def table(rows: list[Row], losses: dict[str, dict[str, float | None]], args: Namespace) -> str:
    """A study as Markdown: a line for each group of rows, the learning rates tried (method -> {rate: dev loss})."""
    paper, numbers = PAPER.get((args.study, args.task), ("", {}))
    several = len(rows[0]["scores"]) > 1
    columns = [(name, metric) for name in rows[0]["scores"] for metric in (WEBNLG if several else METRICS)
               if any(metric in row["scores"][name] for row in rows)]  # fmt: skip
    lines = []
    for what, group in by_setting(rows).items():
        line = {**group[0]["what"], "runs": len(group), "trained": f"{group[0]['share']:.2%}",
                "dev loss": mean_and_range([row["dev_loss"] for row in group], 3)}  # fmt: skip
        for name, metric in columns:
            column = f"{name}: {metric}" if several else metric
            line[column] = mean_and_range(values(group, name, metric), METRICS[metric][1])
        lines.append(line | ({paper: numbers.get(what, "")} if paper else {}))
    over = f"seeds {', '.join(map(str, args.seeds))}"
    if "--low-data" in rows[0]["train"]:
        over = f"{args.samplings} samplings of the training data and {over}"
    tests = sum(count for name, count in args.tests.items() if name != "all")  # of the other sets
    text = [
        f"{args.model} on {args.task}, {tests} test inputs; mean ± half the range over {over}.\n",
        f"| {' | '.join(lines[0])} |",
        f"|{' --- |' * len(lines[0])}",
        *[f"| {' | '.join(map(str, line.values()))} |" for line in lines],
        *([gap(rows)] if args.study == "low-data" else []),
        "\nLearning rates and their dev losses, the lowest was taken:\n",
    ]
    for method, tried in losses.items():
        shown = ", ".join(f"{lr}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in tried.items())
        text.append(f"- {method}: {shown}")
    return "\n".join(text) + "\n"


def gap(rows: list[Row]) -> str:
    """How far prefix-tuning is ahead of fine-tuning, the mean over the sizes of low data (paper section 6.3)."""
    metric, name = main_metric(rows), list(rows[0]["scores"])[-1]  # of the whole test set, WebNLG's comes last
    means = {what: statistics.mean(values(group, name, metric)) for what, group in by_setting(rows).items()}
    ahead = statistics.mean(means["prefix", size] - means["finetune", size] for size in {size for _, size in means})
    return f"\nprefix less finetune, mean over the sizes: {ahead:+.1f} {metric} (the paper's on E2E: about +2.9 BLEU)"


def main_metric(rows: list[Row]) -> str:
    """BLEU, or of summaries ROUGE-1: the first that all rows have."""
    scores = [scores for row in rows for scores in row["scores"].values()]
    return next(metric for metric in METRICS if all(metric in one for one in scores))


def draw(rows: list[Row], path: str | Path) -> None:
    """A PNG of a study's main metric, as the paper's figures are; a line that says so if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs pip install -e '.[plot]'")
        return
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes, metric = figure.subplots(), main_metric(rows)
    lines: dict[str, list[tuple[Any, list[float]]]] = {}  # label -> [(x, values)]: x is what the study varies last
    for what, group in by_setting(rows).items():
        for name in group[0]["scores"]:
            label = " ".join([*map(str, what[:-1]), *([name] if len(group[0]["scores"]) > 1 else [])])
            lines.setdefault(label, []).append((what[-1], values(group, name, metric)))
    numbers_on_x = isinstance(list(rows[0]["what"].values())[-1], int)
    for label, points in lines.items():
        means = [statistics.mean(numbers) for _, numbers in points]
        bars = [[mean - min(numbers) for mean, (_, numbers) in zip(means, points, strict=True)],
                [max(numbers) - mean for mean, (_, numbers) in zip(means, points, strict=True)]]  # fmt: skip
        xs = [x for x, _ in points]
        axes.errorbar(xs, means, bars, fmt="o-" if numbers_on_x else "o", capsize=3, label=label)
    if numbers_on_x:
        axes.set_xscale("log")
        axes.set_xticks(xs, map(str, xs), minor=False)
        axes.minorticks_off()
    else:
        axes.tick_params(axis="x", labelrotation=25)
    axes.set(xlabel=list(rows[0]["what"])[-1], ylabel=metric)
    if any(lines):
        axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=150)
