"""Training and generation of whole models, measured within a given time: a Markdown table, and JSON.

    python -m minprefix bench report --minutes 8 --peer --json report.json
    python -m minprefix bench report --models gpt2-medium --data e2e/ > report.md

gpt2, gpt2-medium, bart-base and bart-large are made with random weights, which take as long as trained ones, and with
the bundled tokeniser, which cuts a text into more tokens than theirs; any other name is that of a model or its folder.
A row of the table is printed, and the JSON file written anew, as each measurement ends. See `bench train --help` for
what is measured, and how.
"""

import json
import math
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from minprefix.cli.options import Parser, add_device_options, check_above_zero
from minprefix.core.bart import BART
from minprefix.core.gpt2 import GPT2
from minprefix.formats.hub import resolve_model
from minprefix.formats.load import save_model
from minprefix.studies import bench
from minprefix.system.device import pick_device, pick_dtype
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

SHAPES = {  # layers, width, heads, vocabulary
    "gpt2": (12, 768, 12, 50257), "gpt2-medium": (24, 1024, 16, 50257),
    "bart-base": (6, 768, 12, 50265), "bart-large": (12, 1024, 16, 50265),
}  # fmt: skip
Work = tuple[str, dict[str, Any]]  # WHAT of the bench, its options
# What is measured, the most important first.
GPT2_WORK: list[Work] = [
    ("train", {"batch_size": 10}), ("generate", {"batch_size": 16}), ("train", {"batch_size": 128}),
    ("train", {"batch_size": 10, "prefix_length": 200}),
]  # fmt: skip
BART_WORK: list[Work] = [
    ("train", {"batch_size": 16, "source_length": 512, "prefix_length": 200, "hidden": 800}),
    ("generate", {"batch_size": 16, "source_length": 512, "prefix_length": 200}),
]  # fmt: skip
CUDA_WORK: list[Work] = [
    ("train", {"batch_size": 128, "compile": True}),
]
COLUMNS = ("model", "work", "examples/s", "peer", "ratio", "peak GiB", "peer", "share of the matrix product's rate",
           "first batch, s")  # fmt: skip


def parse_args() -> Namespace:
    parser = Parser("python -m minprefix bench report", __doc__)
    add = parser.add_argument
    add("report", metavar="report", help="this")
    add("--minutes", type=float, metavar="X", default=8, help="that all of it may take (%(default)s)")
    add("--models", nargs="+", metavar="MODEL", default=list(SHAPES), help=f"by default {', '.join(SHAPES)}")
    add("--data", metavar="FOLDER", help="of E2E's files (as train.py)")
    add("--steps", type=int, metavar="N", default=8, help="batches in a round (%(default)s)")
    add("--rounds", type=int, metavar="N", default=3, help="rounds after the first, if there is time (%(default)s)")
    add("--new-tokens", type=int, metavar="N", default=32, help="of every text (%(default)s)")
    add("--threads", type=int, metavar="N", help="of the CPU (torch's default)")
    add_device_options(parser)
    add("--peer", action="store_true", help="transformers + PEFT as well (pip install -e '.[parity]')")
    add("--json", type=Path, metavar="FILE", help="where all figures are written")
    args = parser.parse_args()
    check_above_zero(args, ("minutes", "steps", "rounds", "new_tokens", "threads"))
    args.device = pick_device(args.device)
    return args


