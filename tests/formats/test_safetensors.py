"""What is written comes back, what the reference packages write is read, and what is wrong is refused."""

import json
import os
import pickle
import random
import sys
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch

from minprefix.formats.safetensors import DTYPES, read_config, read_safetensors, read_tensors, write_safetensors
from minprefix.system.errors import InputError


def sample_tensors():
    """One tensor of every dtype, in shapes that are easy to get wrong."""
    torch.manual_seed(0)
    tensors = {f"x.{name}": (torch.randn(3, 5) * 9).to(dtype) for name, dtype in DTYPES.items()}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["scalar_bf16"] = torch.tensor(-1.5, dtype=torch.bfloat16)
    tensors["empty"] = torch.empty(0, 7, dtype=torch.float16)
    tensors["ünï ☃"] = torch.arange(3)
    return tensors


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape, name
        assert torch.equal(left[name], right[name]), name


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


# ---- writing and reading safetensors ----


def test_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, sample_tensors(), {"task": "e2e", "größe": "ß\n"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's about buffers that cannot be written to
        tensors, metadata = read_safetensors(path)
    assert_same(tensors, sample_tensors())
    assert metadata == {"task": "e2e", "größe": "ß\n"}
    write_safetensors(path, {})
    assert read_safetensors(path) == ({}, {})


def test_round_trip_keeps_nan_and_signed_zero(tmp_path):
    path = tmp_path / "a.safetensors"
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000, 1], dtype=torch.int32)
    write_safetensors(path, {"x": bits.view(torch.float32)})
    assert torch.equal(read_safetensors(path)[0]["x"].view(torch.int32), bits)


def test_any_strides(tmp_path):
    path = tmp_path / "a.safetensors"
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {"t": base.permute(2, 0, 1), "step": base[:, ::2, 1:], "expanded": torch.ones(1, 3).expand(4, 3)}
    tensors["step_1d"] = torch.arange(9)[::2]
    tensors["parameter"] = torch.nn.Parameter(base[1])
    write_safetensors(path, tensors)
    assert_same(read_safetensors(path)[0], {name: tensor.detach() for name, tensor in tensors.items()})


def test_bytes_do_not_depend_on_order_and_data_is_aligned(tmp_path):
    tensors = sample_tensors()
    shuffled = dict(random.Random(0).sample(list(tensors.items()), len(tensors)))
    write_safetensors(tmp_path / "a", tensors, {"b": "1", "a": "2"})
    write_safetensors(tmp_path / "b", shuffled, {"a": "2", "b": "1"})
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name


def test_same_as_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="compares with the safetensors package")
    from safetensors import safe_open

    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, sample_tensors(), {"format": "pt", "task": "e2e"})
    package.save_file(sample_tensors(), theirs, {"format": "pt", "task": "e2e"})
    assert_same(package.load_file(ours), sample_tensors())
    assert_same(read_safetensors(theirs)[0], sample_tensors())
    with safe_open(ours, "pt") as file:
        assert file.metadata() == read_safetensors(theirs)[1] == {"format": "pt", "task": "e2e"}


def test_metadata_that_is_null(tmp_path):
    """As some writers put it; the safetensors package reads it, too."""
    package = pytest.importorskip("safetensors.torch", reason="compares with the safetensors package")
    path = tmp_path / "null.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": None, "x": entry(0, 4)}, FLOAT))
    assert_same(read_safetensors(path)[0], package.load_file(path))
    assert read_safetensors(path)[1] == {}


def test_unaligned_tensor_is_read(tmp_path):
    values = torch.arange(4.0)
    header = {"a": entry(0, 1, "U8", [1]), "b": entry(1, 17)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(header, b"\x07" + bytes(values.untyped_storage())))
    tensors, _ = read_safetensors(path)
    assert tensors["a"].item() == 7 and torch.equal(tensors["b"], values)
    assert tensors["b"].data_ptr() % 4 == 0


def test_changing_a_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.zeros(1000), "y": torch.ones(3)})
    before = path.read_bytes()
    tensors, _ = read_safetensors(path)
    tensors["x"].fill_(9)
    assert tensors["x"].sum() == 9000 and tensors["y"].sum() == 3
    assert path.read_bytes() == before
    assert read_safetensors(path)[0]["x"].sum() == 0


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_mapped(tmp_path):
    size = 2**29
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(json.dumps({"x": entry(0, size)}).ljust(120).encode()))  # 120: aligned
    os.truncate(path, path.stat().st_size + size)  # a sparse file: it takes no space
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")
    before = resident_bytes()
    tensor = read_safetensors(path)[0]["x"]
    assert tensor[0] == 0 and tensor[-1] == 1
    assert resident_bytes() - before < size // 16


