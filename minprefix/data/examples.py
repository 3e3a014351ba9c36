"""What an example of a task is: texts that are fit to be used, grouped by source, chosen by topic or by lot."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from minprefix.core.batches import Example
from minprefix.system.errors import InputError

T = TypeVar("T")


class EmptyText(InputError):
    """A text of the input is empty. Its own class, for XSum has such rows and goes on without them."""


def collapse_whitespace(text: str) -> str:
    """A text with each run of white space, line ends included, as one blank."""
    return " ".join(text.split())


def check_text(text: object, where: str) -> str:
    """A text without the blanks around it; InputError if it is none, empty, or not fit to be written to a file."""
    if not isinstance(text, str):
        raise InputError(f"{where} is a JSON {type(text).__name__}, a string is needed")
    if re.search("[\0\ud800-\udfff]", text):
        raise InputError(f"{where} holds a NUL character or half a character (a lone surrogate): remove it")
    if not text.strip():
        raise EmptyText(f"{where} is empty")
    return text.strip()


def group_by_source(examples: list[Example]) -> list[Example]:
    """One Example for each distinct source and topic, in the order of the first, with all of its references."""
    by_source: dict[tuple[str, str | None], Example] = {}
    for example in examples:
        first = by_source.setdefault((example.source, example.topic), Example(example.source, [], example.topic))
        first.references.extend(example.references)
    return list(by_source.values())


def held_out(sources: Sequence[str]) -> set[str]:
    """A tenth of these sources, at least 1 and at most 500, always the same: one drawn from each stretch of them.

    So they are of all topics, whether a file is sorted by topic or has its topics in turns.
    """
    count, rng = min(max(len(sources) // 10, 1), 500), np.random.default_rng(0)
    ends = [i * len(sources) // count for i in range(count + 1)]
    return {sources[int(rng.integers(start, end))] for start, end in pairwise(ends)}


def filter_topics(examples: list[Example], topics: Sequence[str] | None, where: str) -> list[Example]:
    """The Examples on one of these topics, in order, or without topics all; InputError if none is on one of them.

    where: for the message.
    """
    if not topics:
        return examples
    there = {example.topic for example in examples if example.topic is not None}
    if missing := [topic for topic in topics if topic not in there]:
        known = f"the topics there are {', '.join(sorted(there))}" if there else "the examples there have no topics"
        raise InputError(f"{where} has nothing on the topic {missing[0]!r}: {known:.500}")
    return [example for example in examples if example.topic in topics]


def sample_pairs(examples: list[Example], count: int, seed: int, where: str) -> list[Example]:
    """`count` of the examples' (source, reference) pairs, drawn at random from `seed` alone: Examples of one reference.

    A smaller draw from the same seed is the beginning of a larger one. InputError if there are too few pairs.
    """
    pairs = [Example(example.source, [y], example.topic) for example in examples for y in example.references]
    if count > len(pairs):
        raise InputError(f"{where} has {len(pairs):,} pairs of a source and a reference: {count:,} cannot be drawn")
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:count]]


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
