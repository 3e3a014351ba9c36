"""Tokens added to a vocabulary: reading them from a HuggingFace folder's files, and splitting texts at them."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minprefix.formats.safetensors import read_object

SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class AddedToken(NamedTuple):
    """HuggingFace's `AddedToken` and its id: a token that is found in a text before the text is split into words."""

    content: str
    id: int
    special: bool  # left out of generated texts
    normalized: bool  # searched for after the tokens that are not normalized, in the text between those
    single_word: bool  # found only if no letter, digit or underscore is next to it
    lstrip: bool  # includes the white space before it
    rstrip: bool  # includes the white space after it


class AddedTokens:
    """A set of added tokens, at which texts are split."""

    def __init__(self, tokens: list[AddedToken]):
        self.finders = []
        for normalized in (False, True):
            group = {token.content: token for token in tokens if token.normalized is normalized}
            longest_first = sorted(group, key=len, reverse=True)  # the longest of several at one position matches
            if group:
                self.finders.append((re.compile("|".join(map(re.escape, longest_first))), group))

    def cut(self, text: str) -> list[str | int]:
        """Split a text at these tokens, as HuggingFace's tokenizers does: the strings between them, and their ids."""
        pieces: list[str | int] = [text] if text else []
        for finder, tokens in self.finders:
            cuts = ([piece] if isinstance(piece, int) else cut(piece, finder, tokens) for piece in pieces)
            pieces = [part for parts in cuts for part in parts]
        return pieces


def cut(text: str, finder: re.Pattern[str], tokens: dict[str, AddedToken]) -> Iterator[str | int]:
    """Split a text at the matches of `finder` that the tokens' flags allow, into strings and ids."""
    position = 0
    for match in finder.finditer(text):
        token, (start, end) = tokens[match[0]], match.span()
        if token.single_word and (is_in_word(text[start - 1 : start]) or is_in_word(text[end : end + 1])):
            continue
        if token.lstrip:
            start = position + len(text[position:start].rstrip(SPACES))
        if token.rstrip:
            end = next((i for i in range(end, len(text)) if text[i] not in SPACES), len(text))
        if position < start:
            yield text[position:start]
        yield token.id
        position = end
    if position < len(text):
        yield text[position:]


def is_in_word(character: str) -> bool:
    """Whether a character is a letter, digit, mark, joiner or underscore; False for ""."""
    category = unicodedata.category(character) if character else "none"
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in ("\u200c", "\u200d")


# ---- files ----


def read_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if the file does not exist."""
    return read_object(path) if path.is_file() else {}


def read_added_tokens(
    folder: Path, vocab: dict[str, Any], config: dict[str, Any], listed: list[Any]
) -> list[AddedToken]:
    """The added tokens of a folder, and the tokens of `vocab` that its files name as special, except single characters.

    They are stored in added_tokens.json (transformers before 4.34), tokenizer.json (`listed`) and tokenizer_config.json
    (`config`). If several files have a token, the last of these defines it.
    """
    named = {*named_tokens(read_if_there(folder / "special_tokens_map.json")), *named_tokens(config)}
    old, decoder = read_if_there(folder / "added_tokens.json"), config.get("added_tokens_decoder")
    words = [text for text in named if text in vocab and len(text) > 1]
    tokens = [{"content": text, "id": vocab[text], "special": True} for text in words]
    tokens += [{"content": text, "id": i, "special": text in named} for text, i in old.items()]
    tokens += [token for token in listed if isinstance(token, dict)]
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        valid = i.isascii() and i.isdigit() and len(i) < 9
        tokens += [{**token, "id": int(i) if valid else i}] if isinstance(token, dict) else []
    known = {token["content"]: token for token in tokens if token.get("content") and isinstance(token["content"], str)}
    return [added_token(token) for token in known.values()]


def added_token(token: dict[str, Any]) -> AddedToken:
    """An AddedToken from its JSON object in HuggingFace's files."""
    special, single_word, lstrip, rstrip = (bool(token.get(k)) for k in ("special", "single_word", "lstrip", "rstrip"))
    normalized, i = bool(token.get("normalized", not special)), token.get("id", -1)
    return AddedToken(token["content"], i, special, normalized, single_word, lstrip, rstrip)


def named_tokens(config: dict[str, Any]) -> Iterator[str]:
    """The tokens that are the values of "pad_token", "additional_special_tokens" and similar keys."""
    for value in (value for key, value in config.items() if key.endswith(("_token", "_tokens"))):
        for token in value if isinstance(value, list) else [value]:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield text
