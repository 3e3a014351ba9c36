"""The prefix: folding, words to start from, its size, its files."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from minprefix import Prefix, load_model, load_prefix, load_tokenizer
from minprefix.core.bart import BART
from minprefix.core.gpt2 import GPT2
from minprefix.core.prefix import word_activations
from minprefix.core.prefix_kv import KVPrefix
from minprefix.formats.prefix_file import check_fits, save_prefix
from minprefix.formats.safetensors import read_safetensors, write_safetensors
from minprefix.system.errors import InputError
from tests.tiny import write_tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
L, H, D, P = 2, 4, 8, 5
BART_SHAPE = {
    "vocab_size": 4096, "max_position_embeddings": 64, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 3, "encoder_ffn_dim": 20, "decoder_ffn_dim": 28,
}  # fmt: skip
SITES = {"encoder": (2, 4, 6), "decoder": (3, 3, 8), "cross": (3, 3, 8)}  # of that BART: layers, heads, dimension
SUBSETS = [["encoder"], ["decoder"], ["cross"], ["cross", "encoder"], ["decoder", "encoder"], ["decoder", "cross"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("prefix") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def random_bart(seed=0, **config):
    torch.manual_seed(seed)
    model = BART({**BART_SHAPE, **config})
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean="norm" in name and name.endswith("weight"), std=0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def bart():
    return random_bart()


def make_prefix(model, hidden, length=P, **options):
    torch.manual_seed(0)
    return Prefix(model, length, hidden, **options)


def saved(tmp_path, model, prefix, **info):
    save_prefix(tmp_path / "p.safetensors", prefix.fold(), model, {"base_model": "tiny", **info})
    return tmp_path / "p.safetensors"


# ---- folding ----


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_folding_and_saving_change_no_bit(tmp_path, model, hidden, length):
    prefix = make_prefix(model, hidden, length)
    with torch.no_grad():
        expected = model(IDS, prefix())
    folded = prefix.fold()
    assert folded["decoder"].shape == (L, 2, H, length, D) and not folded["decoder"].requires_grad
    assert torch.equal(model(IDS, folded), expected)
    loaded = load_prefix(saved(tmp_path, model, prefix), model)
    assert torch.equal(loaded["decoder"], folded["decoder"]) and torch.equal(model(IDS, loaded), expected)


def test_a_folded_prefix_is_a_copy(model):
    for hidden in (0, 16):
        prefix = make_prefix(model, hidden)
        folded = prefix.fold()
        before = folded["decoder"].clone()
        with torch.no_grad():
            for p in prefix.parameters():
                p.zero_()
        assert torch.equal(folded["decoder"], before) and not torch.equal(prefix()["decoder"], before)


def test_mlp_part_is_its_definition(model):
    """P[i] = MLP(P'[i]), read as (layer, key or value, head, dim): the layout of the authors and of PEFT."""
    prefix = make_prefix(model, 16)
    part = prefix.sites["decoder"]
    first, _, second = part.mlp
    assert part.embedding.shape == (P, H * D) and first.weight.shape == (16, H * D)
    for i in range(P):
        flat = second.weight @ torch.tanh(first.weight @ part.embedding[i] + first.bias) + second.bias
        torch.testing.assert_close(prefix()["decoder"][:, :, :, i], flat.view(L, 2, H, D))


def test_length_and_width_that_make_no_sense(model):
    for length, hidden in ((0, 0), (-1, 512), (5, -1)):
        with pytest.raises(InputError, match=f"prefix length {length} .* MLP width {hidden}"):
            Prefix(model, length, hidden)


# ---- sites ----


@pytest.mark.parametrize("hidden", [0, 16])
def test_all_sites_by_default(tmp_path, bart, hidden):
    """Each has the shape of its own stack; folding, saving and loading change no bit."""
    prefix = make_prefix(bart, hidden)
    folded = prefix.fold()
    assert {site: kv.shape for site, kv in folded.kv.items()} == {s: (n, 2, h, P, d) for s, (n, h, d) in SITES.items()}
    assert not any(kv.requires_grad for kv in folded.kv.values())
    with torch.no_grad():
        expected = bart(IDS, IDS, prefix=prefix())
    assert torch.equal(bart(IDS, IDS, prefix=folded), expected)
    loaded = load_prefix(saved(tmp_path, bart, prefix), bart)
    assert loaded.kv.keys() == SITES.keys() and all(torch.equal(loaded[site], folded[site]) for site in SITES)
    assert loaded.position_offset == P and torch.equal(bart(IDS, IDS, prefix=loaded), expected)
    assert json.loads(loaded.info["base_shape"]) == {site: list(shape) for site, shape in SITES.items()}


@pytest.mark.parametrize("sites", SUBSETS, ids=" ".join)
@pytest.mark.parametrize("hidden", [0, 16])
def test_only_some_sites(tmp_path, bart, sites, hidden):
    prefix = make_prefix(bart, hidden, sites=sites)
    folded = prefix.fold()
    assert list(prefix.sites) == [site for site in SITES if site in sites] == list(prefix().kv) == list(folded.kv)
    loaded = load_prefix(saved(tmp_path, bart, prefix), bart)
    logits = bart(IDS, IDS, prefix=loaded)
    assert loaded.kv.keys() == set(sites) and torch.equal(logits, bart(IDS, IDS, prefix=folded))
    for site in sites:  # each of them matters
        others = KVPrefix({s: kv for s, kv in folded.kv.items() if s != site}, folded.position_offset)
        assert (bart(IDS, IDS, prefix=others) - logits).abs().max() > 1e-3
    start = P if "decoder" in sites else 0  # the decoder's first token stands behind its own prefix, if it has one
    assert folded.position_offset == loaded.position_offset == start
    assert torch.equal(bart(IDS, IDS, prefix=dict(folded.kv)), logits)
    shifted = make_prefix(bart, hidden, sites=sites, position_offset=start + 2).fold()
    assert (bart(IDS, IDS, prefix=shifted) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("hidden", [0, 16])
def test_every_site_gets_gradients(bart, hidden):
    prefix = make_prefix(bart, hidden)
    F.cross_entropy(bart(IDS, IDS, prefix=prefix()).flatten(0, 1), IDS.flatten()).backward()
    assert all(p.grad is None for p in bart.parameters())
    for name, p in prefix.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_unknown_sites(model, bart):
    with pytest.raises(InputError, match="the model has no prefix site 'cross', only decoder$"):
        Prefix(model, P, sites=["decoder", "cross"])
    with pytest.raises(InputError, match="no prefix site 'Encoder', only encoder, decoder, cross"):
        Prefix(bart, P, sites=["Encoder"])
    assert list(Prefix(model, P, 0, sites=["decoder"]).sites) == ["decoder"]


# ---- gradients ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [0, 16])
def test_only_the_prefix_gets_gradients(folder, dtype, hidden):
    model, prefix = load_model(folder, dtype=dtype), make_prefix(load_model(folder), hidden)
    logits = model(IDS, prefix())
    assert logits.dtype == dtype
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
    assert all(p.grad is None for p in model.parameters())
    for name, p in prefix.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_bfloat16_model_is_near_the_float32_one(folder, model):
    prefix = make_prefix(model, 16).fold()
    difference = load_model(folder, dtype=torch.bfloat16)(IDS, prefix).float() - model(IDS, prefix)
    assert 0 < difference.abs().max() < 0.1 * model(IDS, prefix).abs().max()


# ---- words to start from ----


@pytest.mark.parametrize("words, length", [("table to text :", 3), ("summarize", 11), ("a b c", 3)])
def test_direct_prefix_starts_from_the_activations(model, tokenizer, words, length):
    """Its keys and values are those that the model computes as it reads the words, cut or repeated."""
    prefix = make_prefix(model, 0, length)
    prefix.init_from_words(model, tokenizer, words)
    ids = tokenizer.encode(words)
    ids = (ids * length)[:length]
    cache = model.prefill(torch.tensor([ids]), torch.tensor([length]))
    expected = torch.stack([torch.stack([layer.k[0], layer.v[0]]) for layer in cache.layers])
    assert torch.equal(prefix.fold()["decoder"], expected)
    # and so a text behind the prefix reads as a text behind the words, whose positions come first
    torch.testing.assert_close(model(IDS, prefix.fold()), model(with_words(ids), None)[:, length:], rtol=0, atol=1e-5)


def with_words(ids):
    return torch.cat([torch.tensor([ids] * len(IDS)), IDS], dim=1)


def test_mlp_prefix_is_fitted_to_the_activations(model, tokenizer):
    prefix = make_prefix(model, 64)
    words = word_activations(model, (tokenizer.encode("table to text :") * P)[:P])["decoder"]
    before = F.mse_loss(prefix()["decoder"], words).item()
    prefix.init_from_words(model, tokenizer, "table to text :")
    after = F.mse_loss(prefix()["decoder"], words).item()
    assert after < 0.2 * before
    assert all(p.grad is None for p in prefix.parameters())  # nothing is left for the first training step


def test_words_for_a_bfloat16_model(folder, tokenizer):
    model = load_model(folder, dtype=torch.bfloat16)
    prefix = make_prefix(model, 0)
    prefix.init_from_words(model, tokenizer, "table")
    assert prefix.fold()["decoder"].dtype == torch.float32


def projections(model, ids):
    """What the key and value projections of a BART give for words as source and target: site -> (L, 2, H, P, D)."""
    seen, ids = {}, torch.tensor([ids])
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output[0]}))
    model(ids, ids)
    places = {"encoder": "encoder.layers.{}.self_attn", "decoder": "decoder.layers.{}.self_attn",
              "cross": "decoder.layers.{}.encoder_attn"}  # fmt: skip
    kv = {}
    for site, place in places.items():
        n, h, d = SITES[site]
        kv[site] = torch.stack([seen[f"{place.format(i)}.{x}_proj"] for i in range(n) for x in "kv"])
        kv[site] = kv[site].view(n, 2, len(ids[0]), h, d).transpose(2, 3)
    return kv


