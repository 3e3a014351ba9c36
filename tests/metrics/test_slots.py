"""Slot accuracy: what counts as told, and the words held against people's own texts."""

import unicodedata

import pytest

from minprefix.data.tasks import load_examples
from minprefix.metrics.slots import slot_accuracy, slots_told
from tests.helpers import E2E, needs_e2e

SOURCE = "name : Café Rouge | Type : coffee shop | food : Indian | price : cheap | near : Raja Indian Cuisine"


def told(source, text):
    return {slot for slot, found in slots_told(source, text) if found}


def test_names_tell_of_nothing_but_themselves():
    assert told(SOURCE, "Café Rouge is near Raja Indian Cuisine.") == {"name", "near"}
    assert told(SOURCE, "Café Rouge is a café with curry, and Indian food.") == {"name", "Type", "food"}
    assert told(SOURCE, "café rouge") == {"Type"}  # a name must be written as it is


def test_a_name_is_told_in_either_unicode_form():
    text = "Café Rouge is near Raja Indian Cuisine."
    for source in (SOURCE, unicodedata.normalize("NFD", SOURCE)):
        for form in ("NFC", "NFD"):
            assert told(source, unicodedata.normalize(form, text)) == {"name", "near"}


@pytest.mark.parametrize(
    "value, text, expected",
    [
        ("price : cheap", "It is inexpensive.", True),
        ("price : high", "It is inexpensive.", False),
        ("price : high", "It is not expensive.", False),
        ("price : less than £20", "Meals cost under £20.", True),
        ("price : £20-25", "Prices are between £20 and £25.", True),
        ("price : high", "It has a high customer rating.", False),
        ("customer rating : high", "It is in the high price range.", False),
        ("customer rating : 5 out of 5", "a five-star pub", True),
        ("customer rating : low", "Its rating is rather low.", True),
        ("customer rating : low", "a low price, rated 5 out of 5", False),
        ("customer rating : low", "one of the pubs", False),
        ("customer rating : 1 out of 5", "It is rated 1 of 5.", True),
        ("customer rating : average", "It has average prices.", False),
        ("customer rating : average", "Its rating is average.", True),
        ("family friendly : yes", "It is not expensive and family friendly.", True),
        ("area : city centre", "in the center of the city", True),
        ("area : riverside", "in the city centre", False),
        ("family friendly : yes", "It is child-friendly.", True),
        ("family friendly : yes", "It is not child-friendly.", False),
        ("family friendly : yes", "It is a pub.", False),
        ("family friendly : no", "It is not child-friendly.", True),
        ("family friendly : no", "Not a pub. Children are welcome.", False),
        ("food : Thai", "THAI food", True),  # a value of somebody's own, as it stands
        ("food : Thai", "food", False),
    ],
)
def test_usual_words(value, text, expected):
    assert slots_told(value, text) == [(value.split(" : ")[0], expected)]


def test_shares():
    sources, texts = [SOURCE, "name : Zizzi | Type : pub"], ["Café Rouge", "Zizzi is a pub."]
    assert slot_accuracy(sources, texts) == {
        "slots": 3 / 7, "name": 1.0, "Type": 1 / 2, "food": 0.0, "price": 0.0, "near": 0.0,
    }  # fmt: skip


@needs_e2e
def test_words_against_peoples_own_texts():
    """People leave values out; a pattern that misses a usual word would show as a low share, one too wide by a match
    with another input's value."""
    examples = load_examples("e2e", "dev", E2E)
    sources, texts = zip(*[(e.source, reference) for e in examples for reference in e.references], strict=True)
    own = slot_accuracy(sources, texts)
    others = slot_accuracy(sources, texts[1000:] + texts[:1000])
    assert own["slots"] > 0.9 and min(own.values()) > 0.8
    for slot in own.keys() - {"Type"}:  # most texts call the place a restaurant, whatever else it is
        assert others[slot] < own[slot] - 0.3, slot
