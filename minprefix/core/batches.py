"""Examples as token ids, ids as batches, for both kinds of model.

GPT-2 reads `" {x} <|endoftext|> {y} <|endoftext|>"` in one sequence, as in the paper; BART's encoder reads
`<s>{x}</s>`, its decoder `</s><s>{y}` and writes `<s>{y}</s>`, as HuggingFace's. Only the target's tokens are in the
loss. Shapes: B rows, S source tokens, T tokens, N target tokens of a batch.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minprefix.core.attention import length_mask
from minprefix.core.model import Model, Tokenizer
from minprefix.core.prefix_kv import PrefixDict
from minprefix.system.errors import InputError

Pair = tuple[list[int], list[int]]  # the ids of a source, those of a target
MAX_SOURCE = 512  # tokens of a source that an encoder reads (the paper's XSum articles are cut there, too)


# ---- examples -> token ids ----


@dataclass
class Example:
    source: str  # the linearised text x
    references: list[str]  # the texts y; none if the input is unlabelled
    topic: str | None = None  # what the input is about, where the data say so


def check_vocabulary(tokenizer: Tokenizer, model: Model, where: object = "the tokeniser's folder") -> None:
    """InputError if the tokeniser is not of the model's kind, or has ids that the model has no embedding for."""
    if model.encoder_decoder and "<s>" not in tokenizer.special:
        raise InputError(f"{where}: the tokeniser lacks <s>: it is not BART's")
    for token, i in tokenizer.added.items():
        if i >= model.config["vocab_size"]:
            ids = f"added token {token!r:.80} has the id {i}, beyond the model's embeddings"
            raise InputError(f"{where}: the {ids}: resize those, or remove the token from the tokeniser's files")
    # Only ids that a text can come to: bart-large-cnn's tokeniser has a <mask> that its model has no embedding for.
    ids = [*tokenizer.rank_to_id, tokenizer.end_id, tokenizer.pad_id]
    if max(ids) >= model.config["vocab_size"]:
        sizes = f"ids up to {max(ids)}, the model embeddings for {model.config['vocab_size']}"
        raise InputError(f"{where}: the tokeniser has {sizes}: they belong to different models")


def sequence_form(model: Model) -> str:
    """What the model reads and writes for a source x and a target y, as it stands in a prefix file."""
    return "<s>{x}</s> -> <s>{y}</s>" if model.encoder_decoder else " {x} <|endoftext|> {y} <|endoftext|>"


def start_id(model: Model, tokenizer: Tokenizer) -> int:
    """The token that a target's first one follows: what BART's decoder starts from, or GPT-2's separator."""
    return model.config["decoder_start_token_id"] if model.encoder_decoder else tokenizer.end_id


def end_ids(model: Model, tokenizer: Tokenizer, prefix: PrefixDict | None = None) -> list[int]:
    """The tokens that end a text: those that the model's config.json names, if it is to write without a prefix.

    A prefix was trained on targets that end with the tokeniser's end token; so a model ends, too, whose config.json
    names no token of its vocabulary.
    """
    named = model.config.get("eos_token_id") if prefix is None else None
    ids = [i for i in (named if isinstance(named, list) else [named]) if i is not None]
    return [i for i in dict.fromkeys(ids) if 0 <= i < model.config["vocab_size"]] or [tokenizer.end_id]


def encode_sources(
    texts: list[str], tokenizer: Tokenizer, model: Model, max_source: int | None = None, what: str | None = "sources"
) -> list[list[int]]:
    """The source ids of each text, cut to max_source tokens; one line on stderr says how many were cut.

    max_source: by default 512 for BART, and never more than the encoder has positions for; GPT-2's sources are cut only
    if it is given. what: what that line calls the sources, None for no line.
    """
    if model.encoder_decoder and "<s>" not in tokenizer.special:
        raise InputError("the tokeniser lacks <s>: it is not BART's")
    around = 2 if model.encoder_decoder else 0  # <s> and </s>
    if model.encoder_decoder:
        max_source = min(MAX_SOURCE if max_source is None else max_source, model.n_positions)
    if max_source is not None and max_source <= around:
        room = f"no room for text{' beside <s> and </s>' if around else ''}"
        remedy = f"raise --max-source to {around + 1} or more"
        raise InputError(f"sources of at most {max_source} tokens have {room}: {remedy}")
    sources = [tokenizer.encode(text if model.encoder_decoder else f" {text} ") for text in texts]
    if max_source is not None:
        most = max_source - around
        long = sum(len(source) > most for source in sources)
        if long and what:
            print(f"cut {long:,} of {len(texts):,} {what} to their first {max_source} tokens", file=sys.stderr)
        sources = [source[:most] for source in sources]
    if model.encoder_decoder:
        sources = [[tokenizer.special["<s>"], *source, tokenizer.end_id] for source in sources]
    return sources


