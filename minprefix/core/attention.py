"""Attention with an explicit prefix: the one function through which every layer of both models attends.

Shapes: B rows of queries, H heads, T query tokens, S keys, P prefix length, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minprefix.system.errors import InputError

FEW_QUERIES = 16  # below 16 queries, as in decoding, the prefix is not concatenated
SHORT_PREFIX = 64  # up to 64 virtual tokens, concatenating is faster on CPU


class KV(NamedTuple):
    """Keys and values of one layer.

    k, v: (b, H, S, D), where b = B, or 1 if all rows share them. mask: None, or (b, 1, 1 or T, 1 or S), added to the
    scores: 0 where a query may look, -inf where not.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None

    def select(self, rows: Tensor) -> "KV":
        """The keys and values of these rows (B',); those that all rows share are not indexed."""
        k, v, mask = (x if x is None or len(x) == 1 else x[rows] for x in self)
        assert k is not None and v is not None
        return KV(k, v, mask)


def attend(q: Tensor, kv: KV, prefix: KV | None = None) -> Tensor:
    """Scaled dot-product attention of the queries q (B, H, T, D) over the prefix and the tokens -> (B, H, T, D).

    softmax(q [K_prefix; K]^T / sqrt(D) + mask) [V_prefix; V], as in Li & Liang (2021), section 4.
    """
    T, gpu = q.size(2), q.is_cuda
    if prefix is not None and T >= FEW_QUERIES and (gpu or prefix.k.size(2) <= SHORT_PREFIX):
        kv, prefix = concat(prefix, kv, len(q), T), None
    return fused_attend(q, kv) if gpu and prefix is None else plain_attend(q, kv, prefix)


def plain_attend(q: Tensor, kv: KV, prefix: KV | None = None) -> Tensor:
    """`attend` by two products for each part; the prefix's keys are not copied, only the scores are concatenated."""
    q = q * q.size(-1) ** -0.5
    if prefix is None:
        return product(scores(q, kv).softmax(dim=-1), kv.v)
    P = prefix.k.size(2)
    weights = torch.cat([scores(q, prefix), scores(q, kv)], dim=-1).softmax(dim=-1)
    return product(weights[..., :P], prefix.v) + product(weights[..., P:], kv.v)


def fused_attend(q: Tensor, kv: KV) -> Tensor:
    """`attend` without a prefix by torch's fused kernel, which keeps no scores in memory: for a GPU."""
    k, v = kv.k.expand(len(q), -1, -1, -1), kv.v.expand(len(q), -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kv.mask)


def scores(q: Tensor, kv: KV) -> Tensor:
    """q (B, H, T, D) times the keys, plus the mask -> (B, H, T, S)."""
    scores = product(q, kv.k.mT)
    return scores if kv.mask is None else scores + kv.mask


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (B, H, T, X) @ b (B or 1, H, X, Y) -> (B, H, T, Y). What all rows share is multiplied in one product."""
    if len(a) == len(b):
        return a @ b
    B, H, T, X = a.shape
    return (a.transpose(0, 1).reshape(H, B * T, X) @ b[0]).unflatten(1, (B, T)).transpose(0, 1)


def concat(prefix: KV, kv: KV, B: int, T: int) -> KV:
    """The prefix and the tokens as one KV, for B rows of T queries."""
    k = torch.cat([prefix.k.expand(B, -1, -1, -1), kv.k.expand(B, -1, -1, -1)], dim=2)
    v = torch.cat([prefix.v.expand(B, -1, -1, -1), kv.v.expand(B, -1, -1, -1)], dim=2)
    if prefix.mask is None and kv.mask is None:
        return KV(k, v)
    masks = [x.k.new_zeros(1, 1, 1, 1) if x.mask is None else x.mask for x in (prefix, kv)]
    rows = max(len(mask) for mask in masks)  # an infix's mask is the same for all of its keys: (b, 1, T, 1)
    masks = [mask.expand(rows, 1, T, x.k.size(2)) for mask, x in zip(masks, (prefix, kv), strict=True)]
    return KV(k, v, torch.cat(masks, dim=3))


def causal_mask(T: int, like: Tensor, segments: Tensor | None = None) -> Tensor:
    """(1, 1, T, T): token t may look at tokens 0..t. dtype and device of the tensor `like`.

    segments (B, T): of rows that hold several targets, see `visible_keys`; the mask is then (B, 1, T, T).
    """
    if segments is None:
        return torch.full((T, T), float("-inf"), dtype=like.dtype, device=like.device).triu(1)[None, None]
    visible = visible_keys(segments)
    return like.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))[:, None]


def visible_keys(segments: Tensor) -> Tensor:
    """(B, T, T), true where a query (dim 1) sees a key (dim 2): the source, and its own target up to itself.

    segments (B, T): 0 at a row's source, 1 at its first target, 2 at its second and so on, -1 at padding.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == 0) | (key == query)).tril()


def length_mask(lengths: Tensor, S: int) -> Tensor:
    """(B, S), true at the tokens of right-padded rows of `lengths` (B,)."""
    return torch.arange(S, device=lengths.device) < lengths[:, None]


def padding_mask(real: Tensor, like: Tensor) -> Tensor:
    """(B, 1, 1, S) from (B, S), true or 1 at the tokens: the padding is hidden. dtype and device of `like`."""
    pads = real.to(like.device) == 0
    return torch.zeros(pads.shape, dtype=like.dtype, device=like.device).masked_fill(pads, float("-inf"))[:, None, None]


def position_ids(ids: Tensor, start: int | Tensor, n_positions: int, segments: Tensor | None = None) -> Tensor:
    """(T,) for tokens ids (B, T), the first at `start`, or (B, T) for starts (B,).

    segments (B, T): see `visible_keys`; each target's positions then follow the source's, and the ids are (B, T).
    """
    positions = torch.arange(ids.size(1), device=ids.device)
    if segments is not None:
        positions = visible_keys(segments).sum(dim=-1) - 1  # position = number of earlier visible tokens
    positions = positions + (start.to(ids.device)[:, None] if isinstance(start, Tensor) else start)
    return positions.clamp(max=n_positions - 1)  # only padding can exceed it


def check_positions(
    lengths: int | Tensor, start: int | Tensor, n_positions: int, segments: Tensor | None = None
) -> None:
    """InputError if rows of `lengths` tokens, the first at `start`, exceed n_positions; each an int, or (B,).

    segments (B, T): see `visible_keys`; with them, `lengths` is an upper bound.
    Under torch.compile only ints without segments are checked.
    """
    if isinstance(lengths, Tensor) or isinstance(start, Tensor) or segments is not None:
        if torch.compiler.is_compiling():
            return
        lengths, start = torch.broadcast_tensors(torch.as_tensor(lengths).cpu(), torch.as_tensor(start).cpu())
        # The exact count waits for the GPU: only if the bound fails.
        if segments is not None and int((lengths + start).max()) > n_positions:
            lengths = (visible_keys(segments).sum(dim=-1) * (segments >= 0)).amax(dim=1).cpu()
            lengths, start = torch.broadcast_tensors(lengths, start)
        row = (lengths + start).argmax()
        lengths, start = int(lengths.flatten()[row]), int(start.flatten()[row])
    if lengths + start > n_positions:
        raise InputError(
            f"{lengths} tokens from position {start} on do not fit the model's {n_positions} positions: "
            "shorten the text (--max-source cuts sources) or the prefix"
        )


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return n + -n % multiple