def main() -> None:
    args = parse_args()
    ends, rows = time.monotonic() + 60 * args.minutes, list[dict[str, Any]]()
    settings = [(model, settings_of(args, what, options)) for model, what, options in works(args)]  # checks --peer
    print(f"{where(args)}\n\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, (model, each) in enumerate(settings):
            now = time.monotonic()
            deadline = now + min(ends - now, 2 * (ends - now) / (len(settings) - number))  # what is left over is used
            try:
                if now > ends:
                    raise InputError("there was no time left")
                each.model = str(find_or_make(model, Path(folder), args))
                measured = bench.measure(each, deadline)
            except InputError as error:
                rows.append({"model": model, "settings": vars(each), "problem": str(error)})
                print(f"| {model} | {work_of(each)} | {error} |{' |' * (len(COLUMNS) - 3)}", flush=True)
            else:
                rows.append({"model": model, "settings": vars(each), "measured": measured})
                print(f"| {' | '.join([model, work_of(each), *figures(measured)])} |", flush=True)
            if args.json:
                with atomic_write(args.json) as file:
                    json.dump({"where": where(args), "rows": rows}, file, indent=2)


def works(args: Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """(model, WHAT, options) of each measurement: the first one of every model, then the second ones, and so on."""
    of_model: dict[str, list[Work]] = {}
    for model in args.models:
        gpt2 = not model.startswith("bart") if model in SHAPES else "n_layer" in read_config(resolve_model(model))
        of_model[model] = [*(GPT2_WORK if gpt2 else BART_WORK), *(CUDA_WORK if args.device == "cuda" else [])]
    most = max(len(work) for work in of_model.values())
    return [(model, *work[n]) for n in range(most) for model, work in of_model.items() if n < len(work)]


def settings_of(args: Namespace, what: str, options: dict[str, Any]) -> Namespace:
    """The bench's settings for one measurement; the peer has no layers that minprefix could compile."""
    settings = bench.make_parser().parse_args([what])
    common = ("data", "steps", "rounds", "new_tokens", "threads", "device", "dtype", "peer")
    vars(settings).update({key: getattr(args, key) for key in common}, **options)
    settings.peer = args.peer and not settings.compile
    bench.check(settings)
    return settings


def find_or_make(name: str, folder: Path, args: Namespace) -> Path:
    """The folder of a model: a model of random weights in `folder`, if the name is one of SHAPES."""
    if name not in SHAPES:
        return resolve_model(name)
    if not (folder / name).exists():
        torch.manual_seed(0)
        bundled = resolve_model("bart-mini" if name.startswith("bart") else "gpt2-mini")
        shape, config = SHAPES[name], read_config(bundled)
        with torch.device("meta"):
            model = BART(bart_config(config, *shape)) if name.startswith("bart") else GPT2(gpt2_config(config, *shape))
        model = model.to(pick_dtype(args.dtype, args.device)).to_empty(device=args.device)
        for tensor in [*model.parameters(), *model.buffers()]:
            torch.nn.init.normal_(tensor, std=0.02)
        save_model(model, folder / name, bundled)
    return folder / name


def gpt2_config(config: dict[str, Any], L: int, C: int, H: int, V: int) -> dict[str, Any]:
    shape = {"n_layer": L, "n_embd": C, "n_head": H, "n_inner": 4 * C, "vocab_size": V, "n_positions": 1024}
    return {**config, **shape}


def bart_config(config: dict[str, Any], L: int, C: int, H: int, V: int) -> dict[str, Any]:
    shape = {"d_model": C, "vocab_size": V, "max_position_embeddings": 1024}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": L, f"{side}_attention_heads": H, f"{side}_ffn_dim": 4 * C}
    return {**config, **shape}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def where(args: Namespace) -> str:
    """The machine and the versions, in a line."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = str(pick_dtype(args.dtype, args.device)).removeprefix("torch.")
    return f"{args.device} ({name}), {dtype}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def work_of(settings: Namespace) -> str:
    work = f"{settings.what}, batch {settings.batch_size}, prefix {settings.prefix_length}"
    work += f", sources of {settings.source_length}" if settings.source_length else ""
    work += f", {settings.beams} beams" if settings.what == "generate" else ""
    return work + ", layers compiled" * settings.compile


def figures(measured: list[dict[str, Any]]) -> list[str]:
    """The cells of a row: minprefix's figures and the peer's, if there is one."""
    mine, peer = measured[0], measured[1] if len(measured) > 1 else {}
    ratio = mine["examples_per_s"] / peer["examples_per_s"] if peer else math.nan
    cells = [mine["examples_per_s"], peer.get("examples_per_s", ""), f"{ratio:.2f}" if peer else "", mine["peak_GiB"],
             peer.get("peak_GiB", ""), mine.get("share_of_matmul", ""), mine["first_s"]]  # fmt: skip
    return [str(cell) for cell in cells]
