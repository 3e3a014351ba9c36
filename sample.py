"""Write texts with a trained prefix, and score them.

    python sample.py --prefix runs/e2e-gpt2-mini/prefix.safetensors --input "name[The Mill], food[Thai]"
    python sample.py --prefix ... --file inputs.txt --output texts.txt      one input a line, or a .jsonl file
    python sample.py --prefix ... --task e2e --split test --data e2e/ --evaluate
    python sample.py --prefix a.safetensors --prefix b.safetensors --file requests.jsonl      each row by its own
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch

from minprefix import distributed, generate, load_model, load_tokenizer, metrics, stack_prefixes
from minprefix.baselines import load_trained, read_trained, trained_file
from minprefix.data import SUMMARISATION, WEBNLG_SPLITS, Example, format_source, load_examples
from minprefix.examples import on_topics
from minprefix.files import InputError, atomic_write, check_above_zero, read_text, run_main
from minprefix.generate import recipe
from minprefix.hub import resolve_model
from minprefix.load import check_vocabulary, keep_freed_memory, pick_device, pick_dtype
from minprefix.slots import slot_accuracy


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prefix", type=Path, action="append", default=[],
        help="a run of train.py, its folder or METHOD.safetensors, or a PEFT folder (default: the model alone). "
             'Several: a .jsonl --file says which, {"source": ..., "prefix": file or folder name}')  # fmt: skip
    add("--model", help="a model's folder or name (default: the one the prefix was trained on)")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--input", nargs="+", metavar="TEXT", help="inputs, in the task's form")
    inputs.add_argument("--file", help='a text file with one input a line, or a .jsonl file with rows {"source": ...}')
    inputs.add_argument("--task", help="e2e, webnlg, dart, xsum, scitldr, FILE.jsonl: its inputs (default: from stdin)")
    add("--split", choices=[*WEBNLG_SPLITS, "all"], help="of --task (test; all rows of a FILE.jsonl)")
    add("--data", help="folder with the task's files")
    add("--topics", nargs="+", metavar="TOPIC", help="the inputs of --task on these topics only (WebNLG: categories)")
    add("--topic-field", default="topic", metavar="NAME", help="the key of a JSONL row's topic (%(default)s)")
    add("--limit", type=int, help="the first N inputs only")
    add("--max-source", type=int, help="cut sources to so many tokens (as in training; BART 512)")
    add("--beams", type=int, help="beam search with K beams, 1 is greedy (5; summaries 6; 1 with --sample)")
    add("--length-penalty", type=float, help="beam scores are divided by length ** this (1.0; summaries 0.8)")
    add("--no-repeat-ngram", type=int, help="no sequence of so many tokens occurs twice (0: it may; summaries 3)")
    add("--min-new-tokens", type=int, help="the shortest text, likewise (0; summaries 10)")
    add("--max-new-tokens", type=int, help="the longest text; BART's <s> and </s> count (64; summaries 60)")
    add("--sample", action="store_true", help="draw at random instead of searching")
    add("--temperature", type=float, default=1.0, help="with --sample (%(default)s)")
    add("--top-k", type=int, default=0, help="with --sample: only from the K likeliest tokens, 0 for all (%(default)s)")
    add("--top-p", type=float, default=1.0, help="with --sample: only from the likeliest, of this mass (%(default)s)")
    add("--seed", type=int, default=101, help="of --sample (%(default)s)")
    add("--batch-size", type=int, default=16, help="inputs at a time (%(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--output", type=Path, help="write the texts there, one a line, and the scores to a .json file beside")
    add("--evaluate", action="store_true", help="score the texts against the references, print and write the scores")
    args = parser.parse_args()
    args.prefixes, args.prefix = args.prefix, next(iter(args.prefix), None)  # all of them, the first
    args.split = args.split or ("all" if str(args.task).endswith(".jsonl") else "test")
    check_above_zero(args, ("limit", "max_source"))
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed is {args.seed}: it must be at least 0")
    if args.topics and not args.task:
        raise InputError("--topics chooses among the inputs of --task: give that, too")
    if len(args.prefixes) > 1 and (args.evaluate or not str(args.file).endswith(".jsonl")):
        raise InputError('several --prefix need --file FILE.jsonl with rows {"source": ..., "prefix": name}, unscored')
    if args.evaluate:
        inputs = args.split if args.task else Path(args.file or "input").stem
        args.output = args.output or default_folder(args) / f"texts-{inputs}.txt"
        if args.output.suffix == ".json":
            raise InputError(f"--output {args.output}: the scores go to a .json file of that name, choose another")
    if args.output and not os.access(next(p for p in args.output.resolve().parents if p.exists()), os.W_OK):
        raise InputError(f"--output {args.output}: that folder cannot be written to")
    return args


def default_folder(args):
    """Where scored texts go: the folder of the run that trained the prefix or the model, else the current one."""
    trained = args.prefix or Path(args.model or "")
    for folder in (trained, trained.parent):
        if (folder / "checkpoint.pt").exists():
            return folder
    return Path()


def main():
    args = parse_args()
    keep_freed_memory()
    trained = trained_file(args.prefix) if args.prefix else None
    if trained and (trained / "config.json").is_file():  # fine-tuned, a model by itself
        if args.model:
            raise InputError(f"--prefix {args.prefix} is a fine-tuned model, it needs no other: leave out --model")
        args.model, trained = str(trained), None
    info = read_trained(trained)[1] if trained else {}
    name = args.model or info.get("base_model")
    if name is None:
        raise InputError("which model? give --prefix FILE, or --model for a frozen model alone")
    device = pick_device(args.device)
    folder = resolve_model(name)
    model, tokenizer = load_model(folder, device, pick_dtype(args.dtype, device)), load_tokenizer(folder)
    if args.dtype == "auto" and model.head.weight.size(1) < 512:
        model = load_model(folder, device)  # in float32: a narrow model is as fast, and free of bfloat16's rounding
    check_vocabulary(tokenizer, model, folder)
    rank, several = distributed.rank(), distributed.world_size() > 1
    drawing = {
        "sample": args.sample, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        "generator": torch.Generator(device).manual_seed(args.seed + rank), "batch_size": args.batch_size,
        "what": f"sources of process {rank}" if several else "sources",
    }  # fmt: skip
    if len(args.prefixes) > 1:
        put(write_requests(args, model, tokenizer, drawing), args.output)
        return
    prefix = load_trained(trained, model) if trained else None
    info = info or trained_info(model)
    trained_task = info.get("task", "")
    # Decides how texts are searched for and scored; a file of rows is only where the inputs come from.
    task = args.task if args.task and not args.task.endswith(".jsonl") else trained_task
    examples = read_examples(args, trained_task)[: args.limit]
    max_source, search = args.max_source or trained_max_source(info), search_options(args, task)
    if args.evaluate and not all(example.references for example in examples):
        raise InputError("--evaluate needs references: use --task with a split, or a .jsonl file with targets")
    if args.evaluate and task in SUMMARISATION:
        metrics.rouge_scorer()  # if the package is missing, say so before the work

    texts = generate(
        model, tokenizer, distributed.share([example.source for example in examples]), prefix=prefix,
        max_source=max_source, **search, **drawing, progress=len(examples) > 1 and rank == 0,
    )  # fmt: skip
    lines = put(distributed.joined(texts), args.output)
    if args.evaluate and rank == 0:
        settings = {**vars(args), **search, "max_source": max_source}
        evaluate(args.output, task, lines, examples, settings)


def put(texts, output):
    """Print the texts, or write them to the file `output`, one a line -> the lines."""
    lines = [" ".join(text.splitlines()) for text in texts]  # one text is one line, whatever characters it has
    if distributed.rank() > 0:
        return lines
    if output:
        with atomic_write(output) as file:
            file.writelines(line + "\n" for line in lines)
        print(f"wrote {len(lines)} texts to {output}", file=sys.stderr)
    else:
        print(*lines, sep="\n")
    return lines


def write_requests(args, model, tokenizer, drawing):
    """The texts for the rows of --file, each with the prefix that it names, in its task's form, by its task's search.

    Rows that are searched for alike share their batches.
    """
    prefixes = load_named(args.prefixes, model)
    names, requests = list(prefixes), load_examples(args.file, "all", topic_field="prefix")[: args.limit]
    groups = {}
    for i, request in enumerate(requests):
        if request.topic not in prefixes:
            known = f"the prefixes are {', '.join(names)}"
            raise InputError(f'{args.file}: request {i + 1} has "prefix": {request.topic!r:.80}, {known}')
        info = prefixes[request.topic].info
        search = search_options(args, info.get("task", ""))
        search["max_source"] = args.max_source or trained_max_source(info)
        groups.setdefault(tuple(search.items()), []).append(i)
    texts = [None] * len(requests)
    for search, group in groups.items():
        mine = [requests[i] for i in distributed.share(group)]
        sources = [format_source(prefixes[request.topic].info.get("task", ""), request.source) for request in mine]
        stacked = stack_prefixes(list(prefixes.values()), [names.index(request.topic) for request in mine])
        progress = len(group) > 1 and distributed.rank() == 0
        written = generate(model, tokenizer, sources, stacked, **dict(search), **drawing, progress=progress)
        for i, text in zip(group, distributed.joined(written), strict=True):
            texts[i] = text
    return texts


def load_named(paths, model):
    """{name: prefix} of prefix files and folders, by the file's name without its ending or the folder's."""
    prefixes = {}
    for path in paths:
        name = path.resolve().name if path.is_dir() else path.stem
        if name in prefixes:
            raise InputError(f"two --prefix are called {name!r}: rename one, or give the folders of their runs instead")
        method = read_trained(trained_file(path))[1].get("method", "prefix")
        if method not in ("prefix", "embedding"):
            raise InputError(f"--prefix {path} is of --method {method}: only prefixes and embeddings share a batch")
        prefixes[name] = load_trained(trained_file(path), model)
    return prefixes


def search_options(args, task):
    """The task's usual beam search, as far as the command line says nothing else."""
    options = {**recipe(task), **({"beams": 1} if args.sample else {})}
    given = {key: getattr(args, key) for key in options if getattr(args, key) is not None}
    options["min_new_tokens"] = min(options["min_new_tokens"], given.get("max_new_tokens", math.inf))
    return {**options, **given}


