"""What prefixes do with names that E2E's training set does not have: inputs of its dev set with other names in them.

    python weights/new_names.py --data e2e/ weights/prefixes/gpt2-mini-e2e.safetensors runs/mine

Prints for each prefix the share of all values that its texts tell, then that of the new names and neighbours.
"""

import re
from argparse import Namespace
from pathlib import Path

from minprefix import generate, load_model, load_tokenizer
from minprefix.baselines import load_trained, trained_file
from minprefix.data import load_examples
from minprefix.examples import spread
from minprefix.files import run_main
from minprefix.load import keep_freed_memory
from minprefix.options import Parser, check_above_zero
from minprefix.slots import slot_accuracy

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


def renamed(source: str, number: int) -> str:
    """A linearised E2E input with the names of this number in the place of its own."""
    name, neighbour = NAMES[number % len(NAMES)], NEIGHBOURS[number % len(NEIGHBOURS)]
    source = re.sub(r"(?<=^name : )[^|]+?(?= \||$)", name, source)
    return re.sub(r"(?<=\| near : )[^|]+?(?= \||$)", neighbour, source)


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
    examples = spread(load_examples("e2e", "dev", args.data), args.inputs)
    sources = [renamed(example.source, number) for number, example in enumerate(examples)]
    tokenizer = load_tokenizer(args.model)
    for path in args.prefixes:
        trained = trained_file(path)
        model = load_model(trained if trained.is_dir() else args.model)  # anew each time: adapters change it
        prefix = None if trained.is_dir() else load_trained(trained, model)
        told = slot_accuracy(sources, generate(model, tokenizer, sources, prefix=prefix, progress=True))
        print(f"{path}: " + ", ".join(f"{slot} {100 * told[slot]:.1f}%" for slot in ("slots", "name", "near")))


if __name__ == "__main__":
    run_main(main)
