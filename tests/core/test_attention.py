"""The attention function against its definition, and the cache against the full forward."""

import math

import pytest
import torch

from minprefix.core import cache as cache_module
from minprefix.core.attention import (
    KV,
    attend,
    causal_mask,
    concat,
    fused_attend,
    length_mask,
    padding_mask,
    plain_attend,
)
from minprefix.core.gpt2 import GPT2
from minprefix.core.prefix_kv import KVPrefix, layer_prefixes, prefix_length

B, H, T, D, P, S = 6, 2, 4, 3, 5, 7
INF = float("inf")


def fused(q, kv, prefix=None):
    return fused_attend(q, concat(prefix, kv, len(q), q.size(2)) if prefix else kv)


def copied(q, kv, prefix=None):
    return plain_attend(q, concat(prefix, kv, len(q), q.size(2)) if prefix else kv)


BODIES = {"as chosen": attend, "scores concatenated": plain_attend, "keys copied": copied, "a GPU's kernel": fused}


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def definition(q, segments):
    """softmax(q K^T / sqrt(D)) V, one query at a time, over the concatenated keys of the segments."""
    out = torch.empty_like(q)
    for i in range(q.size(0)):
        for h in range(q.size(1)):
            for t in range(q.size(2)):
                weights, values = [], []
                for k, v, mask in segments:
                    row = i if len(k) > 1 else 0
                    for s in range(k.size(2)):
                        score = sum(a * b for a, b in zip(q[i, h, t].tolist(), k[row, h, s].tolist(), strict=True))
                        score /= math.sqrt(q.size(3))
                        if mask is not None:
                            score += float(mask.expand(q.size(0), 1, q.size(2), k.size(2))[i, 0, t, s])
                        weights.append(math.exp(score))
                        values.append(v[row, h, s])
                out[i, h, t] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return out


def segment(rows, length, mask=None):
    return rand(rows, H, length, D), rand(rows, H, length, D), mask


def cases():
    torch.manual_seed(0)
    q = rand(B, H, T, D)
    tokens = segment(B, T, causal_mask(T, q))
    padding = padding_mask(length_mask(torch.tensor([7, 1, 3, 7, 2, 5]), S), q)
    arbitrary = torch.where(torch.rand(T, S) < 0.4, -INF, 0.0).double()
    beams = torch.where(torch.rand(B, 1, T, S) < 0.4, -INF, 0.0).double()
    hidden = padding_mask(~length_mask(torch.tensor([2, 0, 1, 3, 2, 1]), T), q).mT  # (B, 1, T, 1)
    yield "tokens only", q, [tokens]
    yield "tokens without a mask", q, [segment(B, T)]
    yield "one shared segment only", q, [segment(1, S)]
    yield "shared prefix", q, [segment(1, P), tokens]
    yield "prefix per row", q, [segment(B, P), tokens]
    yield "padded prefixes per row", q, [segment(B, S, padding), tokens]
    yield "padded prefixes per row, padded rows", q, [segment(B, S, padding), segment(B, S, padding)]
    yield "padded rows", q, [segment(1, P), segment(B, S, padding)]
    yield "one mask for all rows", q, [segment(B, S, padding[2:3]), segment(1, S, padding[3:4])]
    yield "beams, each with its own keys", q, [segment(1, P), segment(B, S, beams)]
    yield "beams that look at nothing but their own token", q, [segment(B, S, beams - INF), tokens]
    yield "a mask that is no padding", q, [segment(B, S, arbitrary[None, None]), segment(1, S, arbitrary[None, None])]
    yield "one query", q[:, :, :1], [segment(1, P), segment(B, S, padding)]
    yield "an infix: hidden from some of the queries", q, [segment(1, P, hidden), tokens]
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    yield "as the model's projection lays it out", strided, [segment(1, P), tokens]


@pytest.mark.parametrize("q, segments", [pytest.param(q, segments, id=name) for name, q, segments in cases()])
def test_attend_is_its_definition(q, segments):
    """By every path, see BODIES. Segments: the tokens, or a prefix and they."""
    expected = definition(q, segments)
    single = [KV(*(x if x is None else x.float() for x in segment)) for segment in segments]
    for function in BODIES.values():
        *prefix, kv = (KV(*segment) for segment in segments)
        torch.testing.assert_close(function(q, kv, *(prefix or [None])), expected, rtol=0, atol=1e-13)
        *prefix, kv = single
        in_float32 = function(q.float(), kv, *(prefix or [None]))
        torch.testing.assert_close(in_float32.double(), expected, rtol=0, atol=1e-5)


