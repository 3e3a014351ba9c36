"""Train a prefix on a frozen language model, or what it is compared with, and show what it writes.

    python train.py                                                     the bundled GPT-2, E2E
    python train.py --data e2e/ --epochs 5 --out runs/mine --resume     E2E itself; go on if stopped
    python train.py --model path/to/gpt2 --task my.jsonl --lr 5e-5      any model, your own data
    python train.py --model bart-mini --task scitldr --data scitldr/    summaries, by a BART
    python train.py --method finetune --data e2e/                       all weights, to compare with
    torchrun --nproc_per_node=4 train.py --data e2e/                    by 4 GPUs, or processes

Defaults stand in parentheses; those that depend on the model are in the table at the end.
"""

import json
import math
import time
from argparse import Namespace
from pathlib import Path

import torch

from minprefix import load_model, load_tokenizer
from minprefix.cli.curve import plot_curve, text_curve
from minprefix.cli.evaluation import compare, load_before_after
from minprefix.cli.options import DEVICES, DTYPES, Parser, check_above_zero, check_not_negative, check_requires, flag
from minprefix.cli.runs import disk_size, has_checkpoint, remove_half_written, resumable, run_folder, sample_command
from minprefix.cli.search import recipe
from minprefix.cli.settings import OPTIONS, fill_settings, other_options, settings_table
from minprefix.core.batches import Example, Pair, batches_per_epoch, check_vocabulary, sequence_form
from minprefix.core.generate import Search
from minprefix.core.model import Model
from minprefix.core.prefix import Prefix, count_parameters, fingerprint
from minprefix.core.training import train
from minprefix.data.examples import evenly_spaced
from minprefix.data.pairs import load_inputs, load_pairs
from minprefix.data.tasks import TRIPLES, check_place
from minprefix.formats.hub import resolve_model
from minprefix.formats.load import pick_writing_dtype
from minprefix.formats.tokenizer import Tokenizer
from minprefix.methods.baselines import make_method
from minprefix.methods.files import save_method
from minprefix.system import distributed
from minprefix.system.device import keep_freed_memory, pick_device, pick_dtype
from minprefix.system.errors import InputError, run_main
from minprefix.system.files import atomic_write

# What may change when a run is resumed; train() itself compares the data, the model and its dtype, and the steps.
MAY_CHANGE = ("model", "task", "data", "epochs", "steps", "eval_inputs", "beams", "dtype", "device", "out", "resume")


