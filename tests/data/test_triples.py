"""WebNLG and DART are read entry by entry as they are; hostile or damaged files are named; topics and draws."""

import json
import re
from collections import Counter

import pytest

from minprefix.core.encode import Example
from minprefix.data import triples
from minprefix.data.examples import filter_topics, sample_pairs
from minprefix.data.tasks import format_source, load_examples
from tests.helpers import complaint, entry, write_xml
from tests.tiny import ROOT

pytestmark = pytest.mark.slow

DATA = ROOT.parent / "shared" / "data"
needs_webnlg = pytest.mark.skipif(not (DATA / "webnlg").is_dir(), reason="WebNLG is not at ../shared/data/webnlg")
needs_dart = pytest.mark.skipif(not (DATA / "dart").is_dir(), reason="DART is not at ../shared/data/dart")
PILOT = "Alan_Bean : occupation : Test_pilot | Alan_Bean : nationality : United_States"


# ---- WebNLG ----


@needs_webnlg
def test_real_webnlg():
    """The counts that the paper's data have, and every text found again by regular expressions instead of a parser."""
    splits = {split: load_examples("webnlg", split, DATA / "webnlg") for split in ("train", "dev")}
    assert sum(len(example.references) for example in splits["train"]) == 18025
    assert (len(splits["train"]), len(splits["dev"])) == (6935, 872)  # 5 of 6,940 entries have no good text
    assert sum(len(example.references) for example in splits["dev"]) == 2268
    for split, examples in splits.items():
        assert len({example.topic for example in examples}) == 10
        raw = [path.read_text(encoding="utf-8") for path in (DATA / "webnlg" / split).rglob("*.xml")]
        found = [text for xml in raw for text in re.findall(r'<lex comment="(\w+)" lid="\w+">([^<]*)</lex>', xml)]
        assert len(found) == {"train": 18102, "dev": 2268}[split]
        texts = Counter(" ".join(text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">").split())
                        for comment, text in found if split == "dev" or comment == "good")  # fmt: skip
        assert texts == Counter(reference for example in examples for reference in example.references)
    source = next(e.source for e in splits["dev"] if "inaugurationDate" in e.source and e.source.count(" | ") == 1)
    assert source.startswith("| ") and " : inaugurationDate : " in source and "_" in source


@needs_webnlg
def test_webnlg_without_its_test_files(tmp_path):
    for split in ("test", "test_seen", "test_unseen"):
        message = complaint(load_examples, "webnlg", split, DATA / "webnlg")
        assert "test/testdata_with_lex.xml" in message and "https://gitlab.com/shimorina/webnlg-dataset" in message
    assert "train/*triples/*.xml" in complaint(load_examples, "webnlg", "train", tmp_path)
    assert "--data" in complaint(load_examples, "webnlg", "train")
    assert "'test_seen' of dart" in complaint(load_examples, "dart", "test_seen", tmp_path)


def test_webnlg_3(tmp_path):
    """As release_v3.0/en has it: other file names, shapes in the entries, other categories that training lacks."""
    write_xml(tmp_path / "train" / "1triples" / "Artist_allSolutions.xml", entry("Artist", "A | is | B", good=["AB."]))
    tests = [entry(category, f"{category} | is | B", good=["One."], bad=["Two."]) for category in ("Artist", "Film")]
    tests = [text.replace('size="1"', 'shape="(X (X))" shape_type="NA" size="1"') for text in tests]
    write_xml(tmp_path / "test" / "rdf-to-text-generation-test-data-with-refs-en.xml", *tests)
    write_xml(
        tmp_path / "test" / "semantic-parsing-test-data-with-refs-en.xml", entry("City", "A | is | B", good=["x"])
    )
    assert load_examples("webnlg", "train", tmp_path) == [Example("| A : is : B", ["AB."], "Artist")]
    both = [Example(f"| {category} : is : B", ["One.", "Two."], category) for category in ("Artist", "Film")]
    assert load_examples("webnlg", "test", tmp_path) == both
    assert load_examples("webnlg", "test_seen", tmp_path) == both[:1]
    assert load_examples("webnlg", "test_unseen", tmp_path) == both[1:]


