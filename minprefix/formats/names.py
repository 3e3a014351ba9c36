"""Renaming of tensors from HuggingFace's names to this project's, and back. Copies of tied tensors are dropped."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minprefix.core.bart import BART
from minprefix.core.model import Model
from minprefix.system.errors import InputError

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # HuggingFace stores these (in, out)
TIED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, DDP, FSDP
HEADS = ("score.", "v_head.", "classification_head.", "classifier.", "qa_outputs.", "multiple_choice_head.")


def without_wrappers(name: str) -> str:
    """The name of a tensor before torch.compile, DDP or FSDP wrapped the model or a module."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def without_heads(tensors: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """The tensors without those of classification, value and similar heads, which are listed on stderr."""
    heads = [name for name in tensors if without_wrappers(name).startswith(HEADS)]
    if heads:
        print(f"{folder}: left out {', '.join(heads):.200}, which generation does not need", file=sys.stderr)
    return {name: tensor for name, tensor in tensors.items() if name not in heads}


def to_huggingface(model: Model) -> dict[str, Tensor]:
    """The model's tensors as HuggingFace names and stores them: the inverse of the two functions below."""
    state = model.state_dict()
    if isinstance(model, BART) and "shared.weight" not in state:  # untied: HuggingFace stores it, but does not use it
        state["shared.weight"] = state["encoder.embed_tokens.weight"]
    start, bare = "model." if isinstance(model, BART) else "transformer.", ("final_logits_bias", "lm_head.weight")
    return {
        name if name in bare else start + name: tensor.T if name.endswith(TRANSPOSED) else tensor
        for name, tensor in state.items()
    }


def gpt2_from_huggingface(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """HuggingFace's GPT-2 tensors as `GPT2` names them, without mask buffers and the second copy of a tied head."""
    state = {}
    for name, tensor in bare_names(tensors, "transformer.").items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            state[name] = tensor.T if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
    if config["tie_word_embeddings"] and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        state.setdefault("wte.weight", head)  # safetensors' save_model stores a tied tensor under one name only
        if not torch.equal(head, state["wte.weight"]):
            tied = "config.json has tie_word_embeddings true, GPT-2's default: set it to false"
            raise InputError(f"tensors 'lm_head.weight' and 'wte.weight' differ, but {tied}")
    return state


def bart_from_huggingface(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """HuggingFace's BART tensors as `BART` names them, with one copy of a tied embedding."""
    tensors = bare_names(tensors, "model.")
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith(".version")}  # fairseq's versions
    state.setdefault("final_logits_bias", torch.zeros(1, config["vocab_size"]))
    if config["tie_word_embeddings"]:
        first, *copies = [name for name in TIED if name in state] or [""]  # files may lack `shared`
        for name in copies:
            if not torch.equal(state[name], state[first]):
                raise InputError(f"tensors {first!r} and {name!r} differ, but config.json has tie_word_embeddings true")
            del state[name]
        return {"shared.weight": state.pop(first), **state} if first else state
    shared = state.pop("shared.weight", None)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if shared is not None and name not in state:
            state[name] = shared.clone()  # copies: fine-tuning would update a shared tensor twice
    return state


def bare_names(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors without `start` and wrappers in their names, which only some folders have.

    InputError if two tensors get the same name.
    """
    bare = {}
    for name, tensor in tensors.items():
        name = without_wrappers(name).removeprefix(start)
        if name in bare:
            raise InputError(f"tensor {name!r:.200} is there twice, with and without {start!r} or a wrapper's name")
        bare[name] = tensor
    return bare
