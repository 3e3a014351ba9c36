"""Tasks as examples, examples as token ids, ids as batches.

A sequence is `" {x} <|endoftext|> {y} <|endoftext|>"` as in the paper: source ids, end_id, target ids (end_id last).
Only the target's tokens are ever in the loss. Shapes: B rows, T tokens, N target tokens of a batch.
"""

import csv
import functools
import hashlib
import io
import json
import re
import sys
import threading
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minprefix.files import InputError, atomic_write, read_text
from minprefix.sample_e2e import sample_rows

SEQUENCE = " {x} <|endoftext|> {y} <|endoftext|>"  # what the model reads: source, then target
E2E_URL = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"
E2E_FOLDER = Path("data/e2e")
E2E_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
E2E_SHA256 = {
    "trainset.csv": "f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
GET_E2E = f"give --data a folder with {', '.join(E2E_SHA256)} from {E2E_URL}"
TIMEOUT = 5  # seconds that one network operation may take
DEADLINE = 120  # seconds that the whole download may take
MAX_BYTES = 32 * 2**20  # of the zip and of each file in it; the largest has 9 MiB

SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}  # the others keep theirs
PAIR = r"([^\[\],:|]+)\[([^\[\]]+)\]\s*"  # no two neighbours match the same character: linear time


@dataclass
class Example:
    source: str  # the linearised text x
    references: list[str]  # the texts y; none if the input is unlabelled


# ---- tasks -> examples ----


def load_examples(task, split, data=None):
    """The list of Examples of a task's split; `data` is the folder to look in.

    "e2e": split train, dev or test, one Example for each distinct mr, in the file's order. Where the files come from:
    see `find_e2e`.

    "FILE.jsonl", rows {"source": x, "target": y} or {"source": x, "references": [y, ...]}: split "all" is every row,
    references or not. For the others each row needs a reference, and rows with one source become one Example. "train"
    is the file less a held-out tail, "dev" that tail (a tenth of the sources, at least 1, at most 500), and "test" the
    same as "dev". But beside a file that is called train.jsonl, dev.jsonl takes the place of the tail (nothing is held
    out then) and test.jsonl that of "test".
    """
    if task == "e2e" and split in E2E_FILES:
        return load_e2e(split, find_e2e(data))
    if task.endswith(".jsonl") and split in ("all", *E2E_FILES):
        return load_jsonl(Path(data or "", task), split)
    known = "e2e (train, dev, test) and FILE.jsonl (train, dev, test, all)"
    raise InputError(f"there is no split {split!r} of a task {task!r}: known are {known}")


def format_source(task, text):
    """A user's input as the text x that the task's examples have: E2E's mr or linearised text, else the text itself."""
    text = check_text(text, "the input")
    if task == "e2e" and ("[" in text or " : " not in text):
        return linearise_e2e(text)
    return text


def check_text(text, where):
    """A text without the blanks around it; InputError if it is none, empty, or not fit to be written to a file."""
    if not isinstance(text, str):
        raise InputError(f"{where} is a JSON {type(text).__name__}, a string is needed")
    if re.search("[\0\ud800-\udfff]", text):
        raise InputError(f"{where} holds a NUL character or half a character (a lone surrogate): remove it")
    if not text.strip():
        raise InputError(f"{where} is empty")
    return text.strip()


def linearise_e2e(mr, where="the input"):
    """`name[Blue Spice], eatType[pub]` -> `name : Blue Spice | Type : pub`."""
    pairs = re.findall(PAIR, mr) if re.fullmatch(f"{PAIR}(?:,{PAIR})*", mr) else []
    pairs = [(slot.strip(), value.strip()) for slot, value in pairs]
    if not pairs or not all(slot and value for slot, value in pairs):
        raise InputError(
            f"{where}: {mr!r:.200} is not an E2E meaning representation: expected slot[value] pairs, "
            "as in `name[Blue Spice], eatType[coffee shop]`"
        )
    return " | ".join(f"{SLOT_NAMES.get(slot, slot)} : {value}" for slot, value in pairs)


def load_e2e(split, folder):
    """The Examples of an E2E split in a folder, or of the bundled sample if that is None."""
    if folder is None:
        rows = [(f"bundled {split} sample", mr, ref) for mr, ref in sample_rows(split)]
    else:
        rows = read_e2e_csv(folder / E2E_FILES[split])
    return grouped([Example(linearise_e2e(mr, where), [ref]) for where, mr, ref in rows])