def test_good_texts_grouping_and_topics(tmp_path):
    write_xml(tmp_path / "train" / "1triples" / "1triple_Food.xml",
              entry("Food", "A_b | is | &quot;c  d&quot;", good=["One\n &amp; 1."], bad=["Bad."]),
              entry("Food", "X | is | y", bad=["Bad."]),
              entry("City", "A_b | is | &quot;c  d&quot;", good=["Two."]),
              entry("Food", "A_b | is | &quot;c  d&quot;", good=["Three.", "Four."]))  # fmt: skip
    (tmp_path / "dev").symlink_to(tmp_path / "train")
    source = '| A_b : is : "c d"'
    food = Example(source, ["One & 1.", "Three.", "Four."], "Food")
    assert load_examples("webnlg", "train", tmp_path) == [food, Example(source, ["Two."], "City")]
    dev = load_examples("webnlg", "dev", tmp_path)
    assert dev[:2] == [Example(source, ["One & 1.", "Bad.", "Three.", "Four."], "Food"),
                       Example("| X : is : y", ["Bad."], "Food")]  # fmt: skip


@pytest.mark.parametrize("layout", ["test/", "", "test/1triples/"])
def test_released_test_sets(tmp_path, layout):
    both = [entry("Food", "a | b | c", good=["Seen."]), entry("Artist", "d | e | f", "g | h | i", good=["Unseen."])]
    if layout.endswith("triples/"):
        for i, each in enumerate(both):
            write_xml(tmp_path / layout / f"{i}.xml", each)
    else:
        write_xml(tmp_path / layout / "testdata_with_lex.xml", *both)
        write_xml(tmp_path / layout / "testdata_unseen_with_lex.xml", entry("Artist", "x | y | z", good=["Not read."]))
        write_xml(tmp_path / layout / "testdata_no_lex.xml", entry("Food", "a | b | c"))
    seen = Example("| a : b : c", ["Seen."], "Food")
    unseen = Example("| d : e : f | g : h : i", ["Unseen."], "Artist")
    assert load_examples("webnlg", "test", tmp_path) == [seen, unseen]
    assert load_examples("webnlg", "test_seen", tmp_path) == [seen]
    assert load_examples("webnlg", "test_unseen", tmp_path) == [unseen]


def test_the_unseen_half_is_not_taken_for_the_test_set(tmp_path):
    write_xml(tmp_path / "test" / "testdata_unseen_with_lex.xml", entry("Artist", "a | b | c", good=["Unseen."]))
    assert len(load_examples("webnlg", "test_unseen", tmp_path)) == 1
    assert "testdata_with_lex.xml" in complaint(load_examples, "webnlg", "test", tmp_path)
    write_xml(tmp_path / "test" / "testdata_with_lex.xml", entry("Artist", "a | b | c", good=["Unseen."]))
    assert "no texts for WebNLG's test_seen" in complaint(load_examples, "webnlg", "test_seen", tmp_path)


BOMB = '<!DOCTYPE b [<!ENTITY a "ha"><!ENTITY c "&a;&a;&a;&a;">]>\n'
FILE = '<!DOCTYPE b [<!ENTITY a SYSTEM "file:///etc/passwd">]>\n'


@pytest.mark.parametrize("head", [BOMB, FILE, '<?xml version="1.0" encoding="UTF-16"?>' + BOMB, "<!DOCTYPE b>"])
def test_entities_are_refused_before_parsing(tmp_path, monkeypatch, head):
    path = write_xml(tmp_path / "train" / "a.xml", entry("Food", "a | b | c", good=["&c;"]), head=head)
    monkeypatch.setattr(triples.ElementTree, "fromstring", lambda text: pytest.fail("parsed"))
    assert complaint(load_examples, "webnlg", "train", tmp_path).startswith(f"{path} has a DOCTYPE or ENTITY")
    path.write_bytes(path.read_text().encode("utf-16"))
    assert complaint(load_examples, "webnlg", "train", tmp_path).startswith(f"{path} is not UTF-8")


FINE = entry("Food", "a | b | c", good=["Text."])


