"""Prefix files: one safetensors file, its tensors named by site, what was trained on what in its metadata.

Metadata (all strings): format "minprefix", version, method, base_model, base_shape, base_fingerprint, task,
prefix_length, position_offset.
"""

import json
from importlib import metadata
from pathlib import Path

from torch import Tensor

from minprefix.core.model import Model
from minprefix.core.prefix import fingerprint
from minprefix.core.prefix_kv import KVInfix, KVPrefix
from minprefix.formats.peft import read_adapter
from minprefix.formats.safetensors import read_safetensors, write_safetensors
from minprefix.system.errors import InputError

KINDS = {kind.method: kind for kind in (KVPrefix, KVInfix)}


def save_prefix(path: str | Path, folded: KVPrefix, model: Model, info: dict[str, str]) -> None:
    """Write a folded prefix as one safetensors file; info: base_model (name or folder), task, ... (strings)."""
    info = {
        **info,
        "format": "minprefix",
        "version": version(),
        "prefix_length": str(next(iter(folded.kv.values())).size(-2)),
        "position_offset": str(folded.position_offset),
        "base_shape": json.dumps(model.prefix_sites),  # site -> layers, heads, head dimension
        "base_fingerprint": json.dumps(fingerprint(model)),
    }
    write_safetensors(path, {site: kv.float().contiguous() for site, kv in folded.kv.items()}, info)


def load_prefix(path: str | Path, model: Model | None = None) -> KVPrefix:
    """A KVPrefix from a file of `save_prefix`, the folder of the run that wrote it, or a PEFT folder.

    A KVInfix from the file of an infix.
    InputError if it is no such file, or made for another model than the one that is given.
    """
    if (Path(path) / "prefix.safetensors").is_file():
        path = Path(path) / "prefix.safetensors"
    adapter = (Path(path) / "adapter_config.json").is_file()
    tensors, offset, info = read_adapter(path) if adapter else read_prefix_file(path)
    kind = KINDS.get(info.get("method", "prefix"))
    if kind is None:
        raise InputError(f"{path} is of --method {info['method']}: minprefix.methods.files.load_trained loads it")
    if not tensors:
        raise InputError(f"{path} holds no prefix: there is no tensor in it")
    for site, kv in tensors.items():
        if kv.dim() != 5 or kv.size(1) != 2 or 0 in kv.shape or not kv.is_floating_point():
            what = f"{tuple(kv.shape)} {kv.dtype}"
            raise InputError(f"{path}: {site!r} is {what}, a prefix is (layers, 2, heads, length, dim) of real numbers")
        if not kv.isfinite().all():
            raise InputError(f"{path}: {site!r} holds numbers that are not finite")
    # Copies, not views of the file: aligned as any tensor is, so that products come out the same to the last bit.
    prefix = kind({site: kv.clone() for site, kv in tensors.items()}, offset, info)
    if model is not None:
        if adapter and model.encoder_decoder and len(prefix["decoder"]) == model.prefix_sites["encoder"][0]:
            # PEFT makes as many layers as the encoder has; a decoder of fewer takes the first.
            prefix.kv["decoder"] = prefix["decoder"][: model.prefix_sites["decoder"][0]]
        check_fits(prefix, model, path)
    return prefix


def read_prefix_file(path: str | Path) -> tuple[dict[str, Tensor], int, dict[str, str]]:
    """A file of `save_prefix` as (tensors, position offset, metadata)."""
    if not Path(path).is_file():
        raise InputError(f"no prefix file at {path}: train one with train.py, or check the path")
    tensors, info = read_safetensors(path)
    offset = info.get("position_offset", "")
    if info.get("format") != "minprefix" or not (offset.isascii() and offset.isdigit() and len(offset) < 8):
        raise InputError(f"{path} is not a minprefix prefix: its metadata does not say so")
    return tensors, int(offset), info


def check_fits(prefix: KVPrefix, model: Model, path: str | Path) -> None:
    """InputError if a loaded prefix was made for another model than this one."""
    base, sites = prefix.info.get("base_model", "another model"), model.prefix_sites
    for site, kv in prefix.kv.items():
        if site not in sites:
            takes = ", ".join(sites)
            raise InputError(f"{path} was made for {base}: it has a prefix for {site!r}, this model takes {takes}")
        L, _, H, _, D = kv.shape
        if sites[site] != (L, H, D):
            shapes = f"{(L, H, D)}, this model {sites[site]}"
            raise InputError(f"{path} was made for {base}: its {site} prefix has (layers, heads, dim) {shapes}")
    peft = prefix.info.get("format") == "peft"
    if peft and (prefix.info["task_type"] == "SEQ_2_SEQ_LM") != model.encoder_decoder:
        needed = "SEQ_2_SEQ_LM" if model.encoder_decoder else "CAUSAL_LM"
        kinds = f"its task_type is {prefix.info['task_type']}, this model needs {needed}"
        raise InputError(f"{path} was made for {base}, a model of another kind: {kinds}")
    if not peft or "base_fingerprint" in prefix.info:  # PEFT's own files say nothing of the base model's weights
        check_fingerprint(prefix.info, model, path)


def check_fingerprint(info: dict[str, str], model: Model, path: str | Path) -> None:
    """InputError if a file's info names another model's weights than these."""
    try:
        norms = [float(norm) for norm in json.loads(info.get("base_fingerprint", ""))]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: the base model's fingerprint in its metadata is not a list of numbers") from error
    if not is_fingerprint(norms, model):
        base = info.get("base_model", "another model")
        raise InputError(f"{path} was made for {base}: this model has the same shape, but other weights")


def is_fingerprint(norms: list[float], model: Model) -> bool:
    own = fingerprint(model)
    return len(norms) == len(own) and all(abs(a - b) <= 0.005 * b for a, b in zip(norms, own, strict=True))


def version() -> str:
    try:
        return metadata.version("minprefix")
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
