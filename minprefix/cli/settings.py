"""The default settings: the paper's for full-size models; for the bundled ones, chosen by short runs on dev sets.

The defaults of the search for texts are in search.py.
"""

import math
from argparse import Namespace
from typing import Any

from minprefix.cli.options import fill_defaults, flag
from minprefix.cli.search import recipe
from minprefix.core.batches import group_sizes
from minprefix.formats.hub import model_name
from minprefix.formats.load import model_kind
from minprefix.formats.safetensors import read_config
from minprefix.system.errors import InputError

PAPER: dict[str, dict[str, float]] = {  # by config.json's model_type
    "gpt2": {"prefix_length": 5, "hidden": 512, "adapter_width": 108, "batch_size": 10, "epochs": 5},
    "bart": {"prefix_length": 200, "hidden": 800, "adapter_width": 108, "batch_size": 16, "epochs": 30,
             "eval_every": 1000},
}  # fmt: skip
PAPER_TASK: dict[str, dict[str, float]] = {  # what the paper sets otherwise for these tasks, for GPT-2
    "webnlg": {"lr": 5e-5, "batch_size": 5},
    "dart": {"lr": 5e-5, "batch_size": 5, "epochs": 10, "prefix_length": 10},
}
BUNDLED: dict[str, dict[str, float]] = {  # see weights/README.md
    "gpt2-mini": {"prefix_length": 100, "hidden": 0, "adapter_width": 28, "batch_size": 16, "steps": 1500},
    "bart-mini": {"prefix_length": 20, "hidden": 512, "adapter_width": 25, "batch_size": 16, "steps": 750},
}
# Learning rates; "prefix 10" is of so many virtual tokens, "adapter" of the default width: 3% of the weights of the
# bundled models and of GPT-2 medium, 2.4% of distilgpt2's.
LR = {
    "gpt2": {"prefix": 8e-5, "prefix 10": 8e-5, "finetune": 5e-5, "top2": 5e-5, "adapter": 5e-5, "adapter 0.1%": 8e-5,
             "embedding": 8e-5, "infix": 8e-5},
    "bart": {"prefix": 5e-5, "prefix 10": 5e-5, "finetune": 5e-5, "top2": 5e-5, "adapter": 5e-5, "adapter 0.1%": 8e-5},
    "gpt2-mini": {"prefix": 0.03, "prefix 10": 0.09, "finetune": 1e-3, "top2": 3e-3, "adapter": 1e-2,
                  "adapter 0.1%": 0.03, "embedding": 3.0, "infix": 0.09},
    "bart-mini": {"prefix": 3e-3, "prefix 10": 3e-3, "finetune": 1e-3, "top2": 2e-3, "adapter": 6e-3,
                  "adapter 0.1%": 2e-2},
}  # fmt: skip
# For a prefix or infix trained directly where the default is through an MLP, or the other way round.
OTHER_FORM_LR = {"direct": 0.03, "MLP": 3e-3}
LOW_DATA_LR = {"gpt2-mini": {"finetune": 3e-4}}  # of 50 to 500 examples, in the studies
STUDY_STEPS = {"gpt2-mini": 1000, "bart-mini": 400}  # of a study's runs on all of the data; others: the paper's epochs

OPTIONS: dict[str, set[str]] = {  # method -> the options that set it and no other of its kind
    "prefix": {"prefix_length", "hidden", "sites", "offset", "init"},
    "finetune": set(),
    "top2": set(),
    "adapter": {"adapter_width"},
    "embedding": {"prefix_length", "hidden"},
    "infix": {"prefix_length", "hidden", "init"},
}


def default_settings(name: str | None, kind: str, task: str, method: str = "prefix") -> dict[str, Any]:
    """The defaults of train.py for a method: option -> value.

    name: the model's, if it is a bundled one; kind: its model_type in config.json.
    """
    settings = {"eval_every": 100, "group": 1, "lr": learning_rate(name, kind, task, method)}
    if name in BUNDLED:
        settings |= BUNDLED[name]
        if method in ("embedding", "infix"):
            settings["prefix_length"] = 10  # that of the rates above
    else:
        settings |= PAPER.get(kind, {}) | paper_task(kind, task)
    return {key: value for key, value in settings.items() if key not in other_options(method)}


def fill_settings(args: Namespace) -> None:
    """Set what the command line of train.py leaves open. args.model: a folder."""
    kind = model_kind(read_config(args.model), args.model)
    name = model_name(args.model)
    settings = default_settings(name, kind, args.task, args.method)
    if args.method == "prefix" and args.prefix_length:
        rates_of = nearer_length(args.prefix_length, settings["prefix_length"])
        settings["lr"] = learning_rate(name, kind, args.task, rates_of)
    if args.hidden is not None and args.method in ("prefix", "infix") and bool(args.hidden) != bool(settings["hidden"]):
        settings["lr"] = OTHER_FORM_LR["MLP" if args.hidden else "direct"]
    if args.epochs is not None or args.steps is not None:
        settings = {key: value for key, value in settings.items() if key not in ("epochs", "steps")}
    given = args.group
    fill_defaults(args, {"topic_field": "topic", "low_data_seed": 0, "beams": recipe(args.task)["beams"], **settings})
    if given and given > 1 and group_sizes(args.batch_size, given) == [1]:
        raise InputError(f"--group {given} has no effect: no number from 2 to {given} divides the batch size, "
                         f"{args.batch_size}")  # fmt: skip


def learning_rate(name: str | None, kind: str, task: str, method: str, low_data: bool = False) -> float | None:
    """The default learning rate, in the middle of those that a study tries. None: the model lacks the method.

    method: one of train.py's, "adapter 0.1%" or "prefix 10".
    """
    if name in BUNDLED:
        return (LR[name] | (LOW_DATA_LR.get(name, {}) if low_data else {})).get(method)
    return paper_task(kind, task).get("lr", LR.get(kind, {}).get(method))


def nearer_length(length: int, default: int) -> str:
    """The key in LR for a prefix length: "prefix", the default length's, or "prefix 10", whichever is nearer."""
    return "prefix 10" if abs(math.log(length / 10)) < abs(math.log(length / default)) else "prefix"


def paper_task(kind: str, task: str) -> dict[str, float]:
    return PAPER_TASK.get(task, {}) if kind == "gpt2" else {}


def other_options(method: str) -> set[str]:
    """The options that have an effect with other methods only."""
    return set().union(*OPTIONS.values()) - OPTIONS[method]


def settings_table() -> str:
    """The defaults that depend on the model and the task, for train.py's --help."""
    models = {"gpt2-mini": "gpt2", "bart-mini": "bart", "other GPT-2": "gpt2", "other BART": "bart"}
    rows: dict[str, dict[str, float | None]] = {}  # what is set -> a value for each model
    for name, kind in models.items():
        for method in OPTIONS:
            for key, value in default_settings(name, kind, "", method).items():
                label = f"--lr of {method}" if key == "lr" else flag(key)
                rows.setdefault(label, {}).setdefault(name, value)  # --prefix-length: that of prefix
    cells = [["defaults by model", *models]]
    for label in sorted(rows, key=lambda label: (label.startswith("--lr"), label)):
        cells.append([f"  {label}", *(shown(rows[label].get(name)) for name in models)])
    lines = ["".join([f"{label:22}", *(f"{cell:>13}" for cell in row)]) for label, *row in cells]
    for task, settings in PAPER_TASK.items():
        options = " ".join(f"{flag(key)} {shown(value)}" for key, value in settings.items())
        lines.append(f"other GPT-2 on {task}: {options}")
    return "\n".join(lines)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}".replace("e-0", "e-")