class FailsOnCopy(torch.Tensor):
    def cpu(self):
        raise RuntimeError("the device is gone")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="device is gone"):
        write_safetensors(path, {"a": torch.zeros(9), "b": torch.zeros(9).as_subclass(FailsOnCopy)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        ({"x": torch.zeros(1, dtype=torch.complex64)}, None),
        ({"__metadata__": torch.zeros(1)}, None),
        ({}, {"length": 5}),
        ({}, {5: "length"}),
    ],
    ids=["dtype", "name", "metadata value", "metadata key"],
)
def test_what_the_format_lacks_is_not_written(tmp_path, tensors, metadata):
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_unwritable_place_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*a.safetensors"):
        write_safetensors(tmp_path / "file" / "a.safetensors", {})


# ---- hostile and damaged safetensors: (bytes of the file, what the message must say) ----

FLOAT = b"\0\0\0\0"
HOSTILE = {
    "empty file": (b"", "0 bytes"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes"),
    "header of 2^60 bytes": ((2**60).to_bytes(8, "little") + b"{}", "no safetensors file"),
    "header of 2^64-1 bytes": (b"\xff" * 8 + b"{}", "no safetensors file"),
    "header longer than the file": ((3).to_bytes(8, "little") + b"{}", "should have 3 bytes"),
    "header empty": (safetensors_bytes(b""), "not valid JSON"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "no safetensors file"),
    "not utf-8": (safetensors_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "utf-16": (safetensors_bytes("{}".encode("utf-16")), "not valid JSON"),
    "byte-order mark": (safetensors_bytes(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "not json": (safetensors_bytes(b"{'x': 1}"), "not valid JSON"),
    "cut json": (safetensors_bytes(b'{"x": '), "not valid JSON"),
    "list": (safetensors_bytes([]), "JSON object"),
    "number": (safetensors_bytes(5), "JSON object"),
    "leading space": (safetensors_bytes(b" {}"), "JSON object"),
    "deeply nested": (safetensors_bytes(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    "deeply nested objects": (safetensors_bytes(b'{"x":' * 50_000 + b"0" + b"}" * 50_000), "not valid JSON"),
    "nan": (safetensors_bytes(b'{"x": NaN}'), "NaN is not JSON"),
    "nan in an entry": (safetensors_bytes(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FLOAT), "NaN"),
    "infinity": (safetensors_bytes(b'{"x":{"dtype":"F32","shape":[],"data_offsets":[0,Infinity]}}'), "Infinity"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": {}}'), "not valid JSON"),
    "integer of 5000 digits": (safetensors_bytes(b'{"x": ' + b"9" * 5000 + b"}"), "x"),
    "tensor twice": (safetensors_bytes(b'{"x": {}, "x": {}}'), "'x' appears twice"),
    "key of an entry twice": (safetensors_bytes(b'{"x": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' appears twice"),
    "metadata twice": (safetensors_bytes(b'{"__metadata__": {}, "__metadata__": {}}'), "appears twice"),
    "metadata a list": (safetensors_bytes({"__metadata__": ["pt"]}), "__metadata__"),
    "metadata false": (safetensors_bytes({"__metadata__": False}), "__metadata__"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"length": 5}}), "__metadata__"),
    "metadata nested": (safetensors_bytes({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
    "data without tensors": (safetensors_bytes({}, FLOAT), "4 bytes after"),
}
for label, bad in {
    "null": None,
    "list": [0, 4],
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "dtype a number": entry(0, 4, dtype=32),
    "dtype a list": entry(0, 4, dtype=["F32"]),
    "dtype unknown": entry(0, 4, dtype="F8_E4M3"),
    "dtype in small letters": entry(0, 4, dtype="f32"),
    "shape a number": entry(0, 4, shape=1),
    "shape text": entry(0, 4, shape="1"),
    "shape null": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
    "dim true": entry(0, 4, shape=[True]),
    "dim float": entry(0, 4, shape=[1.0]),
    "dim text": entry(0, 4, shape=["1"]),
    "dim negative": entry(0, 4, shape=[-1]),
    "dims negative twice": entry(0, 4, shape=[-1, -1]),
    "dim 2^62": entry(0, 4, shape=[2**62]),
    "dim 2^64 + 1": entry(0, 4, shape=[2**64 + 1]),
    "dims that overflow": entry(0, 4, shape=[2**32, 2**32]),
    "dims too many": entry(0, 4, shape=[1] * 10_000),
    "offsets a number": {"dtype": "F32", "shape": [1], "data_offsets": 4},
    "offsets one": {"dtype": "F32", "shape": [1], "data_offsets": [4]},
    "offsets three": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
    "offset true": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]},
    "offset float": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]},
    "offset negative": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
    "offsets backwards": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "size too small for shape": entry(0, 4, shape=[2]),
    "size too large for shape": entry(0, 4, shape=[]) | {"dtype": "F16"},
    "size for an empty shape": entry(0, 4, shape=[0]),
    "ends beyond the file": entry(0, 8),
    "ends far beyond the file": entry(0, 2**50),
    "begins after a gap": entry(4, 8),
    "leaves data over": entry(0, 0),
}.items():
    HOSTILE[f"entry: {label}"] = (safetensors_bytes({"x.weight": bad}, FLOAT), "")
HOSTILE["entry: dtype unknown"] = (HOSTILE["entry: dtype unknown"][0], "F8_E4M3")
HOSTILE["entry: ends beyond the file"] = (HOSTILE["entry: ends beyond the file"][0], "ends beyond the file")
HOSTILE["entry: dims that overflow though empty"] = (
    safetensors_bytes({"x.weight": entry(0, 0, shape=[0, 2**40, 2**40])}),
    "sizes that fit in memory",
)
for label, pair in {
    "overlap": [entry(0, 8), entry(4, 12)],
    "same bytes twice": [entry(0, 12), entry(0, 12)],
    "one inside the other": [entry(0, 12), entry(4, 8)],
    "empty one inside the other": [entry(0, 12), entry(4, 4)],
    "gap": [entry(0, 4), entry(8, 12)],
    "trailing": [entry(0, 4), entry(4, 8)],
    "truncated": [entry(0, 8), entry(8, 16)],
}.items():
    HOSTILE[f"layout: {label}"] = (safetensors_bytes(dict(zip("xy", pair, strict=True)), FLOAT * 3), "")


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as info:
        read_safetensors(path)
    text = str(info.value)
    assert str(path) in text and message in text
    assert "x.weight" in text or b"x.weight" not in content or "bytes after" in text
    assert "\n" not in text and len(text) < len(str(path)) + 400


def test_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 2**28)  # the bytes would be there
    with pytest.raises(InputError, match="no safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("template", ['{"x": %s}', '{"x": {"dtype": %s, "shape": [], "data_offsets": [0, 4]}}'])
def test_nesting_near_the_recursion_limit(tmp_path, template):
    """What can just be parsed might be too deep to print."""
    safetensors, index = tmp_path / "a.safetensors", tmp_path / "model.safetensors.index.json"
    for depth in range(800, 1000, 3):
        nested = "[" * depth + "]" * depth
        safetensors.write_bytes(safetensors_bytes((template % nested).encode(), FLOAT))
        index.write_text('{"weight_map": {"x": %s}}' % nested)
        with pytest.raises(InputError, match="a.safetensors"):
            read_safetensors(safetensors)
        with pytest.raises(InputError, match="index.json"):
            read_tensors(tmp_path)


def test_hostile_cases_differ_from_good_files_only_in_their_fault(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in ({"x.weight": entry(0, 12)}, {"x": entry(0, 8), "y": entry(8, 12), "e": entry(8, 8)}):
        path.write_bytes(safetensors_bytes(header, FLOAT * 3))
        assert read_safetensors(path)[0].keys() == header.keys()
    path.write_bytes(safetensors_bytes(b'{"__metadata__": {}}  \n'))
    assert read_safetensors(path) == ({}, {})


@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy bin"])
def test_truncated_at_every_byte(tmp_path, kind):
    (tmp_path / "whole").mkdir()
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    if kind == "safetensors":
        write_safetensors(tmp_path / "whole" / name, tensors, {"format": "pt"})
    else:
        torch.save(tensors, tmp_path / "whole" / name, _use_new_zipfile_serialization=kind == "bin")
    assert_same(read_tensors(tmp_path / "whole"), tensors)
    (tmp_path / "whole" / name).rename(tmp_path / name)
    for length in reversed(range((tmp_path / name).stat().st_size)):
        os.truncate(tmp_path / name, length)
        with pytest.raises(InputError, match=name):
            read_tensors(tmp_path)


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(content))
        what = rng.random()
        if what < 0.5:
            content[at] = rng.choice(b'0123456789-.eE[]{}",: \\truefalsnN\0\xff')
        elif what < 0.7:
            del content[at : at + rng.randrange(1, 9)]
        elif what < 0.9:
            content[at:at] = content[at : at + rng.randrange(1, 40)]
        else:
            content[at:at] = rng.choice([b"[", b"-", b"1e9", b"99999999999999999999", b"null", b"\\ud800", b"{}"])
    return bytes(content)


def test_mutated_headers_load_or_are_refused(tmp_path):
    rng = random.Random(0)
    header = {"__metadata__": {"format": "pt"}, "x": entry(0, 8), "y": entry(8, 12, "BF16", [2, 1]), "z": entry(12, 12)}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    loaded = 0
    for _ in range(4000):
        changed = mutate(text, rng)
        length = len(changed) if rng.random() < 0.9 else rng.randrange(2 * len(changed))
        path.unlink(missing_ok=True)  # much faster than to write over it
        path.write_bytes(length.to_bytes(8, "little") + changed + FLOAT * 3)
        try:
            tensors, metadata = read_safetensors(path)
        except InputError:
            continue
        loaded += 1
        assert sum(tensor.nbytes for tensor in tensors.values()) == 12
        assert all(isinstance(word, str) for pair in metadata.items() for word in pair)
    assert 0 < loaded < 3000


# ---- folders ----


def test_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert read_config(tmp_path) == read_config(str(tmp_path)) == {"model_type": "gpt2"}


@pytest.mark.parametrize("content", [None, "", "[]", '"gpt2"', "null", "{", "{}x", b"\xff\xfe{}"])
def test_unusable_config(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="config.json") as info:
        read_config(tmp_path)
    assert str(tmp_path) in str(info.value)


@pytest.mark.parametrize("read", [read_config, read_tensors])
def test_folder_missing(tmp_path, read):
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        with pytest.raises(InputError, match=f"{name} is not a folder"):
            read(tmp_path / name)


def test_folder_without_weights(tmp_path):
    (tmp_path / "tf_model.h5").write_text("")
    with pytest.raises(InputError, match="has no weights: expected model.safetensors"):
        read_tensors(tmp_path)


def test_order_of_preference(tmp_path):
    torch.save({"from": torch.tensor(2)}, tmp_path / "part.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"from": "part.bin"}}))
    assert read_tensors(tmp_path)["from"] == 2
    torch.save({"from": torch.tensor(1)}, tmp_path / "pytorch_model.bin")
    assert read_tensors(tmp_path)["from"] == 1
    write_safetensors(tmp_path / "model.safetensors", {"from": torch.tensor(0)})
    assert read_tensors(tmp_path)["from"] == 0
    os.unlink(tmp_path / "model.safetensors")
    os.symlink("gone", tmp_path / "model.safetensors")  # a broken link must not quietly give other weights
    with pytest.raises(InputError, match="cannot read .*model.safetensors"):
        read_tensors(tmp_path)


def write_shards(folder, weight_map=None):
    write_safetensors(folder / "model-1.safetensors", {"a": torch.zeros(2), "b": torch.ones(2)})
    write_safetensors(folder / "model-2.safetensors", {"c": torch.ones(3)})
    if weight_map is None:
        weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": weight_map}))
    return path


def test_shards(tmp_path):
    write_shards(tmp_path)
    assert_same(read_tensors(tmp_path), {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(3)})


BAD_INDEXES = ["[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "a"}']


@pytest.mark.parametrize("content", BAD_INDEXES)
def test_index_without_weight_map(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        read_tensors(tmp_path)


BAD_SHARDS = ["", ".", "..", "../x.safetensors", "sub/x.safetensors", "sub\\x", "C:x", "a\0b", None, 5, ["x"], {}]


@pytest.mark.parametrize("shard", BAD_SHARDS, ids=repr)
def test_shard_outside_of_the_folder(tmp_path, shard):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        write_safetensors(place / "x.safetensors", {"a": torch.zeros(2)})
    path = write_shards(folder, {"a": shard})
    with pytest.raises(InputError, match="plain file name") as info:
        read_tensors(folder)
    assert f"{path}: tensor 'a'" in str(info.value)
    assert (repr(shard) if isinstance(shard, str) else type(shard).__name__) in str(info.value)


def test_shard_with_absolute_path(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    write_shards(folder, {"a": str(tmp_path / "x.safetensors")})
    with pytest.raises(InputError, match="plain file name"):
        read_tensors(folder)


@pytest.mark.parametrize("shard", ["absent.safetensors", "n" * 5000, "\ud800"], ids=["absent", "too long", "surrogate"])
def test_shard_missing(tmp_path, shard):
    write_shards(tmp_path, {"a": shard})
    with pytest.raises(InputError, match="is missing, but model.safetensors.index.json lists it"):
        read_tensors(tmp_path)


def test_tensor_not_in_its_shard(tmp_path):
    write_shards(tmp_path, {"a": "model-1.safetensors", "d": "model-2.safetensors"})
    with pytest.raises(InputError, match="model-2.safetensors lacks tensor 'd'"):
        read_tensors(tmp_path)
    write_shards(tmp_path, {"a": "model-2.safetensors", "b": "model-1.safetensors"})  # it is in the other one
    with pytest.raises(InputError, match="model-2.safetensors lacks tensor 'a'"):
        read_tensors(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    write_shards(tmp_path)
    write_safetensors(tmp_path / "model-2.safetensors", {"b": torch.zeros(2), "c": torch.ones(3)})
    with pytest.raises(InputError, match="model-2.safetensors: tensor 'b' is stored in model-1.safetensors too"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_symlinks_of_the_huggingface_cache(tmp_path, sharded):
    """A snapshot folder holds symlinks ../../blobs/HASH: that is no way out of the folder, but the usual layout."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    if sharded:
        write_shards(blobs)
    else:
        write_safetensors(blobs / "model.safetensors", {"a": torch.zeros(2)})
    (blobs / "config.json").write_text("{}")
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"hash{number}")
        os.symlink(f"../../blobs/hash{number}", snapshot / file.name)
    assert read_config(snapshot) == {}
    assert sorted(read_tensors(snapshot)) == (["a", "b", "c"] if sharded else ["a"])


# ---- .bin ----


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_bin(tmp_path, legacy, sharded):
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    stored = OrderedDict(sample_tensors())
    stored["parameter"] = torch.nn.Parameter(torch.randn(4, 6))
    stored["transposed"] = stored["parameter"].t()
    stored["tied"] = stored["parameter"]
    torch.save(stored, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    if sharded:
        index = {"weight_map": dict.fromkeys(stored, name)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    before = (tmp_path / name).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = read_tensors(tmp_path)
    assert_same(tensors, {name: tensor.detach() for name, tensor in stored.items()})
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    tensors["parameter"].fill_(7)
    assert (tmp_path / name).read_bytes() == before


def test_bin_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(read_tensors(tmp_path), dict(module.state_dict()))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_bin_zipped_again(tmp_path, compression):
    """Mapping a compressed file, torch 2.13 gives the compressed bytes as weights; a stored one may be unaligned."""
    tensors = {"a": torch.arange(1000.0), "b": torch.arange(7), "c": torch.ones(3, 3, dtype=torch.float64)}
    torch.save(tensors, tmp_path / "once.bin")
    with zipfile.ZipFile(tmp_path / "once.bin") as once:
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", compression) as again:
            for name in once.namelist():
                again.writestr(name, once.read(name))
    loaded = read_tensors(tmp_path)
    assert_same(loaded, tensors)
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in loaded.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_bin_memory_mapped(tmp_path):
    size = 2**26
    torch.save({"x": torch.zeros(size // 4)}, tmp_path / "pytorch_model.bin")
    before = resident_bytes()
    tensor = read_tensors(tmp_path)["x"]
    assert tensor[-1] == 0
    assert resident_bytes() - before < size // 4


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_code_in_a_bin_is_refused_and_not_run(tmp_path, kind):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    content = {"a": torch.ones(2), "b": Payload(trace)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"b": Payload(trace)}, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with warnings.catch_warnings(), pytest.raises(InputError, match="refused, since such files can run code") as info:
        warnings.simplefilter("error")
        read_tensors(tmp_path)
    assert str(path) in str(info.value) and "\n" not in str(info.value)
    assert "mkdir" in str(info.value) or kind == "pickle 4"  # there torch gives up before it comes to the name
    assert not trace.exists()
    if kind != "legacy":  # the payload works: without our refusal it would have run
        torch.load(path, weights_only=False) if kind == "zip" else pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"<html></html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        [torch.ones(2)],
        torch.ones(2),
        {"state_dict": {"a": torch.ones(2)}},
        {"a": torch.ones(2), "step": 5},
        {0: torch.ones(2)},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, device="meta")},
    ],
    ids="empty,zip start,web page,lfs pointer,list,tensor,nested,number,key,sparse,dtype,meta".split(","),
)
def test_unusable_bin(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as info:
        read_tensors(tmp_path)
    assert str(path) in str(info.value) and "\n" not in str(info.value)
