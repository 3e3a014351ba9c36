"""A HuggingFace folder as a frozen model, on the device and in the dtype that suit the machine; and back."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.core.bart import BART
from minprefix.core.gpt2 import GPT2
from minprefix.core.model import Model
from minprefix.formats.hub import resolve_model
from minprefix.formats.names import (
    bart_from_huggingface,
    gpt2_from_huggingface,
    to_huggingface,
    without_heads,
    without_wrappers,
)
from minprefix.formats.safetensors import read_config, read_tensors, write_safetensors
from minprefix.system.device import pick_dtype
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

FromHuggingFace = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]  # tensors, config -> tensors
CLASSES: dict[str, tuple[type[Model], FromHuggingFace]] = {
    "gpt2": (GPT2, gpt2_from_huggingface),
    "bart": (BART, bart_from_huggingface),
}
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def load_model(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model in a folder, or of a name (see `resolve_model`): frozen, in eval mode, on a device, in a dtype.

    InputError when the folder, its config.json or its tensors are missing, malformed or of an unsupported kind.
    """
    folder = resolve_model(name)
    model = empty_model(folder)
    tensors = without_heads(without_wrappers(read_tensors(folder), folder), folder)
    state = CLASSES[model.config["model_type"]][1](tensors, model.config)
    check_state(state, model.state_dict(), folder)
    for key in state:  # one by one, so that never more than one tensor is in memory in both dtypes
        state[key] = state[key].to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    model.folder = folder.resolve()
    return model.requires_grad_(False).eval()


def empty_model(folder: str | Path) -> Model:
    """The model that a folder's config.json describes, without weights: on torch's device "meta", in no memory."""
    config = read_config(folder)
    kind = model_kind(config, folder)
    with torch.device("meta"):
        return CLASSES[kind][0](config)


def model_kind(config: dict[str, Any], folder: str | Path) -> str:
    """The model_type in a folder's config.json; InputError if it is none of `CLASSES`."""
    kind = config.get("model_type")
    if kind not in list(CLASSES):  # a list, since JSON's value need not be hashable
        raise InputError(f"{folder}/config.json: model_type is {kind!r}, minprefix runs {' and '.join(CLASSES)}")
    return kind


def save_model(
    model: Model, folder: Path, tokenizer_folder: Path | None = None, info: dict[str, str] | None = None
) -> None:
    """Write a model as a folder that `load_model` and HuggingFace read, in its dtype, with a tokeniser's files.

    info: what config.json shall say as "minprefix" beside the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_huggingface(model)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name in TOKENIZER_FILES:
        if tokenizer_folder and (tokenizer_folder / name).is_file():
            shutil.copy(tokenizer_folder / name, folder / name)
    with atomic_write(folder / "config.json") as file:  # last: a folder without one is no model
        json.dump({**model.config, "dtype": dtype, **({"minprefix": info} if info else {})}, file, indent=2)


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: str | Path) -> None:
    """InputError unless the tensors are exactly those that the model needs, by name, shape and kind of number."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has, and the model does not know,", unknown)
        problem = f"{folder} {what} {len(names)} of the model's {len(expected)} tensors, first {names[0]!r}"
        raise InputError(problem + (f"; it has {likely_name(missing[0], unknown)}" if missing and unknown else ""))
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model needs {tuple(expected[name].shape)}"
            raise InputError(f"{folder}: tensor {name!r} has shape {shapes}")
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: tensor {name!r} holds {tensor.dtype}, not floating-point numbers")


def likely_name(missing: str, unknown: list[str]) -> str:
    """What to say of a folder's tensors that the model does not know: that one is the missing, under a longer name."""
    for name in unknown:
        if name.endswith(f".{missing}"):
            return f"{name!r:.200}: rename its tensors without {name.removesuffix(missing)!r:.100}"
    return f"{unknown[0]!r:.200} instead: it is of another kind of model, or of another program"


def pick_writing_dtype(name: str, device: str, folder: str | Path) -> torch.dtype:
    """As `pick_dtype`, for texts by the model in a folder: a narrow one is as fast in float32, and free of rounding."""
    narrow = name == "auto" and empty_model(folder).head.weight.size(1) < 512
    return torch.float32 if narrow else pick_dtype(name, device)
