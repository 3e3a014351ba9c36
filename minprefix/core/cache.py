"""The keys and values of the tokens read and generated so far.

Shapes: B examples, K beams of each (1 without beam search), R = B * K rows, H heads, M slots for keys,
D head dimension.
"""

import torch
from torch import Tensor

from minprefix.core.attention import KV

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
        self, layers: list[LayerCache], mask: Tensor, position: Tensor, prefix: list[KV | None],
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
