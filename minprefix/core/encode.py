"""Sources and targets as token ids, for both kinds of model.

GPT-2 reads `" {x} <|endoftext|> {y} <|endoftext|>"` in one sequence, as in the paper; BART's encoder reads
`<s>{x}</s>`, its decoder `</s><s>{y}` and writes `<s>{y}</s>`, as HuggingFace's.
"""

import sys
from dataclasses import dataclass

from minprefix.core.model import Model, Tokenizer
from minprefix.core.prefix_kv import AnyPrefix
from minprefix.system.errors import InputError

Pair = tuple[list[int], list[int]]  # the ids of a source, those of a target
MAX_SOURCE = 512  # tokens of a source that an encoder reads (the paper's XSum articles are cut there, too)


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


def end_ids(model: Model, tokenizer: Tokenizer, prefix: AnyPrefix | None = None) -> list[int]:
    """The tokens that end a text.

    Without a prefix: config.json's eos ids that are in the vocabulary. With one, or if there are none: the tokeniser's
    end token.
    """
    named = model.config.get("eos_token_id") if prefix is None else None
    ids = [i for i in (named if isinstance(named, list) else [named]) if i is not None]
    return [i for i in dict.fromkeys(ids) if 0 <= i < model.config["vocab_size"]] or [tokenizer.end_id]


def encode_sources(
    texts: list[str], tokenizer: Tokenizer, model: Model, max_source: int | None = None, what: str | None = "sources"
) -> list[list[int]]:
    """The source ids of each text, cut to max_source tokens; one line on stderr says how many were cut.

    max_source: by default 512 for BART, and never more than the encoder has positions for; GPT-2's sources are cut only
    if it is given. what: the noun in that message, None for no message.
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
