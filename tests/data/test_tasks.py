"""Examples are what the files say; bad input is named."""

import csv
import json
import time

import pytest

from minprefix.data import tasks
from minprefix.data.tasks import Example, format_source, linearise_e2e, load_examples, load_on_topics
from tests.helpers import E2E, complaint, needs_e2e

SIZES = {"train": (4862, 42061), "dev": (547, 4672), "test": (630, 4693)}
OFFICIAL_URL = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"


# ---- linearisation ----


@pytest.mark.parametrize(
    "mr, text",
    [
        (
            "name[Blue Spice], eatType[coffee shop], priceRange[more than £30], familyFriendly[yes]",
            "name : Blue Spice | Type : coffee shop | price : more than £30 | family friendly : yes",
        ),
        (
            "near[Café Sicilia], area[city centre], customer rating[5 out of 5], food[Chinese]",
            "near : Café Sicilia | area : city centre | customer rating : 5 out of 5 | food : Chinese",
        ),
        ("name[Fish, Chips, and Co]", "name : Fish, Chips, and Co"),
        ("colour[red],  name [ X ] ,familyFriendly[no] ", "colour : red | name : X | family friendly : no"),
        ("priceRange[£20-25]", "price : £20-25"),
    ],
)
def test_linearise(mr, text):
    assert linearise_e2e(mr) == format_source("e2e", f" {mr}\n") == text
    assert format_source("e2e", text) == text  # an input that is linearised already


BAD_MRS = [
    "", "Blue Spice", "name", "name[]", "name[ ]", "[Blue Spice]", " [X]", "name[A] area[B]", "name[A],, area[B]",
    "name[A],", ", name[A]", "name[A", "name[A]]", "name[[A]]", "name A]", "name[A], area", "name[A]; area[B]",
    "name[A] x", "name : A | area[B]", "name : A, area[B]",
]  # fmt: skip


@pytest.mark.parametrize("mr", BAD_MRS)
def test_linearise_refuses(mr):
    for message in (complaint(linearise_e2e, mr), complaint(linearise_e2e, mr, "a.csv:7")):
        assert repr(mr) in message and "slot[value]" in message
    assert message.startswith("a.csv:7: ")


@pytest.mark.parametrize("mr", ["a" * 10**6, " " * 10**6, "a[b]" * 10**5, "a[b]," * 10**5, "a[b]" + " " * 10**6 + "x"])
def test_linearise_refuses_long_text_fast(mr):
    begin = time.monotonic()
    complaint(linearise_e2e, mr)
    assert time.monotonic() - begin < 2


def test_format_source():
    assert format_source("my.jsonl", " a[b] : c\n") == format_source("jsonl", "a[b] : c") == "a[b] : c"
    assert format_source("e2e", "name[A : B]") == "name : A : B"
    assert "slot[value]" in complaint(format_source, "e2e", "Blue Spice")
    assert "slot[value]" in complaint(format_source, "e2e", "name : A | area[B]")
    assert "empty" in complaint(format_source, "e2e", "  ")
    assert "empty" in complaint(format_source, "jsonl", "")
    assert "lone surrogate" in complaint(format_source, "jsonl", "a\udcff")
    assert "NUL" in complaint(format_source, "jsonl", "a\0")


# ---- E2E files ----


@pytest.mark.slow
@needs_e2e
@pytest.mark.parametrize("split", SIZES)
def test_real_e2e(split):
    examples = load_examples("e2e", split, E2E)
    assert (len(examples), sum(len(example.references) for example in examples)) == SIZES[split]
    assert len({example.source for example in examples}) == len(examples)
    assert all(example.references for example in examples)
    back = {"Type": "eatType", "price": "priceRange", "family friendly": "familyFriendly"}
    mrs = set()
    for example in examples:
        slots = [pair.split(" : ") for pair in example.source.split(" | ")]
        mrs.add(", ".join(f"{back.get(slot, slot)}[{value}]" for slot, value in slots))
    with open(E2E / tasks.E2E_FILES[split], encoding="utf-8", newline="") as file:
        assert mrs == {row["mr"] for row in csv.DictReader(file)}


def write_e2e(folder, text, split="train"):
    folder.mkdir(exist_ok=True)
    path = folder / tasks.E2E_FILES[split]
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_grouping_keeps_the_files_order(tmp_path):
    write_e2e(tmp_path, '\ufeffid,mr,ref\r\n1,name[B],b1\r\n\r\n2,name[A],"a ""x"",\r\nand"\r\n3,name[B], b2 \r\n')
    assert load_examples("e2e", "train", tmp_path) == [
        Example("name : B", ["b1", "b2"]),
        Example("name : A", ['a "x",\r\nand']),
    ]


