"""GPT-2 (Radford et al. 2019), its layers taking their prefix keys and values as arguments.

Shapes: B rows, T tokens, C model dimension, H heads, D head dimension, V vocabulary, L layers, P prefix length.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minprefix.core.attention import KV, attend, causal_mask, check_positions, length_mask, padding_mask, position_ids
from minprefix.core.cache import Cache, LayerCache
from minprefix.core.config import check_gpt2
from minprefix.core.kernels import Linear, linear
from minprefix.core.prefix_kv import AnyPrefix, KVInfix, check_prefix, first_position, layer_prefixes


class Attention(nn.Module):
    def __init__(self, C: int, H: int):
        super().__init__()
        self.n_head = H
        self.query_scale = 1.0  # 1 / layer number with scale_attn_by_inverse_layer_idx
        self.c_attn = Linear(C, 3 * C)
        self.c_proj = Linear(C, C)

    def forward(self, x: Tensor, mask: Tensor, prefix: KV | None = None, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) attends to the prefix, to what the cache holds, and to itself as the mask allows -> (B, T, C).

        mask: (b, 1, T, S) over the cache's slots and x, see `KV`. The keys and values of x go into the cache.
        """
        q, k, v = self.qkv(x)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, KV(k, v, mask), prefix)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries, keys and values, each (B, H, T, D)."""
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))
        return q if self.query_scale == 1 else q * self.query_scale, k, v


class MLP(nn.Module):
    def __init__(self, C: int, inner: int, activation: str):
        super().__init__()
        self.c_fc = Linear(C, inner)
        self.c_proj = Linear(inner, C)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x, self.activation))


class Block(nn.Module):
    def __init__(self, C: int, H: int, inner: int, eps: float, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(C, eps=eps)
        self.attn = Attention(C, H)
        self.ln_2 = nn.LayerNorm(C, eps=eps)
        self.mlp = MLP(C, inner, activation)

    def forward(self, x: Tensor, mask: Tensor, prefix: KV | None = None, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C); mask, prefix and cache: see `Attention`."""
        x = x + self.attn(self.ln_1(x), mask, prefix, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """config: the dict of a HuggingFace GPT-2 `config.json`. Parameter names are HuggingFace's."""

    encoder_decoder: Literal[False] = False
    folder: Path | None = None  # folder the weights were loaded from

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config = check_gpt2(config)
        C, H, L, V = config["n_embd"], config["n_head"], config["n_layer"], config["vocab_size"]
        self.n_positions = config["n_positions"]
        self.wte = nn.Embedding(V, C)
        self.wpe = nn.Embedding(self.n_positions, C)
        eps, activation = config["layer_norm_epsilon"], config["activation_function"]
        self.h = nn.ModuleList(Block(C, H, config["n_inner"], eps, activation) for _ in range(L))
        if config["scale_attn_by_inverse_layer_idx"]:
            for n, block in enumerate(self.h, 1):
                block.attn.query_scale = 1 / n
        self.ln_f = nn.LayerNorm(C, eps=config["layer_norm_epsilon"])
        if not config["tie_word_embeddings"]:
            self.lm_head = Linear(C, V, bias=False)
        self.prefix_sites = {"decoder": (L, H, C // H)}  # site -> (L, H, D)

    def forward(self, ids: Tensor, prefix: AnyPrefix | None = None, segments: Tensor | None = None) -> Tensor:
        """ids (B, T), prefix {"decoder": (L, 2, [B,] H, P, D)} or None -> logits (B, T, V).

        segments (B, T): which tokens of a row are its source's, which its first target's and so on, for rows that hold
        several targets of one source, each as if it stood alone behind the source; see `visible_keys`.
        """
        return self.logits(self.hidden_states(ids, prefix, segments=segments))

    def logits(self, states: Tensor) -> Tensor:
        """States (..., C) -> logits (..., V)."""
        return linear(states, self.head.weight)

    @property
    def head(self) -> nn.Embedding | Linear:
        """The layer whose weight (V, C) makes logits of states."""
        return self.wte if self.config["tie_word_embeddings"] else self.lm_head

    def hidden_states(
        self, ids: Tensor, prefix: AnyPrefix | None = None, start: int | Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `forward`, but the states (B, T, C) before `logits`: the loss needs few of those.

        start: position id of the first token, if it is not the one that the prefix sets.
        """
        start = first_position(prefix) if start is None else start
        check_positions(ids.size(1), start, self.n_positions, segments)
        return self._run(ids, prefix, start, segments=segments)

    def prefill(self, ids: Tensor, lengths: Tensor, prefix: AnyPrefix | None = None) -> Cache:
        """Read right-padded sources (B, S) into a Cache for `step`. Pass `lengths` (B,) on the CPU, else a GPU sync."""
        start = first_position(prefix)
        check_positions(lengths, start, self.n_positions)
        lengths = lengths.to(ids.device)
        prefix = prefix.with_source_lengths(lengths) if isinstance(prefix, KVInfix) else prefix
        layers = [LayerCache() for _ in self.h]
        self._run(ids, prefix, start, layers)
        mask = padding_mask(length_mask(lengths, ids.size(1)), self.wte.weight)[:, 0]
        position = lengths + torch.as_tensor(start).to(lengths)
        return Cache(layers, mask, position, self._layer_prefixes(prefix))

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One more token for each row (R,) -> states (R, C) for `logits`; its keys and values go into the cache."""
        position, mask = cache.next_step()
        x = (self.wte(ids) + self.wpe(position)).unflatten(0, (len(mask), -1))  # (B, K, C)
        for block, prefix, layer in zip(self.h, cache.prefix, cache.layers, strict=True):
            x = block(x, mask, prefix, layer)
        return self.ln_f(x).flatten(0, 1)

    def activations(self, ids: Tensor) -> dict[str, list[LayerCache]]:
        """Keys and values that the model computes for tokens ids (1, T): {site: [those of each layer]}."""
        layers = [LayerCache() for _ in self.h]
        self._run(ids, None, 0, layers)
        return {"decoder": layers}

    def _run(
        self, ids: Tensor, prefix: AnyPrefix | None, start: int | Tensor, caches: list[LayerCache] | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """ids (B, T) -> states (B, T, C). caches: take the keys and values of each layer."""
        check_prefix(prefix, self.prefix_sites, len(ids))
        positions = position_ids(ids, start, self.n_positions, segments)
        prefixes = self._layer_prefixes(prefix)
        if isinstance(prefix, KVInfix) and prefix.source_lengths is not None:
            source = length_mask(prefix.source_lengths, ids.size(1))
            positions = positions - start * source  # source tokens keep positions 0, 1, ...
            hidden_from_source = padding_mask(~source, self.wte.weight).mT  # (B, 1, T, 1)
            prefixes = [kv and KV(kv.k, kv.v, hidden_from_source) for kv in prefixes]
        x = self.wte(ids) + self.wpe(positions)
        mask = causal_mask(ids.size(1), x, segments)
        for n, block in enumerate(self.h):
            x = block(x, mask, prefixes[n], caches[n] if caches else None)
        return self.ln_f(x)

    def _layer_prefixes(self, prefix: AnyPrefix | None) -> list[KV | None]:
        return layer_prefixes(prefix, "decoder", len(self.h), self.wte.weight)