def read_e2e_csv(path):
    """The rows of a CSV file with the columns mr and ref as (where, mr, ref)."""
    if not path.is_file():
        raise InputError(f"{path} is missing: {GET_E2E}")
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header, rows = None, []
    while True:
        where = f"{path}:{reader.line_num + 1}"  # the line on which a row begins
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}: not valid CSV from here on ({error})") from error
        if row is None:
            break
        if not row:
            continue  # a blank line
        if header is None:
            header = row
            if not {"mr", "ref"} <= set(header):
                raise InputError(f"{where}: the columns are {header!r:.200}, but mr and ref are needed: {GET_E2E}")
            continue
        if len(row) != len(header):
            raise InputError(f"{where}: {len(row)} fields, but the header has {len(header)}")
        mr, ref = (check_text(row[header.index(column)], f"{where}: {column}") for column in ("mr", "ref"))
        rows.append((where, mr, ref))
    if not rows:
        raise InputError(f"{path} is empty: {GET_E2E}")
    return rows


# ---- where the E2E files come from ----


def find_e2e(data=None):
    """The folder of the E2E files: `data` if given, else data/e2e, downloaded if need be; None: the bundled sample."""
    if data is not None:
        if not Path(data).is_dir():
            raise InputError(f"there is no folder {data}: {GET_E2E}")
        return Path(data)
    if all((E2E_FOLDER / name).is_file() for name in E2E_SHA256):
        return E2E_FOLDER
    return download_e2e()


