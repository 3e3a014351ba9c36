"""The paper's studies (Li & Liang 2021, sections 6 and 7), each a list of runs of train.py and sample.py.

A study is a function of the settings -> its runs. The settings (`args`): model (name or folder), task, data (folder),
steps and batch_size of a run on all of the data, seeds, samplings, limit_test, and lr: method -> learning rate.
"""

import math
import re
from dataclasses import dataclass

METHODS = {  # what is trained -> train.py's arguments
    "prefix": [],
    "finetune": ["--method", "finetune"],
}
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass
class Run:
    name: str  # of its folder
    what: dict  # what the study varies, but for the seeds: runs alike in this are one row of the table
    train: list  # train.py's arguments
    samples: dict  # name of a set of scores -> sample.py's arguments
    examples: int  # that training sees
    dev_examples: int  # that its evaluations see, all in all


def full(args):
    """Every method on all of the training data (tables 1 and 2)."""
    return [make_run(args, {"method": method}, method, seed) for method in METHODS for seed in args.seeds]


def length(args):
    """How long a prefix should be (figure 4)."""
    return [
        make_run(args, {"length": length}, "prefix", seed, ["--prefix-length", str(length)])
        for length in LENGTHS
        for seed in args.seeds
    ]


STUDIES = {"full": full, "length": length}
TUNED = {  # which learning rates a study needs: whose data they are chosen on, and for which methods
    "full": ("full", tuple(METHODS)),
    "length": ("full", ("prefix",)),
}
MIDDLE = {  # the middle one of the three learning rates that are tried
    "gpt2-mini": {"prefix": 0.1, "finetune": 1e-3},
    "bart-mini": {"prefix": 3e-3, "finetune": 1e-3},
    "other": {"prefix": 8e-5, "finetune": 5e-5},  # the paper's
}


def tuning(args, data, method):
    """A run for each of three learning rates a factor of 3 apart, two fifths of a study's steps, one seed."""
    runs = []
    for factor in (1 / 3, 1, 3):
        lr = f"{factor * MIDDLE.get(args.model, MIDDLE['other'])[method]:.2g}"
        what, chosen = {"method": method, "lr": lr}, {method: lr}
        steps = math.ceil(args.steps * 2 / 5)
        runs.append(make_run(args, what, method, args.seeds[0], steps=steps, evaluations=4, lr=chosen, samples={}))
    return runs


def make_run(args, what, method, seed, options=(), *, name=None, steps=None, batch_size=None, evaluations=10, dev=500,
             lr=None, samples=None):  # fmt: skip
    """The run of a method with further options of train.py, scored on the test split unless `samples` says else."""
    steps, batch_size = steps or args.steps, batch_size or args.batch_size
    source = ["--task", args.task, "--data", args.data]
    train = [
        "--model", args.model, *source, *METHODS[method], *options, "--lr", (lr or args.lr)[method],
        "--steps", str(steps), "--batch-size", str(batch_size), "--eval-every", str(math.ceil(steps / evaluations)),
        "--seed", str(seed), "--eval-inputs", "0",
    ]  # fmt: skip
    if samples is None:
        limit = ["--limit", str(args.limit_test)] if args.limit_test else []
        samples = {"test": [*source, "--split", "test", *limit]}
    parts = [*what.values(), name, f"seed{seed}"]
    folder = "-".join(re.sub(r"[^\w.%]+", "-", str(part)).strip("-") for part in parts if part)
    return Run(folder, what, train, samples, steps * batch_size, dev * (evaluations + 1))
