"""HuggingFace's names of tensors to this project's models and back: they differ little, and some copies are dropped."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.core.bart import BART
from minprefix.core.gpt2 import GPT2
from minprefix.core.model import Model
from minprefix.system.errors import InputError

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # HuggingFace stores these (in, out)
TIED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, DDP, FSDP
HEADS = ("score.", "v_head.", "classification_head.", "classifier.", "qa_outputs.", "multiple_choice_head.")


def without_wrappers(tensors: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """The tensors under the names that they had before torch.compile, DDP or FSDP wrapped their model.

    InputError if two tensors get the same name.
    """
    bare = {}
    for name, tensor in tensors.items():
        bare_name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare_name in bare:
            raise InputError(f"{folder}: tensor {bare_name!r:.200} is there twice, with and without a wrapper's name")
        bare[bare_name] = tensor
    return bare


def without_heads(tensors: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """The tensors without classification, value and similar heads; one line on stderr names what is dropped."""
    heads = [name for name in tensors if name.startswith(HEADS)]
    if heads:
        print(f"{folder}: left out {', '.join(heads):.200}, which generation does not need", file=sys.stderr)
    return {name: tensor for name, tensor in tensors.items() if name not in heads}


def to_huggingface(model: Model) -> dict[str, Tensor]:
    """Tensors for a `model.safetensors` that HuggingFace loads as it is: the inverse of the two functions below."""
    return bart_to_huggingface(model) if isinstance(model, BART) else gpt2_to_huggingface(model)


def gpt2_from_huggingface(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """HuggingFace's tensors under this model's names; mask buffers and the second copy of a tied head are dropped."""
    state = {}
    for name, tensor in bare_names(tensors, "transformer.").items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state[name] = tensor.T if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    if config["tie_word_embeddings"] and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        state.setdefault("wte.weight", head)  # safetensors' save_model keeps one name of a tied tensor
        if not torch.equal(head, state["wte.weight"]):
            tied = "config.json has tie_word_embeddings true, GPT-2's default: set it to false"
            raise InputError(f"tensors 'lm_head.weight' and 'wte.weight' differ, but {tied}")
    return state


def gpt2_to_huggingface(model: GPT2) -> dict[str, Tensor]:
    """The inverse of `gpt2_from_huggingface`: tensors for a `model.safetensors` that HuggingFace loads as it is."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name if name == "lm_head.weight" else "transformer." + name
        tensors[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    return tensors


def bart_from_huggingface(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """HuggingFace's tensors under this model's names; of a tied embedding one, however many copies are stored."""
    tensors = bare_names(tensors, "model.")
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith(".version")}  # fairseq's marks
    state.setdefault("final_logits_bias", torch.zeros(1, config["vocab_size"]))
    if config["tie_word_embeddings"]:
        first, *copies = [name for name in TIED if name in state] or [""]  # any of them may stand for `shared`
        for name in copies:
            if not torch.equal(state[name], state[first]):
                raise InputError(f"tensors {first!r} and {name!r} differ, but config.json has tie_word_embeddings true")
            del state[name]
        return {"shared.weight": state.pop(first), **state} if first else state
    shared = state.pop("shared.weight", None)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if shared is not None and name not in state:
            state[name] = shared.clone()  # each its own: in one memory, fine-tuning would step it twice
    return state


def bart_to_huggingface(model: BART) -> dict[str, Tensor]:
    """The inverse of `bart_from_huggingface`: tensors for a `model.safetensors` that HuggingFace loads as it is."""
    state = model.state_dict()
    if "shared.weight" not in state:  # untied: HuggingFace has a tensor of that name all the same, and does not use it
        state["shared.weight"] = state["encoder.embed_tokens.weight"]
    bare = ("final_logits_bias", "lm_head.weight")
    return {name if name in bare else "model." + name: tensor for name, tensor in state.items()}


def bare_names(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors with `start` removed from their names: some folders have it before all names, others do not."""
    bare = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(start)
        if name in bare:
            raise InputError(f"tensor {name!r} is there twice, with and without {start!r} before its name")
        bare[name] = tensor
    return bare
