"""python -m minprefix study: the plans, that a study goes on where it was stopped, the table, the error lines.

But for one study with a real run, train.py and sample.py are stand-ins that note how they were called.
"""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch

import sample
import train
from minprefix.cli import settings
from minprefix.core.training import DIVERGED
from minprefix.data.rows import json_rows
from minprefix.studies import experiments, report, studies
from minprefix.system.files import locked
from tests.helpers import call
from tests.tiny import write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow

MRS = [f"name[The Golden Lantern {i}], eatType[pub]" for i in range(20)]
ENTRY = (
    '<entry category="{topic}" eid="1"><modifiedtripleset><mtriple>A | is | {topic}</mtriple></modifiedtripleset>'
    '<lex comment="good">A is one.</lex><lex comment="good">It is {topic}.</lex></entry>'
)
TRAIN = """
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
    sys.exit("error: DIVERGED nan at step 3: lower the learning rate")
loss = float(args["--lr"]) + int(args["--seed"]) / 10 - 10
json.dump({"dev_loss": loss, "best_step": 1, "share": 0.01, "seconds": time.time()}, open(out / "result.json", "w"))
"""
SAMPLE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
loss = json.load(open(out.parent / "result.json"))["dev_loss"]
json.dump({"scores": {"BLEU": loss, "NIST": 3.0, "name": 1.0}}, open(out.with_suffix(".json"), "w"))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny GPT-2 and a tiny BART, whose names are of none of the bundled, an E2E and a WebNLG folder."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_tiny_bart(folder / "bart")
    (folder / "e2e").mkdir()
    for split in ("train", "dev"):
        entries = "".join(ENTRY.format(topic=topic) for topic in (*studies.SEEN, *studies.UNSEEN))
        (folder / "webnlg" / split).mkdir(parents=True)
        (folder / "webnlg" / split / "all.xml").write_text(f"<benchmark><entries>{entries}</entries></benchmark>")
    for name in ("trainset", "devset", "testset_w_refs"):
        rows = "".join(f'"{mr}",A pub.\n' for mr in MRS)
        (folder / "e2e" / f"{name}.csv").write_text("mr,ref\n" + rows)
    return folder


@pytest.fixture
def scripts(world, tmp_path, monkeypatch):
    """The folder with the stand-ins; the settings are such that a study is small."""
    (tmp_path / "train.py").write_text(TRAIN.replace("DIVERGED", DIVERGED))
    (tmp_path / "sample.py").write_text(SAMPLE)
    monkeypatch.chdir(world)
    monkeypatch.setattr(experiments, "SCRIPTS", tmp_path)
    monkeypatch.setattr(experiments, "measure", lambda args: SPEED)
    monkeypatch.setattr(studies, "LENGTHS", (8, 20))
    monkeypatch.setitem(settings.LR["gpt2"], "prefix", 0.1)
    monkeypatch.setitem(settings.LR["gpt2"], "prefix 10", 0.1)
    return tmp_path


def run(capsys, study, out, *options):
    return call(experiments, capsys, study, "--model", "model", "--data", "e2e", "--out", out, *options)


def calls(scripts):
    return (scripts / "calls.txt").read_text().split()


REAL_SCRIPTS, REAL_MEASURE = experiments.SCRIPTS, experiments.measure
SPEED = {"training example": 0.01, "text": 0.02}
TUNING = ["prefix-0.033-seed101", "prefix-0.1-seed101", "prefix-0.3-seed101"]
TUNING_10 = ["prefix-10-0.033-seed101", "prefix-10-0.1-seed101", "prefix-10-0.3-seed101"]
RUNS = ["8-seed101", "8-seed102", "20-seed101", "20-seed102"]


