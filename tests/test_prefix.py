"""The prefix: folding, words to start from, its size, its files."""

import json

import pytest
import torch
from torch.nn import functional as F

from minprefix import Prefix, load_model, load_prefix, load_tokenizer
from minprefix.checkpoint import read_safetensors, write_safetensors
from minprefix.files import InputError
from minprefix.gpt2 import GPT2
from minprefix.prefix import FoldedPrefix, check_fits, parameter_shares, save_prefix, word_activations
from tests.tiny import write_tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
L, H, D, P = 2, 4, 8, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("prefix") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


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
    part = prefix.parts["decoder"]
    first, _, second = part.mlp
    assert part.embedding.shape == (P, H * D) and first.weight.shape == (16, H * D)
    for i in range(P):
        flat = second.weight @ torch.tanh(first.weight @ part.embedding[i] + first.bias) + second.bias
        torch.testing.assert_close(prefix()["decoder"][:, :, :, i], flat.view(L, 2, H, D))


def test_length_and_width_that_make_no_sense(model):
    for length, hidden in ((0, 0), (-1, 512), (5, -1)):
        with pytest.raises(InputError, match=f"prefix length {length} .* hidden width {hidden}"):
            Prefix(model, length, hidden)


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
    expected = torch.stack([torch.stack([k[0], v[0]]) for k, v in cache.source])
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


def test_words_without_a_token(model, tokenizer):
    with pytest.raises(InputError, match="the words '' .* hold no token"):
        make_prefix(model, 0).init_from_words(model, tokenizer, "")


# ---- size ----


@pytest.mark.parametrize("length, numbers, share", [(10, "491,520", "0.14%"), (5, "245,760", "0.07%")])
def test_parameter_shares_of_gpt2_medium(length, numbers, share):
    """The paper's 0.1%: counted on the real shape, without memory for it."""
    with torch.device("meta"):
        model = GPT2({"vocab_size": 50257, "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16})
        line, direct = parameter_shares(Prefix(model, length, 512), model), Prefix(model, length, 0)
    trained = length * 1024 + (1024 + 1) * 512 + (512 + 1) * 24 * 2 * 1024
    assert f"saves {numbers} ({share})" in line and "of the model's 354,823,168" in line
    assert f"trains {trained:,} numbers" in line
    assert f"trains {numbers} numbers ({share}" in parameter_shares(direct, model)


# ---- files ----


def test_position_offset_is_saved_and_honoured(tmp_path, model):
    logits = {}
    for offset in (None, 0, P, 7):
        prefix = make_prefix(model, 0, position_offset=offset)
        loaded = load_prefix(saved(tmp_path, model, prefix), model)
        assert loaded.position_offset == prefix.position_offset == (P if offset is None else offset)
        logits[offset] = model(IDS, loaded)
        assert torch.equal(logits[offset], model(IDS, prefix.fold()))
    assert torch.equal(logits[None], logits[P]) and torch.equal(logits[P], model(IDS, dict(loaded)))
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
    halves = FoldedPrefix({"decoder": folded["decoder"].bfloat16().transpose(0, 1).contiguous().transpose(0, 1)}, P)
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
    with pytest.raises(InputError, match=r"made for tiny: its decoder .* \(2, 4, 8\), this model decoder \(3, 4, 8\)"):
        check_fits(load_prefix(path), other_shape, path)


def test_a_prefix_of_an_unknown_site_is_refused(tmp_path, model):
    folded = make_prefix(model, 0).fold()
    save_prefix(tmp_path / "p.safetensors", FoldedPrefix({"encoder": folded["decoder"]}, P), model, {})
    with pytest.raises(InputError, match="its encoder prefix"):
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
        ({"decoder": GOOD[:, :, :, :, :4]}, INFO, r"\(2, 4, 4\), this model decoder \(2, 4, 8\)"),
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
