"""Byte-level BPE of a GPT-2 or BART folder (`vocab.json` + `merges.txt`, or `tokenizer.json`), run by tiktoken."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from minprefix.formats.hub import resolve_model
from minprefix.system.errors import InputError
from minprefix.system.files import read_json, read_text

# GPT-2's pre-tokenisation (Radford et al. 2019), written with possessive quantifiers so that no text, however long,
# makes the regex engine backtrack. White space before a word, all but its last character, goes in strides of 256: the
# plain `\s+(?!\S)` overflows the engine's stack after a million of them.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|(?:\s{256}(?=\s))*(?:\s(?=\s))++|\s"
SPECIAL_TOKENS = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>")


class Tokenizer:
    """Text to token ids and back; the same ids as HuggingFace's tokeniser of the same files, no special tokens added.

    vocab: token (in GPT-2's printable byte alphabet) -> id; merges: pairs of tokens, the most frequent first.
    end_id ends a target ("<|endoftext|>" or "</s>"), pad_id fills up a batch.
    """

    def __init__(self, vocab: dict[str, int], merges: Iterable[Sequence[str]], where: str = "the tokeniser"):
        if not vocab or any(type(i) is not int or not 0 <= i < 2**24 for i in vocab.values()):
            raise InputError(f"{where}: the vocabulary must map tokens to small non-negative integers")
        if len(set(vocab.values())) != len(vocab):
            raise InputError(f"{where}: two tokens of the vocabulary share an id")
        # tiktoken merges by rank and calls the rank the id; GPT-2's ids are the ranks, BART's are not: keep a table.
        tokens = dict.fromkeys([*byte_alphabet(), *(a + b for a, b in merges)])
        self.rank_to_id = []
        for token in tokens:
            if token not in vocab:
                raise InputError(f"{where}: the merges make {token!r}, which the vocabulary lacks")
            self.rank_to_id.append(vocab[token])
        self.id_to_rank = {i: rank for rank, i in enumerate(self.rank_to_id)}
        ranks = {to_bytes(token, where): rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding("minprefix", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.special = {token: vocab[token] for token in SPECIAL_TOKENS if token in vocab}
        self.id_to_special = {i: token for token, i in self.special.items()}
        self.vocab_size = max(vocab.values()) + 1
        end = "</s>" if "</s>" in self.special else "<|endoftext|>"
        if end not in self.special:
            raise InputError(f"{where}: neither <|endoftext|> nor </s> is in the vocabulary")
        self.end_id = self.special[end]
        self.pad_id = self.special.get("<pad>", self.end_id)
        self.newline_ids = [i for i in self.id_to_rank if b"\n" in self._bytes(i)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. "<|endoftext|>" and the like inside it are ordinary characters."""
        return [self.rank_to_id[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", errors="replace")

    def _bytes(self, i: int) -> bytes:
        if i in self.id_to_rank:
            return self.encoding.decode_single_token_bytes(self.id_to_rank[i])
        return self.id_to_special.get(i, "").encode()  # unused rows of a padded vocabulary have no text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The Tokenizer of a HuggingFace folder, or of a model's name.

    InputError when its files are missing, malformed or of another kind.
    """
    folder = resolve_model(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = read_text(folder / "merges.txt").splitlines()
        lines = lines[1:] if lines and lines[0].startswith("#version") else lines
        return checked_tokenizer(read_json(folder / "vocab.json"), [line for line in lines if line], folder)
    if (folder / "tokenizer.json").is_file():
        return checked_tokenizer(*read_tokenizer_json(folder / "tokenizer.json"), folder)
    raise InputError(f"{folder} has no tokeniser: vocab.json and merges.txt, or tokenizer.json, must be there")


def read_tokenizer_json(path: Path) -> tuple[dict[str, Any], list[Any]]:
    spec = read_json(path)
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise InputError(f"{path} is not a byte-level BPE tokeniser (GPT-2's and BART's kind)")
    split, kind = spec.get("pre_tokenizer"), {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not isinstance(split, dict) or any(split.get(key, value) != value for key, value in kind.items()):
        raise InputError(f"{path}: pre_tokenizer {split!r:.100} does not split texts as GPT-2's and BART's do: {kind}")
    for part, key in ((spec, "normalizer"), (model, "ignore_merges")):
        if part.get(key):
            raise InputError(f"{path}: {key} {part[key]!r:.100} is not supported: GPT-2's and BART's have none")
    vocab, added = model.get("vocab"), spec.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(model.get("merges"), list) or not isinstance(added, list):
        raise InputError(f"{path} lacks the model's vocab or merges")
    added = {t["content"]: t.get("id") for t in added if isinstance(t, dict) and isinstance(t.get("content"), str)}
    return {**vocab, **added}, model["merges"]


def checked_tokenizer(vocab: object, merges: list[Any], folder: Path) -> Tokenizer:
    """merges: "a b" strings (merges.txt, older tokenizer.json) or [a, b] lists (newer ones)."""
    if not isinstance(vocab, dict):
        raise InputError(f"{folder}: the vocabulary is not a JSON object of token: id")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise InputError(f"{folder}: {pair!r} is not a merge of two tokens")
    return Tokenizer(vocab, pairs, str(folder))


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: character -> byte, in the order of the first 256 token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def to_bytes(token: str, where: str) -> bytes:
    try:
        return bytes(byte_alphabet()[character] for character in token)
    except KeyError as error:
        raise InputError(f"{where}: {token!r} has a character outside the byte-level alphabet") from error
