"""The bundled E2E-style sample: its counts, its determinism, its English, and that none of it comes from E2E."""

import csv
import hashlib
import re

import pytest

from minprefix.data.sample_e2e import AREAS, NAMES, NEARS, VALUES, WORDINGS, sample_rows
from tests.helpers import E2E

pytestmark = pytest.mark.slow

SPLITS = ("train", "dev", "test")
ROWS = {split: sample_rows(split) for split in SPLITS}
ALL_ROWS = [row for split in SPLITS for row in ROWS[split]]
SLOT_ORDER = ["name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near"]
TRAIN_SHA256 = "ba35f0328cab41d2c93792cd4f75c4f478df0c610355f161d0e8a9c4fdde18c4"


def parse(mr):
    """The slots of an mr, in its order."""
    return dict(re.findall(r"([^,\[\]]+)\[([^\[\]]*)\](?:, |$)", mr))


def references(split):
    """{mr: its references} of a split."""
    by_mr = {}
    for mr, reference in ROWS[split]:
        by_mr.setdefault(mr, []).append(reference)
    return by_mr


def column(split, slot):
    """The values that a slot takes in a split."""
    return {parse(mr)[slot] for mr in references(split) if slot in parse(mr)}


def test_counts():
    assert 1900 <= len(ROWS["train"]) <= 2100
    assert len(references("train")) == 1000
    assert {len(texts) for texts in references("train").values()} == {1, 2, 3}
    for split in ("dev", "test"):
        assert 240 <= len(ROWS[split]) <= 260
        assert {len(texts) for texts in references(split).values()} == {3}


@pytest.mark.parametrize("split", SPLITS)
def test_rows_of_an_mr_are_consecutive_and_differ(split):
    mrs = [mr for mr, _ in ROWS[split]]
    assert 1 + sum(a != b for a, b in zip(mrs, mrs[1:], strict=False)) == len(set(mrs))
    for texts in references(split).values():
        assert len(set(texts)) == len(texts)


def test_rows_are_always_the_same():
    assert sample_rows("train") == ROWS["train"]
    text = "\n".join(f"{mr}\t{reference}" for mr, reference in ROWS["train"])
    assert hashlib.sha256(text.encode()).hexdigest() == TRAIN_SHA256


def test_splits_share_no_mr_and_no_name():
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not references(a).keys() & references(b).keys()
        assert not column(a, "name") & column(b, "name")
    assert column("dev", "near") - column("train", "near")
    assert column("test", "near") - column("train", "near")
    assert not set(NAMES) & set(NEARS)


def test_mrs_have_the_e2e_form():
    for mr, _ in ALL_ROWS:
        slots = parse(mr)
        assert ", ".join(f"{slot}[{value}]" for slot, value in slots.items()) == mr
        assert list(slots) == [slot for slot in SLOT_ORDER if slot in slots]
        assert 3 <= len(slots) and slots["name"] in NAMES


def test_names_neighbours_and_foods_are_verbatim():
    for mr, reference in ALL_ROWS:
        slots = parse(mr)
        for slot in ("name", "eatType", "food", "near"):
            assert slots.get(slot, "") in reference


def test_a_reference_tells_its_slots_and_no_others():
    """A value is told if one of its wordings occurs (a list of verbs drops a repeated "is", "has", "gets")."""
    told_by = {("eatType", value): [value] for value in VALUES["eatType"]}
    told_by |= {("area", value): wordings.split("|") for value, wordings in AREAS.items()}
    for (slot, value), (_, *kinds) in WORDINGS.items():
        wordings = [re.sub("^(is|has|gets) ", "", w).format(value) for w in "|".join(kinds).split("|") if w]
        told_by[slot, value] = wordings + [f"{value} food"] * (slot == "food")
    patterns = {
        key: re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, ws))})(?![\w-])", re.IGNORECASE)
        for key, ws in told_by.items()
    }
    for mr, reference in ALL_ROWS:
        slots = parse(mr)
        text = reference.replace(slots["name"], "").replace(slots.get("near", "\n"), "")
        told = {key for key, pattern in patterns.items() if pattern.search(text)}
        assert told == {(slot, value) for slot, value in slots.items() if slot not in ("name", "near")}, reference
        assert not any(near in text for near in NEARS)


def test_english():
    for _, reference in ALL_ROWS:
        words = re.findall(r"[\w'£-]+", reference.lower())
        assert "  " not in reference and reference == reference.strip()
        assert re.fullmatch(r"([A-Z][\w ,'£-]+\.( |$))+", reference)  # sentences: a capital, no stray sign, a full stop
        assert not re.search(r" ,|,,|, (and|\.)", reference)
        assert not any(a == b for a, b in zip(words, words[1:], strict=False)), reference
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", reference, re.IGNORECASE), reference
        assert 6 <= len(reference.split()) <= 48


@pytest.mark.skipif(not E2E.is_dir(), reason="the real E2E data is not at ../shared/data/e2e")
def test_nothing_is_taken_from_e2e():
    def runs(text):
        words = re.findall(r"[a-z0-9£']+", text.lower())
        return [" ".join(words[i : i + 8]) for i in range(len(words) - 7)]

    text = "\n".join(reference for _, reference in ALL_ROWS)
    ours = {run for _, reference in ALL_ROWS for run in runs(reference)}
    for path in sorted(E2E.glob("*.csv")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            real = list(csv.reader(file))[1:]
        venues = {value for mr, *_ in real for slot, value in parse(mr).items() if slot in ("name", "near")}
        assert not venues & {*NAMES, *NEARS}
        assert not [venue for venue in venues if venue in text]
        assert not [run for _, reference in real for run in runs(reference) if run in ours]
