"""BART (Lewis et al. 2020), its layers taking prefix keys and values at all three attention sites as arguments.

Shapes: B rows, S source tokens, T target tokens, C model dimension, H heads, D head dimension, V vocabulary,
L layers, P prefix length.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minprefix.core.attention import (
    KV,
    attend,
    causal_mask,
    check_positions,
    concat,
    length_mask,
    padding_mask,
    position_ids,
)
from minprefix.core.cache import Cache, LayerCache
from minprefix.core.config import check_bart
from minprefix.core.kernels import Linear, linear
from minprefix.core.prefix_kv import AnyPrefix, check_prefix, first_position, layer_prefixes

TABLE_OFFSET = 2  # position p is row p + 2 of the table: fairseq counts positions from its padding id


class Attention(nn.Module):
    def __init__(self, C: int, H: int):
        super().__init__()
        self.n_head = H
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor, kv: KV, prefix: KV | None = None) -> Tensor:
        """x (B, T, C) attends to the prefix and to kv -> (B, T, C)."""
        y = attend(self.heads(self.q_proj(x)), kv, prefix)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, D) of states (B, S, C)."""
        return self.heads(self.k_proj(states)), self.heads(self.v_proj(states))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, C: int, H: int, inner: int, activation: str):
        super().__init__()
        self.self_attn = Attention(C, H)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.fc1 = Linear(C, inner)
        self.fc2 = Linear(inner, C)
        self.final_layer_norm = nn.LayerNorm(C)
        self.activation = activation

    def forward(
        self, x: Tensor, mask: Tensor | None, prefix: KV | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, S, C) attends to the prefix and to itself as the mask (b, 1, 1, S) allows -> (B, S, C)."""
        k, v = self.self_attn.keys_values(x)
        if cache is not None:
            k, v = cache.append(k, v)
        x = self.self_attn_layer_norm(x + self.self_attn(x, KV(k, v, mask), prefix))
        return self.final_layer_norm(x + self.fc2(self.fc1(x, self.activation)))


class DecoderLayer(nn.Module):
    def __init__(self, C: int, H: int, inner: int, activation: str):
        super().__init__()
        self.self_attn = Attention(C, H)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.encoder_attn = Attention(C, H)
        self.encoder_attn_layer_norm = nn.LayerNorm(C)
        self.fc1 = Linear(C, inner)
        self.fc2 = Linear(inner, C)
        self.final_layer_norm = nn.LayerNorm(C)
        self.activation = activation

    def forward(
        self, x: Tensor, mask: Tensor, source: KV, prefix: KV | None = None, cross_prefix: KV | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, C) attends to prefix, cache and itself, then to the cross prefix and the source -> (B, T, C).

        mask: (b, 1, T, S) over the cache's slots and x, see `KV`. The keys and values of x go into the cache.
        """
        k, v = self.self_attn.keys_values(x)
        if cache is not None:
            k, v = cache.append(k, v)
        x = self.self_attn_layer_norm(x + self.self_attn(x, KV(k, v, mask), prefix))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, source, cross_prefix))
        return self.final_layer_norm(x + self.fc2(self.fc1(x, self.activation)))


class Encoder(nn.Module):
    layers: nn.ModuleList

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        add_modules(self, config, "encoder", EncoderLayer)

    def forward(
        self, x: Tensor, mask: Tensor | None, prefixes: list[KV | None], caches: list[LayerCache] | None = None
    ) -> Tensor:
        """Embedded tokens x (B, S, C) through all layers -> (B, S, C); prefixes, caches: one for each layer."""
        for n, layer in enumerate(self.layers):
            x = layer(x, mask, prefixes[n], caches[n] if caches else None)
        return x


class Decoder(nn.Module):
    layers: nn.ModuleList

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        add_modules(self, config, "decoder", DecoderLayer)

    def forward(
        self, x: Tensor, mask: Tensor, source: list[KV], prefixes: list[KV | None], cross_prefixes: list[KV | None],
        caches: list[LayerCache] | None = None,
    ) -> Tensor:  # fmt: skip
        """Embedded tokens x (B, T, C) through all layers -> (B, T, C); lists have one item for each layer."""
        for n, layer in enumerate(self.layers):
            x = layer(x, mask, source[n], prefixes[n], cross_prefixes[n], caches[n] if caches else None)
        return x


