"""Write texts with a trained prefix, and score them.

    python sample.py --prefix runs/e2e-gpt2-mini/prefix.safetensors --input "name[The Mill], food[Thai]"
    python sample.py --prefix ... --file inputs.txt --output texts.txt      one input a line, or a .jsonl file
    python sample.py --prefix ... --task e2e --split test --data e2e/ --beams 5 --evaluate
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from minprefix import generate, load_model, load_prefix, load_tokenizer, metrics
from minprefix.checkpoint import resolve_model
from minprefix.data import Example, format_source, load_examples
from minprefix.files import InputError, atomic_write, read_text, run_main
from minprefix.load import check_vocabulary, pick_device, pick_dtype
from minprefix.prefix import check_fits


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prefix", type=Path, help="a prefix.safetensors of train.py; without one the frozen model writes alone")
    add("--model", help="the base model's folder or bundled name (default: the one the prefix was trained on)")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--input", nargs="+", metavar="TEXT", help="inputs, in the task's form")
    inputs.add_argument("--file", help='a text file with one input a line, or a .jsonl file with rows {"source": ...}')
    inputs.add_argument("--task", help='"e2e" or FILE.jsonl: the inputs of its --split (default: inputs from stdin)')
    add("--split", choices=["train", "dev", "test", "all"], help="of --task (test; all rows of a FILE.jsonl)")
    add("--data", help="folder with the task's files")
    add("--limit", type=int, help="the first N inputs only")
    add("--beams", type=int, help="beam search with K beams, 1 is greedy (5)")
    add("--length-penalty", type=float, default=1.0, help="beam scores are divided by length ** this (%(default)s)")
    add("--max-new-tokens", type=int, default=64, help="%(default)s")
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
    if args.beams is None:
        args.beams = 1 if args.sample else 5
    args.split = args.split or ("all" if str(args.task).endswith(".jsonl") else "test")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}: it must be above 0")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed is {args.seed}: it must be at least 0")
    if args.evaluate:
        inputs = args.split if args.task else Path(args.file or "input").stem
        args.output = args.output or (args.prefix.parent if args.prefix else Path()) / f"texts-{inputs}.txt"
        if args.output.suffix == ".json":
            raise InputError(f"--output {args.output}: the scores go to a .json file of that name, choose another")
    if args.output and not os.access(next(p for p in args.output.resolve().parents if p.exists()), os.W_OK):
        raise InputError(f"--output {args.output}: that folder cannot be written to")
    return args


def main():
    args = parse_args()
    prefix = load_prefix(args.prefix) if args.prefix else None
    name = args.model or (prefix.info.get("base_model") if prefix else None)
    if name is None:
        raise InputError("which model? give --prefix FILE, or --model for a frozen model alone")
    device = pick_device(args.device)
    folder = resolve_model(name)
    model, tokenizer = load_model(folder, device, pick_dtype(args.dtype, device)), load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    if prefix:
        check_fits(prefix, model, args.prefix)
    examples = read_examples(args, prefix.info.get("task", "") if prefix else "")[: args.limit]
    if args.evaluate and not all(example.references for example in examples):
        raise InputError("--evaluate needs references: use --task with a split, or a .jsonl file with targets")

    texts = generate(
        model, tokenizer, [example.source for example in examples], prefix=prefix, beams=args.beams,
        max_new_tokens=args.max_new_tokens, length_penalty=args.length_penalty, sample=args.sample,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        generator=torch.Generator(device).manual_seed(args.seed), batch_size=args.batch_size,
        progress=len(examples) > 1,
    )  # fmt: skip
    lines = [" ".join(text.splitlines()) for text in texts]  # one text is one line, whatever characters it has
    if args.output:
        with atomic_write(args.output) as file:
            file.writelines(line + "\n" for line in lines)
        print(f"wrote {len(lines)} texts to {args.output}", file=sys.stderr)
    else:
        print(*lines, sep="\n")
    if args.evaluate:
        scores = metrics.score(lines, [example.references for example in examples])
        if "METEOR" not in scores:
            print("METEOR left out: it needs pip install -e '.[eval]' and Java", file=sys.stderr)
        print("  ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
        with atomic_write(args.output.with_suffix(".json")) as file:
            result = {"scores": scores, "inputs": len(lines), "settings": vars(args)}
            json.dump(result, file, indent=2, default=str)


def read_examples(args, trained_task):
    """The inputs from wherever the command line says, in the form that the prefix was trained on."""
    if args.task:
        return load_examples(args.task, args.split, args.data)
    if args.file and args.file.endswith(".jsonl"):
        examples = load_examples(args.file, "all")
        return [Example(format_source(trained_task, e.source), e.references) for e in examples]
    lines = args.input or read_text(args.file or "-").split("\n")
    examples = [Example(format_source(trained_task, line), []) for line in lines if line.strip()]
    if not examples:
        raise InputError("no input: give --input TEXT, --file FILE, --task, or lines on stdin")
    return examples


if __name__ == "__main__":
    run_main(main)
