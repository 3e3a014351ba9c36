"""train.py and sample.py as a user runs them: from the command line to the files, and what they say to bad input."""

import contextlib
import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from minprefix import load_model, load_prefix, load_tokenizer
from minprefix.cli import evaluation, prefix_tool, runs, sample_args, train_args
from minprefix.core import training
from minprefix.core.training import train as train_loop
from minprefix.data import tasks
from minprefix.formats.safetensors import read_safetensors
from minprefix.metrics import scores
from minprefix.studies import experiments
from minprefix.system.errors import print_once
from minprefix.system.files import atomic_write, check_writable, locked
from tests.helpers import ROWS, assert_one_clear_line, call, entry, write_xml
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prefix_file(world):
    sys.argv = ["train.py", "--model", str(world / "model"), "--task", str(world / "rows.jsonl"), "--steps", "6",
                "--eval-every", "2", "--eval-inputs", "2", "--out", str(world / "run"), "--device", "cpu"]  # fmt: skip
    train.main()
    return world / "run" / "prefix.safetensors"


def test_train_writes_prefix_log_and_result(prefix_file, world):
    tensors, info = read_safetensors(prefix_file)
    assert tensors["decoder"].shape == (2, 2, 4, 5, 8) and tensors["decoder"].dtype == torch.float32
    assert info["task"] == "jsonl" and info["base_model"] == str(world / "model")
    log = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 2, 4, 6]
    result = json.loads((world / "run" / "result.json").read_text())
    assert result["dev_loss"] == min(row["dev_loss"] for row in log)
    assert result["scores"].keys() == {"without the prefix", "with the prefix"} and result["settings"]["seed"] == 101
    assert not list((world / "run").glob("*.tmp"))


