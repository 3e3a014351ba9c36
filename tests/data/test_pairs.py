"""Pairs that are too long for a model: the error says which and why, or they are left out."""

from types import SimpleNamespace

import pytest

from minprefix.data.pairs import fitting_indices
from tests.helpers import complaint


def model(n_positions, encoder_decoder=False):
    return SimpleNamespace(n_positions=n_positions, encoder_decoder=encoder_decoder)


PAIRS = [([1] * 3, [2] * 4), ([1] * 5, [2] * 6), ([1] * 2, [2] * 9), ([1], [2])]
TEXTS = [(f"source {i}", f"target {i} " + "long " * 50) for i in range(4)]


@pytest.mark.parametrize(
    "encoder_decoder, fits, side",
    [(False, 11, "target"), (True, 9, "target")],  # GPT-2 reads both sides in one sequence, BART's decoder the target
)
def test_what_fits(encoder_decoder, fits, side, capsys):
    assert fitting_indices(PAIRS, TEXTS, model(fits, encoder_decoder), 0, "x", False) == [0, 1, 2, 3]
    assert fitting_indices(PAIRS, TEXTS, model(fits + 5, encoder_decoder), 5, "x", False) == [0, 1, 2, 3]
    assert fitting_indices([], [], model(1, encoder_decoder), 1, "x", False) == []
    short = model(fits + 4, encoder_decoder)
    message = complaint(fitting_indices, PAIRS, TEXTS, short, 5, "own.jsonl, train split", False)
    number = "2" if encoder_decoder else "1"
    assert (
        message.startswith("own.jsonl, train split: ") and f"is the {side}, which begins 'target {number} " in message
    )
    assert f"room for {fits - 1} from position 5 on" in message and "--skip-long" in message
    assert "--max-source" not in message and ("--offset" in message) == encoder_decoder
    kept = fitting_indices(PAIRS, TEXTS, short, 5, "own.jsonl, train split", True)
    assert kept == ([0, 1, 3] if encoder_decoder else [0, 3])
    assert f"left out {4 - len(kept)} of 4, too long" in capsys.readouterr().err
    assert "4 of 4 are too long" in complaint(fitting_indices, PAIRS, TEXTS, model(5, encoder_decoder), 5, "x", True)


def test_a_long_source_is_named_and_may_be_cut():
    message = complaint(fitting_indices, [([1] * 20, [2] * 3)], [("the source", "the target")], model(9), 0, "x", False)
    assert "it is the source, which begins 'the source' (20 + 3 tokens of source and target" in message
    assert "cut sources (--max-source)" in message
