"""Examples from triples of subject, property and object: WebNLG 2017 and 3.0 (XML), DART (JSON).

A set of triples is linearised as `| subject : property : object | subject : ...`, as in the paper; underscores in
entities are kept. Neither dataset is downloaded.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from minprefix.core.encode import Example
from minprefix.data.examples import check_text, collapse_whitespace, group_by_source
from minprefix.system.errors import InputError
from minprefix.system.files import read_json, read_text

TEST_2017, TEST_2020 = "testdata_with_lex.xml", "rdf-to-text-generation-test-data-with-refs-en.xml"
UNSEEN = {  # a release's test file -> its categories that are not in the training data
    TEST_2017: ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician"),
    TEST_2020: ("Film", "MusicalWork", "Scientist"),
}
WEBNLG_LAYOUT = (
    "expected the folders train, dev and test of webnlg_challenge_2017, or of release_v3.0/en, from "
    "https://gitlab.com/shimorina/webnlg-dataset"
)
DART_LAYOUT = "expected dart-v1.1.1-full-{train,dev,test}.json from https://github.com/Yale-LILY/dart, data/v1.1.1"
MAX_XML_BYTES = 32 * 2**20  # of one file; the largest of the release has 2 MiB
Triple = list[str]  # subject, property, object


def linearise_triples(triples: Iterable[Triple]) -> str:
    """[(subject, property, object)] -> `| subject : property : object | ...`, white space collapsed."""
    return " ".join(collapse_whitespace("| " + " : ".join(triple)) for triple in triples)


def split_triples(text: str, where: str = "the input") -> list[Triple]:
    """A user's `subject : property : object | ...` -> [(subject, property, object)].

    Separators are bars and colons with spaces on both sides, so an object may be a URL. Bars at either end are ignored.
    """
    triples = [part.strip().split(" : ", 2) for part in re.split(r" \|(?= )", collapse_whitespace(text).strip("| "))]
    if not all(len(triple) == 3 for triple in triples):
        raise InputError(
            f"{where}: {text!r:.200} is not a set of triples: expected subject : property : object, with blanks around "
            "the colons, as in `Alan_Bean : occupation : Test_pilot | Alan_Bean : nationality : United_States`"
        )
    return triples


# ---- WebNLG ----


def load_webnlg(split: str, folder: Path) -> list[Example]:
    """The Examples of a split of WebNLG 2017 or 3.0, one for each distinct set of triples and category (its topic).

    "train": only texts marked as good, so a few sets of triples are left out; "dev" and "test": all texts. "test_seen"
    and "test_unseen": the test inputs whose category is, or is not, in the training data.
    """
    paths = find_webnlg(split, folder)
    examples = [example for path in paths for example in read_webnlg(path, split == "train")]
    if split in ("test_seen", "test_unseen"):
        unseen = UNSEEN.get(paths[0].name, UNSEEN[TEST_2017])
        examples = [example for example in examples if (example.topic in unseen) == (split == "test_unseen")]
    if not examples:
        raise InputError(f"{folder} has no texts for WebNLG's {split} split: {WEBNLG_LAYOUT}")
    return group_by_source(examples)


def find_webnlg(split: str, folder: Path) -> list[Path]:
    """The XML files of a split: for train and dev all in its folder, for test the one file with the whole test set."""
    if split in ("train", "dev"):
        paths, needed = sorted((folder / split).rglob("*.xml")), f"{split}/*triples/*.xml"
    else:
        needed = f"test/{TEST_2017} (or {TEST_2020})"
        names = [TEST_2017, TEST_2020] + ["testdata_unseen_with_lex.xml"] * (split == "test_unseen")
        paths = [path for name in names for path in (folder / "test" / name, folder / name) if path.is_file()][:1]
        paths = paths or sorted((folder / "test").glob("*triples/*.xml"))
    if not paths:
        without = "; train.py needs none with --eval-inputs 0" if split == "test" else ""
        raise InputError(f"{folder} lacks {needed}, WebNLG's {split} split: {WEBNLG_LAYOUT}{without}")
    return paths


def read_webnlg(path: Path, good_only: bool) -> list[Example]:
    """The Examples of a WebNLG XML file, in order; entries without texts are left out."""
    examples = []
    for number, entry in enumerate(parse_xml(path).iter("entry"), 1):
        where = f"{path}: entry {number}"
        triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
        if not triples or not all(len(triple) == 3 for triple in triples):
            raise InputError(f"{where}: its modifiedtripleset must have mtriples like `subject | property | object`")
        if not entry.get("category"):
            raise InputError(f"{where} has no category")
        texts = [lex.text for lex in entry.iterfind("lex") if lex.get("comment") == "good" or not good_only]
        texts = [collapse_whitespace(check_text(text or "", f"{where}: a lex")) for text in texts]
        if texts:
            examples.append(Example(linearise_triples(triples), texts, entry.get("category")))
    return examples


def parse_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file; InputError if it declares entities, which can expand without limit."""
    if path.stat().st_size > MAX_XML_BYTES:
        raise InputError(f"{path} has more than {MAX_XML_BYTES // 2**20} MiB, which no file of WebNLG has")
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputError(f"{path} has a DOCTYPE or ENTITY declaration, which is refused: no file of WebNLG needs one")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"{path}:{error.position[0]}: not valid XML ({error})") from error


# ---- DART ----


def load_dart(split: str, folder: Path) -> list[Example]:
    """The Examples of a DART v1.1.1 split, one for each distinct set of triples; empty texts are left out."""
    path = folder / f"dart-v1.1.1-full-{split}.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: {DART_LAYOUT}")
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} is not a JSON list of entries: {DART_LAYOUT}")
    examples, empty = [], 0
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        triples, texts = dart_entry(entry, where)
        kept = [collapse_whitespace(check_text(text, f"{where}: a text")) for text in texts if text.strip()]
        empty += len(texts) - len(kept)
        if kept:
            examples.append(Example(check_text(linearise_triples(triples), f"{where}: tripleset"), kept))
    if not examples:
        raise InputError(f"{path} has no texts: {DART_LAYOUT}")
    if empty:
        print(f"skipped {empty} empty text{'s' * (empty > 1)} of {path}", file=sys.stderr)
    return group_by_source(examples)


def dart_entry(entry: Any, where: str) -> tuple[list[Triple], list[str]]:
    """The triples and texts of an entry; InputError if it is malformed."""
    try:
        triples, texts = entry["tripleset"], [annotation["text"] for annotation in entry["annotations"]]
        valid = triples and all(isinstance(triple, list) and len(triple) == 3 for triple in triples)
        if valid and all(isinstance(item, str) for item in [*texts, *(item for triple in triples for item in triple)]):
            return triples, texts
    except (KeyError, TypeError):
        pass
    expected = '{"tripleset": [[subject, property, object], ...], "annotations": [{"text": "..."}, ...]}'
    raise InputError(f"{where} is not of the form {expected}")