def test_the_line_that_train_prints_works(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    code, out, _ = call(train, capsys, "--model", "model", "--data", "e2e", "--steps", 2, "--eval-inputs", 1)
    assert code == 0 and "BLEU on e2e, 1 test inputs" in out
    line = out.splitlines()[-1]
    assert line.startswith("  python sample.py --prefix runs/e2e-model/prefix.safetensors --input 'name[")
    code, out, _ = call(sample, capsys, "--prefix", "runs/e2e-model/prefix.safetensors", "--input", line.split("'")[1])
    assert code == 0 and len(out.splitlines()) == 1


def test_sample_takes_arguments_files_and_stdin_alike(prefix_file, world, capsys, monkeypatch):
    (world / "inputs.txt").write_text("item 7 of the list\n\nitem 8 of the list\n")
    (world / "inputs.jsonl").write_text('{"source": "item 7 of the list"}\n{"source": "item 8 of the list"}\n')
    common = ("--prefix", prefix_file, "--max-new-tokens", 8)
    arguments = call(sample, capsys, *common, "--input", "item 7 of the list", "item 8 of the list")
    assert arguments[0] == 0 and arguments[1].count("\n") == 2
    assert call(sample, capsys, *common, "--file", world / "inputs.txt")[1] == arguments[1]
    assert call(sample, capsys, *common, "--file", world / "inputs.jsonl")[1] == arguments[1]
    with open(world / "inputs.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert call(sample, capsys, *common)[1] == arguments[1]
        file.seek(0)
        monkeypatch.setattr(file, "isatty", lambda: True)
        code, out, err = call(sample, capsys, *common)
        assert out == arguments[1] and err.startswith("type inputs, one a line, then Ctrl-D\nskipped 1 blank"), err
    with open(world / "model" / "model.safetensors") as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, _, err = call(sample, capsys, *common)
        assert code == 2 and err.startswith("error: stdin is not UTF-8 text"), err


def test_sample_evaluates(prefix_file, world, capsys):
    output = world / "texts" / "out.txt"
    code, out, _ = call(sample, capsys, "--prefix", prefix_file, "--task", world / "rows.jsonl", "--split", "dev",
                        "--beams", 2, "--max-new-tokens", 8, "--evaluate", "--output", output)  # fmt: skip
    assert code == 0 and all(name in out for name in ("BLEU", "NIST", "ROUGE-L", "CIDEr"))
    assert len(output.read_text().splitlines()) == 4
    assert json.loads(output.with_suffix(".json").read_text())["scores"].keys() >= {"BLEU", "NIST", "ROUGE-L", "CIDEr"}


def test_scores_on_the_bundled_sample_are_not_called_e2e(prefix_file, world, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "find_e2e", lambda folder=None: None)
    monkeypatch.setattr(evaluation, "find_e2e", lambda folder=None: None)
    code, out, _ = call(sample, capsys, "--prefix", prefix_file, "--task", "e2e", "--limit", 1, "--max-new-tokens", 2,
                        "--evaluate", "--output", world / "sample.txt")  # fmt: skip
    assert code == 0 and "not of E2E" in out
    assert "not E2E" in json.loads((world / "sample.json").read_text())["test set"]


def test_scores_lie_beside_the_prefix_by_default(prefix_file, world, capsys):
    for prefix in (prefix_file, prefix_file.parent):  # the file, or the run's folder
        code, _, _ = call(sample, capsys, "--prefix", prefix, "--task", world / "rows.jsonl", "--limit", 1,
                          "--max-new-tokens", 2, "--evaluate")  # fmt: skip
        written = sorted(prefix_file.parent.glob("texts*"))
        assert code == 0 and [path.name for path in written] == ["texts-all.json", "texts-all.txt"]
        for path in written:
            path.unlink()


@pytest.mark.parametrize(
    "arguments, name",
    [
        ("--prefix run --task rows.jsonl", "run/texts-all"),
        ("--prefix run/prefix.safetensors --task ./rows.jsonl --split dev", "run/texts-dev"),
        ("--prefix run --file inputs.jsonl", "run/texts-inputs"),
        ("--prefix run --task e2e", "run/texts-e2e-test"),
        ("--prefix run --task other/rows.jsonl", "run/texts-rows-all"),
        ("--prefix run --task webnlg --topics Food A/B", "run/texts-webnlg-test-Food-A_B"),
        ("--prefix unfinished --task e2e --split dev", "unfinished/texts-e2e-dev"),
        ("--prefix a.b.safetensors --task e2e", "texts-a.b-e2e-test"),
        ("--prefix adapter/ --task e2e", "texts-adapter-e2e-test"),
        ("--prefix copies/mine/prefix.safetensors --task e2e", "texts-mine-e2e-test"),
        ("--model some/gpt2 --task xsum --split dev", "texts-gpt2-xsum-dev"),
        ("--model gpt2-mini --file in.puts.jsonl", "texts-gpt2-mini-in.puts"),
    ],
)
def test_texts_that_differ_have_names_that_differ(arguments, name, prefix_file, world, monkeypatch):
    monkeypatch.chdir(world)
    (world / "unfinished").mkdir(exist_ok=True)
    (world / "unfinished" / "log.jsonl").touch()
    monkeypatch.setattr(sample_args, "check_task_files", lambda task, data: None)  # the data are not there
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments.split(), "--evaluate"])
    assert str(sample.parse_args().output) == f"{name}.txt"


def test_sampling_follows_its_seed(prefix_file, capsys):
    def draw(seed):
        return call(sample, capsys, "--prefix", prefix_file, "--input", "item 3", "--sample", "--seed", seed)[1]

    assert draw(1) == draw(1) != draw(2)


