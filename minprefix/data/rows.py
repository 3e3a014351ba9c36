"""Reading JSONL and CSV files of rows: a user's data, and the tasks' files in these formats."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minprefix.core.encode import Example
from minprefix.data.examples import check_text, collapse_whitespace, group_by_source, held_out
from minprefix.system.errors import InputError, print_once
from minprefix.system.files import read_text


def load_rows(path: Path, split: str, topic_field: str) -> list[Example]:
    """The Examples of a split of a user's file; the splits are described at `load_examples`."""
    if split == "all":
        return read_rows(path, topic_field)
    dev, test = path.with_stem("dev"), path.with_stem("test")
    has_dev, has_test = (path.stem == "train" and file.is_file() for file in (dev, test))
    if split == "test" and (has_test or path == test):
        return group_rows(read_rows(test, topic_field, labelled=True), test)
    if split != "train" and has_dev:
        return group_rows(read_rows(dev, topic_field, labelled=True), dev)
    rows = read_rows(path, topic_field, labelled=True)
    examples = group_by_source(rows) if split == "train" else group_rows(rows, path)
    if has_dev:
        return examples
    sources = list(dict.fromkeys(example.source for example in examples))  # one may occur with several topics
    if len(sources) < 2:
        raise InputError(f"{path} has only one source, and one is held out for dev losses: add rows with other sources")
    dev_sources = held_out(sources)
    return [example for example in examples if (example.source in dev_sources) == (split != "train")]


def group_rows(examples: list[Example], path: object) -> list[Example]:
    """Merge a user's rows with the same source and topic into one Example; a message on stderr counts them."""
    grouped = group_by_source(examples)
    if len(grouped) < len(examples):  # printed once, though a file is read for several splits
        print_once(f"{path}: {len(examples):,} rows are {len(grouped):,} inputs: those with the same source are one")
    return grouped


def read_rows(path: Path, topic_field: str, labelled: bool = False) -> list[Example]:
    """The Examples of a JSONL or CSV file, in order; labelled: InputError if one has no reference."""
    rows = csv_rows(path) if path.suffix == ".csv" else json_rows(path)
    examples = [parse_row(row, f"{path}:{number}", topic_field, labelled) for number, row in rows]
    if not examples:
        raise InputError(f"{path} is empty: expected rows with a source and a target")
    return examples


def parse_row(row: dict[str, Any], where: str, topic_field: str, labelled: bool = False) -> Example:
    """A row of a JSONL or CSV file as an Example; labelled: InputError if it has no reference.

    The source is the value of "source" or "document": a string, or a list of sentences, which are joined by spaces. The
    references are the value of "target" or "summary", a string or a list of strings, and the list "references". The
    topic is the value of topic_field, if that is a string or a number. Other keys are ignored.
    """
    x = next((key for key in ("source", "document") if key in row), None)
    if x is None:
        raise InputError(f'{where}: the row has no "source", its keys are {list(row)!r:.200}')
    source, references = row[x], []
    if isinstance(source, list):
        if not all(isinstance(sentence, str) for sentence in source):
            raise InputError(f"{where}: {x} is a list of other things than strings: give a string, or a list of them")
        source = collapse_whitespace(" ".join(source))  # SciTLDR's sentences end with line breaks, and one is blank
    for y in ("target" if {"target", "references"} & row.keys() else "summary", "references"):
        value = row.get(y, [])
        texts = [value] if isinstance(value, str) and y != "references" else value
        if not isinstance(texts, list):
            needed = "a list of strings" if y == "references" else "a string or a list of strings"
            raise InputError(f"{where}: {y} is a JSON {type(value).__name__}, {needed} is needed")
        kind = y if texts is not value else "a reference"
        texts = [check_text(text, f"{where}: {kind}") for text in texts]
        references += [text for text in texts if text not in references]  # "references" may repeat the target
    if labelled and not references:
        raise InputError(f'{where}: the row has no reference: add "target" or "references"')
    topic = row.get(topic_field)
    topic = str(topic) if isinstance(topic, (str, int, float)) else None
    return Example(check_text(source, f"{where}: {x}"), references, topic)


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for each line of a JSONL file that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would also split at U+2028
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise InputError(f"{where}: not valid JSON ({reason}), a .jsonl file has one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f'{where}: {line!r:.50} is not an object like {{"source": "...", "target": "..."}}')
        yield number, row


def csv_rows(path: Path, needed: Sequence[str] = ("source",)) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, {column: value}) for each row of a CSV file; InputError if its header lacks a needed column."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    while True:
        number = reader.line_num + 1  # the line on which a row begins
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}:{number}: not valid CSV from here on ({error})") from error
        if row is None:
            return
        if not row:
            continue  # a blank line
        if header and len(row) != len(header):
            raise InputError(f"{path}:{number}: {len(row)} fields, but the header has {len(header)}")
        if header:
            yield number, dict(zip(header, row, strict=True))
        elif set(needed) <= set(row):
            header = row
        else:
            raise InputError(f"{path}:{number}: the columns are {row!r:.200}, but {' and '.join(needed)} are needed")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file (or of stdin, for "-"), without an empty one after the last line end."""
    text = read_text(path)
    if "\r" in text and "\n" not in text:
        raise InputError(f"{path} has old Mac line ends (CR alone): save it with LF or CRLF line ends")
    lines = text.split("\n")  # splitlines would also split at U+2028
    return lines if lines[-1] else lines[:-1]
