"""Added tokens and add_prefix_space in every layout of files that transformers has written, against AutoTokenizer."""

import json
import random
import shutil
import unicodedata

import pytest

from minprefix import generate, load_model, load_tokenizer
from minprefix.core.encode import check_vocabulary
from minprefix.formats.added_tokens import is_in_word
from minprefix.formats.load import save_model
from minprefix.formats.tokenizer import SPECIAL_TOKENS
from minprefix.system.errors import InputError
from tests.tiny import write_tiny_bart, write_tiny_model

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
SPECIAL = {**PLAIN, "normalized": False, "special": True}
SIMPLE = {"<speaker1>": PLAIN, "resto_bombay": PLAIN, "resto": PLAIN, "[PAD]": SPECIAL, "<sep>": SPECIAL}
FLAGGED = {
    **SIMPLE, "word": {**PLAIN, "single_word": True}, "<l>": {**PLAIN, "lstrip": True}, "  x": PLAIN,
    "<r>": {**SPECIAL, "rstrip": True}, "<lr>": {**PLAIN, "lstrip": True, "rstrip": True},
    "<all>": {**SPECIAL, "single_word": True, "lstrip": True, "rstrip": True}, "a.b*c": PLAIN,
    "<speaker": {**PLAIN, "normalized": False},
}  # fmt: skip
LAYOUTS = ("v5", "v4 fast", "v4 slow", "v3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"gpt2": write_tiny_model(folder / "gpt2"), "bart": write_tiny_bart(folder / "bart")}


def read(path):
    return json.loads(path.read_text("utf-8"))


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def extend(base, folder, tokens, layout, **config):
    """A copy of a tiny model's folder whose tokeniser has these tokens, too, in the files of a version of transformers.

    v5: as saved by the one that is installed. The others are written as those versions did.
    """
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    shutil.copytree(base, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    kind = type(theirs).__name__
    added = {token: {"content": token, **flags} for token, flags in tokens.items()}
    theirs.add_tokens([transformers.AddedToken(**token) for token in added.values()])
    ids = {token: theirs.convert_tokens_to_ids(token) for token in added}
    theirs.save_pretrained(folder)
    if layout == "v5":
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
        write(folder / "tokenizer_config.json", {**read(folder / "tokenizer_config.json"), **config})
        return folder
    named = {"pad_token": "[PAD]"} if "[PAD]" in tokens else {}
    special = {**named, "additional_special_tokens": [token for token in tokens if tokens[token]["special"]]}
    own = {str(i): token.__getstate__() for i, token in theirs.added_tokens_decoder.items()}
    write(folder / "special_tokens_map.json", special)
    write(folder / "added_tokens.json", ids)
    decoder = {"added_tokens_decoder": own} if layout.startswith("v4") else {}
    write(folder / "tokenizer_config.json", {"tokenizer_class": kind, **decoder, **special, **config})
    if layout != "v4 fast":
        (folder / "tokenizer.json").unlink()
    return folder


def texts_with(tokens, n):
    """Random texts of the tokens, words, parts of both, and characters that flags look at; none of the model's own."""
    rng = random.Random(0)
    parts = [*tokens, *tokens, *(token[:-1] for token in tokens), *(token[1:] for token in tokens)]
    parts += [*" _7²é日.-👩", "  ", "\n", "\u00a0", "\t ", "\x1c", "\u200d", "e\u0301", "hello", " the"]
    texts = ("".join(rng.choices(parts, k=rng.randint(0, 9))) for _ in range(n))
    return [text for text in texts if not any(token in text for token in SPECIAL_TOKENS)]


def assert_equal_to_transformers(folder, tokens, n):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    texts = texts_with(tokens, n)
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_ids_of_texts_with_added_tokens_equal_autotokenizer(tmp_path, bases, kind, layout):
    """v3's files have no flags: of a token there is only its text, and whether it is special."""
    tokens = SIMPLE if layout == "v3" else FLAGGED
    folder = extend(bases[kind], tmp_path / "t", tokens, layout)
    assert_equal_to_transformers(folder, tokens, 10_000 if layout == "v5" else 3_000)
    ours = load_tokenizer(folder)
    assert set(ours.added) == set(tokens)
    assert ours.special.keys() - set(SPECIAL_TOKENS) == {token for token in tokens if tokens[token]["special"]}


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("told", [{}, {"add_prefix_space": False}, {"add_prefix_space": True}])
def test_add_prefix_space_equals_autotokenizer(tmp_path, bases, kind, layout, told):
    """Whatever tokenizer.json says of it, where there is one; a class of no model's own takes that file's word."""
    folder = extend(bases[kind], tmp_path / "t", SIMPLE, layout, **told)
    tokenizer_json, config = folder / "tokenizer.json", read(folder / "tokenizer_config.json")
    classes = [config["tokenizer_class"], {"gpt2": "GPT2TokenizerFast", "bart": "BartTokenizerFast"}[kind]]
    if not tokenizer_json.exists():
        assert_equal_to_transformers(folder, SIMPLE, 100)
        assert load_tokenizer(folder).add_prefix_space is told.get("add_prefix_space", False)
        return
    for name in (*classes, "PreTrainedTokenizerFast", None):
        config = {**config, "tokenizer_class": name} if name else {key: config[key] for key in told}
        write(folder / "tokenizer_config.json", config)
        for value in (False, True):
            spec = read(tokenizer_json)
            write(tokenizer_json, {**spec, "pre_tokenizer": {**spec["pre_tokenizer"], "add_prefix_space": value}})
            assert_equal_to_transformers(folder, SIMPLE, 100)


def test_add_prefix_space_must_be_true_or_false(tmp_path, bases):
    folder = extend(bases["gpt2"], tmp_path / "t", SIMPLE, "v5", add_prefix_space="yes")
    with pytest.raises(InputError, match="the tokeniser's add_prefix_space is 'yes', true or false is needed"):
        load_tokenizer(folder)


def test_a_token_of_letters_beyond_ascii_is_decoded_as_it_stands(tmp_path, bases):
    """transformers takes "é" for the byte that this letter stands for in GPT-2's alphabet, and makes U+FFFD of it."""
    folder = extend(bases["gpt2"], tmp_path / "t", {"<café>": PLAIN, "<日本>": PLAIN, "Ġ": PLAIN}, "v5")
    ours = load_tokenizer(folder)
    assert ours.decode(ours.encode("a<café> <日本>")) == "a<café> <日本>"
    assert len(ours.encode("<café><日本>")) == 2


def test_what_is_next_to_a_single_word():
    """What HuggingFace's tokenizers counts among a word's characters; of those that Python's table knows."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with HuggingFace's tokenizers")
    alphabet = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_tokens([tokenizers.AddedToken("@@", single_word=True)])
    known = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co", "So")]
    expected = [256 not in row.ids for row in theirs.encode_batch_fast(["@@" + c for c in known])]
    assert [is_in_word(c) for c in known] == expected and not is_in_word("")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_have_added_tokens_but_those_marked_special(tmp_path, layout):
    """With the model's vocabulary resized; the folder of a fine-tuned model reads and writes the same."""
    base = write_tiny_model(tmp_path / "base", vocab_size=4096 + len(SIMPLE))
    folder = extend(base, tmp_path / "t", SIMPLE, layout)
    model = load_model(folder)
    save_model(model, tmp_path / "tuned", folder, {"task": "e2e"})
    for tokenizer in map(load_tokenizer, (folder, tmp_path / "tuned")):
        for token in ("<speaker1>", "[PAD]"):
            others = set(range(model.config["vocab_size"])) - set(tokenizer.encode(token)) - {tokenizer.end_id}
            options = {"beams": 1, "max_new_tokens": 3, "min_new_tokens": 3, "forbidden": sorted(others)}
            written = generate(model, tokenizer, ["resto <speaker1>"], **options)
            assert written == ["" if token == "[PAD]" else token * 3]


def test_tokens_of_the_vocabulary_that_are_named_as_special(tmp_path, bases):
    """As of a tokeniser that was trained with special tokens, and saved as vocab.json and merges.txt."""
    shutil.copytree(bases["gpt2"], tmp_path / "t")
    vocab = read(tmp_path / "t" / "vocab.json")
    write(tmp_path / "t" / "vocab.json", {**vocab, "<PAD>": len(vocab), "<unnamed>": len(vocab) + 1})
    write(tmp_path / "t" / "special_tokens_map.json", {"pad_token": {"content": "<PAD>"}})
    assert_equal_to_transformers(tmp_path / "t", ["<PAD>", "<unnamed>"], 300)
    ours = load_tokenizer(tmp_path / "t")
    assert ours.encode("<PAD>") == [len(vocab)] and ours.decode([len(vocab), len(vocab) + 1]) == "<PAD><unnamed>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_models_own_end_stays_the_end(tmp_path, bases, layout):
    """Of a GPT-2 to which somebody added BART's tokens; these are found in texts, its own is not."""
    folder = extend(bases["gpt2"], tmp_path / "t", {"<s>": SPECIAL, "</s>": SPECIAL, "<pad>": SPECIAL}, layout)
    ours = load_tokenizer(folder)
    assert (ours.end_id, ours.pad_id) == (4095, 4098)
    assert ours.encode("<pad></s>") == [4098, 4097] and 4095 not in ours.encode("<|endoftext|>")


def test_an_added_token_without_an_embedding(tmp_path, bases):
    folder = extend(bases["gpt2"], tmp_path / "t", SIMPLE, "v4 slow")
    with pytest.raises(InputError, match="added token '<speaker1>' has the id 4096, beyond the model's embeddings"):
        check_vocabulary(load_tokenizer(folder), load_model(folder), folder)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("added_tokens", [], "added_tokens.json holds a JSON list"),
        ("added_tokens", {"<a>": "4096"}, "small non-negative integers"),
        ("added_tokens", {"<a>": 7}, "share an id"),
        ("added_tokens", {"the": 4096}, "'the' has two ids: 1085 in the vocabulary, 4096 among the added tokens"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "small non-negative integers"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}}, "small non-negative integers"),
        ("tokenizer_config", "{", "tokenizer_config.json holds a JSON str"),
        ("special_tokens_map", 7, "special_tokens_map.json holds a JSON int"),
    ],
)
def test_malformed_files(tmp_path, bases, name, value, message):
    shutil.copytree(bases["gpt2"], tmp_path / "t")
    write(tmp_path / "t" / f"{name}.json", value)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    "name, value",
    [
        ("added_tokens", {"": 4096}),
        ("tokenizer_config", {"added_tokens_decoder": [1], "pad_token": 3, "extra_special_tokens": [{}, None, [1]]}),
        ("tokenizer_config", {"added_tokens_decoder": {"1": 2, "4096": {"content": ["a"]}}}),
        ("special_tokens_map", {"pad_token": {"content": {}}}),
    ],
)
def test_odd_entries_are_no_traceback(tmp_path, bases, name, value):
    shutil.copytree(bases["gpt2"], tmp_path / "t")
    write(tmp_path / "t" / f"{name}.json", value)
    assert load_tokenizer(tmp_path / "t").added == {}
