"""Requests of many users in one batch, each with the prefix that it names (paper, section 8)."""

from pathlib import Path
from typing import Any

from minprefix.cli.search import search_options
from minprefix.core.generate import generate
from minprefix.core.model import Model
from minprefix.core.prefix import stack_prefixes
from minprefix.core.prefix_kv import KVPrefix
from minprefix.data.tasks import format_source, load_examples
from minprefix.formats.tokenizer import Tokenizer
from minprefix.methods.files import find_trained, load_trained, read_trained, trained_max_source
from minprefix.system import distributed
from minprefix.system.errors import InputError

Request = tuple[str, str]  # a source, the name of its prefix


def prefix_name(path: Path) -> str:
    """What requests call a prefix: its file without the ending, or its folder."""
    return path.resolve().name if path.is_dir() else path.stem


def load_prefixes(paths: list[Path], model: Model) -> dict[str, KVPrefix]:
    """The prefixes in files or folders, by name."""
    prefixes: dict[str, KVPrefix] = {}
    for path in paths:
        name = prefix_name(path)
        if name in prefixes:
            raise InputError(f"two --prefix are called {name!r}: rename one, or give its run's folder instead")
        file = find_trained(path)
        method = read_trained(file)[1].get("method", "prefix")
        prefix = load_trained(file, model) if method in ("prefix", "embedding") else None
        if prefix is None:
            raise InputError(f"--prefix {path} is of --method {method}: only prefixes and embeddings share a batch")
        prefixes[name] = prefix
    return prefixes


def read_requests(file: str, prefixes: dict[str, KVPrefix], limit: int | None = None) -> list[Request]:
    """The rows {"source": ..., "prefix": name} of a .jsonl file."""
    requests = []
    for number, row in enumerate(load_examples(file, "all", topic_field="prefix")[:limit], 1):
        if row.topic not in prefixes:
            known = f"the prefixes are {', '.join(prefixes)}"
            named = 'has no "prefix"' if row.topic is None else f'has "prefix": {row.topic!r:.80}'
            raise InputError(f"{file}: request {number} {named}, {known}")
        requests.append((row.source, row.topic))
    return requests


def write_requests(
    model: Model, tokenizer: Tokenizer, requests: list[Request], prefixes: dict[str, KVPrefix],
    given: dict[str, Any], drawing: dict[str, Any],
) -> list[str]:  # fmt: skip
    """A text for each request, by the prefix that it names, in the form and by the search of that prefix's task.

    given: options of the command line; those that are not None replace the task's. drawing: further options of
    `generate`. Requests whose options are the same share batches, whatever their prefixes.
    """
    places = {name: place for place, name in enumerate(prefixes)}
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}  # options of `generate` -> numbers of requests
    sources = []  # of all, before the first text: one may not be in its task's form
    for i, (source, name) in enumerate(requests):
        info = prefixes[name].info
        sources.append(format_source(info.get("task", ""), source, f"request {i + 1}"))
        search = search_options(info.get("task", ""), given)
        search["max_source"] = given["max_source"] or trained_max_source(info)
        groups.setdefault(tuple(search.items()), []).append(i)
    texts = [""] * len(requests)
    for options, group in groups.items():
        mine = distributed.shard(group)
        stacked = stack_prefixes(list(prefixes.values()), [places[requests[i][1]] for i in mine])
        progress = len(group) > 1 and distributed.rank() == 0
        written = generate(
            model, tokenizer, [sources[i] for i in mine], stacked, **dict(options), **drawing, progress=progress
        )
        for i, text in zip(group, distributed.unshard(written), strict=True):
            texts[i] = text
    return texts
