"""The chart of a run's losses."""

import sys

import pytest

from minprefix.cli.curve import plot_curve, text_curve

LOG = [
    {"step": 0, "dev_loss": 8.0},
    {"step": 50, "loss": 4.0, "dev_loss": 4.0},
    {"step": 100, "loss": 1.0, "dev_loss": 2.0},
]


def test_the_text_shows_both_losses_on_a_logarithmic_scale():
    assert text_curve(LOG, width=5, height=4).splitlines() == [
        "    8.000 |oo",
        "    4.000 |..oo",
        "    2.000 |   .o",
        "    1.000 |    .",
        "     step 0  100",
        "           . training loss, o dev loss",
    ]


def test_a_flat_curve_is_drawn_as_such():
    lines = text_curve([{"step": 0, "dev_loss": 2.0}, {"step": 1, "dev_loss": 2.0, "loss": 2.0}], width=5).splitlines()
    assert lines[0] == "    2.000 |ooooo" and lines[1] == "    2.000 |"


def test_the_png_is_left_out_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_curve(LOG, tmp_path / "loss.png") is False and not list(tmp_path.iterdir())


def test_the_png(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_curve(LOG, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
