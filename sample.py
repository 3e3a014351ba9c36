"""Write texts with a trained prefix, and score them.

    python sample.py --prefix runs/e2e-gpt2-mini --input "name[The Mill], food[Thai]"
    python sample.py --prefix runs/mine --file inputs.txt --output texts.txt    one input a line
    python sample.py --prefix runs/mine --file inputs.txt --sample --top-p 0.9  drawn at random
    python sample.py --prefix runs/mine --task e2e --data e2e/ --evaluate       the test set, scored
    python sample.py --prefix runs/a --prefix runs/b --file requests.jsonl      each row by its own

Defaults stand in parentheses. A .jsonl file has rows {"source": ...}, with several prefixes
{"source": ..., "prefix": ...}, the name of a prefix's folder, or of its file without the ending.
Without --output, --evaluate writes texts-SPLIT.txt and .json to the run's folder; a task that the
run was not trained on, and topics, are in the name, too. For a prefix or model outside of a run's
folder they go to the current one, as texts-PREFIX-TASK-SPLIT.txt.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from minprefix import generate, load_model, load_tokenizer
from minprefix.cli.evaluation import check_scorable, evaluate
from minprefix.cli.options import (
    DEVICES,
    DTYPES,
    Parser,
    check_above_zero,
    check_not_negative,
    check_requires,
    fill_defaults,
)
from minprefix.cli.requests import load_prefixes, prefix_name, read_requests, write_requests
from minprefix.cli.runs import is_run, texts_file
from minprefix.cli.search import search_options
from minprefix.core.batches import Example, check_vocabulary
from minprefix.data.tasks import WEBNLG_SPLITS, check_place, format_source, load_on_topics
from minprefix.formats.load import pick_writing_dtype
from minprefix.methods.files import (
    find_trained,
    finetune_metadata,
    load_trained,
    read_trained,
    resolve_base_model,
    trained_max_source,
)
from minprefix.system import distributed
from minprefix.system.device import keep_freed_memory, pick_device
from minprefix.system.errors import InputError, run_main
from minprefix.system.files import atomic_write, is_stream, read_text

SPLITS = (*WEBNLG_SPLITS, "all")


def parse_args() -> Namespace:
    parser = Parser("python sample.py", __doc__)

    add = parser.add_argument_group("what writes").add_argument
    add("--prefix", dest="prefixes", type=Path, action="append", default=[], metavar="PATH",
        help="a run's folder, or what is in it; a PEFT folder (the model alone)")  # fmt: skip
    add("--model", help="a folder or a name (the one that the prefix was trained on)")

    group = parser.add_argument_group("inputs")
    add, inputs = group.add_argument, group.add_mutually_exclusive_group().add_argument
    inputs("--input", nargs="+", metavar="TEXT", help="inputs, in the form of the prefix's task")
    inputs("--file", help="one input a line, or a .jsonl file (if none is given: from stdin)")
    inputs("--task", help="inputs with references: e2e, webnlg, dart, xsum, scitldr, FILE.jsonl")
    add("--split", choices=SPLITS, metavar="SPLIT", help=f"{', '.join(SPLITS)} (test; FILE.jsonl all)")
    add("--data", metavar="FOLDER", help="of the task's files")
    add("--topics", nargs="+", metavar="TOPIC", help="inputs of --task on these only (WebNLG: categories)")
    add("--topic-field", metavar="NAME", help="the key of a JSONL row's topic (topic)")
    add("--limit", type=int, metavar="N", help="the first N inputs only")
    add("--max-source", type=int, metavar="N", help="cut sources to N tokens (as in training; BART 512)")

    add = parser.add_argument_group("how it writes").add_argument
    add("--beams", type=int, metavar="K", help="of beam search, 1 is greedy (5; summaries 6; 1 with --sample)")
    add("--max-new-tokens", type=int, metavar="N", help="the longest text (64; triples 100; summaries 60)")
    add("--min-new-tokens", type=int, metavar="N", help="the shortest (0; summaries 10)")
    add("--length-penalty", type=float, metavar="X", help="scores are divided by length ** X (1.0; summaries 0.8)")
    add("--no-repeat-ngram", type=int, metavar="N", help="no N tokens occur twice, 0: they may (0; summaries 3)")
    add("--sample", action="store_true", help="draw at random instead of searching")
    add("--temperature", type=float, metavar="X", help="of --sample (1.0)")
    add("--top-p", type=float, metavar="X", help="of --sample: from the likeliest tokens, of mass X (1.0)")
    add("--top-k", type=int, metavar="K", help="of --sample: from the K likeliest tokens, 0 for all (0)")
    add("--seed", type=int, metavar="N", help="of --sample (101)")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="FILE", help="write the texts there, one a line, not to stdout")
    add("--evaluate", action="store_true", help="print scores and write them beside the texts, as .json")

    add = parser.add_argument_group("where").add_argument
    add("--batch-size", type=int, metavar="N", default=16, help="inputs at a time (%(default)s)")
    add("--device", choices=DEVICES, metavar="NAME", default="auto", help="cpu, cuda or mps (%(default)s)")
    add("--dtype", choices=DTYPES, metavar="TYPE", default="auto", help="float32 or bfloat16 (%(default)s)")

    args = parser.parse_args()
    check(args)
    if args.file == "":
        raise InputError("--file is empty: give a file's name")
    if args.task:
        check_place(args.task, args.data)  # before what may be a download
    split = "test" if args.task and not args.task.endswith(".jsonl") else "all"
    if args.evaluate and args.task and split == "all" and not args.split:
        print(f"scoring all of {args.task}: if it was trained on, --split test is what was held out", file=sys.stderr)
    fill_defaults(
        args, {"split": split, "topic_field": "topic", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 101}
    )
    args.prefix = next(iter(args.prefixes), None)  # the first, mostly the only one
    if args.evaluate and not args.output:
        inputs = args.split if args.task else Path(args.file or "input").stem
        args.output = texts_file(args.prefix or Path(args.model or ""), args.task, inputs, args.topics or [])
    if args.output:
        made_from = [*args.prefixes, *(Path(file) for file in (args.file, args.task) if file)]
        check_output(args.output, made_from)
        if args.evaluate:
            check_output(args.output.with_suffix(".json"), made_from)
    return args


def check(args: Namespace) -> None:
    """InputError where a number makes no sense, or an option has no effect."""
    check_above_zero(args, ("limit", "max_source"))
    check_not_negative(args, ("seed",))
    check_requires(args, dict.fromkeys(("temperature", "top_k", "top_p", "seed"), "sample"))
    check_requires(args, {"split": "task", "data": "task", "topics": "task", "topic_field": "topics"})
    if args.length_penalty is not None and (args.sample or args.beams == 1):
        raise InputError("--length-penalty does nothing without a search by several --beams: leave it out")
    if len(args.prefixes) > 1 and (args.evaluate or not str(args.file).endswith(".jsonl")):
        raise InputError('several --prefix need --file FILE.jsonl with rows {"source": ..., "prefix": name}, unscored')
    if args.evaluate and args.output and is_stream(args.output):
        raise InputError(f"--output {args.output}: the scores go to a file beside the texts, give a file's name")
    if args.evaluate and args.output and args.output.suffix == ".json":
        raise InputError(f"--output {args.output}: the scores go to a .json file of that name, choose another")


def check_output(path: Path, made_from: Sequence[Path] = ()) -> None:
    """InputError, before the work, where the texts could not be written, or would overwrite what they are made from."""
    if len(os.fsencode(path.name)) > 200:  # of 255 bytes, some are a temporary file's
        raise InputError(f"{path} is too long a name for the texts' file: give --output a shorter one")
    if path == Path("-"):
        raise InputError("--output -: leave it out, the texts go to stdout then")
    if is_stream(path):
        return
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: give the name of a file in it")
    if path.exists() and any(file.exists() and path.samefile(file) for file in made_from):
        raise InputError(f"--output {path} would overwrite what the texts are made from: give another name")
    if path.name == "result.json" and is_run(path.parent):
        raise InputError(f"--output: {path} is a run's own file: give another name")
    parent = next(p for p in path.resolve().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--output {path}: {parent} is not a folder that can be written to")


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    trained, info = read_prefix(args)
    device, folder = pick_device(args.device), resolve_base_model(args.model, args.prefix, info)
    model = load_model(folder, device, pick_writing_dtype(args.dtype, device, folder))
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)

    rank, several = distributed.rank(), distributed.world_size() > 1
    drawing = {
        "sample": args.sample, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        "generator": torch.Generator(device).manual_seed(args.seed + rank), "batch_size": args.batch_size,
        "what": f"sources of process {rank}" if several else "sources",
    }  # fmt: skip
    if len(args.prefixes) > 1:
        prefixes = load_prefixes(args.prefixes, model)
        requests = read_requests(args.file, prefixes, args.limit)
        write_lines(write_requests(model, tokenizer, requests, prefixes, vars(args), drawing), args.output)
        return

    prefix = load_trained(trained, model) if trained else None
    info = info or finetune_metadata(model.config)
    trained_task = info.get("task", "")
    # Decides how texts are searched for and scored; a file of rows is only where the inputs come from.
    task = args.task if args.task and not args.task.endswith(".jsonl") else trained_task
    examples = read_examples(args, trained_task)[: args.limit]
    if args.evaluate:
        check_scorable(task, examples)
    max_source, search = args.max_source or trained_max_source(info), search_options(task, vars(args))
    texts = generate(
        model, tokenizer, distributed.shard([example.source for example in examples]), prefix=prefix,
        max_source=max_source, **search, **drawing, progress=len(examples) > 1 and rank == 0,
    )  # fmt: skip
    lines = write_lines(distributed.unshard(texts), args.output)
    if args.evaluate and rank == 0:
        settings = {**vars(args), **search, "max_source": max_source}
        evaluate(task, examples, lines, args.output.with_suffix(".json"), settings)


def read_prefix(args: Namespace) -> tuple[Path | None, dict[str, str]]:
    """The file that --prefix means, and what it says of itself; a fine-tuned model becomes --model instead."""
    if not args.prefix:
        return None, {}
    trained = find_trained(args.prefix)
    if not (trained / "config.json").is_file():
        return trained, read_trained(trained)[1]
    if args.model:
        raise InputError(f"--prefix {args.prefix} is a fine-tuned model, it needs no other: leave out --model")
    args.model = str(trained)
    return None, {}


def read_examples(args: Namespace, trained_task: str) -> list[Example]:
    """The inputs from wherever the command line says, in the form that the prefix was trained on."""
    rows = args.task or args.file
    if args.task or str(args.file).endswith(".jsonl"):
        field = args.topic_field if args.task else "prefix"  # as in requests for several prefixes
        examples = load_on_topics(rows, args.split, args.data, args.topics, field)
        name = prefix_name(args.prefix) if args.file and args.prefix else None
        if others := [e.topic for e in examples if name and e.topic not in (None, name)]:
            named = f'"prefix": {others[0]!r:.80}, given is {name!r}'
            raise InputError(f"{rows}: a row has {named}: give that --prefix, too")
        if not rows.endswith(".jsonl"):
            return examples
        return [
            Example(format_source(trained_task, e.source, f"{rows}, row {number}"), e.references)
            for number, e in enumerate(examples, 1)
        ]
    if not args.input and not args.file and distributed.world_size() > 1:
        raise InputError("stdin is one process's to read: give the inputs by --file")
    if not args.input and not args.file and sys.stdin.isatty():
        print("type inputs, one a line, then Ctrl-D", file=sys.stderr)
    lines = args.input or read_text(args.file or "-").split("\n")
    if lines[-1:] == [""]:
        lines.pop()  # what follows the last line end
    place = "--input" if args.input else args.file or "stdin"
    examples = [
        Example(format_source(trained_task, line, f"{place}, number {number}" if len(lines) > 1 else place), [])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not examples:
        raise InputError("no input: give --input TEXT, --file FILE, --task, or lines on stdin")
    if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        print(f"skipped {len(blank)} blank inputs, the first is number {blank[0]}", file=sys.stderr)
    return examples


def write_lines(texts: list[str], output: Path | None) -> list[str]:
    """Print the texts, or write them to the file `output`, one a line -> the lines. One alone is printed as it is."""
    lines = [" ".join(text.splitlines()) for text in texts]  # one text is one line, whatever characters it has
    if distributed.rank() > 0:
        return lines
    if output:
        with atomic_write(output) as file:
            file.writelines(line + "\n" for line in lines)
        print(f"wrote {len(lines)} texts to {output}", file=sys.stderr)
    else:
        print(*(texts if len(texts) == 1 else lines), sep="\n")
    return lines


if __name__ == "__main__":
    run_main(distributed.distributed_main(main))
