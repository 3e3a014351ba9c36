"""Damaged and hostile files: each reader takes them or gives one line of InputError, and nothing else happens.

    python tests/fuzz.py --cases 100000 --seed 0       counts for each target
    python tests/fuzz.py --target checkpoint --seed 0 --case 517      one case again, with its traceback
    python tests/fuzz.py --cases 1000 --keep FOLDER    the files of each case that something is wrong with stay there

A case is a set of valid files of which one is mutated: bytes flipped, cut out, repeated, spliced; or, where the file
is a tree (JSON, a pickle), a node of it replaced by what a reader may stumble over. Wrong is any exception but
InputError, a message that is not one printable line, more than 5 s of CPU time or 1 GiB, and the opening of a file
elsewhere.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minprefix import Prefix, generate, load_model, load_prefix, load_tokenizer
from minprefix.core.prefix import fingerprint
from minprefix.core.prefix_kv import tensors_of
from minprefix.core.training import train
from minprefix.data.tasks import format_source, load_examples
from minprefix.data.triples import read_webnlg
from minprefix.formats.hub import is_complete
from minprefix.formats.peft import write_adapter
from minprefix.formats.prefix_file import save_prefix
from minprefix.formats.safetensors import read_safetensors, read_tensors, write_safetensors
from minprefix.formats.tokenizer import byte_alphabet
from minprefix.methods.baselines import Adapters, EmbeddingOnly, Finetune, Infix, top_layers
from minprefix.methods.files import find_trained, load_trained, save_trained
from minprefix.system.errors import InputError
from minprefix.system.files import read_text
from tests.tiny import write_tiny_bart, write_tiny_model

SECONDS, MEMORY = 5, 2**30
SECRET = "secret.safetensors"  # lies above a case's folder: names that lead out of it lead there
DEEP = {f"@deep {kind}": text for kind, text in {
    "list": "[" * 100_000 + "]" * 100_000, "open": "[" * 100_000, "object": '{"a":' * 3000 + "1" + "}" * 3000,
    "digits": "1" * 5000, "exponent": "1e999999", "twice": '{"a": 1, "a": 2}'}.items()}  # fmt: skip
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 7, 63, 2**24, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0,
    1e308, float("nan"), float("inf"), "", " ", "0", "a", "\0", "\n", "\x1b[31m", "\ud800", "é", "a" * 100_000, "NaN",
    f"../{SECRET}", f"/{SECRET}", "..", ".", "/etc/passwd", "model.safetensors", "C:x", [], {}, [[]], [0], [-1, 0],
    [2**62, 2**62], ["a"], {"a": {}}, list(range(1000)), "gelu", "F64", "BF16", "<s>", "</s>", "__class__", *DEEP,
]  # fmt: skip
WORDS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b",", b'"', b"'", b"[", b"]", b"]]>",
    b"<", b"&", b"&lt;", b"&#0;", b"&#x110000;", b"&a;", b"<!--", b"<![CDATA[",
    b"<?xml version='1.0' encoding='utf-7'?>", b"\xe2\x80\xa8", b"| ", b" : ", b"#version", b"\x1b[2J",
    b"NaN", b"1e999", b"9" * 5000, b"(" * 3000, b"a" * 200_000,
    b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>', b"version https://git-lfs.github.com/spec/v1\n",
    b'<!DOCTYPE x [<!ENTITY a "' + b"a" * 9999 + b'">'
    + b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%s;" % (b"%d" % (i - 1) if i else b"") * 20) for i in range(12)) + b"]>",
]  # fmt: skip
TENSORS = [
    torch.zeros(1).expand(2**40), torch.zeros(1, 1).expand(2**20, 2**20), torch.zeros(3, 4).to_sparse(), torch.zeros(0),
    torch.full((3, 4), float("nan")), torch.zeros(3, 4, dtype=torch.complex64), torch.zeros(3, 4, device="meta"),
    torch.ones(4, 3).T, torch.ones(12), torch.ones(3, 4).int(), torch.nn.Parameter(torch.ones(3, 4)), torch.tensor(1),
]  # fmt: skip


class Hang(BaseException):
    """A case took too long; not an Exception, so that no reader takes it for a damaged file."""


# ---- mutations ----


def mutate(content, name, rng):
    """The content of a file of that name, changed."""
    if rng.random() < 0.6:
        with contextlib.suppress(ValueError, RecursionError, TypeError):  # no tree, or one that cannot be written
            if name.endswith(".json"):
                return mutate_json(content, rng)
            if name.endswith(".jsonl"):
                lines = content.split(b"\n")
                i = rng.randrange(len(lines))
                lines[i] = mutate_json(lines[i], rng)
                return b"\n".join(lines)
            if name.endswith(".safetensors"):
                end = 8 + int.from_bytes(content[:8], "little")
                header = mutate_json(content[8:end], rng)
                return len(header).to_bytes(8, "little") + header + content[end:]
            if name.endswith((".pt", ".bin")):
                return mutate_torch(content, rng) if rng.random() < 0.6 else mutate_zip(content, rng)
    return mutate_bytes(content, rng)


def mutate_bytes(content, rng, words=WORDS):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # mostly near the beginning, where the headers are
        at = rng.randrange(min(len(content), rng.choice([16, 256, 4096, 2**30])) or 1)
        piece = rng.randrange(1, rng.choice([2, 8, 64, 4096]))
        what = rng.randrange(8)
        if what < 2 and content:
            content[at] ^= 1 << rng.randrange(8)
        elif what == 2 and content:
            content[at] = rng.choice(b'\0\x01\x7f\x80\xff0123456789-.eE[]{}<>&",:; \n')
        elif what == 3:
            del content[at : at + piece]
        elif what == 4:
            content[at:at] = content[at : at + piece] * rng.choice([1, 2, 50])
        elif what == 5:
            content[at:at] = rng.choice(words)
        elif what == 6:
            start = rng.randrange(len(content) or 1)
            content[at : at + piece] = content[start : start + piece]
        else:
            del content[rng.randrange(len(content) or 1) :]
    return bytes(content[: 2**22])


def mutate_json(content, rng):
    tree = mutate_tree(json.loads(content), rng, HOSTILE)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
    for mark, deep in DEEP.items():
        text = text.replace(f'"{mark}"', deep)
    return text.encode("utf-8", "surrogatepass")


def mutate_tree(tree, rng, hostile):
    """A tree of dicts and lists with one to three of its nodes changed."""
    root = [tree]
    for _ in range(rng.choice([1, 1, 2, 3])):
        parent, key = root, 0
        while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.75:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        what, sibling = rng.randrange(10), rng.choice(list(parent.values() if isinstance(parent, dict) else parent))
        if what < 5:
            parent[key] = rng.choice(hostile)
        elif what < 6 and parent is not root:
            del parent[key]
        elif what < 7:
            parent[key] = sibling
        elif what < 8 and isinstance(parent, dict):
            parent[rng.choice([value for value in hostile if isinstance(value, str)])] = parent.pop(key)
        elif what < 9 and isinstance(parent, list) and parent is not root:
            parent.insert(key, rng.choice(hostile))
        else:
            parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, str(parent[key])[:1000]])
    return root[0]


def mutate_torch(content, rng):
    tree = mutate_tree(torch.load(io.BytesIO(content), weights_only=True), rng, HOSTILE + 3 * TENSORS)
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def mutate_zip(content, rng):
    """A member of a zip file mutated, its checksum right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = rng.choice([*old.namelist(), *[name for name in old.namelist() if name.endswith("data.pkl")] * 9])
        for name in old.namelist():
            data = old.read(name)
            if name == chosen:
                data = mutate_bytes(data, rng, [b"cos\nsystem\n(S'true'\ntR.", b"ctorch\nload\n", b"\x80\x05", b"("])
            new.writestr(name, data)
    return buffer.getvalue()


