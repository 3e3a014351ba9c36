"""A task's split as the pairs of token ids that a model is trained on, and as inputs for generation."""

import math
import sys
from collections.abc import Sequence

from minprefix.core.encode import Example, Pair, encode_pairs, encode_sources, pair_lengths
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
    """The (source ids, target ids) pairs of a task's split; InputError if one is too long for the model.

    start: position of the first token after the prefix. data, topic_field: see `load_examples`. topics: use only pairs
    on these. limit: use only the first `limit` pairs. low_data: draw this many pairs at random from the seed (for "dev"
    30% of it, as in the paper, or all if there are fewer). skip_long: leave out pairs that are too long.
    """
    where = f"{task}, {split} split"
    examples = load_on_topics(task, split, data, topics, topic_field)
    if low_data:
        count = math.ceil(3 * low_data / 10) if split == "dev" else low_data
        available = sum(len(example.references) for example in examples)
        if split == "dev" and available < count:
            wanted = f"the {count} of --low-data {low_data}"
            print(f"{where} has {available} pairs, not {wanted}: all are taken", file=sys.stderr)
            count = available
        examples = sample_pairs(examples, count, seed, where)
    pairs = encode_pairs(examples[:limit], tokenizer, model, max_source, f"{split} sources")[:limit]
    texts = [(example.source, y) for example in examples for y in example.references]
    return [pairs[i] for i in fitting_indices(pairs, texts, model, start, where, skip_long)]


def load_inputs(
    task: str, split: str, count: int, tokenizer: Tokenizer, model: Model, start: int,
    max_source: int | None = None, *, data: str | None = None, topics: Sequence[str] | None = None,
    topic_field: str = "topic", new_tokens: int, skip_long: bool = False,
) -> list[Example]:  # fmt: skip
    """At most `count` Examples of a task's split, on these topics, evenly spaced.

    InputError if `new_tokens` after a source exceed the model's positions; skip_long: leave out such Examples.
    """
    if count == 0:
        return []  # the split may not exist
    examples = evenly_spaced(load_on_topics(task, split, data, topics, topic_field), count)
    sources = encode_sources([example.source for example in examples], tokenizer, model, max_source, what=None)
    longest = [(source, [0] * new_tokens) for source in sources]
    texts = [(example.source, f"{new_tokens} new tokens") for example in examples]
    where = f"{task}, {split} split, texts to be written"
    return [examples[i] for i in fitting_indices(longest, texts, model, start, where, skip_long)]


def fitting_indices(
    pairs: list[Pair], texts: list[tuple[str, str]], model: Model, start: int, where: str, skip_long: bool
) -> list[int]:
    """The indices of the pairs whose tokens fit into the model's positions.

    InputError if a pair does not fit, or with skip_long a warning on stderr with their number. start: position of the
    first token after the prefix: of GPT-2's source and target together, of BART's target. texts: the pairs as texts,
    and where: their dataset, for the error.
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
