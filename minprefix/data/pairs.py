"""A task's split as what a model is trained on: pairs of token ids that fit it."""

import math
import sys
from collections.abc import Sequence

from minprefix.core.batches import Example, Pair, encode_pairs, encode_sources, pair_lengths
from minprefix.core.model import Model
from minprefix.data.examples import evenly_spaced, sample_pairs
from minprefix.data.tasks import load_on_topics
from minprefix.formats.tokenizer import Tokenizer
from minprefix.system.errors import InputError


def load_pairs(
    task: str, split: str, tokenizer: Tokenizer, model: Model, start: int, max_source: int | None = None, *,
    data: str | None = None, topics: Sequence[str] | None = None, topic_field: str = "topic", limit: int | None = None,
    low_data: int | None = None, seed: int = 0, skip_long: bool = False,
) -> list[Pair]:  # fmt: skip
    """The (source ids, target ids) of a task's split that fit the model; InputError if one does not.

    start: position of the first token after the prefix. data, topic_field: see `load_examples`. topics: only pairs on
    these. limit: only the first so many pairs. low_data: only so many pairs (for "dev" 30% of that, as in the paper,
    or all if there are fewer), drawn at random from the seed. skip_long: leave out those that do not fit.
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
    texts = [(example.source, y) for example in examples for y in example.references]
    return [pairs[i] for i in that_fit(pairs, texts, model, start, where, skip_long)]


def load_inputs(
    task: str, split: str, count: int, tokenizer: Tokenizer, model: Model, start: int,
    max_source: int | None = None, *, data: str | None = None, topics: Sequence[str] | None = None,
    topic_field: str = "topic", new_tokens: int, skip_long: bool = False,
) -> list[Example]:  # fmt: skip
    """At most `count` Examples of a task's split, on these topics, evenly spaced; new_tokens fit behind each.

    skip_long: leave out those where they do not.
    """
    if count == 0:
        return []  # there need not be such a split
    examples = evenly_spaced(load_on_topics(task, split, data, topics, topic_field), count)
    sources = encode_sources([example.source for example in examples], tokenizer, model, max_source, what=None)
    longest = [(source, [0] * new_tokens) for source in sources]
    texts = [(example.source, f"{new_tokens} new tokens") for example in examples]
    where = f"{task}, {split} split, texts to be written"
    return [examples[i] for i in that_fit(longest, texts, model, start, where, skip_long)]


def that_fit(
    pairs: list[Pair], texts: list[tuple[str, str]], model: Model, start: int, where: str, skip_long: bool
) -> list[int]:
    """The indices of the pairs that have no more tokens than the model has positions for.

    InputError if one has more, unless skip_long: how many have is said on stderr then. start: position of the first
    token after the prefix. The prefix takes positions from GPT-2's sequence of source and target, but for BART from the
    target alone. texts: those of the pairs, for the error; where: what they are of.
    """
    room = max(model.n_positions - start, 0)
    lengths = [len(target) for _, target in pairs] if model.encoder_decoder else pair_lengths(pairs)
    fit = [i for i, length in enumerate(lengths) if length <= room]
    if len(fit) == len(pairs):
        return fit
    if skip_long and fit:
        print(f"{where}: left out {len(pairs) - len(fit):,} of {len(pairs):,}, too long for the model", file=sys.stderr)
        return fit
    longest = lengths.index(max(lengths))
    source, target = map(len, pairs[longest])
    long = int(model.encoder_decoder or target > source)
    side, text = ("source", "target")[long], texts[longest][long]
    tokens = f"{target} tokens" if model.encoder_decoder else f"{source} + {target} tokens of source and target"
    remedy = "lower --offset" if model.encoder_decoder else "" if long else "cut sources (--max-source)"
    raise InputError(
        f"{where}: {len(pairs) - len(fit):,} of {len(pairs):,} are too long; in the longest it is the {side}, which "
        f"begins {text[:60]!r} ({tokens}, the model has room for {room} from position {start} on): shorten "
        f"such texts or the prefix, {remedy + ', ' if remedy else ''}or leave them out (--skip-long)"
    )