def test_a_new_run_gets_a_folder_of_its_own(world, prefix_file, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    common = ("--model", world / "model", "--task", world / "rows.jsonl", "--steps", 1, "--eval-inputs", 0)
    assert all(call(train, capsys, *common)[0] == 0 for _ in range(3))
    assert call(train, capsys, *common, "--resume")[0] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["rows-model", "rows-model-2", "rows-model-3"]


def test_resume_of_a_finished_run_changes_nothing(prefix_file, world, capsys):
    before = prefix_file.read_bytes()
    code, _, _ = call(train, capsys, "--model", world / "model", "--task", world / "rows.jsonl", "--steps", 6,
                      "--eval-every", 2, "--eval-inputs", 0, "--out", world / "run", "--resume")  # fmt: skip
    assert code == 0 and prefix_file.read_bytes() == before


def test_webnlg_by_topic_from_training_to_scores(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    for name, split in (("train", "train"), ("dev", "dev"), ("testdata_with_lex", "test")):
        entries = [entry(topic, f"{topic}_{i} | is | {split}", good=[f"{topic} {i}.", f"{split}."])
                   for topic in ("Food", "City", "Artist") for i in range(20)]  # fmt: skip
        write_xml(world / "webnlg" / split / f"{name}.xml", *entries)
    common = ("--model", "model", "--task", "webnlg", "--data", "webnlg")
    train_common = (*common, "--topics", "Food", "City", "--low-data", 20, "--steps", 4, "--eval-every", 2,
                    "--eval-inputs", 0)  # fmt: skip
    seen = []  # by training: (training pairs, dev pairs)
    monkeypatch.setattr(train, "train", lambda *args, **kw: seen.append(args[3:5]) or train_loop(*args, **kw))
    for out, options in (("a", ()), ("b", ("--seed", 7)), ("c", ("--low-data-seed", 1))):
        code, text, _ = call(train, capsys, *train_common, "--out", f"topics-{out}", *options)
        assert code == 0 and "20 training pairs, 4 steps of 5," in text
        assert text.splitlines()[-1].endswith("--task webnlg --split dev --data webnlg --limit 10")
    assert [(len(x), len(y)) for x, y in seen] == [(20, 6)] * 3 and seen[0] == seen[1] != seen[2]
    tokenizer = load_tokenizer("model")
    sources = [tokenizer.decode(source) for x, y in seen for source, _ in (*x, *y)]
    assert all(source.startswith((" | Food_", " | City_")) for source in sources)
    result = json.loads((world / "topics-a" / "result.json").read_text())["settings"]
    assert (result["lr"], result["prefix_length"], result["topics"]) == (5e-5, 5, ["Food", "City"])

    prefix = ("--prefix", "topics-a/prefix.safetensors")
    options = ("--beams", 1, "--max-new-tokens", 4, "--evaluate", "--output", "topics.txt")
    monkeypatch.setattr(scores, "meteor", scores.bleu)  # Java takes its time
    for topics, split, n in ((("Artist",), "dev", 20), (("Food", "Artist"), "test", 40), ((), "test_unseen", 20)):
        chosen = ("--topics", *topics) if topics else ()
        code, _, err = call(sample, capsys, *prefix, *common, "--split", split, *chosen, *options)
        assert code == 0 and f"wrote {n} texts" in err
    code, _, err = call(sample, capsys, *prefix, "--input", "Alan_Bean : occupation : Test_pilot", "--beams", 1)
    assert code == 0
    unknown = "nothing on the topic 'Sport': the topics there are Artist, City, Food"
    assert_one_clear_line(train, "--model model --task webnlg --data webnlg --topics Sport", unknown, capsys, world)
    arguments = f"{' '.join(prefix)} --task webnlg --data webnlg --topics City Sport"
    assert_one_clear_line(sample, arguments, unknown, capsys, world)
    arguments = "--model model --task webnlg --data webnlg --low-data 999 --eval-inputs 0"
    assert_one_clear_line(train, arguments, "999 cannot be drawn", capsys, world)


def stop_and_resume(world, capsys, out, disturb):
    """A run that `disturb` brings to an end -> exit code, the last line that it says, its checkpoint.

    What that line says to do goes on with it: to the same prefix and log, bit for bit, as without disturbance.
    """
    common = ("--model", world / "model", "--task", world / "rows.jsonl", "--steps", 12, "--eval-every", 4,
              "--eval-inputs", 0, "--hidden", 64, "--dtype", "float32", "--out")  # fmt: skip
    whole = world / "undisturbed"
    if not whole.exists():
        assert call(train, capsys, *common, whole)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch)
        code, _, err = call(train, capsys, *common, out)
    line = err.splitlines()[-1]
    assert shlex.split(line.partition("; go on with: ")[2])[1:] == [*sys.argv, "--resume"], err
    assert not list(out.glob("*.tmp")) and not (out / "prefix.safetensors").exists()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    for name in ("checkpoint.pt", "log.jsonl", "result.json", "prefix.safetensors"):
        (out / f"{name}.killed.tmp").write_text("half")
    assert call(train, capsys, *common, out, "--resume")[0] == 0 and not list(out.glob("*.tmp"))
    logs = [[json.loads(row) for row in open(folder / "log.jsonl")] for folder in (out, whole)]
    for row in sum(logs, []):
        row.pop("examples_per_s", None)
    assert logs[0] == logs[1]
    assert (out / "prefix.safetensors").read_bytes() == (whole / "prefix.safetensors").read_bytes()
    return code, line, state


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name, call, step", [("training_step", 7, 7), ("dev_loss", 3, 8)])
def test_a_signal_saves_the_present_step(number, code, name, call, step, world, capsys, tmp_path):
    original, calls = getattr(training, name), []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args)

    ended = stop_and_resume(world, capsys, tmp_path / "run", lambda patch: patch.setattr(training, name, interrupted))
    assert ended[0] == code and ended[1].rpartition("\r")[2].startswith("interrupted; go on")
    assert ended[2]["step"] == step and [row["step"] for row in ended[2]["log"]] == [0, 4]