def test_the_fused_body_has_the_same_gradients():
    torch.manual_seed(0)
    for _, q, segments in cases():
        leaves = [q.clone().requires_grad_()]
        parts = []
        for k, v, mask in segments:
            leaves += [k.clone().requires_grad_(), v.clone().requires_grad_()]
            parts.append(KV(leaves[-2], leaves[-1], mask))
        prefix = parts[0] if len(parts) == 2 else None
        upstream = rand(*q.shape)
        plain, other = (
            torch.autograd.grad(function(leaves[0], parts[-1], prefix), leaves, upstream)
            for function in (plain_attend, fused)
        )
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_masked_keys_do_not_count():
    """Not even when they are huge; the masks are exact zeros and infinities."""
    torch.manual_seed(0)
    q, (k, v, _) = rand(2, H, T, D), segment(2, S)
    lengths = torch.tensor([3, 5])
    expected = [attend(q[i : i + 1], KV(k[i : i + 1, :, :n], v[i : i + 1, :, :n])) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        k[i, :, n:], v[i, :, n:] = 1e3, 1e30
    mask = padding_mask(length_mask(lengths, S), q)
    torch.testing.assert_close(attend(q, KV(k, v, mask)), torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_masks(dtype):
    """True or 1, as a tokeniser writes it, where there is a token, wherever in the row that is."""
    real = length_mask(torch.tensor([2, 0, 3]), 3)
    assert real.dtype == torch.bool and real.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    mask = padding_mask(real.to(dtype), torch.empty(0, dtype=torch.bfloat16))
    assert mask.shape == (3, 1, 1, 3) and mask.dtype == torch.bfloat16
    assert mask.flatten().tolist() == [0, 0, -INF, -INF, -INF, -INF, 0, 0, 0]
    assert padding_mask(torch.tensor([[0, 1, 0, 1]]).to(dtype), rand(1)).flatten().tolist() == [-INF, 0, -INF, 0]


def test_causal_mask_is_lower_right():
    """The mask of T tokens behind P prefix positions is the last T rows of the mask of all P + T (anchors, trap 1)."""
    torch.manual_seed(0)
    q, (k, v, _) = rand(2, H, P + T, D), segment(2, P + T)
    whole = attend(q, KV(k, v, causal_mask(P + T, q)))[:, :, P:]
    tokens = KV(k[:, :, P:], v[:, :, P:], causal_mask(T, q))
    torch.testing.assert_close(attend(q[:, :, P:], tokens, KV(k[:, :, :P], v[:, :, :P])), whole)
    top_left = torch.full((T, P + T), -INF, dtype=q.dtype).triu(1)
    assert (attend(q[:, :, P:], KV(k, v, top_left)) - whole).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 4])
def test_gradient_of_the_prefix(rows):
    torch.manual_seed(0)
    q, k, v = rand(4, H, 2, D), rand(rows, H, 3, D).requires_grad_(), rand(rows, H, 3, D).requires_grad_()
    tokens = segment(4, 2, causal_mask(2, q))
    assert torch.autograd.gradcheck(lambda k, v: attend(q, KV(*tokens), KV(k, v)), (k, v))


def test_layer_prefixes():
    torch.manual_seed(0)
    like = torch.empty(0, dtype=torch.bfloat16)
    shared, rows = torch.randn(3, 2, H, P, D), torch.randn(3, 2, B, H, P, D)
    for kv, n in ((shared.unsqueeze(2), 1), (rows, B)):
        layers = layer_prefixes({"decoder": kv.squeeze(2)}, "decoder", 3, like)
        assert len(layers) == 3 and prefix_length({"decoder": kv.squeeze(2)}, "decoder") == P
        for layer, (k, v, mask) in enumerate(layers):
            assert k.shape == v.shape == (n, H, P, D) and k.dtype == v.dtype == like.dtype and mask is None
            assert torch.equal(k, kv[layer, 0].bfloat16()) and torch.equal(v, kv[layer, 1].bfloat16())
    for nothing in (None, {}, {"encoder": shared}, {"decoder": shared[..., :0, :]}):
        assert layer_prefixes(nothing, "decoder", 3, like) == [None] * 3 and prefix_length(nothing, "decoder") == 0


