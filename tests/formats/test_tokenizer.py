"""The tokeniser: HuggingFace's ids for any text, the text back, and files that are wrong."""

import csv
import json
import random
import shutil
import time
import unicodedata

import pytest

from minprefix import load_tokenizer
from minprefix.formats.tokenizer import byte_alphabet
from minprefix.system.errors import InputError
from tests.tiny import ROOT

pytestmark = pytest.mark.slow

MINI = ROOT / "weights" / "gpt2-mini"
DATA = ROOT.parent / "shared" / "data"
FOLDERS = {"mini": MINI, "gpt2": DATA / "gpt2_tokenizer", "bart": DATA / "bart_tokenizer"}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    if not FOLDERS[request.param].is_dir():
        pytest.skip(f"{FOLDERS[request.param]} is not there")
    return FOLDERS[request.param]


@pytest.fixture(scope="module")
def mini():
    return load_tokenizer(MINI)


def huggingface(folder):
    """The `tokenizers` package on the same files: what transformers' fast tokenisers are made of."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with HuggingFace's tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    return theirs


def random_texts(n):
    """Texts of runs of characters of one kind each; all characters that this Python's Unicode knows, no surrogates."""
    rng = random.Random(0)
    everything = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    ranges = {"ascii": (32, 127), "latin": (0xA0, 0x250), "control": (0, 32), "more control": (0x7F, 0xA0),
              "greek": (0x370, 0x530), "combining": (0x300, 0x370), "cjk": (0x4E00, 0x9FA6), "kana": (0x3041, 0x3100),
              "general punctuation": (0x2000, 0x2070), "numbers": (0x2150, 0x218A)}  # fmt: skip
    kinds = [list(map(chr, range(*ends))) for ends in ranges.values()]
    kinds += [everything, ["👩", "🏽", "\u200d", "👧", "❤", "\ufe0f", "🇩", "🇪"], [" "], ["\n"], [" ", "\t", "\r\n"]]
    kinds += [list("\u0085\u00a0\u1680\u2003\u2028\u3000\u200b\ufeff\x1c\x0b "), list("0123456789.,-"), list("aAzZ ")]
    kinds += [["'s", "'S", "'ll", "'re", "'t", "'", "n't", " '", "’s"], ["<|endoftext|>", "<s>", "</s>", "<mask>", "<"]]
    return [
        "".join("".join(rng.choices(rng.choice(kinds), k=rng.choice((1, 2, 3, 12)))) for _ in range(rng.randint(1, 6)))
        for _ in range(n)
    ]


def assert_same_ids(ours, theirs, texts):
    for text, their in zip(texts, theirs.encode_batch_fast(texts), strict=True):
        ids = ours.encode(text)
        assert ids == their.ids and ours.decode(ids) == text, text


# ---- ids ----


def test_ids_of_random_texts_equal_huggingface(folder):
    texts = random_texts(10_000)
    assert_same_ids(load_tokenizer(folder), huggingface(folder), texts)


def test_ids_of_e2e_equal_huggingface(folder):
    if not (DATA / "e2e").is_dir():
        pytest.skip(f"{DATA}/e2e is not there")
    texts = set()
    for path in (DATA / "e2e").glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            texts.update(text for row in csv.DictReader(file) for text in (row["mr"], f" {row['ref']} "))
    assert len(texts) > 40_000
    texts = sorted(texts) if folder == MINI else sorted(texts)[::5]  # all of them agree, but it takes its time
    assert_same_ids(load_tokenizer(folder), huggingface(folder), texts)


