"""torch.compile captures both models whole, with each kind of prefix, and computes the same."""

import pytest
import torch
from torch._dynamo.utils import counters

from minprefix.core import kernels
from minprefix.core.attention import KV
from minprefix.core.bart import BART
from minprefix.core.generate import generate_ids
from minprefix.core.gpt2 import GPT2
from minprefix.core.kernels import compile_layers, compiled_layers
from minprefix.core.prefix import Prefix, stack_prefixes
from minprefix.core.prefix_kv import KVInfix
from minprefix.methods.baselines import Adapters
from minprefix.system.errors import InputError
from tests.helpers import failing_compile

pytestmark = pytest.mark.slow
V, B = 31, 3
SIZES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip
KINDS = [("gpt2", "folded"), ("gpt2", "stack"), ("gpt2", "infix"), ("bart", "folded"), ("bart", "stack")]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model(name):
    torch.manual_seed(0)
    if name == "gpt2":
        model = GPT2({"vocab_size": V, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2})
    else:
        model = BART({"vocab_size": V, "max_position_embeddings": 64, **SIZES})
    return model.requires_grad_(False)


def make_prefix(model, kind):
    folded = Prefix(model, 5, mlp_width=4).fold()
    if kind == "infix":
        return KVInfix(folded.kv, 5)
    shorter = Prefix(model, 2, mlp_width=4).fold()
    return {"dict": folded.kv, "folded": folded, "stack": stack_prefixes([folded, shorter], [0, 1, 1])}[kind]


def inputs(model, T):
    ids = torch.randint(V, (B, T))
    if not model.encoder_decoder:
        return (ids,)
    return ids, ids[:, : T - 3], torch.arange(T) < torch.tensor([[T], [T - 1], [T - 4]])


@pytest.mark.parametrize("name, kind", [*KINDS, ("gpt2", "dict")])
def test_hidden_states_are_one_graph_for_all_lengths(name, kind):
    """Of 16 tokens or more, that is: `attend` computes fewer otherwise."""
    model = make_model(name)
    prefix = make_prefix(model, kind)
    if kind == "infix":
        prefix = prefix.with_source_lengths(torch.tensor([6, 2, 4]))
    compiled = torch.compile(model.hidden_states, fullgraph=True, dynamic=True, backend="eager")
    for T in (33, 20, 48, 27):
        x = inputs(model, T)
        torch.testing.assert_close(compiled(*x, prefix=prefix), model.hidden_states(*x, prefix=prefix))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name, kind", KINDS)
@torch.inference_mode()
def test_a_decoding_step_is_one_graph_while_the_cache_has_room(name, kind):
    """Two others are for the first token, of one beam, and for the second, which finds no room."""
    model = make_model(name)
    prefix = make_prefix(model, kind)
    compiled = torch.compile(model.step, fullgraph=True, dynamic=True, backend="eager")
    states = []
    for step in (model.step, compiled):
        cache = model.prefill(torch.arange(27).view(B, 9), torch.tensor([9, 4, 6]), prefix)
        states.append([step(torch.tensor([1, 2, 3]), cache)])
        cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
        states[-1] += [step(torch.arange(i, i + 6), cache) for i in range(6)]
    torch.testing.assert_close(*states)
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_gradients_of_a_compiled_model(name):
    model = make_model(name).double()
    prefix, x, gradients = Prefix(model, 5, mlp_width=4).double(), inputs(model, 20), []
    for states in (model.hidden_states, torch.compile(model.hidden_states, fullgraph=True, backend="aot_eager")):
        states(*x, prefix=prefix()).square().sum().backward()
        gradients.append([p.grad for p in prefix.parameters()])
        prefix.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


# ---- the layers alone, as in training and generation on CUDA ----


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Layers are compiled, without the kernels that inductor would generate."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compile_(function, dynamic=dynamic, backend="eager")
    )
    monkeypatch.setattr(kernels, "can_compile_layers", lambda model: True)
    kernels.compiled.cache_clear()
    yield
    kernels.compiled.cache_clear()


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_layers_share_few_programs_over_training_and_dev_losses(name, as_on_cuda):
    """One with gradients, one without."""
    model = make_model(name)
    prefix = Prefix(model, 5, mlp_width=4)
    lengths = (20, 33, 48, 27)
    x = [inputs(model, T) for T in lengths]

    def gradients():
        for a in x:
            model.hidden_states(*a, prefix=prefix()).square().sum().backward()
            with torch.no_grad():
                model.hidden_states(*a, prefix=prefix())
        found = [p.grad for p in prefix.parameters()]
        prefix.zero_grad()
        return found

    expected = gradients()
    with compiled_layers(model):
        assert counters["stats"]["unique_graphs"] == 0
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= (2 if name == "gpt2" else 4)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_texts_with_compiled_layers(name, as_on_cuda):
    model = make_model(name)
    prefix = Prefix(model, 5, mlp_width=4).fold()
    sources = [[*range(1, n)] for n in (4, 19, 8, 11, 22)]
    options = {"batch_size": 3, "beams": 3, "max_new_tokens": 12}
    expected = generate_ids(model, sources, 1, 2, prefix, **options)
    with compiled_layers(model):
        assert generate_ids(model, sources, 1, 2, prefix, **options) == expected
    assert 0 < counters["stats"]["unique_graphs"] <= 16 and counters["graph_break"] == {}


def test_layers_are_compiled_only_where_it_pays(as_on_cuda, monkeypatch):
    model = make_model("gpt2")
    with compiled_layers(model):
        assert compile_layers(model) == []  # they are already
        assert "forward" in vars(model.h[0])
    Adapters(model, 2)
    assert compile_layers(model) == []
    monkeypatch.undo()
    assert compile_layers(make_model("bart")) == []  # on a CPU


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), InputError("a text is too long")])
def test_an_error_of_another_kind_is_not_taken_for_a_broken_compiler(error, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", failing_compile(error))
    monkeypatch.setattr(kernels, "can_compile_layers", lambda model: True)
    kernels.compiled.cache_clear()
    model = make_model("gpt2")
    with compiled_layers(model), pytest.raises(type(error)):
        model(torch.ones(1, 3, dtype=torch.long))
    kernels.compiled.cache_clear()
    assert capsys.readouterr().err == ""


def test_layers_run_as_they_are_where_compiling_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", failing_compile(RuntimeError("no Triton")))
    monkeypatch.setattr(kernels, "can_compile_layers", lambda model: True)
    kernels.compiled.cache_clear()
    model, ids = make_model("gpt2"), torch.ones(1, 3, dtype=torch.long)
    expected = model(ids)
    with compiled_layers(model):
        assert torch.equal(model(ids), expected) and torch.equal(model(ids), expected)
    kernels.compiled.cache_clear()
    assert capsys.readouterr().err == "torch.compile does not work here, so this is slower (no Triton)\n"


def test_a_layer_by_inductor():
    """In float32, with its gradients: what CUDA runs, but for the code that is generated."""
    model = make_model("gpt2")
    block, x = model.h[0], torch.randn(2, 20, 16, requires_grad=True)
    kv, mask = torch.randn(2, 1, 2, 5, 8, requires_grad=True), torch.full((20, 20), -torch.inf).triu(1)[None, None]
    results = []
    for function in (block, torch.compile(block, dynamic=True, fullgraph=True)):
        y = function(x, mask, KV(kv[0], kv[1]))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, kv])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