def add_modules(
    module: Encoder | Decoder, config: dict[str, Any], side: str, layer: type[EncoderLayer] | type[DecoderLayer]
) -> None:
    """Position table, layer norm and layers of a side; word embeddings, too, where the sides do not share them."""
    C, activation = config["d_model"], config["activation_function"]
    H, inner = config[f"{side}_attention_heads"], config[f"{side}_ffn_dim"]
    if not config["tie_word_embeddings"]:
        module.embed_tokens = nn.Embedding(config["vocab_size"], C)
    module.embed_positions = nn.Embedding(config["max_position_embeddings"] + TABLE_OFFSET, C)
    module.layernorm_embedding = nn.LayerNorm(C)
    module.layers = nn.ModuleList(layer(C, H, inner, activation) for _ in range(config[f"{side}_layers"]))


class BART(nn.Module):
    """config: the dict of a HuggingFace BART `config.json`. Parameter names are HuggingFace's."""

    encoder_decoder: Literal[True] = True
    folder: Path | None = None  # folder the weights were loaded from
    final_logits_bias: Tensor

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config = check_bart(config)
        C, V = config["d_model"], config["vocab_size"]
        self.n_positions = config["max_position_embeddings"]
        self.scale = C**0.5 if config["scale_embedding"] else 1.0
        if config["tie_word_embeddings"]:
            self.shared = nn.Embedding(V, C)
        else:
            self.lm_head = Linear(C, V, bias=False)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, V))
        encoder, decoder = (
            (config[f"{side}_layers"], config[f"{side}_attention_heads"], C // config[f"{side}_attention_heads"])
            for side in ("encoder", "decoder")
        )
        self.prefix_sites = {"encoder": encoder, "decoder": decoder, "cross": decoder}  # site -> (L, H, D)

    def forward(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None,
        prefix: AnyPrefix | None = None, segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """source_ids (B, S), target_ids (B, T): the decoder's inputs -> logits (B, T, V).

        source_mask (B, S): true or 1 at tokens (one in a row at least), false or 0 at padding; None: no padding.
        prefix: {site: (L, 2, [B,] H, P, D)}, any of the sites "encoder", "decoder", "cross"; or None.
        segments (B, T): which of a row's target_ids are its first target's, which its second's and so on, for rows that
        hold several targets of one source, each as if it stood alone; see `visible_keys`.
        """
        return self.logits(self.hidden_states(source_ids, target_ids, source_mask, prefix, segments=segments))

    def logits(self, states: Tensor) -> Tensor:
        """Decoder states (..., C) -> logits (..., V)."""
        return linear(states, self.head.weight, self.final_logits_bias[0])

    @property
    def head(self) -> nn.Embedding | Linear:
        """The layer whose weight (V, C) makes logits of states."""
        return self.shared if self.config["tie_word_embeddings"] else self.lm_head

    def hidden_states(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None,
        prefix: AnyPrefix | None = None, start: int | Tensor | None = None, segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `forward`, but the decoder's states (B, T, C) before `logits`: the loss needs few of those.

        start: position id of the decoder's first token, if it is not the one that the prefix sets.
        """
        source = self.source_kv(self.encode(source_ids, source_mask, prefix), source_mask)
        start = first_position(prefix) if start is None else start
        return self._decode(target_ids, source, prefix, start, segments=segments)

    def encode(
        self, source_ids: Tensor, source_mask: Tensor | None = None, prefix: AnyPrefix | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:  # fmt: skip
        """source_ids (B, S) -> the encoder's states (B, S, C). caches: take the keys and values of each layer."""
        check_prefix(prefix, self.prefix_sites, len(source_ids))
        check_positions(source_ids.size(1), 0, self.n_positions)
        positions = position_ids(source_ids, 0, self.n_positions)  # no prefix shifts these
        x = self._embed(self.encoder, source_ids, positions)
        mask = None if source_mask is None else padding_mask(source_mask, x)
        return self.encoder(x, mask, self._layer_prefixes(prefix, "encoder"), caches)

    def source_kv(self, states: Tensor, source_mask: Tensor | None = None) -> list[KV]:
        """What each decoder layer's cross-attention sees of the encoder's states (B, S, C)."""
        mask = None if source_mask is None else padding_mask(source_mask, states)
        keys_values = (layer.encoder_attn.keys_values(states) for layer in self.decoder.layers)
        return [KV(k, v, mask) for k, v in keys_values]

    def prefill(self, source_ids: Tensor, lengths: Tensor, prefix: AnyPrefix | None = None) -> Cache:
        """Read sources (B, S), right-padded, of `lengths` (B,) into a Cache for `step`: the encoder runs once."""
        lengths = lengths.to(source_ids.device)
        source_mask = length_mask(lengths, source_ids.size(1))
        source = self.source_kv(self.encode(source_ids, source_mask, prefix), source_mask)
        position = torch.as_tensor(first_position(prefix)).to(lengths).expand_as(lengths)
        no_keys = source[0].k[:, :, :0]
        layers = [LayerCache(no_keys, no_keys) for _ in self.decoder.layers]
        mask = no_keys.new_zeros(len(lengths), 1, 0)
        cross = self._layer_prefixes(prefix, "cross")  # concatenated with the source's keys here, not at each step
        source = [concat(p, kv, len(lengths), 1) if p else kv for p, kv in zip(cross, source, strict=True)]
        return Cache(layers, mask, position, self._layer_prefixes(prefix, "decoder"), source)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One more token for each row (R,) -> states (R, C) for `logits`; its keys and values go into the cache."""
        position, mask = cache.next_step()
        x = self._embed(self.decoder, ids, position).unflatten(0, (len(mask), -1))  # (B, K, C)
        x = self.decoder(x, mask, cache.source, cache.prefix, [None] * len(cache.layers), cache.layers)
        return x.flatten(0, 1)

    def activations(self, ids: Tensor) -> dict[str, list[LayerCache]]:
        """Keys and values that the model computes for tokens ids (1, T), as source and target: {site: [by layer]}."""
        encoder = [LayerCache() for _ in self.encoder.layers]
        decoder = [LayerCache() for _ in self.decoder.layers]
        source = self.source_kv(self.encode(ids, caches=encoder))
        self._decode(ids, source, None, 0, decoder)
        return {"encoder": encoder, "decoder": decoder, "cross": [LayerCache(k, v) for k, v, _ in source]}

    def _decode(
        self, target_ids: Tensor, source: list[KV], prefix: AnyPrefix | None, start: int | Tensor,
        caches: list[LayerCache] | None = None, segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """target_ids (B, T) -> states (B, T, C). caches: take the keys and values of each layer."""
        check_positions(target_ids.size(1), start, self.n_positions, segments)
        positions = position_ids(target_ids, start, self.n_positions, segments)
        x = self._embed(self.decoder, target_ids, positions)
        mask = causal_mask(target_ids.size(1), x, segments)
        prefixes, cross_prefixes = (self._layer_prefixes(prefix, site) for site in ("decoder", "cross"))
        return self.decoder(x, mask, source, prefixes, cross_prefixes, caches)

    def _embed(self, side: Encoder | Decoder, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B, T), positions (T,) or (B, T) -> (B, T, C)."""
        words = self.shared if self.config["tie_word_embeddings"] else side.embed_tokens
        return side.layernorm_embedding(words(ids) * self.scale + side.embed_positions(positions + TABLE_OFFSET))

    def _layer_prefixes(self, prefix: AnyPrefix | None, site: str) -> list[KV | None]:
        return layer_prefixes(prefix, site, self.prefix_sites[site][0], self.head.weight)
