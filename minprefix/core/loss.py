"""The loss of both models: the negative log-likelihood of the target's tokens, its logits computed some rows at a time.

Shapes: N target tokens of a batch, C model dimension, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minprefix.core.batches import IGNORE, Batch
from minprefix.core.kernels import compiled
from minprefix.core.model import Model
from minprefix.core.prefix_kv import AnyPrefix, KVInfix

LOGIT_ROWS = {"cpu": 320, "cuda": 2048}  # max target tokens per chunk; few fit into a CPU's cache


def target_loss(model: Model, batch: Batch, prefix: AnyPrefix | None) -> Tensor:
    """Negative log-likelihood of all target tokens of a batch, summed (nats)."""
    if isinstance(prefix, KVInfix):
        prefix = prefix.with_source_lengths(batch.source_lengths)
    states = model.hidden_states(*batch.inputs, prefix=prefix, segments=batch.segments)
    states = states.flatten(0, 1)[batch.target_positions]
    if model.head.weight.requires_grad or states.device.type == "meta":  # meta: bench.py counts operations by shapes
        return F.cross_entropy(at_least_float32(model.logits(states)), batch.labels, reduction="sum")
    return HeadLoss.apply(states, model, batch.labels)


def add_gradients(model: Model, trainable: Any, batch: Batch, scale: float) -> Tensor:
    """Add those of scale * loss to the `grad` of each trainable parameter -> the `target_loss`, detached.

    trainable: a module whose call gives the model's prefix.
    """
    loss = target_loss(model, batch, trainable())
    (loss * scale).backward()
    return loss.detach()


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head's logits.

    Computes loss and gradient chunk by chunk, so the full logits, by far the largest tensor, never exist.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, model: Model, labels: Tensor) -> Tensor:
        rows, padded = LOGIT_ROWS.get(states.device.type, 320), getattr(model.head.weight, "padded", None)
        total, gradients, parts = torch.zeros((), device=states.device), [], -(-len(labels) // rows)
        for x, y in zip(states.chunk(parts), labels.chunk(parts), strict=True):
            logits = F.linear(x, *padded) if padded else model.logits(x)
            if ctx.needs_input_grad[0]:
                loss, gradient = compiled(loss_and_gradient)(logits, y)
                gradients.append(gradient @ (padded[0] if padded else model.head.weight))
            else:
                loss = compiled(negative_log_likelihood)(logits, y)
            total = total + loss
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(ctx.gradients).mul_(gradient), None, None


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, V), labels (N,) -> their cross-entropy, summed."""
    real, labels = labels[:, None] != IGNORE, labels.clamp(min=0)[:, None]
    total = at_least_float32(logits).logsumexp(dim=-1, keepdim=True)
    return (total - at_least_float32(logits.gather(1, labels))).where(real, 0.0).sum()


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V), labels (N,) -> their cross-entropy, summed, and its gradient (N, V) by the logits."""
    real, labels = labels[:, None] != IGNORE, labels.clamp(min=0)[:, None]
    total = at_least_float32(logits).logsumexp(dim=-1, keepdim=True)
    target = (at_least_float32(logits.gather(1, labels)) - total).where(real, 0.0)
    gradient = (at_least_float32(logits) - total).exp().where(real, 0.0).to(logits.dtype)
    at_label = target.expm1().to(logits.dtype)  # p - 1, exact where p is near 1; 0 where there is no label
    return -target.sum(), gradient.scatter_(1, labels, at_label)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
