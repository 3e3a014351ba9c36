"""The tasks' examples: E2E, XSum, SciTLDR, WebNLG and DART (see triples.py), a user's JSONL or CSV (see rows.py)."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minprefix.core.encode import Example
from minprefix.data.download import GET_E2E, find_e2e
from minprefix.data.examples import EmptyText, check_text, collapse_whitespace, filter_topics, group_by_source
from minprefix.data.rows import csv_rows, json_rows, load_rows, parse_row, read_lines, read_rows
from minprefix.data.sample_e2e import sample_rows
from minprefix.data.triples import DART_LAYOUT, WEBNLG_LAYOUT, linearise_triples, load_dart, load_webnlg, split_triples
from minprefix.system.errors import InputError, print_once

E2E_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
E2E_LINES = {"train": "src1_train.txt", "dev": "src1_valid.txt", "test": "src1_test.txt"}  # the paper authors' files
SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}  # others are not renamed
SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
SPLITS = ("train", "dev", "test")
WEBNLG_SPLITS = (*SPLITS, "test_seen", "test_unseen")
TRIPLES = ("webnlg", "dart")
SUMMARISATION = ("xsum", "scitldr")  # decoded and scored differently from table-to-text
TASKS = ("e2e", *TRIPLES, *SUMMARISATION)
ROW_SUFFIXES = (".jsonl", ".csv")  # file name extensions of a user's data
XSUM_NAMES = {"train": ["train"], "dev": ["val", "validation", "dev"], "test": ["test"]}  # file names of each split
XSUM_LAYOUT = (
    "expected {train,val,test}.source with {train,val,test}.target, a document and its summary a line, or "
    '{train,val,test}.jsonl of rows {"document": "...", "summary": "..."}; "validation" or "dev" will do for "val"'
)
SCITLDR_LAYOUT = 'expected {train,dev,test}.jsonl of rows {"source": [sentences], "target": [references]}'
LAYOUTS = {"e2e": GET_E2E, "webnlg": WEBNLG_LAYOUT, "dart": DART_LAYOUT, "xsum": XSUM_LAYOUT, "scitldr": SCITLDR_LAYOUT}

PAIR = r"([^\[\],:|]+)\[([^\[\]]+)\]\s*"  # linear time: no two adjacent parts match the same character


# ---- tasks -> examples ----


def load_examples(task: str, split: str, data: str | Path | None = None, topic_field: str = "topic") -> list[Example]:
    """The Examples of a task's split. data: the folder of the task's files; topic_field: the key of a row's topic.

    "e2e": split train, dev or test; one Example for each distinct mr, in the file's order. The folder is chosen by
    `find_e2e`. If it has no CSV files, the authors' src1_{train,valid,test}.txt with lines `mr||text` are read.

    "webnlg" and "dart": one Example for each distinct set of triples; in WebNLG its topic is the category. For splits,
    files and omitted texts see `load_webnlg` and `load_dart`.

    "xsum" and "scitldr": split train, dev or test; one Example for each row, in the file's order, with white space
    collapsed to single spaces. They are not downloaded, so `data` is needed. XSum is read from the text files
    NAME.source and NAME.target (line n of one is the document, line n of the other its summary) or from NAME.jsonl (or
    .json, with one object per line) of rows {"document": x, "summary": y}, where NAME is train, test or, for dev, val,
    validation or dev. Rows with an empty document or summary are skipped with a message on stderr. SciTLDR is read from
    train.jsonl, dev.jsonl and test.jsonl of rows {"source": [sentence, ...], "target": [y, ...]}.

    "FILE.jsonl" with rows {"source": x, "target": y}, {"source": x, "references": [y, ...]} or others that `parse_row`
    reads, or "FILE.csv" with the columns source and target. Split "all" is every row, with or without references. For
    other splits each row needs a reference, and rows with the same source and topic become one Example. "dev" is a
    tenth of the sources (see `held_out`), "train" the others, "test" the same as "dev". But if the file is called
    train.jsonl, dev.jsonl in its folder is used for "dev", if it exists, without holding anything out, and test.jsonl
    for "test". Split "test" of test.jsonl is the whole file.
    """
    splits = WEBNLG_SPLITS if task == "webnlg" else SPLITS if task in TASKS else (*SPLITS, "all")
    if split not in splits:
        raise InputError(f"there is no split {split!r} of {task}: known are {', '.join(splits)}")
    check_task_files(task, data)
    if task == "e2e":
        return load_e2e(split, find_e2e(data))
    folder = Path(data or "")
    if task == "webnlg":
        return load_webnlg(split, folder)
    if task == "dart":
        return load_dart(split, folder)
    if task == "xsum":
        return load_xsum(split, folder, topic_field)
    if task == "scitldr":
        return load_scitldr(split, folder, topic_field)
    return load_rows(folder / task, split, topic_field)


def check_task_files(task: str, data: str | Path | None) -> None:
    """Raise InputError if the task is unknown or its files cannot exist; called before anything is read or loaded."""
    if task not in TASKS:
        if not task.endswith(ROW_SUFFIXES):
            known = f"{', '.join(TASKS)}, and FILE.jsonl or FILE.csv with your own rows"
            raise InputError(f"there is no task {task!r}: known are {known}")
        path = Path(data or "", task)
        if not path.is_file():
            raise InputError(f'{path} is missing: expected a file of rows like {{"source": "...", "target": "..."}}')
    elif data is None and task != "e2e":
        raise InputError(f"{task} is not downloaded: give --data a folder with its files: {LAYOUTS[task]}")
    elif data is not None and not Path(data).is_dir():
        raise InputError(f"there is no folder {data}: {LAYOUTS[task]}")


def load_on_topics(
    task: str, split: str, data: str | Path | None = None, topics: Sequence[str] | None = None,
    topic_field: str = "topic",
) -> list[Example]:  # fmt: skip
    """As `load_examples`, but only the Examples on these topics (see `filter_topics`)."""
    return filter_topics(load_examples(task, split, data, topic_field), topics, f"{task}, {split} split")


def format_source(task: str, text: str, where: str = "the input") -> str:
    """A user's input in the format of the task's sources. where: the input's name, for errors.

    E2E: an mr is linearised, a linearised one kept; slots that E2E does not have are named on stderr. WebNLG and DART:
    triples, `Alan_Bean : occupation : Test_pilot | Alan_Bean : nationality : United_States`. Summarisation: white space
    is collapsed. A user's JSONL: unchanged, except for white space around the text.
    """
    text = check_text(text, where)
    if task == "e2e" and ("[" in text or " : " not in text):
        linearised = linearise_e2e(text, where)  # first: in a text that is no mr, findall takes quadratic time
        for slot in [slot.strip() for slot, _ in re.findall(PAIR, text)]:
            if slot not in (*SLOTS, *SLOT_NAMES.values()):
                print_once(f"{slot!r:.80} is no slot of E2E's: it has {', '.join(SLOTS)}")
        return linearised
    if task in TRIPLES:
        return linearise_triples(split_triples(text, where))
    return collapse_whitespace(text) if task in SUMMARISATION else text


def linearise_e2e(mr: str, where: str = "the input") -> str:
    """`name[Blue Spice], eatType[pub]` -> `name : Blue Spice | Type : pub`."""
    pairs = re.findall(PAIR, mr) if re.fullmatch(f"{PAIR}(?:,{PAIR})*", mr) else []
    pairs = [(slot.strip(), value.strip()) for slot, value in pairs]
    if not pairs or not all(slot and value for slot, value in pairs):
        raise InputError(
            f"{where}: {mr!r:.200} is not an E2E meaning representation: expected slot[value] pairs, "
            "as in `name[Blue Spice], eatType[coffee shop]`"
        )
    return " | ".join(f"{SLOT_NAMES.get(slot, slot)} : {value}" for slot, value in pairs)


def load_e2e(split: str, folder: Path | None) -> list[Example]:
    """The Examples of an E2E split from a folder, or from the bundled sample if `folder` is None."""
    if folder is None:
        rows = [(f"bundled {split} sample", mr, ref) for mr, ref in sample_rows(split)]
    elif (lines := folder / E2E_LINES[split]).is_file() and not (folder / E2E_FILES[split]).exists():
        return group_by_source(read_e2e_lines(lines))
    else:
        rows = read_e2e_csv(folder / E2E_FILES[split])
    return group_by_source([Example(linearise_e2e(mr, where), [ref]) for where, mr, ref in rows])


def read_e2e_csv(path: Path) -> list[tuple[str, str, str]]:
    """The rows of a CSV file with the columns mr and ref as (where, mr, ref)."""
    if not path.is_file():
        raise InputError(f"{path} is missing: {GET_E2E}")
    rows = []
    for number, row in csv_rows(path, ("mr", "ref")):
        where = f"{path}:{number}"
        rows.append((where, check_text(row["mr"], f"{where}: mr"), check_text(row["ref"], f"{where}: ref")))
    if not rows:
        raise InputError(f"{path} is empty: {GET_E2E}")
    return rows


def read_e2e_lines(path: Path) -> list[Example]:
    """An Example for each line `mr||text` of a file of the paper's authors, the mr already linearised."""
    examples = []
    for number, line in enumerate(read_lines(path), 1):
        mr, bars, text = line.partition("||")
        if not bars:
            raise InputError(f"{path}:{number}: {line!r:.80} is not of the form mr||text")
        mr, text = (check_text(part, f"{path}:{number}: {name}") for part, name in ((mr, "mr"), (text, "text")))
        examples.append(Example(mr, [text]))
    if not examples:
        raise InputError(f"{path} is empty: {GET_E2E}")
    return examples


