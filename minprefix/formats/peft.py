"""Reading and writing PEFT's prefix-tuning adapters: adapter_config.json and one tensor, as in peft 0.21.

In PEFT only the decoder's self-attention has a prefix, and the text starts at position P. Shapes: P prefix length,
L layers, H heads, D head dimension, C = H * D.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from minprefix.formats.safetensors import read_bin, read_object, read_safetensors, write_safetensors
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], int, dict[str, str]]:
    """Read a PEFT folder as ({"decoder": (L, 2, H, P, D)}, position offset, metadata).

    InputError if it is not a prefix-tuning adapter, or its config and tensor do not match. With `prefix_projection`
    PEFT saves the MLP's output, not the MLP, so both kinds of adapter are read the same way.
    """
    folder = Path(folder)
    config, where = read_object(folder / "adapter_config.json"), f"{folder}/adapter_config.json"
    if config.get("peft_type") != "PREFIX_TUNING":
        raise InputError(f"{where}: peft_type is {config.get('peft_type')!r:.40}, only PREFIX_TUNING is a prefix")
    for key in SIZES:
        if type(config.get(key)) is not int or not 0 < config[key] < 2**20:
            raise InputError(f"{where}: {key} is {config.get(key)!r:.40}, a whole number above 0 is needed")
    P, layers, H, C = (config[key] for key in SIZES)
    if C % H:
        raise InputError(f"{where}: token_dim {C} is no multiple of num_attention_heads {H}")
    seq2seq, submodules = config.get("task_type") == "SEQ_2_SEQ_LM", config.get("num_transformer_submodules")
    if submodules not in (None, 2 if seq2seq else 1):
        problem = f"num_transformer_submodules is {submodules!r:.40} for a {config.get('task_type')!r:.40}"
        raise InputError(f"{where}: {problem}, PEFT computes with 2 for SEQ_2_SEQ_LM and 1 else")

    table, info = read_table(folder)
    if table.shape != (P, layers * 2 * C):
        raise InputError(f"{folder}: prompt_embeddings is {tuple(table.shape)}, {where} asks for {(P, layers * 2 * C)}")
    decoder_layers = info.pop("decoder_layers", str(layers))  # written by `write_adapter`
    kv = table.reshape(P, layers, 2, H, C // H).permute(1, 2, 3, 0, 4)
    if seq2seq:
        kv = kv[decoder_rows(layers, decoder_layers, folder)]
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base:
        info["base_model"] = base
    return {"decoder": kv}, P, {**info, "format": "peft", "task_type": f"{config.get('task_type')!s:.40}"}


def read_table(folder: Path) -> tuple[Tensor, dict[str, str]]:
    """The adapter's tensor (P, L * 2 * C) and its file's metadata: that of `write_adapter`, or none."""
    path = folder / "adapter_model.safetensors"
    if path.exists():
        tensors, info = read_safetensors(path)
    else:
        path, info = folder / "adapter_model.bin", {}
        if not path.exists():
            raise InputError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin: save it again")
        tensors = read_bin(path)
    if set(tensors) != {"prompt_embeddings"}:
        names = ", ".join(sorted(tensors)) or "none"
        raise InputError(f"{path} must hold one tensor, prompt_embeddings, it holds {names:.200}")
    return tensors["prompt_embeddings"], info


def decoder_rows(layers: int, decoder_layers: str, where: str | Path) -> list[int]:
    """The index of the adapter's layer that PEFT gives to each decoder layer of an encoder-decoder.

    PEFT repeats the list of all layers' keys and values, then splits it into four tensors per layer instead of two and
    uses the first two of each: decoder layer i gets the adapter's layer 2 * i, modulo their number.
    """
    digits = decoder_layers.isascii() and decoder_layers.isdigit() and len(decoder_layers) < 8
    if not digits or not 0 < int(decoder_layers) <= layers:
        raise InputError(f"{where}: decoder_layers is {decoder_layers!r:.40} in its metadata, it has {layers} layers")
    return [2 * i % layers for i in range(int(decoder_layers))]


def write_adapter(folder: str | Path, kv: Tensor, seq2seq: bool, info: dict[str, str]) -> None:
    """Write keys and values (L, 2, H, P, D) as a folder that `PeftModel.from_pretrained` reads.

    seq2seq: for an encoder-decoder, where PEFT uses every second layer of the adapter (see `decoder_rows`): layers of
    zeros are inserted between the decoder's.
    """
    L, _, H, P, D = kv.shape
    if seq2seq:
        kv = torch.stack([kv, torch.zeros_like(kv)], dim=1).flatten(0, 1)
        info = {**info, "decoder_layers": str(L)}
    table = kv.permute(3, 0, 1, 2, 4).reshape(P, -1)
    config = {
        "peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        "base_model_name_or_path": info.get("base_model"), "inference_mode": True,
        "num_virtual_tokens": P, "num_layers": len(kv), "num_attention_heads": H, "token_dim": H * D,
        "num_transformer_submodules": 2 if seq2seq else 1, "prefix_projection": False, "encoder_hidden_size": H * D,
    }  # fmt: skip
    folder = Path(folder)
    write_safetensors(folder / "adapter_model.safetensors", {"prompt_embeddings": table}, {**info, "format": "pt"})
    with atomic_write(folder / "adapter_config.json") as file:  # last: it makes the folder an adapter
        json.dump(config, file, indent=2)
