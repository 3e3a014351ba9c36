"""What prefix-tuning is compared with: fine-tuning, top layers, adapters, embedding-only and infix (paper 5, 7).

Each is trained in the place of a `Prefix`: calling it gives the prefix that the model takes, or None where the model
itself is changed; `fold` gives the tensors to be saved, by name. Shapes: P virtual tokens, C model dimension, L layers,
H heads, D head dimension.
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
SUBLAYER_ENDS = ("attn.c_proj", "mlp.c_proj", "attn.out_proj", ".fc2")  # the last product of each, in GPT-2 and BART


class Finetune(nn.Module):
    """Weights of the model under training: those of some of its modules, by default of all.

    The model's weights must be float32: steps of a usual learning rate are lost in bfloat16's eight bits. Products in
    bfloat16 are autocast's to make.
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
    """The modules of FT-TOP2: the top layers (BART: of the decoder), GPT-2's last layer norm, and the LM head.

    As in the authors' code (`top_layers == 2` trains `transformer.wte`), a tied head stays tied: the embeddings of the
    input change with it. Of GPT-2 medium's weights the two layers are 7.1%, the head is 14.5%.
    """
    if model.encoder_decoder:
        return [*model.decoder.layers[-2:], model.head]
    return [*model.h[-2:], model.ln_f, model.head]


def parameters_of(model: Model, modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The model's parameters that belong to some of its modules, by their names in the model."""
    own = {id(p) for module in modules for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


class Adapter(nn.Module):
    """A bottleneck with a residual connection (Houlsby et al. 2019): y (..., C) -> y + up(relu(down(y))).

    It begins as the identity. The weights are float32, the products are made in the dtype of y.
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
    """An `Adapter` after each sublayer of the model, before its residual connection; the model has them from now on.

    GPT-2 has two in a layer (attention, MLP), BART's decoder a third (cross-attention). For GPT-2 medium they are 3% of
    the model's weights at width 108, 0.1% at width 3.
    """

    position_offset = 0

    def __init__(self, model: Model, width: int):
        super().__init__()
        layers = {name: layer for name, layer in model.named_modules() if name.endswith(SUBLAYER_ENDS)}
        if any(layer._forward_hooks for layer in layers.values()):
            raise InputError("the model has adapters already: load it anew")
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
    """P virtual tokens at the input embedding alone, [EMB; x; y], for GPT-2 (paper 7.2); x begins at position P.

    What a causal model computes for them does not depend on what follows: they are the prefix of the keys and values
    that the frozen model has for them. mlp_width: width of an MLP that they come out of; 0 trains them directly.
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
        self.model = (model,)  # in a tuple, for its parameters are not this module's

    def forward(self) -> KVPrefix:
        return embedding_prefix(self.model[0], self.mlp(self.embedding))

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        return {"embedding": self.mlp(self.embedding)}


def embedding_prefix(model: GPT2, embedding: Tensor, info: dict[str, str] | None = None) -> KVPrefix:
    """The prefix that the embeddings (P, C) of virtual tokens at a GPT-2's first positions amount to."""
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

    They are free, as a prefix's are; the authors' code adds to them what the model computes for trained embeddings.
    """

    kind = KVInfix

    def __init__(self, model: Model, length: int, mlp_width: int = 512):
        if model.encoder_decoder:
            raise InputError("--method infix needs GPT-2: in BART, source and target are not one sequence")
        super().__init__(model, length, mlp_width)


Method = Prefix | Finetune | Adapters | EmbeddingOnly  # what is trained


def make_method(
    method: str, model: Model, *, length: int = 0, mlp_width: int = 0, adapter_width: int = 0,
    position_offset: int | None = None, sites: list[str] | None = None,
) -> Method:  # fmt: skip
    """What a method trains on a model: a `Prefix`, or what takes its place. 0, None: the method does without."""
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
