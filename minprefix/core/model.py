"""What the rest of core needs of a model, a tokeniser and a method: the types, and nothing else."""

from collections.abc import Iterable
from typing import Protocol

from minprefix.core.bart import BART
from minprefix.core.gpt2 import GPT2

Model = GPT2 | BART


class Tokenizer(Protocol):
    """Text to token ids and back, see formats/tokenizer.py."""

    end_id: int  # ends a target: <|endoftext|> or </s>
    pad_id: int
    special: dict[str, int]  # special tokens that may stand in texts' ids
    added: dict[str, int]  # tokens added to the vocabulary, which are found in texts
    newline_ids: list[int]  # ids whose text holds a line break
    rank_to_id: list[int]  # the ids that a text can come to

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...
