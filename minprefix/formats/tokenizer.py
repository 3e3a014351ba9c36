"""Byte-level BPE of a GPT-2 or BART folder (`vocab.json` + `merges.txt`, or `tokenizer.json`), run by tiktoken."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from minprefix.formats.added_tokens import AddedToken, AddedTokens, read_added_tokens, read_if_there
from minprefix.formats.hub import resolve_model
from minprefix.system.errors import InputError
from minprefix.system.files import read_json, read_text

# GPT-2's pre-tokenisation (Radford et al. 2019), written with possessive quantifiers so that the regex engine does not
# backtrack, however long the text. White space before a word, except its last character, is matched in steps of 256:
# the plain `\s+(?!\S)` overflows the engine's stack after a million characters.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|(?:\s{256}(?=\s))*(?:\s(?=\s))++|\s"
SPECIAL_TOKENS = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>")


class Tokenizer:
    """Text to token ids and back, as HuggingFace's tokeniser of the same files with add_special_tokens=False.

    vocab: token (in GPT-2's printable byte alphabet) -> id; merges: pairs of tokens, the most frequent first; added:
    tokens added to the vocabulary. add_prefix_space: put a space before a text, and before the text after an added
    token. end_id is the token that ends a target ("<|endoftext|>" or "</s>"), pad_id the one that pads a batch.
    """

    def __init__(
        self, vocab: dict[str, int], merges: Iterable[Sequence[str]], where: str = "the tokeniser",
        added: Sequence[AddedToken] = (), add_prefix_space: bool = False,
    ):  # fmt: skip
        model_special = [token for token in SPECIAL_TOKENS if token in vocab]
        for token in added:
            if vocab.get(token.content, token.id) != token.id:
                ids = f"{vocab[token.content]} in the vocabulary, {token.id!r:.40} among the added tokens"
                raise InputError(f"{where}: {token.content!r:.80} has two ids: {ids}")
        vocab = {**vocab, **{token.content: token.id for token in added}}
        if not vocab or any(type(i) is not int or not 0 <= i < 2**24 for i in vocab.values()):
            raise InputError(f"{where}: the vocabulary must map tokens to small non-negative integers")
        if len(set(vocab.values())) != len(vocab):
            raise InputError(f"{where}: two tokens of the vocabulary share an id")
        # tiktoken uses the rank of a merge as the token's id. BART's ids differ from the ranks, so a table is needed.
        tokens = dict.fromkeys([*byte_alphabet(), *(a + b for a, b in merges)])
        self.rank_to_id = []
        for token in tokens:
            if token not in vocab:
                raise InputError(f"{where}: the merges make {token!r}, which the vocabulary lacks")
            self.rank_to_id.append(vocab[token])
        self.id_to_rank = {i: rank for rank, i in enumerate(self.rank_to_id)}
        ranks = {to_bytes(token, where): rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding("minprefix", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.add_prefix_space = add_prefix_space
        matched = [token for token in added if token.content not in model_special]
        self.finder, self.added = AddedTokens(matched), {token.content: token.id for token in matched}
        self.special = {token: vocab[token] for token in [*model_special, *(t.content for t in added if t.special)]}
        self.id_to_text = {i: literal_bytes(token) for token, i in vocab.items() if token not in tokens}
        self.id_to_text.update((token.id, token.content.encode(errors="replace")) for token in added)
        self.vocab_size = max(vocab.values()) + 1
        ends = [end for tokens in (model_special, vocab) for end in ("</s>", "<|endoftext|>") if end in tokens]
        if not ends:
            raise InputError(f"{where}: neither <|endoftext|> nor </s> is in the vocabulary")
        self.end_id = vocab[ends[0]]
        self.pad_id = self.special.get("<pad>", self.end_id)
        self.newline_ids = [i for i in [*self.id_to_rank, *self.id_to_text] if b"\n" in self._bytes(i)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. The model's special tokens ("<|endoftext|>") in it are read as ordinary characters."""
        ids: list[int] = []
        for piece in self.finder.cut(text):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            space = " " if self.add_prefix_space and not piece.startswith(" ") else ""
            ids += [self.rank_to_id[rank] for rank in self.encoding.encode_ordinary(space + piece)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not valid UTF-8 (part of a character) become U+FFFD."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", errors="replace")

    def _bytes(self, i: int) -> bytes:
        if i in self.id_to_rank:
            return self.encoding.decode_single_token_bytes(self.id_to_rank[i])
        return self.id_to_text.get(i, b"")  # the ids of a padded vocabulary's unused rows have no text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The Tokenizer of a HuggingFace folder or of a model's name.

    InputError if its files are missing, malformed or of another kind of tokeniser.
    """
    folder = resolve_model(folder)
    config = read_if_there(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        spec = read_tokenizer_json(folder / "tokenizer.json")
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = read_text(folder / "merges.txt").splitlines()
        lines = lines[1:] if lines and lines[0].startswith("#version") else lines
        spec, vocab, merges = {}, read_json(folder / "vocab.json"), [line for line in lines if line]
    else:
        raise InputError(f"{folder} has no tokeniser: vocab.json and merges.txt, or tokenizer.json, must be there")
    if not isinstance(vocab, dict):
        raise InputError(f"{folder}: the vocabulary is not a JSON object of token: id")
    added = read_added_tokens(folder, vocab, config, spec.get("added_tokens") or [])
    return Tokenizer(vocab, checked_merges(merges, folder), str(folder), added, add_prefix_space(folder, config, spec))


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    spec = read_json(path)
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise InputError(f"{path} is not a byte-level BPE tokeniser (GPT-2's and BART's kind)")
    split, kind = spec.get("pre_tokenizer"), {"type": "ByteLevel", "use_regex": True}
    if not isinstance(split, dict) or any(split.get(key, value) != value for key, value in kind.items()):
        raise InputError(f"{path}: pre_tokenizer {split!r:.100} does not split texts as GPT-2's and BART's do: {kind}")
    for part, key in ((spec, "normalizer"), (model, "ignore_merges")):
        if part.get(key):
            raise InputError(f"{path}: {key} {part[key]!r:.100} is not supported: GPT-2's and BART's have none")
    parts = (model.get("vocab"), dict), (model.get("merges"), list), (spec.get("added_tokens") or [], list)
    if not all(isinstance(part, kind) for part, kind in parts):
        raise InputError(f"{path} lacks the model's vocab or merges")
    return spec


def checked_merges(merges: list[Any], folder: Path) -> list[list[str]]:
    """Merges as [a, b] lists; InputError if malformed. merges.txt and older tokenizer.json have "a b" strings."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise InputError(f"{folder}: {pair!r} is not a merge of two tokens")
    return pairs


def add_prefix_space(folder: Path, config: dict[str, Any], spec: dict[str, Any]) -> bool:
    """Whether to put a space before a text: read from tokenizer_config.json, as AutoTokenizer does.

    If that file names a tokeniser class other than GPT-2's and BART's, it is read from tokenizer.json.
    """
    class_name = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    known = class_name in ("GPT2Tokenizer", "BartTokenizer", "RobertaTokenizer") or not spec
    value = (config if known else spec["pre_tokenizer"]).get("add_prefix_space", False)
    if not isinstance(value, bool):
        raise InputError(f"{folder}: the tokeniser's add_prefix_space is {value!r:.40}, true or false is needed")
    return value


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: character -> byte, in the order of the first 256 token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def literal_bytes(token: str) -> bytes:
    """The UTF-8 text of a token without a merge: decoded from the byte alphabet, or taken literally if not in it."""
    known = all(character in byte_alphabet() for character in token)
    return bytes(byte_alphabet()[c] for c in token) if known else token.encode(errors="replace")


def to_bytes(token: str, where: str) -> bytes:
    try:
        return bytes(byte_alphabet()[character] for character in token)
    except KeyError as error:
        raise InputError(f"{where}: {token!r} has a character outside the byte-level alphabet") from error
