"""XSum, in each of its layouts, and SciTLDR are read row by row as they are; what is wrong is named with its line."""

import json
import re

import numpy as np
import pytest

from minprefix.data.tasks import Example, format_source, load_examples
from tests.helpers import complaint
from tests.tiny import ROOT

SCITLDR = ROOT.parent / "shared" / "data" / "scitldr"
ROWS = {"train": 1992, "dev": 619, "test": 618}
needs_scitldr = pytest.mark.skipif(not SCITLDR.is_dir(), reason="the SciTLDR files are not at ../shared/data/scitldr")


def write_lines(folder, documents, summaries, name="train", end="\n"):
    for ending, texts in ((".source", documents), (".target", summaries)):
        (folder / f"{name}{ending}").write_bytes("".join(text + end for text in texts).encode())
    return folder / f"{name}.source"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def err_lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


# ---- XSum ----


def test_both_layouts_of_xsum_say_the_same(tmp_path, capsys):
    """Random texts with every kind of white space: one Example a row, in order, as written but for the blanks."""
    rng = np.random.default_rng(0)
    words = ["a", "b,", "£5", "é", "[c]", "d\u200be", "<n>", "🙂", '"q"', "\\n"]
    blanks = [" ", "  ", "\t", "\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\xa0"]  # splitlines splits at five of them
    for trial, end in enumerate(["\n", "\r\n", "\n"]):
        expected, raw = [], []
        for _ in range(60):
            texts = [rng.choice(words, rng.integers(1, 9)).tolist() for _ in "xy"]
            expected.append(Example(" ".join(texts[0]), [" ".join(texts[1])]))
            raw.append(["".join(word + str(rng.choice(blanks)) for word in text) for text in texts])
        expected, raw = expected + expected[:2], raw + raw[:2]  # rows with one document stay apart
        folders = [tmp_path / f"{layout}{trial}" for layout in ("lines", "rows", "renamed")]
        for folder in folders:
            folder.mkdir()
        for names, split in ((("train", "train", "train"), "train"), (("val", "validation", "dev"), "dev")):
            documents, summaries = zip(*raw, strict=True)
            write_lines(folders[0], documents, summaries, names[0], end)
            rows = [{"id": "1", "summary": y, "document": x.replace(" ", "\n")} for x, y in raw]
            write_rows(folders[1] / f"{names[1]}.jsonl", rows)
            write_rows(folders[2] / f"{names[2]}.json", [{"source": x, "target": y} for x, y in raw])
            for folder in folders:
                assert load_examples("xsum", split, str(folder)) == expected
    assert err_lines(capsys) == []


@pytest.mark.parametrize("name, split", [("val", "dev"), ("validation", "dev"), ("dev", "dev"), ("test", "test")])
def test_names_of_splits(tmp_path, name, split):
    write_lines(tmp_path, ["x"], ["y"], name)
    assert load_examples("xsum", split, tmp_path) == [Example("x", ["y"])]
    for other in {"train", "dev", "test"} - {split}:
        message = complaint(load_examples, "xsum", other, tmp_path)
        assert str(tmp_path) in message and f"no {other} split" in message
        assert "{train,val,test}.source" in message and '"document"' in message and f"{other}.jsonl" in message


@pytest.mark.parametrize("ends", [("", ""), ("\n", ""), ("\n\n", "\n"), ("\n \r\n\n", "\n"), ("\n", "\n\n\n\n")])
def test_blank_lines_at_the_end(tmp_path, capsys, ends):
    (tmp_path / "test.source").write_bytes(b"\xef\xbb\xbfa\nb" + ends[0].encode())
    (tmp_path / "test.target").write_bytes(b"\xef\xbb\xbfc\nd" + ends[1].encode())
    assert load_examples("xsum", "test", tmp_path) == [Example("a", ["c"]), Example("b", ["d"])]
    assert err_lines(capsys) == []


def test_blank_lines_on_both_sides_are_skipped_too(tmp_path, capsys):
    write_lines(tmp_path, ["a", " ", "b"], ["c", "\r", "d"])
    assert [example.source for example in load_examples("xsum", "train", tmp_path)] == ["a", "b"]
    assert "skipped 1 row of" in capsys.readouterr().err


def test_line_ends_of_old_macs_are_refused(tmp_path):
    path = write_lines(tmp_path, ["a"], ["c"])
    path.write_bytes(b"a\rb\rc")
    assert complaint(load_examples, "xsum", "train", tmp_path).startswith(f"{path} has old Mac line ends (CR alone)")