def test_a_study_tunes_runs_and_reports(scripts, capsys):
    code, out, err = run(capsys, "length", scripts / "out", "--seeds", 101, 102, "--jobs", 1)
    assert code == 0, err
    assert calls(scripts) == TUNING_10 + TUNING + RUNS  # 0.033 has the lowest loss, 0.3 diverges
    folder = scripts / "out" / "length"
    rows = [row for _, row in json_rows(folder / "rows.jsonl")]
    assert [row["run"] for row in rows] == RUNS and all("0.033" in row["train"] for row in rows)
    text = (folder / "table.md").read_text()
    assert text in out and "| 20 | 2 | 1.00% | 0.183 ± 0.050 | 18.3 ± 5.0 | 3.00 ± 0.00 |" in text
    assert "- prefix: 0.033: 0.133, 0.1: 0.200, 0.3: diverged" in text
    assert not list(scripts.rglob("checkpoint.pt")) and not list(scripts.rglob("*.tmp"))
    assert run(capsys, "length", scripts / "out", "--seeds", 101, 102)[0] == 0
    assert calls(scripts) == TUNING_10 + TUNING + RUNS


def test_a_dry_run_shows_what_is_left_with_the_rates_that_are_known(scripts, capsys, monkeypatch):
    monkeypatch.setattr(studies, "LENGTHS", (20, 5))
    options = ("--seeds", 101, 102, "--jobs", 1)
    (scripts / "stop").write_text("prefix-0.1-seed101")  # the rate of the short prefixes is known, the other is not
    assert run(capsys, "length", scripts / "out", *options)[0] == 143
    (scripts / "stop").unlink()
    code, out, err = run(capsys, "length", scripts / "out", *options, "--dry-run")
    assert code == 0, err
    assert re.findall(r"(\d) of (\d) runs to do", out) == [("2", "6"), ("4", "4")]
    assert re.findall(r"train.py .*--lr (\S+)", out) == ["0.1", "0.3", "0.033", "0.033", "TUNED", "TUNED"]
    (scripts / "stop").write_text("5-seed102")
    assert run(capsys, "length", scripts / "out", *options)[0] == 143
    code, out, err = run(capsys, "length", scripts / "out", *options, "--dry-run")
    assert code == 0, err
    assert re.findall(r"(\d) of (\d) runs to do", out) == [("0", "6"), ("1", "4")]
    assert re.findall(r"train.py .*--lr (\S+)", out) == ["0.033"]


def test_the_best_of_the_tuning_is_a_run_of_the_study(scripts, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "METHODS", ("prefix",))
    code, _, err = run(capsys, "full", scripts / "out", "--seeds", 101, 102, "--jobs", 1)
    assert code == 0, err
    assert calls(scripts) == [*TUNING, "prefix-seed102"]
    rows = [row for _, row in json_rows(scripts / "out" / "full" / "rows.jsonl")]
    assert [(row["run"], round(row["dev_loss"], 3)) for row in rows] == [
        ("prefix-seed101", 0.133), ("prefix-seed102", 0.233)
    ]  # fmt: skip
    assert all(row["scores"]["test"]["NIST"] == 3 for row in rows)


def test_a_half_copied_run_is_not_taken_for_a_trained_one(scripts, capsys, monkeypatch):
    """As a study leaves it that was stopped while it took a run over, whose original is gone since."""
    monkeypatch.setattr(experiments, "METHODS", ("prefix",))
    assert run(capsys, "full", scripts / "out", "--seeds", 101, "--jobs", 1)[0] == 0
    whole = scripts / "out" / "full" / "prefix-seed101"
    half = whole.with_name(whole.name + ".tmp")
    half.mkdir()
    shutil.copy(whole / "trained.json", half)
    for folder in (whole, scripts / "out" / "tune-full" / TUNING[0]):
        shutil.rmtree(folder)
    (whole.parent / "rows.jsonl").unlink()
    assert run(capsys, "full", scripts / "out", "--seeds", 101, "--jobs", 1)[0] == 0
    assert calls(scripts) == [*TUNING, "prefix-seed101"] and (whole / "result.json").is_file()


def test_a_stopped_study_goes_on_and_comes_to_the_same_table(scripts, capsys):
    options = ("--seeds", 101, 102, "--jobs", 2)
    assert run(capsys, "length", scripts / "whole", *options)[0] == 0
    (scripts / "calls.txt").unlink()
    (scripts / "stop").write_text("20-seed102")
    code, _, err = run(capsys, "length", scripts / "half", *options)
    assert code == 143 and err.endswith("interrupted\n")
    assert not (scripts / "woke").exists()  # the run was stopped as well, and not waited for
    (scripts / "stop").unlink()
    done = {row["run"] for _, row in json_rows(scripts / "half" / "length" / "rows.jsonl")}
    assert {"8-seed101", "8-seed102"} <= done and "20-seed102" not in done
    trained = {path.parent.name for path in (scripts / "half" / "length").glob("*/trained.json")}  # not scored, maybe
    assert done <= trained and "20-seed102" not in trained
    before = len(calls(scripts))
    assert run(capsys, "length", scripts / "half", *options)[0] == 0
    assert sorted(calls(scripts)[before:]) == sorted(set(RUNS) - trained)
    tables = [(scripts / out / "length" / "table.md").read_text() for out in ("whole", "half")]
    assert tables[0] == tables[1]


