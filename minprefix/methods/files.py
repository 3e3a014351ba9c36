"""The files of trained parameters of all methods: writing them to a run's folder, finding and loading them.

A prefix, an infix, adapters, top layers and virtual tokens are saved as one file METHOD.safetensors, a fine-tuned model
as a model folder.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.core.model import Model, Tokenizer
from minprefix.core.prefix import Prefix
from minprefix.core.prefix_kv import KVPrefix
from minprefix.formats.hub import model_name, resolve_model
from minprefix.formats.load import check_state, save_model
from minprefix.formats.prefix_file import KINDS, check_fingerprint, load_prefix, save_prefix, version
from minprefix.formats.safetensors import read_config, read_safetensors, write_safetensors
from minprefix.methods.baselines import (
    METHODS,
    SUBLAYER_ENDS,
    Adapters,
    Method,
    embedding_prefix,
    parameters_of,
    top_layers,
)
from minprefix.system.errors import InputError


def save_method(
    trainable: Method, model: Model, method: str, out: Path, base: Path, base_fingerprint: list[float], *,
    task: str, sequence: str, max_source: int | None = None,
) -> Path:  # fmt: skip
    """Write what was trained to a run's folder and return its path: METHOD.safetensors, or the folder `model`.

    base, base_fingerprint: the model's folder, and its fingerprint before training. task, max_source: stored for
    sample.py; the latter is the length to which sources are cut. sequence: `sequence_form` of the model, for readers
    of the file.
    """
    info = {"task": "jsonl" if task.endswith((".jsonl", ".csv")) else task, "sequence": sequence}
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
    """The trained file or folder that a path refers to: the path itself, or METHOD.safetensors or `model` in it.

    path: a saved file, a run's folder, the folder of a fine-tuned model or a PEFT folder. InputError for another path.
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


def start_prefix(trainable: Prefix, init: str, model: Model, tokenizer: Tokenizer) -> None:
    """Initialise a prefix or infix from a trained one if `init` is an existing path, else from `init` as words."""
    if os.path.exists(init):
        trainable.init_from(load_prefix(find_trained(init), model))
    else:
        trainable.init_from_words(model, tokenizer, init)


def save_trained(
    path: str | Path, tensors: dict[str, Tensor], base_fingerprint: list[float], info: dict[str, str]
) -> None:
    """Write the tensors of `fold`. base_fingerprint: the model's, before training. info: method, base_model, ..."""
    info = {"format": "minprefix", "version": version(), "base_fingerprint": json.dumps(base_fingerprint), **info}
    write_safetensors(path, tensors, info)


def finetune_metadata(config: dict[str, Any]) -> dict[str, str]:
    """The metadata that train.py stored in a fine-tuned model's config.json; an empty dict for any other model."""
    info = config.get("minprefix")
    return {key: str(value) for key, value in info.items()} if isinstance(info, dict) else {}


def resolve_base_model(given: str | None, path: Path | None, info: dict[str, str]) -> Path:
    """The folder of the model given on the command line, or else of the base model that a trained file names.

    path: the trained file, for errors; info: its metadata.
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
        problem = f"{path} names {name!r:.200} as its base model; if that is elsewhere now, give --model"
        raise InputError(f"{problem}: {error}") from error


def trained_max_source(info: dict[str, str]) -> int | None:
    """The number of tokens to which train.py cut the sources, from a file's metadata; None if it did not."""
    length = info.get("max_source", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 8 else None


def read_trained(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a trained file or PEFT folder as (tensors by name, metadata); of a fine-tuned model only the metadata."""
    if (Path(path) / "config.json").is_file():
        return {}, {"method": "finetune", **finetune_metadata(read_config(path))}
    if Path(path).is_dir():
        prefix = load_prefix(path)
        return prefix.kv, prefix.info
    tensors, info = read_safetensors(path)
    if info.get("format") != "minprefix" or info.get("method", "prefix") not in METHODS:
        raise InputError(f"{path} is no file of minprefix's train.py: its metadata does not say so")
    return tensors, info


@torch.no_grad()
def load_trained(path: str | Path, model: Model) -> KVPrefix | None:
    """Load a trained file for its base model: return the prefix to pass to it, or None if `model` itself is changed.

    InputError if the file is damaged, or was made for another model.
    """
    tensors, info = read_trained(path)
    method = info.get("method", "prefix")
    if method == "finetune":
        raise InputError(f"{path} is a fine-tuned model: load_model loads it")
    if method in KINDS:
        return load_prefix(path, model)
    check_fingerprint(info, model, path)
    if method == "embedding":
        if model.encoder_decoder:
            raise InputError(f"{path} has the input embeddings of a GPT-2's virtual tokens, the model is a BART")
        P = next((tensor.size(0) for tensor in tensors.values() if tensor.dim()), 0)
        if not 0 < P <= model.n_positions:
            raise InputError(f"{path} has {P} virtual tokens: the model {model.n_positions} positions")
        check_trained(tensors, {"embedding": torch.empty(P, model.head.weight.size(1))}, path)
        return embedding_prefix(model, tensors["embedding"], info)
    model.config.pop("eos_token_id", None)  # targets in training end with the tokeniser's end token
    parameters = new_adapters(tensors, model, path) if method == "adapter" else parameters_of(model, top_layers(model))
    check_trained(tensors, parameters, path)
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    return None


def new_adapters(tensors: dict[str, Tensor], model: Model, path: str | Path) -> dict[str, Tensor]:
    """Add adapters to the model, of the width of those in a file, and return their parameters by name."""
    width = next((tensor.numel() for name, tensor in tensors.items() if name.endswith(".down.bias")), 0)
    count = sum(name.endswith(SUBLAYER_ENDS) for name, _ in model.named_modules())
    C = model.head.weight.size(1)
    # Checked before they are created: the width in a damaged file could need any amount of memory.
    if sum(tensor.numel() for tensor in tensors.values()) != count * (2 * C * width + width + C):
        raise InputError(f"{path} does not hold {count} adapters of width {width} for a model of width {C}")
    return Adapters(model, width).to(model.head.weight.device).fold()


def check_trained(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise InputError unless a file's tensors have the expected names and shapes, and are finite."""
    check_state(tensors, expected, path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} holds numbers that are not finite")