@pytest.mark.parametrize("documents, summaries", [(3, 2), (2, 3), (0, 1), (5, 0)])
def test_numbers_of_lines_differ(tmp_path, documents, summaries):
    path = write_lines(tmp_path, ["x"] * documents, ["y"] * summaries)
    message = complaint(load_examples, "xsum", "train", tmp_path)
    assert f"{path} and {tmp_path / 'train.target'} have {documents} and {summaries} lines: " in message


@pytest.mark.parametrize("split, name", [("train", "train"), ("dev", "val"), ("test", "test")])
def test_empty_texts_are_skipped_and_counted(tmp_path, capsys, split, name):
    texts = [("a", "b"), ("", "no document"), ("c", "d"), ("no summary", " \t"), ("e", "f"), ("", "at the end")]
    whole = [Example("a", ["b"]), Example("c", ["d"]), Example("e", ["f"])]
    path = write_lines(tmp_path, *zip(*texts, strict=True), name)
    assert load_examples("xsum", split, tmp_path) == whole
    files = f"{tmp_path / name}.{{source,target}}"
    assert err_lines(capsys) == [f"skipped 3 rows of {files} with an empty document or summary, first at line 2"]

    path.unlink()
    path = write_rows(tmp_path / f"{name}.jsonl", [{"document": x, "summary": y} for x, y in texts[:3]])
    path.write_text("\n" + path.read_text())  # a blank line, so that row 2 is on line 3
    assert load_examples("xsum", split, tmp_path) == whole[:2]
    assert err_lines(capsys) == [f"skipped 1 row of {path} with an empty document or summary, first at line 3"]


def test_no_row_is_left(tmp_path, capsys):
    write_lines(tmp_path, ["", ""], ["a", "b"])
    assert "no row with a document and a summary" in complaint(load_examples, "xsum", "train", tmp_path)
    for name in ("val.source", "val.target", "test.jsonl"):
        (tmp_path / name).write_text("\n\n" if name == "val.source" else "")
    for split in ("dev", "test"):
        message = complaint(load_examples, "xsum", split, tmp_path)
        assert "no row with a document and a summary" in message
    assert err_lines(capsys) == []


def test_half_of_a_pair_and_two_copies(tmp_path):
    path = write_lines(tmp_path, ["x"], ["y"])
    write_rows(tmp_path / "train.jsonl", [{"document": "x", "summary": "y"}])
    message = complaint(load_examples, "xsum", "train", tmp_path)
    assert "train.source and as train.jsonl" in message and "keep one" in message
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.target").unlink()
    assert complaint(load_examples, "xsum", "train", tmp_path).startswith(f"{tmp_path / 'train.target'} is missing")
    path.unlink()
    (tmp_path / "train.target").write_text("y\n")
    assert "no train split" in complaint(load_examples, "xsum", "train", tmp_path)


@pytest.mark.parametrize(
    "line, part",
    [
        ('{"document": "a"}', "the row has no reference"),
        ('{"summary": "a"}', 'the row has no "source"'),
        ('{"document": null, "summary": "a"}', "document is a JSON NoneType"),
        ('{"document": "a", "summary": 3}', "summary is a JSON int"),
        ('{"document": "a", "summary": "\\ud83d"}', "lone surrogate"),
        ("document,summary", "not valid JSON"),
        ('["a", "b"]', "not an object"),
    ],
)
def test_bad_row(tmp_path, line, part):
    path = tmp_path / "train.jsonl"
    path.write_text('{"document": "a", "summary": "b"}\n\n' + line)
    message = complaint(load_examples, "xsum", "train", tmp_path)
    assert message.startswith(f"{path}:3: ") and part in message


def test_bad_line(tmp_path):
    path = write_lines(tmp_path, ["a", "b"], ["c", "d\0"])
    message = complaint(load_examples, "xsum", "train", tmp_path)
    assert message.startswith(f"{tmp_path}/train.{{source,target}}:2: target holds a NUL")
    path.write_bytes(b"a\n\xe9\n")
    assert complaint(load_examples, "xsum", "train", tmp_path).startswith(f"{path} is not UTF-8")


