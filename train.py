"""Train a prefix on a frozen language model, or what it is compared with, then compare texts without and with.

    python train.py                                   the bundled model; E2E data, or the bundled sample if offline
    python train.py --data e2e/ --epochs 5            the real E2E data from its official CSV files
    python train.py --model gpt2-medium/ --task my.jsonl --lr 5e-5
    python train.py --model bart-mini --task scitldr --data scitldr/     summaries, the prefix in encoder and decoder
    python train.py --method finetune --data e2e/                        all of the model's weights, for comparison;
                                       so are top2, adapter, embedding and infix: see minprefix/baselines.py
    torchrun --nproc_per_node=4 train.py --data e2e/                     each batch split among 4 GPUs, or processes
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from minprefix import Prefix, distributed, generate, load_model, load_tokenizer, metrics
from minprefix.baselines import Adapters, Embedding, Finetune, Infix, load_trained, save_trained, top_layers
from minprefix.batches import check_lengths, encode_pairs, encode_sources, sequence_form
from minprefix.checkpoint import read_config
from minprefix.curve import plot_curve, text_curve
from minprefix.data import SUMMARISATION, TRIPLES, find_e2e, load_examples
from minprefix.examples import draw_pairs, on_topics
from minprefix.files import InputError, WriteError, atomic_write, check_above_zero, run_main
from minprefix.generate import recipe
from minprefix.hub import model_name, resolve_model
from minprefix.load import check_vocabulary, keep_freed_memory, pick_device, pick_dtype, save_model
from minprefix.prefix import count_numbers, fingerprint, parameter_shares, save_prefix
from minprefix.training import train

# The paper's settings for full-size models; for the bundled those that weights/README.md chose on dev sets.
PAPER = {
    "gpt2": {"prefix_length": 5, "hidden": 512, "adapter_width": 108, "batch_size": 10, "epochs": 5},
    "bart": {"prefix_length": 200, "hidden": 800, "adapter_width": 108, "batch_size": 16, "epochs": 30,
             "eval_every": 1000},
}
PAPER_TASK = {  # what the paper sets otherwise for these, for GPT-2
    "webnlg": {"lr": 5e-5, "batch_size": 5},
    "dart": {"lr": 5e-5, "batch_size": 5, "epochs": 10, "prefix_length": 10},
}
BUNDLED = {
    "gpt2-mini": {"prefix_length": 100, "hidden": 0, "adapter_width": 28, "batch_size": 16, "steps": 1500},
    "bart-mini": {"prefix_length": 20, "hidden": 512, "adapter_width": 25, "batch_size": 16, "steps": 750},
}
LR = {
    "gpt2": {"prefix": 8e-5, "finetune": 5e-5, "top2": 5e-5, "adapter": 5e-5, "embedding": 8e-5, "infix": 8e-5},
    "bart": {"prefix": 5e-5, "finetune": 5e-5, "top2": 5e-5, "adapter": 5e-5},
    "gpt2-mini": {"prefix": 0.1, "finetune": 1e-3, "top2": 1e-3, "adapter": 3e-3, "embedding": 0.1, "infix": 0.1},
    "bart-mini": {"prefix": 3e-3, "finetune": 1e-3, "top2": 1e-3, "adapter": 3e-3},
}
METHODS = {  # what each is called where its texts are compared, and the options that set it
    "prefix": ("the prefix", {"prefix_length", "hidden", "sites", "offset", "init"}),
    "finetune": ("fine-tuning", set()),
    "top2": ("fine-tuning", set()),
    "adapter": ("adapters", {"adapter_width"}),
    "embedding": ("virtual tokens", {"prefix_length", "hidden"}),
    "infix": ("the infix", {"prefix_length", "hidden", "init"}),
}
# What a resumed run may do otherwise; train() itself looks at the data, the model and its dtype, and the steps.
MAY_CHANGE = ("model", "task", "data", "epochs", "steps", "eval_inputs", "beams", "dtype", "device", "out", "resume")
EXAMPLE = "name[The Golden Lantern], eatType[pub], food[Thai], area[riverside], near[The Mill]"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="gpt2-mini", help="a GPT-2 or BART folder, or a name, bundled or of the hub (%(default)s)")
    add("--task", default="e2e", help="e2e, webnlg, dart, xsum, scitldr or FILE.jsonl of sources and targets (e2e)")
    add("--data", help="folder with the task's files; E2E: else data/e2e, else a download, else the bundled sample")
    add("--topics", nargs="+", metavar="TOPIC", help="train and take dev losses on these only (WebNLG: categories)")
    add("--topic-field", default="topic", metavar="NAME", help="the key of a JSONL row's topic (%(default)s)")
    add("--method", choices=METHODS, default="prefix", help="what is trained (%(default)s)")
    add("--max-source", type=int, help="cut sources to so many tokens (BART 512; GPT-2's are not cut)")
    add("--prefix-length", type=int, help="virtual tokens (5, BART 200; gpt2-mini 100, bart-mini 20)")
    add("--adapter-width", type=int, help="of an adapter's bottleneck (108; gpt2-mini 28, bart-mini 25: 3%% of it)")
    add("--hidden", type=int, help="width of the prefix's MLP, 0: none (512, BART 800; gpt2-mini 0, bart-mini 512)")
    add("--sites", nargs="+", metavar="SITE", help="BART: only some of encoder, decoder, cross (all)")
    add("--offset", type=int, help="position of the first token after the prefix (the prefix length; authors' BART 0)")
    add("--init", help='words whose activations start the prefix, e.g. "table to text :" (default: random)')
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="passes over the training pairs (5, BART 30)")
    length.add_argument("--steps", type=int, help="steps, instead of --epochs (gpt2-mini 1500, bart-mini 750)")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--limit", type=int, help="train on the first N pairs only")
    subset.add_argument("--low-data", type=int, metavar="N", help="train on N pairs drawn at random, 30%% of N for dev")
    add("--low-data-seed", type=int, default=0, help="draws those pairs, whatever --seed is (%(default)s)")
    add("--batch-size", type=int, help="pairs in a step (10; BART and bundled models 16)")
    add("--lr", type=float, help="learning rate (prefix 8e-5, BART 5e-5; gpt2-mini 0.1, bart-mini 3e-3)")
    add("--warmup", type=int, default=0, help="steps of linear warm-up (%(default)s)")
    add("--eval-every", type=int, help="steps between dev losses and checkpoints (100; full-size BART 1000)")
    add("--eval-inputs", type=int, default=100, help="test inputs to write texts for at the end (%(default)s)")
    add("--beams", type=int, help="beams of those texts (5; summaries 6)")
    add("--seed", type=int, default=101)
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the frozen model (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--out", type=Path, help="folder for prefix, log and result (runs/TASK-MODEL, numbered if taken)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt after a kill")
    args = parser.parse_args()
    args.model = resolve_model(args.model)
    fill_defaults(args)
    check(args)
    args.out = run_folder(args)
    return args


def fill_defaults(args):
    """What the command line leaves open, for this model and task."""
    name, kind = model_name(args.model), str(read_config(args.model).get("model_type"))
    settings = BUNDLED.get(name) or {**PAPER.get(kind, {}), **(PAPER_TASK.get(args.task, {}) if kind == "gpt2" else {})}
    lr = LR.get(name if name in BUNDLED else kind, {}).get(args.method)
    settings = {"lr": lr, **settings}
    defaults = {"eval_every": 100, "beams": recipe(args.task)["beams"], **settings}
    defaults = {key: value for key, value in defaults.items() if key not in other_options(args.method)}
    if args.epochs is not None or args.steps is not None:
        defaults = {key: value for key, value in defaults.items() if key not in ("epochs", "steps")}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def other_options(method):
    """The options that set other methods only."""
    return set().union(*(options for _, options in METHODS.values())) - METHODS[method][1]


def check(args):
    """InputError where a number makes no sense, or an option has no effect."""
    for key in sorted(other_options(args.method)):
        if getattr(args, key) is not None:
            raise InputError(f"--{key.replace('_', '-')} sets nothing of --method {args.method}: leave it out")
    above_zero = ("epochs", "steps", "limit", "low_data", "batch_size", "lr", "eval_every", "beams", "max_source")
    check_above_zero(args, (*above_zero, "adapter_width"))
    for key in ("warmup", "eval_inputs", "seed", "low_data_seed", "offset"):
        if not 0 <= (getattr(args, key) or 0) < 2**63:
            raise InputError(f"--{key.replace('_', '-')} is {getattr(args, key)}: it must be at least 0")


def run_folder(args):
    """--out; by default runs/TASK-MODEL, or with a number if that is taken, so that no run overwrites another."""
    if args.out and not args.resume and (args.out / "checkpoint.pt").exists():
        raise InputError(f"{args.out} holds a run already: add --resume to go on with it, or choose another --out")
    if args.out:
        return args.out
    model = Path(model_name(args.model) or args.model.resolve()).name
    first, number = Path("runs", f"{Path(args.task).stem}-{model}"), 1
    folder, last = first, first
    while folder.exists():
        number += 1
        folder, last = first.with_name(f"{first.name}-{number}"), folder
    return last if args.resume else folder


def main():
    args = parse_args()
    try:
        run(args)
    except (KeyboardInterrupt, WriteError, distributed.RankLost) as error:
        if error.args and (args.out / "checkpoint.pt").exists():
            error.args = (f"{error.args[0]}; go on with: {resume_command(args)}", *error.args[1:])
        raise


def resume_command(args):
    """What goes on with this run, as a line for the shell."""
    command = [sys.orig_argv[0], *sys.argv]
    if distributed.world_size() > 1:
        command = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *sys.argv]
    command = [word for word in command if word != "--resume"]
    out = [] if any(word.startswith("--out") for word in command) else ["--out", str(args.out)]
    return shlex.join([*command, *out, "--resume"])


def run(args):
    keep_freed_memory()
    started = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    finetune = args.method in ("finetune", "top2")
    # Weights that are trained are float32, whatever they are multiplied in.
    model = load_model(args.model, device, torch.float32 if finetune else dtype)
    base_fingerprint = fingerprint(model)
    tokenizer = load_tokenizer(args.model)
    check_vocabulary(tokenizer, model, args.model)
    tuned = make_tuned(args, model).to(device)
    train_pairs, dev_pairs, test = load_data(args, model, tokenizer, tuned.position_offset)
    steps = args.steps or math.ceil(args.epochs * len(train_pairs) / args.batch_size)
    resuming = args.resume and (args.out / "checkpoint.pt").exists()
    if args.init and not resuming:
        tuned.init_from_words(model, tokenizer, args.init)
    several = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"{args.model} in {dtype} on {device}{several}")
    print(f"{len(train_pairs):,} training pairs, {steps:,} steps of {args.batch_size}, results in {args.out}")
    place = f" of length {args.prefix_length} at {', '.join(tuned.parts)}" if args.method == "prefix" else ""
    print(f"{args.method}{place}: {parameter_shares(tuned, model)}")
    trained, saved, total = count_numbers(tuned, model)
    if args.resume and not resuming:
        print(f"nothing to resume in {args.out}: starting")
    mixed = finetune and dtype != torch.float32
    autocast = torch.autocast(device, dtype, enabled=mixed, cache_enabled=False)  # no cache: the weights change
    with autocast:
        log, best_step = train(
            model, tuned, tokenizer, train_pairs, dev_pairs, args.out, steps=steps, batch_size=args.batch_size,
            lr=args.lr, warmup=args.warmup, eval_every=args.eval_every, seed=args.seed, resume=args.resume,
            settings={key: value for key, value in vars(args).items() if key not in MAY_CHANGE},
        )  # fmt: skip
    if distributed.rank() > 0:  # the rest is one process's work
        return
    path = save(args, tuned, model, base_fingerprint)
    best = min(row["dev_loss"] for row in log)
    print(f"dev loss {log[0]['dev_loss']:.3f} before training, {best:.3f} at step {best_step} (kept)")
    if best_step == 0:
        print("training did not lower the dev loss: what is kept is untrained; try another --lr, or more steps")

    print(f"\n{text_curve(log)}")
    files = ["log.jsonl", "result.json", *(["loss.png"] if plot_curve(log, args.out / "loss.png") else [])]
    scores = compare(args, tokenizer, make_writers(args, model, path, device, dtype), test) if test else {}
    seconds = round(time.time() - started, 1)
    result = {"dev_loss": best, "best_step": best_step, "scores": scores, "steps": steps, "seconds": seconds,
              "trained": trained, "saved": saved, "share": saved / total,
              "dtype": str(dtype), "device": device, "settings": {**recipe(args.task), **vars(args)}}  # fmt: skip
    with atomic_write(args.out / "result.json") as file:
        json.dump(result, file, indent=2, default=str)
    print(f"\nwrote {path} ({disk_size(path) / 1024:,.0f} KiB), {', '.join(files)} in {seconds:.0f} s; try")
    option = "--model" if args.method == "finetune" else "--prefix"
    print(f"  python sample.py {option} {shlex.quote(str(path))} {suggestion(args, test)}")


def make_tuned(args, model):
    """What --method trains."""
    if args.method in ("finetune", "top2"):
        return Finetune(model, top_layers(model) if args.method == "top2" else None)
    if args.method == "adapter":
        return Adapters(model, args.adapter_width)
    if args.method == "prefix":
        return Prefix(model, args.prefix_length, args.hidden, args.offset, args.sites)
    return {"embedding": Embedding, "infix": Infix}[args.method](model, args.prefix_length, args.hidden)


def save(args, tuned, model, base_fingerprint):
    """What was trained, with what sample.py must know of the task: METHOD.safetensors or a model folder -> its path."""
    info = {"task": "jsonl" if args.task.endswith(".jsonl") else args.task, "sequence": sequence_form(model)}
    if args.max_source:
        info["max_source"] = str(args.max_source)
    if args.method == "finetune":
        path = args.out / "model"
        save_model(model, path, args.model, minprefix=info)
        return path
    path = args.out / f"{args.method}.safetensors"
    info |= {"method": args.method, "base_model": model_name(args.model) or str(args.model.resolve())}
    if args.method in ("prefix", "infix"):
        save_prefix(path, tuned.fold(), model, info)
    else:
        save_trained(path, tuned.fold(), base_fingerprint, info)
    return path


def disk_size(path):
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def suggestion(args, test):
    """What to give sample.py first: an input, or a split where an input is a page long or a set of triples."""
    if args.task in (*SUMMARISATION, *TRIPLES):
        split = "test" if test else "dev"
        return f"--task {args.task} --split {split} --data {shlex.quote(args.data)} --limit 10"
    example = EXAMPLE if args.task == "e2e" else test[0].source if test else "..."
    if len(example) > 200:
        return f"--task {shlex.quote(args.task)} --split test --limit 10"
    return f"--input {shlex.quote(example)}"


def load_data(args, model, tokenizer, start):
    """Training pairs, at most 500 dev pairs, --eval-inputs test examples; everything is known to fit the model.

    start: position of the first token after the prefix.
    """
    pairs = {}
    for split in ("train", "dev"):
        examples = load_examples(args.task, split, args.data, args.topic_field)
        where = f"{args.task}, {split} split"
        if args.topics:
            examples = on_topics(examples, args.topics, where)
        if args.low_data:
            count = args.low_data if split == "train" else math.ceil(3 * args.low_data / 10)  # the paper's share
            examples = draw_pairs(examples, count, args.low_data_seed, where)
        examples = examples[: args.limit if split == "train" else None]
        pairs[split] = encode_pairs(examples, tokenizer, model, args.max_source, f"{split} sources")
        check_lengths(pairs[split], model, start, where)
    test = spread(load_examples(args.task, "test", args.data), args.eval_inputs) if args.eval_inputs else []
    new_tokens = recipe(args.task)["max_new_tokens"]
    sources = encode_sources([example.source for example in test], tokenizer, model, args.max_source, what=None)
    longest = [(source, [0] * new_tokens) for source in sources]
    check_lengths(longest, model, start, f"{args.task}, test split with {new_tokens} new tokens")
    return pairs["train"][: args.limit], spread(pairs["dev"], 500), test


def spread(items, most):
    """At most so many of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def make_writers(args, model, path, device, dtype):
    """Who writes without and with what was trained, read back from its file: how it is called -> (model, prefix)."""
    noun = METHODS[args.method][0]
    before, after = ("before", "after") if noun == "fine-tuning" else ("without", "with")
    if args.method in ("prefix", "embedding", "infix"):  # the model is as it was
        writers = (model, None), (model, load_trained(path, model))
    elif args.method == "finetune":
        writers = (load_model(args.model, device, dtype), None), (load_model(path, device, dtype), None)
    else:
        model, changed = (load_model(args.model, device, dtype) for _ in range(2))
        writers = (model, None), (changed, load_trained(path, changed))
    return dict(zip((f"{before} {noun}", f"{after} {noun}"), writers, strict=True))


