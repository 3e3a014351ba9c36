"""The command line of train.py."""

import os
from argparse import Namespace
from pathlib import Path

from minprefix.cli.options import Parser, add_device_options, check_above_zero, check_not_negative, check_requires, flag
from minprefix.cli.settings import OPTIONS, fill_settings, other_options, settings_table
from minprefix.core.prefix_kv import KVInfix
from minprefix.data.tasks import check_task_files
from minprefix.formats.hub import resolve_model
from minprefix.formats.prefix_file import load_prefix
from minprefix.methods.files import find_trained
from minprefix.system.device import pick_device
from minprefix.system.errors import InputError

# Options not compared on resume: they may change, or train() compares what they lead to (weights, data, dtype, steps).
NOT_IN_SETTINGS = {
    "model", "task", "data", "skip_long", "epochs", "steps", "accumulate", "eval_inputs", "beams", "dtype", "device",
    "out", "resume", "compile",
}  # fmt: skip


def parse_args(description: str = "") -> Namespace:
    """The options, checked; `model` as a folder, and defaults filled in. description: the first part of --help."""
    parser = Parser("python train.py", description, settings_table())

    group = parser.add_argument_group("what to train on")
    add, subset = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--task", default="e2e", help="e2e, webnlg, dart, xsum, scitldr, or your FILE.jsonl or FILE.csv (%(default)s)")
    add("--data", metavar="FOLDER", help="of the task's files (e2e: data/e2e, else a download, else a sample)")
    subset("--limit", type=int, metavar="N", help="only the first N pairs of a source and a target")
    subset("--low-data", type=int, metavar="N", help="N pairs drawn at random, and 30%% of N for dev losses")
    add("--low-data-seed", type=int, metavar="N", help="seed of that draw, independent of --seed (0)")
    add("--topics", nargs="+", metavar="TOPIC", help="only pairs on these topics (WebNLG: categories)")
    add("--topic-field", metavar="NAME", help="the key of a JSONL row's topic (topic)")
    add("--skip-long", action="store_true", help="leave out pairs that are too long for the model")
    add("--max-source", type=int, metavar="N", help="cut sources to N tokens (BART 512; GPT-2's are not cut)")

    add = parser.add_argument_group("what is trained").add_argument
    add("--model", default="gpt2-mini", help="a GPT-2 or BART: a folder, bundled, or on the hub (%(default)s)")
    add("--method", choices=OPTIONS, metavar="METHOD", default="prefix", help=f"{', '.join(OPTIONS)} (%(default)s)")
    add("--prefix-length", type=int, metavar="N", help="number of virtual tokens (by model)")
    add("--hidden", type=int, metavar="N", help="width of the prefix's MLP; 0: none, and Muon for prefixes (by model)")
    add("--adapter-width", type=int, metavar="N", help="bottleneck of an adapter (by model; 3%% of GPT-2 medium)")
    add("--init", metavar="START", help="words, or a trained prefix, run or PEFT folder to start from (random)")
    add("--sites", nargs="+", metavar="SITE", help="BART: some of encoder, decoder, cross (all)")
    add("--offset", type=int, metavar="N", help="position of the first token (the prefix length; authors' BART 0)")

    group = parser.add_argument_group("how long and how fast")
    add, duration = group.add_argument, group.add_mutually_exclusive_group().add_argument
    duration("--epochs", type=float, metavar="X", help="passes over the training pairs (by model)")
    duration("--steps", type=int, metavar="N", help="steps, instead of --epochs (by model)")
    add("--batch-size", type=int, metavar="N", help="pairs in a batch (by model)")
    add("--accumulate", type=int, metavar="N", default=1, help="batches in a step, as if they were one (%(default)s)")
    add("--group", type=int, metavar="N", help="at most N references share one reading of their source (1)")
    add("--lr", type=float, metavar="X", help="learning rate, decays to 0 (by model and method)")
    add("--warmup", type=int, metavar="N", default=0, help="steps in which it rises first (%(default)s)")
    add("--seed", type=int, metavar="N", default=101, help="seed of the initial values and the order (%(default)s)")

    add = parser.add_argument_group("how it is measured").add_argument
    add("--eval-every", type=int, metavar="N", help="steps between dev losses and checkpoints (by model)")
    add("--eval-inputs", type=int, metavar="N", default=100, help="test inputs to write for at the end (%(default)s)")
    add("--beams", type=int, metavar="K", help="beams of the search for those texts (5; summaries 6)")

    group = parser.add_argument_group("where")
    add = group.add_argument
    add("--out", type=Path, metavar="FOLDER", help="for prefix, log, result (runs/TASK-MODEL, numbered if taken)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add_device_options(group)
    add("--compile", action="store_true", help="on a GPU, compile the layers: faster steps after a minute or so")

    args = parser.parse_args()
    above_zero = ("epochs", "steps", "limit", "low_data", "batch_size", "lr", "eval_every", "beams", "max_source")
    check_above_zero(args, (*above_zero, "accumulate", "group", "prefix_length", "adapter_width"))
    check_not_negative(args, ("hidden", "warmup", "eval_inputs", "seed", "low_data_seed", "offset"))
    check_requires(args, {"topic_field": "topics", "low_data_seed": "low_data", "beams": "eval_inputs"})
    if args.compile and pick_device(args.device) != "cuda":
        raise InputError("--compile has no effect without a GPU of NVIDIA's or AMD's: leave it out")
    for key in sorted(other_options(args.method)):
        if getattr(args, key) is not None:
            raise InputError(f"{flag(key)} has no effect with --method {args.method}: leave it out")
    if args.init is not None:
        resolve_init(args)
    check_task_files(args.task, args.data)  # before resolve_model, which may download
    args.model = resolve_model(args.model)
    fill_settings(args)
    return args


def resolve_init(args: Namespace) -> None:
    """Take length, sites and offset from --init if that is a trained prefix, whose keys and values are trained on."""
    if not os.path.exists(args.init):
        if " " not in args.init and (os.sep in args.init or args.init.endswith(".safetensors")):
            raise InputError(f"--init: there is nothing at {args.init}: give a prefix, a run's folder, or words")
        return
    prefix = load_prefix(find_trained(args.init))
    if isinstance(prefix, KVInfix) != (args.method == "infix"):
        raise InputError(f"--init {args.init} is of --method {prefix.method}, not {args.method}")
    lengths = {kv.size(3) for kv in prefix.kv.values()}
    if len(lengths) > 1:
        raise InputError(f"--init {args.init} has prefixes of different lengths at its sites: one length is trained")
    own = {"prefix_length": min(lengths), "hidden": 0, "sites": list(prefix.kv), "offset": prefix.position_offset}
    for key in own.keys() & OPTIONS[args.method]:
        if getattr(args, key) not in (None, own[key]):
            raise InputError(f"{flag(key)} does not go with --init {args.init}, which sets it: leave it out")
        setattr(args, key, own[key])