def parse_args() -> Namespace:
    parser = Parser("python train.py", __doc__, settings_table())

    group = parser.add_argument_group("what to train on")
    add, subset = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--task", default="e2e", help="e2e, webnlg, dart, xsum, scitldr, or FILE.jsonl of your own (%(default)s)")
    add("--data", metavar="FOLDER", help="of the task's files (e2e: data/e2e, else a download, else a sample)")
    subset("--limit", type=int, metavar="N", help="the first N pairs of a source and a target only")
    subset("--low-data", type=int, metavar="N", help="N pairs drawn at random, and 30%% of N for dev losses")
    add("--low-data-seed", type=int, metavar="N", help="draws those pairs, whatever --seed is (0)")
    add("--topics", nargs="+", metavar="TOPIC", help="pairs on these only (WebNLG: categories)")
    add("--topic-field", metavar="NAME", help="the key of a JSONL row's topic (topic)")
    add("--max-source", type=int, metavar="N", help="cut sources to N tokens (BART 512; GPT-2's are not cut)")

    add = parser.add_argument_group("what is trained").add_argument
    add("--model", default="gpt2-mini", help="a GPT-2 or BART: a folder, bundled, or of the hub (%(default)s)")
    add("--method", choices=OPTIONS, metavar="METHOD", default="prefix", help=f"{', '.join(OPTIONS)} (%(default)s)")
    add("--prefix-length", type=int, metavar="N", help="virtual tokens (by model)")
    add("--hidden", type=int, metavar="N", help="width of the prefix's MLP; 0: none, and Muon for prefixes (by model)")
    add("--adapter-width", type=int, metavar="N", help="of an adapter's bottleneck (by model; 3%% of GPT-2 medium)")
    add("--init", metavar="TEXT", help='words that a prefix starts from, "table to text :" (random numbers)')
    add("--sites", nargs="+", metavar="SITE", help="BART: some of encoder, decoder, cross (all)")
    add("--offset", type=int, metavar="N", help="position of the first token (the prefix length; authors' BART 0)")

    group = parser.add_argument_group("how long and how fast")
    add, duration = group.add_argument, group.add_mutually_exclusive_group().add_argument
    duration("--epochs", type=float, metavar="X", help="passes over the training pairs (by model)")
    duration("--steps", type=int, metavar="N", help="steps, instead of --epochs (by model)")
    add("--batch-size", type=int, metavar="N", help="pairs in a step (by model)")
    add("--lr", type=float, metavar="X", help="learning rate, decays to 0 (by model and method)")
    add("--warmup", type=int, metavar="N", default=0, help="steps in which it rises first (%(default)s)")
    add("--seed", type=int, metavar="N", default=101, help="of the first numbers and the order (%(default)s)")

    add = parser.add_argument_group("how it is measured").add_argument
    add("--eval-every", type=int, metavar="N", help="steps between dev losses and checkpoints (by model)")
    add("--eval-inputs", type=int, metavar="N", default=100, help="test inputs to write for at the end (%(default)s)")
    add("--beams", type=int, metavar="K", help="of the beam search for those texts (5; summaries 6)")

    add = parser.add_argument_group("where").add_argument
    add("--out", type=Path, metavar="FOLDER", help="for prefix, log, result (runs/TASK-MODEL, numbered if taken)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    add("--device", choices=DEVICES, metavar="NAME", default="auto", help="cpu, cuda or mps (%(default)s)")
    add("--dtype", choices=DTYPES, metavar="TYPE", default="auto", help="float32 or bfloat16 (%(default)s)")

    args = parser.parse_args()
    check(args)
    check_place(args.task, args.data)  # before what may be a download
    args.model = resolve_model(args.model)
    fill_settings(args)
    return args


def check(args: Namespace) -> None:
    """InputError where a number makes no sense, or an option has no effect."""
    above_zero = ("epochs", "steps", "limit", "low_data", "batch_size", "lr", "eval_every", "beams", "max_source")
    check_above_zero(args, (*above_zero, "prefix_length", "adapter_width"))
    if args.out == Path():
        raise InputError("--out is empty, or the current folder: give a folder for the run")
    check_not_negative(args, ("hidden", "warmup", "eval_inputs", "seed", "low_data_seed", "offset"))
    for key in sorted(other_options(args.method)):
        if getattr(args, key) is not None:
            raise InputError(f"{flag(key)} has no effect with --method {args.method}: leave it out")
    check_requires(args, {"topic_field": "topics", "low_data_seed": "low_data", "beams": "eval_inputs"})
    if args.steps and args.warmup >= args.steps:
        raise InputError(f"--warmup is {args.warmup}: it must be less than the {args.steps} steps")
    if args.topic_field and args.task in ("e2e", *TRIPLES):
        raise InputError(f"--topic-field does nothing for --task {args.task}, which is not read from rows")


def main() -> None:
    args = parse_args()
    with run_folder(args.out, args.resume, args.task, args.model) as args.out, resumable(args.out):
        run(args)


def run(args: Namespace) -> None:
    started = time.time()
    torch.manual_seed(args.seed)
    keep_freed_memory()

    # The frozen model; weights that are trained themselves are float32, whatever they are multiplied in.
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    finetune = args.method in ("finetune", "top2")
    model = load_model(args.model, device, torch.float32 if finetune else dtype)
    base_fingerprint = fingerprint(model)
    tokenizer = load_tokenizer(args.model)
    check_vocabulary(tokenizer, model, args.model)
    if finetune:
        model.config["eos_token_id"] = tokenizer.end_id  # of the targets that it is trained on
    search = {**recipe(args.task), "beams": args.beams}  # for the texts at the end
    if args.eval_inputs:
        Search(args.beams).check(model, tokenizer.newline_ids)

    # What is trained, and on what.
    trainable = make_method(
        args.method, model, length=args.prefix_length or 0, mlp_width=args.hidden or 0,
        adapter_width=args.adapter_width or 0, position_offset=args.offset, sites=args.sites,
    )  # fmt: skip
    trainable.to(device)
    train_pairs, dev_pairs, test = load_data(args, tokenizer, model, trainable.position_offset)
    steps = args.steps or math.ceil(args.epochs * batches_per_epoch(train_pairs, args.batch_size))
    resuming = args.resume and has_checkpoint(args.out)
    if args.init is not None and not resuming and isinstance(trainable, Prefix):
        trainable.init_from_words(model, tokenizer, args.init)

    several = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"{args.model} in {dtype} on {device}{several}")
    print(f"{len(train_pairs):,} training pairs, {steps:,} steps of {args.batch_size}, results in {args.out}")
    place = f" of length {args.prefix_length} at {', '.join(trainable.sites)}" if type(trainable) is Prefix else ""
    trained, saved, total = count_parameters(trainable, model)
    print(f"{args.method}{place}: trains {trained:,} numbers ({trained / total:.2%} of the model's {total:,}), "
          f"saves {saved:,} ({saved / total:.2%})")  # fmt: skip
    if args.resume and not resuming:
        print(f"nothing to resume in {args.out}: starting")
    if distributed.rank() == 0:
        remove_half_written(args.out)

    mixed = finetune and dtype != torch.float32
    autocast = torch.autocast(device, dtype, enabled=mixed, cache_enabled=False)  # no cache: the weights change
    with autocast:
        log, best_step = train(
            model, trainable, tokenizer, train_pairs, dev_pairs, args.out, steps=steps, batch_size=args.batch_size,
            lr=args.lr, warmup=args.warmup, eval_every=args.eval_every, seed=args.seed, resume=args.resume,
            settings={key: value for key, value in vars(args).items() if key not in MAY_CHANGE},
        )  # fmt: skip
    if distributed.rank() > 0:  # the rest is one process's work
        return

    path = save_method(trainable, model, args.method, args.out, args.model, base_fingerprint, task=args.task,
                      sequence=sequence_form(model), max_source=args.max_source)  # fmt: skip
    best = min(row["dev_loss"] for row in log)
    print(f"dev loss {log[0]['dev_loss']:.3f} before training, {best:.3f} at step {best_step} (kept)")
    if best_step == 0:
        print("training did not lower the dev loss: what is kept is untrained; try another --lr, or more steps")
    print(f"\n{text_curve(log)}")
    files = ["log.jsonl", "result.json", *(["loss.png"] if plot_curve(log, args.out / "loss.png") else [])]

    # Texts without and with what was trained, which is read back from its file.
    scores: dict[str, dict[str, float]] = {}
    if test:
        writing = pick_writing_dtype(args.dtype, device, args.model)  # as sample.py writes
        writers = load_before_after(args.method, path, model, args.model, device, writing)
        scores = compare(args.task, args.data, tokenizer, writers, test, args.max_source, search)
    seconds = round(time.time() - started, 1)
    result = {"dev_loss": best, "best_step": best_step, "scores": scores, "steps": steps, "seconds": seconds,
              "trained": trained, "saved": saved, "share": saved / total,
              "dtype": str(dtype), "device": device, "settings": {**search, **vars(args)}}  # fmt: skip
    with atomic_write(args.out / "result.json") as file:
        json.dump(result, file, indent=2, default=str)
    print(f"\nwrote {path} ({disk_size(path) / 1024:,.0f} KiB), {', '.join(files)} in {seconds:.0f} s; try")
    print(f"  {sample_command(path, args.task, args.data, test)}")


def load_data(
    args: Namespace, tokenizer: Tokenizer, model: Model, start: int
) -> tuple[list[Pair], list[Pair], list[Example]]:
    """Training pairs, at most 500 dev pairs, --eval-inputs test examples: all fit the model.

    start: position of the first token after the prefix.
    """
    common = (tokenizer, model, start, args.max_source)
    chosen = {"data": args.data, "topics": args.topics, "topic_field": args.topic_field, "low_data": args.low_data,
              "seed": args.low_data_seed}  # fmt: skip
    train_pairs = load_pairs(args.task, "train", *common, **chosen, limit=args.limit)
    dev_pairs = load_pairs(args.task, "dev", *common, **chosen)
    new_tokens = recipe(args.task)["max_new_tokens"]
    test = load_inputs(args.task, "test", args.eval_inputs, *common, data=args.data, topics=args.topics,
                       topic_field=args.topic_field, new_tokens=new_tokens)  # fmt: skip
    return train_pairs, evenly_spaced(dev_pairs, 500), test


if __name__ == "__main__":
    run_main(distributed.distributed_main(main))
