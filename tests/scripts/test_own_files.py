"""train.py and sample.py on files and terminals as users have them: encodings, rows, lengths, prefixes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import sample
import train
from minprefix import load_model, load_prefix, load_tokenizer
from minprefix.core.encode import Example, encode_pairs
from minprefix.core.training import dev_loss
from minprefix.formats.peft import write_adapter
from minprefix.methods.files import find_trained
from tests.helpers import assert_one_clear_line, call
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow

QUICK = ("--steps", 2, "--eval-every", 2, "--device", "cpu", "--dtype", "float32")
TEXTS = ("--eval-inputs", 2, "--beams", 2)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def call_on_terminal(script, capsys, encoding, path, *options):
    """The exit code of a script whose stdout is a terminal (a file here) of some encoding, and what is printed."""
    with pytest.MonkeyPatch.context() as patch, open(path, "w", encoding=encoding) as terminal:
        patch.setattr(sys, "stdout", terminal)
        code = call(script, capsys, *options)[0]
    return code, path.read_text(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_print_is_escaped_and_files_are_utf8(encoding, world, capsys, tmp_path, monkeypatch):
    rows = [{"source": f"caf\xe9 {i} \u4e2d", "target": "\u4e2d"} for i in range(20)]
    options = ("--task", write_rows(tmp_path / "rows.jsonl", rows), *QUICK, *TEXTS, "--out", tmp_path / "run")
    terminal = (capsys, encoding, tmp_path / "terminal")
    code, printed = call_on_terminal(train, *terminal, "--model", world / "model", *options)
    assert code == 0 and (tmp_path / "run" / "result.json").is_file()
    assert "reference           \\u4e2d" in printed and ("caf\\xe9" if encoding == "ascii" else "caf\xe9") in printed
    monkeypatch.setattr(sample, "generate_scored", lambda *args, **options: [[("\u4e2d", 0.0)]])
    options = ("--prefix", tmp_path / "run", "--input", "x")
    assert call_on_terminal(sample, *terminal, *options) == (0, "\\u4e2d\n")
    assert call_on_terminal(sample, *terminal, *options, "--output", tmp_path / "texts.txt") == (0, "")
    assert (tmp_path / "texts.txt").read_bytes() == b"\xe4\xb8\xad\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a file's name may be any bytes on Linux")
def test_folders_whose_names_are_no_utf8(world, capsys, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_tiny_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", [{"source": f"item {i}", "target": "x"} for i in range(20)])
    code, _, err = call(
        train, capsys, "--model", folder / "model", "--task", rows, *QUICK, *TEXTS, "--out", folder / "run"
    )
    assert code == 0 and (folder / "run" / "result.json").is_file(), err
    options = ("--prefix", folder / "run", "--task", rows, "--limit", 1, "--max-new-tokens", 2, "--evaluate")
    code, _, err = call(sample, capsys, *options)
    assert code == 2 and "as its base model; if that is elsewhere now, give --model" in err and err.count("\n") == 2
    code, _, err = call(sample, capsys, *options, "--model", folder / "model")
    assert code == 0 and (folder / "run" / "texts-all.txt").is_file(), err


def test_rows_with_the_same_source_are_scored_together(world, capsys, tmp_path, monkeypatch):
    """As if their references stood in one row: 25 inputs, not 50, and the BLEU of all references."""
    texts = [f"This is item {i}." for i in range(25)]
    single = [{"source": f"item {i}", "target": f"{start} item {i}."} for start in ("This is", "Here we have")
              for i in range(25)]  # fmt: skip
    together = [{"source": f"item {i}", "references": [f"This is item {i}.", f"Here we have item {i}."]}
                for i in range(25)]  # fmt: skip
    monkeypatch.setattr(sample, "generate_scored", lambda *args, **options: [[(text, 0.0)] for text in texts])
    results = []
    for name, rows in (("single", single), ("together", together)):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        options = ("--model", world / "model", "--task", path, "--evaluate", "--output", tmp_path / f"{name}.txt")
        code, _, err = call(sample, capsys, *options)
        assert code == 0 and ("50 rows are 25 inputs" in err) == (name == "single"), err
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert results[0]["scores"] == results[1]["scores"] and results[0]["inputs"] == 25
    assert results[0]["scores"]["BLEU"] == pytest.approx(1)
    write_rows(tmp_path / "single.jsonl", single)
    options = ("--model", world / "model", "--task", tmp_path / "single.jsonl", "--limit", 30)
    monkeypatch.setattr(sample, "generate_scored", lambda *args, **options: [[(source, 0.0)] for source in args[2]])
    code, out, _ = call(sample, capsys, *options)
    assert code == 0 and out.count("\n") == 30  # a text for each row where nothing is scored


def test_long_rows_can_be_left_out(world, capsys, tmp_path):
    rows = [{"source": f"item {i}", "target": "x " * (300 if i == 7 else 3)} for i in range(40)]
    path = write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "dev.jsonl", rows[:4])
    options = ("--model", world / "model", "--task", path, *QUICK, *TEXTS, "--out", tmp_path / "run")
    code, _, err = call(train, capsys, *options)
    assert code == 2 and "1 of 40 are too long; in the longest it is the target, which begins 'x x" in err
    assert err.count("\n") == 1
    code, out, err = call(train, capsys, *options, "--skip-long")
    assert code == 0 and "39 training pairs" in out and "left out 1 of 40, too long for the model" in err


@pytest.fixture(scope="module")
def trained(world):
    """The folders of three runs: of a GPT-2's prefix, of its infix and of a BART's prefix."""
    write_tiny_bart(world / "bart")
    write_rows(world / "start.jsonl", [{"source": f"item {i}", "target": f"This is {i}."} for i in range(40)])
    common = ["--task", world / "start.jsonl", *QUICK, "--eval-inputs", 0, "--prefix-length", 3, "--hidden", 0]
    for name, options in {
        "gpt2-run": ("--model", world / "model", "--offset", 7),
        "infix-run": ("--model", world / "model", "--method", "infix"),
        "bart-run": ("--model", world / "bart", "--sites", "encoder", "cross"),
    }.items():
        sys.argv = ["train.py", *map(str, [*common, *options, "--out", world / name])]
        train.main()
    return world


@pytest.mark.parametrize("run", ["gpt2-run", "infix-run", "bart-run", "gpt2-run/prefix.safetensors", "adapter"])
def test_training_goes_on_from_a_trained_prefix(run, trained, capsys, tmp_path):
    """On another task: the first dev loss is that of the trained prefix, whose length, sites and offset stay."""
    kv = load_prefix(trained / "gpt2-run" / "prefix.safetensors")["decoder"]
    if run == "adapter":
        write_adapter(trained / run, kv, False, {})
    model = trained / ("bart" if "bart" in run else "model")
    rows = [{"source": f"thing {i}", "target": f"It is {i}."} for i in range(40)]
    options = ("--model", model, "--task", write_rows(tmp_path / "train.jsonl", rows), *QUICK, "--eval-inputs", 0)
    write_rows(tmp_path / "dev.jsonl", rows[:6])
    method = ("--method", "infix") if "infix" in run else ()
    code, _, err = call(train, capsys, *options, *method, "--init", trained / run, "--out", tmp_path / "run")
    assert code == 0, err
    old, model = load_prefix(find_trained(trained / run)), load_model(model)
    new = load_prefix(find_trained(tmp_path / "run"))
    assert new.position_offset == old.position_offset and {s: t.shape for s, t in new.kv.items()} == {
        s: t.shape for s, t in old.kv.items()
    }
    tokenizer = load_tokenizer(model.folder)
    pairs = encode_pairs([Example(row["source"], [row["target"]]) for row in rows[:6]], tokenizer, model)
    expected = dev_loss(model, lambda: old, pairs, tokenizer, 16) if "infix" not in run else None
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert expected is None or log[0]["dev_loss"] == pytest.approx(expected, rel=1e-6)
    assert log[-1]["dev_loss"] != log[0]["dev_loss"]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--init no/such/prefix", "--init: there is nothing at no/such/prefix"),
        ("--init lost.safetensors", "--init: there is nothing at lost.safetensors"),
        ("--init model", "nothing at model that train.py saved"),
        ("--init gpt2-run --prefix-length 4", "--prefix-length does not go with --init gpt2-run"),
        ("--init gpt2-run --hidden 8", "--hidden does not go with"),
        ("--init infix-run", "--init infix-run is of --method infix, not prefix"),
        ("--init gpt2-run --model twin", "this model has the same shape, but other weights"),
        ("--init bart-run", "the model has no prefix site 'cross'"),
        (
            "--out gpt2-run --resume --steps 9 --offset 7 --prefix-length 3 --hidden 0",
            "train on from its prefix: --init",
        ),
    ],
)
def test_what_is_no_prefix_to_start_from_is_one_clear_line(options, message, trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    arguments = ["--model", "model", "--task", "start.jsonl", *QUICK, "--eval-inputs", 0, *options.split()]
    assert_one_clear_line(train, list(map(str, arguments)), message, capsys, trained)


def test_several_texts_and_their_scores_are_json_lines(trained, capsys, tmp_path, monkeypatch):
    """The same with one prefix and with several; the best text is the one that is written without these options."""
    monkeypatch.chdir(trained)
    one = ("--prefix", "gpt2-run", "--max-new-tokens", 6)
    inputs = ("--input", "item 3", "item 4")
    best = call(sample, capsys, *one, *inputs)[1].splitlines()
    code, out, _ = call(sample, capsys, *one, *inputs, "--return", 3, "--scores", "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (code, out) == (0, "") and [row["source"] for row in rows] == ["item 3", "item 4"]
    assert [" ".join(row["texts"][0].splitlines()) for row in rows] == best
    assert all(len(row["texts"]) == len(row["scores"]) == 3 for row in rows)
    assert all(row["scores"] == sorted(row["scores"], reverse=True) and row["scores"][0] < 0 for row in rows)
    assert call(sample, capsys, *one, "--input", "item 3", "--scores")[1].count("\n") == 1
    out = call(sample, capsys, *one, *inputs, "--return", 4, "--sample", "--seed", 1)[1]
    draws = [json.loads(line) for line in out.splitlines()]
    assert [row.keys() for row in draws] == [{"source", "texts"}] * 2 and len(set(draws[0]["texts"])) > 1
    shutil.copytree("gpt2-run", "other-run", dirs_exist_ok=True)
    requests = [{"source": row["source"], "prefix": "gpt2-run"} for row in rows]
    several = ("--prefix", "gpt2-run", "--prefix", "other-run", "--file", write_rows(tmp_path / "rows.jsonl", requests))
    out = call(sample, capsys, *several, "--max-new-tokens", 6, "--return", 3, "--scores")[1]
    assert [json.loads(line)["texts"] for line in out.splitlines()] == [row["texts"] for row in rows]
    arguments = [*map(str, one), "--input", "x", "--return", "6"]
    assert_one_clear_line(sample, arguments, "returned is 6: it must be at most the 5 beams", capsys, trained)


def test_steps_over_several_batches(trained, capsys, tmp_path, monkeypatch):
    """36 pairs in steps of two batches of 4: five steps in an epoch, to the same prefix as with batches of 8."""
    monkeypatch.chdir(trained)
    common = ("--model", "model", "--task", "start.jsonl", *QUICK[2:], "--eval-inputs", 0, "--epochs", 1)
    for name, sizes in (("one", ("--batch-size", 8)), ("two", ("--batch-size", 4, "--accumulate", 2))):
        code, out, err = call(train, capsys, *common, *sizes, "--out", tmp_path / name)
        assert code == 0 and "36 training pairs, 5 steps of 8," in out, err
    one, two = (load_prefix(tmp_path / name)["decoder"] for name in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_a_run_in_an_ascii_locale(world, tmp_path):
    """Without Python's UTF-8 mode: torch.compile cannot read its own files then."""
    rows = [{"source": f"caf\xe9 {i}", "target": "\u4e2d"} for i in range(20)]
    options = ("--model", world / "model", "--task", write_rows(tmp_path / "rows.jsonl", rows), *QUICK, *TEXTS)
    command = [sys.executable, ROOT / "train.py", *options, "--out", tmp_path / "run"]
    locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([*map(str, command)], capture_output=True, env={**os.environ, **locale})
    assert done.returncode == 0 and b"reference           \\u4e2d" in done.stdout, done.stderr
    assert (tmp_path / "run" / "result.json").is_file()
