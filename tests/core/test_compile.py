"""torch.compile captures both models whole, with each kind of prefix, and computes the same."""

import pytest
import torch
from torch._dynamo.utils import counters

from minprefix.core.bart import BART
from minprefix.core.gpt2 import GPT2
from minprefix.core.prefix import Prefix, stack_prefixes
from minprefix.core.prefix_kv import KVInfix

V, B = 31, 3
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
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
        model = GPT2({"vocab_size": V, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2})
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
