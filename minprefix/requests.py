"""Requests of many users in one batch, each with the prefix that it names (paper, section 8)."""

from pathlib import Path

import torch

from minprefix import distributed
from minprefix.baselines import load_trained, read_trained, trained_file, trained_max_source
from minprefix.data import format_source, load_examples
from minprefix.examples import Example
from minprefix.files import InputError
from minprefix.generate import generate, search_options
from minprefix.prefix import FoldedPrefix, stack_prefixes
from minprefix.tokenizer import Tokenizer


def load_prefixes(paths: list[Path], model: torch.nn.Module) -> dict[str, FoldedPrefix]:
    """Prefix files and folders by name: the file's without its ending, or the folder's."""
    prefixes = {}
    for path in paths:
        name = path.resolve().name if path.is_dir() else path.stem
        if name in prefixes:
            raise InputError(f"two --prefix are called {name!r}: rename one, or give the folders of their runs instead")
        method = read_trained(trained_file(path))[1].get("method", "prefix")
        if method not in ("prefix", "embedding"):
            raise InputError(f"--prefix {path} is of --method {method}: only prefixes and embeddings share a batch")
        prefixes[name] = load_trained(trained_file(path), model)
    return prefixes


def read_requests(file: str, prefixes: dict[str, FoldedPrefix], limit: int | None = None) -> list[Example]:
    """The rows {"source": ..., "prefix": name} of a .jsonl file, the name as their topic."""
    requests = load_examples(file, "all", topic_field="prefix")[:limit]
    for number, request in enumerate(requests, 1):
        if request.topic not in prefixes:
            known = f"the prefixes are {', '.join(prefixes)}"
            raise InputError(f'{file}: request {number} has "prefix": {request.topic!r:.80}, {known}')
    return requests


def write_requests(
    model: torch.nn.Module, tokenizer: Tokenizer, requests: list[Example], prefixes: dict[str, FoldedPrefix],
    given: dict, drawing: dict,
) -> list[str]:  # fmt: skip
    """A text for each request, in its prefix's task's form and by that task's search, but for the options given.

    Requests that are searched for alike share their batches. drawing: further options of `generate`.
    """
    names, groups = list(prefixes), {}
    for i, request in enumerate(requests):
        info = prefixes[request.topic].info
        search = search_options(info.get("task", ""), given)
        search["max_source"] = given["max_source"] or trained_max_source(info)
        groups.setdefault(tuple(search.items()), []).append(i)
    texts = [None] * len(requests)
    for search, group in groups.items():
        mine = [requests[i] for i in distributed.share(group)]
        sources = [format_source(prefixes[request.topic].info.get("task", ""), request.source) for request in mine]
        stacked = stack_prefixes(list(prefixes.values()), [names.index(request.topic) for request in mine])
        progress = len(group) > 1 and distributed.rank() == 0
        written = generate(model, tokenizer, sources, stacked, **dict(search), **drawing, progress=progress)
        for i, text in zip(group, distributed.joined(written), strict=True):
            texts[i] = text
    return texts