@pytest.mark.parametrize("words, length", [("summarize : a b c", 3), ("summarize", 11)])
def test_words_at_every_site(bart, tokenizer, words, length):
    """The encoder and the decoder both read the words; each site starts from its own keys and values."""
    prefix = make_prefix(bart, 0, length)
    prefix.init_from_words(bart, tokenizer, words)
    folded, ids = prefix.fold(), (tokenizer.encode(words) * length)[:length]
    assert folded.kv.keys() == SITES.keys()
    activations, projected = bart.activations(torch.tensor([ids])), projections(random_bart(), ids)
    for site, kv in folded.kv.items():
        assert torch.equal(kv, torch.stack([torch.cat([kv.k, kv.v]) for kv in activations[site]])), site
        assert torch.equal(kv, word_activations(bart, ids)[site]), site
        torch.testing.assert_close(kv, projected[site], rtol=0, atol=1e-5)
    # and so what follows the decoder's prefix reads as what follows the words, if the source is the words
    source, decoder = torch.tensor([ids] * len(IDS)), KVPrefix({"decoder": folded["decoder"]}, length)
    expected = bart(source, with_words(ids))[:, length:]
    torch.testing.assert_close(bart(source, IDS, prefix=decoder), expected, rtol=0, atol=1e-4)


def test_words_at_some_sites_and_through_mlps(bart, tokenizer):
    words = word_activations(bart, (tokenizer.encode("summarize") * P)[:P])
    direct = make_prefix(bart, 0, sites=["cross"])
    direct.init_from_words(bart, tokenizer, "summarize")
    assert direct.fold().kv.keys() == {"cross"} and torch.equal(direct.fold()["cross"], words["cross"])
    prefix = make_prefix(bart, 64, sites=["encoder", "cross"])
    before = {site: F.mse_loss(kv, words[site]).item() for site, kv in prefix.fold().kv.items()}
    prefix.init_from_words(bart, tokenizer, "summarize")
    after = {site: F.mse_loss(kv, words[site]).item() for site, kv in prefix.fold().kv.items()}
    assert all(after[site] < 0.5 * before[site] for site in ("encoder", "cross")), (before, after)
    assert all(p.grad is None for p in prefix.parameters())