# ---- targets: each writes valid files into a folder, and reads such a folder ----


def write_model(folder, tiny):
    for path in TINY[tiny].iterdir():
        shutil.copy(path, folder / path.name)


def run_model(folder):
    """Load a model, and where that works run it."""
    model = load_model(folder)
    ids = torch.tensor([[0, 1, 2]])
    model(ids, ids) if model.encoder_decoder else model(ids)


def write_shards(folder, ending):
    tensors = {name: torch.randn(3, 4) for name in "abcd"}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    index = {"metadata": {"total_size": 192}, "weight_map": {}}
    for i, names in enumerate(("ab", "cd")):
        part = {name: tensors[name] for name in names}
        path = folder / f"{stem}-{i}.{ending}"
        write_safetensors(path, part) if ending == "safetensors" else torch.save(part, path)
        index["weight_map"].update(dict.fromkeys(names, path.name))
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def run_tensors(folder):
    is_complete(folder)
    for tensor in read_tensors(folder).values():
        tensor.sum() if tensor.numel() else None


def write_safetensors_file(folder):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.zeros(0, 2), "d": torch.ones(3).bfloat16()}
    write_safetensors(folder / "a.safetensors", tensors, {"format": "pt"})


def run_safetensors(folder):
    for tensor in read_safetensors(folder / "a.safetensors")[0].values():
        tensor.sum()


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or"]


