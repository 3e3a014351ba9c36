"""What prefixes do with names that E2E's training set does not have: inputs of its dev set with other names in them.

    python weights/new_names.py --data e2e/ weights/prefixes/gpt2-mini-e2e.safetensors runs/mine

Prints for each prefix, or fine-tuned model, the share of all values that its texts tell, that of the new names and
neighbours, and BLEU against the references with the new names in them.
"""

import re
from argparse import Namespace
from pathlib import Path

from minprefix import generate, load_model, load_tokenizer, metrics
from minprefix.cli.options import Parser, check_above_zero
from minprefix.core.encode import Example
from minprefix.data.examples import evenly_spaced
from minprefix.data.tasks import load_examples
from minprefix.methods.files import find_trained, load_trained
from minprefix.metrics.slots import slot_accuracy
from minprefix.system.device import keep_freed_memory
from minprefix.system.errors import run_main

NAMES = (
    "The Golden Lantern", "Green Dragon", "Harbour Kitchen", "Old Forge", "Luna", "Saffron House", "The Blue Door",
    "Marco's", "Red Lion", "Silver Spoon", "The White Hart", "Maple Garden", "The Copper Kettle", "Bella Vista",
    "The Rusty Anchor", "Orchid Palace", "Little Paris", "The Gilded Fork", "Stone Bridge", "Blossom Inn",
    "The Quiet Woman", "Cedar Room", "Mango Tree", "The Ivy House", "Rosewood", "The Black Swan", "Happy Buddha",
    "The Tin Drum", "Olive Branch", "Kings Arms",
)  # fmt: skip
NEIGHBOURS = (
    "The Mill", "Station Road", "Park Street", "the cathedral", "Victoria Square", "The Old Bridge", "Market Hall",
    "The Opera House", "Castle Hill", "Green Lane",
)  # fmt: skip


def renamed(example: Example, number: int) -> Example:
    """An E2E Example with the names of this number in the place of its own, in the source and in the references."""
    source, references = example.source, example.references
    for slot, name in ("name", NAMES[number % len(NAMES)]), ("near", NEIGHBOURS[number % len(NEIGHBOURS)]):
        if own := re.search(rf"(?:^|\| ){slot} : ([^|]+?)(?= \||$)", source):
            source = source[: own.start(1)] + name + source[own.end(1) :]
            references = [reference.replace(own[1], name) for reference in references]
    return Example(source, references)


def parse_args() -> Namespace:
    parser = Parser("python weights/new_names.py", __doc__)
    parser.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX", help="files of train.py, or runs' folders")
    parser.add_argument("--data", metavar="FOLDER", help="of the E2E files (data/e2e)")
    parser.add_argument("--model", default="gpt2-mini", help="that they were trained on (%(default)s)")
    parser.add_argument("--inputs", type=int, default=200, metavar="N", help="so many of the dev set's (%(default)s)")
    args = parser.parse_args()
    check_above_zero(args, ("inputs",))
    return args


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    examples = evenly_spaced(load_examples("e2e", "dev", args.data), args.inputs)
    examples = [renamed(example, number) for number, example in enumerate(examples)]
    sources, references = [example.source for example in examples], [example.references for example in examples]
    tokenizer = load_tokenizer(args.model)
    for path in args.prefixes:
        trained = find_trained(path)
        model = load_model(trained if trained.is_dir() else args.model)  # anew each time: adapters change it
        prefix = None if trained.is_dir() else load_trained(trained, model)
        texts = generate(model, tokenizer, sources, prefix=prefix, progress=True)
        told, bleu = slot_accuracy(sources, texts), 100 * metrics.bleu(texts, references)
        shares = ", ".join(f"{slot} {100 * told[slot]:.1f}%" for slot in ("slots", "name", "near"))
        print(f"{path}: {shares}, BLEU {bleu:.1f}")


if __name__ == "__main__":
    run_main(main)
