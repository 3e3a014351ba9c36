"""BART against committed logits of transformers, its definition in numpy, and transformers where it is installed."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minprefix import Prefix, load_model, load_tokenizer
from minprefix.core.attention import length_mask
from minprefix.core.bart import BART
from minprefix.core.batches import collate
from minprefix.core.encode import check_vocabulary
from minprefix.core.prefix import word_activations
from minprefix.core.prefix_kv import KVPrefix
from minprefix.core.training import target_loss
from minprefix.formats.names import bart_from_huggingface as from_huggingface
from minprefix.formats.names import to_huggingface
from minprefix.formats.safetensors import read_safetensors, read_tensors, write_safetensors
from minprefix.system.errors import InputError
from tests.helpers import singles
from tests.tiny import ROOT, write_tiny_bart

GOLDEN = ROOT / "tests" / "golden"
CONFIG = json.loads((GOLDEN / "tiny-bart" / "config.json").read_text())
TENSORS = read_tensors(GOLDEN / "tiny-bart")
EMBEDDINGS = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
SHAPE = {"vocab_size": 29, "max_position_embeddings": 16, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 3, "encoder_ffn_dim": 20,
         "decoder_ffn_dim": 28}  # fmt: skip
SITES = {"encoder": (2, 2, 12, 2), "decoder": (3, 3, 8, 4), "cross": (3, 3, 8, 3)}  # layers, heads, dim; prefix length
SUBSETS = [sites for n in range(4) for sites in itertools.combinations(SITES, n)]
VARIANTS = [
    {},
    {"activation_function": "gelu_new", "scale_embedding": True},
    {"activation_function": "relu", "tie_word_embeddings": False},
    {"scale_embedding": True, "tie_word_embeddings": False},
]
LENGTHS = [5, 1, 3]


def randomise(model):
    """Every tensor random and large, biases, norms and the logits' bias too: nothing left out may go unnoticed."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.normal_(std=0.2).add_(name.endswith("weight") and tensor.dim() == 1)
    return model.eval().requires_grad_(False)


def random_model(seed=0, **config):
    torch.manual_seed(seed)
    return randomise(BART({**SHAPE, **config}).double())


def random_prefix(sites, rows=(), B=3):
    """A prefix at these sites, with a row for each example at the sites `rows`."""
    shapes = {site: (SITES[site][0], 2, *([B] if site in rows else []), *SITES[site][1:]) for site in sites}
    return {site: torch.randn(L, two, *b, H, P, D).double() for site, (L, two, *b, H, D, P) in shapes.items()}


def row_of(prefix, i):
    """Row i of a prefix, as one for the whole batch."""
    return prefix and {site: kv if kv.dim() == 5 else kv[:, :, i] for site, kv in prefix.items()}


def random_batch(lengths=LENGTHS, T=4, V=29):
    """source (B, S) with random ids in the padding too, target (B, T), mask (B, S)."""
    lengths, S = torch.tensor(lengths), max(lengths)
    return torch.randint(V, (len(lengths), S)), torch.randint(V, (len(lengths), T)), length_mask(lengths, S)