def test_columns_in_another_order(tmp_path):
    write_e2e(tmp_path, '"ref","mr"\n"It is A.","name[A]"', "test")
    assert load_examples("e2e", "test", str(tmp_path)) == [Example("name : A", ["It is A."])]


GOOD = 'mr,ref\nname[A],"two\nlines"\n'  # so the next row begins on line 4


@pytest.mark.parametrize(
    "text, line, part",
    [
        ("", "", "is empty"),
        ("mr,ref\n\n", "", "is empty"),
        ("mr,text\nname[A],b", ":1", "['mr', 'text']"),
        ("MR,ref\nname[A],b", ":1", "['MR', 'ref']"),
        ("name[A],b\n", ":1", "['name[A]', 'b']"),
        (GOOD + "name[B]\n", ":4", "1 fields, but the header has 2"),
        (GOOD + "name[B],b,c\n", ":4", "3 fields, but the header has 2"),
        (GOOD + "name[B],\n", ":4", "ref is empty"),
        (GOOD + "name[B],\n\n", ":4", "ref is empty"),
        (GOOD + ' ,"b"\n', ":4", "mr is empty"),
        (GOOD + "name[B],b\0\n", ":4", "NUL"),
        (GOOD + "name[B,b\n", ":4", "'name[B'"),
        (GOOD + f"name[B],{'b' * 140_000}\n", ":4", "field larger"),
        (GOOD + 'name[B],"never closed\n\n\n', ":4", "unexpected end"),
        (GOOD + 'name[B],"b"c\n', ":4", "expected after"),
        (b"mr,ref\nname[A],\xe9\n", "", "not UTF-8"),
    ],
)
def test_bad_csv(tmp_path, text, line, part):
    path = write_e2e(tmp_path, text)
    message = complaint(load_examples, "e2e", "train", tmp_path)
    assert message.startswith(f"{path}{line}") and part in message
    assert not line or message.startswith(f"{path}{line}:")


def test_missing_data(tmp_path, capsys):
    write_e2e(tmp_path, GOOD)
    for folder, split, name in ((tmp_path / "none", "train", "none"), (tmp_path, "dev", "devset.csv")):
        message = complaint(load_examples, "e2e", split, folder)
        assert str(tmp_path / name) in message and "--data" in message and OFFICIAL_URL in message
    assert capsys.readouterr().err == ""  # nothing falls back to the sample where --data was given


@pytest.mark.parametrize("task", ["e3e", "a.json", ""])
def test_unknown_task(task):
    message = complaint(load_examples, task, "train")
    assert message.startswith(f"there is no task {task!r}: ") and "e2e" in message and "FILE.jsonl" in message


@pytest.mark.parametrize("task, split, known", [("e2e", "all", "train, dev, test"), ("a.jsonl", "valid", "all")])
def test_unknown_split(task, split, known):
    message = complaint(load_examples, task, split)
    assert message.startswith(f"there is no split {split!r} of {task}: ") and known in message


# ---- own data ----


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(n, start=0):
    return [{"source": f"s{i}", "target": f"t{i}"} for i in range(start, start + n)]


def sources(task, split):
    return [int(example.source[1:]) for example in load_examples(task, split)]