def trained_info(model):
    """What train.py wrote into the config.json of a fine-tuned model (strings); nothing of any other model."""
    info = model.config.get("minprefix")
    return {key: str(value) for key, value in info.items()} if isinstance(info, dict) else {}


def trained_max_source(info):
    """Where train.py cut the sources, if it was told to: the prefix file, or the fine-tuned model's folder, says so."""
    length = info.get("max_source", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 8 else None


def evaluate(output, task, lines, examples, settings):
    """Score the texts; print the scores, with their intervals where there are any, and write them beside the texts."""
    references = [example.references for example in examples]
    if task in SUMMARISATION:
        scores, intervals = metrics.summary_score(lines, references)
    else:
        scores, intervals = metrics.score(lines, references), {}
        for metric, needs in (("METEOR", "pip install -e '.[eval]' and Java"), ("TER", "pip install -e '.[eval]'")):
            if metric not in scores:
                print(f"{metric} left out: it needs {needs}", file=sys.stderr)
        if task == "e2e":
            scores.update(slot_accuracy([example.source for example in examples], lines))
    bounds = {metric: f" [{low:.4f}, {high:.4f}]" for metric, (low, high) in intervals.items()}
    print("  ".join(f"{metric} {value:.4f}{bounds.get(metric, '')}" for metric, value in scores.items()))
    with atomic_write(output.with_suffix(".json")) as file:
        result = {"scores": scores, "intervals": intervals, "inputs": len(lines), "settings": settings}
        json.dump(result, file, indent=2, default=str)


def read_examples(args, trained_task):
    """The inputs from wherever the command line says, in the form that the prefix was trained on."""
    rows = args.task or args.file
    if rows and (args.task or rows.endswith(".jsonl")):
        examples = load_examples(rows, args.split if args.task else "all", args.data, args.topic_field)
        if args.topics:
            examples = on_topics(examples, args.topics, f"{args.task}, {args.split} split")
        if not rows.endswith(".jsonl"):
            return examples
        return [Example(format_source(trained_task, e.source), e.references) for e in examples]
    if not args.input and not args.file and distributed.world_size() > 1:
        raise InputError("stdin is one process's to read: give the inputs by --file")
    lines = args.input or read_text(args.file or "-").split("\n")
    if lines[-1:] == [""]:
        lines.pop()  # what follows the last line end
    examples = [Example(format_source(trained_task, line), []) for line in lines if line.strip()]
    if not examples:
        raise InputError("no input: give --input TEXT, --file FILE, --task, or lines on stdin")
    if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        print(f"skipped {len(blank)} blank inputs, the first is number {blank[0]}", file=sys.stderr)
    return examples


if __name__ == "__main__":
    run_main(distributed.each_rank(main))
