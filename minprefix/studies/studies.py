"""The paper's studies (Li & Liang 2021, sections 6 and 7), each a list of runs of train.py and sample.py.

A study is a function of the settings -> its runs. The settings (`args`): model (name or folder), kind (its model_type),
task, data (folder), steps and batch_size of a run on all of the data, seeds, samplings (how many, in low data),
limit_test, widths (of the adapters), methods (those that the model can be trained with) and lr: method -> its learning
rate.
"""

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from minprefix.cli.settings import default_settings, learning_rate, nearer_length
from minprefix.data.tasks import SUMMARISATION
from minprefix.system.errors import InputError

METHODS = ("prefix", "finetune", "top2", "adapter 3%", "adapter 0.1%", "embedding")  # --method, and what it may train
TEN_TOKENS = ("prefix 10", "embedding", "infix")  # tuned with 10 virtual tokens: fewer need a larger learning rate
SIZES = (50, 100, 200, 500)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)
VIRTUAL_TOKENS = (1, 10, 20)  # of prefix, embedding and infix when these are compared
TASK_WORDS = ("table to text :", "summarize :")
WORDS = (*TASK_WORDS, "elephant banana keep", None)  # two that name a task, others, random numbers
UNSEEN = ("Building", "Food", "SportsTeam")  # every third of WebNLG's ten categories, in the alphabet's order
SEEN = ("Airport", "Astronaut", "City", "ComicsCharacter", "Monument", "University", "WrittenWork")

Factors = dict[str, str | int]  # what a study varies -> its value for a run


@dataclass
class Run:
    name: str  # of its folder
    factors: Factors  # but for the seeds: runs alike in this are one row of the table
    train: list[str]  # train.py's arguments
    samples: dict[str, list[str]]  # name of a set of scores -> sample.py's arguments
    examples: int  # that training sees
    dev_examples: int  # that its evaluations see, all in all


def full(args: Namespace) -> list[Run]:
    """Every method on all of the training data (tables 1 and 2)."""
    return [make_run(args, {"method": method}, method, seed) for method in args.methods for seed in args.seeds]


def low_data(args: Namespace) -> list[Run]:
    """Prefix-tuning, started from words as in the paper, and fine-tuning on few examples (figure 3)."""
    return [
        low_data_run(args, {"method": method, "examples": size}, method, size, sampling, seed, from_words(args, method))
        for method in ("prefix", "finetune")
        for size in SIZES
        for sampling in range(1, args.samplings + 1)
        for seed in args.seeds
    ]


def length(args: Namespace) -> list[Run]:
    """How long a prefix should be (figure 4)."""
    default = default_settings(args.model, args.kind, args.task)["prefix_length"]
    return [
        make_run(args, {"length": length}, "prefix", seed, ["--prefix-length", str(length)],
                 lr=args.lr[nearer_length(length, default)])
        for length in LENGTHS
        for seed in args.seeds
    ]  # fmt: skip


def init(args: Namespace) -> list[Run]:
    """What a prefix is started from when there are few examples (figure 5)."""
    return [
        low_data_run(args, {"started from": words or "random numbers", "examples": size}, "prefix", size, sampling,
                     seed, ["--init", words] if words else [])
        for words in WORDS
        for size in (50, 200)
        for sampling in range(1, args.samplings + 1)
        for seed in args.seeds
    ]  # fmt: skip


def ablation(args: Namespace) -> list[Run]:
    """Where virtual tokens act: in every layer, in the embedding only, or between source and target (table 4)."""
    return [
        make_run(args, {"method": method, "length": length}, method, seed, ["--prefix-length", str(length)],
                 lr=args.lr["prefix 10" if method == "prefix" else method])
        for method in ("prefix", "embedding", "infix")
        for length in VIRTUAL_TOKENS
        for seed in args.seeds
    ]  # fmt: skip


def extrapolation(args: Namespace) -> list[Run]:
    """Trained on some of WebNLG's categories, tested on those and on the others (as table 3 on other data)."""
    return [
        make_run(args, {"method": method}, method, seed, ["--topics", *SEEN])
        for method in ("prefix", "finetune", "adapter 3%")
        for seed in args.seeds
    ]


def test_sets(args: Namespace) -> dict[str, tuple[str, Sequence[str]]]:
    """What a study's runs are tested on: name -> (split, topics or none)."""
    if args.study == "extrapolation":
        return {"seen": ("dev", SEEN), "unseen": ("dev", UNSEEN)}
    if args.task == "webnlg":
        return {"seen": ("test_seen", ()), "unseen": ("test_unseen", ()), "all": ("test", ())}
    return {"test": ("test", ())}