def test_a_failing_run_stops_the_study_with_its_last_line(scripts, capsys):
    (scripts / "fail").write_text("20-seed101")
    code, _, err = run(capsys, "length", scripts / "out", "--seeds", 101, "--jobs", 1)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: 20-seed101 failed: no room (") and "output.txt" in line
    (scripts / "fail").unlink()
    assert run(capsys, "length", scripts / "out", "--seeds", 101, "--jobs", 1)[0] == 0
    assert calls(scripts) == [*TUNING_10, *TUNING, "8-seed101", "20-seed101", "20-seed101"]


def test_a_study_keeps_out_of_folders_that_others_are_working_in(scripts, capsys):
    """The same study, or a run that was left behind when it was killed."""
    out = scripts / "out"
    for folder in (out / "length", out / "length" / "8-seed101"):
        with locked(folder):
            code, _, err = run(capsys, "length", out, "--seeds", 101, "--jobs", 1)
        line = f"error: another process is working in {folder}: wait until it has ended, or choose another folder"
        assert code == 2 and err.splitlines()[-1] == line
    assert calls(scripts) == TUNING_10 + TUNING and not (out / "length").exists()


def test_other_settings_are_not_taken_for_done(scripts, capsys):
    assert run(capsys, "length", scripts / "out", "--seeds", 101, "--steps", 50)[0] == 0
    code, _, err = run(capsys, "length", scripts / "out", "--seeds", 101, "--steps", 100)
    assert code == 2 and "prefix-10-0.033-seed101 with 50, not 100" in err and err.count("\n") == 1
    code, _, err = run(capsys, "length", scripts / "out", "--seeds", 101, "--steps", 50, "--limit-test", 3)
    assert code == 2 and "8-seed101" in err and err.count("\n") == 1


def test_rates_beside_the_model_are_taken(scripts, world, capsys):
    rates = world / "model" / "learning-rates-e2e-full.json"
    tried = {"0.01": 1.2, "0.02": 1.1, "0.04": None}
    rates.write_text(json.dumps({"prefix": tried, "prefix 10": tried}))
    try:
        code, out, _ = run(capsys, "length", scripts / "out", "--seeds", 101)
    finally:
        rates.unlink()
    assert code == 0 and sorted(calls(scripts)) == ["20-seed101", "8-seed101"]
    assert "- prefix: 0.01: 1.200, 0.02: 1.100, 0.04: diverged" in out
    row = next(row for _, row in json_rows(scripts / "out" / "length" / "rows.jsonl"))
    assert row["train"][row["train"].index("--lr") + 1] == "0.02"


def test_the_scripts_must_be_there(scripts, capsys):
    (scripts / "sample.py").unlink()
    code, _, err = run(capsys, "length", scripts / "out")
    assert code == 2 and "sample.py is missing" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("ablation --model bart --task e2e --data e2e", "bart cannot be trained with"),
        ("full --model bart", "the real data of scitldr: give --data"),
        ("extrapolation --model model --task e2e --data e2e", "--task e2e: extrapolation needs topics"),
        ("extrapolation --model model --data e2e", "e2e lacks train/*triples/*.xml"),
        ("full --model nowhere --data e2e", "nowhere"),
        ("full --model model --data e2e --steps 0", "--steps is 0"),
        ("full --model model --data e2e --seeds 1 -1", "--seeds is -1"),
        ("full --model model --data e2e --out model/config.json", "model/config.json is a file"),
        ("ful", "python -m minprefix study --help lists the options"),
    ],
)
def test_bad_input_is_one_clear_line(line, message, scripts, capsys):
    code, _, err = call(experiments, capsys, "--out", scripts / "out", *line.split())
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_few_virtual_tokens_have_a_rate_of_their_own(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["experiments", "length", "--model", "model", "--data", "e2e"])
    args = experiments.parse_args()
    args.lr = {"prefix": "0.03", "prefix 10": "8e-05", "embedding": "3", "infix": "0.1"}
    rates = {tuple(run.factors.values()): run.train[run.train.index("--lr") + 1] for run in studies.length(args)}
    assert rates == {(n,): "0.03" if n <= 5 else "8e-05" for n in (1, 2, 5, 10, 20, 50, 100, 200)}  # default: 5
    args.model = "gpt2-mini"  # default: 100
    rates = {run.factors["length"]: run.train[run.train.index("--lr") + 1] for run in studies.length(args)}
    assert rates == {n: "8e-05" if n <= 20 else "0.03" for n in (1, 2, 5, 10, 20, 50, 100, 200)}
    args.model = "model"
    rates = {run.factors["method"]: run.train[run.train.index("--lr") + 1] for run in studies.ablation(args)}
    assert rates == {"prefix": "8e-05", "embedding": "3", "infix": "0.1"}
    run = next(run for run in studies.ablation(args) if run.factors == {"method": "prefix", "length": 10})
    assert run.train == studies.tuning(args, "full", "prefix 10")[1].train  # so it is not trained again