def test_ids_equal_transformers(folder):
    """Its own GPT2Tokenizer, made of the same files."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs, ours = transformers.GPT2Tokenizer.from_pretrained(folder), load_tokenizer(folder)
    texts = [text for text in random_texts(500) if "<" not in text]  # "<|endoftext|>" is a token to transformers
    assert [ours.encode(text) for text in texts] == theirs(texts)["input_ids"]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("name : Blue Spice | Type : coffee shop | area : city centre",
         [77, 478, 220, 25, 1404, 532, 1396, 506, 220, 91, 308, 88, 402, 220, 25, 757, 508, 1974, 439, 389, 220, 91,
          1315, 220, 25, 1235, 934, 263]),
        (" The Mill is a pub.\n\n  It's near  Café Brazil — £30!  ",
         [362, 324, 388, 318, 258, 284, 519, 13, 198, 198, 220, 567, 385, 1298, 220, 310, 1878, 1265, 3208, 89, 298,
          1785, 3770, 96, 1232, 0, 220, 220]),
        ("日本語 👩\u200d👧 e\u0301\t\x00",
         [162, 245, 98, 162, 250, 105, 164, 103, 252, 220, 172, 253, 239, 102, 354, 235, 172, 253, 239, 100, 307, 136,
          223, 197, 188]),
        ("<|endoftext|>", [27, 91, 805, 2039, 534, 975, 91, 29]),
    ],
)  # fmt: skip
def test_golden_ids(mini, text, ids):
    assert mini.encode(text) == ids and mini.decode(ids) == text


def test_special_tokens():
    mini = load_tokenizer(MINI)
    assert (mini.vocab_size, mini.end_id, mini.pad_id, mini.newline_ids) == (4096, 4095, 4095, [198])
    assert mini.decode([4095]) == "<|endoftext|>" and 4095 not in mini.encode("a<|endoftext|>b")


def test_special_tokens_of_gpt2_and_bart():
    for name, expected in (("gpt2", (50257, 50256, 50256)), ("bart", (50265, 2, 1))):
        if not FOLDERS[name].is_dir():
            pytest.skip(f"{FOLDERS[name]} is not there")
        tokenizer = load_tokenizer(FOLDERS[name])
        assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id) == expected
        assert {tokenizer.decode([i]) for i in tokenizer.newline_ids} == {"\n", "\n\n", "\n\xa0"}
        assert 50256 not in tokenizer.encode("<|endoftext|></s>")


def test_decoding_of_any_ids_equals_huggingface(folder):
    """Ids in a random order seldom spell UTF-8: what is not becomes U+FFFD in the same places."""
    ours, theirs, rng = load_tokenizer(folder), huggingface(folder), random.Random(0)
    for _ in range(1000):
        ids = rng.choices(list(ours.id_to_rank), k=rng.randint(1, 12)) + rng.choices(ours.rank_to_id[:256], k=4)
        assert ours.decode(ids) == theirs.decode(ids)


def test_decode_bytes_that_are_no_text(mini):
    half = mini.encode("é")[:1] if len(mini.encode("é")) > 1 else mini.encode("日")[:1]
    assert mini.decode([*mini.encode("a"), *half]) == "a\ufffd"
    assert mini.decode([]) == "" and mini.decode([10**6]) == ""


@pytest.mark.parametrize("piece, end", [("a", ""), ("é", ""), ("!", ""), ("1", ""), ("ab ", ""), (" ", ""), (" ", "x"),
                                        ("\n", "x"), ("\u3000", "x")])  # fmt: skip
def test_a_megabyte_takes_no_time(mini, piece, end):
    text = piece * (2**20 // len(piece.encode()) if piece != "\u3000" else 2**20) + end  # a stack could hold a million
    start = time.process_time()  # not the clock on the wall: the machine may be busy
    ids = mini.encode(text)
    assert time.process_time() - start < 5
    assert mini.decode(ids) == text


# ---- tokenizer.json ----


def merges_written(spec, pairs):
    """tokenizer.json with its merges as [a, b] pairs or, as in older versions, as "a b"."""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    return {**spec, "model": {**spec["model"], "merges": merges if pairs else [" ".join(merge) for merge in merges]}}


def test_tokenizer_json_equals_vocab_and_merges(folder, tmp_path):
    ours, made = load_tokenizer(folder), json.loads(huggingface(folder).to_str())
    texts = random_texts(300)
    for pairs in (True, False):
        other = load_tokenizer(write_spec(tmp_path, merges_written(made, pairs)))
        assert [other.encode(text) for text in texts] == [ours.encode(text) for text in texts]
        for name in ("vocab_size", "end_id", "pad_id", "newline_ids", "special", "rank_to_id"):
            assert getattr(other, name) == getattr(ours, name)


def test_the_folder_that_transformers_saves(tmp_path, mini):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    transformers.GPT2Tokenizer.from_pretrained(MINI).save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    texts = random_texts(300)
    assert [saved.encode(text) for text in texts] == [mini.encode(text) for text in texts]
    assert saved.special == mini.special


# ---- a small tokeniser, to be spoilt ----

VOCAB = {**{c: i for i, c in enumerate(byte_alphabet())}, "ab": 256, "abc": 257, "Ġabc": 258, "<|endoftext|>": 259}
MERGES = ["a b", "ab c", "Ġ abc"]


def without(token):
    return {other: i for other, i in VOCAB.items() if other != token}


def write(folder, vocab=VOCAB, merges=MERGES, text=None):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *merges, ""]) if text is None else text
    (folder / "merges.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def spec(**change):
    model = {"type": "BPE", "vocab": VOCAB, "merges": MERGES}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"model": model, "pre_tokenizer": split, "normalizer": None, "added_tokens": [], **change}


def write_spec(folder, spec):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec), encoding="utf-8")
    return folder


def test_the_small_tokeniser(tmp_path):
    for i, text in enumerate((None, "a b\nab c\nĠ abc", "#version: 0.2\r\na b\r\nab c\r\nĠ abc\r\n")):
        assert load_tokenizer(write(tmp_path / str(i), text=text)).encode("abc abcb") == [257, 258, VOCAB["b"]]
    old = spec()
    del old["model"]["type"], old["pre_tokenizer"]["use_regex"]  # as in the folder of GPT-2 itself
    assert load_tokenizer(write_spec(tmp_path / "old", old)).encode("abc abcb") == [257, 258, VOCAB["b"]]


def test_white_space_before_a_word_leaves_it_one_blank(tmp_path):
    """Whatever the strides of the pattern: of n blanks, n - 1 are one piece, merged among themselves."""
    vocab = {**VOCAB, "ĠĠ": 260, "ĠĠĠĠ": 261}
    tokenizer = load_tokenizer(write(tmp_path / "t", vocab, [*MERGES, "Ġ Ġ", "ĠĠ ĠĠ"]))

    def blanks(n):
        return [261] * (n // 4) + [260] * (n % 4 // 2) + [VOCAB["Ġ"]] * (n % 2)

    for n in (1, 2, 3, 4, 5, 254, 255, 256, 257, 258, 259, 511, 512, 513, 514, 769, 5000):
        assert tokenizer.encode(" " * n + "abc") == [*blanks(n - 1), 258], n
        assert tokenizer.encode(" " * n + "\nabc") == [*blanks(n), VOCAB["Ċ"], 257], n
        assert tokenizer.encode(" " * n) == blanks(n), n


def test_end_and_padding_of_the_bart_kind(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "t", {**VOCAB, "<s>": 300, "<pad>": 301, "</s>": 302}))
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size) == (302, 301, 303)
    assert tokenizer.decode([300, 257, 302]) == "<s>abc</s>" and len(tokenizer.encode("</s>")) == 4


def test_a_special_token_among_the_added_only(tmp_path):
    added = [{"id": 300, "content": "<|endoftext|>", "special": True}]
    model = {"type": "BPE", "vocab": without("<|endoftext|>"), "merges": MERGES}
    tokenizer = load_tokenizer(write_spec(tmp_path / "t", spec(model=model, added_tokens=added)))
    assert tokenizer.end_id == 300 and tokenizer.vocab_size == 301


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="no tokeniser: vocab.json and merges.txt, or tokenizer.json"):
        load_tokenizer(tmp_path)
    shutil.copy(MINI / "vocab.json", tmp_path)
    with pytest.raises(InputError, match="no tokeniser"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab": "{"}, "vocab.json is not valid JSON"),
        ({"vocab": "[" * 100_000}, "vocab.json is not valid JSON"),
        ({"vocab": ["a"]}, "not a JSON object"),
        ({"vocab": {}}, "must map tokens"),
        ({"vocab": {**VOCAB, "ab": 3}}, "two tokens of the vocabulary share an id"),
        ({"vocab": {**VOCAB, "ab": "256"}}, "small non-negative integers"),
        ({"vocab": {**VOCAB, "ab": 256.0}}, "small non-negative integers"),
        ({"vocab": {**VOCAB, "ab": True}}, "small non-negative integers"),
        ({"vocab": {**VOCAB, "ab": -1}}, "small non-negative integers"),
        ({"vocab": {**VOCAB, "ab": 10**12}}, "small non-negative integers"),
        ({"vocab": {**VOCAB, "ab": None}}, "small non-negative integers"),
        ({"vocab": without("abc")}, "the merges make 'abc', which the vocabulary lacks"),
        ({"vocab": without("Ā")}, "'Ā', which the vocabulary lacks"),
        ({"vocab": without("<|endoftext|>")}, "neither <.endoftext.> nor </s>"),
        ({"merges": ["a b", "b a"]}, "make 'ba', which the vocabulary lacks"),
        ({"merges": ["a b c"]}, r"\['a', 'b', 'c'\] is not a merge of two tokens"),
        ({"merges": ["ab"]}, r"\['ab'\] is not a merge"),
        ({"merges": ["a "]}, r"\['a', ''\] is not a merge"),
        ({"vocab": {**VOCAB, "a世": 300}, "merges": ["a 世"]}, "'a世' has a character outside the byte-level alphabet"),
        ({"text": b"a b\n\xff\xfe"}, "merges.txt is not UTF-8 text"),
    ],
)  # fmt: skip
def test_malformed_vocab_and_merges(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(write(tmp_path / "t", **change))


LLAMA = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{", "not valid JSON"),
        ([], "not a byte-level BPE"),
        ({}, "not a byte-level BPE"),
        (spec(model=[]), "not a byte-level BPE"),
        (spec(model={"type": "WordPiece", "vocab": VOCAB}), "not a byte-level BPE"),
        (spec(model={"type": "Unigram", "vocab": []}), "not a byte-level BPE"),
        (spec(pre_tokenizer=None), "pre_tokenizer None"),
        (spec(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer .*Metaspace.* does not split"),
        (spec(pre_tokenizer=LLAMA), "pre_tokenizer .*Sequence"),
        (spec(pre_tokenizer={"type": "ByteLevel", "use_regex": False}), "'use_regex': False"),
        (spec(normalizer={"type": "NFC"}), "normalizer .*NFC.* is not supported"),
        (spec(model={**spec()["model"], "ignore_merges": True}), "ignore_merges True is not supported"),
        (spec(model={"type": "BPE", "vocab": VOCAB}), "lacks the model's vocab or merges"),
        (spec(model={"type": "BPE", "vocab": [], "merges": []}), "lacks the model's vocab or merges"),
        (spec(added_tokens={"a": 1}), "lacks the model's vocab or merges"),
        (spec(model={"type": "BPE", "vocab": VOCAB, "merges": [7]}), "7 is not a merge"),
        (spec(model={"type": "BPE", "vocab": VOCAB, "merges": [["a", 7]]}), "is not a merge"),
        (spec(added_tokens=[{"content": "<s>", "id": "0"}]), "small non-negative integers"),
        (spec(added_tokens=[{"content": "<s>", "id": 5}]), "share an id"),
        (spec(added_tokens=[{"content": "<s>"}]), "small non-negative integers"),
    ],
)
def test_malformed_tokenizer_json(tmp_path, spec, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_spec(tmp_path / "t", spec))


def test_odd_added_tokens_are_no_traceback(tmp_path):
    odd = spec(added_tokens=[7, None, {"content": ["a"], "id": 1}, {"id": 2}])
    assert load_tokenizer(write_spec(tmp_path / "t", odd)).end_id == 259
