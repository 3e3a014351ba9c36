"""A run's losses by step: as text for the terminal, and as a PNG where matplotlib is installed."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minprefix.system.files import atomic_write


def series(log: list[dict[str, float]]) -> Iterator[tuple[str, str, list[float], list[float]]]:
    """The training loss and the dev loss in a log of `train`: (name, mark, steps, losses) each."""
    for key, name, mark in (("loss", "training loss", "."), ("dev_loss", "dev loss", "o")):
        rows = [row for row in log if key in row]
        yield name, mark, [row["step"] for row in rows], [row[key] for row in rows]


def text_curve(log: list[dict[str, float]], width: int = 64, height: int = 9) -> str:
    """The losses of a log of at least two rows as lines of text, on a logarithmic scale."""
    steps = np.linspace(0, log[-1]["step"], width)
    curves = [(mark, np.log(np.maximum(np.interp(steps, x, y), 1e-9))) for _, mark, x, y in series(log)]
    values = np.concatenate([curve for _, curve in curves])
    levels = np.linspace(values.max(), values.min(), height)
    grid = [[" "] * width for _ in levels]
    for mark, curve in curves:
        for x, value in enumerate(curve):
            grid[np.abs(levels - value).argmin()][x] = mark
    lines = [f"{math.exp(level):9.3f} |{''.join(row).rstrip()}" for level, row in zip(levels, grid, strict=True)]
    legend = ", ".join(f"{mark} {name}" for name, mark, _, _ in series(log))
    return "\n".join([*lines, f"{'step 0':>11}{log[-1]['step']:>{width}}", f"{'':11}{legend}"])


def plot_curve(log: list[dict[str, float]], path: str | Path) -> bool:
    """Write the losses as a PNG; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, mark, steps, losses in series(log):
        axes.plot(steps, losses, f"{mark}-", label=name)
    axes.set(xlabel="step", ylabel="nats per target token", yscale="log")
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=150)
    return True