# ---- summarisation ----


def load_scitldr(split: str, folder: Path, topic_field: str) -> list[Example]:
    """The Examples of a SciTLDR split: abstracts with one summary in train, up to four in dev and test."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing: {SCITLDR_LAYOUT}")
    return [collapse_example(example) for example in read_rows(path, topic_field, labelled=True)]


def load_xsum(split: str, folder: Path, topic_field: str) -> list[Example]:
    """The Examples of an XSum split, without the rows with an empty document or summary."""
    path = find_xsum(split, folder)
    if path.suffix == ".source":
        rows = line_rows(path, path.with_suffix(".target"))
        path = path.with_suffix(".{source,target}")  # for messages: either file, or both
    else:
        rows = json_rows(path)
    examples, empty = [], []
    for number, row in rows:
        try:
            examples.append(collapse_example(parse_row(row, f"{path}:{number}", topic_field, labelled=True)))
        except EmptyText:  # the official release has a few
            empty.append(number)
    if not examples:
        raise InputError(f"{path} has no row with a document and a summary: {XSUM_LAYOUT}")
    if empty:
        count = "1 row" if len(empty) == 1 else f"{len(empty)} rows"
        print(f"skipped {count} of {path} with an empty document or summary, first at line {empty[0]}", file=sys.stderr)
    return examples


def find_xsum(split: str, folder: Path) -> Path:
    """The file with the documents of a split: NAME.source, NAME.jsonl or NAME.json; InputError unless there is one."""
    names = [name + ending for name in XSUM_NAMES[split] for ending in (".source", ".jsonl", ".json")]
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has no {split} split of XSum ({', '.join(names)}): {XSUM_LAYOUT}")
    if len(found) > 1:
        raise InputError(f"{folder} has the {split} split of XSum as {' and as '.join(found)}: keep one of them")
    return folder / found[0]


def line_rows(source: Path, target: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for each line of a file of sources and the same line of a file of targets.

    Blank lines at the end of a file are ignored, unless the other file has a text there.
    """
    if not target.is_file():
        raise InputError(f"{target} is missing: the summaries of {source.name}, one a line")
    lines = [read_lines(source), read_lines(target)]
    count = max((number for side in lines for number, line in enumerate(side, 1) if line.strip()), default=0)
    if min(map(len, lines)) < count:
        raise InputError(
            f"{source} and {target} have {len(lines[0])} and {len(lines[1])} lines: line n of one must be the document "
            "and line n of the other its summary"
        )
    for number, (x, y) in enumerate(zip(lines[0][:count], lines[1][:count], strict=True), 1):
        yield number, {"source": x, "target": y}


def collapse_example(example: Example) -> Example:
    """An Example with the white space in its texts collapsed."""
    references = [collapse_whitespace(y) for y in example.references]
    return Example(collapse_whitespace(example.source), references, example.topic)
