"""The methods that the paper compares with prefix-tuning (sections 5 and 7): fine-tuning, top layers, adapters,
embedding-only and infix.

Each is a module with the interface of `Prefix`: calling it returns the prefix that the model takes, or None if the
method changes the model itself; `fold` returns the tensors to save, by name. Shapes: P virtual tokens, C model
dimension, L layers, H heads, D head dimension.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minprefix.core.attention import causal_mask
from minprefix.core.cache import LayerCache
from minprefix.core.gpt2 import GPT2
from minprefix.core.model import Model
from minprefix.core.prefix import Prefix
from minprefix.core.prefix_kv import KVInfix, KVPrefix
from minprefix.system.errors import InputError

METHODS = ("prefix", "finetune", "top2", "adapter", "embedding", "infix")
SUBLAYER_ENDS = ("attn.c_proj", "mlp.c_proj", "attn.out_proj", ".fc2")  # the sublayers' last layers, in GPT-2 and BART


class Finetune(nn.Module):
    """Trains the weights of the given modules of the model, by default all weights.

    They must be float32: in bfloat16, with 8 bits of precision, updates at usual learning rates are rounded away. Use
    autocast for matrix products in bfloat16.
    """

    position_offset = 0

    def __init__(self, model: Model, modules: list[nn.Module] | None = None):
        super().__init__()
        if any(p.dtype.itemsize < 4 for p in model.parameters()):
            raise InputError("the weights to be fine-tuned are of half precision: load the model in float32")
        self.trained = nn.ModuleList([model] if modules is None else modules).requires_grad_(True)
        self.weights = parameters_of(model, self.trained)

    def forward(self) -> None:
        return None

    def fold(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.weights.items()}


def top_layers(model: Model) -> list[nn.Module]:
    """The modules that FT-TOP2 trains: the top two layers (BART: of the decoder), GPT-2's last layer norm, the LM head.

    As in the authors' code (`top_layers == 2` trains `transformer.wte`), a tied head stays tied, so the input
    embeddings are trained, too. Of GPT-2 medium's parameters the two layers are 7.1%, the head is 14.5%.
    """
    if model.encoder_decoder:
        return [*model.decoder.layers[-2:], model.head]
    return [*model.h[-2:], model.ln_f, model.head]


def parameters_of(model: Model, modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of some of the model's modules, by their names in the model."""
    ids = {id(p) for module in modules for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


class Adapter(nn.Module):
    """A bottleneck with a residual connection (Houlsby et al. 2019): y (..., C) -> y + up(relu(down(y))).

    Initialised as the identity. The weights are float32, products are computed in the dtype of y.
    """

    def __init__(self, C: int, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(C, width), nn.Linear(width, C)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:
        h = F.linear(y, self.down.weight.to(y.dtype), self.down.bias.to(y.dtype)).relu()
        return y + F.linear(h, self.up.weight.to(y.dtype), self.up.bias.to(y.dtype))


class Adapters(nn.Module):
    """An `Adapter` after each sublayer of the model, before its residual connection; installed as forward hooks.

    There are two in each layer (attention, MLP), in BART's decoder three (cross-attention). For GPT-2 medium they are
    3% of the model's parameters at width 108, 0.1% at width 3.
    """

    position_offset = 0

    def __init__(self, model: Model, width: int):
        super().__init__()
        layers = {name: layer for name, layer in model.named_modules() if name.endswith(SUBLAYER_ENDS)}
        if any(layer._forward_hooks for layer in layers.values()):
            raise InputError("the model has adapters already: load it again")
        self.names = list(layers)
        self.adapters = nn.ModuleList(Adapter(layer.out_features, width) for layer in layers.values())
        for layer, adapter in zip(layers.values(), self.adapters, strict=True):
            layer.register_forward_hook(lambda layer, x, y, adapter=adapter: adapter(y))

    def forward(self) -> None:
        return None

    def fold(self) -> dict[str, Tensor]:
        adapters = zip(self.names, self.adapters, strict=True)
        return {f"{name}.{key}": p for name, adapter in adapters for key, p in adapter.state_dict().items()}


class EmbeddingOnly(nn.Module):
    """Trained input embeddings of P virtual tokens, [EMB; x; y], for GPT-2 (paper 7.2); x begins at position P.

    In a causal model their keys and values do not depend on the text, so they are computed first and passed as a
    prefix. mlp_width: hidden width of the MLP that computes the embeddings; 0 trains the embeddings directly.
    """

    def __init__(self, model: Model, length: int, mlp_width: int = 512):
        super().__init__()
        if model.encoder_decoder:
            raise InputError("--method embedding needs GPT-2: in BART's encoder such tokens would see the text, too")
        words = model.wte.weight.float()
        C, std = words.size(1), 1.0 if mlp_width else words.std()
        self.position_offset = length
        self.embedding = nn.Parameter(torch.randn(length, C, device=words.device) * std)
        layers = [nn.Linear(C, mlp_width), nn.Tanh(), nn.Linear(mlp_width, C)] if mlp_width else []
        self.mlp = nn.Sequential(*layers)
        self.model = (model,)  # in a tuple, so that it is not a submodule

    def forward(self) -> KVPrefix:
        return embedding_prefix(self.model[0], self.mlp(self.embedding))

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        return {"embedding": self.mlp(self.embedding)}


def embedding_prefix(model: GPT2, embedding: Tensor, info: dict[str, str] | None = None) -> KVPrefix:
    """The prefix equivalent to P virtual tokens with these embeddings (P, C) at a GPT-2's first positions."""
    P = len(embedding)
    x = embedding.to(model.wte.weight)[None] + model.wpe.weight[:P]
    mask, layers = causal_mask(P, x), []
    for block in model.h:
        cache = LayerCache()
        x = block(x, mask, cache=cache)
        layers.append(cache.stacked()[:, 0])
    return KVPrefix({"decoder": torch.stack(layers)}, P, info or {})


class Infix(Prefix):
    """Keys and values of P virtual tokens between source and target, [x; INFIX; y], for GPT-2 (paper 7.3).

    They are trained like a prefix's. In the authors' code, keys and values from trained embeddings are added to them.
    """

    kind = KVInfix

    def __init__(self, model: Model, length: int, mlp_width: int = 512):
        if model.encoder_decoder:
            raise InputError("--method infix needs GPT-2: in BART, source and target are not one sequence")
        super().__init__(model, length, mlp_width)


Method = Prefix | Finetune | Adapters | EmbeddingOnly  # Infix is a Prefix


def make_method(
    method: str, model: Model, *, length: int = 0, mlp_width: int = 0, adapter_width: int = 0,
    position_offset: int | None = None, sites: list[str] | None = None,
) -> Method:  # fmt: skip
    """The module that a method of this name trains. Arguments that the method does not use may be left out."""
    if method == "prefix":
        return Prefix(model, length, mlp_width, position_offset, sites)
    if method == "finetune":
        return Finetune(model)
    if method == "top2":
        return Finetune(model, top_layers(model))
    if method == "adapter":
        return Adapters(model, adapter_width)
    if method == "embedding":
        return EmbeddingOnly(model, length, mlp_width)
    if method == "infix":
        return Infix(model, length, mlp_width)
    raise InputError(f"there is no method {method!r}, only {', '.join(METHODS)}")