def test_words_without_a_token(model, tokenizer):
    with pytest.raises(InputError, match="the words '' .* hold no token"):
        make_prefix(model, 0).init_from_words(model, tokenizer, "")


# ---- files ----


def test_position_offset_is_saved_and_honoured(tmp_path, model):
    logits = {}
    for offset in (None, 0, P, 7):
        prefix = make_prefix(model, 0, position_offset=offset)
        loaded = load_prefix(saved(tmp_path, model, prefix), model)
        assert loaded.position_offset == prefix.position_offset == (P if offset is None else offset)
        logits[offset] = model(IDS, loaded)
        assert torch.equal(logits[offset], model(IDS, prefix.fold()))
    assert torch.equal(logits[None], logits[P]) and torch.equal(logits[P], model(IDS, loaded.kv))
    assert (logits[P] - logits[0]).abs().max() > 0.01 and (logits[P] - logits[7]).abs().max() > 0.01


def test_metadata(tmp_path, model):
    """All that sample.py needs beside the base model, readable by any safetensors reader."""
    path = saved(tmp_path, model, make_prefix(model, 16), task="e2e")
    info = load_prefix(path).info
    assert info == read_safetensors(path)[1]
    assert info["format"] == "minprefix" and info["task"] == "e2e" and info["base_model"] == "tiny" and info["version"]
    assert json.loads(info["base_shape"]) == {"decoder": [L, H, D]} and json.loads(info["prefix_length"]) == P


