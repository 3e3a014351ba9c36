"""Prefix files: safetensors files with one tensor (L, 2, H, P, D) per site, named by the site.

The metadata, all strings: format "minprefix", version, method, base_model, base_shape, base_fingerprint, task,
prefix_length, position_offset. Shapes: L layers, H heads, P prefix length, D head dimension.
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
    """Write a folded prefix of a model as a prefix file. info: more metadata: base_model (name or folder), task, ..."""
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
    """Load a KVPrefix from a file of `save_prefix`, the folder of a training run or a PEFT folder.

    The file of an infix gives a KVInfix. InputError if there is no valid prefix, or if it was made for another model
    than `model`.
    """
    if (Path(path) / "prefix.safetensors").is_file():
        path = Path(path) / "prefix.safetensors"
    adapter = (Path(path) / "adapter_config.json").is_file()
    tensors, offset, info = read_adapter(path) if adapter else read_prefix_file(path)
    kind = KINDS.get(info.get("method", "prefix"))
    if kind is None:
        raise InputError(f"{path} is of --method {info['method']}: minprefix.methods.files.load_trained loads it")
    if not tensors:
        raise InputError(f"{path} holds no prefix: it has no tensors")
    for site, kv in tensors.items():
        if kv.dim() != 5 or kv.size(1) != 2 or 0 in kv.shape or not kv.is_floating_point():
            found = f"{tuple(kv.shape)} {kv.dtype}"
            raise InputError(f"{path}: {site!r} is {found}, not (layers, 2, heads, length, dim), floating-point")
        if not kv.isfinite().all():
            raise InputError(f"{path}: {site!r} holds numbers that are not finite")
    # Copies, not views of the file: the same alignment as that of other tensors gives bitwise the same products.
    prefix = kind({site: kv.clone() for site, kv in tensors.items()}, offset, info)
    if model is not None:
        if adapter and model.encoder_decoder and len(prefix["decoder"]) == model.prefix_sites["encoder"][0]:
            # PEFT's adapter has as many layers as the encoder; a decoder with fewer layers uses the first of them.
            prefix.kv["decoder"] = prefix["decoder"][: model.prefix_sites["decoder"][0]]
        check_fits(prefix, model, path)
    return prefix


def read_prefix_file(path: str | Path) -> tuple[dict[str, Tensor], int, dict[str, str]]:
    """Read a file of `save_prefix` as (tensors by site, position offset, metadata)."""
    if not Path(path).is_file():
        raise InputError(f"no prefix file at {path}: train one with train.py, or check the path")
    tensors, info = read_safetensors(path)
    offset = info.get("position_offset", "")
    if info.get("format") != "minprefix" or not (offset.isascii() and offset.isdigit() and len(offset) < 8):
        raise InputError(f"{path} is not a minprefix prefix: its metadata lacks the format or the position offset")
    return tensors, int(offset), info


def check_fits(prefix: KVPrefix, model: Model, path: str | Path) -> None:
    """Raise InputError if a loaded prefix was made for another model than this one."""
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
    if not peft or "base_fingerprint" in prefix.info:  # files saved by PEFT have no fingerprint of the base model
        check_fingerprint(prefix.info, model, path)


def check_fingerprint(info: dict[str, str], model: Model, path: str | Path) -> None:
    """Raise InputError if the fingerprint in a file's metadata is not that of this model's weights."""
    try:
        norms = [float(norm) for norm in json.loads(info.get("base_fingerprint", ""))]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: the base model's fingerprint in its metadata is not a list of numbers") from error
    expected = fingerprint(model)
    same = len(norms) == len(expected)
    if not same or not all(abs(a - b) <= 0.005 * b for a, b in zip(norms, expected, strict=True)):
        base = info.get("base_model", "another model")
        raise InputError(f"{path} was made for {base}: this model has the same shape, but other weights")


def version() -> str:
    try:
        return metadata.version("minprefix")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
