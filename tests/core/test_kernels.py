"""Fast paths give the same numbers, are used only where asked for, and are never a condition."""

import pytest
import torch

from minprefix import generate, load_model, load_tokenizer
from minprefix.core import kernels
from minprefix.core.kernels import ACTIVATIONS, Linear, can_pack_bfloat16, gelu_new, linear, packed_weights
from tests.helpers import failing_compile
from tests.tiny import write_tiny_bart, write_tiny_model

needs_onednn = pytest.mark.skipif(not can_pack_bfloat16(), reason="oneDNN makes no bfloat16 products on this CPU")
WRITERS = pytest.mark.parametrize("write", [write_tiny_model, write_tiny_bart])


def packed_names(model):
    return {name for name, p in model.named_parameters() if hasattr(p, "packed")}


@needs_onednn
@WRITERS
def test_every_matrix_of_a_product_is_packed_and_only_within(tmp_path, write):
    model = load_model(write(tmp_path / "model"), dtype=torch.bfloat16)
    expected = {name + ".weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    expected |= {name for name, p in model.named_parameters() if p is model.head.weight}
    assert len(expected) > 4
    with pytest.raises(KeyboardInterrupt), packed_weights(model):
        assert packed_names(model) == expected
        raise KeyboardInterrupt
    assert packed_names(model) == set()
    for dtype in (torch.float32, torch.float64):
        with packed_weights(model.to(dtype)):
            assert packed_names(model) == set()


@needs_onednn
@pytest.mark.parametrize("rows", [(), (1,), (5,), (3, 7), (300,)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_as_exact_as_a_plain_one(rows, bias):
    torch.manual_seed(0)
    layer = Linear(96, 200, bias=bias).bfloat16().requires_grad_(False)
    layer.weight.data = layer.weight.data.T.contiguous().T  # as GPT-2's weights lie in memory
    layer.head = layer
    x = torch.randn(*rows, 96).bfloat16()
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = layer(x)
    with packed_weights(layer), torch.no_grad():
        packed = linear(x, layer.weight, layer.bias)
    assert packed.shape == plain.shape and packed.dtype == torch.bfloat16
    assert (packed - exact).abs().max() <= 2 * (plain - exact).abs().max()


@needs_onednn
@pytest.mark.parametrize("rows", [1, 40, 700])
@pytest.mark.parametrize("C, N", [(96, 200), (96, 96), (200, 96)])
def test_a_packed_product_in_training_is_as_exact_and_so_is_its_gradient(rows, C, N):
    torch.manual_seed(0)
    layer = Linear(C, N).bfloat16().requires_grad_(False)
    layer.head = Linear(8, 8).bfloat16()  # another: the head's own weights stay where they are
    x, upstream = torch.randn(rows, C).bfloat16(), torch.randn(rows, N).bfloat16()
    exact = [torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()),
             upstream.double() @ layer.weight.double()]  # fmt: skip

    def product():
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(upstream)
        return [y, leaf.grad]

    plain = product()
    with packed_weights(layer, training=True):
        packed = product()
        assert "FrozenProduct" in type(layer(x.clone().requires_grad_()).grad_fn).__name__
    for a, b, true in zip(packed, plain, exact, strict=True):
        assert a.shape == b.shape and a.dtype == torch.bfloat16
        assert (a - true).abs().max() <= 2 * (b - true).abs().max()


@needs_onednn
@WRITERS
def test_weights_are_in_memory_once_in_training_and_unpacked_bit_for_bit(tmp_path, write):
    model = load_model(write(tmp_path / "model"), dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with packed_weights(model, training=True):
        packed = {name for name, p in model.named_parameters() if p.isnan().all()}
        assert packed == {n for n in packed_names(model) if model.get_parameter(n) is not model.head.weight} != set()
        assert all(p.shape == before[name].shape for name, p in model.named_parameters())
        assert all(model.get_parameter(name).untyped_storage().nbytes() == 2 for name in packed)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@needs_onednn
@WRITERS
def test_without_training_gradients_go_through_the_weights_themselves(tmp_path, write):
    model = load_model(write(tmp_path / "model"), dtype=torch.bfloat16)
    states = torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)
    with packed_weights(model):
        model.logits(states).sum().backward()
    assert states.grad.abs().sum() > 0


@needs_onednn
@WRITERS
def test_weights_under_training_are_not_packed(tmp_path, write):
    model = load_model(write(tmp_path / "model"), dtype=torch.bfloat16)
    model.head.weight.requires_grad_(True)
    with packed_weights(model, training=True):
        assert not hasattr(model.head.weight, "packed") and packed_names(model)
        with packed_weights(model):  # as generate() does
            pass
        assert packed_names(model)
    assert not packed_names(model)


@needs_onednn
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_after_a_product_agree(name):
    torch.manual_seed(0)
    layer = Linear(64, 96).bfloat16().requires_grad_(False)
    layer.head = layer
    x = 3 * torch.randn(50, 64).bfloat16()
    with torch.no_grad(), packed_weights(layer):
        fused = layer(x, name)
    exact = ACTIVATIONS[name](torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()))
    assert (fused - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("size", [100, 2**20])
def test_gelu_new_and_its_gradient_in_bfloat16(size):
    torch.manual_seed(0)
    x, upstream = 3 * torch.randn(size), torch.randn(size)
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        leaf = x.bfloat16().to(dtype).requires_grad_()
        y = gelu_new(leaf)
        y.backward(upstream.bfloat16().to(dtype))
        results[dtype] = y.detach().double(), leaf.grad.double()
    for rounded, exact in zip(*results.values(), strict=True):
        torch.testing.assert_close(rounded, exact, rtol=2**-5, atol=2**-6)


@needs_onednn
@WRITERS
def test_texts_are_generated_with_packed_weights(tmp_path, write, monkeypatch):
    folder = write(tmp_path / "model")
    model, tokenizer = load_model(folder, dtype=torch.bfloat16), load_tokenizer(folder)
    step, seen = model.step, []
    monkeypatch.setattr(model, "step", lambda *args: (seen.append(packed_names(model)), step(*args))[1])
    generate(model, tokenizer, ["abc"], beams=2, max_new_tokens=3)
    assert len(seen) == 3 and all(seen) and not packed_names(model)


# ---- torch.compile ----


def double(x):
    return 2 * x


def test_where_compiling_fails_the_function_itself_is_used_and_that_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", failing_compile(RuntimeError("no C++\ncompiler")))
    function = kernels.compiled.__wrapped__(double)
    large = torch.ones(kernels.MIN_ELEMENTS_TO_COMPILE)
    assert torch.equal(function(large), 2 * large) and torch.equal(function(large), 2 * large)
    assert capsys.readouterr().err == "torch.compile does not work here, so this is slower (no C++ compiler)\n"


def test_small_tensors_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: None)
    assert torch.equal(kernels.compiled.__wrapped__(double)(torch.ones(3)), 2 * torch.ones(3))


def test_want_of_memory_is_not_mistaken_for_a_broken_compiler(monkeypatch):
    monkeypatch.setattr(
        torch, "compile", failing_compile(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        kernels.compiled.__wrapped__(double)(torch.ones(kernels.MIN_ELEMENTS_TO_COMPILE))