def test_saving_keeps_float32_and_the_file_whole(tmp_path, model):
    folded = make_prefix(model, 0).fold()
    halves = KVPrefix({"decoder": folded["decoder"].bfloat16().transpose(0, 1).contiguous().transpose(0, 1)}, P)
    save_prefix(tmp_path / "p.safetensors", halves, model, {})
    loaded = load_prefix(tmp_path / "p.safetensors", model)["decoder"]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, folded["decoder"].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_fit(tmp_path, folder, model, dtype):
    path = saved(tmp_path, model, make_prefix(model, 0))
    assert load_prefix(path, load_model(folder, dtype=dtype)).position_offset == P
    path = saved(tmp_path, load_model(folder, dtype=dtype), make_prefix(model, 0))
    assert load_prefix(path, model).position_offset == P


def test_a_prefix_of_another_model_is_refused(tmp_path, model):
    path = saved(tmp_path, model, make_prefix(model, 0))
    other_weights = load_model(write_tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="p.safetensors was made for tiny: this model has the same shape, but other"):
        load_prefix(path, other_weights)
    other_shape = GPT2({"vocab_size": 9, "n_positions": 8, "n_embd": 32, "n_layer": 3, "n_head": 4})
    with pytest.raises(InputError, match=r"made for tiny: its decoder .* \(2, 4, 8\), this model \(3, 4, 8\)"):
        check_fits(load_prefix(path), other_shape, path)


