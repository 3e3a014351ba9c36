"""Reading a HuggingFace model folder's config and tensors: safetensors (memory-mapped), shards, or a `.bin` pickle.

A damaged, malicious or ambiguous file raises InputError; it never gives tensors with wrong values.
"""

import json
import math
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from minprefix.system.errors import InputError, out_of_memory
from minprefix.system.files import atomic_write, read_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # either one file, or NAME.index.json and shards
MAX_HEADER = 100_000_000  # bytes; the safetensors package has the same limit
Entry = tuple[int, int, torch.dtype, list[int]]  # of a safetensors header: begin, end, dtype, shape


def read_config(folder: str | Path) -> dict[str, Any]:
    """A model folder's `config.json` as a dict; InputError if the folder or the file is missing or unusable.

    As in HuggingFace, a `generation_config.json` has precedence: forced first and last tokens are taken from it alone,
    the decoder start token and the end tokens if it has them.
    """
    folder = check_folder(folder)
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise InputError(f"{folder} has no config.json: give a HuggingFace model folder (config, weights, tokeniser)")
    config = read_object(path)
    if config.get("force_bos_token_to_be_generated") is True and config.get("forced_bos_token_id") is None:
        config["forced_bos_token_id"] = config.get("bos_token_id", 0)  # BART before transformers 4.7
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    generation = read_object(path)
    config.update((key, generation[key]) for key in ("decoder_start_token_id", "eos_token_id") if key in generation)
    return {**config, **{key: generation.get(key) for key in ("forced_bos_token_id", "forced_eos_token_id")}}


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object: download it again")
    return value


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder by their stored names, on the CPU, in their stored shapes and dtypes.

    Reads the first that exists of `model.safetensors`, its sharded form `model.safetensors.index.json`,
    `pytorch_model.bin` and `pytorch_model.bin.index.json` (the names that transformers' `save_pretrained` writes).
    Tensors are views of the memory-mapped files where the format allows: data is read when it is used, and changing a
    tensor in place never changes its file. InputError if there are no weights or they are unusable.
    """
    folder = check_folder(folder)
    readers = (lambda path: read_safetensors(path)[0], read_bin)
    for file_name, read in zip(WEIGHT_FILES, readers, strict=True):
        if os.path.lexists(folder / file_name):
            return read(folder / file_name)
        if os.path.lexists(folder / f"{file_name}.index.json"):
            return read_shards(folder / f"{file_name}.index.json", read)
    raise InputError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}, whole or sharded")


def check_folder(folder: str | Path) -> Path:
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder: give the folder of a HuggingFace model")
    return Path(folder)


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise InputError if a file is a Git LFS pointer, which a clone without Git LFS has in place of the weights."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its folder")


# ---- shards ----


def read_shards(index_path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards that an index file lists."""
    weight_map = read_index(index_path)
    tensors: dict[str, Tensor] = {}
    stored_in: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        path = index_path.parent / shard
        if not os.path.isfile(path):
            raise InputError(f"{path} is missing, but {index_path.name} lists it: download it too")
        for name, tensor in read(path).items():
            if name in tensors:
                raise InputError(f"{path}: tensor {name!r:.200} is stored in {stored_in[name]} too: keep one of them")
            tensors[name], stored_in[name] = tensor, shard
    for name, shard in weight_map.items():
        if stored_in.get(name) != shard:
            raise InputError(f"{index_path.parent / shard} lacks tensor {name!r:.200}, listed in {index_path.name}")
    return tensors


def read_index(index_path: Path) -> dict[str, str]:
    """The `weight_map` of an index file, tensor name -> shard's file name; InputError unless all are plain names."""
    index = read_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path} has no `weight_map` from tensor names to file names: download it again")
    for name, shard in weight_map.items():
        check_shard_name(shard, name, index_path)
    return weight_map


def check_shard_name(shard: object, name: str, index_path: Path) -> None:
    # An index must not refer to files in other folders, so a shard must be a plain file name: no separators, no `..`,
    # no drive. The name is checked, not the resolved path: in HuggingFace's cache every file of a snapshot folder is a
    # symbolic link to ../../blobs/..., created by the user's download and not by the index.
    where = f"{index_path}: tensor {name!r:.200}"
    if not isinstance(shard, str):
        raise InputError(f"{where} has a JSON {type(shard).__name__} for its file, expected a plain file name")
    if shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard):
        raise InputError(f"{where} has {shard!r:.200} for its file, expected a plain file name in the same folder")


# ---- safetensors: 8 bytes of header length (little-endian), the header (JSON), the tensors' bytes ----
# https://huggingface.co/docs/safetensors: {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...} and
# optionally "__metadata__": {str: str}; offsets count from the header's end, row-major, little-endian.


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file as `(tensors, metadata)`, the tensors by name, on the CPU.

    The tensors are views of the file, mapped privately (copy-on-write): data is read when it is used, and changing a
    tensor never changes the file. Each tensor has a separate mapping, which is released with the tensor. InputError if
    the file violates the format in any way.
    """
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file:
            header, data_start = read_header(file, path)
            metadata = header.pop("__metadata__", None)
            metadata = {} if metadata is None else metadata
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise InputError(f"{path}: `__metadata__` must be an object of strings: the file is damaged")
            entries = {name: check_entry(name, entry, path) for name, entry in header.items()}
            check_coverage(entries, os.fstat(file.fileno()).st_size - data_start, path)
            tensors = {
                name: map_tensor(file, data_start + begin, end - begin, dtype, shape)
                for name, (begin, end, dtype, shape) in entries.items()
            }
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return tensors, metadata


def read_header(file: IO[bytes], path: str | Path) -> tuple[dict[str, Any], int]:
    """The header of an open safetensors file as a dict, and the byte at which the tensors' data begins."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise InputError(f"{path} has only {size} bytes, too few for a safetensors file: download it again")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise InputError(f"{path} is no safetensors file: it does not begin with the length of a header")
    if length > size - 8:
        raise InputError(f"{path} is cut short: its header should have {length} bytes, {size - 8} are left")
    try:
        text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # fails for lone surrogates, which cannot be printed
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the safetensors header is not valid JSON ({error}): download it again") from error
    if not isinstance(header, dict) or not text.startswith("{"):
        raise InputError(f"{path}: the safetensors header must be a JSON object: the file is damaged")
    return header, 8 + length


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"{key!r:.200} appears twice")
        unique[key] = value
    return unique


def refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def check_entry(name: str, entry: object, path: str | Path) -> Entry:
    """One header entry as `(begin, end, dtype, shape)`; begin and end are byte offsets into the data."""
    where = f"{path}: tensor {name!r:.200}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{where} has no dtype, shape and data_offsets in the header: the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise InputError(f"{where}: its dtype is a JSON {type(dtype).__name__}, expected a string: the file is damaged")
    if dtype not in DTYPES:
        raise InputError(f"{where} has dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}: convert the file")
    if not is_list_of_sizes(shape) or len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise InputError(f"{where}: its shape must be a list of up to 64 sizes that fit in memory: the file is damaged")
    if not is_list_of_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: its data_offsets must be [begin, end], two sizes: the file is damaged")
    (begin, end), dtype = offsets, DTYPES[dtype]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise InputError(f"{where} has {end - begin} bytes, expected {expected} for {dtype} of shape {shape}")
    return begin, end, dtype, shape


def is_list_of_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)  # no bool


def check_coverage(entries: dict[str, Entry], size: int, path: str | Path) -> None:
    """Raise InputError unless the tensors cover the `size` bytes of data exactly, without overlaps and gaps."""
    position = 0
    for name, (begin, end, _, _) in sorted(entries.items(), key=lambda item: item[1][:2]):
        where = f"{path}: tensor {name!r:.200} (bytes {begin} to {end} of the data)"
        if begin != position:
            problem = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise InputError(f"{where} {problem}, expected to begin at {position}: the file is damaged")
        if end > size:
            raise InputError(f"{where} ends beyond the file, which has {size} bytes of data: download it again")
        position = end
    if position != size:
        raise InputError(f"{path} has {size - position} bytes after its last tensor, expected none: download it again")


def map_tensor(file: BinaryIO, start: int, length: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The tensor at byte `start` of an open file: a view of the file, or a copy if it is not aligned in the file."""
    if length == 0:
        return torch.empty(shape, dtype=dtype)
    before = start % mmap.ALLOCATIONGRANULARITY  # a mapping must begin at a page boundary
    buffer = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
    data = torch.frombuffer(buffer, dtype=torch.uint8, offset=before, count=length)
    if start % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name (any device, strides and shape) and metadata as a safetensors file.

    The same tensors always give the same bytes. The file appears whole or not at all. InputError if it cannot be
    written, ValueError if a name, dtype or metadata value is one that the format does not have.
    """
    metadata = dict(sorted((metadata or {}).items()))
    if "__metadata__" in tensors or not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("metadata must be a dict of str to str, and no tensor may be called `__metadata__`")
    # Lone surrogates are escaped: a value may be the name of a folder, which may be any bytes.
    metadata = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in metadata.items()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    # Larger element sizes come first, so that every tensor is aligned in the file and can be mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which cannot be written: convert it")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_write(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy())  # as bytes, since NumPy has no bfloat16


# ---- .bin: the format of torch.save: a pickle in a zip file or, before PyTorch 1.6, followed by the raw data ----


def read_bin(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, memory-mapped where its format allows. No code in the file is executed."""
    refuse_lfs_pointer(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_uncompressed_zip(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for `{found[1]}`" if found else "it holds other objects, or is damaged"
        raise InputError(
            f"{path} is refused, since such files can run code: expected tensors only, but {reason}; "
            "get the model as safetensors"
        ) from error
    except Exception as error:  # for a damaged file torch raises RuntimeError, EOFError, KeyError, ...
        if out_of_memory(error):
            problem = f"{path} needs more memory than there is, or is damaged"
            raise InputError(f"{problem}: free some memory, or download it again") from error
        problem = f"{path} is damaged or not a PyTorch file ({type(error).__name__})"
        raise InputError(f"{problem}: download it again") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, expected a dict of tensors (a state_dict)")
    return {name: check_bin_tensor(name, value, path) for name, value in loaded.items()}


def is_uncompressed_zip(path: str | Path) -> bool:
    # torch.load(mmap=True) refuses the old format, and reads a compressed tensor's bytes without decompressing them.
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > 100 * os.path.getsize(path):
            raise ValueError("it unpacks to far more than any weights do")
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    except zipfile.BadZipFile:
        return False


def check_bin_tensor(name: object, value: object, path: str | Path) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        found = f"entry {name!r:.200} ({type(value).__name__})"
        raise InputError(f"{path}: {found} is not a named tensor: save only the model's state_dict")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not plain or value.dtype not in DTYPES.values():
        found = f"tensor {name!r:.200} ({value.layout}, {value.dtype}, {value.device})"
        raise InputError(f"{path}: {found} is not a dense tensor of {', '.join(DTYPES)}: convert the file")
    if value.numel() * value.dtype.itemsize > value.untyped_storage().nbytes():  # an expanded view
        raise InputError(f"{path}: tensor {name!r:.200} is larger than what is stored of it: the file is damaged")
    value = value.detach()  # an nn.Parameter becomes a tensor that does not require a gradient
    return value.clone() if value.data_ptr() % value.dtype.itemsize else value  # a re-packed zip may not align it