def assert_equal(ours, expected, atol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


# ---- committed logits ----


def golden_model(kind="gelu"):
    """The committed model in float64, in one of the variants of make_golden.py."""
    variant = {"gelu": {}, "scaled": {"scale_embedding": True}, "untied": {"tie_word_embeddings": False}}
    model = BART({**CONFIG, **variant.get(kind, {"activation_function": kind})}).double()
    tensors = {name: tensor.double() for name, tensor in TENSORS.items()}
    if kind == "untied":
        tensors |= {name: tensors["model.shared.weight"].roll(n + 1, dims=0) for n, name in enumerate(EMBEDDINGS)}
    model.load_state_dict(from_huggingface(tensors, model.config))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def golden():
    return read_safetensors(GOLDEN / "tiny-bart-logits.safetensors")[0]


@pytest.mark.parametrize(
    "name", ["gelu.none", "gelu.shared", "gelu.rows", "gelu_new.rows", "relu.rows", "scaled.rows", "untied.rows"]
)
def test_golden_logits(golden, name):
    kind, prefix = name.split(".")
    model, prefix = golden_model(kind), None if prefix == "none" else {"decoder": golden[prefix]}
    inputs = (golden["source"], golden["target"], length_mask(golden["lengths"], 6), prefix)
    assert_equal(model(*inputs), golden[name])
    assert_equal(model.float()(*inputs).double(), golden[name], atol=1e-4)
    assert golden[name].std() > 1


def test_golden_logits_from_the_folder(golden):
    model = load_model(GOLDEN / "tiny-bart", dtype=torch.float64)
    mask = length_mask(golden["lengths"], 6)
    prefix = {"decoder": golden["shared"]}
    assert_equal(model(golden["source"], golden["target"], mask, prefix), golden["gelu.shared"])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    states = model.hidden_states(golden["source"], golden["target"], mask, prefix)
    assert_equal(model.logits(states.flatten(0, 1)[[3, 5]]), golden["gelu.shared"].flatten(0, 1)[[3, 5]])


# ---- the definition (Vaswani et al. 2017, Lewis et al. 2020, Li & Liang 2021), a head and a query at a time ----


def by_definition(model, source, target, prefix=None, start=0):
    """Logits (T, V) in numpy of one example: ids of source and target, {site: (L, 2, H, P, D)}."""
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config, prefix = model.config, {site: kv.numpy() for site, kv in (prefix or {}).items()}
    C = config["d_model"]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name, x, states, site, layer, causal=False):
        H = config["encoder_attention_heads" if site == "encoder" else "decoder_attention_heads"]
        q, k, v = linear(f"{name}.q_proj", x), linear(f"{name}.k_proj", states), linear(f"{name}.v_proj", states)
        heads = np.zeros_like(x)
        for h in range(H):
            own = slice(h * C // H, (h + 1) * C // H)
            keys, values, P = k[:, own], v[:, own], 0
            if site in prefix:
                keys = np.concatenate([prefix[site][layer, 0, h], keys])
                values = np.concatenate([prefix[site][layer, 1, h], values])
                P = prefix[site].shape[3]
            for t in range(len(x)):
                seen = P + t + 1 if causal else len(keys)
                weights = np.exp(keys[:seen] @ q[t, own] / math.sqrt(C // H))
                heads[t, own] = weights @ values[:seen] / weights.sum()
        return linear(f"{name}.out_proj", heads)

    def feed_forward(name, x):
        x = linear(f"{name}.fc1", x)
        if config["activation_function"] == "relu":
            x = np.maximum(x, 0)
        elif config["activation_function"] == "gelu":
            x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        else:
            x = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        return linear(f"{name}.fc2", x)

    def embed(side, ids, first):
        words = w["shared.weight"] if config["tie_word_embeddings"] else w[f"{side}.embed_tokens.weight"]
        words = words[ids] * (math.sqrt(C) if config["scale_embedding"] else 1)
        return norm(f"{side}.layernorm_embedding", words + w[f"{side}.embed_positions.weight"][first + 2 :][: len(ids)])

    memory = embed("encoder", source, 0)
    for n in range(config["encoder_layers"]):
        name = f"encoder.layers.{n}"
        attended = attention(f"{name}.self_attn", memory, memory, "encoder", n)
        memory = norm(f"{name}.self_attn_layer_norm", memory + attended)
        memory = norm(f"{name}.final_layer_norm", memory + feed_forward(name, memory))
    x = embed("decoder", target, start)
    for n in range(config["decoder_layers"]):
        name = f"decoder.layers.{n}"
        attended = attention(f"{name}.self_attn", x, x, "decoder", n, causal=True)
        x = norm(f"{name}.self_attn_layer_norm", x + attended)
        x = norm(f"{name}.encoder_attn_layer_norm", x + attention(f"{name}.encoder_attn", x, memory, "cross", n))
        x = norm(f"{name}.final_layer_norm", x + feed_forward(name, x))
    head = w["shared.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return torch.from_numpy(x @ head.T + w["final_logits_bias"][0])


def batch_by_definition(model, source, target, lengths, prefix=None, start=0):
    return torch.stack(
        [
            by_definition(model, source[i, :n].numpy(), target[i].numpy(), row_of(prefix, i), start)
            for i, n in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_definition(variant):
    """With every activation, scaled and tied embeddings or not; all prefixes at once, padding, decoder from P on."""
    model, (source, target, mask) = random_model(**variant), random_batch()
    prefix = random_prefix(SITES)
    expected = batch_by_definition(model, source, target, LENGTHS, prefix, start=4)
    assert_equal(model(source, target, mask, prefix), expected)
    assert expected.std() > 0.5


@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
def test_prefixes_of_any_sites(sites):
    """Shared, one for each row, and both kinds in one prefix; each says something; a plain dict's offset is P."""
    model, (source, target, mask) = random_model(), random_batch()
    seen = [model(source, target, mask)]
    for rows in ((), sites, sites[:1]):
        prefix = random_prefix(sites, rows)
        start = 4 if "decoder" in sites else 0
        logits = model(source, target, mask, prefix)
        assert_equal(logits, batch_by_definition(model, source, target, LENGTHS, prefix, start))
        if sites:
            assert min((logits - other).abs().amax(dim=-1).min() for other in seen) > 1e-3
        seen.append(logits)


def test_position_offset():
    """An explicit offset moves the decoder's positions, whatever prefixes there are, and never the encoder's."""
    model, (source, target, mask) = random_model(), random_batch()
    for sites in SUBSETS:
        kv = random_prefix(sites)
        length = 4 if "decoder" in sites else 0
        for offset in (0, 4, 7):
            folded = KVPrefix(kv, offset)
            logits = model(source, target, mask, folded)
            assert_equal(logits, batch_by_definition(model, source, target, LENGTHS, kv, offset))
            assert torch.equal(model.encode(source, mask, folded)[0], model.encode(source, mask, kv)[0])
            assert torch.equal(model.prefill(source, mask.sum(1), folded).position, torch.full((3,), offset))
            if offset == length:
                assert torch.equal(logits, model(source, target, mask, kv))
            else:
                assert (logits - model(source, target, mask, kv)).abs().max() > 0.1
            assert torch.equal(logits, model.logits(model.hidden_states(source, target, mask, kv, start=offset)))


def test_every_virtual_token_is_seen_and_no_later_target():
    model, (source, target, mask) = random_model(), random_batch()
    prefix = random_prefix(SITES)
    before = model(source, target, mask, prefix)
    changed = target.clone()
    changed[:, 2] = (target[:, 2] + 1) % 29
    differs = (model(source, changed, mask, prefix) - before).abs().amax(dim=(0, 2))
    assert differs[:2].max() < 1e-12 and differs[2:].min() > 1e-3
    for site, kv in prefix.items():
        for p in range(kv.size(-2)):
            other = kv.clone()
            other[..., p, :] += 1
            assert (model(source, target, mask, {**prefix, site: other}) - before).abs().amax(dim=2).min() > 1e-3


def test_words_activations():
    """Keys and values of words, as a prefix, are those of the words: twice the same keys change no average, and the
    decoder goes on after words that it need not read again."""
    model, words = random_model(), [3, 1, 4, 1, 5, 9]
    prefix = word_activations(model, words)
    assert {site: kv.shape for site, kv in prefix.items()} == {
        site: (L, 2, H, 6, D) for site, (L, H, D, _) in SITES.items()
    }
    source, target = torch.tensor([words]), torch.tensor([[2, 6, 5, 3, 5]])
    expected = model(source, target)
    for sites in (["encoder"], ["cross"], ["encoder", "cross"]):
        assert_equal(model(source, target, None, {site: prefix[site] for site in sites}), expected)
    expected = model(source, torch.cat([source, target], dim=1))[:, 6:]
    assert_equal(model(source, target, None, {"decoder": prefix["decoder"]}), expected)


def test_the_prefix_may_be_in_another_dtype_and_place():
    with torch.device("meta"):
        model = BART(SHAPE)
    source, target, mask = random_batch()
    logits = model(source.to("meta"), target.to("meta"), mask, random_prefix(SITES))  # float64, in the CPU's memory
    assert logits.shape == (3, 4, 29) and logits.dtype == torch.float32 and logits.device.type == "meta"
    model, prefix = random_model(), random_prefix(SITES)
    expected = model(source, target, mask, prefix)
    logits = model.bfloat16()(source, target, mask, {site: kv.float() for site, kv in prefix.items()})
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.flatten().double(), expected.flatten(), dim=0) > 0.9


# ---- padding, and one token at a time ----


@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
def test_padding_changes_nothing(sites):
    """A row of a batch is what it is alone, by a mask of any dtype, whatever ids there are in the padding."""
    lengths = [7, 1, 16, 4]
    model, (source, target, mask) = random_model(), random_batch(lengths)
    for rows in ((), sites):
        prefix = random_prefix(sites, rows, B=4)
        logits = model(source, target, mask, prefix)
        for i, n in enumerate(lengths):
            alone = model(source[i : i + 1, :n], target[i : i + 1], None, row_of(prefix, i))
            assert_equal(logits[i : i + 1], alone)
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64):
            assert torch.equal(model(source, target, mask.to(dtype), prefix), logits)
        other = torch.where(mask, source, (source + 1) % 29)
        assert torch.equal(model(other, target, mask, prefix), logits)
    assert_equal(model(source, target, torch.ones_like(mask)), model(source, target))
    assert (model(source, target) - model(source, target, mask)).abs().amax(dim=(1, 2))[[0, 1, 3]].min() > 0.01


@pytest.mark.parametrize("sites", SUBSETS, ids="+".join)
@pytest.mark.parametrize("kind", ["shared", "rows"])
def test_steps_equal_forward(sites, kind):
    """Beams too: rows of an example adjacent, each with its own tokens; beams die and are copied on the way."""
    model, (source, _, mask) = random_model(), random_batch()
    B, K, V = 3, 2, 29
    prefix = random_prefix(sites, sites if kind == "rows" else ())
    for folded in (prefix, KVPrefix(prefix, 1)):
        cache = model.prefill(source, torch.tensor(LENGTHS), folded)
        first = torch.randint(V, (B, 1))
        logits = model.logits(model.step(first[:, 0], cache))
        assert_equal(logits, model(source, first, mask, folded)[:, -1])
        cache.reorder(torch.arange(B).repeat_interleave(K))
        tokens = first.repeat_interleave(K, dim=0)
        in_rows = {site: kv.repeat_interleave(K, dim=2) if kv.dim() == 6 else kv for site, kv in prefix.items()}
        if isinstance(folded, KVPrefix):
            in_rows = KVPrefix(in_rows, 1)
        for parents in ([0, 1, 2, 3, 4, 5], [1, 0, 2, 2, 5, 4], [1, 1, 3, 2, 4, 4], [0, 1, 3, 2, 5, 5]):
            tokens = torch.cat([tokens, torch.randint(V, (B * K, 1))], dim=1)
            logits = model.logits(model.step(tokens[:, -1], cache))
            beams = source.repeat_interleave(K, dim=0), tokens, mask.repeat_interleave(K, dim=0)
            assert_equal(logits, model(*beams, in_rows)[:, -1])
            assert all(len(kv.k) == B for kv in [*cache.layers, *cache.source])
            cache.reorder(torch.tensor(parents))
            tokens = tokens[torch.tensor(parents)]


def test_too_long():
    model, prefix = random_model(), random_prefix(SITES)
    source, target = torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    assert model(source, source).shape == (1, 16, 29) and model(source, target, None, prefix).shape == (1, 12, 29)
    assert model(source, source, None, KVPrefix(prefix, 0)).shape == (1, 16, 29)
    longer = torch.zeros(1, 17, dtype=torch.long)
    with pytest.raises(InputError, match="17 tokens from position 0 on do not fit the model's 16 positions"):
        model(longer, target)
    with pytest.raises(InputError, match="17 tokens from position 0"):
        model.prefill(longer, torch.tensor([17]), prefix)
    with pytest.raises(InputError, match="13 tokens from position 4 on"):
        model(source, source[:, :13], None, prefix)
    with pytest.raises(InputError, match="1 tokens from position 16 on"):
        model(source, source[:, :1], None, KVPrefix(prefix, 16))


# ---- gradients ----


def loss_batch(model):
    """Two pairs of (source ids, target ids) of unequal length."""
    return collate(
        singles([([0, 5, 6, 7, 2], [0, 8, 2]), ([0, 9, 2], [0, 3, 4, 11, 2])]), SimpleNamespace(pad_id=1), model
    )


@pytest.mark.parametrize("rows", [False, True])
def test_prefix_gradients(rows):
    torch.manual_seed(0)
    config = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 6, "decoder_ffn_dim": 7,
              "encoder_attention_heads": 1, "decoder_attention_heads": 2}  # fmt: skip
    model = random_model(**config)
    batch, b, P = loss_batch(model), [2] if rows else [], 1 if rows else 2
    sites = [torch.randn(L, 2, *b, H, P, D).double().requires_grad_() for L, H, D in model.prefix_sites.values()]

    def loss(*kv):
        states = model.hidden_states(*batch.inputs, prefix=dict(zip(model.prefix_sites, kv, strict=True)))
        logits = model.logits(states.flatten(0, 1)[batch.target_positions])
        return F.cross_entropy(logits, batch.labels, reduction="sum")

    assert torch.autograd.gradcheck(loss, sites, eps=1e-6, atol=1e-7, rtol=1e-5)
    gradients = torch.autograd.grad(loss(*sites), sites)
    prefix = dict(zip(model.prefix_sites, sites, strict=True))
    training = target_loss(model, batch, prefix)
    assert_equal(training.double(), loss(*sites), atol=1e-4)
    for ours, expected in zip(torch.autograd.grad(training, sites), gradients, strict=True):
        assert_equal(ours, expected, atol=1e-5)
        assert expected.abs().amax(dim=-1).min() > 1e-8  # every key and value of every head has a say


@pytest.mark.parametrize("hidden", [0, 6])
def test_only_the_prefix_is_trained(tmp_path, hidden):
    folder = write_tiny_bart(tmp_path / "tiny")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prefix = Prefix(model, 3, hidden)
    pairs = [([0, 5, 6, 7, 2], [0, 8, 2]), ([0, 9, 2], [0, 3, 4, 11, 2])]
    target_loss(model, collate(singles(pairs), tokenizer, model), prefix()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not model.final_logits_bias.requires_grad
    assert list(prefix.sites) == ["encoder", "decoder", "cross"]
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in prefix.parameters())


# ---- names and shapes of HuggingFace's files ----


def write(folder, tensors, config=CONFIG, kind="safetensors"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def without(*names):
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


def bare(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


WORDS = TENSORS["model.shared.weight"]
COPIES = {name: WORDS.clone() for name in EMBEDDINGS}
STORED = {
    "as it is": TENSORS,
    "without model.": bare(TENSORS),
    "all copies": {**TENSORS, **COPIES},
    "all copies without model.": bare({**TENSORS, **COPIES}),
    "versions": {**TENSORS, "model.encoder.version": torch.tensor([3]), "decoder.version": torch.zeros(1)},
    **{f"only {name}": {**without("model.shared.weight"), name: WORDS} for name in EMBEDDINGS},
    "two copies, no shared": {**without("model.shared.weight"), **dict(list(COPIES.items())[:2])},
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_of_the_stored_tensors(tmp_path, golden, stored, kind):
    model = load_model(write(tmp_path / "m", STORED[stored], kind=kind), dtype=torch.float64)
    mask = length_mask(golden["lengths"], 6)
    assert_equal(model(golden["source"], golden["target"], mask), golden["gelu.none"])
    back = to_huggingface(model.float())
    assert back.keys() == TENSORS.keys() and all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)


def test_a_missing_bias_is_zero(tmp_path, golden):
    bias = TENSORS["final_logits_bias"].double()
    model = load_model(write(tmp_path / "m", without("final_logits_bias")), dtype=torch.float64)
    logits = model(golden["source"], golden["target"], length_mask(golden["lengths"], 6))
    assert_equal(logits + bias, golden["gelu.none"])
    assert bias.abs().min() > 1e-3


def test_stored_copies_of_untied_embeddings(tmp_path):
    """Four tables, of which `shared` counts only where another is missing."""
    config = {**CONFIG, "tie_word_embeddings": False}
    tables = {name: torch.randn(37, 16) for name in EMBEDDINGS}
    model = load_model(write(tmp_path / "all", {**TENSORS, **tables}, config))
    back = to_huggingface(model)
    assert all(torch.equal(back[name], table) for name, table in tables.items())
    assert torch.equal(back["model.shared.weight"], tables["model.encoder.embed_tokens.weight"])  # not used by anyone
    model = load_model(write(tmp_path / "head", {**TENSORS, "lm_head.weight": tables["lm_head.weight"]}, config))
    for stack in (model.encoder, model.decoder):
        assert torch.equal(stack.embed_tokens.weight, WORDS)
    encoder, decoder = (stack.embed_tokens.weight.data_ptr() for stack in (model.encoder, model.decoder))
    assert encoder != decoder  # or fine-tuning would step one table twice
    assert torch.equal(model.lm_head.weight, tables["lm_head.weight"])
    with pytest.raises(InputError, match="lacks 1 .*'lm_head.weight'"):  # never guessed from another table
        load_model(write(tmp_path / "none", TENSORS, config))
    with pytest.raises(InputError, match="lacks 2 .*'decoder.embed_tokens.weight'"):
        load_model(write(tmp_path / "only", {**without("model.shared.weight"), "lm_head.weight": WORDS}, config))


@pytest.mark.parametrize("key, value", [("scale_embedding", "false"), ("tie_word_embeddings", 1)])
def test_switches_must_be_booleans(tmp_path, key, value):
    with pytest.raises(InputError, match="true or false is needed"):
        load_model(write(tmp_path / "model", TENSORS, {**CONFIG, key: value}))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "lacks 75 of the model's 76 tensors"),  # all but the bias, which may lack
        (without("model.shared.weight"), "lacks 1 .*'shared.weight'"),
        (without("model.decoder.layers.1.encoder_attn.k_proj.bias"), "'decoder.layers.1.encoder_attn.k_proj.bias'"),
        ({**TENSORS, "shared.weight": WORDS}, "'shared.weight' is there twice, with and without 'model.'"),
        ({**TENSORS, "model.decoder.layers.2.fc1.bias": WORDS}, "does not know, 1 .*'decoder.layers.2.fc1.bias'"),
        ({**TENSORS, "final_logits_bias": torch.zeros(37)}, r"'final_logits_bias' has shape \(37,\)"),
        ({**TENSORS, "model.shared.weight": WORDS[:36]}, r"'shared.weight' has shape \(36, 16\)"),
        ({**TENSORS, "model.encoder.embed_positions.weight": torch.zeros(24, 16)}, r"the model needs \(26, 16\)"),
        ({**TENSORS, "model.encoder.layers.0.fc1.bias": torch.zeros(24, dtype=torch.int32)}, "holds torch.int32"),
        *(
            ({**TENSORS, **COPIES, name: WORDS + torch.eye(37, 16) * 1e-6}, f"'{bare({name: 0}).popitem()[0]}' differ")
            for name in EMBEDDINGS
        ),
        ({**TENSORS, "lm_head.weight": WORDS[:36]}, "'shared.weight' and 'lm_head.weight' differ"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    with pytest.raises(InputError, match=message):
        load_model(write(tmp_path / "m", tensors))


def test_a_folder_that_this_project_writes(tmp_path):
    folder = write_tiny_bart(tmp_path / "tiny", scale_embedding=True)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    check_vocabulary(tokenizer, model, folder)
    assert tokenizer.vocab_size == 4100 and (tokenizer.end_id, tokenizer.pad_id) == (2, 1)
    assert tokenizer.special == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4099}
    assert tokenizer.decode(tokenizer.encode(" Crédit £5")) == " Crédit £5"
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(folder / "config.json", again)
    write_safetensors(again / "model.safetensors", to_huggingface(model))
    ids = torch.tensor([[0, 5, 4099, 2]])
    reloaded = load_model(again)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in reloaded.state_dict().items())
    torch.testing.assert_close(reloaded(ids, ids), model(ids, ids), rtol=0, atol=1e-5)
    assert model.scale == 32**0.5


# ---- config.json ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalize_before": True}, "normalize_before = True is not supported"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm = True is not supported"),
        ({"normalize_embedding": False}, "normalize_embedding = False is not supported"),
        ({"static_position_embeddings": True}, "static_position_embeddings = True is not supported"),
        ({"activation_function": "swish"}, "activation 'swish' is not supported, only gelu, gelu_new, relu"),
        ({"activation_function": {}}, "activation {}"),
        ({"d_model": 25}, "d_model 25 is not a multiple of encoder_attention_heads 2"),
        ({"decoder_attention_heads": 5}, "d_model 24 is not a multiple of decoder_attention_heads 5"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads is 0"),
        ({"encoder_layers": "2"}, "encoder_layers is '2'"),
        ({"decoder_layers": 1001}, "decoder_layers is 1001"),
        ({"decoder_ffn_dim": True}, "decoder_ffn_dim is True"),
        ({"encoder_ffn_dim": -4}, "encoder_ffn_dim is -4"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"vocab_size": 2**40}, "vocab_size is"),
        ({"d_model": 24.0}, "d_model is 24.0"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1, an id of the 29 tokens is needed"),
        ({"forced_eos_token_id": [2]}, r"forced_eos_token_id is \[2\]"),
        ({"decoder_start_token_id": 29}, "decoder_start_token_id is 29"),
        ({"decoder_start_token_id": True}, "decoder_start_token_id is True"),
        ({"forced_bos_token_id": "0"}, "forced_bos_token_id is '0'"),
        ({"forced_eos_token_id": 29}, "forced_eos_token_id is 29"),
    ],
)
def test_config_that_cannot_be_followed(change, message):
    with pytest.raises(InputError, match=message), torch.device("meta"):
        BART({**SHAPE, **change})


def test_no_value_of_a_config_is_another_exception():
    """Whatever JSON holds: a model, or an InputError."""
    values = (None, True, False, -1, 0, 1, 2, 29, 1.5, float("nan"), 2**70, "", "gelu", "two", [], [1], {}, {"a": 1})
    keys = {*SHAPE, *BART(SHAPE).config, "normalize_before", "normalize_embedding", "model_type"}
    refused = 0
    for key, value in itertools.product(sorted(keys), values):
        try:
            with torch.device("meta"):
                BART({**SHAPE, key: value})
        except InputError as error:
            assert str(error).startswith("config.json")
            refused += 1
    assert refused > 200


def test_config_defaults_and_what_is_kept():
    config = BART(SHAPE).config
    assert config["activation_function"] == "gelu" and not config["scale_embedding"] and config["tie_word_embeddings"]
    assert config["decoder_start_token_id"] == 2
    assert config["forced_bos_token_id"] is None and config["forced_eos_token_id"] == 2
    given = {**SHAPE, "forced_bos_token_id": 0, "forced_eos_token_id": None, "decoder_start_token_id": 5}
    assert BART({**given, "dropout": 0.1}).config.items() >= {**given, "dropout": 0.1}.items()
    for key in SHAPE:
        with pytest.raises(InputError, match=f"{key} is None"):
            BART({other: size for other, size in SHAPE.items() if other != key})


def test_load_refuses_what_the_model_refuses(tmp_path):
    for n, (change, message) in enumerate(
        [({"normalize_before": True}, "normalize_before"), ({"forced_bos_token_id": 37}, "forced_bos_token_id"),
         ({"encoder_layers": 2}, "lacks 16 of the model's"), ({"max_position_embeddings": 26}, r"needs \(28, 16\)")]
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_model(write(tmp_path / str(n), TENSORS, {**CONFIG, **change}))


# ---- beside transformers itself ----

LIVE = {"vocab_size": 211, "max_position_embeddings": 64, "d_model": 64, "encoder_layers": 3, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 8, "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 128}  # fmt: skip


def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers (pip install minprefix[parity])")


def live_models(**config):
    """(transformers' model, ours) with the same random weights, float64."""
    hf = transformers()
    torch.manual_seed(0)
    theirs = randomise(hf.BartForConditionalGeneration(hf.BartConfig(**LIVE, **config)).double())
    with torch.device("meta"):
        ours = BART(theirs.config.to_dict())
    ours.load_state_dict(from_huggingface(theirs.state_dict(), ours.config), assign=True)
    return theirs, ours.requires_grad_(False)


def their_logits(model, source, target, mask=None, prefix=None):
    """prefix: (L, 2, [B,] H, P, D) of the decoder; transformers gives the first token position P by itself."""
    hf = transformers()
    own = hf.DynamicCache()
    if prefix is not None and prefix.dim() == 5:
        prefix = prefix.unsqueeze(2).expand(-1, -1, len(source), -1, -1, -1)
    for layer, (k, v) in enumerate([] if prefix is None else prefix):
        own.update(k, v, layer)
    cache = hf.EncoderDecoderCache(own, hf.DynamicCache())
    mask = None if mask is None else mask.long()
    return model(source, attention_mask=mask, decoder_input_ids=target, past_key_values=cache).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    """All source lengths from 1 to all positions, in padded batches and alone; in float64, then in float32."""
    theirs, ours = live_models(**variant)
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        for lengths, T in (([*range(1, 65)], 9), ([40, 7, 64, 1], 64), ([1], 1), ([64], 1)):
            source, target, mask = random_batch(lengths, T, V=211)
            expected = their_logits(theirs, source, target, mask)
            assert (ours(source, target, mask) - expected).abs().max() <= bar
            assert expected.std() > 1
        source, target, _ = random_batch([33, 33], 5, V=211)
        assert (ours(source, target) - their_logits(theirs, source, target)).abs().max() <= bar


@pytest.mark.parametrize("P", [1, 10])
def test_decoder_prefix_equals_transformers(P):
    """Logits, and the prefix's gradient of the summed target loss relative to its largest number."""
    theirs, ours = live_models(scale_embedding=True)
    source, target, mask = random_batch([13, 1, 6], 7, V=211)
    labels = torch.randint(211, (21,))
    for rows in ([], [3]):
        prefix = torch.randn(2, 2, *rows, 8, P, 8, dtype=torch.float64)
        results = []
        for run in (
            lambda kv: ours(source, target, mask, {"decoder": kv}),
            lambda kv: their_logits(theirs, source, target, mask, kv),
        ):
            leaf = prefix.clone().requires_grad_()
            logits = run(leaf)
            F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
            results.append((logits.detach(), leaf.grad))
        (logits, gradient), (their, expected) = results
        assert (logits - their).abs().max() <= 1e-10
        assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max() and expected.abs().min() > 0
        assert (their_logits(theirs, source, target, mask) - their).abs().max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_folders_go_both_ways(tmp_path, tied):
    """transformers' save_pretrained (whole, in shards, without a head) and its .bin load here, ours load there."""
    hf = transformers()
    torch.manual_seed(0)
    theirs = randomise(hf.BartForConditionalGeneration(hf.BartConfig(**LIVE, tie_word_embeddings=tied)))
    source, target, mask = random_batch([9, 3], 5, V=211)
    expected = their_logits(theirs, source, target, mask)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    theirs.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for name in ("whole", "shards", "bin"):
        ours = load_model(tmp_path / name)
        assert_equal(ours(source, target, mask), expected, atol=1e-4)
    if tied:
        theirs.model.save_pretrained(tmp_path / "headless")
        headless = load_model(tmp_path / "headless")(source, target, mask)
        assert_equal(headless + theirs.final_logits_bias, expected, atol=1e-4)
    folder = tmp_path / "ours"
    folder.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", folder)
    write_safetensors(folder / "model.safetensors", to_huggingface(ours), {"format": "pt"})
    again, report = hf.BartForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("unexpected_keys", "mismatched_keys"))
    assert set(report["missing_keys"]) <= (set() if tied else {"model.shared.weight"})  # which untied models do not use
    assert torch.equal(their_logits(again.eval(), source, target, mask), expected)


@pytest.mark.parametrize(
    "site, shape, message",
    [
        ("encodr", (3, 2, 2, 5, 8), "site 'encodr', this model has encoder, decoder, cross"),
        ("encoder", (2, 2, 2, 5, 8), r"shape \(2, 2, 2, 5, 8\), expected \(3, 2, 2, length, 8\)"),
        ("decoder", (3, 2, 4, 5, 4), r"expected \(2, 2, 4, length, 4\), or \(2, 2, 3, 4, length, 4\) for 3 rows"),
        ("decoder", (2, 1, 4, 5, 4), "expected"),
        ("cross", (2, 2, 2, 4, 5, 4), "expected"),  # two rows for three
        ("cross", (2, 2, 4, 4), "expected"),
    ],
)
def test_a_prefix_of_another_shape_is_refused(site, shape, message):
    sizes = {"d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
    model = BART({"vocab_size": 29, "max_position_embeddings": 24, **sizes})
    ids, prefix = torch.ones(3, 4, dtype=torch.long), {site: torch.zeros(shape)}
    for call in (lambda: model(ids, ids, prefix=prefix), lambda: model.prefill(ids, torch.tensor([4, 4, 4]), prefix)):
        with pytest.raises(InputError, match=message):
            call()
