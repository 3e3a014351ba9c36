"""Damaged and hostile files are read or refused; see fuzz.py. What it found, and what it cannot reach, by itself."""

import re
import subprocess
import sys
import zipfile

import pytest
import torch

from minprefix.core.prefix import fingerprint
from minprefix.formats.safetensors import read_tensors
from minprefix.methods.files import load_trained, save_trained
from minprefix.system.errors import InputError
from tests import fuzz
from tests.tiny import ROOT

pytestmark = pytest.mark.slow


def test_mutated_files_are_read_or_refused():
    """In a process of its own, which may die, and whose memory is limited."""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", "--cases", "2990"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(.+?) +(\d+) read +(\d+) refused +0 wrong$", done.stdout, re.M)
    assert [name for name, _, _ in rows] == list(fuzz.TARGETS)
    assert all(int(read) and int(refused) > 20 for _, read, refused in rows)  # the mutations do something, not too much


WRONG = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests import fuzz

fuzz.SECONDS, fuzz.MEMORY = 0.2, 2**28
readers = {
    "KeyError": lambda folder: {}["x"],
    "opened": lambda folder: (folder.parent / "secret").read_bytes(),
    "MemoryError": lambda folder: bytearray(2**29),
    "Hang": lambda folder: [0 for _ in iter(int, 1)],
}
with tempfile.TemporaryDirectory() as scratch:
    (Path(scratch) / "secret").write_text("x")
    for name, read in readers.items():
        calls = []  # the first is that with the valid files
        fuzz.TARGETS[name] = (fuzz.write_inputs, lambda folder: read(folder) if calls else calls.append(folder))
        print(name, fuzz.fuzz(name, range(2), 0, Path(scratch)))
"""


def test_the_fuzzer_finds_what_is_wrong():
    done = subprocess.run([sys.executable, "-c", WRONG, ROOT], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        assert line.count(line.split()[0]) == 3 and "'wrong': 2" in line
    assert len(done.stdout.splitlines()) == 4 or not sys.platform.startswith("linux")


def test_messages_are_one_printable_line():
    assert str(InputError("a\n  b\tc \x1b[31m \ud800 é")) == "a b c \\x1b[31m \\ud800 é"
    long = str(InputError("start" + "x" * 10**6 + "end"))
    assert len(long) < 2000 and long.startswith("start") and long.endswith("end")


def test_a_bin_that_repeats_a_number_or_unpacks_without_end(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(InputError, match="larger than what is stored"):
        read_tensors(tmp_path)
    torch.save({"a": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "bomb").rename(path)
    with pytest.raises(InputError, match="damaged or not a PyTorch file"):
        read_tensors(tmp_path)


def test_an_adapter_of_a_width_that_the_file_does_not_hold(tmp_path):
    """Modules of that width would take 2 GiB for each sublayer."""
    fuzz.prepare(tmp_path)
    path = tmp_path / "adapter.safetensors"
    save_trained(path, {"x.down.bias": torch.zeros(2**23)}, fingerprint(fuzz.MODEL), {"method": "adapter"})
    with pytest.raises(InputError, match="does not hold 4 adapters of width 8388608"):
        load_trained(path, fuzz.MODEL)


def test_a_checkpoint_with_other_contents(tmp_path):
    """Each has been an exception of its own kind."""
    fuzz.prepare(tmp_path)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    fuzz.write_checkpoint(folder)
    path = folder / "checkpoint.pt"
    good = torch.load(path, weights_only=True)

    for key, value in {
        "log": [], "step": "5", "best": 5, "tuned": [], "optimizer": {"state": {}, "param_groups": []},
        "schedule": {**good["schedule"], "last_epoch": 10**400}, "settings": {**good["settings"], "lr": torch.ones(3)},
    }.items():  # fmt: skip
        torch.save({**good, key: value}, path)
        with pytest.raises(InputError, match="checkpoint.pt"):
            fuzz.run_checkpoint(folder)
    torch.save(good, path)
    fuzz.run_checkpoint(folder)
