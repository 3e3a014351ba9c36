"""GPT-2 (Radford et al. 2019), its layers taking their prefix keys and values as arguments.

Shapes: B rows, T tokens, C model dimension, H heads, D head dimension, V vocabulary, L layers, P prefix length.
"""

import torch
from torch import nn
from torch.nn import functional as F

from minprefix.attention import Cache, attend, causal_mask, padding_mask, prefix_length, prefix_segments
from minprefix.files import InputError

ACTIVATIONS = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # HuggingFace stores these (in, out)


class Attention(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.n_head = H
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)

    def forward(self, x, context, mask):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = attend(q, [*context, (k, v, mask)])
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)


class MLP(nn.Module):
    def __init__(self, C, inner, activation):
        super().__init__()
        self.c_fc = nn.Linear(C, inner)
        self.c_proj = nn.Linear(inner, C)
        self.activation = activation

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, C, H, inner, eps, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(C, eps=eps)
        self.attn = Attention(C, H)
        self.ln_2 = nn.LayerNorm(C, eps=eps)
        self.mlp = MLP(C, inner, activation)

    def forward(self, x, context, mask):
        """x (B, T, C); context: segments before the tokens' own -> x (B, T, C), the tokens' (k, v) (B, H, T, D)."""
        y, kv = self.attn(self.ln_1(x), context, mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv


class GPT2(nn.Module):
    """config: the dict of a HuggingFace GPT-2 `config.json`. Parameter names are HuggingFace's."""

    def __init__(self, config):
        super().__init__()
        self.config = config = check_config(config)
        C, H, L, V = config["n_embd"], config["n_head"], config["n_layer"], config["vocab_size"]
        activation = ACTIVATIONS[config["activation_function"]]
        self.wte = nn.Embedding(V, C)
        self.wpe = nn.Embedding(config["n_positions"], C)
        self.h = nn.ModuleList(
            Block(C, H, config["n_inner"], config["layer_norm_epsilon"], activation) for _ in range(L)
        )
        self.ln_f = nn.LayerNorm(C, eps=config["layer_norm_epsilon"])
        if not config["tie_word_embeddings"]:
            self.lm_head = nn.Linear(C, V, bias=False)
        self.prefix_sites = {"decoder": (L, H, C // H)}  # site -> (L, H, D)

    def forward(self, ids, prefix=None):
        """ids (B, T), prefix {"decoder": (L, 2, [B,] H, P, D)} or None -> logits (B, T, V)."""
        return self.logits(self.hidden(ids, prefix))

    def logits(self, states):
        """States (..., C) -> logits (..., V)."""
        head = self.wte if self.config["tie_word_embeddings"] else self.lm_head
        return F.linear(states, head.weight)

    def hidden(self, ids, prefix=None, start=None):
        """As `forward`, but the states (B, T, C) before `logits`: the loss needs few of those.

        start: position id of the first token, if it is not the one that the prefix sets.
        """
        return self._run(ids, prefix, self._start(prefix) if start is None else start)[0]

    def prefill(self, ids, lengths, prefix=None):
        """Read sources (B, S), right-padded, of `lengths` (B,) into a Cache for `step`."""
        start = self._start(prefix)
        _, source = self._run(ids, prefix, start)
        mask = padding_mask(lengths, ids.size(1), self.wte.weight)
        return Cache(self._prefix(prefix), source, mask, [None] * len(self.h), start + lengths)

    def step(self, ids, cache):
        """One more token for each row (R,) -> states (R, C) for `logits`; the cache takes it in."""
        x = self.wte(ids[:, None]) + self.wpe(cache.position[:, None])
        for layer, block in enumerate(self.h):
            x, (k, v) = block(x, cache.segments(layer), None)
            cache.append(layer, k, v)
        cache.position = cache.position + 1
        return self.ln_f(x)[:, 0]

    def _run(self, ids, prefix, start):
        """ids (B, T) -> states (B, T, C), and the tokens' (k, v) of each layer."""
        T, room = ids.size(1), self.config["n_positions"]
        if start + T > room:
            raise InputError(
                f"{T} tokens from position {start} on do not fit the model's {room} positions: "
                "shorten the text or the prefix"
            )
        x = self.wte(ids) + self.wpe(torch.arange(start, start + T, device=ids.device))
        mask = causal_mask(T, x)
        kept = []
        for block, context in zip(self.h, self._prefix(prefix), strict=True):
            x, kv = block(x, context, mask)
            kept.append(kv)
        return self.ln_f(x), kept

    def _start(self, prefix):
        """Position id of the first real token: what the prefix was trained with, by default its length."""
        offset = getattr(prefix, "position_offset", None)
        return prefix_length(prefix, "decoder") if offset is None else offset

    def _prefix(self, prefix):
        return prefix_segments(prefix, "decoder", len(self.h), self.wte.weight)


def check_config(config):
    """A GPT-2 config.json as the model needs it, defaults filled in; InputError where this model cannot follow it."""
    defaults = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    shape = {key: config.get(key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    if config.get("n_inner") is not None:
        shape["n_inner"] = config["n_inner"]
    for key, size in shape.items():
        most = 1000 if key == "n_layer" else 2**24  # far above any GPT-2, low enough to fail fast
        if type(size) is not int or not 0 < size <= most:
            raise InputError(f"config.json of the GPT-2 model: {key} is {size!r}, an integer of 1 to {most} is needed")
    if shape["n_embd"] % shape["n_head"]:
        raise InputError(f"config.json: n_embd {shape['n_embd']} is not a multiple of n_head {shape['n_head']}")
    for key, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                       ("add_cross_attention", False)):  # fmt: skip
        if config.get(key, value) is not value:
            raise InputError(f"config.json: {key} = {config[key]!r} is not supported by minprefix")
    config = {"model_type": "gpt2", **defaults, **config, "n_inner": 4 * shape["n_embd"], **shape}
    activation, eps = config["activation_function"], config["layer_norm_epsilon"]
    if activation not in list(ACTIVATIONS):  # a list, since JSON's value need not be hashable
        raise InputError(f"config.json: activation {activation!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(f"config.json: layer_norm_epsilon is {eps!r}, a small positive number is needed")
    return config


def from_huggingface(tensors, config):
    """HuggingFace's tensors under this model's names; mask buffers and the second copy of a tied head are dropped."""
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name in state:
            raise InputError(f"tensor {name!r} is there twice, with and without 'transformer.' before its name")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        state[name] = tensor.T if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    return state


def to_huggingface(model):
    """The inverse of `from_huggingface`: tensors for a `model.safetensors` that HuggingFace loads as it is."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name if name == "lm_head.weight" else "transformer." + name
        tensors[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    return tensors
