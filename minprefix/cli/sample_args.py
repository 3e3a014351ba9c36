"""The command line of sample.py."""

import os
import sys
from argparse import Namespace
from pathlib import Path

from minprefix.cli import options
from minprefix.cli.runs import is_run, texts_file
from minprefix.data.tasks import ROW_SUFFIXES, WEBNLG_SPLITS, check_task_files
from minprefix.system.errors import InputError
from minprefix.system.files import check_writable

SPLITS = (*WEBNLG_SPLITS, "all")


def parse_args(description: str = "") -> Namespace:
    """The options, checked, defaults filled in. description: the first part of --help.

    prefixes: all that are given; prefix: the first, or None.
    """
    parser = options.Parser("python sample.py", description)

    add = parser.add_argument_group("what writes").add_argument
    add("--prefix", dest="prefixes", type=Path, action="append", default=[], metavar="PATH",
        help="a run's folder, or a file in it; a PEFT folder (none: the model alone)")  # fmt: skip
    add("--model", help="a folder or a name (the one that the prefix was trained on)")

    group = parser.add_argument_group("inputs")
    add, inputs = group.add_argument, group.add_mutually_exclusive_group().add_argument
    inputs("--input", nargs="+", metavar="TEXT", help="inputs, in the form of the prefix's task")
    inputs("--file", help="one input a line, or a .jsonl or .csv file (none: stdin)")
    inputs("--task", help="inputs with references: e2e, webnlg, ..., FILE.jsonl, FILE.csv")
    add("--split", choices=SPLITS, metavar="SPLIT", help=f"{', '.join(SPLITS)} (test; of your file all)")
    add("--data", metavar="FOLDER", help="folder of the task's files")
    add("--topics", nargs="+", metavar="TOPIC", help="only inputs of --task on these topics (WebNLG: categories)")
    add("--topic-field", metavar="NAME", help="the key of a JSONL row's topic (topic)")
    add("--limit", type=int, metavar="N", help="the first N inputs only")
    add("--max-source", type=int, metavar="N", help="cut sources to N tokens (as in training; BART 512)")

    add = parser.add_argument_group("how it writes").add_argument
    add("--beams", type=int, metavar="K", help="beams of the search, 1 is greedy (5; summaries 6; 1 with --sample)")
    add("--max-new-tokens", type=int, metavar="N", help="the longest text (64; triples 100; summaries 60)")
    add("--min-new-tokens", type=int, metavar="N", help="the shortest (0; summaries 10)")
    add("--length-penalty", type=float, metavar="X", help="scores are divided by length ** X (1.0; summaries 0.8)")
    add("--no-repeat-ngram", type=int, metavar="N", help="no N tokens occur twice, 0: they may (0; summaries 3)")
    add("--sample", action="store_true", help="draw at random instead of searching")
    add("--temperature", type=float, metavar="X", help="with --sample: divides the logits (1.0)")
    add("--top-p", type=float, metavar="X", help="with --sample: from the likeliest tokens, of mass X (1.0)")
    add("--top-k", type=int, metavar="K", help="with --sample: from the K likeliest tokens, 0 for all (0)")
    add("--seed", type=int, metavar="N", help="with --sample (101)")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="FILE", help="write the texts there, one a line, not to stdout")
    add("--return", dest="returned", type=int, metavar="N", help="N texts for each input, at most the beams; as JSONL")
    add("--scores", action="store_true", help="with their scores, log-probability / length ** penalty; as JSONL")
    add("--evaluate", action="store_true", help="print scores and write them next to the texts, as .json")

    group = parser.add_argument_group("where")
    group.add_argument("--batch-size", type=int, metavar="N", default=16, help="inputs at a time (%(default)s)")
    options.add_device_options(group)

    args = parser.parse_args()
    check(args)
    own_rows = args.task and args.task.endswith(ROW_SUFFIXES)
    if args.evaluate and own_rows and not args.split and Path(args.task).stem != "test":
        print(f"scoring all of {args.task}: if it was trained on, --split test is what was held out", file=sys.stderr)
    defaults = {"split": "all" if own_rows or not args.task else "test", "topic_field": "topic"}
    options.fill_defaults(args, {**defaults, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 101})
    args.prefix = args.prefixes[0] if args.prefixes else None
    if args.evaluate and not args.output:
        inputs = args.split if args.task else Path(args.file or "input").stem
        args.output = texts_file(args.prefix or Path(args.model or ""), args.task, inputs, args.topics or [])
    check_outputs(args)
    return args


def check(args: Namespace) -> None:
    """InputError where a number makes no sense, or an option has no effect."""
    options.check_above_zero(args, ("limit", "max_source"))
    options.check_not_negative(args, ("seed",))
    options.check_requires(args, dict.fromkeys(("temperature", "top_k", "top_p", "seed"), "sample"))
    options.check_requires(args, {"split": "task", "data": "task", "topics": "task", "topic_field": "topics"})
    if args.length_penalty is not None and (args.sample or args.beams == 1) and not args.scores:
        raise InputError("--length-penalty does nothing without a search by several --beams: leave it out")
    if len(args.prefixes) > 1 and (args.evaluate or not str(args.file).endswith(ROW_SUFFIXES)):
        raise InputError('several --prefix need --file FILE.jsonl with rows {"source": ..., "prefix": name}, unscored')
    if args.task:
        check_task_files(args.task, args.data)


def check_outputs(args: Namespace) -> None:
    """InputError, before the work, if an output cannot be written or is something that the run reads or keeps."""
    outputs = [args.output, args.output.with_suffix(".json")] if args.evaluate else [args.output] if args.output else []
    if len(set(outputs)) < len(outputs):
        raise InputError(f"--output {args.output}: the scores go to a .json file of that name, choose another")
    read = [*args.prefixes, *(name for name in (args.file, args.task) if name)]
    for path in outputs:
        check_writable(path)
        kept = path.name == "result.json" and is_run(path.parent)
        if kept or path.exists() and any(os.path.exists(file) and path.samefile(file) for file in read):
            raise InputError(f"--output: this would overwrite {path}, which is not sample.py's: give another name")
