"""What CUDA graphs need (padded batches, a cache of fixed size) changes no loss, gradient or text. Without a GPU."""

import math

import pytest
import torch

from minprefix import Prefix, load_model, load_tokenizer, stack_prefixes
from minprefix.core import cuda_graphs, kernels
from minprefix.core import generate as generate_module
from minprefix.core.attention import KV
from minprefix.core.batches import collate, loss_scale, make_batch, padding_fits
from minprefix.core.cache import StaticCache
from minprefix.core.cuda_graphs import DecodingGraphs, TrainingGraphs
from minprefix.core.generate import generate_ids, search_ids
from minprefix.core.loss import add_gradients, target_loss
from minprefix.core.training import train
from minprefix.methods.baselines import make_method
from tests.helpers import singles
from tests.tiny import write_tiny_bart, write_tiny_model

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SOURCES = [[*range(5, 5 + n)] for n in (4, 11, 3, 8, 9)]
GROUPS = [(source, [[*range(20, 20 + i), 2], [7, 2]][: 1 + i % 2]) for i, source in enumerate(SOURCES, 2)]
METHODS = pytest.mark.parametrize("kind, method", [
    *(("gpt2", method) for method in ("prefix", "infix", "embedding", "finetune", "top2", "adapter")),
    *(("bart", method) for method in ("prefix", "finetune", "top2", "adapter")),
])  # fmt: skip
BOTH = pytest.mark.parametrize("kind", ["gpt2", "bart"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"gpt2": write_tiny_model(folder / "gpt2"), "bart": write_tiny_bart(folder / "bart")}


def load(folder):
    return load_model(folder).double(), load_tokenizer(folder)


def gradients(trainable):
    found = [p.grad.clone() for p in trainable.parameters()]
    trainable.zero_grad()
    return found


@METHODS
def test_padded_batches_have_the_same_loss_and_gradients(folders, kind, method):
    model, tokenizer = load(folders[kind])
    trainable = make_method(method, model, length=3, adapter_width=2).double()
    graphs = TrainingGraphs(model, trainable)
    for groups in (GROUPS, singles([(s, t) for s, targets in GROUPS for t in targets]), GROUPS[:2], GROUPS):
        expected = add_gradients(model, trainable, collate(groups, tokenizer, model), 0.25), gradients(trainable)
        batch = collate(groups, tokenizer, model, 8, 8 * len(groups))
        assert all(ids.size(1) % 8 == 0 for ids in batch.inputs) and len(batch.labels) % (8 * len(groups)) == 0
        found = graphs.add_gradients(batch, 0.25), gradients(trainable)
        torch.testing.assert_close(found, expected, **EXACT)
    assert len(graphs.graphs) == 3


@BOTH
def test_gradients_of_several_batches_add_up(folders, kind):
    """Also where one of them has no graph, and where they are captured only then."""
    model, tokenizer = load(folders[kind])
    prefix = Prefix(model, 3, mlp_width=4).double()
    graphs, parts = TrainingGraphs(model, prefix), [GROUPS[:2], GROUPS[2:4], GROUPS[4:], GROUPS[:2]]
    for part in parts:
        add_gradients(model, prefix, collate(part, tokenizer, model), 0.5)
    expected = gradients(prefix)
    for sizes in ([8, 8, 8, 8], [8, 1, 8, 8], [1, 8, 1, 8]):
        graphs.graphs.clear()
        for part, size in zip(parts, sizes, strict=True):
            graphs.add_gradients(collate(part, tokenizer, model, size), 0.5)
        torch.testing.assert_close(gradients(prefix), expected, **EXACT)
        for part, size in zip(parts, sizes, strict=True):
            graphs.add_gradients(collate(part, tokenizer, model, size), 0.5)
        torch.testing.assert_close(gradients(prefix), expected, **EXACT)


@pytest.mark.parametrize("kind, group, fits", [
    ("gpt2", ([5] * 40, [[6] * 13]), True), ("gpt2", ([5] * 240, [[6] * 8]), True),
    ("gpt2", ([5] * 240, [[6] * 9]), False), ("gpt2", ([5] * 200, [[6] * 30, [7] * 30]), False),
    ("bart", ([5] * 256, [[6] * 248]), True), ("bart", ([5] * 256, [[6] * 249]), False),
    ("bart", ([5] * 250, [[6] * 9]), True),
])  # fmt: skip
def test_rows_are_padded_where_they_fit(folders, kind, group, fits):
    """Into the 256 positions, of which the prefix takes 3. Others get no graph."""
    model, tokenizer = load(folders[kind])
    assert model.n_positions == 256 and padding_fits([group], model, 3, 8) == fits
    graphs = TrainingGraphs(model, Prefix(model, 3))
    graphs.add_gradients(collate([group], tokenizer, model, 8 if fits else 1), 1.0)
    assert len(graphs.graphs) == fits


@BOTH
def test_training_batches_are_padded_also_on_a_cpu(folders, kind):
    model, tokenizer = load(folders[kind])
    batch = make_batch(GROUPS, tokenizer, model, 3)
    assert batch.padded and len(batch.labels) % 16 == 0 and all(ids.size(1) % 4 == 0 for ids in batch.inputs)
    longest = [([5] * 250, [[6] * 3])] if kind == "gpt2" else [([5] * 256, [[6] * 253])]
    batch = make_batch(longest, tokenizer, model, 3)
    assert not batch.padded and batch.inputs[-1].size(1) == (253 if kind == "gpt2" else 256)
    target_loss(model, batch, Prefix(model, 3).double()())


@BOTH
def test_a_run_is_the_same(folders, kind, tmp_path, monkeypatch):
    model, tokenizer = load(folders[kind])
    pairs = [(source, target) for source, targets in GROUPS for target in targets]
    logs = []
    for graphs in (False, True):
        monkeypatch.setattr(cuda_graphs, "on_cuda", lambda model, graphs=graphs: graphs)
        torch.manual_seed(0)
        prefix = Prefix(model, 3, mlp_width=4).double()
        logs.append(train(model, prefix, tokenizer, pairs, pairs, tmp_path / str(graphs), steps=6, batch_size=4,
                          lr=1e-2, eval_every=3, group=2, accumulate=2)[0])  # fmt: skip
    for row, other in zip(*logs, strict=True):
        assert row["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-10)
        assert row.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-10)


@pytest.mark.parametrize("scale", [0.5, 0.0])
@BOTH
def test_a_padded_head_has_the_same_loss_and_gradients(folders, kind, scale, monkeypatch):
    model, tokenizer = load(folders[kind])
    prefix, batch = Prefix(model, 3, mlp_width=4).double(), collate(GROUPS, tokenizer, model)
    if kind == "bart":
        model.final_logits_bias.normal_()
    expected = add_gradients(model, prefix, batch, scale), gradients(prefix)
    monkeypatch.setattr(kernels, "pads_head", lambda weight: True)
    with kernels.packed_weights(model, training=True):
        weight, bias = model.head.weight.padded
        assert len(weight) == len(bias) == 64 * math.ceil(model.config["vocab_size"] / 64)
        torch.testing.assert_close((add_gradients(model, prefix, batch, scale), gradients(prefix)), expected, **EXACT)
        with torch.no_grad():
            torch.testing.assert_close(target_loss(model, batch, prefix()), expected[0], **EXACT)
    assert not hasattr(model.head.weight, "padded")


def prefixes(model):
    torch.manual_seed(1)
    one, other = (Prefix(model, length, mlp_width=0).double().fold() for length in (5, 3))
    rows = [i % 2 for i in range(len(SOURCES))]
    return {"none": None, "shared": one, "a row each": stack_prefixes([one, other], rows)}


@BOTH
@pytest.mark.parametrize("options", [{"beams": 1}, {"beams": 3}, {"beams": 3, "no_repeat_ngram": 2, "returned": 2},
                                     {"beams": 2, "forced_first": 7, "min_new_tokens": 3}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["none", "shared", "a row each"])
def test_texts_are_the_same_with_a_cache_of_fixed_size(folders, kind, options, name, monkeypatch):
    """Over several batches, the last of which has fewer texts."""
    model, _ = load(folders[kind])
    prefix, options = prefixes(model)[name], {"max_new_tokens": 20, "batch_size": 2, **options}
    expected = search_ids(model, SOURCES, 1, 2, prefix, **options)
    loads = force_graphs(monkeypatch)
    found = search_ids(model, SOURCES, 1, 2, prefix, **options)
    assert loads == [True, False, True]  # whether a batch needed a new cache
    for mine, others in zip(found, expected, strict=True):
        for (ids, score), (other_ids, other_score) in zip(mine, others, strict=True):
            assert ids == other_ids and score == pytest.approx(other_score, rel=1e-10)


def test_draws_are_the_same(folders, monkeypatch):
    model, _ = load(folders["gpt2"])
    options = {"beams": 1, "sample": True, "max_new_tokens": 20}
    expected = generate_ids(model, SOURCES, 1, 2, generator=torch.Generator().manual_seed(3), **options)
    force_graphs(monkeypatch)
    assert generate_ids(model, SOURCES, 1, 2, generator=torch.Generator().manual_seed(3), **options) == expected


def force_graphs(monkeypatch):
    """What is done on CUDA is done here, too -> a list that says of each batch whether it needed a new cache."""
    load, loads = DecodingGraphs.load, []

    def noted(graphs, cache):
        before, graph = graphs.graph, load(graphs, cache)
        loads.append(graph is not before)
        return graph

    monkeypatch.setattr(DecodingGraphs, "load", noted)
    monkeypatch.setattr(cuda_graphs, "on_cuda", lambda model: True)
    monkeypatch.setattr(generate_module, "CHECK_EVERY", {"cpu": 8})
    return loads


def test_few_tokens_are_not_captured(folders, monkeypatch):
    model, _ = load(folders["gpt2"])
    loads = force_graphs(monkeypatch)
    generate_ids(model, SOURCES, 1, 2, max_new_tokens=7)
    assert loads == []


def test_the_step_averages_as_the_authors_do(folders):
    assert loss_scale(load(folders["gpt2"])[0], GROUPS) == 1 / 7
    assert loss_scale(load(folders["bart"])[0], GROUPS) == 1 / sum(len(t) for _, ts in GROUPS for t in ts)


@METHODS
def test_a_step_reads_no_number_and_stays_on_its_device(folders, kind, method):
    """A graph can record neither; on the meta device, which holds no numbers, both are errors."""
    model, tokenizer = load(folders[kind])
    trainable = make_method(method, model, length=3, adapter_width=2)
    batch = collate(GROUPS, tokenizer, model, 8).to("meta")
    add_gradients(model.to("meta"), trainable.to("meta"), batch, 0.5)
    assert all(p.grad.is_meta for p in trainable.parameters())


@BOTH
@pytest.mark.parametrize("name", ["none", "shared", "a row each"])
def test_a_decoding_step_reads_no_number_and_stays_on_its_device(folders, kind, name):
    model, _ = load(folders[kind])
    prefix, ids = prefixes(model)[name], torch.zeros(5, 11, dtype=torch.long)
    cache = model.prefill(ids, torch.tensor([len(source) for source in SOURCES]), prefix)
    fixed = StaticCache(cache, 3, 6)
    move(fixed, "meta")
    model.to("meta")
    for _ in range(2):
        states = model.step(torch.zeros(15, dtype=torch.long, device="meta"), fixed)
        fixed.reorder(torch.zeros(15, dtype=torch.long, device="meta"))
    assert states.is_meta and fixed.mask.is_meta


def move(cache, device):
    cache.slots, cache.mask, cache.position = (x.to(device) for x in (cache.slots, cache.mask, cache.position))
    cache.source = [KV(*(x.to(device) for x in kv)) for kv in cache.source]
    for layer in cache.layers:
        layer.k, layer.v, layer.slots = layer.k.to(device), layer.v.to(device), cache.slots