def test_a_prefix_of_the_other_kind_of_model_is_refused(tmp_path, model, bart):
    """The message says for what it was made, what it has, and what this model has."""
    for sites, message in (
        (None, "it has a prefix for '(encoder|cross)', this model takes decoder$|its decoder prefix .* this model"),
        (["encoder"], "it has a prefix for 'encoder', this model takes decoder$"),
        (["cross"], "it has a prefix for 'cross', this model takes decoder$"),
        (["decoder"], r"its decoder prefix has \(layers, heads, dim\) \(3, 3, 8\), this model \(2, 4, 8\)$"),
    ):
        path = saved(tmp_path, bart, make_prefix(bart, 0, sites=sites), base_model="tiny-bart")
        with pytest.raises(InputError, match=f"p.safetensors was made for tiny-bart: ({message})"):
            load_prefix(path, model)
    path = saved(tmp_path, model, make_prefix(model, 0), base_model="tiny-gpt2")
    with pytest.raises(InputError, match=r"for tiny-gpt2: its decoder prefix .* \(2, 4, 8\), this model \(3, 3, 8\)$"):
        check_fits(load_prefix(path), bart, path)


def test_a_prefix_of_the_other_kind_with_the_same_shape_is_refused(tmp_path, model):
    """Only the decoder's is left to compare, and its shape fits."""
    same = random_bart(d_model=H * D, decoder_layers=L, decoder_attention_heads=H)
    assert same.prefix_sites["decoder"] == model.prefix_sites["decoder"] == (L, H, D)
    path = saved(tmp_path, model, make_prefix(model, 0), base_model="tiny-gpt2")
    with pytest.raises(InputError, match="was made for tiny-gpt2: "):
        load_prefix(path, same)
    path = saved(tmp_path, same, make_prefix(same, 0, sites=["decoder"]), base_model="tiny-bart")
    with pytest.raises(InputError, match="was made for tiny-bart: "):
        load_prefix(path, model)


def test_a_prefix_of_another_bart_is_refused(tmp_path, bart):
    path = saved(tmp_path, bart, make_prefix(bart, 0))
    with pytest.raises(InputError, match="was made for tiny: this model has the same shape, but other weights"):
        load_prefix(path, random_bart(seed=1))
    with pytest.raises(InputError, match=r"its encoder prefix .* \(2, 4, 6\), this model \(1, 4, 6\)$"):
        load_prefix(path, random_bart(encoder_layers=1))


def test_a_prefix_of_an_unknown_site_is_refused(tmp_path, model):
    folded = make_prefix(model, 0).fold()
    save_prefix(tmp_path / "p.safetensors", KVPrefix({"encoder": folded["decoder"]}, P), model, {})
    with pytest.raises(InputError, match="it has a prefix for 'encoder', this model takes decoder$"):
        load_prefix(tmp_path / "p.safetensors", model)


GOOD = torch.zeros(L, 2, H, P, D)
INFO = {"format": "minprefix", "position_offset": "5"}