def small_vocab():
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *byte_alphabet(), *(m.replace(" ", "") for m in MERGES), "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder):
    (folder / "vocab.json").write_text(json.dumps(small_vocab()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    added = {str(len(small_vocab())): {"content": "world", "special": False, "normalized": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "pad_token": "<pad>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"world": len(small_vocab())}))


def write_tokenizer_json(folder):
    vocab = small_vocab()
    spec = {
        "added_tokens": [{"id": vocab[token], "content": token, "special": True} for token in ("<s>", "</s>")],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": MERGES},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def run_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("hello world, é\n<s>")
    assert tokenizer.decode(ids) == "hello world, é\n<s>"


def write_comparator(folder, method):
    model = copy.deepcopy(MODEL)
    if method == "top2":
        trainable = Finetune(model, top_layers(model))
    else:
        trainable = {"adapter": Adapters, "embedding": EmbeddingOnly, "infix": Infix}[method](model, 3)
    info = {"method": method, "base_model": "tiny", "position_offset": "3"}
    save_trained(folder / f"{method}.safetensors", tensors_of(trainable.fold()), fingerprint(MODEL), info)


def run_comparator(folder):
    model = copy.deepcopy(MODEL)  # for it may be changed
    prefix = load_trained(find_trained(folder), model)
    generate(model, TOKENIZER, ["name : a"], prefix=prefix, beams=1, max_new_tokens=2)


def write_prefix(folder):
    prefix = Prefix(MODEL, 3, mlp_width=0)
    save_prefix(folder / "prefix.safetensors", prefix.fold(), MODEL, {"base_model": "tiny", "task": "e2e"})


def run_prefix(folder):
    prefix = load_prefix(folder, MODEL)
    generate(MODEL, TOKENIZER, ["name : a"], prefix=prefix, beams=1, max_new_tokens=2)


def write_peft(folder):
    write_adapter(folder, Prefix(MODEL, 3, mlp_width=0).fold()["decoder"], False, {"base_model": "tiny"})


def write_peft_bin(folder):
    write_peft(folder)
    torch.save(read_safetensors(folder / "adapter_model.safetensors")[0], folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def write_checkpoint(folder):
    run_checkpoint(folder)


def run_checkpoint(folder):
    """Resume a run that is done, or, where its step says otherwise, go on with it."""
    pairs = [([5, 6], [7, 4095]), ([8], [9, 4095])]
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        train(MODEL, Prefix(MODEL, 2, mlp_width=0), TOKENIZER, pairs, pairs, folder, steps=2, batch_size=2, lr=1e-3,
              eval_every=1, resume=True)  # fmt: skip


def write_e2e(folder):
    for split in ("train", "dev"):
        (folder / f"{split}set.csv").write_text(
            'mr,ref\n"name[The Mill], eatType[pub]","A pub, ""The Mill""."\nname[X],"two\nlines"\n'
        )


def write_rows(folder, task):
    name = "train.jsonl"
    if task == "jsonl":
        rows = [{"source": f"s{i}", "target": "t"} for i in range(9)] + [{"source": "s", "references": ["a", "b"]}]
    elif task == "scitldr":
        rows = [{"source": ["One.", "Two."], "target": ["Three."], "paper_id": "x"}] * 3
    else:
        rows = [{"document": "A text.", "summary": "A sum."}] * 3
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_lines(folder):
    for name in ("train.source", "train.target"):
        (folder / name).write_text("one\ntwo\nthree\n")


def read_task(task):
    def read(folder):
        with contextlib.redirect_stderr(io.StringIO()):  # rows that are left out are told there
            for example in load_examples(str(folder / "train.jsonl") if task == "jsonl" else task, "train", folder):
                assert example.source and all(example.references)

    return read


def write_webnlg(folder):
    lexes = '<lex comment="good" lid="Id1">A text.</lex><lex comment="good" lid="Id2">Another &amp; more.</lex>'
    triples = "<modifiedtripleset><mtriple>A | b | C</mtriple><mtriple>A | d | 5</mtriple></modifiedtripleset>"
    entry = f'<entry category="Food" eid="Id1" size="2">{triples}{lexes}</entry>'
    (folder / "train.xml").write_text(f'<?xml version="1.0"?>\n<benchmark><entries>{entry * 3}</entries></benchmark>')


def run_webnlg(folder):
    assert read_webnlg(folder / "train.xml", good_only=True)


def write_dart(folder):
    entry = {"tripleset": [["A", "b", "C"], ["A", "d", "5"]], "annotations": [{"source": "x", "text": "A text."}] * 2}
    (folder / "dart-v1.1.1-full-train.json").write_text(json.dumps([entry] * 3))


def write_inputs(folder):
    (folder / "inputs.txt").write_text("name[The Mill], eatType[pub]\nname : The Mill | Type : pub\n")


def run_inputs(folder):
    for line in filter(str.strip, read_text(folder / "inputs.txt").split("\n")):
        for task in ("e2e", "xsum", "jsonl"):
            format_source(task, line)


TARGETS = {
    "safetensors": (write_safetensors_file, run_safetensors),
    "GPT-2 folder": (lambda folder: write_model(folder, "gpt2"), run_model),
    "BART folder": (lambda folder: write_model(folder, "bart"), run_model),
    "shards": (lambda folder: write_shards(folder, "safetensors"), run_tensors),
    "bin shards": (lambda folder: write_shards(folder, "bin"), run_tensors),
    "vocab and merges": (write_tokenizer, run_tokenizer),
    "tokenizer.json": (write_tokenizer_json, run_tokenizer),
    "prefix": (write_prefix, run_prefix),
    "adapter": (lambda folder: write_comparator(folder, "adapter"), run_comparator),
    "embedding": (lambda folder: write_comparator(folder, "embedding"), run_comparator),
    "infix": (lambda folder: write_comparator(folder, "infix"), run_comparator),
    "top2": (lambda folder: write_comparator(folder, "top2"), run_comparator),
    "PEFT adapter": (write_peft, run_prefix),
    "PEFT .bin": (write_peft_bin, run_prefix),
    "checkpoint": (write_checkpoint, run_checkpoint),
    "E2E CSV": (write_e2e, read_task("e2e")),
    "JSONL": (lambda folder: write_rows(folder, "jsonl"), read_task("jsonl")),
    "SciTLDR": (lambda folder: write_rows(folder, "scitldr"), read_task("scitldr")),
    "XSum JSONL": (lambda folder: write_rows(folder, "xsum"), read_task("xsum")),
    "XSum lines": (write_lines, read_task("xsum")),
    "WebNLG XML": (write_webnlg, run_webnlg),
    "DART JSON": (write_dart, read_task("dart")),
    "inputs": (write_inputs, run_inputs),
}


# ---- running ----


class Guard:
    """Watches which files are opened, and what else no reader does, while a case runs."""

    def __init__(self):
        self.folder, self.wrong = None, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            inside = os.path.commonpath([path, self.folder]) == self.folder
            if not inside and not path.startswith((sys.prefix, sys.base_prefix, "/proc/", "/dev/", "/sys/")):
                self.wrong.append(f"opened {path}")
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            self.wrong.append(f"{event} {arguments!r:.200}")


def run_case(target, files, seed, case, folder, guard, trace=False):
    """One case -> "read", "refused", or what is wrong; with `trace` a wrong exception is let through."""
    rng = random.Random(f"{seed} {target} {case}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    chosen = rng.choice(sorted(files))
    for name, content in files.items():
        (folder / name).write_bytes(mutate(content, name, rng) if name == chosen else content)

    def alarm(*arguments):
        raise Hang(f"took more than {SECONDS} s")

    signal.signal(signal.SIGPROF, alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU time: a busy machine is no hang
    guard.wrong, guard.folder = [], os.path.realpath(folder)
    try:
        TARGETS[target][1](folder)
        result = "read"
    except InputError as error:
        result, line = "refused", " ".join(str(error).split())
        if len(line) > 3000 or not line.isprintable():
            result = f"a message that is not one printable line: {line!r:.300}"
    except BaseException as error:
        result = f"{type(error).__name__}: {error}".strip()[:300]
        if trace or isinstance(error, KeyboardInterrupt):
            raise
    finally:
        guard.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
    return f"{result}; {guard.wrong[0]}" if guard.wrong else result


def limit_memory():
    """At most so much more memory than now; returns what undoes it. Linux only."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, before)


def prepare(scratch):
    """What the targets share: two tiny models; and the file that no reader may find."""
    global MODEL, TOKENIZER, TINY
    TINY = {"gpt2": write_tiny_model(scratch / "gpt2"), "bart": write_tiny_bart(scratch / "bart")}
    MODEL, TOKENIZER = load_model(TINY["gpt2"]), load_tokenizer(TINY["gpt2"])
    write_safetensors(scratch / SECRET, {"a": torch.ones(2)})


def fuzz(target, cases, seed, scratch, keep=None, trace=False):
    """Run cases of a target: how many were read, refused and wrong; and what was wrong, case by case."""
    folder, guard = scratch / "case", Guard()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    TARGETS[target][0](folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    TARGETS[target][1](folder)  # valid, and all that is imported late is there
    counts, wrong, undo = Counter(), {}, limit_memory()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases:
                result = run_case(target, files, seed, case, folder, guard, trace)
                counts[result if result in ("read", "refused") else "wrong"] += 1
                if result not in ("read", "refused"):
                    wrong[case] = result
                    if keep:
                        shutil.copytree(folder, keep / f"{target} {seed} {case}", dirs_exist_ok=True)
    finally:
        undo()
    return counts, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all targets together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, help="one of them (all)")
    parser.add_argument("--case", type=int, help="only this one of the target's")
    parser.add_argument("--keep", type=Path, help="where the files of wrong cases go")
    args = parser.parse_args()
    targets = [args.target] if args.target else list(TARGETS)
    cases = range(-(-args.cases // len(targets))) if args.case is None else [args.case]
    total = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for target in targets:
            counts, wrong = fuzz(target, cases, args.seed, Path(scratch), args.keep, args.case is not None)
            total += counts
            print(f"{target:<16}", *(f"{counts[what]:>8} {what}" for what in ("read", "refused", "wrong")), flush=True)
            for case, what in list(wrong.items())[:10]:
                print(f"    {case}: {what}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{sum(total.values())} cases, {total['wrong']} wrong; peak memory {peak / 2**20:.2f} GiB")
    sys.exit(total["wrong"] > 0)


if __name__ == "__main__":
    main()
