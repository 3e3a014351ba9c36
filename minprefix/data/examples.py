"""Operations on examples: checking texts, grouping by source, held-out sources, selection by topic or at random."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from minprefix.core.encode import Example
from minprefix.system.errors import InputError

T = TypeVar("T")


class EmptyText(InputError):
    """A text of the input is empty. A separate class, since such rows of XSum are skipped."""


def collapse_whitespace(text: str) -> str:
    """The text with each run of white space, line ends included, replaced by one space."""
    return " ".join(text.split())


def check_text(text: object, where: str) -> str:
    """The text without white space around it; InputError if it is no string, empty, or has invalid characters."""
    if not isinstance(text, str):
        raise InputError(f"{where} is a JSON {type(text).__name__}, a string is needed")
    if re.search("[\0\ud800-\udfff]", text):
        raise InputError(f"{where} holds a NUL character or half a character (a lone surrogate): remove it")
    if not text.strip():
        raise EmptyText(f"{where} is empty")
    return text.strip()


def group_by_source(examples: list[Example]) -> list[Example]:
    """One Example for each distinct source and topic, in the order of first occurrence, with all references."""
    by_source: dict[tuple[str, str | None], Example] = {}
    for example in examples:
        group = by_source.setdefault((example.source, example.topic), Example(example.source, [], example.topic))
        group.references.extend(example.references)
    return list(by_source.values())


def held_out(sources: Sequence[str]) -> set[str]:
    """The sources to hold out: a tenth, at least 1 and at most 500, the same in each call for the same sources.

    The sources are divided into equally long sections, and one is drawn from each. So the held-out sources are of all
    topics, whether a file is sorted by topic or alternates between topics.
    """
    count, rng = min(max(len(sources) // 10, 1), 500), np.random.default_rng(0)
    ends = [i * len(sources) // count for i in range(count + 1)]
    return {sources[int(rng.integers(start, end))] for start, end in pairwise(ends)}


def filter_topics(examples: list[Example], topics: Sequence[str] | None, where: str) -> list[Example]:
    """The Examples on these topics, in order, or all if `topics` is empty; InputError if a topic has no Examples.

    where: the name of the data, for the message.
    """
    if not topics:
        return examples
    present = {example.topic for example in examples if example.topic is not None}
    if missing := [topic for topic in topics if topic not in present]:
        known = f"the topics there are {', '.join(sorted(present))}" if present else "the examples there have no topics"
        raise InputError(f"{where} has nothing on the topic {missing[0]!r}: {known:.500}")
    return [example for example in examples if example.topic in topics]


def sample_pairs(examples: list[Example], count: int, seed: int, where: str) -> list[Example]:
    """Draw `count` of the (source, reference) pairs at random, as Examples with one reference.

    The draw depends on `seed` only; a smaller one with the same seed is the start of a larger one. InputError if there
    are too few pairs.
    """
    pairs = [Example(example.source, [y], example.topic) for example in examples for y in example.references]
    if count > len(pairs):
        raise InputError(f"{where} has {len(pairs):,} pairs of a source and a reference: {count:,} cannot be drawn")
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:count]]


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
