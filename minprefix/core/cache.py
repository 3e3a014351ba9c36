"""The keys and values of the tokens read and generated so far.

Shapes: B examples, K beams of each (1 without beam search), R = B * K rows, H heads, M slots for keys,
D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minprefix.core.attention import KV, round_up

ROOM = 64  # slots that a cache grows by


class LayerCache:
    """Keys and values (B, H, M, D) of one layer; the first `filled` of the M slots are in use."""

    def __init__(self, k: Tensor | None = None, v: Tensor | None = None):
        self.k, self.v = k, v
        self.filled = 0 if k is None else k.size(2)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values (B, H, n, D) of new tokens; return all slots, including the empty ones."""
        if self.k is None or self.v is None:
            self.k, self.v, self.filled = k, v, k.size(2)
            return k, v
        end = self.filled + k.size(2)
        if end > self.k.size(2):
            room = k.new_zeros(*k.shape[:2], ROOM + k.size(2), k.size(3))
            self.k, self.v = torch.cat([self.k, room], dim=2), torch.cat([self.v, room], dim=2)
        self.k[:, :, self.filled : end], self.v[:, :, self.filled : end] = k, v
        self.filled = end
        return self.k, self.v

    def stacked(self) -> Tensor:
        """(2, B, H, M, D): the keys, then the values."""
        assert self.k is not None and self.v is not None
        return torch.stack([self.k, self.v])

    def keep(self, examples: Tensor) -> None:
        """Keep these examples (B',) only."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[examples], self.v[examples]


class Cache:
    """Keys and values of all layers while texts are generated: filled by a model's `prefill`, extended by each `step`.

    The beams of an example are K queries of one row. They share the keys of its source and of all tokens that any of
    its beams has written; the mask says which of them each beam sees. When the beams are reordered, only rows of the
    mask are, and no keys are copied.

    layers: self-attention. mask: (B, K, M), 0, or -inf at padding, other beams' tokens and empty slots.
    position: (R,) position ids of the next tokens. prefix: each layer's, stored apart from the text's keys,
    once for all rows that share it. source: what each layer's cross-attention sees (BART), a cross prefix first.
    """

    def __init__(
        self, layers: Sequence[LayerCache], mask: Tensor, position: Tensor, prefix: list[KV | None],
        source: list[KV] | None = None,
    ):  # fmt: skip
        self.layers, self.mask, self.position, self.prefix = layers, mask, position, prefix
        self.source = source or []

    def next_step(self) -> tuple[Tensor, Tensor]:
        """Extend the mask by one token of each row; return their position ids (R,) and the mask (B, 1, K, M)."""
        B, K, M = self.mask.shape
        filled = self.layers[0].filled
        if filled + K > M:
            room = self.mask.new_full((B, K, ROOM + K), float("-inf"))
            self.mask = torch.cat([self.mask, room], dim=2)
        each_its_own = torch.eye(K, dtype=torch.bool, device=self.mask.device)
        self.mask[:, :, filled : filled + K].masked_fill_(each_its_own, 0.0)
        position = self.position
        self.position = position + 1
        return position, self.mask[:, None]

    def reorder(self, rows: Tensor) -> None:
        """Continue from these rows (R',), the same number per example: the surviving beams, in their new order."""
        self.mask = self.mask.flatten(0, 1)[rows].unflatten(0, (len(self.mask), -1))
        self.position = self.position[rows]

    def keep(self, examples: Tensor) -> None:
        """Keep these examples (B',) only; the texts of the others are finished."""
        for layer in self.layers:
            layer.keep(examples)
        self.prefix = [kv and kv.select(examples) for kv in self.prefix]
        self.source = [kv.select(examples) for kv in self.source]
        self.position = self.position.unflatten(0, (len(self.mask), -1))[examples].flatten()
        self.mask = self.mask[examples]


class StaticLayer(LayerCache):
    """Keys and values of one layer in a `StaticCache`; those of new tokens go to the slots (K,)."""

    k: Tensor
    v: Tensor

    def __init__(self, k: Tensor, v: Tensor, slots: Tensor):
        super().__init__(k, v)
        self.slots = slots

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k.index_copy_(2, self.slots, k), self.v.index_copy_(2, self.slots, v)


class StaticCache(Cache):
    """A cache whose tensors keep their sizes and places, as a CUDA graph needs. The prefix stands before the source.

    slots: (K,), where the keys of the last tokens are.
    """

    layers: list[StaticLayer]

    def __init__(self, cache: Cache, K: int, max_new_tokens: int):
        """For what `prefill` returned, and later for shorter sources, in as many rows; K beams write so many tokens."""
        mask = cache.mask
        self.prefix_length, self.filled = prefix_length(cache), cache.layers[0].filled
        self.slots = torch.arange(K, device=mask.device)
        M = round_up(self.prefix_length + self.filled + max_new_tokens * K, 8)  # as fused attention wants its masks
        layers, source = [], []
        for layer in cache.layers:
            assert layer.k is not None
            B, H, _, D = layer.k.shape
            k, v = layer.k.new_zeros(2, B, H, M, D)
            layers.append(StaticLayer(k, v, self.slots))
        for kv in cache.source:
            B, H, S, D = kv.k.shape
            S = round_up(S, 8)
            k, v = kv.k.new_zeros(2, B, H, S, D)
            source.append(KV(k, v, mask.new_zeros(B, 1, 1, S)))
        mask = mask.new_zeros(len(mask), K, M)
        super().__init__(layers, mask, cache.position.new_zeros(len(mask) * K), [None] * len(layers), source)

    def fits(self, cache: Cache) -> bool:
        """Whether that cache can be loaded."""
        same = len(self.mask) == len(cache.mask) and self.prefix_length == prefix_length(cache)
        source = not self.source or cache.source[0].k.size(2) <= self.source[0].k.size(2)
        return same and source and cache.layers[0].filled <= self.filled

    def load(self, cache: Cache) -> None:
        """Copy the contents of a cache; all beams begin alike."""
        P, K, S = self.prefix_length, len(self.slots), cache.layers[0].filled
        self.mask.fill_(float("-inf"))[:, :, P : P + S] = cache.mask[:, :, :S]
        for mine, layer, prefix in zip(self.layers, cache.layers, cache.prefix, strict=True):
            assert layer.k is not None and layer.v is not None
            mine.k[:, :, P : P + S], mine.v[:, :, P : P + S] = layer.k[:, :, :S], layer.v[:, :, :S]
            if prefix is not None:
                mine.k[:, :, :P], mine.v[:, :, :P] = prefix.k, prefix.v
                self.mask[:, :, :P] = 0.0 if prefix.mask is None else prefix.mask[:, 0]
        for own, kv in zip(self.source, cache.source, strict=True):
            S = kv.k.size(2)
            assert own.mask is not None and kv.mask is not None
            own.k[:, :, :S], own.v[:, :, :S] = kv.k, kv.v
            own.mask.fill_(float("-inf"))[..., :S] = kv.mask
        self.position.copy_(cache.position.repeat_interleave(K))
        torch.arange(P + self.filled - K, P + self.filled, out=self.slots)

    def next_step(self) -> tuple[Tensor, Tensor]:
        K = len(self.slots)
        seen = torch.full_like(self.mask[:, :, :K], float("-inf"))
        seen.masked_fill_(torch.eye(K, dtype=torch.bool, device=seen.device), 0.0)
        self.mask.index_copy_(2, self.slots.add_(K), seen)
        position = self.position.clone()
        self.position.add_(1)
        return position, self.mask[:, None]

    def reorder(self, rows: Tensor) -> None:
        self.mask.copy_(self.mask.flatten(0, 1)[rows].view_as(self.mask))
        self.position.copy_(self.position[rows])


def prefix_length(cache: Cache) -> int:
    """P, the virtual tokens that `cache.prefix` holds for each layer."""
    return cache.prefix[0].k.size(2) if cache.prefix[0] else 0
