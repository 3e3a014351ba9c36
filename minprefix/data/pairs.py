"""A task's split as what a model is trained on: pairs of token ids that fit it."""

import math
import sys
from collections.abc import Sequence

from minprefix.core.batches import Example, Pair, check_lengths, encode_pairs, encode_sources
from minprefix.core.model import Model
from minprefix.data.examples import evenly_spaced, sample_pairs
from minprefix.data.tasks import load_on_topics
from minprefix.formats.tokenizer import Tokenizer


def load_pairs(
    task: str, split: str, tokenizer: Tokenizer, model: Model, start: int, max_source: int | None = None, *,
    data: str | None = None, topics: Sequence[str] | None = None, topic_field: str = "topic", limit: int | None = None,
    low_data: int | None = None, seed: int = 0,
) -> list[Pair]:  # fmt: skip
    """The (source ids, target ids) of a task's split, all of which fit the model; InputError if one does not.

    start: position of the first token after the prefix. data, topic_field: see `load_examples`. topics: only pairs on
    these. limit: only the first so many pairs. low_data: only so many pairs (for "dev" 30% of that, as in the paper,
    or all if there are fewer), drawn at random from the seed.
    """
    where = f"{task}, {split} split"
    examples = load_on_topics(task, split, data, topics, topic_field)
    if low_data:
        count = math.ceil(3 * low_data / 10) if split == "dev" else low_data
        there = sum(len(example.references) for example in examples)
        if split == "dev" and there < count:
            asked = f"the {count} of --low-data {low_data}"
            print(f"{where} has {there} pairs, not {asked}: all are taken", file=sys.stderr)
            count = there
        examples = sample_pairs(examples, count, seed, where)
    pairs = encode_pairs(examples[:limit], tokenizer, model, max_source, f"{split} sources")[:limit]
    check_lengths(pairs, model, start, where)
    return pairs


def load_inputs(
    task: str, split: str, count: int, tokenizer: Tokenizer, model: Model, start: int,
    max_source: int | None = None, *, data: str | None = None, topics: Sequence[str] | None = None,
    topic_field: str = "topic", new_tokens: int,
) -> list[Example]:  # fmt: skip
    """At most `count` Examples of a task's split, on these topics, evenly spaced; new_tokens fit behind each."""
    if count == 0:
        return []  # there need not be such a split
    examples = evenly_spaced(load_on_topics(task, split, data, topics, topic_field), count)
    sources = encode_sources([example.source for example in examples], tokenizer, model, max_source, what=None)
    longest = [(source, [0] * new_tokens) for source in sources]
    check_lengths(longest, model, start, f"{task}, {split} split with {new_tokens} new tokens")
    return examples