def compare(args, tokenizer, writers, test):
    """Texts for held-out inputs from two writers, how it is called -> (model, prefix): the scores, and one example."""
    sources, references = [e.source for e in test], [e.references for e in test]
    options = {**recipe(args.task), "beams": args.beams}
    (before, after), texts, scores = writers, {}, {}
    for name, (model, prefix) in writers.items():
        print(f"\nwriting {len(sources)} texts for held-out inputs {name}, {args.beams} beams")
        what = "test sources" if name == before else None  # said once
        texts[name] = generate(
            model, tokenizer, sources, prefix, max_source=args.max_source, what=what, progress=True, **options
        )
        scores[name] = quick_scores(args.task, texts[name], references)
    width = max(map(len, writers))
    print(f"\n{'input':<{width}}  {sources[0][:600]}\n{before}  {texts[before][0][:200]}")
    print(f"{after:<{width}}  {texts[after][0]}\n{'reference':<{width}}  {references[0][0]}")
    sample = args.task == "e2e" and find_e2e(args.data) is None
    what = "the bundled sample, not E2E" if sample else f"{args.task}, {len(sources)} test inputs"
    for metric, value in scores[after].items():
        print(f"{metric} on {what}: {scores[before][metric]:.3f} {before}, {value:.3f} {after}")
    return scores


def quick_scores(task, texts, references):
    """BLEU, or for summaries ROUGE if its package is there; sample.py --evaluate computes the rest."""
    if task not in SUMMARISATION:
        return {"BLEU": metrics.bleu(texts, references)}
    try:
        return metrics.summary_score(texts, references)[0]
    except InputError as error:
        print(error)
        return {}


if __name__ == "__main__":
    run_main(distributed.each_rank(main))