def test_with_little_data_a_prefix_starts_from_words(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["experiments", "low-data", "--model", "model", "--data", "e2e"])
    args = experiments.parse_args()
    args.lr = {"prefix": "0.1", "finetune": "0.1"}
    runs = [*studies.low_data(args), *studies.tuning(args, "low-data", "prefix")]
    assert {(run.train[7], "--init" in run.train) for run in runs} == {("prefix", True), ("finetune", False)}
    what = {"started from": "table to text :", "examples": 50}
    shared = [run.train for run in studies.init(args) if run.factors == what]
    assert shared and all(train in [run.train for run in runs] for train in shared)  # so they are not trained again
    args.task = "scitldr"
    assert "summarize :" in studies.low_data(args)[0].train


PLANS = [(study, "model", "webnlg" if study == "extrapolation" else "e2e") for study in studies.STUDIES]


@pytest.mark.parametrize("study, model, task", [*PLANS, ("full", "bart", "e2e"), ("low-data", "bart", "e2e")])
def test_every_command_of_a_plan_is_one_that_the_scripts_take(study, model, task, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(experiments, "measure", lambda args: SPEED)
    code, out, err = call(experiments, capsys, study, "--model", model, "--data", task, "--out", tmp_path, "--dry-run",
                          *(["--task", task] if model == "bart" else []), "--steps", 40, "--seeds", 7, 8)  # fmt: skip
    assert code == 0, err
    names, methods = set(), set()
    for _, script, *arguments in [shlex.split(line) for line in out.splitlines() if line.startswith("  python ")]:
        monkeypatch.setattr(sys, "argv", [script, *(word.replace("TUNED", "0.1") for word in arguments)])
        if script.endswith("train.py"):
            args = train.parse_args()
            assert args.seed in (7, 8, 101) and args.steps <= 40 and args.resume and args.task == task
            names.add(args.out)
            methods.add(args.method)
        else:
            args = sample.parse_args()
            assert args.output.parent in names and args.evaluate and args.task == task
    assert "10.0 ms for a training example, 20.0 ms for a text" in out
    totals = [line for line in out.splitlines() if " runs to do" in line]
    assert len(totals) == 2 and len(names) == sum(int(line.split(": ")[1].split()[0]) for line in totals)
    if study == "full":
        assert methods == {"prefix", "finetune", "top2", "adapter"} | ({"embedding"} if model == "model" else set())
    assert not list(tmp_path.iterdir())


def test_extrapolation_is_tested_on_categories_that_training_did_not_see(world, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", ["experiments", "extrapolation", "--model", "model", "--data", "webnlg"])
    args = experiments.parse_args()
    assert sum(args.tests.values()) == 10 and args.steps == 15  # 5 epochs of 7 categories' 2 texts in batches of 5
    args.lr = dict.fromkeys(("prefix", "finetune", "adapter 3%"), "0.1")
    for run in studies.extrapolation(args):
        trained = run.train[run.train.index("--topics") + 1 :][:7]
        seen, unseen = (words[words.index("--topics") + 1 :] for words in run.samples.values())
        assert trained == seen == list(studies.SEEN) and not set(unseen) & set(trained) and len(unseen) == 3


def test_adapter_widths_of_gpt2_medium(tmp_path):
    """The paper's 3% and 0.1% of 354.8M weights, by hand: 48 adapters of 2,049 * width + 1,024."""
    shape = {"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    widths = [experiments.adapter_width(tmp_path, share) for share in (0.03, 0.001)]
    assert widths == [108, 3]
    shares = [48 * (2049 * width + 1024) / 354_823_168 for width in widths]
    assert shares == pytest.approx([0.03, 0.001], rel=0.03)


def stop_in_training(log):
    """Send this process, that of the study, a SIGTERM once a run of it has trained for a while."""
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_real_study_stopped_in_a_run_comes_to_the_same(scripts, world, capsys, monkeypatch):
    """Its first run is done by the stand-ins, to save time; its second by the real scripts, once without a stop."""
    rates = world / "model" / "learning-rates-e2e-full.json"
    rates.write_text('{"prefix": {"0.1": 1.0}, "prefix 10": {"0.1": 1.0}}')
    whole, half = scripts / "whole" / "length", scripts / "half" / "length"
    options = ("--steps", 60, "--seeds", 101, "--limit-test", 2, "--jobs", 64)  # so many jobs are of one thread each
    monkeypatch.setattr(studies, "LENGTHS", (8,))
    try:
        assert run(capsys, "length", whole.parent, *options)[0] == 0
        shutil.copytree(whole, half)
        monkeypatch.setattr(studies, "LENGTHS", (8, 2))
        monkeypatch.setattr(experiments, "SCRIPTS", REAL_SCRIPTS)
        monkeypatch.setenv("PATH", "")  # no Java: METEOR would take longer than all the rest
        threading.Thread(target=stop_in_training, args=(half / "2-seed101" / "log.jsonl",), daemon=True).start()
        stopped = run(capsys, "length", half.parent, *options)
        left = torch.load(half / "2-seed101" / "checkpoint.pt", weights_only=True)["step"]
        done = [row["run"] for _, row in json_rows(half / "rows.jsonl")]
        resumed = run(capsys, "length", half.parent, *options)
        monkeypatch.setattr(experiments, "measure", REAL_MEASURE)
        uninterrupted = run(capsys, "length", whole.parent, *options)
    finally:
        rates.unlink()
    assert [code for code, _, _ in (stopped, resumed, uninterrupted)] == [143, 0, 0]
    assert done == ["8-seed101"] and 0 < left < 60 and not list(half.rglob("checkpoint.pt"))
    assert calls(scripts) == ["8-seed101"]  # what was done is not done again
    rows, expected = ([row for _, row in json_rows(study / "rows.jsonl")] for study in (half, whole))
    rows[1].pop("seconds"), expected[1].pop("seconds")
    assert rows == expected and len(rows) == 2
    assert rows[1]["scores"]["test"].keys() >= {"BLEU", "NIST", "ROUGE-L", "CIDEr", "slots"} and rows[1]["dev_loss"] > 0
    for name in ("2-seed101/prefix.safetensors", "2-seed101/test.txt", "table.md"):
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name
    assert "| 2 | 1 | " in resumed[1]


ROWS = [
    {"what": {"method": method, "length": length}, "share": 0.00125, "dev_loss": loss, "train": [],
     "scores": {"test": {"BLEU": bleu, "NIST": 2.5, "told": 0.5}}}
    for method, length, loss, bleu in [("prefix", 1, 1.5, 0.25), ("prefix", 1, 1.0, 0.75), ("embedding", 1, 2.0, 0.125),
                                       ("prefix", 10, 1.0, 1.0)]
]  # fmt: skip
TABLE = """gpt2-mini on e2e, 630 test inputs; mean ± half the range over seeds 7, 8.

| method | length | runs | trained | dev loss | BLEU | NIST | the paper's GPT-2 medium: BLEU |
| --- | --- | --- | --- | --- | --- | --- | --- |
| prefix | 1 | 2 | 0.12% | 1.250 ± 0.250 | 50.0 ± 25.0 | 2.50 ± 0.00 |  |
| embedding | 1 | 1 | 0.12% | 2.000 | 12.5 | 2.50 | 48.1 |
| prefix | 10 | 1 | 0.12% | 1.000 | 100.0 | 2.50 |  |

Learning rates and their dev losses, the lowest was taken:

- prefix: 0.1: 1.500, 0.3: diverged
"""


def test_the_table_of_known_rows():
    args = Namespace(study="ablation", task="e2e", model="gpt2-mini", tests={"test": 630}, seeds=[7, 8])
    assert report.table(ROWS, {"prefix": {"0.1": 1.5, "0.3": None}}, args) == TABLE


def test_a_metric_that_a_row_lacks_is_a_dash_in_its_group(tmp_path):
    """As METEOR, where Java failed, or was there in another session only."""
    rows = copy.deepcopy(ROWS)
    rows[1]["scores"]["test"]["METEOR"] = rows[3]["scores"]["test"]["METEOR"] = 0.5
    args = Namespace(study="ablation", task="e2e", model="gpt2-mini", tests={"test": 630}, seeds=[7, 8])
    lines = report.table(rows, {}, args).splitlines()[2:7]
    assert "| BLEU | NIST | METEOR |" in lines[0] and {line.count("|") for line in lines} == {10}
    assert "| 50.0 ± 25.0 | 2.50 ± 0.00 | - |" in lines[2] and "| 12.5 | 2.50 | - |" in lines[3]
    assert "| 100.0 | 2.50 | 50.0 |" in lines[4]
    rows[0]["scores"]["test"]["METEOR"] = 0.5  # of the first row, but not of all
    del rows[1]["scores"]["test"]["METEOR"]
    assert {line.count("|") for line in report.table(rows, {}, args).splitlines()[2:7]} == {10}
    report.draw(rows, tmp_path / "figure.png")


def test_several_test_sets_stand_side_by_side():
    scores = {"seen": {"BLEU": 0.5, "NIST": 3.0, "TER": 0.25}, "unseen": {"BLEU": 0.25, "NIST": 2.0, "TER": 0.5}}
    rows = [{"what": {"method": "finetune"}, "share": 1.0, "dev_loss": 1.0, "train": [], "scores": scores}]
    tests = {"seen": 500, "unseen": 372, "all": 872}
    args = Namespace(study="extrapolation", task="webnlg", model="gpt2-mini", tests=tests, seeds=[7])
    text = report.table(rows, {}, args)
    assert "| seen: BLEU | seen: TER | unseen: BLEU | unseen: TER | the paper's GPT-2 medium, official test set" in text
    assert text.startswith("gpt2-mini on webnlg, 872 test inputs;")
    assert "| finetune | 1 | 100.00% | 1.000 | 50.0 | 0.25 | 25.0 | 0.50 | 64.2 / 27.7 |" in text


def test_low_data_ends_in_how_far_the_prefix_is_ahead():
    bleu = {("prefix", 50): 0.5, ("finetune", 50): 0.25, ("prefix", 100): 0.5, ("finetune", 100): 0.625}
    rows = [{"what": {"method": method, "examples": size}, "scores": {"test": {"BLEU": score}}}
            for (method, size), score in bleu.items()]  # fmt: skip
    assert "the sizes: +6.2 BLEU" in report.gap(rows)  # the mean of 25 and -12.5
    sets = studies.test_sets(Namespace(study="low-data", task="webnlg"))
    for row in rows:
        row["scores"] = {name: row["scores"]["test"] if name == "all" else {"BLEU": 0.1} for name in sets}
    assert "the sizes: +6.2 BLEU" in report.gap(rows)


def test_the_figure_has_a_line_for_each_method(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: pip install -e '.[plot]'")
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *to, **kw: drawn.append(self) or save(self, *to, **kw))
    report.draw(ROWS, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.lines[0].get_xydata().tolist() for line in axes.containers}
    assert lines == {"prefix": [[1, 50], [10, 100]], "embedding": [[1, 12.5]]}
    assert axes.get_xlabel() == "length" and axes.get_ylabel() == "BLEU"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