@pytest.mark.parametrize(
    "second, where, part",
    [
        (entry("Food", "a | b", good=["x"]), ": entry 2", "subject | property | object"),
        (entry("Food", "a | b | c | d", good=["x"]), ": entry 2", "subject | property | object"),
        (entry("Food", good=["x"]), ": entry 2", "modifiedtripleset"),
        (entry("", "a | b | c", good=["x"]), ": entry 2", "no category"),
        (entry("Food", "a | b | c", good=[" "]), ": entry 2", "a lex is empty"),
        ("\n<entry", ":6: ", "not valid XML"),
        ("&unknown;", ":5: ", "undefined entity"),
        ("\x00", ":5: ", "not valid XML"),
        ("</entries>", ":5: ", "mismatched tag"),
    ],
)
def test_bad_webnlg(tmp_path, second, where, part):
    path = write_xml(tmp_path / "train" / "a.xml", FINE, "\n", second)
    message = complaint(load_examples, "webnlg", "train", tmp_path)
    assert message.startswith(f"{path}{where}") and part in message


def test_files_without_entries_and_huge_files(tmp_path, monkeypatch):
    path = write_xml(tmp_path / "train" / "a.xml")
    assert "no texts for WebNLG's train" in complaint(load_examples, "webnlg", "train", tmp_path)
    monkeypatch.setattr(triples, "MAX_XML_BYTES", path.stat().st_size - 1)
    assert complaint(load_examples, "webnlg", "train", tmp_path).startswith(f"{path} has more than")
    path.write_text("<a>" * 200_000)
    monkeypatch.setattr(triples, "MAX_XML_BYTES", 2**20)
    assert "not valid XML" in complaint(load_examples, "webnlg", "train", tmp_path)


def test_input_of_a_user():
    for task in ("webnlg", "dart"):
        for text in (PILOT, f"| {PILOT}", f" |  {PILOT}\n|", PILOT.replace(" | ", "  |\t")):
            assert format_source(task, text) == f"| {PILOT}"
        assert format_source(task, "A : url : http://b.c:80/|d") == "| A : url : http://b.c:80/|d"
        assert format_source(task, "A : title : B : C") == "| A : title : B : C"
        for text in ("Alan Bean", "a : b", "a:b:c", "a : b : c | d", "a : b : c | | d : e : f", " : b : c", "a :  : c"):
            message = complaint(format_source, task, text)
            assert "subject : property : object" in message and "Alan_Bean" in message
    assert "is empty" in complaint(format_source, "webnlg", " ")


# ---- DART ----


@needs_dart
def test_real_dart():
    examples = load_examples("dart", "dev", DATA / "dart")
    entries = json.loads((DATA / "dart" / "dart-v1.1.1-full-dev.json").read_text(encoding="utf-8"))
    assert len(entries) == 2768 and len(examples) == len({str(e["tripleset"]) for e in entries}) == 2721
    texts = Counter(" ".join(a["text"].split()) for e in entries for a in e["annotations"])
    assert Counter(reference for example in examples for reference in example.references) == texts
    source = "| Mars Hill College : JOINED : 1973 | Mars Hill College : LOCATION : Mars Hill, North Carolina"
    assert examples[0] == Example(source, ["A school from Mars Hill, North Carolina, joined in 1973."])
    message = complaint(load_examples, "dart", "train", DATA / "dart")
    assert "dart-v1.1.1-full-train.json is missing" in message and "github.com/Yale-LILY/dart" in message


def dart_entry(*texts, triples=(("a", "b", "c"),)):
    return {"tripleset": [list(t) for t in triples], "annotations": [{"source": "s", "text": text} for text in texts]}


def test_dart_rows(tmp_path, capsys):
    path = tmp_path / "dart-v1.1.1-full-test.json"
    path.write_text(json.dumps([dart_entry("x", " "), dart_entry(""), dart_entry("z", triples=[("a\n", "", "|c")]),
                                dart_entry("y")]))  # fmt: skip
    assert load_examples("dart", "test", tmp_path) == [Example("| a : b : c", ["x", "y"]), Example("| a : : |c", ["z"])]
    assert capsys.readouterr().err == f"skipped 2 empty texts of {path}\n"


