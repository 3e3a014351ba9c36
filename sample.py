"""Write texts with a trained prefix, and score them.

    python sample.py --prefix runs/e2e-gpt2-mini --input "name[The Mill], food[Thai]"
    python sample.py --prefix runs/mine --file inputs.txt --output texts.txt    one input a line
    python sample.py --prefix runs/mine --file inputs.txt --sample --top-p 0.9  drawn at random
    python sample.py --prefix runs/mine --file inputs.txt --return 3 --scores   JSONL, 3 best each
    python sample.py --prefix runs/mine --task e2e --data e2e/ --evaluate       the test set, scored
    python sample.py --prefix runs/a --prefix runs/b --file requests.jsonl      each row by its own

Defaults are in parentheses. A .jsonl file has rows {"source": ...}; with several prefixes, rows
{"source": ..., "prefix": the name of a prefix's folder, or of its file without the ending}.
--return and --scores write rows {"source": ..., "texts": [...], "scores": [...]}.
Without --output, --evaluate writes texts-SPLIT.txt and .json to the run's folder, with the task in
the name if the run was not trained on it; for a prefix or model outside of a run's folder, to the
current one as texts-PREFIX-TASK-SPLIT.txt.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from minprefix import generate_scored, load_model, load_tokenizer
from minprefix.cli.evaluation import check_scorable, evaluate
from minprefix.cli.requests import load_prefixes, read_requests, write_requests
from minprefix.cli.sample_args import parse_args
from minprefix.cli.search import search_options
from minprefix.cli.texts import read_examples, write_texts
from minprefix.core.encode import check_vocabulary
from minprefix.core.model import Model
from minprefix.core.prefix_kv import KVPrefix
from minprefix.data.tasks import ROW_SUFFIXES
from minprefix.formats.load import pick_writing_dtype
from minprefix.formats.tokenizer import Tokenizer
from minprefix.methods.files import (
    find_trained,
    finetune_metadata,
    load_trained,
    read_trained,
    resolve_base_model,
    trained_max_source,
)
from minprefix.system import distributed
from minprefix.system.device import keep_freed_memory, pick_device
from minprefix.system.errors import InputError, run_main


def main() -> None:
    args = parse_args(__doc__)
    keep_freed_memory()
    args.device = pick_device(args.device)
    if len(args.prefixes) > 1:
        write_with_several(args)
    else:
        write_with_one(args)


def write_with_one(args: Namespace) -> None:
    """Write texts with a prefix, a fine-tuned model or a frozen model alone, and score them with --evaluate."""
    model, tokenizer, prefix, info = load(args)
    trained_task = info.get("task", "")
    # The task decides how texts are searched for and scored; FILE.jsonl is only where the inputs come from.
    task = args.task if args.task and not args.task.endswith(ROW_SUFFIXES) else trained_task
    examples = read_examples(args, trained_task)
    if args.evaluate:
        check_scorable(task, examples)
    search = {**search_options(task, vars(args)), "max_source": args.max_source or trained_max_source(info)}
    sources = distributed.shard([example.source for example in examples])
    progress = len(examples) > 1 and distributed.rank() == 0
    found = generate_scored(model, tokenizer, sources, prefix, **search, **draw_options(args), progress=progress)
    lines = write_texts([example.source for example in examples], distributed.unshard(found), args)
    if args.evaluate and distributed.rank() == 0:
        evaluate(task, examples, lines, args.output.with_suffix(".json"), {**vars(args), **search})


def write_with_several(args: Namespace) -> None:
    """Write a text for each row of --file with the prefix that the row names."""
    info = read_trained(find_trained(args.prefix))[1]
    model, tokenizer = load_base(args, resolve_base_model(args.model, args.prefix, info))
    prefixes = load_prefixes(args.prefixes, model)
    requests = read_requests(args.file, prefixes, args.limit)
    found = write_requests(model, tokenizer, requests, prefixes, vars(args), draw_options(args))
    write_texts([source for source, _ in requests], found, args)


def load(args: Namespace) -> tuple[Model, Tokenizer, KVPrefix | None, dict[str, str]]:
    """The model, its tokenizer, the prefix if there is one, and the metadata saved by training: task, max_source."""
    trained = find_trained(args.prefix) if args.prefix else None
    if trained and not (trained / "config.json").is_file():  # a prefix, or a file of another method
        info = read_trained(trained)[1]
        model, tokenizer = load_base(args, resolve_base_model(args.model, args.prefix, info))
        return model, tokenizer, load_trained(trained, model), info
    if trained and args.model:
        raise InputError(f"--prefix {args.prefix} is a fine-tuned model, it needs no other: leave out --model")
    model, tokenizer = load_base(args, trained or resolve_base_model(args.model, None, {}))
    return model, tokenizer, None, finetune_metadata(model.config)


def load_base(args: Namespace, folder: Path) -> tuple[Model, Tokenizer]:
    model = load_model(folder, args.device, pick_writing_dtype(args.dtype, args.device, folder))
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    return model, tokenizer


def draw_options(args: Namespace) -> dict[str, Any]:
    """The options of `generate` that do not depend on the task."""
    rank = distributed.rank()
    return {
        "sample": args.sample, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
        "returned": args.returned or 1, "scored": args.scores,
        "generator": torch.Generator(args.device).manual_seed(args.seed + rank), "batch_size": args.batch_size,
        "what": f"sources of process {rank}" if distributed.world_size() > 1 else "sources",
    }  # fmt: skip


if __name__ == "__main__":
    run_main(distributed.distributed_main(main))
