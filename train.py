"""Train a prefix on a frozen language model, or what it is compared with, and show what it writes.

    python train.py                                                     the bundled GPT-2, E2E
    python train.py --data e2e/ --epochs 5 --out runs/mine --resume     E2E itself; go on if stopped
    python train.py --model path/to/gpt2 --task my.jsonl --lr 5e-5      any model, your own data
    python train.py --model bart-mini --task scitldr --data scitldr/    summaries, by a BART
    python train.py --method finetune --data e2e/                       all weights, to compare with
    torchrun --nproc_per_node=4 train.py --data e2e/                    by 4 GPUs, or processes

Defaults are in parentheses; those that depend on the model are in the table at the end.
"""

import json
import math
import time
from argparse import Namespace
from typing import Any

import torch

from minprefix import load_model, load_tokenizer
from minprefix.cli.curve import plot_curve, text_curve
from minprefix.cli.evaluation import NAMES, compare, load_before_after
from minprefix.cli.runs import disk_size, has_checkpoint, resumable, run_folder, sample_command
from minprefix.cli.search import recipe
from minprefix.cli.train_args import NOT_IN_SETTINGS, parse_args
from minprefix.core.batches import batches_per_epoch
from minprefix.core.encode import check_vocabulary, sequence_form
from minprefix.core.generate import Search
from minprefix.core.prefix import Prefix, count_parameters, fingerprint
from minprefix.core.training import train
from minprefix.data.examples import evenly_spaced
from minprefix.data.pairs import load_inputs, load_pairs
from minprefix.methods.baselines import make_method
from minprefix.methods.files import save_method, start_prefix
from minprefix.system import distributed
from minprefix.system.device import keep_freed_memory, pick_device, pick_dtype
from minprefix.system.errors import run_main
from minprefix.system.files import atomic_write


def main() -> None:
    args = parse_args(__doc__)
    with run_folder(args.out, args.resume, args.task, args.model) as args.out, resumable(args.out):
        run(args)


def run(args: Namespace) -> None:
    started = time.time()
    torch.manual_seed(args.seed)
    keep_freed_memory()
    # Load the frozen model. Weights that are trained themselves are float32, whatever they are multiplied in.
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

    # Load what is trained, and the data: training pairs, at most 500 dev pairs, --eval-inputs test inputs.
    trainable = make_method(
        args.method, model, length=args.prefix_length or 0, mlp_width=args.hidden or 0,
        adapter_width=args.adapter_width or 0, position_offset=args.offset, sites=args.sites,
    ).to(device)  # fmt: skip
    common: dict[str, Any] = {
        "tokenizer": tokenizer, "model": model, "start": trainable.position_offset, "max_source": args.max_source,
        "data": args.data, "topics": args.topics, "topic_field": args.topic_field, "skip_long": args.skip_long,
    }  # fmt: skip
    draw = {"low_data": args.low_data, "seed": args.low_data_seed}
    train_pairs = load_pairs(args.task, "train", limit=args.limit, **common, **draw)
    dev_pairs = evenly_spaced(load_pairs(args.task, "dev", **common, **draw), 500)
    test = load_inputs(args.task, "test", args.eval_inputs, new_tokens=search["max_new_tokens"], **common)
    step_size, resuming = args.batch_size * args.accumulate, args.resume and has_checkpoint(args.out)
    steps = args.steps or math.ceil(args.epochs * batches_per_epoch(train_pairs, step_size))
    if args.init is not None and not resuming and isinstance(trainable, Prefix):
        start_prefix(trainable, args.init, model, tokenizer)

    trained, saved, total = count_parameters(trainable, model)
    print(f"{args.model} in {dtype} on {device}")
    note = " (nothing to resume there: starting)" if args.resume and not resuming else ""
    print(f"{len(train_pairs):,} training pairs, {steps:,} steps of {step_size}, results in {args.out}{note}")
    sites = f" of length {args.prefix_length} at {', '.join(trainable.sites)}" if type(trainable) is Prefix else ""
    print(f"{args.method}{sites}: trains {trained:,} numbers ({trained / total:.2%} of the model's {total:,}), "
          f"saves {saved:,} ({saved / total:.2%})")  # fmt: skip

    # Train. Autocast without its cache: cached casts would be stale.
    with torch.autocast(device, dtype, enabled=finetune and dtype != torch.float32, cache_enabled=False):
        log, best_step = train(
            model, trainable, tokenizer, train_pairs, dev_pairs, args.out, steps=steps, batch_size=args.batch_size,
            lr=args.lr, warmup=args.warmup, eval_every=args.eval_every, seed=args.seed, group=args.group,
            accumulate=args.accumulate, resume=args.resume, compile=args.compile,
            settings={key: value for key, value in vars(args).items() if key not in NOT_IN_SETTINGS},
        )  # fmt: skip
    if distributed.rank() > 0:  # the rest is one process's work
        return

    # Save.
    path = save_method(trainable, model, args.method, args.out, args.model, base_fingerprint, task=args.task,
                       sequence=sequence_form(model), max_source=args.max_source)  # fmt: skip
    best = min(row["dev_loss"] for row in log)
    print(f"dev loss {log[0]['dev_loss']:.3f} before training, {best:.3f} at step {best_step} (kept)")
    if best_step == 0:
        print("training did not lower the dev loss: what is kept is untrained; try another --lr, or more steps")
    print(f"\n{text_curve(log)}")
    files = ["log.jsonl", "result.json", *(["loss.png"] if plot_curve(log, args.out / "loss.png") else [])]

    # Compare texts before and after training; what was trained is read back from its file.
    scores: dict[str, dict[str, float]] = {}
    if test:
        models = load_before_after(args.method, path, model, args.model, device, args.dtype)
        scores = compare(NAMES[args.method], *models, tokenizer, test, args.task, args.data, args.max_source, search)

    # Write the result.
    seconds = round(time.time() - started, 1)
    result = {"dev_loss": best, "best_step": best_step, "scores": scores, "steps": steps, "seconds": seconds,
              "trained": trained, "saved": saved, "share": saved / total,
              "dtype": str(dtype), "device": device, "settings": {**search, **vars(args)}}  # fmt: skip
    with atomic_write(args.out / "result.json") as file:
        json.dump(result, file, indent=2, default=str)
    print(f"\nwrote {path} ({disk_size(path) / 1024:,.0f} KiB), {', '.join(files)} in {seconds:.0f} s; try")
    print(f"  {sample_command(path, args.task, args.data, test)}")


if __name__ == "__main__":
    run_main(distributed.distributed_main(main))