@pytest.mark.parametrize("task", ["xsum", "scitldr"])
def test_folder_is_needed(tmp_path, task):
    message = complaint(load_examples, task, "train")
    assert task in message and "--data" in message and "train" in message
    message = complaint(load_examples, task, "train", tmp_path / "none")
    assert message.startswith(f"there is no folder {tmp_path / 'none'}: expected")
    message = complaint(load_examples, task, "validation", tmp_path)
    assert f"'validation' of {task}" in message and "train, dev, test" in message


# ---- SciTLDR ----


@needs_scitldr
@pytest.mark.parametrize("split", ROWS)
def test_real_scitldr(split, capsys):
    examples = load_examples("scitldr", split, SCITLDR)
    rows = [json.loads(line) for line in (SCITLDR / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert len(examples) == len(rows) == ROWS[split]
    for example, row in zip(examples, rows, strict=True):
        assert example.source.split() == [word for sentence in row["source"] for word in sentence.split()]
        assert [y.split() for y in example.references] == [y.split() for y in row["target"]]
        for text in (example.source, *example.references):
            assert text and text == text.strip() and not re.search(r"[^\S ]|  ", text)
    counts = {len(example.references) for example in examples}
    assert counts == {"train": {1}, "dev": {1, 2, 3, 4}, "test": {2, 3, 4}}[split]
    assert err_lines(capsys) == []


def test_scitldr_rows(tmp_path):
    rows = [
        {"source": ["One.\n", "\t", " Two\nlines. ", "Three."], "target": [" y\n z"], "title": "t", "paper_id": 1},
        {"source": "One. Two\nlines.", "target": "y"},
        {"source": ["One."], "target": ["a", "b", "a"]},
    ]
    write_rows(tmp_path / "dev.jsonl", rows + rows[:1])
    first = Example("One. Two lines. Three.", ["y z"])
    assert load_examples("scitldr", "dev", tmp_path) == [
        first, Example("One. Two lines.", ["y"]), Example("One.", ["a", "b", "a"]), first,
    ]  # fmt: skip
    message = complaint(load_examples, "scitldr", "test", tmp_path)
    assert message.startswith(f"{tmp_path / 'test.jsonl'} is missing: expected {{train,dev,test}}.jsonl")


@pytest.mark.parametrize(
    "row, part",
    [
        ({"source": ["a"], "target": []}, "the row has no reference"),
        ({"source": ["a"]}, "the row has no reference"),
        ({"source": ["a"], "target": ["b", " "]}, "a reference is empty"),
        ({"source": ["a"], "target": ["b", 1]}, "a reference is a JSON int"),
        ({"source": ["a"], "target": [["b"]]}, "a reference is a JSON list"),
        ({"source": ["a", 1], "target": ["b"]}, "source is a list of other things than strings"),
        ({"source": ["a", None], "target": ["b"]}, "source is a list of other things than strings"),
        ({"source": [" ", "\n"], "target": ["b"]}, "source is empty"),
        ({"source": [], "target": ["b"]}, "source is empty"),
        ({"source": ["a", "\0"], "target": ["b"]}, "NUL"),
    ],
)
def test_bad_scitldr_row(tmp_path, row, part):
    path = write_rows(tmp_path / "train.jsonl", [{"source": ["a"], "target": ["b"]}, row])
    message = complaint(load_examples, "scitldr", "train", tmp_path)
    assert message.startswith(f"{path}:2: ") and part in message


# ---- one parser for all ----


def test_own_jsonl_may_have_these_keys(tmp_path):
    rows = [
        {"document": "a\nb", "summary": "c"},
        {"source": ["a\n", "b"], "target": ["c", "d\ne"]},
        {"document": "doc1.txt", "source": "x", "target": "y", "summary": 3},  # source and target come first
        {"document": "x", "summary": "no", "references": []},
        {"document": "x"},
    ]
    path = write_rows(tmp_path / "own.jsonl", rows)
    assert load_examples(str(path), "all") == [
        Example("a\nb", ["c"]), Example("a b", ["c", "d\ne"]), Example("x", ["y"]), Example("x", []), Example("x", []),
    ]  # fmt: skip
    assert load_examples(str(write_rows(path, rows[:3])), "dev") == [Example("x", ["y"])]


def test_format_source():
    for task in ("xsum", "scitldr"):
        assert format_source(task, " a[b]\u2028 c :\r\n\n d\xa0") == "a[b] c : d"
        assert "the input is empty" in complaint(format_source, task, " \n")
    assert format_source("jsonl", " a\n b ") == "a\n b"
