"""Loading a HuggingFace folder as a frozen model, and saving a model as such a folder."""

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
from minprefix.formats.hub import TOKENIZER_FILES, resolve_model
from minprefix.formats.names import bart_from_huggingface, gpt2_from_huggingface, to_huggingface, without_heads
from minprefix.formats.safetensors import read_config, read_tensors, write_safetensors
from minprefix.system.device import pick_dtype
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

FromHuggingFace = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]  # tensors, config -> tensors
CLASSES: dict[str, tuple[type[Model], FromHuggingFace]] = {
    "gpt2": (GPT2, gpt2_from_huggingface),
    "bart": (BART, bart_from_huggingface),
}


def load_model(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load the model of a folder or a name (see `resolve_model`), frozen and in eval mode, to a device in a dtype.

    InputError if the folder, its config.json or its tensors are missing, malformed or of an unsupported kind.
    """
    folder = resolve_model(name)
    model = empty_model(folder)
    tensors = without_heads(read_tensors(folder), folder)
    state = CLASSES[model.config["model_type"]][1](tensors, model.config)
    check_state(state, model.state_dict(), folder)
    for key in state:  # one by one, so that at most one tensor is in memory in both dtypes
        state[key] = state[key].to(device=device, dtype=dtype)
    model.load_state_dict(state, assign=True)
    model.folder = folder.resolve()
    return model.requires_grad_(False).eval()


def empty_model(folder: str | Path) -> Model:
    """The model that a folder's config.json describes, on torch's device "meta": without weights."""
    config = read_config(folder)
    kind = model_kind(config, folder)
    with torch.device("meta"):
        return CLASSES[kind][0](config)


def model_kind(config: dict[str, Any], folder: str | Path) -> str:
    """The model_type in a folder's config.json; InputError if it is none of `CLASSES`."""
    kind = config.get("model_type")
    if kind not in list(CLASSES):  # a list, since the value in the file may not be hashable
        raise InputError(f"{folder}/config.json: model_type is {kind!r}, minprefix runs {' and '.join(CLASSES)}")
    return kind


def save_model(
    model: Model, folder: Path, tokenizer_folder: Path | None = None, info: dict[str, str] | None = None
) -> None:
    """Write a model in its dtype as a folder that `load_model` and HuggingFace read.

    tokenizer_folder: its tokeniser files are copied. info: stored in config.json under "minprefix".
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_huggingface(model)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name in TOKENIZER_FILES:
        if tokenizer_folder and (tokenizer_folder / name).is_file():
            shutil.copy(tokenizer_folder / name, folder / name)
    with atomic_write(folder / "config.json") as file:  # last: it makes the folder a model
        json.dump({**model.config, "dtype": dtype, **({"minprefix": info} if info else {})}, file, indent=2)


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: str | Path) -> None:
    """Raise InputError unless the tensors have the expected names and shapes, and are floating-point."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        problem = f"{folder} lacks {len(missing)} of the model's {len(expected)} tensors, first {missing[0]!r}"
        raise InputError(problem + (f"; it has {likely_name(missing[0], unknown)}" if unknown else ""))
    if unknown:
        raise InputError(f"{folder} has tensors that the model does not know, {len(unknown)} of them: {unknown[0]!r}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model needs {tuple(expected[name].shape)}"
            raise InputError(f"{folder}: tensor {name!r} has shape {shapes}")
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: tensor {name!r} holds {tensor.dtype}, not floating-point numbers")


def likely_name(missing: str, unknown: list[str]) -> str:
    """For the error message: an unknown tensor whose name ends with the missing one's, or else the first unknown."""
    for name in unknown:
        if name.endswith(f".{missing}"):
            return f"{name!r:.200}: rename its tensors without {name.removesuffix(missing)!r:.100}"
    return f"{unknown[0]!r:.200} instead: it is of another kind of model, or of another program"


def pick_writing_dtype(name: str, device: str, folder: str | Path) -> torch.dtype:
    """As `pick_dtype`, for generation: "auto" is float32 for narrow models, which are as fast in it, and more exact."""
    narrow = name == "auto" and empty_model(folder).head.weight.size(1) < 512
    return torch.float32 if narrow else pick_dtype(name, device)