# ---- the cache ----

LENGTHS, ROOM, L, V = [6, 1, 4], 32, 3, 29


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT2({"vocab_size": V, "n_positions": ROOM, "n_embd": H * D, "n_layer": L, "n_head": H}).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.requires_grad_(False)


def make_prefix(kind, offset):
    shapes = {"shared": (L, 2, H, P, D), "rows": (L, 2, len(LENGTHS), H, P, D)}
    return None if kind == "none" else KVPrefix({"decoder": rand(*shapes[kind])}, offset)


def row_of(prefix, i):
    if prefix is None or prefix["decoder"].dim() == 5:
        return prefix
    return KVPrefix({"decoder": prefix["decoder"][:, :, i : i + 1]}, prefix.position_offset)


@pytest.mark.parametrize("kind, offset", [("none", None), ("shared", 0), ("shared", P), ("rows", 0), ("rows", P)])
def test_cache_equals_the_full_forward(model, kind, offset):
    """Ragged sources, one step each, then three beams each that are chosen anew after every step."""
    torch.manual_seed(1)
    prefix, beams = make_prefix(kind, offset), 3
    sources = [torch.randint(V, (n,)) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=V - 1)
    cache = model.prefill(ids, torch.tensor(LENGTHS), prefix)
    example = torch.arange(len(LENGTHS))
    texts = [source.tolist() for source in sources]  # what each row has read
    for _ in range(5):
        new = torch.randint(V, (len(texts),))
        texts = [[*text, i] for text, i in zip(texts, new.tolist(), strict=True)]
        logits = model.logits(model.step(new, cache))
        for row, text in enumerate(texts):
            expected = model(torch.tensor([text]), row_of(prefix, int(example[row])))[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-11)
        rows_each = len(texts) // len(LENGTHS)
        example = torch.arange(len(LENGTHS)).repeat_interleave(beams)
        rows = example * rows_each + torch.randint(rows_each, example.shape)
        cache.reorder(rows)
        texts = [texts[row] for row in rows]
    assert not cache.source and all(len(layer.k) == len(LENGTHS) for layer in cache.layers)  # stored once for all beams


def test_cache_outgrows_its_room_and_goes_on_with_fewer_examples(model):
    torch.manual_seed(1)
    prefix, beams, n = make_prefix("rows", P), 8, len(LENGTHS)
    sources = [torch.randint(V, (length,)) for length in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)
    cache = model.prefill(ids, torch.tensor(LENGTHS), prefix)
    model.step(torch.zeros(n, dtype=torch.long), cache)
    cache.reorder(torch.arange(n).repeat_interleave(beams))
    steps = 2 * cache_module.ROOM // beams
    new = torch.randint(V, (steps, n * beams))
    for tokens in new[:-1]:
        model.step(tokens, cache)
    cache.keep(torch.tensor([1]))
    logits = model.logits(model.step(new[-1, beams : 2 * beams], cache))
    text = torch.cat([sources[1], torch.tensor([0]), new[:, 2 * beams - 1]])
    torch.testing.assert_close(logits[-1], model(text[None], row_of(prefix, 1))[0, -1], rtol=0, atol=1e-11)


def test_pads_change_nothing(model):
    torch.manual_seed(2)
    ids = torch.randint(V, (2, 9))
    changed = ids.clone()
    changed[0, 4:] = 7
    prefix = make_prefix("shared", P)
    torch.testing.assert_close(model(ids, prefix)[0, :4], model(changed, prefix)[0, :4], rtol=0, atol=1e-13)
    caches = [model.prefill(x, torch.tensor([4, 9]), prefix) for x in (ids, changed)]
    new = torch.tensor([1, 2])
    torch.testing.assert_close(model.step(new, caches[0]), model.step(new, caches[1]), rtol=0, atol=1e-13)


def test_an_empty_source(model):
    """Only the prefix, or nothing at all, before the first new token."""
    for prefix in (None, make_prefix("shared", P)):
        cache = model.prefill(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0, 1]), prefix)
        logits = model.logits(model.step(torch.tensor([3, 4]), cache))
        torch.testing.assert_close(logits[0], model(torch.tensor([[3]]), prefix)[0, -1])
        torch.testing.assert_close(logits[1], model(torch.tensor([[0, 4]]), prefix)[0, -1])
