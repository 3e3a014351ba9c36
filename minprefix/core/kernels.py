"""Fast paths of single operations: packed products on CPU, GPT-2's activation, functions by torch.compile. Read last.

On CPU oneDNN holds frozen bfloat16 weights in a layout of its own (`packed_weights`), which it reads about twice as
fast: generation multiplies few rows at a time, so that most of its time goes into reading weights; training gains too.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minprefix.system.errors import InputError, out_of_memory

MIN_ELEMENTS_TO_COMPILE = 2**19  # of a function's first argument; below, compiling gains nothing
MAX_RECOMPILES = 16  # per function; training needs up to 9: with gradients or not, few tokens, a single row
T = TypeVar("T")
POST_OPS = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}


class Linear(nn.Linear):
    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x (..., C) times weight (N, C), plus bias (N,) or None, through one of `ACTIVATIONS` or none -> (..., N)."""
    packed = getattr(weight, "packed", None)
    if packed is not None and not (torch.is_grad_enabled() and x.requires_grad):
        return packed_product(x, packed, bias, len(weight), activation)
    product = F.linear if packed is None else FrozenProduct.apply
    y = product(x, weight, bias)
    return ACTIVATIONS[activation](y) if activation else y


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None, N: int, activation: str | None = None) -> Tensor:
    """x (..., C) times a packed matrix (N, C), likewise -> (..., N)."""
    post_op, algorithm = POST_OPS[activation]
    C, rows = x.size(-1), x.reshape(-1, x.size(-1))
    # Measured: with more rows than these, and N <= C, oneDNN takes twice as long per row.
    most = len(rows) if N > C else 300 if N == C else 448
    if len(rows) <= most:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, post_op, [], algorithm)
    parts = rows.chunk(-(-len(rows) // most))
    parts = [torch.ops.mkldnn._linear_pointwise(part, packed, bias, post_op, [], algorithm) for part in parts]
    return torch.cat(parts).view(*x.shape[:-1], N)


class FrozenProduct(torch.autograd.Function):
    """A packed product in training: the gradient of x is a product with the packed transpose; there is no other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return packed_product(x, weight.packed, bias, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        transposed = getattr(ctx.weight, "packed_transposed", None)
        if transposed is None:  # packed for generation, or the head, of which loss.py takes the gradient
            return gradient @ ctx.weight, None, None
        return packed_product(gradient, transposed, None, ctx.weight.size(1)), None, None


def pack_weights(model: Any, training: bool = False) -> None:  # a GPT2 or BART, which import this file
    """From now on the model's products go through its frozen weights in packed form, which must not change.

    training: with gradients for the inputs, too; to save memory the weights themselves are then empty (but for the
    head's, which may be the embeddings). Only bfloat16 weights are packed, on a CPU that supports it.
    """
    weights = {model.head.weight, *(layer.weight for layer in model.modules() if isinstance(layer, Linear))}
    for weight in (w for w in weights if can_pack(w) and not hasattr(w, "packed")):
        weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        if training and weight is not model.head.weight:
            weight.packed_transposed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().T.contiguous())
            weight.data = weight.new_full((), torch.nan).expand(weight.shape)  # one number, in the weight's shape
    head = model.head.weight
    if training and pads_head(head) and not hasattr(head, "padded"):
        head.padded = padded_head(head.detach(), model.logits(head.new_zeros(head.size(1))))


def pads_head(weight: Tensor) -> bool:
    return weight.is_cuda and not weight.requires_grad and len(weight) % 64 > 0


def padded_head(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A head's weight (V, C) and bias (V,), padded to a multiple of 64 entries.

    CUDA takes three times as long for products with GPT-2's 50,257 entries. The padding has a bias of -inf, so that the
    loss stays the same.
    """
    more = -len(weight) % 64
    return F.pad(weight, (0, 0, 0, more)), F.pad(bias.detach(), (0, more), value=float("-inf"))


@contextmanager
def packed_weights(model: Any, training: bool = False) -> Iterator[None]:
    """`pack_weights` within the context."""
    before = {weight for weight in model.parameters() if hasattr(weight, "packed") or hasattr(weight, "padded")}
    try:
        pack_weights(model, training)
        yield
    finally:  # also where packing itself was interrupted
        for weight in set(model.parameters()) - before:
            if hasattr(weight, "padded"):
                del weight.padded
            if hasattr(weight, "packed"):
                if hasattr(weight, "packed_transposed"):
                    weight.data = weight.packed.to_dense()
                    del weight.packed_transposed
                del weight.packed


def can_pack(weight: Tensor) -> bool:
    return (weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not weight.requires_grad
            and can_pack_bfloat16())  # fmt: skip


def can_pack_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- GPT-2's activation, of which torch's own is slow on CPU ----

CUBIC, RATE = 0.044715, 2 * math.sqrt(2 / math.pi)  # GELU is about x * sigmoid(RATE * (x + CUBIC * x ** 3))


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's GELU, by the tanh approximation."""
    if torch.compiler.is_compiling():
        return gelu_by_sigmoid(x)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad:
        return GeluNew.apply(x)
    return F.gelu(x, approximate="tanh")


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """The same by tanh(u) = 2 sigmoid(2u) - 1, which inductor's CPU code computes twice as fast."""
    return x * torch.sigmoid(RATE * x * (1 + CUBIC * x * x))


def gelu_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """dLoss/dx from `gradient`, dLoss/dgelu_new(x)."""
    s = torch.sigmoid(RATE * x * (1 + CUBIC * x * x))
    return gradient * (s + x * s * (1 - s) * RATE * (1 + 3 * CUBIC * x * x))


class GeluNew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return compiled(gelu_by_sigmoid)(x.reshape(-1)).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return compiled(gelu_gradient)(x.reshape(-1), gradient.reshape(-1)).view(x.shape)


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": gelu_new, "relu": F.relu}


# ---- torch.compile ----


@functools.cache
def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function, compiled at its first call on a large tensor, for all sizes at once; as it is where that fails.

    A function whose first argument is no tensor is compiled at its first call.
    """
    fast: Callable[..., T] | None = None
    works = True

    def call(*args: Any) -> T:
        nonlocal fast, works
        if not works or (isinstance(args[0], Tensor) and args[0].numel() < MIN_ELEMENTS_TO_COMPILE):
            return function(*args)
        try:
            if fast is None:  # torch.compile reads files: it fails in an ASCII locale
                fast = torch.compile(function, dynamic=True)
                torch._dynamo.config.recompile_limit = max(MAX_RECOMPILES, torch._dynamo.config.recompile_limit)
            return fast(*args)
        except Exception as error:  # of nearly any kind: no compiler, a broken one, a folder that cannot be written
            if out_of_memory(error) or isinstance(error, InputError):
                raise
            result = function(*args)  # raises what is wrong with the arguments, not with the compiler
            works, reason = False, " ".join(str(error).split())
            print(f"torch.compile does not work here, so this is slower ({reason:.200})", file=sys.stderr)
            return result

    return call


def compile_layers(model: Any) -> list[nn.Module]:
    """From now on each layer of a model on CUDA runs compiled -> the layers that did not before.

    All layers of a kind share their programs. A model with hooks stays as it is: programs do not know of them.
    """
    if not can_compile_layers(model) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return []
    layers = [*model.encoder.layers, *model.decoder.layers] if model.encoder_decoder else model.h
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = functools.partial(run_compiled, type(layer).forward, layer)
    return layers


def run_compiled(forward: Callable[..., Tensor], layer: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """A layer's `forward`, compiled. The first layer's input is given a gradient like the others': one program."""
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return compiled(forward)(layer, x, *args)


@contextmanager
def compiled_layers(model: Any) -> Iterator[None]:
    """`compile_layers` within the context."""
    layers = compile_layers(model)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def can_compile_layers(model: Any) -> bool:
    """On a CPU, products with packed weights cannot be compiled, and nearly all of the time goes into products."""
    return model.head.weight.is_cuda