@functools.cache  # one try, one message
def download_e2e():
    """Download the E2E files to data/e2e and return that; if anything fails, say so and return None."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(download(E2E_URL)))
        contents = {name: archive.open(f"e2e-dataset/{name}").read(MAX_BYTES) for name in E2E_SHA256}
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != E2E_SHA256[name]:
                raise InputError(f"{name} has a wrong checksum")
        for name, content in contents.items():
            if not (E2E_FOLDER / name).is_file():  # what the user put there stays
                with atomic_write(E2E_FOLDER / name, "wb") as file:
                    file.write(content)
        return E2E_FOLDER
    except Exception as error:  # no network, a damaged zip (nearly any exception), a read-only folder, ...
        reason = " ".join(str(error).split()).strip("<>") or type(error).__name__
        problem = f"no E2E data in {E2E_FOLDER}, and the download failed ({reason:.200})"
        consequence = "using the small bundled sample, whose scores are not E2E scores"
        print(f"{problem}: {consequence}; for the real data {GET_E2E}", file=sys.stderr)
        return None


def download(url):
    """The bytes at a URL. Some exception if the server is not there, errs, stalls, dawdles or sends too much."""
    deadline, content = time.monotonic() + DEADLINE, bytearray()
    with open_url(url) as response:
        total = response.length
        with tqdm(total=total, unit="B", unit_scale=True, desc="E2E data", leave=False, disable=None) as bar:
            while chunk := response.read1(2**16):  # read1 returns what has arrived, read waits for all of it
                content += chunk
                bar.update(len(chunk))
                if len(content) > MAX_BYTES or time.monotonic() > deadline:
                    raise OSError(f"gave up after {len(content)} bytes: too large or too slow")
    if total and len(content) < total:
        raise OSError(f"broke off after {len(content)} of {total} bytes")
    return bytes(content)


def open_url(url):
    """urlopen in a thread that is given up if need be: its timeout bounds neither name look-up nor slow headers."""
    result = []

    def work():
        try:
            result.append(urllib.request.urlopen(url, timeout=TIMEOUT))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * TIMEOUT)
    if not result:
        raise TimeoutError(f"timed out, no answer within {2 * TIMEOUT} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


# ---- own data ----


def load_jsonl(path, split):
    """The Examples of a user's file; `load_examples` says what the splits are."""
    if split == "all":
        return read_jsonl(path)
    dev, test = path.with_name("dev.jsonl"), path.with_name("test.jsonl")
    has_dev, has_test = (path.name == "train.jsonl" and file.is_file() for file in (dev, test))
    if split == "test" and has_test:
        return grouped(read_jsonl(test, labelled=True))
    if split != "train" and has_dev:
        return grouped(read_jsonl(dev, labelled=True))
    examples = grouped(read_jsonl(path, labelled=True))  # before the cut: no source on both sides of it
    if has_dev:
        return examples
    if len(examples) < 2:
        raise InputError(f"{path} has only 1 row or source, and one is held out: at least 2 are needed to train")
    held_out = min(max(len(examples) // 10, 1), 500)
    return examples[:-held_out] if split == "train" else examples[-held_out:]


def grouped(examples):
    """One Example for each distinct source, in the order of the first, with all of its references."""
    by_source = {}
    for example in examples:
        by_source.setdefault(example.source, Example(example.source, [])).references.extend(example.references)
    return list(by_source.values())


def read_jsonl(path, labelled=False):
    """The Examples of a JSONL file's rows, in order; InputError if `labelled` and one has no reference."""
    if not path.is_file():
        raise InputError(f'{path} is missing: expected a file of rows like {{"source": "...", "target": "..."}}')
    examples = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would also split at U+2028
        if not line.strip():
            continue
        example = parse_row(line, f"{path}:{number}")
        if labelled and not example.references:
            raise InputError(f'{path}:{number}: a JSONL row without a target: add "target" or "references"')
        examples.append(example)
    if not examples:
        raise InputError(f"{path} is empty: expected a JSON object on each line")
    return examples


def parse_row(line, where):
    """One line of a JSONL file as an Example; other keys than source, target and references are ignored."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(row, dict):
        raise InputError(f'{where}: {line!r:.50} is not an object like {{"source": "...", "target": "..."}}')
    if "source" not in row:
        raise InputError(f"{where}: a JSONL row without a source: its keys are {list(row)!r:.200}")
    if "target" in row and "references" in row:
        raise InputError(f"{where}: a row with both target and references: keep one of them")
    references = [row["target"]] if "target" in row else row.get("references", [])
    if not isinstance(references, list):
        raise InputError(f"{where}: references is a JSON {type(references).__name__}, a list of strings is needed")
    kind = "target" if "target" in row else "a reference"
    references = [check_text(reference, f"{where}: {kind}") for reference in references]
    return Example(check_text(row["source"], f"{where}: source"), references)


# ---- examples -> token ids ----


def encode_source(text, tokenizer):
    """The source ids of a text x. What the model reads before it writes y is these and then tokenizer.end_id."""
    return tokenizer.encode(f" {text} ")


def encode_pairs(examples, tokenizer):
    """One (source ids, target ids) for each reference of each example, in order; the target ends with end_id."""
    pairs = []
    for example in examples:
        source = encode_source(example.source, tokenizer)
        pairs += [(source, tokenizer.encode(f" {y} ") + [tokenizer.end_id]) for y in example.references]
    return pairs


def pair_lengths(pairs):
    """How many tokens of each pair the model reads: source, separator, target without its last."""
    return [len(source) + len(target) for source, target in pairs]


def check_lengths(pairs, room, what):
    """InputError if a pair of `what` (a name for the message) has more tokens than the model has room for."""
    lengths = pair_lengths(pairs)
    longest = max(lengths, default=0)
    if longest > room:
        raise InputError(
            f"{what}: pair {lengths.index(longest) + 1} of {len(pairs)} (one source with one reference) has {longest} "
            f"tokens, but the model has room for {room} beside the prefix: shorten that text or the prefix"
        )


# ---- ids -> batches ----


@dataclass
class Batch:
    ids: torch.Tensor  # (B, T) int64, right-padded: source, end_id, target without its last token
    index: torch.Tensor  # (N,) int64, positions b * T + t whose next token belongs to the target
    labels: torch.Tensor  # (N,) int64, those next tokens
    rows: int  # B
    tokens: int  # how many of `ids` are not padding

    def to(self, device):
        return Batch(self.ids.to(device), self.index.to(device), self.labels.to(device), self.rows, self.tokens)


def collate(pairs, end_id, pad_id):
    """A list of B (source ids, target ids) -> Batch."""
    T = max(pair_lengths(pairs))
    ids, index, labels = [], [], []
    for source, target in pairs:
        start = len(ids) + len(source)  # of the separator, which the target's first token follows
        index += range(start, start + len(target))
        labels += target
        row = [*source, end_id, *target[:-1]]
        ids += row + [pad_id] * (T - len(row))
    return Batch(
        torch.tensor(ids).view(len(pairs), T), torch.tensor(index), torch.tensor(labels),
        rows=len(pairs), tokens=sum(pair_lengths(pairs)),
    )  # fmt: skip


def bucket_batches(lengths, batch_size, seed, epoch):
    """One epoch's batches as lists of indices: each index once, rows of like length together, all full but one.

    Rows are shuffled, sorted by length inside windows of up to 50 batches, and the batches are shuffled. There are
    at least four windows where there are enough batches, for in a single one the batches would hardly ever change.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths, order = np.asarray(lengths), rng.permutation(len(lengths))
    window = batch_size * min(max(len(lengths) // batch_size // 4, 1), 50)
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths, batch_size):
    """Batches for evaluation: each index once, the longest first, so that what exceeds the memory does so at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