def encode_target(text: str, tokenizer: Tokenizer, model: Model) -> list[int]:
    """The ids that the model is to write for a text y, the end token last."""
    if model.encoder_decoder:
        return [tokenizer.special["<s>"], *tokenizer.encode(text), tokenizer.end_id]
    return [*tokenizer.encode(f" {text} "), tokenizer.end_id]


def encode_pairs(
    examples: list[Example], tokenizer: Tokenizer, model: Model, max_source: int | None = None,
    what: str | None = "sources",
) -> list[Pair]:  # fmt: skip
    """One (source ids, target ids) for each reference of each example, in order; see `encode_sources`."""
    sources = encode_sources([example.source for example in examples], tokenizer, model, max_source, what)
    return [
        (source, encode_target(y, tokenizer, model))
        for example, source in zip(examples, sources, strict=True)
        for y in example.references
    ]


def pair_lengths(pairs: list[Pair]) -> list[int]:
    """How many tokens the model reads of each pair: the source, then the token before each token of the target."""
    return [len(source) + len(target) for source, target in pairs]


# ---- ids -> batches ----


@dataclass
class Batch:
    inputs: tuple[Any, ...]  # of model.hidden_states: GPT-2's (ids,), BART's (source_ids, target_ids, source_mask)
    target_positions: Tensor  # (N,) int64, b * T + t where the next token is in the target
    labels: Tensor  # (N,) int64, those next tokens
    source_lengths: Tensor  # (B,) int64

    def to(self, device: str | torch.device) -> "Batch":
        inputs = tuple(x.to(device) for x in self.inputs)
        index, labels, lengths = (x.to(device) for x in (self.target_positions, self.labels, self.source_lengths))
        return Batch(inputs, index, labels, lengths)


def collate(pairs: list[Pair], tokenizer: Tokenizer, model: Model) -> Batch:
    """A list of B (source ids, target ids) -> Batch, rows padded on the right."""
    start, pad_id = start_id(model, tokenizer), tokenizer.pad_id
    sources, targets = [source for source, _ in pairs], [[start, *target[:-1]] for _, target in pairs]
    lengths = torch.tensor([len(source) for source in sources])
    if model.encoder_decoder:
        source_ids, read, first = pad(sources, pad_id), targets, [0] * len(pairs)
        inputs = (source_ids, pad(read, pad_id), length_mask(lengths, source_ids.size(1)))
    else:
        read, first = [s + t for s, t in zip(sources, targets, strict=True)], [len(source) for source in sources]
        inputs = (pad(read, pad_id),)
    T = max(len(row) for row in read)
    index = [b * T + t for b, row in enumerate(read) for t in range(first[b], len(row))]
    labels = [token for _, target in pairs for token in target]
    return Batch(inputs, torch.tensor(index), torch.tensor(labels), lengths)


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Lists of ids -> (B, T) int64, filled up on the right."""
    T = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (T - len(row))] for row in rows])


def batches_per_epoch(rows: Sequence[Any], batch_size: int) -> int:
    """How many `bucket_batches` are made of rows: all full but one."""
    return math.ceil(len(rows) / batch_size)


def bucket_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches as lists of indices: each index once, rows of like lengths together, all full but one.

    lengths: (N,), those of the rows; or (N, 2), those of both parts of each row, where the parts are padded apart.
    The rows are shuffled, cut into windows of up to 50 batches, sorted by length inside each, and the batches are
    shuffled. There are at least four windows if there are enough rows: with a single one, sorted as a whole, the same
    rows would nearly always share a batch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = batch_size * min(max(len(lengths) // batch_size // 4, 1), 50)
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[by_length(lengths[part], batch_size)]
        batches += [part[i : i + batch_size].tolist() for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def by_length(lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """The order (N,) in which neighbouring rows have like lengths. lengths: as in `bucket_batches`."""
    if lengths.ndim == 1:
        return np.argsort(lengths, kind="stable")
    order = np.argsort(lengths[:, 0], kind="stable")
    group = batch_size * max(1, round(math.sqrt(len(order) / batch_size)))  # rows alike in the first part
    groups = [order[i : i + group] for i in range(0, len(order), group)]
    return np.concatenate([rows[np.argsort(lengths[rows, 1], kind="stable")] for rows in groups])


def sorted_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches for evaluation: each index once, the longest rows first, so that too little memory shows at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
