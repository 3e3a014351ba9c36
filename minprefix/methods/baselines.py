"""What prefix-tuning is compared with: fine-tuning, top layers, adapters, embedding-only and infix (paper 5, 7).

Each is trained in the place of a `Prefix`: calling it gives the prefix that the model takes, or None where the model
itself is changed; `fold` gives the tensors to be saved, by name. Shapes: P virtual tokens, C model dimension, L layers,
H heads, D head dimension.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minprefix.core.attention import causal_mask
from minprefix.core.cache import LayerCache
from minprefix.core.gpt2 import GPT2
from minprefix.core.model import Model
from minprefix.core.prefix import Prefix
from minprefix.core.prefix_kv import KVInfix, KVPrefix
from minprefix.formats.hub import model_name, resolve_model
from minprefix.formats.load import check_state, save_model
from minprefix.formats.prefix_file import FORMS, check_fingerprint, load_prefix, save_prefix, version
from minprefix.formats.safetensors import read_config, read_safetensors, write_safetensors
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
    return KVPrefix({"decoder": torch.stack(layers)}, P, info)


class Infix(Prefix):
    """Keys and values of P virtual tokens between source and target, [x; INFIX; y], for GPT-2 (paper 7.3).

    They are free, as a prefix's are; the authors' code adds to them what the model computes for trained embeddings.
    """

    form = KVInfix

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


# ---- files ----


def save_method(
    trainable: Method, model: Model, method: str, out: Path, base: Path, base_fingerprint: list[float], *,
    task: str, sequence: str, max_source: int | None = None,
) -> Path:  # fmt: skip
    """Write what was trained into a run's folder, METHOD.safetensors or the folder of a fine-tuned model -> its path.

    base, base_fingerprint: the model's folder, its fingerprint before training. With it goes what sample.py must know:
    the task, where sources are cut. sequence: `sequence_form` of the model, for people who look into the file.
    """
    info = {"task": "jsonl" if task.endswith(".jsonl") else task, "sequence": sequence}
    if max_source:
        info["max_source"] = str(max_source)
    if method == "finetune":
        save_model(model, out / "model", base, info)
        return out / "model"
    path = out / f"{method}.safetensors"
    info |= {"method": method, "base_model": model_name(base) or str(base.resolve())}
    if isinstance(trainable, Prefix):
        save_prefix(path, trainable.fold(), model, info)
    else:
        save_trained(path, trainable.fold(), base_fingerprint, info)
    return path


def find_trained(path: str | Path) -> Path:
    """What a run saved: that file itself; in a run's folder METHOD.safetensors, or the folder of a fine-tuned model.

    A PEFT folder stands for itself, so does that of a fine-tuned model.
    """
    path = Path(path)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "config.json").is_file() and finetune_metadata(read_config(path)):
        return path
    for file in (path, *(path / f"{method}.safetensors" for method in METHODS)):
        if file.is_file():
            return file
    if (path / "checkpoint.pt").is_file():
        raise InputError(f"the run in {path} has not ended: go on with it by train.py's command and --resume")
    raise InputError(f"there is nothing at {path} that train.py saved: train first, or check the path")


def save_trained(
    path: str | Path, tensors: dict[str, Tensor], base_fingerprint: list[float], info: dict[str, str]
) -> None:
    """Write what `fold` gives. base_fingerprint: the model's, before training. info: method, base_model, ... (str)."""
    info = {"format": "minprefix", "version": version(), "base_fingerprint": json.dumps(base_fingerprint), **info}
    write_safetensors(path, tensors, info)


def finetune_metadata(config: dict[str, Any]) -> dict[str, str]:
    """What train.py wrote into the config.json of a fine-tuned model; nothing of any other model."""
    info = config.get("minprefix")
    return {key: str(value) for key, value in info.items()} if isinstance(info, dict) else {}


def resolve_base_model(given: str | None, path: Path | None, info: dict[str, str]) -> Path:
    """The folder of the model that is given on the command line, or else of the one that what was trained names.

    path: what was trained, named in errors; info: its metadata.
    """
    if given:
        return resolve_model(given)
    if path is None:
        raise InputError("which model? give --prefix FILE, or --model for a frozen model alone")
    name = info.get("base_model")
    if not name:
        raise InputError(f"{path} does not name its base model: give --model")
    try:
        return resolve_model(name)
    except InputError as error:
        named = f"{path} names {name!r:.200} as its base model; if that is elsewhere now, give --model"
        raise InputError(f"{named}: {error}") from error


def trained_max_source(info: dict[str, str]) -> int | None:
    """Where train.py cut the sources, if it was told to."""
    length = info.get("max_source", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 8 else None


def read_trained(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a run saved in a file, or PEFT in a folder -> tensors by name, and what it says of them (dict of str).

    Of a fine-tuned model's folder no tensors.
    """
    if (Path(path) / "config.json").is_file():
        return {}, {"method": "finetune", **finetune_metadata(read_config(path))}
    if Path(path).is_dir():
        prefix = load_prefix(path)
        return prefix, prefix.info
    tensors, info = read_safetensors(path)
    if info.get("format") != "minprefix" or info.get("method", "prefix") not in METHODS:
        raise InputError(f"{path} is no file of minprefix's train.py: its metadata does not say so")
    return tensors, info


@torch.no_grad()
def load_trained(path: str | Path, model: Model) -> KVPrefix | None:
    """Put what a run saved on its base model -> the prefix for the model to take, or None if the model was changed.

    InputError if the file is damaged, or was made for another model.
    """
    tensors, info = read_trained(path)
    method = info.get("method", "prefix")
    if method == "finetune":
        raise InputError(f"{path} is a fine-tuned model: load_model loads it")
    if method in FORMS:
        return load_prefix(path, model)
    check_fingerprint(info, model, path)
    if method == "embedding":
        if model.encoder_decoder:
            raise InputError(f"{path} is of virtual tokens at the input of a GPT-2, the model is a BART")
        P = next((tensor.size(0) for tensor in tensors.values() if tensor.dim()), 0)
        if not 0 < P <= model.n_positions:
            raise InputError(f"{path} has {P} virtual tokens: the model {model.n_positions} positions")
        check_trained(tensors, {"embedding": torch.empty(P, model.head.weight.size(1))}, path)
        return embedding_prefix(model, tensors["embedding"], info)
    model.config.pop("eos_token_id", None)  # targets in training end with the tokeniser's end token
    own = new_adapters(tensors, model, path) if method == "adapter" else parameters_of(model, top_layers(model))
    check_trained(tensors, own, path)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return None


def new_adapters(tensors: dict[str, Tensor], model: Model, path: str | Path) -> dict[str, Tensor]:
    """Put adapters of the width of those in a file into the model -> their numbers by name."""
    width = next((tensor.numel() for name, tensor in tensors.items() if name.endswith(".down.bias")), 0)
    count = sum(name.endswith(SUBLAYER_ENDS) for name, _ in model.named_modules())
    C = model.head.weight.size(1)
    # Before they are made: a width that a damaged file has could ask for any memory.
    if sum(tensor.numel() for tensor in tensors.values()) != count * (2 * C * width + width + C):
        raise InputError(f"{path} does not hold {count} adapters of width {width} for a model of width {C}")
    return Adapters(model, width).to(model.head.weight.device).fold()


def check_trained(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """InputError unless a file's tensors are those that are expected, and finite."""
    check_state(tensors, expected, path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} holds numbers that are not finite")