def test_an_epoch_ends_with_its_short_batch(world, capsys, tmp_path):
    """17 pairs in batches of 16: two steps an epoch."""
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:17]))
    shutil.copy(rows, tmp_path / "dev.jsonl")
    code, _, err = call(train, capsys, "--model", world / "model", "--task", rows, "--epochs", 2, "--batch-size", 16,
                        "--eval-inputs", 0, "--out", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["epoch"]) == (4, 2.0)


def test_a_second_signal_does_not_take_the_first_ones_message(world, capsys, tmp_path, monkeypatch):
    original = training.training_step

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    @contextlib.contextmanager
    def then_stopped(*args, **options):
        try:
            with locked(*args, **options) as folder:
                yield folder
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "training_step", interrupted)
    monkeypatch.setattr(runs, "locked", then_stopped)
    code, _, err = call(train, capsys, "--model", world / "model", "--task", world / "rows.jsonl", "--steps", 2,
                        "--eval-inputs", 0, "--out", tmp_path / "run")  # fmt: skip
    assert code == 130 and err.splitlines()[-1].startswith("interrupted; go on with: ")


def test_a_signal_before_the_first_dev_loss_leaves_nothing_behind(world, capsys, tmp_path):
    command = ("--model", world / "model", "--task", world / "rows.jsonl", "--steps", 2, "--eval-every", 1,
               "--eval-inputs", 0, "--out", tmp_path / "run")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "dev_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        code, _, err = call(train, capsys, *command)
    assert code == 143 and err.splitlines()[-1].endswith("interrupted") and not (tmp_path / "run").exists()
    assert call(train, capsys, *command, "--resume")[0] == 0


def test_no_other_process_trains_in_the_folder(world, capsys, tmp_path, monkeypatch):
    """From the start on, long before there is a file in it."""
    out, common = tmp_path / "run", ["--model", world / "model", "--task", world / "rows.jsonl", "--eval-inputs", 0]
    with locked(out):
        assert_one_clear_line(train, [*common, "--out", out, "--resume"], f"is working in {out}: wait", capsys, world)
    monkeypatch.setattr(training, "dev_loss", lambda *_: locked(out).__enter__())
    code, _, err = call(train, capsys, *common, "--out", out)
    assert code == 2 and f"another process is working in {out}: wait" in err.splitlines()[-1]
    assert not out.exists()


