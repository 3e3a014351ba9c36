"""Requests of many users in one batch, each with the prefix that it names (paper, section 8)."""

from pathlib import Path
from typing import Any

from minprefix.cli.search import search_options
from minprefix.core.generate import generate_scored
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
    """The rows {"source": ..., "prefix": name} of a .jsonl file, each source in the form of its prefix's task."""
    requests = []
    for number, row in enumerate(load_examples(file, "all", topic_field="prefix")[:limit], 1):
        if row.topic not in prefixes:
            named = 'has no "prefix"' if row.topic is None else f'has "prefix": {row.topic!r:.80}'
            raise InputError(f"{file}: request {number} {named}, the prefixes are {', '.join(prefixes)}")
        task = prefixes[row.topic].info.get("task", "")
        requests.append((format_source(task, row.source, f"{file}: request {number}"), row.topic))
    return requests


def write_requests(
    model: Model, tokenizer: Tokenizer, requests: list[Request], prefixes: dict[str, KVPrefix],
    given: dict[str, Any], options: dict[str, Any],
) -> list[list[tuple[str, float]]]:  # fmt: skip
    """The texts for each request by its prefix, and their scores, with the search of that prefix's task.

    given: options of the command line; those that are not None replace the task's. options: further ones of `generate`.
    Requests whose options are the same share batches, whatever their prefixes.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}  # search options -> indices of requests
    for i, (_, name) in enumerate(requests):
        info = prefixes[name].info
        search = search_options(info.get("task", ""), given)
        search["max_source"] = given["max_source"] or trained_max_source(info)
        groups.setdefault(tuple(search.items()), []).append(i)
    found: list[list[tuple[str, float]]] = [[] for _ in requests]
    names = list(prefixes)
    for search_items, group in groups.items():
        mine = [requests[i] for i in distributed.shard(group)]
        stacked = stack_prefixes(list(prefixes.values()), [names.index(name) for _, name in mine])
        written = generate_scored(
            model, tokenizer, [source for source, _ in mine], stacked, **dict(search_items), **options,
            progress=len(group) > 1 and distributed.rank() == 0,
        )  # fmt: skip
        for i, texts in zip(group, distributed.unshard(written), strict=True):
            found[i] = texts
    return found