def test_jsonl_rows(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [
        '\ufeff{"source": " x : y ", "target": "z\\u2028ü", "id": 3}',
        "",
        '{"references": ["a", "b[c]\\n"], "source": "raw \u2028 line separator"}\r',
        '{"source": "unlabelled"}',
        '{"source": "unlabelled", "references": []}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert (
        load_examples(str(path), "all")
        == load_examples("own.jsonl", "all", tmp_path)
        == [
            Example("x : y", ["z\u2028ü"]),
            Example("raw \u2028 line separator", ["a", "b[c]"]),
            Example("unlabelled", []),
            Example("unlabelled", []),
        ]
    )
    for split in SIZES:
        message = complaint(load_examples, str(path), split)
        assert message.startswith(f"{path}:4: ") and "the row has no reference" in message


@pytest.mark.parametrize("n, held_out", [(2, 1), (10, 1), (19, 1), (20, 2), (4999, 499), (6000, 500)])
def test_held_out_sources(tmp_path, n, held_out):
    task = write_jsonl(tmp_path / "own.jsonl", numbered(n))
    write_jsonl(tmp_path / "dev.jsonl", numbered(3))  # not beside a train.jsonl: not ours
    assert sources(task, "all") == list(range(n))
    dev, train = sources(task, "dev"), sources(task, "train")
    assert len(dev) == held_out and sorted(train + dev) == list(range(n)) and sources(task, "test") == dev
    assert all(i * n // held_out <= source < (i + 1) * n // held_out for i, source in enumerate(dev))  # of all the file


def test_held_out_sources_are_the_same_for_ever(tmp_path):
    task = write_jsonl(tmp_path / "own.jsonl", numbered(50))
    assert sources(task, "dev") == [8, 16, 25, 32, 43]


@pytest.mark.parametrize("topic", [lambda i: i // 20, lambda i: i % 2], ids=["sorted", "in turns"])
def test_held_out_sources_are_of_all_topics_and_on_one_side(tmp_path, topic):
    rows = [{**row, "topic": topic(i)} for i, row in enumerate(numbered(200))]
    again = [{**row, "topic": "again"} for row in rows]
    task = write_jsonl(tmp_path / "own.jsonl", rows + again)
    train, dev = sources(task, "train"), sources(task, "dev")
    assert len(set(dev)) == 20 and not set(train) & set(dev) and len(train + dev) == 400
    for name in {str(topic(i)) for i in range(200)}:
        assert load_on_topics(task, "dev", topics=[name])


def test_files_beside_train_jsonl(tmp_path):
    task = write_jsonl(tmp_path / "train.jsonl", numbered(20))
    splits = ("train", "dev", "test")
    rest, held_out, test = (sources(task, split) for split in splits)
    assert len(held_out) == 2 and test == held_out and sorted(rest + held_out) == list(range(20))
    write_jsonl(tmp_path / "test.jsonl", numbered(2, 200))
    assert [sources(task, split) for split in splits] == [rest, held_out, [200, 201]]
    write_jsonl(tmp_path / "dev.jsonl", numbered(2, 100))
    assert [sources(task, split) for split in splits] == [list(range(20)), [100, 101], [200, 201]]
    (tmp_path / "test.jsonl").unlink()
    assert [sources(task, split) for split in splits] == [list(range(20)), [100, 101], [100, 101]]
    assert sources(task, "all") == list(range(20))
    for name in ("dev", "test"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"source": "s"}])
        assert complaint(load_examples, task, name).startswith(f"{path}:1: the row has no reference")


OK_ROW = '\n{"source": "a", "target": "b"}\n'  # so the next row is on line 3


@pytest.mark.parametrize(
    "text, line, part",
    [
        ("", "", "is empty"),
        ("\n \n", "", "is empty"),
        (OK_ROW + "source: x", 3, "not valid JSON"),
        (OK_ROW + '{"source": "a"', 3, "not valid JSON"),
        (OK_ROW + "[" * 100_000, 3, "not valid JSON"),
        (OK_ROW + '{"source": "a", "target": ' + "1" * 5000 + "}", 3, "not valid JSON"),
        (OK_ROW + '["a", "b"]', 3, "not an object"),
        (OK_ROW + "null", 3, "not an object"),
        (OK_ROW + '{"src": "a", "target": "b"}', 3, "the row has no \"source\", its keys are ['src', 'target']"),
        (OK_ROW + '{"source": 1, "target": "b"}', 3, "source is a JSON int"),
        (OK_ROW + '{"source": {"a": 1}, "target": "b"}', 3, "source is a JSON dict"),
        (OK_ROW + '{"source": "", "target": "b"}', 3, "source is empty"),
        (OK_ROW + '{"source": "a", "target": null}', 3, "target is a JSON NoneType"),
        (OK_ROW + '{"source": "a", "target": {"b": 1}}', 3, "target is a JSON dict"),
        (OK_ROW + '{"source": "a", "target": " "}', 3, "target is empty"),
        (OK_ROW + '{"source": "a", "target": "\\ud83d"}', 3, "lone surrogate"),
        (OK_ROW + '{"source": "a\\u0000", "target": "b"}', 3, "NUL"),
        (OK_ROW + '{"source": "a", "references": "b"}', 3, "references is a JSON str"),
        (OK_ROW + '{"source": "a", "references": ["b", 1]}', 3, "reference is a JSON int"),
        (OK_ROW + '{"source": "a", "references": ["b", ""]}', 3, "reference is empty"),
        (OK_ROW + '{"source": "a", "target": "b", "references": "c"}', 3, "references is a JSON str"),
    ],
)
def test_bad_jsonl(tmp_path, text, line, part):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    for split in ("all", "train", "dev"):
        message = complaint(load_examples, str(path), split)
        assert message.startswith(f"{path}:{line}: " if line else f"{path} ") and part in message


def test_too_few_rows(tmp_path):
    task = write_jsonl(tmp_path / "train.jsonl", numbered(1))
    for split in SIZES:
        message = complaint(load_examples, task, split)
        assert message.startswith(f"{task} has only one source") and "add rows" in message
    assert sources(task, "all") == [0]
    write_jsonl(tmp_path / "dev.jsonl", numbered(1))
    assert sources(task, "train") == sources(task, "dev") == [0]


def test_target_and_references_of_a_row_are_taken_together(tmp_path):
    rows = [{"source": "a", "target": "b", "references": ["c", "b"]}, {"source": "d", "target": "e", "references": []}]
    assert load_examples(write_jsonl(tmp_path / "own.jsonl", rows), "all") == [
        Example("a", ["b", "c"]), Example("d", ["e"]),
    ]  # fmt: skip


def test_the_test_split_of_test_jsonl_is_all_of_it(tmp_path, capsys):
    rows = [{"source": str(i // 2), "target": f"{i}"} for i in range(40)]
    task = write_jsonl(tmp_path / "test.jsonl", rows)
    examples = load_examples(task, "test")
    assert examples == [Example(str(i), [str(2 * i), str(2 * i + 1)]) for i in range(20)]
    assert load_examples(task, "test") == examples
    said = f"{task}: 40 rows are 20 inputs: those with the same source are one\n"
    assert capsys.readouterr().err == said  # once
    assert len(load_examples(task, "dev")) == 2


def test_own_rows_may_be_csv(tmp_path):
    """As Python's csv module writes them: quoted line ends, blank lines, a byte-order mark."""
    pairs = [(f"item {i}, of\n{i}", f'"{i}" ist schön') for i in range(20)]
    with open(tmp_path / "own.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("id", "source", "target"), (), *((i, *pair) for i, pair in enumerate(pairs))])
    task = str(tmp_path / "own.csv")
    assert [(e.source, *e.references) for e in load_examples(task, "all")] == pairs
    train, dev = load_examples(task, "train"), load_examples(task, "dev")
    assert len(train) == 18 and len(dev) == 2 and load_examples(task, "test") == dev
    (tmp_path / "own.csv").write_text("source,target\na,b\n,c\n")
    assert complaint(load_examples, task, "all") == f"{task}:3: source is empty"
    (tmp_path / "own.csv").write_text("src,target\na,b\n")
    assert "['src', 'target'], but source" in complaint(load_examples, task, "all")
    (tmp_path / "own.csv").write_text("source,target\n")
    assert "is empty" in complaint(load_examples, task, "all")


@pytest.mark.slow
@needs_e2e
@pytest.mark.parametrize("split", SIZES)
def test_e2e_in_the_lines_of_the_papers_authors(split, tmp_path):
    """mr||text, the mr linearised: the same examples as from the release's CSV files, which are taken first."""
    expected = load_examples("e2e", split, E2E)
    for example in expected:
        example.references = [" ".join(reference.splitlines()) for reference in example.references]  # one has two lines
    name = {"train": "src1_train.txt", "dev": "src1_valid.txt", "test": "src1_test.txt"}[split]
    lines = [f"{e.source} || {reference}\n" for e in expected for reference in e.references]
    (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    assert load_examples("e2e", split, tmp_path) == expected
    (tmp_path / name).write_text("name : A||B\nname : A | B\n")
    assert f"{name}:2: 'name : A | B' is not of the form mr||text" in complaint(load_examples, "e2e", split, tmp_path)
    (tmp_path / name).write_text("")
    assert f"{name} is empty" in complaint(load_examples, "e2e", split, tmp_path)


def test_missing_jsonl(tmp_path):
    message = complaint(load_examples, str(tmp_path / "none.jsonl"), "train")
    assert str(tmp_path / "none.jsonl") in message and '{"source": "...", "target": "..."}' in message
    assert "is missing" in complaint(load_examples, ".jsonl", "all", tmp_path)
