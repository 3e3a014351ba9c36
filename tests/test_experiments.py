"""python -m minprefix.experiments: the plans, that a study goes on where it was stopped, the table, the error lines.

But for one study of a single real run, train.py and sample.py are stand-ins that note how they were called.
"""

import json
import shlex
import signal
import sys

import pytest

import sample
import train
from minprefix import experiments, report, studies
from minprefix.data import json_rows
from tests.test_scripts import call
from tests.tiny import write_tiny_model

MRS = [f"name[The Golden Lantern {i}], eatType[pub]" for i in range(20)]
TRAIN = '''
import json, os, pathlib, signal, sys, time
here, args = pathlib.Path(__file__).parent, dict(zip(sys.argv[1:], sys.argv[2:]))
out = pathlib.Path(args["--out"])
with open(here / "calls.txt", "a") as file:
    print(out.name, file=file)
print("training", file=sys.stderr)
(out / "checkpoint.pt").write_text("")
if (here / "stop").exists() and out.name == (here / "stop").read_text():
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(20)
    (here / "woke").write_text("")
if (here / "fail").exists() and out.name == (here / "fail").read_text():
    sys.exit("error: no room\\n")
if float(args["--lr"]) > 0.2:
    sys.exit("error: the loss became nan at step 3: lower the learning rate")
loss = float(args["--lr"]) + int(args["--seed"]) / 10 - 10
json.dump({"dev_loss": loss, "best_step": 1, "share": 0.01, "seconds": time.time()}, open(out / "result.json", "w"))
'''
SAMPLE = '''
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
loss = json.load(open(out.parent / "result.json"))["dev_loss"]
json.dump({"scores": {"BLEU": loss, "NIST": 3.0, "name": 1.0}}, open(out.with_suffix(".json"), "w"))
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model whose name is that of none of the bundled, and an E2E folder."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    (folder / "e2e").mkdir()
    for name in ("trainset", "devset", "testset_w_refs"):
        rows = "".join(f'"{mr}",The Golden Lantern is a pub.\n' for mr in MRS)
        (folder / "e2e" / f"{name}.csv").write_text("mr,ref\n" + rows)
    return folder


@pytest.fixture
def scripts(world, tmp_path, monkeypatch):
    """The folder with the stand-ins; the settings are such that a study is small."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "sample.py").write_text(SAMPLE)
    monkeypatch.chdir(world)
    monkeypatch.setattr(experiments, "SCRIPTS", tmp_path)
    monkeypatch.setattr(studies, "LENGTHS", (1, 10))
    monkeypatch.setitem(studies.MIDDLE["other"], "prefix", 0.1)
    yield tmp_path
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(capsys, study, out, *options):
    return call(experiments, capsys, study, "--model", "model", "--data", "e2e", "--out", out, *options)


def calls(scripts):
    return (scripts / "calls.txt").read_text().split()


TUNING = ["prefix-0.033-seed101", "prefix-0.1-seed101", "prefix-0.3-seed101"]
RUNS = ["1-seed101", "1-seed102", "10-seed101", "10-seed102"]


def test_a_study_tunes_runs_and_reports(scripts, capsys):
    code, out, err = run(capsys, "length", scripts / "out", "--seeds", 101, 102, "--jobs", 1)
    assert code == 0, err
    assert calls(scripts) == TUNING + RUNS  # 0.033 has the lowest loss, 0.3 diverges
    folder = scripts / "out" / "length"
    rows = [row for _, row in json_rows(folder / "rows.jsonl")]
    assert [row["run"] for row in rows] == RUNS and all("0.033" in row["train"] for row in rows)
    text = (folder / "table.md").read_text()
    assert text in out and "| 10 | 2 | 1.00% | 0.183 ± 0.050 | 18.3 ± 5.0 | 3.00 ± 0.00 |" in text
    assert "- prefix: 0.033: 0.133, 0.1: 0.200, 0.3: diverged" in text
    assert not list(scripts.rglob("checkpoint.pt")) and not list(scripts.rglob("*.tmp"))
    assert run(capsys, "length", scripts / "out", "--seeds", 101, 102)[0] == 0
    assert calls(scripts) == TUNING + RUNS


def test_a_stopped_study_goes_on_and_comes_to_the_same_table(scripts, capsys):
    options = ("--seeds", 101, 102, "--jobs", 2)
    assert run(capsys, "length", scripts / "whole", *options)[0] == 0
    (scripts / "calls.txt").unlink()
    (scripts / "stop").write_text("10-seed102")
    code, _, err = run(capsys, "length", scripts / "half", *options)
    assert code == 130 and err.endswith("interrupted\n")
    assert not (scripts / "woke").exists()  # the run was stopped as well, and not waited for
    (scripts / "stop").unlink()
    done = {row["run"] for _, row in json_rows(scripts / "half" / "length" / "rows.jsonl")}
    assert {"1-seed101", "1-seed102"} <= done and "10-seed102" not in done
    before = len(calls(scripts))
    assert run(capsys, "length", scripts / "half", *options)[0] == 0
    assert sorted(calls(scripts)[before:]) == sorted(set(RUNS) - done)
    tables = [(scripts / out / "length" / "table.md").read_text() for out in ("whole", "half")]
    assert tables[0] == tables[1]


def test_a_failing_run_stops_the_study_with_its_last_line(scripts, capsys):
    (scripts / "fail").write_text("10-seed101")
    code, _, err = run(capsys, "length", scripts / "out", "--seeds", 101, "--jobs", 1)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: 10-seed101 failed: error: no room (") and "output.txt" in line
    (scripts / "fail").unlink()
    assert run(capsys, "length", scripts / "out", "--seeds", 101, "--jobs", 1)[0] == 0
    assert calls(scripts) == [*TUNING, "1-seed101", "10-seed101", "10-seed101"]


def test_other_settings_are_not_taken_for_done(scripts, capsys):
    assert run(capsys, "length", scripts / "out", "--seeds", 101, "--steps", 50)[0] == 0
    code, _, err = run(capsys, "length", scripts / "out", "--seeds", 101, "--steps", 100)
    assert code == 2 and "prefix-0.033-seed101 with 20, not 40" in err and err.count("\n") == 1
    code, _, err = run(capsys, "length", scripts / "out", "--seeds", 101, "--steps", 50, "--limit-test", 3)
    assert code == 2 and "1-seed101" in err and err.count("\n") == 1


def test_rates_beside_the_model_are_taken(scripts, world, capsys):
    rates = {"e2e": {"full": {"prefix": {"0.01": 1.2, "0.02": 1.1, "0.04": None}}}}
    (world / "model" / "learning-rates.json").write_text(json.dumps(rates))
    try:
        code, out, _ = run(capsys, "length", scripts / "out", "--seeds", 101)
    finally:
        (world / "model" / "learning-rates.json").unlink()
    assert code == 0 and sorted(calls(scripts)) == ["1-seed101", "10-seed101"]
    assert "- prefix: 0.01: 1.200, 0.02: 1.100, 0.04: diverged" in out
    row = next(row for _, row in json_rows(scripts / "out" / "length" / "rows.jsonl"))
    assert row["train"][row["train"].index("--lr") + 1] == "0.02"


def test_the_scripts_must_be_there(scripts, capsys):
    (scripts / "sample.py").unlink()
    code, _, err = run(capsys, "length", scripts / "out")
    assert code == 2 and "sample.py is missing" in err and err.count("\n") == 1


@pytest.mark.parametrize("study", studies.STUDIES)
def test_every_command_of_a_plan_is_one_that_the_scripts_take(study, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    code, out, err = run(capsys, study, tmp_path, "--dry-run", "--steps", 40, "--seeds", 7, 8, "--jobs", 2)
    assert code == 0, err
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  python ")]
    names = set()
    for _, script, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [script, *(a.replace("TUNED", "0.1") for a in arguments)])
        if script.endswith("train.py"):
            args = train.parse_args()
            assert args.seed in (7, 8) and args.steps <= 40 and args.resume
            names.add(args.out)
        else:
            assert sample.parse_args().output.parent in names
    totals = [line for line in out.splitlines() if " runs to do" in line]
    assert len(totals) == 2 and len(names) == sum(int(line.split(": ")[1].split()[0]) for line in totals)
    assert not list(tmp_path.iterdir())


def test_a_real_study(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(studies, "LENGTHS", (2,))
    (world / "model" / "learning-rates.json").write_text('{"e2e": {"full": {"prefix": {"0.01": 1.0}}}}')
    try:
        code, out, err = run(capsys, "length", tmp_path, "--steps", 2, "--seeds", 101, "--limit-test", 2)
    finally:
        (world / "model" / "learning-rates.json").unlink()
    assert code == 0, err
    ((_, row),) = json_rows(tmp_path / "length" / "rows.jsonl")
    assert row["scores"]["test"].keys() >= {"BLEU", "NIST", "ROUGE-L", "CIDEr", "slots"} and row["dev_loss"] > 0
    assert "| 2 | 1 | " in out and not (tmp_path / "length" / "2-seed101" / "checkpoint.pt").exists()


ROWS = [
    {"what": {"method": method, "examples": size}, "share": 0.001, "dev_loss": 1.0, "train": ["--low-data"],
     "scores": {"test": {"BLEU": bleu, "slots": 0.5}}}
    for method, size, bleu in [("prefix", 50, 0.25), ("prefix", 50, 0.75), ("finetune", 50, 0.125), ("prefix", 100, 1)]
]  # fmt: skip


def test_the_figure_has_a_line_for_each_method(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed: pip install -e '.[plot]'")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    report.draw(ROWS, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    labels, points = [], []
    for line in axes.containers:
        labels.append(line.get_label())
        points.append([tuple(map(float, point)) for point in line.lines[0].get_xydata()])
    assert labels == ["prefix", "finetune"] and points == [[(50, 50), (100, 100)], [(50, 12.5)]]
    assert axes.get_xlabel() == "examples" and axes.get_ylabel() == "BLEU"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