@pytest.mark.parametrize(
    "tensors, info, message",
    [
        ({"decoder": GOOD}, {}, "is not a minprefix prefix"),
        ({"decoder": GOOD}, {**INFO, "format": "pt"}, "is not a minprefix prefix"),
        ({"decoder": GOOD}, {"format": "minprefix"}, "is not a minprefix prefix"),
        ({"decoder": GOOD}, {**INFO, "position_offset": "-1"}, "is not a minprefix prefix"),
        ({"decoder": GOOD}, {**INFO, "position_offset": "1e3"}, "is not a minprefix prefix"),
        ({"decoder": GOOD}, {**INFO, "position_offset": "²"}, "is not a minprefix prefix"),
        ({"decoder": GOOD}, {**INFO, "position_offset": "9" * 5000}, "is not a minprefix prefix"),
        ({}, INFO, "holds no prefix"),
        ({"decoder": GOOD[0]}, INFO, r"'decoder' is \(2, 4, 5, 8\) torch.float32"),
        ({"decoder": GOOD[None]}, INFO, r"'decoder' is \(1, 2, 2, 4, 5, 8\)"),
        ({"decoder": torch.zeros(L, 3, H, P, D)}, INFO, r"'decoder' is \(2, 3, 4, 5, 8\)"),
        ({"decoder": GOOD[..., :0, :]}, INFO, r"'decoder' is \(2, 2, 4, 0, 8\)"),
        ({"decoder": GOOD.int()}, INFO, "'decoder' is .* torch.int32"),
        ({"decoder": GOOD / 0}, INFO, "'decoder' holds numbers that are not finite"),
        ({"decoder": GOOD + float("inf")}, INFO, "'decoder' holds numbers that are not finite"),
        ({"decoder": GOOD[:, :, :, :, :4]}, INFO, r"\(2, 4, 4\), this model \(2, 4, 8\)"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "[1, 2"}, "fingerprint"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "7"}, "fingerprint"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "[[1]]"}, "fingerprint"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "[1" + "0" * 400 + "]"}, "fingerprint"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "[" * 100_000}, "fingerprint"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "[1e999]"}, "other weights"),
        ({"decoder": GOOD}, {**INFO, "base_fingerprint": "[NaN]"}, "other weights"),
    ],
)
def test_hostile_files(tmp_path, model, tensors, info, message):
    write_safetensors(tmp_path / "p.safetensors", tensors, info)
    with pytest.raises(InputError, match=message):
        load_prefix(tmp_path / "p.safetensors", model)


def test_files_that_are_no_safetensors(tmp_path, folder, model):
    with pytest.raises(InputError, match="no prefix file at .*none.safetensors"):
        load_prefix(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no prefix file"):
        load_prefix(tmp_path)
    for content in (b"", b"hello, world, this is text", b"\xff" * 64):
        (tmp_path / "p").write_bytes(content)
        with pytest.raises(InputError, match="p "):
            load_prefix(tmp_path / "p")
    with pytest.raises(InputError, match="is not a minprefix prefix"):
        load_prefix(folder / "model.safetensors", model)


def test_a_loaded_prefix_is_not_bound_to_its_file(tmp_path, model):
    """A prefix may be overwritten while one that was loaded from it is in use."""
    path = saved(tmp_path, model, make_prefix(model, 0))
    loaded = load_prefix(path, model)
    before = model(IDS, loaded)
    write_safetensors(path, {"decoder": GOOD}, INFO)
    assert torch.equal(model(IDS, loaded), before)


def test_no_line_of_a_users_loses_the_position_offset(model):
    """A dict made from a prefix would: it cannot be gone through, while `to`, `map` and copies keep what it knows."""
    prefix = KVPrefix({"decoder": torch.randn(2, 2, 2, P, 8)}, 0, {"task": "e2e"})
    for other in (prefix.to(torch.float64), prefix.map(torch.clone), copy.copy(prefix), copy.deepcopy(prefix)):
        assert other.position_offset == 0 and other.info == {"task": "e2e"}
    for line in (lambda: dict(prefix), lambda: {site: prefix[site] for site in prefix}, lambda: "decoder" in prefix):
        with pytest.raises(TypeError, match="KVPrefix' (object|is)"):
            line()


def test_a_prefix_to_start_from_brings_its_offset_and_must_fit(model):
    prefix, other = make_prefix(model, 0), make_prefix(model, 0, position_offset=0)
    prefix.init_from(other.fold())
    assert prefix.position_offset == 0 and torch.equal(prefix()["decoder"], other()["decoder"])
    for kv in ({}, {"decoder": other()["decoder"][:, :, :, 1:]}):
        with pytest.raises(InputError, match="the prefix to start from is .* for 'decoder' .* is needed"):
            prefix.init_from(KVPrefix(kv, 0))


def test_a_module_that_was_not_called_is_named(model):
    with pytest.raises(InputError, match="the prefix is a Prefix: give what calling it returns"):
        model(IDS, make_prefix(model, 0))