@pytest.mark.parametrize(
    "bad",
    [None, [], {}, {"tripleset": [["a", "b", "c"]]}, dart_entry("x", triples=[]), dart_entry("x", triples=["ab"]),
     dart_entry(1), dart_entry("x", triples=[("a", "b", 1)]), {**dart_entry("x"), "tripleset": ["abc"]},
     {**dart_entry("x"), "annotations": 3}, {**dart_entry("x"), "tripleset": 3}],
)  # fmt: skip
def test_bad_dart(tmp_path, bad):
    path = tmp_path / "dart-v1.1.1-full-train.json"
    path.write_text(json.dumps([dart_entry("x"), bad]))
    message = complaint(load_examples, "dart", "train", tmp_path)
    assert message.startswith(f"{path}: entry 2 is not of the form") and "tripleset" in message
    for text, part in (("[{]", "not valid JSON"), ("[]", "not a JSON list"), (json.dumps([dart_entry("")]), "no texts"),
                       (json.dumps([dart_entry("\0")]), "NUL"), ('{"a": 1}', "not a JSON list")):  # fmt: skip
        path.write_text(text)
        message = complaint(load_examples, "dart", "train", tmp_path)
        assert str(path) in message and part in message


# ---- topics, low data ----


def test_topics_of_rows(tmp_path):
    rows = [
        {"source": "a", "target": "b", "topic": "news", "year": 2019},
        {"source": "c", "target": "d", "topic": ["no topic"]},
        {"source": "a", "target": "e", "topic": "sport", "year": 2020.5},
        {"source": "a", "target": "f", "topic": "news"},
    ]
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = str(tmp_path / "train.jsonl")
    merged = [Example("a", ["b", "f"], "news"), Example("c", ["d"]), Example("a", ["e"], "sport")]
    assert load_examples(own, "train") == merged
    for task, split in ((own, "all"), ("xsum", "train"), ("scitldr", "dev")):
        topics = [example.topic for example in load_examples(task, split, tmp_path)]
        assert topics == ["news", None, "sport", "news"]
        topics = [example.topic for example in load_examples(task, split, tmp_path, topic_field="year")]
        assert topics == ["2019", None, "2020.5", None]


def test_choosing_topics():
    topics = ["news", None, "sport", "arts"]
    examples = [Example(f"{i}", ["x"], topic) for i, topic in enumerate(topics)]
    assert filter_topics(examples, ["sport", "news"], "here") == [examples[0], examples[2]]
    message = complaint(filter_topics, examples, ["sport", "music"], "here")
    assert message == "here has nothing on the topic 'music': the topics there are arts, news, sport"
    assert "have no topics" in complaint(filter_topics, examples[1:2], ["news"], "here")


def test_draws_are_of_the_seed_alone():
    examples = [Example(f"{i}", [f"{i}a", f"{i}b"][: 1 + i % 2], f"{i % 3}") for i in range(40)]
    draw = sample_pairs(examples, 10, 3, "here")
    assert [e.references for e in draw[:6]] == [["15a"], ["0a"], ["2a"], ["25b"], ["25a"], ["1b"]]  # now and for ever
    assert draw == sample_pairs(examples, 10, 3, "here") == sample_pairs(examples, 25, 3, "here")[:10]
    assert draw != sample_pairs(examples, 10, 4, "here")
    everything = sample_pairs(examples, 60, 0, "here")
    assert sorted(e.references[0] for e in everything) == sorted(y for e in examples for y in e.references)
    assert all(e.references[0].startswith(e.source) and e.topic == f"{int(e.source) % 3}" for e in everything)
    message = complaint(sample_pairs, examples, 61, 0, "here")
    assert message == "here has 60 pairs of a source and a reference: 61 cannot be drawn"


def test_draws_are_even():
    examples = [Example(f"{i}", ["y"]) for i in range(20)]
    counts = Counter(e.source for seed in range(1000) for e in sample_pairs(examples, 5, seed, "here"))
    assert len(counts) == 20 and all(170 < count < 330 for count in counts.values())  # 250, standard deviation 13.7
