"""Two processes of torchrun beside one: this file is what they run, too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from minprefix import Prefix, load_model, load_tokenizer
from minprefix.cli.runs import run_folder
from minprefix.core.training import train
from minprefix.system import distributed
from minprefix.system.distributed import distributed_main, use_own_gpu
from minprefix.system.errors import InputError, run_main
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow

# Batches of 4, 4, 4 and 1: no two shares have as many tokens, and one is empty.
PAIRS = [([5 + i] * (1 + i % 3), [40 + i] * (1 + i % 5) + [4095]) for i in range(13)]
BART_PAIRS = [([0, *source, 2], [0, *target[:-1], 2]) for source, target in PAIRS]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*TORCHRUN, *map(str, command)], env=environment, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def train_both(folder, out):
    for kind, pairs in (("gpt2", PAIRS), ("bart", BART_PAIRS)):
        torch.manual_seed(1)
        model, tokenizer = load_model(folder / kind), load_tokenizer(folder / kind)
        train(model, Prefix(model, 3, mlp_width=8), tokenizer, pairs, pairs[:5], out / kind, steps=24, batch_size=4,
              lr=1e-2, eval_every=6)  # fmt: skip


def write(folder, out):
    """Texts for five inputs, and for one, of which a second process gets none."""
    for name, count in (("five", 5), ("one", 1)):
        (folder / f"{name}.txt").write_text("".join(f"item {i} of the list{' of lists' * i}\n" for i in range(count)))
        options = "--beams 2 --max-new-tokens 6 --dtype float32 --device cpu --model".split()
        paths = [folder / "gpt2", "--file", folder / f"{name}.txt", "--output", out / name]
        sys.argv = ["sample.py", *options, *map(str, paths)]
        sample.main()


def train_on_other_data(folder):
    """As train_both, but the second process lacks a pair: its data were not downloaded, say."""
    model, tokenizer = load_model(folder / "gpt2"), load_tokenizer(folder / "gpt2")
    pairs, out = PAIRS[distributed.rank() :], folder / "run"
    train(model, Prefix(model, 3, mlp_width=8), tokenizer, pairs, PAIRS[:5], out, steps=4, batch_size=4, lr=1e-2)


def test_processes_that_would_train_on_different_data_end_in_one_line(tmp_path):
    write_tiny_model(tmp_path / "gpt2")
    process = torchrun(__file__, tmp_path, "different")
    _, err = process.communicate(timeout=300)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    message = "the processes differ in training data: give all of them the same files and options"
    assert process.returncode and lines == [f"error: {message}"], err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gpus, said", [(0, None), (1, "2 processes on 1 GPUs: start fewer"), (2, None)])
def test_each_process_has_a_gpu_of_its_own(gpus, said, monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if said:
        with pytest.raises(InputError, match=said):
            use_own_gpu()
    else:
        assert use_own_gpu() == (gpus == 2)
    assert chosen == ([1] if gpus == 2 else [])


def test_two_processes_compute_what_one_does(tmp_path):
    write_tiny_model(tmp_path / "gpt2")
    write_tiny_bart(tmp_path / "bart", decoder_start_token_id=3)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "log.jsonl").write_text("")
    process = torchrun(__file__, tmp_path)
    train_both(tmp_path, tmp_path / "single")
    write(tmp_path, tmp_path / "single")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [(tmp_path / f"folder-{rank}").read_text() for rank in (0, 1)] == ["runs/e2e-gpt2"] * 2
    assert all("holds a run already" in (tmp_path / f"error-{rank}").read_text() for rank in (0, 1))
    assert out.count("dev loss") == 8 and err.count("wrote ") == 2  # by one of the two
    for kind in ("gpt2", "bart"):
        single, several = (
            [json.loads(row) for row in open(tmp_path / run / kind / "log.jsonl")] for run in ("single", "several")
        )
        for row in single + several:
            row.pop("examples_per_s", None)
        assert several == [pytest.approx(row, rel=1e-6) for row in single]
        assert abs(single[-1]["dev_loss"] - single[0]["dev_loss"]) > 1e-3  # it does train
    for name, count in (("five", 5), ("one", 1)):
        texts = (tmp_path / "several" / name).read_text()
        assert texts == (tmp_path / "single" / name).read_text() and len(set(texts.splitlines())) == count


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc tells which process is which")
def test_the_others_say_so_and_save_when_a_process_dies(tmp_path):
    model, rows, run = write_tiny_model(tmp_path / "gpt2"), tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps({"source": f"item {i}", "target": f"number {i}."}) + "\n" for i in range(40)))
    script = ["train.py", "--model", model, "--task", rows, "--out", run, "--steps", 10**6, "--eval-every", 10**6]
    process = torchrun(ROOT / script[0], *script[1:], "--eval-inputs", 0, "--device", "cpu")
    line = next((line for line in process.stderr if "examples_per_s" in line), None)  # from step 10 on
    assert line, "it ended before it was killed"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    line = next((line for line in err.splitlines() if "go on with: " in line), None)
    assert line, err
    assert "another process of this run has ended; go on" in line or "interrupted; go on" in line
    assert f"go on with: torchrun --nproc_per_node=2 {ROOT}/train.py --model {model}" in line
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 10 and [row["step"] for row in state["log"]] == [0]  # saved when the other died
    assert not list(run.glob("*.tmp"))


def take_folder(folder):
    """The folder of a new run, noted by each process."""
    os.chdir(folder)
    with run_folder(None, False, "e2e", folder / "gpt2") as out:
        (folder / f"folder-{os.environ['RANK']}").write_text(str(out))
    try:
        with run_folder(folder / "taken", False, "e2e", folder / "gpt2"):
            pass
    except InputError as error:
        (folder / f"error-{os.environ['RANK']}").write_text(str(error))


def main():
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["different"]:
        return train_on_other_data(folder)
    take_folder(folder)
    train_both(folder, folder / "several")
    write(folder, folder / "several")


if __name__ == "__main__":
    run_main(distributed_main(main))