def test_a_full_disk_leaves_the_last_checkpoint(world, capsys, tmp_path):
    original, limits = training.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(out, *args):
        """The first at will; a later one, with the optimiser's state, is larger than a file may be."""
        if (out / "checkpoint.pt").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "checkpoint.pt").stat().st_size + 4096, limits[1]))
        try:
            original(out, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    code, line, state = stop_and_resume(
        world, capsys, tmp_path / "run", lambda patch: patch.setattr(training, "save_checkpoint", save)
    )
    assert code == 2 and "error: cannot write " in line and "checkpoint.pt: File too large; go on with: " in line
    assert state["step"] == 0


def test_a_full_disk_below_the_output_saves_the_present_step(world, capsys, tmp_path):
    """A bar that finds no room at step 6, between two dev losses."""

    class Bar(training.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code, line, state = stop_and_resume(
        world, capsys, tmp_path / "run", lambda patch: patch.setattr(training, "tqdm", Bar)
    )
    assert code == 2 and "error: cannot write the output: No space left on device; make room" in line
    assert state["step"] == 6


def test_too_little_memory_says_how_to_go_on(world, capsys, tmp_path):
    original, calls = training.training_step, []

    def hungry(*args):
        calls.append(None)
        return torch.empty(10**14) if len(calls) == 7 else original(*args)

    code, line, state = stop_and_resume(
        world, capsys, tmp_path / "run", lambda patch: patch.setattr(training, "training_step", hungry)
    )
    assert code == 2 and "error: out of memory (400000000000000 bytes more needed): free some, or lower" in line
    assert state["step"] == 4  # the last that was written; step 7 may be half done


def break_prefix(source, target, **metadata):
    """A copy of a prefix file with other metadata."""
    raw = source.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"].update(metadata)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return target


BAD = {
    "no such model": (train, "--model nowhere", "nowhere"),
    "empty model folder": (train, "--model empty", "empty"),
    "truncated weights": (train, "--model truncated", "truncated/model.safetensors"),
    "jsonl row without target": (train, "--model model --task untargeted.jsonl", "untargeted.jsonl:2"),
    "csv without mr": (train, "--model model --data no_mr", "no_mr/trainset.csv"),
    "no such data": (train, "--model model --data nodata", "nodata"),
    "no such data, before the model": (train, "--model nowhere --data nodata", "there is no folder nodata"),
    "no such rows, before the model": (sample, "--model nowhere --task none.jsonl", "none.jsonl is missing"),
    "too long": (train, "--model model --task long.jsonl", "room for 251"),
    "unknown task": (train, "--model model --task poetry", "there is no task 'poetry': known are e2e, webnlg"),
    "a file for a folder": (train, "--model model --task rows.jsonl --out rows.jsonl", "--out rows.jsonl is a file"),
    "run there already": (train, "--model model --task rows.jsonl --out run", "--resume"),
    "a warm-up without end": (
        train,
        "--model model --task rows.jsonl --steps 5 --warmup 5",
        "--warmup is 5: it must be",
    ),
    "prefix length 0": (train, "--model model --task rows.jsonl --prefix-length 0", "--prefix-length is 0"),
    "no virtual tokens": (train, "--model model --method embedding --prefix-length 0", "--prefix-length is 0"),
    "hidden width -1": (train, "--model model --task rows.jsonl --method embedding --hidden -1", "--hidden is -1"),
    "no words to start from": (train, ["--model", "model", "--task", "rows.jsonl", "--init", ""], "hold no token"),
    "no steps": (train, "--model model --task rows.jsonl --steps 0", "--steps is 0"),
    "no rate": (train, "--model model --task rows.jsonl --lr nan", "--lr is nan"),
    "no beams": (sample, "--prefix run/prefix.safetensors --input x --beams 0", "beams is 0"),
    "seed too large": (sample, f"--prefix run/prefix.safetensors --input x --sample --seed {2**70}", "--seed"),
    "length penalty nan": (sample, "--prefix run --input x --length-penalty nan", "length_penalty is nan"),
    "scores into a folder": (
        sample,
        "--prefix run --task rows.jsonl --split test --evaluate --output scored.txt",
        "cannot write scored.json: it is a folder",
    ),
    "texts into a folder": (
        sample,
        "--prefix run/prefix.safetensors --input x --output run",
        "cannot write run: it is a folder",
    ),
    "texts below a file": (
        sample,
        "--prefix run --input x --output rows.jsonl/texts",
        "cannot write rows.jsonl/texts: Not a dir",
    ),
    "a name of 300 letters": (sample, f"--prefix run --input x --output {'x' * 300}", "File name too long"),
    "texts over inputs": (sample, "--prefix run --file long.txt --output long.txt", "would overwrite long.txt"),
    "texts over the prefix": (
        sample,
        "--prefix run/prefix.safetensors --input x --output run/prefix.safetensors",
        "would overwrite run/prefix.safetensors",
    ),
    "scores over a result": (
        sample,
        "--prefix run --task rows.jsonl --split test --evaluate --output run/result.txt",
        "would overwrite run/result.json",
    ),
    "no file's name": (sample, ["--prefix", "run", "--file", ""], "cannot read"),
    "steps without end": (train, "--epochs 1e308", "--epochs is 1e+308: it must be above 0, and less than a billion"),
    "another user's row": (
        sample,
        "--prefix run --file others.jsonl",
        """a row has "prefix": 'theirs': give that""",
    ),
    "scores over texts": (sample, "--prefix run/prefix.safetensors --input x --evaluate --output a.json", "a.json"),
    "another model's tokeniser": (train, "--model mixed --task rows.jsonl", "different models"),
    "resume with another prefix": (
        train,
        "--model model --task rows.jsonl --out run --steps 6 --eval-every 2 --prefix-length 6 --resume",
        "run with prefix_length = 5, not 6",
    ),
    "resume with another method": (
        train,
        "--model model --task rows.jsonl --out run --steps 6 --eval-every 2 --method finetune --resume",
        "run with method = prefix, not finetune",
    ),
    "resume elsewhere": (train, "--model twin --task rows.jsonl --out run --steps 6 --eval-every 2 --resume", "model"),
    "topics of nothing": (sample, "--prefix run/prefix.safetensors --input x --topics A", "--task"),
    "low data of nothing": (train, "--model model --low-data 0", "--low-data is 0"),
    "no such prefix": (sample, "--prefix nowhere.safetensors --input x", "nowhere.safetensors"),
    "not a prefix": (sample, "--prefix model/model.safetensors --input x", "model/model.safetensors"),
    "pickle for a prefix": (sample, "--prefix run/checkpoint.pt --input x", "run/checkpoint.pt"),
    "prefix of another model": (sample, "--prefix run/prefix.safetensors --model twin --input x", "other weights"),
    "prefix of a bigger model": (sample, "--prefix run/prefix.safetensors --model gpt2-mini --input x", "was made for"),
    "prefix of a lost model": (
        sample,
        "--prefix lost.safetensors --input x",
        "lost.safetensors names 'long/gone' as its base model; if that is elsewhere now, give --model: no model 'long/",
    ),
    "a lost model": (sample, "--prefix lost.safetensors --model not/there --input x", "error: no model 'not/there'"),
    "show of a lost model": (prefix_tool, "show lost.safetensors --input x", "names 'long/gone' as its base model"),
    "prefix of no model": (sample, "--prefix nameless --input x", "nameless does not name its base model"),
    "no model and no prefix": (sample, "--input x", "--model"),
    "nothing to write about": (sample, "--prefix run/prefix.safetensors --file empty.txt", "no input"),
    "input not in the task's form": (sample, "--prefix e2e.safetensors --input pub", "slot[value]"),
    "source too long": (sample, "--prefix run/prefix.safetensors --file long.txt", "256"),
    "evaluate without references": (sample, "--prefix run/prefix.safetensors --input x --evaluate", "references"),
    "temperature 0": (sample, "--prefix run/prefix.safetensors --input x --sample --temperature 0", "temperature is"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, world, prefix_file, capsys, monkeypatch):
    monkeypatch.chdir(world)
    if not (world / "empty").exists():
        (world / "empty").mkdir()
        write_tiny_model(world / "truncated")
        weights = world / "truncated" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        (world / "untargeted.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n')
        long = [{"source": f"{i} " + "word " * 299, "target": "b"} for i in range(2)]
        (world / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
        (world / "long.txt").write_text("word " * 300)
        (world / "others.jsonl").write_text('{"source": "a"}\n{"source": "a", "prefix": "theirs"}\n')
        (world / "empty.txt").write_text("\n")
        (world / "scored.json").mkdir()
        write_tiny_model(world / "mixed", vocab_size=100)
        (world / "no_mr").mkdir()
        (world / "no_mr" / "trainset.csv").write_text("meaning,ref\na,b\n")
        break_prefix(prefix_file, world / "lost.safetensors", base_model="long/gone")
        break_prefix(prefix_file, world / "e2e.safetensors", task="e2e")
        break_prefix(prefix_file, world / "nameless", base_model="")
    assert_one_clear_line(*BAD[case], capsys, world)


def test_more_beams_than_tokens_are_refused_before_training(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "train", None)  # is not reached
    allowed = (4096 - len(load_tokenizer("model").newline_ids)) // 2  # a step looks at twice as many tokens as beams
    arguments = f"--model model --task rows.jsonl --steps 1 --out beams --beams {allowed + 1}"
    message = f"beams is {allowed + 1}: it must be at most {allowed}"
    assert_one_clear_line(train, arguments, message, capsys, world)
    assert not (world / "beams").exists()


WITHOUT_EFFECT = {
    "a seed of no draw": (train, "--low-data-seed 0", "--low-data-seed does nothing without --low-data"),
    "a field of no topics": (train, "--topic-field topic", "--topic-field does nothing without --topics"),
    "beams of no texts": (train, "--beams 2 --eval-inputs 0", "--beams does nothing without --eval-inputs"),
    "another method's option": (train, "--method top2 --prefix-length 5", "--prefix-length has no effect with"),
    "compiling layers on a CPU": (train, "--compile --device cpu", "--compile has no effect without a GPU"),
    "epochs and steps": (train, "--epochs 1 --steps 9", "--steps: not allowed with argument --epochs"),
    "two draws": (train, "--limit 1 --low-data 9", "--low-data: not allowed with argument --limit"),
    "a cold search": (sample, "--input x --temperature 1.0", "--temperature does nothing without --sample"),
    "likeliest of no draw": (sample, "--input x --top-k 0", "--top-k does nothing without --sample"),
    "mass of no draw": (sample, "--input x --top-p 1", "--top-p does nothing without --sample"),
    "seed of no draw": (sample, "--input x --seed 1", "--seed does nothing without --sample"),
    "penalty of a draw": (sample, "--input x --sample --length-penalty 1", "--length-penalty does nothing without"),
    "penalty of greedy": (sample, "--input x --beams 1 --length-penalty 1", "--length-penalty does nothing without"),
    "split of no task": (sample, "--input x --split test", "--split does nothing without --task"),
    "data of no task": (sample, "--file inputs.jsonl --data e2e", "--data does nothing without --task"),
    "topics of no task": (sample, "--input x --topics A", "--topics does nothing without --task"),
    "field of no topic": (sample, "--task rows.jsonl --topic-field a", "--topic-field does nothing without --topics"),
    "two inputs": (sample, "--input x --file inputs.txt", "--file: not allowed with argument --input"),
    "an unknown option": (sample, "--input x --nonsense 1", "unrecognized arguments: --nonsense"),
    "an unknown method": (train, "--method magic", "invalid choice: 'magic'"),
    "no number": (train, "--steps many", "invalid int value: 'many'"),
    "an unknown split": (sample, "--task e2e --split nose", "invalid choice: 'nose'"),
    "an unknown study": (experiments, "fuller", "invalid choice: 'fuller'"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_options_without_effect_are_refused_in_one_line(case, world, prefix_file, capsys, monkeypatch):
    """And before anything is loaded, even if what is given is the default."""
    monkeypatch.chdir(world)
    for script, loads in (
        (train_args, "resolve_model"),
        (sample, "resolve_base_model"),
        (experiments, "resolve_model"),
    ):
        monkeypatch.setattr(script, loads, None)
    script, arguments, message = WITHOUT_EFFECT[case]
    assert_one_clear_line(script, arguments, message, capsys, world)


def test_options_with_effect_are_taken(world, prefix_file, capsys, monkeypatch):
    monkeypatch.chdir(world)
    rows = [{**row, "kind": "ab"[i % 2]} for i, row in enumerate(ROWS)]
    (world / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call(train, capsys, "--model", "model", "--task", "kinds.jsonl", "--topics", "a", "--topic-field",
                        "kind", "--low-data", 5, "--low-data-seed", 1, "--steps", 1, "--eval-inputs", 1, "--beams", 1,
                        "--out", "kinds")  # fmt: skip
    assert code == 0 and "5 training pairs" in out and ", 1 beams" in out
    code, out, _ = call(sample, capsys, "--prefix", "kinds", "--task", "kinds.jsonl", "--topics", "b", "--topic-field",
                        "kind", "--sample", "--seed", 1, "--temperature", 0.5, "--top-k", 9, "--top-p", 0.9,
                        "--max-new-tokens", 4, "--data", ".", "--split", "all")  # fmt: skip
    assert code == 0 and len(out.splitlines()) == 20


def test_folded_prefix_file_gives_what_training_measured(prefix_file, world):
    model = load_model(world / "model")
    prefix = load_prefix(prefix_file, model)
    assert prefix.position_offset == 5 and model(torch.tensor([[1, 2]]), prefix).shape == (1, 2, 4096)


@pytest.mark.parametrize("script", [train, sample])
def test_help_is_a_page(script, capsys):
    """A line for each option and none wider than 100 columns, its default or what it needs in it; five commands."""
    code, out, _ = call(script, capsys, "--help")
    lines = out.splitlines()
    assert code == 0 and len(lines) < 80 and max(map(len, lines)) <= 100
    assert out.count(f"    python {script.__name__}.py") >= 5
    arguments = {train: train_args, sample: sample_args}[script]
    options = set(re.findall(r'"(--[\w-]+)"', open(arguments.__file__, encoding="utf-8").read()))
    described = [re.match(r"  (--[\w-]+).*?  +\S", line) for line in lines]
    described = {match[1] for match in described if match}
    assert options and options <= described and not any(line.startswith(" " * 20) for line in lines)  # none goes on


def test_texts_of_own_data_may_have_several_lines(world, capsys, tmp_path):
    rows = [{"source": f"item {i}", "target": "one\ntwo\nthree"} for i in range(30)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shutil.copytree(world / "model", tmp_path / "model")  # which ends its texts at a line break
    config, line_break = json.loads((model / "config.json").read_text()), load_tokenizer(model).encode("\n")
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": line_break}))
    options = "--method finetune --steps 60 --batch-size 10 --lr 0.01 --eval-every 60 --eval-inputs 0"
    files = ["--task", tmp_path / "lines.jsonl", "--model", model, "--out", tmp_path / "run"]
    assert call(train, capsys, *options.split(), *files)[0] == 0
    code, out, err = call(sample, capsys, "--prefix", tmp_path / "run", "--input", "item 3")
    assert (code, out) == (0, "one\ntwo\nthree\n"), err
    assert call(sample, capsys, "--prefix", tmp_path / "run", "--input", "item 3", "item 4")[1] == "one two three\n" * 2


def test_scoring_own_rows_says_which(prefix_file, world, capsys, tmp_path):
    options = ["--prefix", prefix_file, "--task", world / "rows.jsonl", "--evaluate", "--max-new-tokens", "2"]
    options += ["--output", tmp_path / "texts.txt"]
    assert "--split test is what was held out" in call(sample, capsys, *options)[2]
    assert json.loads((tmp_path / "texts.json").read_text())["inputs"] == len(ROWS)
    assert "held out" not in call(sample, capsys, *options, "--split", "test")[2]
    assert json.loads((tmp_path / "texts.json").read_text())["inputs"] == len(ROWS) // 10


def test_a_misspelt_slot_is_told(capsys):
    print_once.cache_clear()
    for text in ("eattype[pub], food[Thai]", "eattype[restaurant]", "Type[pub], customer rating[low]"):
        tasks.format_source("e2e", text)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("'eattype' is no slot of E2E's") and "eatType" in err


def test_output_to_a_pipe_and_through_a_link(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(tmp_path / "pipe") as file:
        file.write("text")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    reader, writer = os.pipe()
    with atomic_write(f"/dev/fd/{writer}") as file:  # `--output /dev/stdout | cat`, `--output >(gzip)`
        file.write("text")
    assert os.read(reader, 10) == b"text"
    monkeypatch.setattr(os, "access", lambda *_: False)  # /dev is root's
    for path in ("/dev/null", f"/dev/fd/{writer}"):
        check_writable(Path(path))
    os.close(reader)
    os.close(writer)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "link") as file:
            file.write("text")
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "text"
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o640


def test_topics_hold_for_the_texts_at_the_end_too(world, capsys, tmp_path):
    rows = [{"source": f"{topic} {i}", "target": "x", "topic": topic} for i in range(20) for topic in ("tea", "cake")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--steps 2 --batch-size 4 --prefix-length 2 --hidden 0 --lr 0.1 --topics tea --eval-inputs 9"
    files = ["--task", tmp_path / "train.jsonl", "--model", world / "model", "--out", tmp_path / "run"]
    code, out, err = call(train, capsys, *options.split(), *files)
    assert code == 0 and re.search(r"^input +tea", out, re.M) and not re.search(r"^input +cake", out, re.M), (out, err)
