"""Tasks as examples: E2E, WebNLG, DART (both read in triples.py), XSum, SciTLDR, a user's own JSONL."""

import functools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minprefix.core.batches import Example
from minprefix.data.download import GET_E2E, find_e2e
from minprefix.data.examples import EmptyText, check_text, collapse_whitespace, filter_topics, group_by_source
from minprefix.data.rows import csv_rows, json_rows, load_own, parse_row, read_lines, read_rows
from minprefix.data.sample_e2e import sample_rows
from minprefix.data.triples import DART_LAYOUT, WEBNLG_LAYOUT, linearise_triples, load_dart, load_webnlg, split_triples
from minprefix.system.errors import InputError

E2E_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
E2E_LINES = {"train": "src1_train.txt", "dev": "src1_valid.txt", "test": "src1_test.txt"}  # of the paper's authors
SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}  # the others keep theirs
SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
SPLITS = ("train", "dev", "test")
WEBNLG_SPLITS = (*SPLITS, "test_seen", "test_unseen")
TRIPLES = ("webnlg", "dart")
SUMMARISATION = ("xsum", "scitldr")  # decoded and scored otherwise than table-to-text
TASKS = ("e2e", *TRIPLES, *SUMMARISATION)
OWN = (".jsonl", ".csv")  # endings of a user's files of rows
XSUM_NAMES = {"train": ["train"], "dev": ["val", "validation", "dev"], "test": ["test"]}  # their files' names
XSUM_LAYOUT = (
    "expected {train,val,test}.source with {train,val,test}.target, a document and its summary a line, or "
    '{train,val,test}.jsonl of rows {"document": "...", "summary": "..."}; "validation" or "dev" will do for "val"'
)
SCITLDR_LAYOUT = 'expected {train,dev,test}.jsonl of rows {"source": [sentences], "target": [references]}'
LAYOUTS = {"e2e": GET_E2E, "webnlg": WEBNLG_LAYOUT, "dart": DART_LAYOUT, "xsum": XSUM_LAYOUT, "scitldr": SCITLDR_LAYOUT}

PAIR = r"([^\[\],:|]+)\[([^\[\]]+)\]\s*"  # no two neighbours match the same character: linear time


# ---- tasks -> examples ----


def load_examples(task: str, split: str, data: str | Path | None = None, topic_field: str = "topic") -> list[Example]:
    """The list of Examples of a task's split; `data` is the folder to look in.

    topic_field: the key of a JSONL row, of any task that is read from rows, whose value is the Example's topic.

    "e2e": split train, dev or test, one Example for each distinct mr, in the file's order. Where the files come from:
    see `find_e2e`. The authors' src1_{train,valid,test}.txt with lines `mr||text` are read where there is no CSV file.

    "webnlg" and "dart": one Example for each distinct set of triples, WebNLG's with the category as topic. Splits,
    files and what is left out: see `load_webnlg` and `load_dart`.

    "xsum" and "scitldr": split train, dev or test, one Example for each row, in the file's order, white space
    collapsed to single blanks; nothing is downloaded, so `data` is needed. XSum is either the line files NAME.source
    and NAME.target (line n of one is the document, line n of the other its summary) or NAME.jsonl (or .json, one
    object a line all the same) of rows {"document": x, "summary": y}, where NAME is train, test and, for dev, val,
    validation or dev; rows whose document or summary is empty are left out, which is said on stderr. SciTLDR is
    train.jsonl, dev.jsonl and test.jsonl of rows {"source": [sentence, ...], "target": [y, ...]}.

    "FILE.jsonl", rows {"source": x, "target": y} or {"source": x, "references": [y, ...]}, or as in the two above (see
    `parse_row`), or "FILE.csv" with the columns source and target. Split "all" is every row, with or without
    references. For the other splits each row needs a reference, and rows with the same source and topic become one
    Example. A tenth of the sources, from all over the file, is held out (see `held_out`): "dev" is the Examples of
    these, "train" all others, "test" the same as "dev". But if the file is called train.jsonl, a dev.jsonl beside it is
    used for "dev", and nothing is held out; so is a test.jsonl for "test". The split "test" of test.jsonl is all of it.
    """
    splits = WEBNLG_SPLITS if task == "webnlg" else SPLITS if task in TASKS else (*SPLITS, "all")
    if split not in splits:
        raise InputError(f"there is no split {split!r} of {task}: known are {', '.join(splits)}")
    check_place(task, data)
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
    return load_own(folder / task, split, topic_field)


def check_place(task: str, data: str | Path | None) -> None:
    """InputError where a task's examples cannot be, which is known before they are read, and a model is loaded."""
    if task not in TASKS:
        if not task.endswith(OWN):
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
    """As `load_examples`, but only the Examples on these topics; without topics all."""
    return filter_topics(load_examples(task, split, data, topic_field), topics, f"{task}, {split} split")


def format_source(task: str, text: str, where: str = "the input") -> str:
    """A user's input as the text x that the task's examples have: E2E's mr or linearised text, else the text itself.

    where: it stands, for errors.

    WebNLG and DART: triples, `Alan_Bean : occupation : Test_pilot | Alan_Bean : nationality : United_States`.
    The summarisation tasks' documents have all white space collapsed, a user's own JSONL keeps what is inside a text.
    """
    text = check_text(text, where)
    if task == "e2e" and ("[" in text or " : " not in text):
        for slot, _ in re.findall(PAIR, text):
            tell_unknown_slot(slot.strip())
        return linearise_e2e(text, where)
    if task in TRIPLES:
        return linearise_triples(split_triples(text, where))
    return collapse_whitespace(text) if task in SUMMARISATION else text


@functools.cache  # once for each slot, however many inputs have it
def tell_unknown_slot(slot: str) -> None:
    """Say on stderr that E2E has no such slot; data in E2E's form, of a user's own, may have it."""
    if slot not in SLOTS and slot not in SLOT_NAMES.values():
        print(f"{slot!r:.80} is no slot of E2E's: it has {', '.join(SLOTS)}", file=sys.stderr)


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
    """The Examples of an E2E split in a folder, or of the bundled sample if that is None."""
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
        mr, ref = (check_text(row[column], f"{where}: {column}") for column in ("mr", "ref"))
        rows.append((where, mr, ref))
    if not rows:
        raise InputError(f"{path} is empty: {GET_E2E}")
    return rows


def read_e2e_lines(path: Path) -> list[Example]:
    """An Example for each line `mr||text` of a file of the paper's authors, whose mr is linearised."""
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
    """The Examples of a SciTLDR split: an abstract with its summaries, one in train, up to four in dev and test."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing: {SCITLDR_LAYOUT}")
    return [collapse_example(example) for example in read_rows(path, topic_field, labelled=True)]


def load_xsum(split: str, folder: Path, topic_field: str) -> list[Example]:
    """The Examples of an XSum split, whichever its layout, without the rows that lack a document or a summary."""
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
    """The one file in a folder that has the documents of a split: NAME.source, NAME.jsonl or NAME.json."""
    names = [name + ending for name in XSUM_NAMES[split] for ending in (".source", ".jsonl", ".json")]
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has no {split} split of XSum ({', '.join(names)}): {XSUM_LAYOUT}")
    if len(found) > 1:
        raise InputError(f"{folder} has the {split} split of XSum as {' and as '.join(found)}: keep one of them")
    return folder / found[0]


def line_rows(source: Path, target: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for each line number of a file of sources and a file of targets, one text a line.

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
