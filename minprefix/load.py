"""A HuggingFace folder as a frozen model."""

import torch

from minprefix.checkpoint import read_config, read_tensors, resolve_model
from minprefix.files import InputError
from minprefix.gpt2 import GPT2, from_huggingface


def load_model(name, device="cpu", dtype=torch.float32):
    """The model in a folder (or bundled under that name): frozen, in eval mode, on a device, in a dtype.

    InputError when the folder, its config.json or its tensors are missing, malformed or of an unsupported kind.
    """
    folder = resolve_model(name)
    config = read_config(folder)
    if config.get("model_type") != "gpt2":
        raise InputError(f"{folder}/config.json: model_type is {config.get('model_type')!r}, minprefix runs 'gpt2'")
    with torch.device("meta"):  # no memory and no random numbers for weights that the file will bring
        model = GPT2(config)
    state = from_huggingface(read_tensors(folder), model.config)
    check_state(state, model.state_dict(), folder)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval().to(device=device, dtype=dtype)


def check_state(state, expected, folder):
    """InputError unless the tensors are exactly those that the model needs, by name, shape and kind of number."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has, and the model does not know,", unknown)
        raise InputError(f"{folder} {what} {len(names)} of the model's {len(expected)} tensors, first {names[0]!r}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
            raise InputError(f"{folder}: tensor {name!r} has shape {shapes}")
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: tensor {name!r} holds {tensor.dtype}, not floating-point numbers")
