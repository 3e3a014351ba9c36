"""Checks of a HuggingFace `config.json`: sizes that make sense, a known activation, no unsupported variants."""

from collections.abc import Iterable
from typing import Any

from minprefix.core.kernels import ACTIVATIONS
from minprefix.system.errors import InputError


def check_sizes(config: dict[str, Any], keys: Iterable[str], kind: str) -> dict[str, int]:
    """The sizes under these keys as a dict; InputError unless all are positive integers of a sane magnitude."""
    sizes: dict[str, Any] = {key: config.get(key) for key in keys}
    for key, size in sizes.items():
        most = 1000 if "layer" in key else 2**24  # far above any such model, low enough to fail fast
        if type(size) is not int or not 0 < size <= most:
            raise InputError(f"config.json of the {kind} model: {key} is {size!r}, expected an integer in 1..{most}")
    return sizes


def check_heads(sizes: dict[str, int], width: str, heads: str) -> None:
    """InputError unless the width under one key is a multiple of the number of heads under the other."""
    if sizes[width] % sizes[heads]:
        raise InputError(f"config.json: {width} {sizes[width]} is not a multiple of {heads} {sizes[heads]}")


def check_activation(name: object) -> None:
    """InputError unless it is one of `ACTIVATIONS`."""
    if name not in list(ACTIVATIONS):  # a list, since JSON's value need not be hashable
        raise InputError(f"config.json: activation {name!r} is not supported, only {', '.join(ACTIVATIONS)}")


def check_switches(config: dict[str, Any], switches: dict[str, bool]) -> None:
    """InputError where the config asks for a variant that is not implemented: key -> the only value that is."""
    for key, value in switches.items():
        if config.get(key, value) is not value:
            raise InputError(f"config.json: {key} = {config[key]!r} is not supported by minprefix")


def check_booleans(config: dict[str, Any], keys: Iterable[str]) -> None:
    """InputError unless the values under these keys are true or false."""
    for key in keys:
        if not isinstance(config[key], bool):
            raise InputError(f"config.json: {key} is {config[key]!r}, true or false is needed")


def check_end_token(config: dict[str, Any]) -> None:
    """InputError unless eos_token_id is a token id, a list of token ids, null or absent."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if value is not None and any(type(i) is not int for i in ids):
        raise InputError(f"config.json: eos_token_id is {value!r:.80}, a token id or a list of token ids is needed")


def check_gpt2(config: dict[str, Any]) -> dict[str, Any]:
    """A GPT-2 config.json as the model needs it, defaults filled in; InputError where this model cannot follow it."""
    defaults = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                "scale_attn_by_inverse_layer_idx": False}  # fmt: skip
    keys = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
    shape = check_sizes(config, keys if config.get("n_inner") is None else [*keys, "n_inner"], "GPT-2")
    check_heads(shape, "n_embd", "n_head")
    check_switches(config, {"scale_attn_weights": True, "add_cross_attention": False})
    config = {"model_type": "gpt2", **defaults, **config, "n_inner": 4 * shape["n_embd"], **shape}
    check_activation(config["activation_function"])
    check_booleans(config, ["tie_word_embeddings", "scale_attn_by_inverse_layer_idx"])
    check_end_token(config)
    eps = config["layer_norm_epsilon"]
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(f"config.json: layer_norm_epsilon is {eps!r}, a small positive number is needed")
    return config


def check_bart(config: dict[str, Any]) -> dict[str, Any]:
    """A BART config.json as the model needs it, defaults filled in; InputError where this model cannot follow it."""
    sides = ("encoder", "decoder")
    keys = ["vocab_size", "max_position_embeddings", "d_model"]
    keys += [f"{side}_{what}" for side in sides for what in ("layers", "attention_heads", "ffn_dim")]
    sizes = check_sizes(config, keys, "BART")
    for side in sides:
        check_heads(sizes, "d_model", f"{side}_attention_heads")
    check_switches(config, {"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": True,
                            "static_position_embeddings": False})  # fmt: skip
    defaults = {"activation_function": "gelu", "scale_embedding": False, "tie_word_embeddings": True,
                "decoder_start_token_id": 2, "forced_bos_token_id": None, "forced_eos_token_id": 2}  # fmt: skip
    config = {"model_type": "bart", **defaults, **config}
    check_activation(config["activation_function"])
    check_booleans(config, ["scale_embedding", "tie_word_embeddings"])
    check_end_token(config)
    for key in (key for key in defaults if key.endswith("_id")):
        i, may_lack = config[key], key.startswith("forced")
        if not (may_lack and i is None) and not (type(i) is int and 0 <= i < sizes["vocab_size"]):
            raise InputError(f"config.json: {key} is {i!r}, an id of the {sizes['vocab_size']} tokens is needed")
    return config
