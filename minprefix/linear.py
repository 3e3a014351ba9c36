"""Products with weight matrices: as torch makes them, or while texts are generated on CPU with packed weights.

Generation multiplies few rows at a time, so most of the time goes into reading the weights. oneDNN reads them about
twice as fast in a layout of its own.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """x (..., C) times weight (N, C), plus bias (N,) or None -> (..., N)."""
    packed = getattr(weight, "packed", None)
    if packed is None or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def pack_weights(model):
    """From now on the model's products go through packed copies of its weights, which must not change -> the weights.

    Without gradients, that is, and in bfloat16 on a CPU that multiplies it; for any other model nothing changes.
    """
    weights = {model.head.weight, *(layer.weight for layer in model.modules() if isinstance(layer, Linear))}
    weights = [w for w in weights if w.device.type == "cpu" and w.dtype == torch.bfloat16 and packs_bfloat16()]
    for weight in weights:
        weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return weights


@contextmanager
def packed_weights(model):
    """`pack_weights` within the context."""
    weights = pack_weights(model)
    try:
        yield
    finally:
        for weight in weights:
            del weight.packed


def packs_bfloat16():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