STUDIES = {"full": full, "low-data": low_data, "length": length, "init": init, "ablation": ablation,
           "extrapolation": extrapolation}  # fmt: skip

# ---- learning rates ----

TUNED: dict[str, tuple[str, tuple[str, ...]]] = {  # which learning rates a study needs: of what data, for which methods
    "full": ("full", METHODS),
    "low-data": ("low-data", ("prefix", "finetune")),
    "length": ("full", ("prefix 10", "prefix")),
    "init": ("low-data", ("prefix",)),
    "ablation": ("full", TEN_TOKENS),
    "extrapolation": ("topics", ("prefix", "finetune", "adapter 3%")),
}


def tuning(args: Namespace, data: str, method: str) -> list[Run]:
    """A run for each of three learning rates, a factor of 3 apart: seed 101, dev loss only.

    The middle one is the default, which did best in earlier trials: so the best is seldom at an edge. They are as long
    as the study's own runs, for shorter ones favour larger rates; the best of them is one of the study's own runs.
    data: "full", "low-data" (a sample of 200) or "topics" (WebNLG's seen categories).
    """
    runs, named = [], method.removesuffix(" 3%")  # the default width
    middle = learning_rate(args.model, args.kind, args.task, named, low_data=data == "low-data")
    if middle is None:
        raise InputError(f"{args.model} cannot be trained with {method}")
    for lr in (f"{middle * factor:.2g}" for factor in (1 / 3, 1, 3)):
        factors: Factors = {"method": method, "lr": lr}
        if data == "low-data":
            runs.append(low_data_run(args, factors, method, 200, 1, 101, from_words(args, method), lr=lr, tested=False))
        else:
            options = ["--topics", *SEEN] if data == "topics" else []
            runs.append(make_run(args, factors, method, 101, options, lr=lr, tested=False))
    return runs


# ---- runs ----


def from_words(args: Namespace, method: str) -> list[str]:
    """The option with which a prefix starts from words that name the task."""
    return ["--init", TASK_WORDS[args.task in SUMMARISATION]] if method == "prefix" else []


def low_data_run(
    args: Namespace, factors: Factors, method: str, size: int, sampling: int, seed: int, options: Sequence[str] = (), *,
    lr: str | None = None, tested: bool = True,
) -> Run:  # fmt: skip
    """A run on a sample of the training data with the paper's settings: 400 steps of 10, 100 of them warm-up."""
    steps = min(400, args.steps)
    options = [*options, "--low-data", str(size), "--low-data-seed", str(sampling), "--warmup", str(steps // 4)]
    return make_run(args, factors, method, seed, options, name=f"sampling{sampling}", lr=lr, steps=steps, batch_size=10,
                    evaluations=8, dev=math.ceil(0.3 * size), tested=tested)  # fmt: skip


def make_run(
    args: Namespace, factors: Factors, method: str, seed: int, options: Sequence[str] = (), *, name: str | None = None,
    lr: str | None = None, steps: int | None = None, batch_size: int | None = None, evaluations: int = 5,
    dev: int = 500, tested: bool = True,
) -> Run:  # fmt: skip
    """The run of a method with further options of train.py, by default with the settings of the study."""
    steps, batch_size = steps or args.steps, batch_size or args.batch_size
    if method in TEN_TOKENS and "--prefix-length" not in options:
        options = [*options, "--prefix-length", "10"]
    if method in args.widths:
        options = [*options, "--adapter-width", str(args.widths[method])]
    data = ["--task", args.task, "--data", args.data]
    train = [
        "--model", args.model, *data, "--method", method.split()[0], *options, "--lr", lr or args.lr[method],
        "--steps", str(steps), "--batch-size", str(batch_size), "--eval-every", str(math.ceil(steps / evaluations)),
        "--group", "1", "--seed", str(seed), "--eval-inputs", "0",  # the same batches for every method
    ]  # fmt: skip
    samples: dict[str, list[str]] = {}
    limit = ["--limit", str(args.limit_test)] if args.limit_test else []
    for test, (split, topics) in test_sets(args).items() if tested else ():
        samples[test] = [*data, "--split", split, *(["--topics", *topics] if topics else []), *limit]
    parts = [*factors.values(), name, f"seed{seed}"]
    folder = "-".join(re.sub(r"[^\w.%]+", "-", str(part)).strip("-") for part in parts if part)
    return Run(folder, factors, train, samples, steps * batch_size, dev * (evaluations + 1))
